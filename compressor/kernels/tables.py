"""Host side of the Triton kernels for weights with tables: the functions of reference.py for 3-D values, by tiles on the GPU.

Tables are split into words of bytes first (table_prepare.py), in x's type, at every call; a caller whose tables stay may keep the result of
`prepare` and hand it in, which nothing in the package does yet. As in affine.py this file picks tiles (configs.py), cuts reductions where the grid
alone would not fill the device, and launches; from `panel_from` rows on products run on dense panels (panels.py). Under Triton's interpreter the same
code runs on CPU tensors, in fp32 where a GPU would use 16 bits (fp64 stays).

Limits: segments as in `fits`; fp64 on a GPU goes to the reference. No atomics on values: equal inputs give equal bits. A segment that is a multiple
of 256 is fastest, of 128 costs a fifth more instructions, of 64 two fifths: odd multiples of 64 take up to 5.69 and 3.35 instructions a weight at 4
and 2 bits, more than the 5.5 and 3.1 that bench/aot.py allows (it checks segments of 1024 and 128).
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from compressor.kernels import configs, launch, layout, panels, reference
from compressor.kernels.configs import Tile
from compressor.kernels.launch import Low
from compressor.kernels.table_dequantize import table_dequantize_kernel
from compressor.kernels.table_forward import table_forward_kernel
from compressor.kernels.table_grad import grad_table_kernel
from compressor.kernels.table_grad_input import table_grad_input_kernel
from compressor.kernels.table_prepare import table_prepare_kernel

FUSES_LOW = True  # forward takes `low`
FUSED_LOW = 64  # rows of x up to which the kernel adds it: the tile for more rows has no registers left (sm_90: 255, and a stack)
_WHOLE = 1 << 30  # the segment of a row with one table: longer than any row


def fits(group: int, k: int) -> bool:
    """Whether the kernels know this segment length: a multiple of 64, or one table a row."""
    return group >= k or (group > 0 and group % 64 == 0)


def prepare(table: Tensor, dtype: torch.dtype, bits: int) -> Tensor:
    """table [n, S, 2**bits] -> its bytes as `dtype` in words, int32 [S, halves, 2, 2**bits/4, rows]; rows is n up to a multiple of TABLE_ROWS."""
    n, segments, size = table.shape
    if not table.is_cuda:
        table = table.to(dtype)  # the interpreter truncates where this rounds
    rows = triton.cdiv(n, configs.TABLE_ROWS) * configs.TABLE_ROWS
    out = torch.empty(segments, dtype.itemsize // 2, 2, size // 4, rows, dtype=torch.int32, device=table.device)
    with launch.on(table.device):
        table_prepare_kernel[(rows // 64, segments)](
            table.contiguous(), out, n, segments, rows, BITS=bits, TYPE=launch.TYPES[dtype], BLOCK=64, num_warps=4, enable_fp_fusion=True
        )
    return out


def forward(
    x: Tensor, words: Tensor, table: Tensor, zero: None, bits: int, group: int, n: int, *, prepared: Tensor | None = None, low: Low | None = None
) -> Tensor:
    """y = x @ weight.T (+ u @ b.T, by the kernel up to FUSED_LOW rows); x [m, k] -> y [m, n] in x's dtype.

    prepared: what `prepare(table, x.dtype, bits)` gives, an option for callers whose tables stay; low: (u [m, r], b [n, r]).
    """
    m, k = x.shape
    if launch.foreign(x):
        return launch.add_low(reference.forward(x, words, table, zero, bits, group, n), low)
    if m == 0:
        return torch.empty(m, n, dtype=x.dtype, device=x.device)
    prepared = prepare(table, x.dtype, bits) if prepared is None else prepared
    if m >= configs.setting("panel_from", launch.chip(x.device)):
        return launch.add_low(panels.forward(x, n, _writer(words, prepared, bits, group), configs.setting("panel", launch.chip(x.device))), low)
    x, tile = launch.rows(x), _tile("table_forward", x, m, bits)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    down, blocks = layout.tiles(n, k)
    grid = (triton.cdiv(n, tile.bn), triton.cdiv(m, tile.bm))
    parts, part, count = launch.parts(y, grid, blocks)
    steps, (u, b) = triton.cdiv(blocks, parts), launch.padded(low if m <= FUSED_LOW else None, x.dtype)
    with launch.on(x.device):
        table_forward_kernel[(*grid, parts)](
            x, words, prepared, u, b, y, part, count, m, n, k, launch.rank(b), x.stride(0), down, blocks, prepared.shape[-1], steps,
            EVEN=k % layout.COLS == 0, SPLIT=parts > 1, BITS=bits, **spans(tile, group, k, steps), **_types(x), **launch.options(tile),
        )  # fmt: skip
    return y if m <= FUSED_LOW else launch.add_low(y, low)


def grad_input(dy: Tensor, words: Tensor, table: Tensor, zero: None, bits: int, group: int, k: int, *, prepared: Tensor | None = None) -> Tensor:
    """dx = dy @ weight; dy [m, n] -> dx [m, k] in dy's dtype; prepared: as in `forward`, for dy.dtype."""
    m, n = dy.shape
    if launch.foreign(dy):
        return reference.grad_input(dy, words, table, zero, bits, group, k)
    if m == 0:
        return torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    prepared = prepare(table, dy.dtype, bits) if prepared is None else prepared
    if m >= configs.setting("panel_from", launch.chip(dy.device)):
        return panels.grad_input(dy, k, _writer(words, prepared, bits, group), configs.setting("panel", launch.chip(dy.device)))
    dy, tile = launch.rows(dy), _tile("table_grad_input", dy, m, bits)
    dx = torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    slices, (down, blocks) = steps_of(tile, group, k), layout.tiles(n, k)
    steps = triton.cdiv(n, slices["BN"])
    grid = (triton.cdiv(k, slices["WIDTH"]), triton.cdiv(m, tile.bm))
    parts, part, count = launch.parts(dx, grid, steps)
    with launch.on(dy.device):
        table_grad_input_kernel[(*grid, parts)](
            dy, words, prepared, dx, part, count, m, n, k, dy.stride(0), down, blocks, prepared.shape[-1], triton.cdiv(steps, parts),
            SPLIT=parts > 1, BITS=bits, **_types(dy), **(launch.options(tile) | slices),
        )  # fmt: skip
    return dx


