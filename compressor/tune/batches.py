"""What a run learns from, and in which order: objectives, batches, and the learning rate of each step."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from compressor import world
from compressor.errors import DataError, RecipeError
from compressor.recipe import Tune
from compressor.tune.loss import MASKED, loss_function


class Objective(Protocol):
    """Rows of examples, and the loss of some of them."""

    @property
    def counts(self) -> Tensor:
        """int64 [rows]: how much each row teaches (tokens, labels); rows that teach nothing are left out of the run."""

    def rows(self, which: Tensor) -> tuple[Tensor, ...]:
        """The examples of these rows, tensors on the CPU whose first axis is the rows."""

    def loss(self, model: nn.Module) -> Callable[..., Tensor]:
        """A function of such tensors, on the model's device: their summed loss, float32, of as many terms as their counts say."""


class CausalLM:
    """Next-token prediction on windows: ids, labels int64 [count, seqlen], labels not shifted, -100 where a token is not to be learnt.

    DataError for windows that cannot be learnt from.
    """

    def __init__(self, ids: Tensor, labels: Tensor):
        if ids.shape != labels.shape or ids.dim() != 2 or ids.shape[1] < 2:
            raise DataError(f"windows must be [count, at least 2] with labels alike, not {tuple(ids.shape)} and {tuple(labels.shape)}")
        self.ids, self.labels = ids, labels
        self.counts = (labels[:, 1:] != MASKED).sum(1)

    def rows(self, which: Tensor) -> tuple[Tensor, ...]:
        """ids and labels [rows, t], without the columns after the last label, which no loss depends on."""
        labels = self.labels[which]
        used = int((labels != MASKED).any(0).nonzero().max()) + 1
        return self.ids[which, :used], labels[:, :used]

    def loss(self, model: nn.Module) -> Callable[..., Tensor]:
        return loss_function(model, self.ids[:1, :8].to(next(model.parameters()).device))


class Batches:
    """Which rows each step sees: a stream of seeded permutations of all rows, one an epoch, cut into steps.

    Rows that teach nothing are left out. A step sees at most all rows once, so a set smaller than a batch is one step an epoch.
    """

    def __init__(self, objective: Objective, options: Tune, seed: int):
        self.objective, self.counts, self.seed, self.batch = objective, objective.counts, seed, options.batch
        self.usable = self.counts.nonzero().flatten()
        count, dropped = len(self.usable), len(self.counts) - len(self.usable)
        if not count:
            raise DataError(f"none of the {len(self.counts)} training windows holds a token to learn: give more text, or train on the prompt too")
        self.notes = [f"{dropped} of {len(self.counts)} training windows hold no token to learn and were left out"] if dropped else []
        self.size = min(options.batch * options.accumulate, count)
        _check_parts(self.size, options)
        self.steps = options.steps or max(1, math.ceil(options.epochs * count / self.size - 1e-9))

    def windows(self, step: int) -> Tensor:
        """Row numbers of a step, int64 [size]."""
        count = len(self.usable)
        first, last = step * self.size, (step + 1) * self.size - 1
        rows = [self._order(epoch)[max(first - epoch * count, 0) : last + 1 - epoch * count] for epoch in range(first // count, last // count + 1)]
        return self.usable[torch.cat(rows)]

    def used(self) -> Tensor:
        """Row numbers that any step sees, int64, each once, ascending."""
        return self.usable[self._order(0)[: self.steps * self.size].sort().values]

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.usable), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))

    def tokens(self, step: int) -> int:
        """How much a step learns from: tokens, or labels."""
        return int(self.counts[self.windows(step)].sum())

    def micro(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """The rows of a step in micro-batches; of several processes each has an equal run of them, but for one row."""
        for rows in world.dealt(self.windows(step)).split(self.batch):
            yield self.objective.rows(rows)


def _check_parts(size: int, options: Tune) -> None:
    """RecipeError for steps of `size` rows that several processes cannot share: none may stay idle, and sharded ones run the model in step."""
    parts = world.size()
    if size < parts:
        raise RecipeError(f"a step has {size} windows for {parts} processes: raise --batch or --accumulate, or start fewer processes")
    if options.shard and math.ceil(size // parts / options.batch) != math.ceil(-(-size // parts) / options.batch):
        raise RecipeError(f"--shard wants as many micro-batches of every process, and {size} windows a step do not split so over {parts}")


def rate(step: int, total: int, options: Tune, restarts: Sequence[int] = ()) -> float:
    """Share of the learning rate that step 0 <= step < total uses: a linear warm-up that ends at 1, then the schedule, which ends above 0.

    `restarts`: steps at which the schedule begins again, warm-up included; each cycle runs to the next of them, the last to the end.
    """
    begin = max((r for r in restarts if r <= step), default=0)
    end = min((r for r in restarts if r > step), default=total)
    step, total = step - begin, end - begin
    warm = round(options.warmup * total)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[options.schedule]
