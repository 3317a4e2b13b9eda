"""The only door to the kernels: one differentiable function, which picks the implementation by device and shape.

`linear` saves the packed buffers for the backward pass, and x only if the scales are trained, never a dense weight: the gradient of x runs on
weights decoded again, the gradient of the scales is a sum over each group of dy^T x. On a GPU the Triton kernels run where they fit the
layer (see `fits`), else, and on a CPU, the plain torch reference. CPUs compute in float32 (16-bit matmuls there are tens of times slower).
"""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compressor.kernels import reference

_TRITON = importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor, group: int, k: int) -> bool:
    """Whether the Triton kernels take this call: a GPU tensor (or Triton's interpreter, for tests), and a group size they know."""
    if not _TRITON or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    from compressor.kernels import affine

    return affine.fits(group, k)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, n: int) -> Tensor:
        need_x, _, need_scale, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_scale else None, words, scale if need_x else None, zero)
        ctx.bits, ctx.group, ctx.k, ctx.dtype, ctx.ops = bits, group, x.shape[1], scale.dtype, _module(x, group)
        return ctx.ops.forward(x, words, scale, zero, bits, group, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, words, scale, zero = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = dscale = None
        if ctx.needs_input_grad[0]:
            dx = ctx.ops.grad_input(dy, words, scale, zero, ctx.bits, ctx.group, ctx.k)
        if ctx.needs_input_grad[2]:
            dscale = ctx.ops.grad_scale(x, dy, words, zero, ctx.bits, ctx.group).to(ctx.dtype)
        return dx, None, dscale, None, None, None, None


def _module(x: Tensor, group: int) -> Any:
    if uses_triton(x, group, x.shape[1]):
        from compressor.kernels import affine

        return affine
    return reference


def linear(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group: int, n: int) -> Tensor:
    """y = x @ weight.T + bias with weight = scale * (code - zero), differentiable in x, scale and bias.

    x [..., k] float; words int32 tile64x256 (see layout); scale [n, k/group]; zero [n, k/group] or None for the symmetric midpoint;
    bias [n] or None. Returns [..., n] in x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        flat = flat.float()
    y = _Linear.apply(flat, words, scale, zero, bits, group, n)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype).view(*x.shape[:-1], n)
