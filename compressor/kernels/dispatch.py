"""The only door to the kernels: one differentiable function, which picks the implementation by device and shape.

    cuda                 Triton (affine.py, tables.py), where it knows the group size
    cpu                  numba (cpu.py), where numba is installed, in float32
    anything else        plain torch (reference.py)

`path` overrides the choice. What is saved for the backward pass is the packed buffers, and x only if values are trained, never a dense weight: the
gradient of x runs on weights decoded again, the gradient of the values reduces dy^T x tile by tile. CPUs compute in float32 (16-bit matmuls there are
tens of times slower without special instructions).

The operators are registered as compressor::linear, compressor::grad_input and compressor::grad_values, with shapes for tracing, so torch.compile
and CUDA graphs see one opaque call each. Without gradients and outside of tracing the implementation is called directly, which saves tens of
microseconds.
"""

import contextlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from compressor.errors import ModelError, RecipeError, UserError
from compressor.kernels import cpu, layout, reference

PATHS = ("auto", "triton", "cpu", "reference")
_TRITON = importlib.util.find_spec("triton") is not None


def choose(x: Tensor, values_dim: int, group: int, k: int, path: str = "auto", bits: int = 4) -> Any:
    """The module whose functions take this call."""
    if bits not in layout.BITS and path in ("auto", "reference"):
        return reference
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton on CPU tensors, for tests
    unsupported = ""
    if path in ("auto", "triton") and _TRITON and (x.is_cuda or interpreted):
        from compressor.kernels import launch

        module: Any
        if values_dim == 3:
            from compressor.kernels import tables as module
        else:
            from compressor.kernels import affine as module
        if launch.supported(x.device) and module.fits(group, k) and bits in layout.BITS:
            return module
        unsupported = "" if launch.supported(x.device) else ": no kernels for this GPU (NVIDIA from compute capability 8, AMD gfx94x and gfx95x)"
    if (
        path in ("auto", "cpu")
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and bits in layout.BITS
        and cpu.fits(group, k)
        and cpu.available()
    ):
        return cpu
    if path in ("auto", "reference"):
        return reference
    if path not in PATHS:
        raise RecipeError(f"kernel path {path!r} is unknown, choose one of {', '.join(PATHS)}")
    missing = f": {cpu.why_not()}" if path == "cpu" and cpu.why_not() else ""
    raise RecipeError(f"kernel path {path!r} is not able to take {x.dtype} on {x.device} with {bits} bits in groups of {group}{missing}{unsupported}")


