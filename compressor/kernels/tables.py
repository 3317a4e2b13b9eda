"""Host side of the Triton kernels for weights with tables: the functions of reference.py for 3-D values, by tiles on the GPU.

Tables are split into words of bytes first (table_prepare.py), in x's type; whoever calls often with the same tables keeps the result of `prepare`
and hands it in. As in affine.py this file picks tiles (configs.py), cuts reductions where the grid alone would not fill the device, and launches;
from `panel_from` rows on products run on dense panels (panels.py). Under Triton's interpreter the same code runs on CPU tensors, in fp32 where a GPU
would use 16 bits (fp64 stays).

Limits: segments as in `fits`; fp64 on a GPU goes to the reference. No atomics on values: equal inputs give equal bits. A segment that is a multiple
of 256 is fastest, of 128 costs a fifth more instructions, of 64 two fifths.
"""

import contextlib
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor.kernels import configs, layout, panels, reference, workspace
from compressor.kernels.configs import Chip, Tile
from compressor.kernels.table_dequantize import table_dequantize_kernel
from compressor.kernels.table_forward import table_forward_kernel
from compressor.kernels.table_grad import grad_table_kernel
from compressor.kernels.table_grad_input import table_grad_input_kernel
from compressor.kernels.table_prepare import table_prepare_kernel

_WHOLE = 1 << 30  # the segment of a row with one table: longer than any row
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}


def fits(group: int, k: int) -> bool:
    """Whether the kernels know this segment length: a multiple of 64, or one table a row."""
    return group >= k or (group > 0 and group % 64 == 0)


