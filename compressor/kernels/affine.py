"""Host side of the Triton kernels for affine weights: the same functions as reference.py, by tiles on the GPU.

This file checks strides, picks tiles (configs.py), cuts reductions where the grid alone would not fill the device, and launches; the kernels lie one
operation a file beside it. From `panel_from` rows on, products run on dense panels (panels.py). Under Triton's interpreter the same code runs on CPU
tensors, in fp32 where a GPU would use 16 bits (fp64 stays).

Limits: groups as in `fits`; fp64 on a GPU goes to the reference. Atomics only count arrivals, no value is summed with them: equal inputs give equal
bits.
"""

import functools

import torch
import triton
from torch import Tensor

from compressor.kernels import affine_biased, configs, launch, layout, panels, reference, workspace
from compressor.kernels.affine_dequantize import dequantize_kernel
from compressor.kernels.affine_forward import few_kernel, many_kernel, sums_kernel
from compressor.kernels.affine_grad_input import grad_input_kernel
from compressor.kernels.affine_grad_scale import grad_scale_kernel
from compressor.kernels.configs import Tile
from compressor.kernels.launch import Low

FOLD_ABOVE = 64  # rows of x above which scales are multiplied into the weights instead of into the accumulator
FUSES_LOW = True  # forward takes `low`


def fits(group: int, k: int) -> bool:
    """Whether the kernels know this group size: 32, 64, 128 or a multiple of 256 that divides k, or one group a row."""
    return group == k or (group > 0 and k % group == 0 and (group in (32, 64, 128) or group % layout.COLS == 0))


def folds(group: int, k: int, m: int) -> bool:
    """Whether the forward kernel multiplies scales into the weights: for many rows, and where a group is narrower than a 64-column slice."""
    return m > FOLD_ABOVE or (group < 64 and group != k)


