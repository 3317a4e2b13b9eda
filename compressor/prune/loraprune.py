"""Gradual structured pruning inside the training loop: scores averaged over steps, a cubic ramp, an exact last prune, then healing.

    S <- 0.9 S + 0.1 scores of the step                    every step
    removed(t) = removed at the end * cubic(t)              every `every` steps from `begin` to `end` of the run; all of it at `end`

Source: LoRAPrune, Zhang et al., 2023, arXiv 2305.18403, section 3; any importance of compressor.prune.importance can take the place of its own.
Every block loses as much as any other, unless `uniform` is off: then units of one kind are ranked over all blocks. What is masked stays masked. A
step whose scores are not finite leaves the averages as they are. Price: a pass over all weights a step.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compressor.errors import NumericError
from compressor.prune import slicing
from compressor.prune.importance import Importance, unit_scores
from compressor.prune.lowrank import LowRank
from compressor.prune.schedule import Ramp
from compressor.prune.unit_masks import UnitMasks, select
from compressor.prune.units import Family

MEMORY = 0.9  # of the average of scores
STEPS_BEFORE = 10  # steps of scores that a prune in one shot waits for


class UnitPruner:
    """The pruner of heads and FFN channels; kept: how many units of each family stay; chunk: units of a kind that stay or go together."""

    restarts: tuple[int, ...] = ()

    def __init__(
        self, paths: Mapping[str, LowRank], units: Sequence[Family], masks: UnitMasks, kept: Mapping[str, int], importance: Importance,
        ramp: Ramp, uniform: bool = True, chunk: Mapping[str, int] | None = None, gate: bool = False,
    ):  # fmt: skip
        self.paths, self.units, self.masks, self.kept, self.importance, self.ramp = paths, units, masks, kept, importance, ramp
        self.uniform, self.chunk, self.gate = uniform, chunk or {}, gate
        self.scores = {f.key: torch.zeros(f.count, device=masks.masks[f.key].device) for f in units}

    def tensors(self) -> dict[str, Tensor]:
        return {**self.masks.tensors(), **{f"score.{key}": score for key, score in self.scores.items()}}

    def prune(self, step: int) -> None:
        """Bring the masks to what the ramp wants; a step that was done already changes nothing."""
        self.importance.clear()
        share = self.ramp.share(step)
        wanted = {f.key: f.count - self._gone(f, share) for f in self.units}
        if not self.uniform:
            wanted = allocate(self.units, self.scores, self.masks.masks, wanted, self.chunk)
        for f in self.units:
            mask = self.masks.masks[f.key]
            if wanted[f.key] < int(mask.count_nonzero()):
                if not bool(self.scores[f.key].any()):
                    why = "its weights are zeros (prune by depth), or gradients overflow (prune by loraprune or wanda, or in float32)"
                    raise NumericError(f"no step gave {f.key} scores that are finite and not all zero: {why}")
                mask.copy_(select(self.scores[f.key], wanted[f.key], f.within, self.masks.alive(f.key)))

    def _gone(self, family: Family, share: float) -> int:
        """Units of a family that are to be gone; query heads go by as many from every group."""
        total, step = family.count - self.kept[family.key], family.count // family.within if family.within else 1
        return int(total // step * share + 1e-9) * step

    def observe(self, step: int) -> None:
        """Add the scores of a step whose gradients are there to the averages."""
        for f in self.units:
            fresh = unit_scores(f, self.paths, self.importance, self.gate, self.uniform)
            if bool(torch.isfinite(fresh).all()):
                self.scores[f.key].mul_(MEMORY).add_(fresh, alpha=1 - MEMORY)

    def hold(self) -> None:
        """Masks multiply activations, and nothing trains them."""

    def detach(self) -> None:
        """Take masks and hooks off the model."""
        self.importance.detach()
        self.masks.remove()

    def finish(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Cut out what is masked; dense linears of this dtype stay."""
        slicing.cut(model, self.units, self.masks.masks, dtype)


def allocate(
    units: Sequence[Family], scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], wanted: Mapping[str, int], chunk: Mapping[str, int]
) -> dict[str, int]:
    """How many units each family keeps when those of one kind are ranked over all blocks; their sum by kind is the least, in whole chunks, that
    reaches the sum of `wanted`.

    Units go in chunks of chunk[kind], 1 if not named, of neighbours in the ranking of their block. One chunk of a block stays; what is less than a
    chunk, at the end of a block whose count is no multiple, goes before any chunk does.
    """
    out: dict[str, int] = {}
    for kind in {f.kind for f in units}:
        own, size = [f for f in units if f.kind == kind], chunk.get(kind, 1)
        ranked: list[tuple[float, str, int]] = []
        for f in own:
            alive = scores[f.key][masks[f.key] != 0].sort(descending=True).values
            parts = alive.split(size)
            out[f.key] = len(parts[0])
            ranked += [(float(part.mean()) if len(part) == size else -math.inf, f.key, len(part)) for part in parts[1:]]
        room = sum(wanted[f.key] for f in own) - sum(out[f.key] for f in own)
        for _score, key, count in sorted(ranked, key=lambda row: -row[0]):
            if room > 0:
                out[key] += count
                room -= count
    return out
