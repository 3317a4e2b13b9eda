"""Weights as rows of GGUF blocks: `encode` to bytes, `decode` to what readers compute with.

A packed weight keeps its own codes wherever the type can hold them, and is otherwise re-fitted to the type's grid (gguf_fit.py); a dense weight is
always fitted. What each type holds exactly of weights with integer zeros, float16 scales and groups that are multiples of its sub-blocks:

    Q4_0             symmetric 4 bits; 2 and 3 bits with any zeros
    Q5_0             4 bits with any zeros
    Q8_0             8 bits, symmetric
    Q4_1             4 bits with zeros whose product with the scale float16 holds; with other zeros, floats too, the nearest
    Q4_K Q3_K Q2_K   where the scales of 256 columns are multiples 1…63, 1…31, 1…15 of one float16: symmetric 4, 3 and 2 bits and, Q4_K, 3 and 2 too

`exact` compares what a reader would see with the weight bit for bit, so it needs no list. Work goes in panels of rows, so that memory stays bounded.
Bytes: gguf_types.py.
"""

from dataclasses import replace

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.export import gguf_fit
from compressor.export.gguf_types import KINDS, Grid, Kind, from_bytes, to_bytes
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight, Table
from compressor.packing import dense_rows, panels

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCKS = ("q2_k", "q3_k", "q4_0", "q4_k", "q4_1", "q5_0", "q8_0")  # by the bits of a weight, from 2.625 to 8.5
NAMES = (*FLOATS, *BLOCKS)


def kind_of(name: str) -> Kind:
    """The block type of this name; ModelError for any other."""
    if name not in KINDS:
        raise ModelError(f"{name!r} is no type of GGUF that compressor writes; choose one of {', '.join(NAMES)}")
    return KINDS[name]


def columns(name: str) -> int:
    """What rows must be a multiple of."""
    return 1 if name in FLOATS else kind_of(name).block


def row_bytes(name: str, k: int) -> int:
    """Bytes of a row of k columns; ModelError where the type has no such rows."""
    if k % columns(name):
        raise ModelError(f"rows of {k} columns cannot be stored as {name}, whose blocks have {columns(name)}")
    return k * FLOATS[name].itemsize if name in FLOATS else k // columns(name) * kind_of(name).size


def encode(weight: PackedWeight | Tensor, name: str) -> Tensor:
    """uint8 [n, bytes] of a packed weight or of a floating-point tensor [n, k]: exact where the type can be, else the nearest found.

    ModelError for a type or a width of rows that does not go, and for values beyond the range of float16.
    """
    n, k = weight.shape
    out = torch.empty(n, row_bytes(name, k), dtype=torch.uint8)
    for rows in panels(n, k, multiple=layout.ROWS):
        if name in FLOATS:
            dense = _dense(weight, rows).to(FLOATS[name])
            _check(dense, name)
            out[rows] = dense.contiguous().view(torch.uint8)
        else:
            grid = _grid(weight, rows, kind_of(name))
            _check(grid.d if grid.dmin is None else torch.cat([grid.d, grid.dmin]), name)
            out[rows] = to_bytes(grid, kind_of(name))
    return out


def decode(data: Tensor, name: str, shape: tuple[int, int]) -> Tensor:
    """The weight that readers see, float32 [n, k], from uint8 [n, bytes]; ModelError where the bytes are not of this type and shape."""
    n, k = shape
    if data.dtype != torch.uint8 or tuple(data.shape) != (n, row_bytes(name, k)):
        raise ModelError(f"bytes of shape {tuple(data.shape)} are no {name} weight of shape {shape}")
    if name in FLOATS:
        return data.contiguous().view(FLOATS[name]).float()
    out = torch.empty(n, k)
    for rows in panels(n, k, multiple=layout.ROWS):
        out[rows] = from_bytes(data[rows], kind_of(name)).values()
    return out


def exact(weight: PackedWeight, name: str) -> bool:
    """Whether readers of this type see the packed weight bit for bit; block types only with its own codes."""
    n, k = weight.shape
    if k % columns(name):
        return False
    for rows in panels(n, k, multiple=layout.ROWS):
        dense = _dense(weight, rows)
        if name in FLOATS:
            seen: Tensor | None = dense.to(FLOATS[name]).float()
        else:
            kept = gguf_fit.own(packed_rows(weight, rows), kind_of(name))
            seen = None if kept is None or not bool(kept[1].all()) else kept[0].values()
        if seen is None or not torch.equal(seen, dense):
            return False
    return True


def packed_rows(weight: PackedWeight, rows: slice) -> PackedWeight:
    """The rows [start, stop) in CPU memory as a weight of their own; start is a multiple of a tile's rows."""
    words = weight.words[rows.start // layout.ROWS : -(-rows.stop // layout.ROWS)].cpu()
    learned, zero = weight.learned[rows].detach().cpu(), None if weight.zero is None else weight.zero[rows].cpu()
    values = Table(learned) if isinstance(weight.values, Table) else Affine(learned, zero)
    order = None if weight.columns is None else weight.columns.cpu()
    return replace(weight, words=words, values=values, shape=(rows.stop - rows.start, weight.shape[1]), columns=order)


def _dense(weight: PackedWeight | Tensor, rows: slice) -> Tensor:
    return dense_rows(weight, rows).cpu() if isinstance(weight, PackedWeight) else weight[rows].detach().float().cpu()


def _grid(weight: PackedWeight | Tensor, rows: slice, kind: Kind) -> Grid:
    """Own codes where a block can have them, the nearest elsewhere."""
    part = packed_rows(weight, rows) if isinstance(weight, PackedWeight) else None
    kept = None if part is None else gguf_fit.own(part, kind)
    if kept is not None and bool(kept[1].all()):
        return kept[0]
    found = gguf_fit.nearest(part, _dense(weight, rows), kind)
    return found if kept is None else gguf_fit.chosen(kept[1], kept[0], found)


def _check(numbers: Tensor, name: str) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise ModelError(f"a weight holds values that {name} cannot hold, beyond the range of float16 or not finite; choose f32")
