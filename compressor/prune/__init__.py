"""Pruners: what of a model is removed while the one training loop runs, and how the rest is written back smaller.

The loop (compressor.tune.loop.train) calls a pruner at fixed points of every step:

    prune(step)     before the gradients of the step: bring the masks to what the schedule wants now
    observe(step)   the gradients of the step are there and finite, nothing has been clipped or applied
    hold()          before clipping, after the update, and after a step was undone: what is pruned stays pruned, its gradient counts nowhere

`tensors` are the pruner's state beside the trained parameters (masks, scores): the loop keeps a good copy of them and writes them into its
checkpoint, so that an interrupted run goes on as if it had not been. Whoever called the loop then takes the pruner off the model (`detach`)
and makes its masks real (`finish`, by slicing.py); masks of single weights are zeros already.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Pruner(Protocol):
    @property
    def restarts(self) -> tuple[int, ...]:
        """Steps at which the learning-rate schedule starts again, ascending; none for one schedule over the whole run."""

    def tensors(self) -> Mapping[str, Tensor]:
        """The live state by name; the loop copies from it and into it."""

    def prune(self, step: int) -> None: ...

    def observe(self, step: int) -> None: ...

    def hold(self) -> None: ...
