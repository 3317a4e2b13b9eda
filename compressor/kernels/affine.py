"""Host side of the Triton kernels for affine weights: the same three functions as reference.py, by tiles on the GPU.

This file checks strides, picks tiles (affine_configs.py), cuts reductions where the grid alone would not fill the device, and launches; the kernels
lie one operation a file beside it. Under Triton's interpreter the same code runs on CPU tensors, in fp32 where a GPU would use 16 bits (fp64 stays).

Limits: groups as in `fits`; fp64 on a GPU goes to the reference. Nothing here uses atomics: equal inputs give equal bits.
"""

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor.kernels import affine_configs, layout, reference
from compressor.kernels.affine_configs import Tile
from compressor.kernels.affine_forward import forward_kernel, sum_parts_kernel
from compressor.kernels.affine_grad_input import grad_input_kernel
from compressor.kernels.affine_grad_scale import grad_scale_kernel

FOLD_ABOVE = 64  # rows of x above which scales are multiplied into the weights instead of into the accumulator
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}


def fits(group: int, k: int) -> bool:
    """Whether the kernels know this group size: 32, 64, 128, multiples of 256, or one group a row."""
    return group == k or group in (32, 64, 128) or (group > 0 and group % layout.COLS == 0)


def folds(group: int, k: int, m: int) -> bool:
    """Whether the forward kernel multiplies scales into the weights: for many rows, and where a group is narrower than a 64-column slice."""
    return m > FOLD_ABOVE or (group < 64 and group != k)


def slices(tile: Tile, group: int, k: int, fold: bool = True) -> dict[str, int]:
    """Columns of one dot and groups that they hold: more than one only if scales are folded and groups lie side by side."""
    if group == k or group >= tile.width:
        return {"WIDTH": tile.width, "COUNT": 1}
    return {"WIDTH": tile.width, "COUNT": tile.width // group} if fold else {"WIDTH": group, "COUNT": 1}


def forward(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, n: int) -> Tensor:
    """y = x @ weight.T; x [m, k] -> y [m, n] in x's dtype."""
    m, k = x.shape
    if _foreign(x):
        return reference.forward(x, words, scale, zero, bits, group, n)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    x, scale, zero = _rows(x), scale.contiguous(), _dense(zero)
    tile = affine_configs.tile("forward", _chip(x.device), m, x.element_size())
    down, blocks = layout.tiles(n, k)
    fold = folds(group, k, m)

    def launch(out: Tensor, parts: int) -> None:
        forward_kernel[(triton.cdiv(n, tile.bn), triton.cdiv(m, tile.bm), parts)](
            x, words, scale, zero, out, m, n, k, k // group, x.stride(0), down, blocks, triton.cdiv(blocks, parts),
            GROUP=group, BITS=bits, FOLD=fold, EVEN=k % layout.COLS == 0, **slices(tile, group, k, fold), **_types(x), **_options(tile),
        )  # fmt: skip

    _in_parts(launch, y, triton.cdiv(n, tile.bn) * triton.cdiv(m, tile.bm), blocks)
    return y


def grad_input(dy: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, k: int) -> Tensor:
    """dx = dy @ weight; dy [m, n] -> dx [m, k] in dy's dtype."""
    m, n = dy.shape
    if _foreign(dy):
        return reference.grad_input(dy, words, scale, zero, bits, group, k)
    dx = torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    if m == 0:
        return dx
    dy, scale, zero = _rows(dy), scale.contiguous(), _dense(zero)
    tile = affine_configs.tile("grad_input", _chip(dy.device), m, dy.element_size())
    down, blocks = layout.tiles(n, k)
    steps, across = triton.cdiv(n, tile.bn), triton.cdiv(k, tile.width)

    def launch(out: Tensor, parts: int) -> None:
        grad_input_kernel[(across, triton.cdiv(m, tile.bm), parts)](
            dy, words, scale, zero, out, m, n, k, k // group, dy.stride(0), down, blocks, triton.cdiv(steps, parts),
            GROUP=group, BITS=bits, **slices(tile, group, k), **_types(dy), **_options(tile),
        )  # fmt: skip

    _in_parts(launch, dx, across * triton.cdiv(m, tile.bm), steps)
    return dx


def grad_scale(x: Tensor, dy: Tensor, words: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    """dscale[i, g] = sum over the group's columns j of (dy.T @ x)[i, j] * (code - zero)[i, j]; float32 (float64) [n, k/group]."""
    (m, k), n = x.shape, dy.shape[1]
    if _foreign(x):
        return reference.grad_scale(x, dy, words, zero, bits, group)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    if m == 0:
        return torch.zeros(n, k // group, dtype=acc, device=x.device)
    x, dy, zero = _rows(x), _rows(dy.to(x.dtype)), _dense(zero)
    tile = affine_configs.tile("grad_scale", _chip(x.device), m, x.element_size())
    down, blocks = layout.tiles(n, k)
    across, part = triton.cdiv(k, tile.width), slices(tile, group, k)
    columns = k // group if part["COUNT"] > 1 else across  # sums of groups, or of parts of groups
    out = torch.empty(n, columns, dtype=acc, device=x.device)
    with _on(x.device):
        grad_scale_kernel[(triton.cdiv(n, tile.bn), across)](
            x, dy, words, zero, out, m, n, k, k // group, x.stride(0), dy.stride(0), down, blocks, columns,
            GROUP=group, BITS=bits, **part, **_types(x), **_options(tile),
        )  # fmt: skip
    return out if columns == k // group else out.view(n, k // group, -1).sum(-1)


def _in_parts(launch: Any, out: Tensor, programs: int, steps: int) -> None:
    """launch(out, 1), or, where the grid is small, into fp32 parts that are then summed in order."""
    parts = affine_configs.split(programs, steps)
    with _on(out.device):
        if parts == 1:
            launch(out, 1)
            return
        acc = torch.float64 if out.dtype == torch.float64 else torch.float32
        buffer = torch.empty(parts, *out.shape, dtype=acc, device=out.device)
        launch(buffer, parts)
        sum_parts_kernel[(triton.cdiv(out.numel(), 1024),)](buffer, out, out.numel(), PARTS=parts, BLOCK=1024, enable_fp_fusion=True)


def _types(x: Tensor) -> dict[str, Any]:
    """Types of dot operands and accumulator, and how fp32 dots are taken (three tf32 products agree with fp32 to about 1e-6)."""
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    if not x.is_cuda:  # the interpreter: 16-bit arithmetic there is wrong (bf16) or slow
        return {"DOT": wide, "ACC": wide, "PRECISION": "ieee"}
    return {"DOT": _TYPES[x.dtype], "ACC": wide, "PRECISION": "ieee" if torch.version.hip else "tf32x3"}


def _options(tile: Tile) -> dict[str, int]:
    return {"BM": tile.bm, "BN": tile.bn, "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _foreign(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.float64


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.lru_cache
def _chip(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_90"
    return affine_configs.chip(torch.cuda.get_device_capability(device)[0], torch.version.hip is not None)