def check(x: Tensor, words: Tensor, values: Tensor | None, zero: Tensor | None, bits: int, group: int, n: int, k: int, table: bool) -> None:
    """Kernels compute addresses from these numbers, so they must fit the tensors. Raises ModelError."""
    groups = -(-k // group)
    shapes = {
        "words": (words, (*layout.tiles(n, k), layout.ROWS, 8 * bits)), "zero": (zero, (n, groups)),
        "values": (values, (n, groups, 1 << bits) if table else (n, groups)),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ModelError(f"{name} of shape {tuple(tensor.shape)} do not fit a weight of {n} x {k} in groups of {group}: {shape} do")
        if tensor is not None and tensor.device != x.device:
            raise ModelError(f"{name} are on {tensor.device} and x is on {x.device}: move one of them")
    if words.dtype != torch.int32 or not x.is_floating_point() or (not table and k % group):
        raise ModelError(f"words must be int32 ({words.dtype}), x floating point ({x.dtype}), and groups of {group} must divide {k} columns")


def _forward(
    x: Tensor, words: Tensor, values: Tensor, zero: Tensor | None, u: Tensor | None, b: Tensor | None, bits: int, group: int, n: int, path: str
) -> Tensor:
    check(x, words, values, zero, bits, group, n, x.shape[1], values.dim() == 3)
    ops = choose(x, values.dim(), group, x.shape[1], path, bits)
    with _as_given(x):
        if u is None or b is None:
            return ops.forward(x, words, values, zero, bits, group, n)
        if getattr(ops, "FUSES_LOW", False):
            return ops.forward(x, words, values, zero, bits, group, n, low=(u, b))
        return ops.forward(x, words, values, zero, bits, group, n).addmm_(u.to(x.dtype), b.to(x.dtype).T)


def _as_given(x: Tensor) -> Any:
    """Autocast would round the float32 products inside."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


_linear = torch.library.custom_op("compressor::linear", _forward, mutates_args=())


@_linear.register_fake
def _(
    x: Tensor, words: Tensor, values: Tensor, zero: Tensor | None, u: Tensor | None, b: Tensor | None, bits: int, group: int, n: int, path: str
) -> Tensor:
    return x.new_empty(x.shape[0], n)


@torch.library.custom_op("compressor::grad_input", mutates_args=())
def _grad_input(dy: Tensor, words: Tensor, values: Tensor, zero: Tensor | None, bits: int, group: int, k: int, path: str) -> Tensor:
    check(dy, words, values, zero, bits, group, dy.shape[1], k, values.dim() == 3)
    with _as_given(dy):
        return choose(dy, values.dim(), group, k, path, bits).grad_input(dy, words, values, zero, bits, group, k)


@_grad_input.register_fake
def _(dy: Tensor, words: Tensor, values: Tensor, zero: Tensor | None, bits: int, group: int, k: int, path: str) -> Tensor:
    return dy.new_empty(dy.shape[0], k)


@torch.library.custom_op("compressor::grad_values", mutates_args=())
def _grad_values(x: Tensor, dy: Tensor, words: Tensor, zero: Tensor | None, bits: int, group: int, table: bool, path: str) -> Tensor:
    check(x, words, None, zero, bits, group, dy.shape[1], x.shape[1], table)
    ops = choose(x, 3 if table else 2, group, x.shape[1], path, bits)
    with _as_given(x):
        return ops.grad_table(x, dy, words, bits, group) if table else ops.grad_scale(x, dy, words, zero, bits, group)


@_grad_values.register_fake
def _(x: Tensor, dy: Tensor, words: Tensor, zero: Tensor | None, bits: int, group: int, table: bool, path: str) -> Tensor:
    shape = (dy.shape[1], -(-x.shape[1] // group), *([1 << bits] if table else []))
    return x.new_empty(shape, dtype=reference.wide(x.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, values, zero, u, b, ctx.bits, ctx.group, _, ctx.path = inputs
    need_x, _, need_values, need_zero, need_u, need_b, *_ = ctx.needs_input_grad
    ctx.save_for_backward(
        x if need_values or need_zero else None, words, values if need_x or need_zero else None, zero, u if need_b else None, b if need_u else None
    )
    ctx.k, ctx.types, ctx.table = x.shape[1], [None if t is None else t.dtype for t in (values, zero, u, b)], values.dim() == 3


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, words, values, zero, u, b = ctx.saved_tensors
    need_x, _, need_values, need_zero, need_u, need_b, *_ = ctx.needs_input_grad
    dy = dy.contiguous()
    dx = dvalues = dzero = du = db = None
    if need_x:
        dx = _grad_input(dy, words, values, zero, ctx.bits, ctx.group, ctx.k, ctx.path)
    if need_values:
        dvalues = _grad_values(x, dy, words, zero, ctx.bits, ctx.group, ctx.table, ctx.path).to(ctx.types[0])
    if need_zero:
        dzero = reference.grad_zero(x, dy, values, ctx.group).to(ctx.types[1])
    if need_u:
        du = (dy @ b.to(dy.dtype)).to(ctx.types[2])
    if need_b:
        db = (dy.T @ u.to(dy.dtype)).to(ctx.types[3])
    return dx, None, dvalues, dzero, du, db, None, None, None, None


_linear.register_autograd(_backward, setup_context=_save)


def linear(
    x: Tensor, words: Tensor, values: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group: int, n: int,
    low: tuple[Tensor, Tensor] | None = None, path: str = "auto",
) -> Tensor:  # fmt: skip
    """y = x @ weight.T + u @ b.T + bias, differentiable in x, values, u, b, bias, and in zero if it is float.

    x [..., k] float; words int32 tile64x256 (layout.py); values scale [n, k/group] or table [n, segments, 2**bits]; zero [n, k/group] or None for
    the symmetric midpoint (and for tables); bias [n] or None; low = (u [..., r], b [n, r]), the second half of a LoRA path, whose first is
    u = x @ a.T; path one of PATHS. Returns [..., n] in x's dtype. See reference.py for the formulas.
    """
    narrow = not x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    u, b = (None, None) if low is None else (low[0].reshape(-1, low[0].shape[-1]), low[1])
    flat = x.reshape(-1, x.shape[-1])
    args = (flat.float() if narrow else flat, words, values, zero, u, b, bits, group, n, path)
    if forward_ad._current_level >= 0 and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in (x, values, zero, u, b)):
        raise UserError("packed linears have no forward-mode derivative, and torch would take it for zero: use the backward mode")
    y = _linear(*args) if _watched(x) or _trains(x, values, zero, u, b) else _forward(*args)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype).view(*x.shape[:-1], n)


def describe() -> str:
    """Which kernels this machine has, in words."""
    groups = "groups of 32, 64, 128, multiples of 256 or whole rows; plain torch for others"
    if torch.cuda.is_available():
        if not _TRITON:
            return "plain torch; pip install triton for GPU kernels"
        from compressor.kernels import launch

        return f"Triton ({groups})" if launch.supported(torch.device("cuda")) else "plain torch: the Triton kernels do not know this GPU"
    if os.environ.get("TRITON_INTERPRET") == "1" and _TRITON:
        return "Triton's interpreter (TRITON_INTERPRET=1), a debugging aid that is thousands of times slower"
    if cpu.available():
        return f"numba, {cpu.instructions()}, {cpu.pool()} (groups in multiples of 32 or whole rows; plain torch for others), float32"
    return f"plain torch in float32, 256 rows at a time; {cpu.why_not()}: with it decoding is tens of times faster"


def _watched(x: Tensor) -> bool:
    """Whether something follows the operators that run: a compiler, a tracer, a mode, a transform, a subclass of Tensor."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
