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

import math
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

    ModelError for a type or a width of rows that does not go, for values that are not finite, and for those beyond the range of float16.
    """
    return fitted(weight, name)[0]


def fitted(weight: PackedWeight | Tensor, name: str) -> tuple[Tensor, float]:
    """What `encode` gives, and the relative error |seen - weight| / |weight| of what readers see of it: 0 only where they see it bit for bit."""
    found = _fitted(weight, name, whole=False)
    assert found is not None
    return found


def fitted_exactly(weight: PackedWeight, name: str) -> Tensor | None:
    """The bytes of a weight that this type holds exactly; None, mostly after a look at its scales, for any other. Errors as of `encode`."""
    found = None if weight.shape[1] % columns(name) else _fitted(weight, name, whole=True)
    return None if found is None else found[0]


def _fitted(weight: PackedWeight | Tensor, name: str, whole: bool) -> tuple[Tensor, float] | None:
    """Bytes and relative error, panel by panel; with `whole`, None as soon as a panel is not exact with its own codes."""
    n, k = weight.shape
    out = torch.empty(n, row_bytes(name, k), dtype=torch.uint8)
    wrong = total = 0.0
    for rows in panels(n, k, multiple=layout.ROWS):
        part = packed_rows(weight, rows) if isinstance(weight, PackedWeight) else None
        _check_source(weight[rows] if isinstance(weight, Tensor) else part, name)
        kept = None if part is None or name in FLOATS else gguf_fit.own(part, kind_of(name), whole)
        if whole and kept is None and name not in FLOATS:
            return None
        dense = _dense(weight, rows)
        if name in FLOATS:
            numbers = dense.to(FLOATS[name]).contiguous()
            out[rows], seen = numbers.view(torch.uint8), numbers.float()
        else:
            grid = _grid(part, dense, kind_of(name), kept)
            numbers = grid.d if grid.dmin is None else torch.cat([grid.d, grid.dmin])
            out[rows], seen = to_bytes(grid, kind_of(name)), grid.values()
        if whole and not torch.equal(seen, dense):
            return None
        _check(numbers, name)
        wrong += float((seen - dense).double().square().sum())
        total += float(dense.double().square().sum())
    return out, math.sqrt(wrong / total) if total else math.sqrt(wrong)


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
    return fitted_exactly(weight, name) is not None


def packed_rows(weight: PackedWeight, rows: slice) -> PackedWeight:
    """The rows [start, stop) in CPU memory as a weight of their own; start is a multiple of a tile's rows."""
    words = weight.words[rows.start // layout.ROWS : -(-rows.stop // layout.ROWS)].cpu()
    learned, zero = weight.learned[rows].detach().cpu(), None if weight.zero is None else weight.zero[rows].cpu()
    values = Table(learned) if isinstance(weight.values, Table) else Affine(learned, zero)
    order = None if weight.columns is None else weight.columns.cpu()
    return replace(weight, words=words, values=values, shape=(rows.stop - rows.start, weight.shape[1]), columns=order)


def _dense(weight: PackedWeight | Tensor, rows: slice) -> Tensor:
    return dense_rows(weight, rows).cpu() if isinstance(weight, PackedWeight) else weight[rows].detach().float().cpu()


def _grid(part: PackedWeight | None, dense: Tensor, kind: Kind, kept: tuple[Grid, Tensor] | None) -> Grid:
    """Own codes where a block can have them, the nearest elsewhere."""
    if kept is not None and bool(kept[1].all()):
        return kept[0]
    found = gguf_fit.nearest(part, dense, kind)
    return found if kept is None else gguf_fit.chosen(kept[1], kept[0], found)


def finite(weight: PackedWeight | Tensor) -> bool:
    """Whether no value, scale or zero is NaN or infinite."""
    numbers = (weight,) if isinstance(weight, Tensor) else (weight.learned, weight.zero)
    return all(bool(torch.isfinite(each).all()) for each in numbers if each is not None)


def _check_source(weight: PackedWeight | Tensor | None, name: str) -> None:
    if weight is not None and not finite(weight):
        raise ModelError(f"a weight holds NaN or infinite values, which {name} cannot hold: compress the model again, from weights that are finite")


def _check(numbers: Tensor, name: str) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise ModelError(f"a weight holds values that {name} cannot hold, beyond the range of float16; choose f32")
