"""A slice of bench/soak.py, and that it draws values for every key of the recipe."""

from pathlib import Path
from typing import Any

import pytest

from compressor.pipelines import evaluate
from compressor.recipe import Recipe

SEEDS = (10, 1, 30)


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "bench"))
    monkeypatch.setattr(evaluate, "SAMPLE_TOKENS", 2)
    import soak

    return soak


def test_every_key_of_the_recipe_is_drawn(soak: Any) -> None:
    import soak_recipes

    assert soak_recipes.unknown() == [], "add values for them to bench/soak_recipes.py"
    known = set(soak_recipes.keys())
    assert set(soak_recipes.VALUES) <= known and known >= soak_recipes.FIXED
    for key, values in soak_recipes.VALUES.items():
        section, _, leaf = key.rpartition(".")
        default = getattr(getattr(Recipe(), section), leaf) if section else getattr(Recipe(), leaf)
        assert len(values) > 0 and (default is None or isinstance(values[0], type(default))), key


def test_a_slice_of_the_soak(soak: Any, tmp_path: Path) -> None:
    soak.texts(tmp_path / "texts")
    rows = [soak.one(number, tmp_path, []) for number in SEEDS]
    assert {row["outcome"] for row in rows} <= {"ok", "expected"} and rows[0]["outcome"] == "ok", rows
    assert all(bool(row.get("sentence")) == (row["outcome"] == "expected") for row in rows)
    again = soak.one(SEEDS[0], tmp_path, [])
    assert {k: again.get(k) for k in ("recipe", "perplexity", "bits")} == {k: rows[0].get(k) for k in ("recipe", "perplexity", "bits")}
