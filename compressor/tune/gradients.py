"""A stream of mini-batch gradients of some weights, for what measures how sharp the loss is (the empirical Fisher of second-order pruning).

The model is in eval mode and the loss is the mean of the mini-batch's own task loss. Mini-batches come from an endless stream of seeded
permutations that continues from one call to the next; `position`, a tensor, says where it is, so that a checkpoint can hold it. The gradients
that the training loop accumulates are set aside and come back, and nothing but the wanted weights gets a gradient.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from compressor.recipe import Tune
from compressor.tune.batches import Batches, Objective


class Gradients:
    """gradients(count) yields `count` times, each time with fresh float32 gradients in `.grad` of the weights."""

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter], objective: Objective, batch: int, seed: int):
        self.model, self.weights = model, dict(weights)
        self.batches = Batches(objective, Tune(batch=batch), seed)
        self.position = torch.zeros((), dtype=torch.int64)

    def __call__(self, count: int) -> Iterator[None]:
        weights = list(self.weights.values())
        before = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        training = self.model.training
        try:
            self.model.eval()
            self.model.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            loss = self.batches.objective.loss(self.model)
            for _ in range(count):
                for weight, gradient in zip(weights, self._next(loss, weights), strict=True):
                    weight.grad = gradient
                yield
        finally:
            for p, flag, grad in before:
                p.requires_grad_(flag)
                p.grad = grad
            self.model.train(training)

    def _next(self, loss: Callable[..., Tensor], weights: list[nn.Parameter]) -> tuple[Tensor, ...]:
        step = int(self.position)
        self.position += 1
        rows = self.batches.objective.rows(self.batches.windows(step))
        with torch.enable_grad():
            summed = loss(*(t.to(weights[0].device) for t in rows))  # the gradients of a mean would vanish in float16
            return tuple(g.float() / self.batches.tokens(step) for g in torch.autograd.grad(summed, weights))
