"""What the tuners of stored values share: a float32 master behind every value, which the forward sees as it will be stored.

A value is mapped from its master, held within limits and rounded to the stored dtype, so nothing moves at export: what was trained is what is
served. The rounding passes the gradient to the master unchanged (straight through); of a value outside its limits only the gradient that leads
back is kept. Where updates are smaller than a step of the stored dtype, the master adds them up until the value moves.

Price, on top of the stored value: master, gradient, two Adam moments and the good copy of three of them (see loop), 28 bytes a value; 4 more for
the value in use, which the linear keeps from the forward to the backward pass (with gradient checkpointing those of one block at a time); and one
rounding pass over the values each forward and one each backward, whose temporaries are of one layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compressor.errors import ModelError, NumericError
from compressor.linear import PackedLinear, packed_linears, same_dtype
from compressor.recipe import Tune

Limit = Tensor | float
Limited = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Limit, Limit]]


class Snap(torch.autograd.Function):
    """(master, start, unit, limited) -> values to use, float32, each exactly representable in start's dtype.

    limited(master, start, unit) gives the unlimited values and their lower and upper limits; it must be linear in the master with slope
    `unit`, 1 if that is None. Keeps nothing of its own for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, master: Tensor, start: Tensor, unit: Tensor | None, limited: Limited) -> Tensor:
        ctx.save_for_backward(master, start, unit)
        ctx.limited = limited
        value, low, high = limited(master, start, unit)
        return value.clamp(min=low).clamp_(max=high).to(start.dtype).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        master, start, unit = ctx.saved_tensors
        value, low, high = ctx.limited(master, start, unit)
        outwards = ((value < low) & (grad > 0)) | ((value > high) & (grad < 0))
        grad = grad.masked_fill(outwards, 0)
        return grad if unit is None else grad.mul_(unit), None, None, None


class Snapped(nn.Module):
    """Returns the values to use now: float32 of start's shape. Before the first step they equal `start` bit for bit.

    start, in the stored dtype. The one parameter, float32 of the same shape, is `delta` (relative, starts at 0) or `name` (absolute, starts at the
    stored values).
    """

    start: Tensor

    def __init__(self, start: Tensor, relative: bool, name: str):
        super().__init__()
        self.register_buffer("start", start, persistent=False)
        self.relative, self.leaf = relative, "delta" if relative else name
        wide = start.detach().to(torch.float32, copy=True)
        # minus zero is the one number whose sum with another is that number even where it is a zero, of either sign
        self.register_parameter(self.leaf, nn.Parameter(wide.fill_(-0.0) if relative else wide))

    def parameter(self) -> tuple[str, nn.Parameter]:
        """Name within this module, and the parameter."""
        return self.leaf, self.get_parameter(self.leaf)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves devices like any module, but no cast of the model changes the dtype of the start, the master or its gradient."""
        return super()._apply(same_dtype(fn), recurse)


class ValueTuner(ABC):
    """Trains one kind of values, scales or tables, of every packed linear; the parametrisation comes from the options.

    Subclasses say which: `table`, `what` in words, `rates` (the default learning rate of each parametrisation), and `snapped`.
    """

    table: ClassVar[bool]
    what: ClassVar[str]
    rates: ClassVar[Mapping[str, float]]

    def __init__(self, options: Tune):
        self.relative = options.parametrization == "relative"

    @abstractmethod
    def snapped(self, start: Tensor) -> Snapped:
        """The module that is to return the values of a layer, which now are `start`."""

    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Freeze the model, give each PackedLinear its module, and return the parameters, float32 of the values' shapes, by their name in the model.

        ModelError if there is no packed linear, or one holds the other kind of values, is tuned already or cannot be tuned; NumericError if a
        value is not finite.
        """
        layers = packed_linears(model)
        if not layers:
            raise ModelError(f"{type(model).__name__} has no packed linear layers: compress it before tuning its {self.what}s")
        for name, layer in layers.items():
            self.check(name, layer)
        model.requires_grad_(False)
        out = {}
        for name, layer in layers.items():
            layer.tuned = tuning = self.snapped(layer.learned)
            leaf, parameter = tuning.parameter()
            out[f"{name}.tuned.{leaf}"] = parameter
        return out

    @torch.no_grad()
    def detach(self, model: nn.Module) -> None:
        """Store the tuned values in the dtype that each layer stores, and remove the tuning; the outputs stay the same bit for bit.

        NumericError if a tuned value is not finite; then nothing is changed.
        """
        tuned = {name: layer for name, layer in packed_linears(model).items() if layer.tuned is not None}
        values = {name: layer.packed().learned for name, layer in tuned.items()}
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise NumericError(f"the tuned {self.what} of {name} is not finite: tune again with a smaller learning rate")
        for name, layer in tuned.items():
            layer.learned, layer.tuned = values[name].contiguous(), None

    def check(self, name: str, layer: PackedLinear) -> None:
        """Whether a layer can be tuned: errors as in `attach`."""
        if layer.table != self.table:
            held, other = ("tables", "table") if layer.table else ("scales", "peqa")
            raise ModelError(f"{name} holds {held}, which this tuner of {self.what}s cannot train: tune the model with --tune {other}")
        if layer.tuned is not None or layer.tuned_zero is not None:
            raise ModelError(f"{name} is being tuned already: detach the first tuner before attaching another")
        if not bool(torch.isfinite(layer.learned).all()):
            raise NumericError(f"the {self.what} of {name} is not finite: compress the model again")
