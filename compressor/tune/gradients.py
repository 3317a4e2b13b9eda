"""A stream of mini-batch gradients of some weights, for what measures how sharp the loss is (the empirical Fisher of second-order pruning).

The loss is the mean of the mini-batch's own task loss. Mini-batches come from an endless stream of seeded permutations that continues from one call
to the next; `position`, a tensor, says where it is, so that a checkpoint can hold it. Eval mode, and the gradients that were there before, are the
business of who asks (compressor.prune.fisher.collect).
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from compressor.recipe import Tune
from compressor.tune.batches import Batches, Objective


class Gradients:
    """gradients(count) yields `count` times, each time with fresh float32 gradients in `.grad` of the weights, which must require one.

    weights: None for whatever parameters of the model require a gradient when a call begins.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter] | None, objective: Objective, batch: int, seed: int):
        self.model, self.weights = model, None if weights is None else list(weights.values())
        self.batches = Batches(objective, Tune(batch=batch), seed)
        self.position = torch.zeros((), dtype=torch.int64)

    def __call__(self, count: int) -> Iterator[None]:
        weights = [p for p in self.model.parameters() if p.requires_grad] if self.weights is None else self.weights
        loss = self.batches.objective.loss(self.model)
        for _ in range(count):
            for weight, gradient in zip(weights, self._next(loss, weights), strict=True):
                weight.grad = gradient
            yield

    def _next(self, loss: Callable[..., Tensor], weights: list[nn.Parameter]) -> tuple[Tensor, ...]:
        step = int(self.position)
        self.position += 1
        rows = self.batches.objective.rows(self.batches.windows(step))
        with torch.enable_grad():
            summed = loss(*(t.to(weights[0].device) for t in rows))  # the gradients of a mean would vanish in float16
            return tuple(g.float() / self.batches.tokens(step) for g in torch.autograd.grad(summed, weights))
