"""oBERT for whole units: heads and FFN channels scored by the same Fisher blocks as single weights, and cut at their gates.

A unit costs what its entries cost, summed over the rows and columns that it owns and over Fisher blocks: of each block, the entries of the unit in it
go together, at 1/2 wT_Q ([F^-1]_QQ)^-1 w_Q. Rows own whole blocks, for blocks do not straddle rows, and cost 1/2 wT F w. Columns own `width` entries
of each row. When units go, the columns of the others move to make up for them (compressor.prune.obs, jointly), row by row and block by block.

The neighbour is ZipLM (Kurtic et al., 2023, arXiv 2302.04089), which scores columns by layer-wise reconstruction, with one Hessian for all rows;
here it is the end loss, and each row has its own curvature. Block size: the largest divisor of the row length up to 64, for columns one that divides
the width of a unit or is a multiple of it.

How many units of each family stay is the caller's choice. Price: as for single weights (compressor.prune.obert), with B up to 64. Limits: blocks of
other rows, and of other linears of the same unit, count as independent, so their costs add; what removed units added on average to the gate's
output is not put into its bias. Weights of units that are gone are zeroed once, and whatever an optimiser does to them later is not felt.
"""

from collections.abc import Callable, Mapping, Sequence
from math import gcd

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, RecipeError
from compressor.linear import PackedLinear
from compressor.prune.fisher import BlockFisher, Gradients, collect
from compressor.prune.masks import Pattern
from compressor.prune.obert import Settings, portions
from compressor.prune.obs import remove, saliency
from compressor.prune.unit_masks import UnitMasks, select
from compressor.prune.units import Family, Part

BLOCK = 64  # the largest Fisher block


def block_of(part: Part, row: int, limit: int = BLOCK) -> int:
    """The Fisher block of a part whose linear has `row` inputs: the largest divisor up to `limit` that fits into units, or that units fit into."""
    fits = [b for b in range(1, min(limit, row) + 1) if row % b == 0]
    return max(b for b in fits if part.axis == 0 or b % part.width == 0 or part.width % b == 0)


def part_weights(model: nn.Module, families: Sequence[Family]) -> dict[str, nn.Parameter]:
    """The weights of all parts by the dotted names of their linears; ModelError for a linear that is not dense."""
    out: dict[str, nn.Parameter] = {}
    for name in (part.name for family in families for part in family.parts):
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or isinstance(layer, PackedLinear):
            raise ModelError(f"{name} is a {type(layer).__name__}, and oBERT prunes dense linears: prune before packing")
        out[name] = layer.get_parameter("weight")
    return out


def structure_scores(families: Sequence[Family], weights: Mapping[str, Tensor], fishers: Mapping[str, BlockFisher]) -> dict[str, Tensor]:
    """What the removal of each unit costs, float32 [count] by family key.

    weights [n, k] and fishers by the parts' names. Parts without a Fisher matrix count by their squares, so that with none magnitude decides.
    """
    out = {}
    for family in families:
        costs = [_cost(part, family.count, weights[part.name], fishers.get(part.name)) for part in family.parts]
        out[family.key] = torch.stack([cost.to(costs[0].device) for cost in costs]).sum(0)
    return out


