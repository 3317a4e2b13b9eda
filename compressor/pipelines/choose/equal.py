"""A choice of widths at the size of one width for all: `choose.equal` as a number of bits."""

import math
from collections.abc import Callable
from dataclasses import replace

from compressor.pipelines import checkpoint, compress, estimate, load, pruning
from compressor.pipelines.choose.choice import ways
from compressor.pipelines.choose.stage import check
from compressor.recipe import Choose, Quant, Recipe


def settled(recipe: Recipe, say: Callable[[str], None]) -> Recipe:
    """The recipe with target_bits in place of `choose.equal`: what `quant` alone comes to; without a choice, and saying so, where no candidate is
    smaller.

    Reads the shapes of the model and no weights. Raises RecipeError for what cannot be packed.
    """
    if not recipe.choose.equal:
        return recipe
    check(recipe)
    source = checkpoint.resolve(recipe.model)
    plain, config = recipe.with_(choose=Choose()), checkpoint.read_config(source)
    if config.get("quantization_config"):
        return plain  # the run will say what is wrong with that
    model = estimate.shell(source) if recipe.prune.method == "none" else pruning.shell_after(source, recipe.prune)
    stored = load.folder_dtype(checkpoint.stored_dtype(source), config)

    def bits(way: Quant) -> list[float]:
        """Of each linear."""
        return [estimate.stored_bits(plain, [target], stored) for target in compress.plan(model, way).packed()]

    uniform = bits(recipe.quant)
    least = map(min, zip(*map(bits, ways(recipe.quant, recipe.choose).values()), strict=True))
    if sum(least) >= sum(uniform):
        say("nothing is chosen by layer: no candidate is smaller than the width that all linears get")
        return plain
    weights = sum(math.prod(target.shape) for target in compress.plan(model, recipe.quant).packed())
    return recipe.with_(choose=replace(recipe.choose, equal=False, target_bits=sum(uniform) / weights))