def slices(tile: Tile, group: int, k: int, fold: bool = True) -> dict[str, int]:
    """Columns of one dot and groups that they hold: more than one only if scales are folded and groups lie side by side."""
    if group == k or group >= tile.width:
        return {"WIDTH": tile.width, "COUNT": 1}
    return {"WIDTH": tile.width, "COUNT": tile.width // group} if fold else {"WIDTH": group, "COUNT": 1}


def forward(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, n: int, *, sums: Tensor | None = None, low: Low | None = None
) -> Tensor:
    """y = x @ weight.T (+ u @ b.T); x [m, k] -> y [m, n] in x's dtype.

    sums: what `group_sums(x, group)` gives, an option for callers whose layers read the same x, which nothing in the package
    uses yet; low: (u [m, r], b [n, r]).
    """
    m, k = x.shape
    if launch.foreign(x):
        return launch.add_low(reference.forward(x, words, scale, zero, bits, group, n), low)
    if m == 0:
        return torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m >= configs.setting("panel_from", launch.chip(x.device)):
        write = functools.partial(_write, words, scale.contiguous(), launch.dense(zero), bits, group, k)
        return launch.add_low(panels.forward(x, n, write, configs.setting("panel", launch.chip(x.device))), low)
    return _forward(launch.rows(x), words, scale.contiguous(), launch.dense(zero), bits, group, n, sums, launch.padded(low, x.dtype))


def _forward(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, n: int, sums: Tensor | None, low: Low | tuple[None, None]
) -> Tensor:
    (m, k), where = x.shape, launch.chip(x.device)
    tile, fold = configs.tile("forward", where, m, x.element_size(), bits), folds(group, k, m)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    down, blocks = layout.tiles(n, k)
    grid = (triton.cdiv(n, tile.bn), triton.cdiv(m, tile.bm))
    parts, part, count = launch.parts(y, grid, blocks)
    sizes = (m, n, k, k // group, launch.rank(low[1]), x.stride(0), down, blocks, triton.cdiv(blocks, parts))
    same = {"BITS": bits, "EVEN": k % layout.COLS == 0, "SPLIT": parts > 1, **launch.types(x), **launch.options(tile)}
    part_of = slices(tile, group, k, fold)
    if fold:
        with launch.on(x.device):
            many_kernel[(*grid, parts)](x, words, scale, zero, *low, y, part, count, *sizes, GROUP=group, **part_of, **same)
        return y
    sums = group_sums(x, group) if sums is None else sums.contiguous()
    mask = workspace.constant(affine_biased.mask(x.dtype, bits), x.device)
    with launch.on(x.device):
        few_kernel[(*grid, parts)](
            x, words, scale, zero, sums, mask, *low, y, part, count, *sizes,
            GROUP=0 if group == k else group, WIDTH=part_of["WIDTH"], **same,
        )  # fmt: skip
    return y


def group_sums(x: Tensor, group: int) -> Tensor:
    """Sums of x over the columns of each group, float32 (float64) [m, k/group]."""
    m, k = x.shape
    if launch.foreign(x):
        return reference.group_sums(x, group)
    x = launch.rows(x)
    out = torch.empty(m, k // group, dtype=reference.wide(x.dtype), device=x.device)
    if m:
        width = min(1024, triton.next_power_of_2(group))
        count = min(1024 // width, triton.next_power_of_2(k // group))
        with launch.on(x.device):
            grid = (m, triton.cdiv(k // group, count))
            sums_kernel[grid](
                x, out, k // group, x.stride(0), GROUP=group, COUNT=count, WIDTH=width, ACC=launch.TYPES[out.dtype], enable_fp_fusion=True
            )
    return out


def grad_input(dy: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, k: int) -> Tensor:
    """dx = dy @ weight; dy [m, n] -> dx [m, k] in dy's dtype."""
    (m, n), where = dy.shape, launch.chip(dy.device)
    if launch.foreign(dy):
        return reference.grad_input(dy, words, scale, zero, bits, group, k)
    if m == 0:
        return torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    scale, zero = scale.contiguous(), launch.dense(zero)
    if m >= configs.setting("panel_from", where):
        return panels.grad_input(dy, k, functools.partial(_write, words, scale, zero, bits, group, k), configs.setting("panel", where))
    dy = launch.rows(dy)
    tile = configs.tile("grad_input", where, m, dy.element_size(), bits)
    dx = torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    down, blocks = layout.tiles(n, k)
    steps = triton.cdiv(n, tile.bn)
    grid = (triton.cdiv(k, tile.width), triton.cdiv(m, tile.bm))
    parts, part, count = launch.parts(dx, grid, steps)
    with launch.on(dy.device):
        grad_input_kernel[(*grid, parts)](
            dy, words, scale, zero, dx, part, count, m, n, k, k // group, dy.stride(0), down, blocks, triton.cdiv(steps, parts),
            GROUP=group, BITS=bits, SPLIT=parts > 1, **slices(tile, group, k), **launch.types(dy), **launch.options(tile),
        )  # fmt: skip
    return dx


def grad_scale(x: Tensor, dy: Tensor, words: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    """dscale[i, g] = sum over the group's columns j of (dy.T @ x)[i, j] * (code - zero)[i, j]; float32 (float64) [n, k/group]."""
    (m, k), n = x.shape, dy.shape[1]
    if launch.foreign(x):
        return reference.grad_scale(x, dy, words, zero, bits, group)
    acc = reference.wide(x.dtype)
    if m == 0:
        return torch.zeros(n, k // group, dtype=acc, device=x.device)
    x, dy, zero = launch.rows(x), launch.rows(dy.to(x.dtype)), launch.dense(zero)
    tile = configs.tile("grad_scale", launch.chip(x.device), m, x.element_size(), bits)
    down, blocks = layout.tiles(n, k)
    across, part = triton.cdiv(k, tile.width), slices(tile, group, k)
    columns = k // group if part["COUNT"] > 1 else across  # sums of groups, or of parts of groups
    out = torch.empty(n, columns, dtype=acc, device=x.device)
    with launch.on(x.device):
        grad_scale_kernel[(triton.cdiv(n, tile.bn), across)](
            x, dy, words, zero, out, m, n, k, k // group, x.stride(0), dy.stride(0), down, blocks, columns,
            GROUP=group, BITS=bits, **part, **launch.types(x), **launch.options(tile),
        )  # fmt: skip
    return out if columns == k // group else out.view(n, k // group, -1).sum(-1)


def dequantize(words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [n, k] in `dtype`, each weight formed in float32 and rounded once."""
    out = torch.empty(n, k, dtype=dtype, device=words.device)
    if launch.foreign(out):
        return reference.dequantize(words, scale, zero, bits, group, n, k, dtype)
    _write(words, scale.contiguous(), launch.dense(zero), bits, group, k, slice(0, n), slice(0, k), out)
    return out


def _write(words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, k: int, rows: slice, columns: slice, out: Tensor) -> None:
    """Write these rows (from a multiple of 64) and columns (from a multiple of 256) of the dense weight into out."""
    words = words[rows.start // layout.ROWS : triton.cdiv(rows.stop, layout.ROWS)]
    n, zero = rows.stop - rows.start, None if zero is None else zero[rows]
    tile = configs.tile("dequantize", launch.chip(out.device), n, out.element_size(), bits)
    code = out.dtype if out.element_size() == 2 else torch.bfloat16  # integers up to 15, exact
    grid = (triton.cdiv(n, tile.bn), triton.cdiv(columns.stop - columns.start, tile.width))
    with launch.on(out.device):
        dequantize_kernel[grid](
            words, scale[rows], zero, out, n, columns.stop, k // group, *words.shape[:2], columns.start // layout.COLS, out.stride(0),
            GROUP=group, BITS=bits, BN=tile.bn, **slices(tile, group, k), TYPE=launch.TYPES[code], DOT=launch.types(out)["DOT"],
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
