"""Recipes and grids of strangers: merge keys, tags and numbers that PyYAML chokes on end in one sentence; recipes that people write are taken."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compressor.errors import RecipeError
from compressor.pipelines import cli, digests, verify, yaml_text
from compressor.pipelines.sweeps.grid import Grid, parse_set
from compressor.recipe import Quant, Recipe

MERGES = "k: &a {k0: 1, k1: 1}\n" + "".join(f"k{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
BAD = {
    "a: !!int ''": "none of the type",
    "a: !!float ''": "none of the type",
    "a: !!bool x": "none of the type",
    "a: !!timestamp x": "none of the type",
    "a: !!int {=: ''}": "none of the type",
    f"a: {'1:' * 200}1.5": "none of the type",
    "a: !!int 0x": "invalid literal",
    "a: !!binary A": "base64",
    "a: <<": "could not determine a constructor",
    "? [a]\n: 1": "unhashable",
    f"a: {'[' * 3000}": "nests deeper",
    "{<<: {a: 1}, b: 2}": "merges mappings",
    "a: !!set {<<: {a: 1}}": "merges mappings",
}


@pytest.mark.parametrize("text", [MERGES, MERGES.replace("<<", "!!merge x"), MERGES.replace("<<", "!<tag:yaml.org,2002:merge> x")])
def test_merge_keys_are_refused_at_once(tmp_path: Path, text: str) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError, match="merges mappings"):
        yaml_text.parse(text)
    assert time.process_time() - begin < 1, "9**8 mappings would be copied"
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match="write the keys out"):
        cli.read_yaml(tmp_path / "r.yaml", "recipe")


@pytest.mark.parametrize("text", BAD)
def test_what_constructors_choke_on_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=BAD[text]) as found:
        cli.read_yaml(tmp_path / "r.yaml", "recipe")
    assert str(found.value).startswith(f"{tmp_path}/r.yaml is no valid YAML: ") and "\n" not in str(found.value)
    assert parse_set([f"x={text}"]) == {"x": text}, "on a command line it is text"


@pytest.mark.parametrize("text", [*BAD, MERGES])
def test_verify_says_that_such_a_recipe_is_another(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    (tmp_path / "report.json").write_text('{"recipe": {"seed": 0}}')
    digests.seal(tmp_path, None)
    (tmp_path / "recipe.yaml").write_text(text)
    document, _ = verify.verify(tmp_path)
    assert document["verdict"] == verify.BROKEN and document["faults"] == [{"file": "recipe.yaml", "what": "was edited"}]


LEAVES = st.sampled_from(["", "x", "1", "-", "0x", "1:2:3.5", "1e3", "2001-99-99", "=", "<<", "3bit", "~", "é", "'", "nan"])
NAMES = st.sampled_from(["seed", "quant", "tune", "data", "model", "quant.bits", "layer", "base", "points", "x", "<<"])
TAGS = st.sampled_from([
    "int", "float", "bool", "null", "str", "timestamp", "binary", "set", "omap", "pairs", "map", "seq", "merge", "value", "python/name:os.system",
])  # fmt: skip


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


SCALARS = LEAVES | LEAVES.map(quoted)
YAML = st.recursive(
    SCALARS | st.builds("!!{} {}".format, TAGS, SCALARS),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: "[" + ", ".join(parts) + "]")
        | st.lists(st.tuples(NAMES, inner), max_size=3).map(lambda pairs: "{" + ", ".join(f"{k}: {v}" for k, v in pairs) + "}")
        | st.builds("!!{} {}".format, TAGS, inner)
    ),
    max_leaves=8,
)


@settings(deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(NAMES, YAML), max_size=3))
def test_any_recipe_or_grid_ends_in_one_or_in_a_sentence(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    (tmp_path / "r.yaml").write_text("".join(f"{key}: {value}\n" for key, value in pairs))
    for read in (cli.read_recipe, lambda path: Grid("tiny", cli.read_yaml(path, "grid")).experiments()):
        try:
            read(tmp_path / "r.yaml")
        except RecipeError as error:
            assert 0 < len(str(error)) <= 500


def recipe(layers: int, experts: int = 0) -> Recipe:
    """A recipe that names the width of every linear of a model of so many layers."""
    names = [f"self_attn.{part}_proj" for part in "qkvo"]
    places = [f"experts.{i}." for i in range(experts)] or [""]
    names += [f"mlp.{place}{part}_proj" for place in places for part in ("gate", "up", "down")]
    widths = {f"model.layers.{i}.{name}": f"w{2 + i % 3}g64:asym" for i in range(layers) for name in names}
    return Recipe(quant=Quant(layers=widths, ignore=("lm_head", "k_proj")))


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("found", [recipe(32), recipe(80), recipe(16, experts=64)], ids=["32 layers", "80 layers", "experts"])
def test_recipes_that_name_every_linear_are_taken(tmp_path: Path, found: Recipe, flow: bool) -> None:
    values: Any = found.to_dict()
    assert len(values["quant"]["layers"]) >= 224
    (tmp_path / "r.yaml").write_text("# of a run\n" * 100 + yaml.safe_dump(values, default_flow_style=flow, sort_keys=False))
    assert cli.read_recipe(tmp_path / "r.yaml") == found
    assert yaml_text.parse("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}, "aliases stay"