def grad_table(x: Tensor, dy: Tensor, words: Tensor, bits: int, group: int) -> Tensor:
    """dtable[i, s, c] = sum over the segment's columns j with code[i, j] = c of (dy.T @ x)[i, j]; float32 (float64) [n, S, 2**bits]."""
    (m, k), n = x.shape, dy.shape[1]
    if launch.foreign(x):
        return reference.grad_table(x, dy, words, bits, group)
    acc, segments = reference.wide(x.dtype), triton.cdiv(k, group)
    if m == 0:
        return torch.zeros(n, segments, 1 << bits, dtype=acc, device=x.device)
    x, dy = launch.rows(x), launch.rows(dy.to(x.dtype))
    tile = _tile("grad_table", x, m, bits)
    width = columns(tile, group, k)["WIDTH"]
    down, blocks = layout.tiles(n, k)
    across = triton.cdiv(k, width) if segments == 1 else segments * (group // width)  # tiles beyond k give zeros
    out = torch.empty(n, across, 1 << bits, dtype=acc, device=x.device)
    with launch.on(x.device):
        grad_table_kernel[(triton.cdiv(n, tile.bn), across)](
            x, dy, words, out, m, n, k, x.stride(0), dy.stride(0), down, blocks, across,
            EVEN=m % tile.bm == 0, BITS=bits, WIDTH=width, **_types(x), **launch.options(tile),
        )  # fmt: skip
    return out if across == segments else out.view(n, segments, -1, 1 << bits).sum(2)


def dequantize(
    words: Tensor, table: Tensor | None, bits: int, group: int, out: Tensor, rows: slice, cols: slice, *, prepared: Tensor | None = None
) -> None:
    """out = these rows and columns of the dense weight, in out's dtype; they start at a multiple of 64 rows and of 256 columns."""
    if prepared is None:
        assert table is not None
        prepared = prepare(table, out.dtype, bits)
    tile, (down, blocks) = _tile("table_dequantize", out, rows.stop - rows.start, bits), words.shape[:2]
    slices = columns(tile, group, _WHOLE if prepared.shape[0] > 1 else 0)
    with launch.on(out.device):
        table_dequantize_kernel[(triton.cdiv(rows.stop - rows.start, tile.bn), triton.cdiv(cols.stop - cols.start, slices["WIDTH"]))](
            words, prepared, out, rows.stop, cols.stop, down, blocks, prepared.shape[-1], rows.start, cols.start // layout.COLS, out.stride(0),
            **slices, BITS=bits, BN=tile.bn, TYPE=launch.TYPES[out.dtype], ASM=_assembly(out.device), num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=True,
        )  # fmt: skip


def _writer(words: Tensor, prepared: Tensor, bits: int, group: int) -> panels.Write:
    return lambda rows, cols, out: dequantize(words, None, bits, group, out, rows, cols, prepared=prepared)


def _tile(op: str, x: Tensor, m: int, bits: int) -> Tile:
    """The interpreter takes the wide tiles of 16-bit inputs always: it is paid by the operation, not by the element."""
    return configs.tile(op, launch.chip(x.device), m, x.element_size() if x.is_cuda else 2, bits)


def columns(tile: Tile, group: int, k: int) -> dict[str, int]:
    """The segment length as kernels want it, and the columns of a tile, all of one segment."""
    group = _WHOLE if group >= k else group
    return {"GROUP": group, "WIDTH": min(tile.width, math.gcd(group, layout.COLS))}


def steps_of(tile: Tile, group: int, k: int) -> dict[str, int]:
    """For the gradient of x: columns of a tile, and its rows, more where it is narrow, up to TABLE_ROWS."""
    slices = columns(tile, group, k)
    return slices | {"BN": max(tile.bn, min(configs.TABLE_ROWS, tile.bn * tile.width // slices["WIDTH"]))}


def spans(tile: Tile, group: int, k: int, steps: int) -> dict[str, int]:
    """Columns of a dot and columns that share a table in the forward kernel, for parts of `steps` blocks.

    SPAN 0 (one table for a whole part, loaded before the loop) needs more threads than rows: else the compiler keeps the table in another register
    layout than the weights, which then go through shared memory. Slices of 64 columns (fp32 inputs) load their table each: held longer, it spills.
    """
    group = _WHOLE if group >= k else group
    span = math.gcd(group, layout.COLS)
    if tile.width == 64:
        span = 64
    elif (group == _WHOLE or group % (steps * layout.COLS) == 0) and tile.bn < 32 * tile.warps:
        span = 0
    return {"GROUP": group, "SPAN": span, "WIDTH": min(tile.width, span or layout.COLS)}


def _types(x: Tensor) -> dict[str, Any]:
    return launch.types(x) | {"ASM": _assembly(x.device)}


def _assembly(device: torch.device) -> str:
    """Whose assembly the kernels may hold."""
    return "" if device.type != "cuda" else "gcn" if torch.version.hip else "ptx"
