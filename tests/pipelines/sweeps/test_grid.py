"""Grids: words of the command line and keys of recipes make the same experiments, and whatever a file holds, errors are sentences."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compressor.errors import CompressorError, RecipeError
from compressor.pipelines.cli import FLAGS, read_yaml
from compressor.pipelines.sweeps import grid as grids
from compressor.pipelines.sweeps.grid import Experiment, Grid, parse_set


def experiments(grid: Any, **overrides: Any) -> list[Experiment]:
    return Grid("tiny", grid, overrides).experiments()


def ids(grid: Any, **overrides: Any) -> list[str]:
    return [experiment.id for experiment in experiments(grid, **overrides)]


def test_the_product_of_the_axes_with_points_and_without_what_is_excluded() -> None:
    axes = {"quant.bits": [4, 3, 2], "quant.packer": ["rtn", "gptq"], "points": [{"quant": "sketch3"}]}
    found = experiments(axes | {"exclude": [{"quant.bits": [2, 3], "quant.packer": "rtn"}]})
    said = [(e.keys["quant.bits"], e.keys["quant.packer"]) for e in found]
    assert said == [(4, "rtn"), (4, "gptq"), (3, "gptq"), (2, "gptq"), (3, "sketch")]
    assert [e.label for e in found] == ["w4g128-rtn", "w4g128-gptq", "w3g128-gptq", "w2g128-gptq", "w3gpr1-sketch"]


def test_words_and_keys_are_the_same_experiments() -> None:
    words = {"quant": ["3bit:rtn"], "group": [64], "tune": ["peqa"], "sym": [False], "lr": ["1e-3"], "absolute": [True]}
    keys = {"quant": {"bits": 3, "packer": ["rtn"], "group": [64], "symmetric": [False]}, "tune.method": ["peqa"], "tune.lr": [0.001]}
    assert ids(words) == ids(keys | {"tune.parametrization": ["absolute"]}) == ids({"points": [{key: value[0] for key, value in words.items()}]})
    (pruned,) = experiments({"prune": ["loraprune:30%"], "base": {"prune-steps": 4, "max-tokens": 100}})
    assert pruned.recipe is not None and (pruned.recipe.prune.ratio, pruned.recipe.eval.max_tokens) == (0.3, 100)


def test_every_flag_of_run_is_a_word() -> None:
    for flag, key in FLAGS.items():
        section, _, leaf = key.rpartition("__")
        assert next(iter(grids._spelling(flag, True))) == (f"{section}.{leaf}" if section else leaf)
    said = {"layer": "lm=w4g64", "candidates": "w3g64, w4g64", "target_size": "2kB", "max-loss": "2%", "ignore": "lm", "choose.target_size": "2kB"}
    assert grids._spelt(said) == {
        "quant.layers": {"lm": "w4g64"}, "choose.candidates": ["w3g64", "w4g64"], "choose.target_size": 2000, "choose.max_loss": 0.02,
        "quant.ignore": ["lm"],
    }  # fmt: skip


def test_duplicates_are_one_experiment_and_the_id_knows_what_decides_the_result(tmp_path: Path) -> None:
    assert len(ids({"tune": ["none", "peqa"], "tune.steps": [10, 20]})) == 3  # nothing is tuned: no steps
    assert len(ids({"quant.packer": ["rtn", "gptq"], "nsamples": [16, 32]})) == 3  # rtn reads no text
    grid = {"quant.bits": [3], "data": [str(tmp_path / "a.txt")]}
    (tmp_path / "a.txt").write_text("one")
    first = ids(grid)
    assert ids(grid, device="cpu") == first
    (tmp_path / "b.txt").write_text("one")
    assert ids(grid | {"data": [str(tmp_path / "b.txt")]}) == first
    (tmp_path / "a.txt").write_text("two")
    assert ids(grid) != first and ids(grid, seed=1) != ids(grid)


def test_another_version_of_the_program_makes_other_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ids({"quant.bits": [3, 4]})
    monkeypatch.setattr(grids, "__version__", "99.0")
    assert not {*first} & {*ids({"quant.bits": [3, 4]})}


def test_what_cannot_be_has_a_reason_and_no_recipe() -> None:
    found = experiments({"quant": ["3bit", "sketch3"], "tune": ["none", "peqa"], "points": [{"quant": "5bit"}, {"quant": "w2g64", "group": 32}]})
    reasons = [e.reason for e in found if e.recipe is None]
    assert len(found) == 6 and len({e.id for e in found}) == 6
    for reason, words in zip(reasons, ("packer sketch makes tables", "bits=5 is not supported", "say it once"), strict=True):
        assert reason is not None and words in reason


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ({"target_size": [10**6, "1XB"]}, "'1XB'"),
        ({"max_loss": ["2%", "0%"]}, "'0%'"),
        ({"layer": ["re:o_proj=w4g64", "o_proj"]}, "'o_proj'"),
        ({"absolute": [True, "yes"], "tune": "peqa"}, "is true or false"),
        ({"quant": ["3bit", date(2026, 1, 1)]}, "'2026-01-01'"),
        ({"quant.damp": [0.01, float("nan")]}, "damp=nan"),
        ({"seed": [1, 10**400]}, "must be int"),
        ({"quant": "none", "prune": "loraprune:20%", "target_bits": [None, 3]}, "nothing is packed"),
        ({"max_loss": 0.02, "sensitivity": ["kl", "error"]}, "leave choose.measure at kl"),
    ],
)
def test_a_bad_value_is_a_skipped_row(axis: dict[str, Any], words: str) -> None:
    good, bad = experiments(axis)
    assert good.recipe is not None and bad.recipe is None and words in (bad.reason or "")
    json.dumps([good.keys, bad.keys], allow_nan=False)


def test_a_base_is_checked_with_its_points() -> None:
    found = experiments({"base": {"candidates": "w2g64, w4g64", "save": "task"}, "target_bits": [3, 3.5], "tune": ["peqa", "none"]})
    assert [e.reason is None for e in found] == [True, False] * 2
    assert found[0].recipe is not None and found[0].recipe.choose.candidates == ("w2g64", "w4g64")
    with pytest.raises(RecipeError, match=r"no experiment of the grid can be run; the first: .*nothing is chosen"):
        experiments({"base": {"candidates": "w2g64"}, "quant.bits": [3, 4]})


def test_labels_tell_targets_and_layers_apart() -> None:
    points = [{"quant": "3bit"}, {"layer": "re:down_proj=w4g64"}, {"target_bits": 3}, {"target_bits": 3.5}, {"max_loss": "2%", "tune": "peqa"}]
    labels = ["w3g128-gptq", "mixed-w3g128-gptq", "3bit-gptq", "3.5bit-gptq", "loss2-gptq-peqa"]
    assert [e.label for e in experiments({"points": points})] == labels


def test_a_grid_that_holds_itself_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("quant: &q [3bit, *q]\n")
    with pytest.raises(RecipeError, match="nests deeper"):
        experiments(read_yaml(tmp_path / "grid.yaml", "grid"))


def test_what_the_base_says_of_another_method_does_not_carry_over() -> None:
    base = {"group": 64, "quant.damp": 0.02, "rank": 4}
    found = experiments({"base": base | {"tune": "lora"}, "quant.packer": ["gptq", "rtn", "sketch"], "tune": ["none", "lora"]})
    assert [e.reason for e in found] == [None] * 6
    read = [(e.recipe.quant.group, e.recipe.quant.damp, e.recipe.tune.rank) for e in found if e.recipe]
    assert read == [(64, 0.02, 8), (64, 0.02, 4), (64, 0.01, 8), (64, 0.01, 4), (128, 0.02, 8), (128, 0.02, 4)]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"quant.bitz": [3]}, "unknown key 'quant.bitz' in the grid; did you mean quant.bits"),
        ({"grop": [3]}, "did you mean group"),
        ({"zzzzzz": [3]}, "write a key of the recipe"),
        ({"base": {"bitz": 3}, "quant.bits": [3]}, "unknown key 'bitz'"),
        ({"quant.bits": [3], "exclude": [{"quant.bitz": 3}]}, "unknown key"),
        ({"quant.bits": [3], "exclude": [{"quant.bits": 3}]}, "excludes all"),
        ({"quant.bits": [3], "exclude": [3]}, "a pattern of `exclude`"),
        ({"quant.bits": [3], "points": [3]}, "a point of the grid"),
        ({"quant.bits": [3], "points": 3}, "must be a list"),
        ({"base": [3]}, "must be a mapping"),
        ({"base": {"quant.bits": 3}}, "asks for nothing"),
        ({"quant.bits": []}, "has no values"),
        ({"quant.bits": [5, "three"]}, "no experiment of the grid can be run; the first: bits=5 is not supported"),
        ({"model": ["tiny"]}, "does not name one"),
        ({"absolute": ["yes"], "quant.bits": [3]}, "is true or false"),
        ({"seed": list(range(200)), "nsamples": list(range(1, 200))}, "more than 10,000"),
        ([3], "not list"),
    ],
)
def test_errors_are_one_sentence(grid: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=".") as error:
        Grid("tiny", grid).experiments()
    assert words in str(error.value)


def test_files_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    for text, words in ((None, "there is no grid"), ("", "is empty"), ("a: [", "no valid YAML"), ("a: 2020-99-99", "no valid YAML")):
        if text is not None:
            path.write_text(text)
        with pytest.raises(RecipeError, match=words):
            read_yaml(path, "grid")
    assert parse_set(["quant.group=64", "data.data=a.txt", "tune.lr=1e-3", "x=[1"]) == {
        "quant.group": 64, "data.data": "a.txt", "tune.lr": "1e-3", "x": "[1",
    }  # fmt: skip
    with pytest.raises(RecipeError, match="--set 'group'"):
        parse_set(["group"])
    with pytest.raises(RecipeError, match=r"quant.group is what the grid varies"):
        Grid("tiny", {"group": [64, 128]}, {"quant.group": 32})


words = st.sampled_from(
    [*FLAGS, "quant", "prune", "quant.bits", "quant.packer", "tune.method", "quant.layers", "choose.target_size", "base", "points"]
)
known = st.sampled_from(["3bit", "w2g64", "sketch3", "peqa", "none", "loraprune:30%", "rtn", "gptq", "lora", 2, 3, 64, -1, 0.5, 1e400, "", "~"])
value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.datetimes() | st.binary(max_size=4) | known,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
exclude = st.none() | st.lists(st.dictionaries(words, known, max_size=2), max_size=2)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(words | st.text(max_size=8), value, max_size=4), exclude)
def test_no_grid_ends_in_a_traceback(grid: dict[str, Any], out: Any) -> None:
    try:
        found = Grid("tiny", grid | {"exclude": out}).experiments()
    except CompressorError as error:
        assert str(error)
    else:
        assert found and any(e.recipe is not None for e in found)
        json.dumps([e.keys for e in found], allow_nan=False)