def prepare(table: Tensor, dtype: torch.dtype, bits: int) -> Tensor:
    """table [n, S, 2**bits] -> its bytes as `dtype` in words, int32 [S, halves, 2, 2**bits/4, rows]; rows is n up to a multiple of 128."""
    n, segments, size = table.shape
    if not table.is_cuda:
        table = table.to(dtype)  # the interpreter truncates where this rounds
    rows = triton.cdiv(n, 128) * 128
    out = torch.empty(segments, dtype.itemsize // 2, 2, size // 4, rows, dtype=torch.int32, device=table.device)
    with _on(table.device):
        table_prepare_kernel[(rows // 64, segments)](
            table.contiguous(), out, n, segments, rows, BITS=bits, TYPE=_TYPES[dtype], BLOCK=64, num_warps=4, enable_fp_fusion=True
        )
    return out


def forward(x: Tensor, words: Tensor, table: Tensor, zero: None, bits: int, group: int, n: int, *, prepared: Tensor | None = None) -> Tensor:
    """y = x @ weight.T; x [m, k] -> y [m, n] in x's dtype; prepared: what `prepare(table, x.dtype, bits)` gives, if the caller has it already."""
    m, k = x.shape
    if _foreign(x):
        return reference.forward(x, words, table, zero, bits, group, n)
    if m == 0:
        return torch.empty(m, n, dtype=x.dtype, device=x.device)
    prepared = prepare(table, x.dtype, bits) if prepared is None else prepared
    if m >= configs.setting("panel_from", _chip(x.device)):
        return panels.forward(x, n, _writer(words, prepared, bits, group), configs.setting("panel", _chip(x.device)))
    x, tile = _rows(x), _tile("table_forward", x, m, bits)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    down, blocks = layout.tiles(n, k)
    grid = (triton.cdiv(n, tile.bn), triton.cdiv(m, tile.bm))
    parts, part, count = _parts(y, grid, blocks)
    steps = triton.cdiv(blocks, parts)
    with _on(x.device):
        table_forward_kernel[(*grid, parts)](
            x, words, prepared, y, part, count, m, n, k, x.stride(0), down, blocks, prepared.shape[-1], steps,
            EVEN=k % layout.COLS == 0, SPLIT=parts > 1, BITS=bits, **spans(tile, group, k, steps), **_types(x), **_options(tile),
        )  # fmt: skip
    return y


def grad_input(dy: Tensor, words: Tensor, table: Tensor, zero: None, bits: int, group: int, k: int, *, prepared: Tensor | None = None) -> Tensor:
    """dx = dy @ weight; dy [m, n] -> dx [m, k] in dy's dtype; prepared: as in `forward`, for dy.dtype."""
    m, n = dy.shape
    if _foreign(dy):
        return reference.grad_input(dy, words, table, zero, bits, group, k)
    if m == 0:
        return torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    prepared = prepare(table, dy.dtype, bits) if prepared is None else prepared
    if m >= configs.setting("panel_from", _chip(dy.device)):
        return panels.grad_input(dy, k, _writer(words, prepared, bits, group), configs.setting("panel", _chip(dy.device)))
    dy, tile = _rows(dy), _tile("table_grad_input", dy, m, bits)
    dx = torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    slices, (down, blocks) = steps_of(tile, group, k), layout.tiles(n, k)
    steps = triton.cdiv(n, slices["BN"])
    grid = (triton.cdiv(k, slices["WIDTH"]), triton.cdiv(m, tile.bm))
    parts, part, count = _parts(dx, grid, steps)
    with _on(dy.device):
        table_grad_input_kernel[(*grid, parts)](
            dy, words, prepared, dx, part, count, m, n, k, dy.stride(0), down, blocks, prepared.shape[-1], triton.cdiv(steps, parts),
            SPLIT=parts > 1, BITS=bits, **_types(dy), **(_options(tile) | slices),
        )  # fmt: skip
    return dx


def grad_table(x: Tensor, dy: Tensor, words: Tensor, bits: int, group: int) -> Tensor:
    """dtable[i, s, c] = sum over the segment's columns j with code[i, j] = c of (dy.T @ x)[i, j]; float32 (float64) [n, S, 2**bits]."""
    (m, k), n = x.shape, dy.shape[1]
    if _foreign(x):
        return reference.grad_table(x, dy, words, bits, group)
    acc, segments = torch.float64 if x.dtype == torch.float64 else torch.float32, triton.cdiv(k, group)
    if m == 0:
        return torch.zeros(n, segments, 1 << bits, dtype=acc, device=x.device)
    x, dy = _rows(x), _rows(dy.to(x.dtype))
    tile = _tile("grad_table", x, m, bits)
    width = columns(tile, group, k)["WIDTH"]
    down, blocks = layout.tiles(n, k)
    across = triton.cdiv(k, width) if segments == 1 else segments * (group // width)  # tiles beyond k give zeros
    out = torch.empty(n, across, 1 << bits, dtype=acc, device=x.device)
    with _on(x.device):
        grad_table_kernel[(triton.cdiv(n, tile.bn), across)](
            x, dy, words, out, m, n, k, x.stride(0), dy.stride(0), down, blocks, across,
            EVEN=m % tile.bm == 0, BITS=bits, WIDTH=width, **_types(x), **_options(tile),
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
    with _on(out.device):
        table_dequantize_kernel[(triton.cdiv(rows.stop - rows.start, tile.bn), triton.cdiv(cols.stop - cols.start, slices["WIDTH"]))](
            words, prepared, out, rows.stop, cols.stop, down, blocks, prepared.shape[-1], rows.start, cols.start // layout.COLS, out.stride(0),
            **slices, BITS=bits, BN=tile.bn, TYPE=_TYPES[out.dtype], ASM=_assembly(out.device), num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=True,
        )  # fmt: skip


def _writer(words: Tensor, prepared: Tensor, bits: int, group: int) -> panels.Write:
    return lambda rows, cols, out: dequantize(words, None, bits, group, out, rows, cols, prepared=prepared)


def _tile(op: str, x: Tensor, m: int, bits: int) -> Tile:
    """The interpreter takes the wide tiles of 16-bit inputs always: it is paid by the operation, not by the element."""
    return configs.tile(op, _chip(x.device), m, x.element_size() if x.is_cuda else 2, bits)


def columns(tile: Tile, group: int, k: int) -> dict[str, int]:
    """The segment length as kernels want it, and the columns of a tile, all of one segment."""
    group = _WHOLE if group >= k else group
    return {"GROUP": group, "WIDTH": min(tile.width, math.gcd(group, layout.COLS))}


def steps_of(tile: Tile, group: int, k: int) -> dict[str, int]:
    """For the gradient of x: columns of a tile, and its rows, twice as many where it is narrow, up to 128."""
    slices = columns(tile, group, k)
    return slices | {"BN": max(tile.bn, min(128, tile.bn * tile.width // slices["WIDTH"]))}


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


def _compiled(case: Any) -> tuple[Any, dict[str, Any]]:
    """For bench/aot.py: the kernel of a case and its constants, as the functions above launch it on a layer of 4096 columns."""
    constants = {**case.types, "ASM": "gcn" if case.target == "gfx942" else "ptx", "TYPE": case.types["DOT"]}
    if case.op == "table_forward":
        return table_forward_kernel, constants | spans(case.tile, case.group, 4096, 4 if case.few else 16) | _uncut(constants)
    if case.op == "table_grad_input":
        return table_grad_input_kernel, constants | steps_of(case.tile, case.group, 4096) | _uncut(constants)
    return (grad_table_kernel if case.op == "grad_table" else table_dequantize_kernel), constants | columns(case.tile, case.group, 4096)


def _uncut(constants: dict[str, Any]) -> dict[str, Any]:
    return {} if constants["SPLIT"] else {"part_ptr": None, "count_ptr": None}


# what bench/aot.py compiles: operation -> the kernel and its constants for a case; and the kinds of pointers that no other kernel has
AOT = dict.fromkeys(("table_forward", "table_grad_input", "grad_table", "table_dequantize"), _compiled)
AOT_POINTERS = {"t_ptr": "i32"}


def _parts(out: Tensor, grid: tuple[int, int], steps: int) -> tuple[int, Tensor | None, Tensor | None]:
    """In how many parts to cut the reduction, and, if more than one, their room and counters (see affine_finish.py)."""
    tiles = grid[0] * grid[1]
    parts = configs.split(_chip(out.device), tiles, steps)
    if parts == 1:
        return 1, None, None
    return parts, torch.empty(parts, *out.shape, dtype=reference.wide(out.dtype), device=out.device), workspace.counters(out.device, tiles)


def _types(x: Tensor) -> dict[str, Any]:
    """Types of dot operands and accumulator, how fp32 dots are taken (three tf32 products agree with fp32 to about 1e-6), whose assembly."""
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    if not x.is_cuda:  # the interpreter: 16-bit arithmetic there is wrong (bf16) or slow
        return {"DOT": wide, "ACC": wide, "PRECISION": "ieee", "ASM": ""}
    return {"DOT": _TYPES[x.dtype], "ACC": wide, "PRECISION": "ieee" if torch.version.hip else "tf32x3", "ASM": _assembly(x.device)}


def _assembly(device: torch.device) -> str:
    return "" if device.type != "cuda" else "gcn" if torch.version.hip else "ptx"


def _options(tile: Tile) -> dict[str, int]:
    return {"BM": tile.bm, "BN": tile.bn, "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _foreign(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.float64


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.lru_cache
def _chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip("", "sm_90")
    properties = torch.cuda.get_device_properties(device)
    return configs.chip(properties.name, properties.major, torch.version.hip is not None)
