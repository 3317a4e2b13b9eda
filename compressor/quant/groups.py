"""Which group size a layer gets when the one asked for does not divide its width."""

from compressor.errors import RecipeError
from compressor.recipe import Quant

PREFERRED = (128, 64, 32)  # what the GPU kernels take below 256
STEP = 16  # group sizes that servers take are multiples of this


def resolve_group(k: int, options: Quant, name: str) -> tuple[int, str]:
    """The group size for layer `name` of k in features, and a sentence for the report, empty when it is what was asked for.

    Asked for are `options.gpr` groups a row, or, where that is None, groups of `options.group`; -1 means one group per row. A size that does not
    divide k gives way to the largest of 128, 64 and 32 below it that does, for those run on the GPU kernels; if none does, to the largest divisor
    of k below it that is a multiple of 16. Raises RecipeError, naming what would work, when there is none or the size is neither -1 nor positive.
    """
    asked = options.group
    if options.gpr is not None:
        if k % options.gpr:
            raise RecipeError(f"gpr={options.gpr} does not divide the {k} in features of {name}; grids need groups of one size")
        asked = k // options.gpr
    if asked == -1:
        return k, ""
    if asked > 0 and k % asked == 0:
        return asked, ""
    fitting = [size for size in range(STEP, k + 1, STEP) if k % size == 0]
    smaller = [size for size in fitting if size <= asked]
    if not smaller:
        works = f" or one of {', '.join(map(str, fitting))}" if fitting else f" or a divisor of {k}"
        raise RecipeError(f"group={asked} does not fit {name} with {k} in features; use -1 (one scale per row){works}")
    size = next((size for size in PREFERRED if size in smaller), smaller[-1])
    return size, f"group {asked} does not divide {k} in features; {size} used"
