"""Sketches through the main job: the folder, its size, what tuning moves, the arms, and what the dry run foretold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compressor.errors import NumericError, RecipeError
from compressor.linear import packed_linears
from compressor.pipelines import compress, fisher, load
from compressor.pipelines.run import dry_run, run
from compressor.pipelines.show import Show
from compressor.pipelines.tools import evaluate_folder
from compressor.recipe import Quant, Recipe

QUICK: dict[str, Any] = {
    "data__nsamples": 8, "data__seqlen": 64, "tune__steps": 8, "tune__batch": 4, "eval__max_tokens": 1024, "device": "cpu", "tune__method": "table",
}  # fmt: skip
SKETCH = Recipe().with_(quant__packer="sketch", quant__bits=3, quant__gpr=2, **QUICK)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One short run of tiny at 3 bits with two tables a row, tuned."""
    place = tmp_path_factory.mktemp("sketch") / "out"
    return place, run(SKETCH, place)


def test_size_is_that_of_the_formula(quick: tuple[Path, dict[str, Any]]) -> None:
    folder, document = quick
    report = json.loads((folder / "report.json").read_text())
    shapes = [row["shape"] for row in report["layers"]]
    entries = sum(n * 2 * 8 for n, _ in shapes)
    assert report["training"]["trainable"] == entries
    bits = sum(3 * n * k for n, k in shapes) + 16 * entries
    weights = sum(n * k for n, k in shapes)
    assert document["packed"]["bits_per_weight"] == document["tuned"]["bits_per_weight"] == bits / weights
    stored = load_file(folder / "model.safetensors")
    size = sum(t.numel() * t.element_size() for name, t in stored.items() if name.endswith(("weight_packed", "weight_table")))
    assert size == pytest.approx(bits / 8, rel=0.01)
    assert {row["symmetric"] for row in report["layers"]} == {None} and {row["group"] for row in report["layers"]} == {64, 256}
    assert any("the last 128" in row["note"] for row in report["layers"])


def test_tuning_moves_tables_and_nothing_else(quick: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, document = quick
    run(SKETCH.with_(tune__method="none"), tmp_path / "untuned")
    tuned, plain = load_file(folder / "model.safetensors"), load_file(tmp_path / "untuned" / "model.safetensors")
    assert tuned.keys() == plain.keys()
    assert {name.rpartition(".")[2] for name in tuned if not torch.equal(tuned[name], plain[name])} == {"weight_table"}
    assert document["tuned"]["domain"]["perplexity"] < document["packed"]["domain"]["perplexity"]


def test_the_folder_measures_as_the_run_did(quick: tuple[Path, dict[str, Any]]) -> None:
    folder, document = quick
    found = evaluate_folder(str(folder), "python", 64, 1024, "cpu", Show())
    assert found["perplexity"] == pytest.approx(document["tuned"]["domain"]["perplexity"], rel=1e-5)
    assert "table" in (folder / "README.md").read_text()


def test_the_dry_run_foretold_the_size(quick: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    found = dry_run(SKETCH, tmp_path / "out", Show())
    assert found["bits_per_weight"] == quick[1]["tuned"]["bits_per_weight"]
    assert found["folder_bytes"] == pytest.approx(quick[1]["tuned"]["folder_bytes"], rel=0.03)
    grids = dry_run(SKETCH.with_(quant__packer="gptq", tune__method="peqa"), tmp_path / "out", Show())
    assert found["peak_bytes"]["tune"] > grids["peak_bytes"]["tune"] and found["seconds"]["compress"] > grids["seconds"]["compress"]


@pytest.mark.parametrize(("packer", "tuner", "words"), [("sketch", "peqa", "table"), ("gptq", "table", "peqa"), ("squeezellm", "peqa", "table")])
def test_tuners_that_do_not_fit_are_refused_before_any_work(packer: str, tuner: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        run(SKETCH.with_(quant__packer=packer, tune__method=tuner), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": 64}, "group=64 means nothing to packer sketch: leave it out; tables go by --gpr"),
        ({"symmetric": False}, "symmetric=False means nothing to packer sketch"),
        ({"packer": "gptq", "refit": False}, "refit=False means nothing to packer gptq"),
        ({"packer": "squeezellm", "exponent": 4.0}, "exponent=4.0 means nothing to packer squeezellm"),
        ({"packer": "gptq", "group": 64}, "group=64 and gpr=2 both say how long groups are"),
        ({"packer": "rtn", "damp": 0.1}, "damp=0.1 means nothing to packer rtn"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    recipe = SKETCH.with_(tune__method="none", **{f"quant__{key}": value for key, value in options.items()})
    with pytest.raises(RecipeError, match=words):
        run(recipe, tmp_path / "out")


def test_too_many_tables_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="use a smaller --gpr"):
        run(SKETCH.with_(quant__gpr=16), tmp_path / "out")


def test_squared_gradients_are_those_of_autograd_window_by_window() -> None:
    model = load.load("tiny", "cpu").model
    ids = torch.randint(1, 2000, (3, 24))
    names = ["model.layers.1.mlp.down_proj", "model.layers.3.self_attn.q_proj"]
    flags = [p.requires_grad for p in model.parameters()]
    found = fisher.squared_gradients(model, names, ids)
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight")
        wanted = torch.zeros_like(weight)
        for window in ids:
            logits = model(input_ids=window.unsqueeze(0)).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum")
            wanted += torch.autograd.grad(loss, weight)[0].square()
        assert torch.allclose(found[name], wanted, rtol=1e-3, atol=1e-6 * float(wanted.max()))


def test_squared_gradients_leave_nothing_behind_and_are_finite() -> None:
    model = load.load("tiny", "cpu").model
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AttributeError):
        fisher.squared_gradients(model, ["model.layers.0.mlp.down_proj", "model.layers.9.mlp.down_proj"], torch.ones(1, 8, dtype=torch.int64))
    assert [p.requires_grad for p in model.parameters()] == flags
    name = "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        assert fisher.squared_gradients(model, [name, name], torch.ones(1, 8, dtype=torch.int64))[name].any()
        model.get_parameter("model.norm.weight").fill_(1e30)
        model.get_parameter("lm_head.weight").mul_(1e30)
    with pytest.raises(NumericError, match=name):
        fisher.squared_gradients(model, [name], torch.randint(1, 2000, (2, 8)))
    assert not any(hasattr(p, "grad") and p.grad is not None for p in model.parameters())


def test_squeezellm_heeds_the_gradients() -> None:
    ids = torch.randint(1, 2000, (4, 48))
    weights = {}
    for name in ("squeezellm", "plain"):
        model = load.load("tiny", "cpu").model
        quant = Quant(bits=2, packer="squeezellm" if name == "squeezellm" else "sketch", exponent=0.0, feedback=False, refit=False)
        rows, _, _ = compress.compress(model, quant, torch.float16, ids)
        assert all(row["note"] == "" for row in rows)
        weights[name] = packed_linears(model)["model.layers.0.self_attn.q_proj"].packed().dequantize()
    assert not torch.equal(weights["squeezellm"], weights["plain"])
