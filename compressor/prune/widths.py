"""Which widths a pruned model gets: as many units of each kind as hit the ratio, in shapes that servers load.

All blocks get the same widths, so that config.json alone describes the result. Query heads, key-value groups and FFN channels (in multiples that
kernels and formats like) each come in steps, so only some ratios can be met; of the widths that come within TOLERANCE of the wanted ratio, or else
the nearest, the most even ones win: those that take like shares from attention and FFN.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from compressor.errors import ModelError, RecipeError
from compressor.prune.slicing import WIDTHS
from compressor.prune.units import Family, families, shape

NEAR = 0.1  # how far the widths may be from the wanted ratio
TOLERANCE = 0.01  # of the prunable parameters: widths this near to the wanted ratio count as equally near


@dataclass(frozen=True)
class Widths:
    """What stays in every block: `heads` units of attention of this kind, `ffn` channels; `ratio` is the share of prunable parameters that goes."""

    unit: str  # group | query
    heads: int
    ffn: int
    ratio: float

    def kept(self, family: Family) -> int:
        return self.heads if family.kind == "heads" else self.ffn


def multiple_of(ffn: int) -> int:
    """What the width of an FFN of so many channels is kept a multiple of: 128, as groups of scales, or 64 where that is coarse."""
    return 128 if ffn >= 4096 else 64


def choose(model: nn.Module, ratio: float, unit: str, multiple: int, fits: Callable[[int, int], bool]) -> Widths:
    """The widths for a ratio; `unit` is group, query or auto; `fits(query heads, key heads)` says whether the architecture can have them.

    RecipeError when nothing can be removed in these steps, ModelError for blocks that differ already.
    """
    if len({(f.kind, f.count, f.parts[0].width) for f in families(model)}) > 2:
        raise ModelError("its blocks differ in width, and units are removed from blocks that are alike: prune the model that it was made from")
    found = [w for kind in (("group", "query") if unit == "auto" else (unit,)) for w in _candidates(model, kind, multiple, fits)]
    dense = max(found, key=lambda w: (w.heads, w.ffn))
    found = [w for w in found if w.ratio > 0]
    if not found:
        raise RecipeError(
            f"nothing can be pruned: the FFN has {dense.ffn} channels, which leaves no multiple of {multiple}; use a smaller --multiple"
        )

    counts = {kind: [f.count for f in families(model, kind)[:2]] for kind in {w.unit for w in found}}

    def rank(w: Widths) -> tuple[float, float]:
        heads, ffn = counts[w.unit]
        return max(abs(w.ratio - ratio) - TOLERANCE, 0.0), abs(w.heads / heads - w.ffn / ffn)  # then the most even shares

    return min(found, key=rank)


def check_near(widths: Widths, ratio: float, instead: str) -> None:
    """RecipeError for widths that are far from the wanted ratio; `instead` says what to do about it."""
    if abs(widths.ratio - ratio) > NEAR:
        nearest = f"the nearest widths take {widths.ratio:.0%} of the prunable weights"
        raise RecipeError(f"pruning {ratio:.0%} cannot be done: {nearest}; {instead}")


def shape_notes(model: Any, asked: float, reached: float) -> list[str]:
    """What the user should know of the shape that a pruned model came out with."""
    out = []
    if abs(reached - asked) > TOLERANCE:
        out.append(f"{asked:.1%} was asked for; the nearest that heads, channels or blocks allow in their steps is {reached:.1%}")
    if getattr(model.config, WIDTHS, None) is not None:
        out.append("its blocks have widths that config.json cannot say to others: only compressor loads this folder")
    return out


def prunable(model: nn.Module) -> int:
    """Weights of the linears of all blocks that families cover."""
    return sum(_weights(model, f) for f in families(model))


def _weights(model: nn.Module, family: Family) -> int:
    """Weights that all units of a family own together."""
    return sum(math.prod(shape(model.get_submodule(part.name))) for part in family.parts)


def _candidates(model: nn.Module, unit: str, multiple: int, fits: Callable[[int, int], bool]) -> list[Widths]:
    groups = [f for f in families(model) if f.kind == "heads"][0]
    heads, ffn = families(model, unit)[:2]
    share = groups.parts[0].width // groups.parts[1].width  # query heads of a group
    total, own, channels = prunable(model) / len({f.block for f in families(model)}), _weights(model, heads), _weights(model, ffn)
    step, out = heads.within and heads.count // heads.within or 1, []  # query heads go by one from every group
    for kept in range(step, heads.count + 1, step):
        queries = kept if heads.within else kept * share
        keys = groups.count if heads.within else kept
        if kept < heads.count and not fits(queries, keys):
            continue
        for width in {*range(multiple, ffn.count + 1, multiple), ffn.count}:
            gone = own * (1 - kept / heads.count) + channels * (1 - width / ffn.count)
            out.append(Widths(unit, kept, width, gone / total))
    return out
