"""Masks of whole units while a model trains: each family's gate, the linear through which alone its units are felt, sees masked inputs.

Multiplying a gate's inputs by 0 or 1 gives the logits and gradients of the model with those units cut out, whatever activation lies before it, and
needs no change of any weight: taking a unit out is one number, putting it back (for a step that was undone) as well. The choice among units keeps
an exact number, and with query heads the same number of each group that shares a key (Ma et al., 2023, arXiv 2305.11627, on what depends on what).

Price: one multiplication of each gate's inputs a forward pass. Limits: a masked input that is infinite or not a number still spoils the product.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import NumericError, RecipeError
from compressor.prune.units import Family


class UnitMasks:
    """Multiplies the inputs of the families' gates in `model` by `masks` from now until `remove`.

    masks: float32 [count] by family key, 1 for a unit that is there, on the gate's device; changed in place by whoever prunes.
    """

    def __init__(self, model: nn.Module, families: Sequence[Family]):
        self.families = {family.key: family for family in families}
        self.masks: dict[str, Tensor] = {}
        self._hooks = []
        for key, family in self.families.items():
            gate = model.get_submodule(family.gate.name)
            held = next((t for t in (*gate.parameters(), *gate.buffers())), torch.empty(0))
            self.masks[key] = torch.ones(family.count, device=held.device)
            self._hooks.append(gate.register_forward_pre_hook(_Multiply(self.masks[key], family.gate.width)))

    def tensors(self) -> Mapping[str, Tensor]:
        """The live masks by family key."""
        return self.masks

    def alive(self, key: str) -> Tensor:
        """Which units are there, bool [count]."""
        return self.masks[key] > 0

    def kept(self) -> dict[str, int]:
        """How many units of each family are there."""
        return {key: int(self.alive(key).sum()) for key in self.masks}

    def remove(self) -> None:
        """Take the masks off the model; it is dense again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class _Multiply:
    """A forward pre-hook: the first argument [..., count * width] times the mask [count], each of its numbers `width` times."""

    def __init__(self, mask: Tensor, width: int):
        self.mask, self.width = mask, width

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        return (x * self.mask.to(x.dtype).repeat_interleave(self.width), *args[1:])


def select(scores: Tensor, kept: int, within: int = 0, alive: Tensor | None = None) -> Tensor:
    """The `kept` best of the units that are alive, bool [count]; of equal scores the later ones stay.

    scores [count]; alive: bool [count], None for all; within: as many must stay of each run of that many units, so kept divides evenly. RecipeError
    for a number that cannot be met, NumericError for a score of a living unit that is not a number.
    """
    run, alive = within or len(scores), torch.ones_like(scores, dtype=torch.bool) if alive is None else alive
    runs = len(scores) // run
    if bool(scores[alive].isnan().any()):
        raise NumericError("the scores of the units to prune are not numbers: the weights or gradients behind them are not finite")
    available = alive.view(runs, run).sum(1)
    if kept % runs or not 0 <= kept // runs <= int(available.min()):
        each = f" in {runs} runs of {run}, as many of each" if within else ""
        raise RecipeError(f"{kept} of {len(scores)} units cannot be kept{each}, with {', '.join(map(str, available.tolist()))} left")
    values = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~alive, float("-inf"))
    order = values.view(runs, run).argsort(dim=1, stable=True)
    best = torch.zeros(runs, run, dtype=torch.bool, device=scores.device)
    return best.scatter_(1, order[:, run - kept // runs :], True).flatten()
