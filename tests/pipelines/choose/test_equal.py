"""A mix of widths at the bytes of one width: the target that it comes to, and runs without one where nothing smaller can be tried."""

from pathlib import Path

import pytest

from compressor.errors import RecipeError
from compressor.pipelines.choose.equal import settled
from compressor.recipe import Choose, Recipe
from tests.pipelines import toys


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(model=str(toys.make(tmp_path / "llama", "llama"))).with_(quant__bits=3, quant__group=32, choose__equal=True)


def test_the_target_is_what_one_width_comes_to(recipe: Recipe) -> None:
    found = settled(recipe, print)
    assert found.choose == Choose(target_bits=3 + 16 / 32)  # a scale of 16 bits for 32 codes
    assert settled(found, print) == found and found.quant == recipe.quant
    zeros = settled(recipe.with_(quant__symmetric=False), print)
    assert zeros.choose.target_bits == pytest.approx(3 + 19 / 32)


def test_where_nothing_is_smaller_nothing_is_chosen(recipe: Recipe) -> None:
    least = recipe.with_(quant__bits=2, choose__candidates=("w2g32", "w3g32"))
    said: list[str] = []
    assert settled(least, said.append) == least.with_(choose=Choose()) and "no candidate is smaller" in said[0]


def test_pruning_comes_before_it(recipe: Recipe) -> None:
    pruned = settled(recipe.with_(prune__method="depth", prune__ratio=0.4), print)
    assert pruned.choose.target_bits == 3.5 and pruned.prune.method == "depth"


def test_one_target_is_enough() -> None:
    with pytest.raises(RecipeError, match="give one of target_bits, target_size, equal and max_loss"):
        Recipe().with_(choose__equal=True, choose__target_bits=3.5)


def test_what_is_not_packed_has_no_choice(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="nothing is packed"):
        settled(recipe.with_(quant__packer="none", prune__method="depth", prune__ratio=0.4), print)
