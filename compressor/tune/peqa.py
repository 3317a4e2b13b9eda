"""PEQA: fine-tune the scales of a packed model; codes, zeros and everything else stay as they are.

    weight = s * (code - zero)        dL/ds[i, g] = sum over the columns j of group g of (dy^T x)[i, j] * (code - zero)[i, j]

Source: "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization", arXiv 2305.14152. There the
scale itself is trained (`absolute`). Scales of one model differ more than tenfold between rows, so one learning rate suits few of them;
the default here is `relative`, s = s0 * (1 + delta), where the rate acts on delta and means the same at every row and bit width.

Three things are ours. The forward sees each scale as it will be stored (rounded to the stored dtype, with a straight-through gradient to
the float32 master), so nothing moves at export: what was trained is what is served. A scale never falls below a tenth of its start, so no
step can flip the sign of a group or drive it to zero. And no scale exceeds the largest number of its stored dtype. At either limit only the
gradient that leads back is kept.

Price, on top of the stored scale: master, gradient, two Adam moments and the good copy of three of them (see loop), 28 bytes a scale; 4 more
for the scale in use, which the linear keeps from the forward to the backward pass (with gradient checkpointing those of one block at a
time); and one rounding pass over the scales each forward, whose temporaries are of one layer. Limit: a scale stored in bfloat16 moves in
steps of 0.4 to 0.8 percent, larger than most useful changes; store float16 or float32 when tuning.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compressor.errors import ModelError, NumericError
from compressor.linear import PackedLinear, packed_linears, same_dtype
from compressor.recipe import Tune

FLOOR = 0.1  # of the starting scale


class _Scale(torch.autograd.Function):
    """Master -> scale to use: mapped, clamped, rounded to the stored dtype. Keeps nothing of its own for the backward pass.

    The rounding passes the gradient unchanged. The clamp passes it inside the limits; outside, only where descending leads back in.
    """

    @staticmethod
    def forward(ctx: Any, master: Tensor, start: Tensor, relative: bool) -> Tensor:
        ctx.save_for_backward(master, start)
        ctx.relative = relative
        scale, floor, top = _mapped(master, start, relative)
        return scale.clamp(min=floor).clamp_(max=top).to(start.dtype).to(torch.float32, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        master, start = ctx.saved_tensors
        scale, floor, top = _mapped(master, start, ctx.relative)
        outwards = ((scale < floor) & (grad > 0)) | ((scale > top) & (grad < 0))
        grad = grad.masked_fill(outwards, 0)
        return grad.mul_(start) if ctx.relative else grad, None, None


def _mapped(master: Tensor, start: Tensor, relative: bool) -> tuple[Tensor, Tensor, float]:
    """The unlimited scale, its lower limit, both float32 [n, G], and the upper limit."""
    wide, limits = start.float(), torch.finfo(start.dtype)
    # Below the smallest normal number a tenth of the start may round to zero: such a scale keeps its start as the floor.
    floor = torch.maximum(FLOOR * wide, wide.clamp(max=limits.tiny))
    return (1 + master).mul_(wide) if relative else master, floor, limits.max


class ScaleTuning(nn.Module):
    """Returns the scale [n, G] to use now: float32, each number exactly representable in the stored dtype.

    start [n, G] in the stored dtype. The one parameter, float32 [n, G], is `delta` (relative, starts at 0) or `scale` (absolute, starts
    at the stored scale). Before the first step the result equals `start` exactly.
    """

    start: Tensor

    def __init__(self, start: Tensor, relative: bool = True):
        super().__init__()
        self.register_buffer("start", start, persistent=False)
        wide = start.detach().float()
        self.leaf = "delta" if relative else "scale"
        self.register_parameter(self.leaf, nn.Parameter(torch.zeros_like(wide) if relative else wide.clone()))

    def parameter(self) -> tuple[str, nn.Parameter]:
        """Name within this module, and the parameter."""
        return self.leaf, self.get_parameter(self.leaf)

    def forward(self) -> Tensor:
        leaf, parameter = self.parameter()
        return _Scale.apply(parameter, self.start, leaf == "delta")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves devices like any module, but no cast of the model changes the dtype of the start, the master or its gradient."""
        return super()._apply(same_dtype(fn), recurse)


class Peqa:
    """Trains the scale of every packed linear; the parametrisation comes from the options."""

    def __init__(self, options: Tune):
        self.relative = options.parametrization == "relative"

    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Freeze the model, give each PackedLinear a ScaleTuning, and return the parameters, float32 [n, G], by their name in the model.

        ModelError if there is no packed linear, one is tuned already, or one has a negative scale; NumericError if a scale is not finite.
        """
        layers = packed_linears(model)
        if not layers:
            raise ModelError(f"{type(model).__name__} has no packed linear layers: compress it before tuning its scales")
        for name, layer in layers.items():
            _check(name, layer)
        model.requires_grad_(False)
        out = {}
        for name, layer in layers.items():
            layer.tuned = tuning = ScaleTuning(layer.learned, self.relative)
            leaf, parameter = tuning.parameter()
            out[f"{name}.tuned.{leaf}"] = parameter
        return out

    @torch.no_grad()
    def detach(self, model: nn.Module) -> None:
        """Store the tuned scales in the dtype that each layer stores, and remove the tuning; the outputs stay the same bit for bit.

        NumericError if a tuned scale is not finite; then nothing is changed.
        """
        tuned = {name: layer for name, layer in packed_linears(model).items() if layer.tuned is not None}
        scales = {name: layer.packed().learned for name, layer in tuned.items()}
        for name, scale in scales.items():
            if not bool(torch.isfinite(scale).all()):
                raise NumericError(f"the tuned scale of {name} is not finite: tune again with a smaller learning rate")
        for name, layer in tuned.items():
            layer.learned, layer.tuned = scales[name].contiguous(), None


def _check(name: str, layer: PackedLinear) -> None:
    if layer.tuned is not None:
        raise ModelError(f"{name} is being tuned already: detach the first tuner before attaching another")
    if not bool(torch.isfinite(layer.learned).all()):
        raise NumericError(f"the scale of {name} is not finite: compress the model again")
    if bool((layer.learned < 0).any()):
        raise ModelError(f"{name} has a negative scale, which cannot be tuned: compress the model again with positive scales")
