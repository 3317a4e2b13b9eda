"""How long the segments of a row are that share a table."""

from compressor.errors import RecipeError
from compressor.recipe import Quant

STEPS = (256, 128, 64, 32)  # the kernels like segments in multiples of these, the larger the better; CPUs stop at 32, GPUs at 64


def resolve_segment(k: int, options: Quant, name: str) -> tuple[int, str]:
    """The segment length for layer `name` of k in features, in `options.gpr` segments (None: one), and a note for the report or "".

    Segments are contiguous and equal but for the last, which may be shorter: k / gpr, rounded up to the largest of 256, 128, 64 and 32 with which
    there still are gpr segments and the last is at least half full; if with none, rounded up to a whole number, which the fast kernels do not
    take. Raises RecipeError when there cannot be so many segments, or one has no more columns than its table has entries.
    """
    count, entries = options.gpr or 1, 1 << options.bits
    if count == 1 and k > entries:
        return k, ""
    for step in STEPS:
        length = -(-k // (count * step)) * step
        last = k - (count - 1) * length
        if 2 * last >= length and last > entries:
            return length, "" if last == length else f"{k} in features in {count} segments: {length} columns each, the last {last}"
    length = -(-k // count)
    if k - (count - 1) * length <= entries:
        raise RecipeError(f"gpr={count} tables of {entries} values are too many for the {k} columns of {name}; use a smaller --gpr")
    return length, f"{k} in features in {count} segments of {length} columns run in plain torch, the kernels want multiples of {STEPS[-1]}"