def _cost(part: Part, count: int, w: Tensor, fisher: BlockFisher | None) -> Tensor:
    """The cost of each unit's share of one linear, [count]."""
    if fisher is None:
        q, cost = 1, w.detach().float().square().flatten()
    else:
        q = fisher.block if part.axis == 0 else gcd(fisher.block, part.width)
        cost = saliency(fisher, w, q)
    return cost.view(count, -1).sum(1) if part.axis == 0 else cost.view(w.shape[0], count, part.width // q).sum((0, 2))


@torch.no_grad()
def cut(family: Family, alive: Tensor, weights: Mapping[str, Tensor], fishers: Mapping[str, BlockFisher], joint: bool = True) -> None:
    """Zero the rows and columns of all units that are not alive, bool [count], and move the other columns to make up for them, in place."""
    for part in family.parts:
        w, kept = weights[part.name], alive.to(weights[part.name].device).repeat_interleave(part.width)
        keep = kept.unsqueeze(1 - part.axis).expand_as(w)
        if part.axis == 1 and part.name in fishers:
            fisher = fishers[part.name]
            remove(fisher, w, keep, gcd(fisher.block, part.width), joint)
        w.masked_fill_(~keep, 0.0)


class StructuredObert:
    """A compressor.prune.Pruner of heads and FFN channels.

    masks: a UnitMasks on `model` with the same families, which does the cutting. gradients(count): runs `count` mini-batches of the masked model one
    at a time and after each leaves the gradient of the task loss in `.grad` of the families' weights. schedule: (step, ratio) pairs, both ascending;
    widths(ratio): how many units of each family stay then, by key; families it does not name stay as they are. settings: pattern
    unstructured; block is the largest Fisher block, 0 for 64.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: UnitMasks,
        gradients: Gradients,
        schedule: tuple[tuple[int, float], ...],
        widths: Callable[[float], Mapping[str, int]],
        settings: Settings | None = None,
    ):
        self.model, self.masks, self.gradients, self.widths = model, masks, gradients, widths
        self.schedule, self.settings = tuple(schedule), settings or Settings()
        self.families = list(masks.families.values())
        self.weights = part_weights(model, self.families)
        limit = self.settings.block or BLOCK
        self.blocks = {p.name: block_of(p, self.weights[p.name].shape[1], limit) for family in self.families for p in family.parts}
        self.notes: list[str] = []
        ratios = [ratio for _, ratio in self.schedule]
        if self.settings.pattern != Pattern():
            raise RecipeError(f"whole units are pruned, so the pattern {self.settings.pattern} has no meaning: leave it out")
        if not ratios or ratios != sorted(ratios) or list(self.restarts) != sorted(set(self.restarts)):
            raise RecipeError("pruning needs a schedule whose steps and ratios ascend")

    @property
    def restarts(self) -> tuple[int, ...]:
        """The steps of the prunes: each starts a cycle of the learning rate to recover in."""
        return tuple(step for step, _ in self.schedule)

    def tensors(self) -> Mapping[str, Tensor]:
        """The masks, float32 [count] by family key."""
        return self.masks.tensors()

    def prune(self, step: int) -> None:
        """Bring each family to its width for the last entry of the schedule at or before `step`; wider than it is, it stays."""
        due = [ratio for start, ratio in self.schedule if start <= step]
        for goal in _goals(self.families, self.masks.kept(), self.widths(max(due)), self.settings.rounds) if due else []:
            fishers, notes = self._fishers()
            scores = structure_scores(self.families, self.weights, fishers)
            for family in self.families:
                alive = self.masks.alive(family.key)
                if goal[family.key] < int(alive.sum()):
                    alive = select(scores[family.key].to(alive.device), goal[family.key], family.within, alive)
                    cut(family, alive, self.weights, fishers, self.settings.joint)
                    self.masks.masks[family.key].copy_(alive)
            self.notes += [f"step {step}: {note}" for note in notes]
            del fishers

    def _fishers(self) -> tuple[dict[str, BlockFisher], list[str]]:
        if self.settings.score == "magnitude":
            return {}, []
        return collect(self.model, self.weights, {}, self.gradients, self.settings.gradients, self.settings.damp, self.blocks)

    def observe(self, step: int) -> None:
        """Nothing: a prune takes its own gradients."""

    def hold(self) -> None:
        """Nothing: the masks act in every forward pass, whatever the weights behind them are."""


def _goals(families: Sequence[Family], now: Mapping[str, int], final: Mapping[str, int], rounds: int) -> list[dict[str, int]]:
    """The widths after each round, on a line from those of now, in the steps that each family allows; rounds that change nothing are left out."""
    goals, before = [], dict(now)
    parts: dict[str, list[int]] = {}
    for family in families:
        step = family.count // family.within if family.within else 1  # one unit of each run
        excess = max(now[family.key] - final.get(family.key, now[family.key]), 0)
        if excess % step:
            raise RecipeError(f"{family.key} cannot keep {final[family.key]} of {family.count}: it loses {step} units at a time, one of each group")
        spread = portions(excess // step, rounds)
        parts[family.key] = [step * size for size in spread]
    for i in range(max((len(sizes) for sizes in parts.values()), default=0)):
        before = {key: width - (parts[key][i] if i < len(parts[key]) else 0) for key, width in before.items()}
        goals.append(before)
    return goals
