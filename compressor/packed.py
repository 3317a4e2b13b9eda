"""A packed weight: integer codes, and the numbers that turn a code into a weight.

Packers choose codes and values, tuners move values, exporters write both; codes never change after packing. In memory the codes lie in the
kernels' tile64x256 layout (see kernels/layout.py); on disk every format has its own stream, reached through `codes()`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.errors import ModelError, RecipeError
from compressor.kernels import layout, reference


@dataclass(frozen=True)
class Affine:
    """weight = scale * (code - zero).

    scale [n, G], in the dtype it is stored in; zero [n, G]: uint8 with 0 <= zero < 2**bits, or tuned ones, any finite floats in float16, bfloat16
    or float32; None for symmetric weights, whose zero is the midpoint 2**(bits-1) everywhere.
    """

    scale: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True)
class Table:
    """weight = table[row, segment, code]: a sketch. table [n, S, 2**bits], in the dtype it is stored in."""

    table: Tensor


@dataclass(frozen=True)
class PackedWeight:
    """Codes of `bits` bits for a weight of `shape` (n out features, k in features); `group` columns of a row share a scale or a table.

    `group` divides k for affine weights. The last segment of a table may be shorter: S = ceil(k / group). Where the columns of a group do not lie
    side by side (GPTQ's act-order), they are stored in an order in which they do, and `columns` says which column of the layer each one is.
    """

    words: Tensor  # int32, tile64x256
    values: Affine | Table
    bits: int
    group: int
    shape: tuple[int, int]
    columns: Tensor | None = None  # int64 [k], a permutation; None: as they are in the layer

    @classmethod
    def pack(cls, codes: Tensor, values: Affine | Table, bits: int, group: int | None = None, columns: Tensor | None = None) -> "PackedWeight":
        """codes uint8 [n, k], each below 2**bits, in the order of `columns`; the group size follows from the shape of the scales, and must be
        given for several tables."""
        n, k = codes.shape
        if bits not in layout.STORED:
            raise RecipeError(f"{bits} bits cannot be packed; choose one of {layout.STORED}")
        learned = learned_of(values)
        count = learned.shape[1] if learned.dim() > 1 else 0
        group = group or k // max(count, 1)
        fits = (
            learned.dim() == 2 and count * group == k if isinstance(values, Affine) else learned.shape[2:] == (1 << bits,) and -(-k // group) == count
        )
        if learned.shape[0] != n or not fits:
            kind = "scales" if isinstance(values, Affine) else "tables"
            raise ModelError(f"{kind} of shape {tuple(learned.shape)} do not fit a weight of shape {(n, k)}, {bits} bits and groups of {group}")
        if codes.numel() and int(codes.max()) >= 1 << bits:
            raise ModelError(f"code {int(codes.max())} does not fit {bits} bits")
        zero = values.zero if isinstance(values, Affine) else None
        if zero is not None and zero.numel() and not zero.is_floating_point() and int(zero.max()) >= 1 << bits:
            raise ModelError(f"zero {int(zero.max())} does not fit {bits} bits")
        if columns is not None and not torch.equal(columns.sort().values.cpu(), torch.arange(k)):
            raise ModelError(f"columns of shape {tuple(columns.shape)} are no permutation of the {k} columns of a weight")
        return cls(layout.pack_tiles(codes, bits, reference.order(learned)), values, bits, group, (n, k), columns)

    @property
    def learned(self) -> Tensor:
        """What tuners move: the scale [n, G] or the table [n, S, 2**bits]."""
        return learned_of(self.values)

    @property
    def zero(self) -> Tensor | None:
        """The zeros of an asymmetric affine weight."""
        return self.values.zero if isinstance(self.values, Affine) else None

    @property
    def float_zeros(self) -> bool:
        """Whether the zeros are floats, as tuning leaves them, which only our own format holds."""
        return self.zero is not None and self.zero.is_floating_point()

    def with_learned(self, learned: Tensor) -> "PackedWeight":
        """The same codes with another scale or table of the same shape."""
        values = Affine(learned, self.zero) if isinstance(self.values, Affine) else Table(learned)
        return replace(self, values=values)

    def codes(self) -> Tensor:
        """uint8 [n, k], in the order in which they are stored."""
        return layout.unpack_tiles(self.words, self.bits, *self.shape, reference.order(self.learned))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [n, k]: an affine product is formed in float32; rounded once to `dtype`."""
        return self.in_order(reference.dequantize(self.words, self.learned, self.zero, self.bits, self.group, *self.shape, dtype))

    def in_order(self, stored: Tensor) -> Tensor:
        """Codes or weights [.., k] in the layer's order of columns, from the stored one."""
        if self.columns is None:
            return stored
        out = torch.empty_like(stored)
        out[..., self.columns] = stored
        return out

    def g_idx(self) -> Tensor:
        """int32 [k]: the group, or segment, of every column of the layer."""
        return self.in_order((torch.arange(self.shape[1], device=self.words.device) // self.group).to(torch.int32))

    def stored_bits(self) -> int:
        """Bits this weight costs on disk: codes, scales or tables and, if asymmetric, zeros."""
        n, k = self.shape
        ordered = 0 if self.columns is None else 32 * k
        return n * k * self.bits + self.learned.numel() * self.learned.element_size() * 8 + self.zero_bits() + ordered

    def zero_bits(self) -> int:
        """Bits the zeros cost on disk: `bits` each, as floats those of their dtype."""
        if self.zero is None:
            return 0
        return self.zero.numel() * (8 * self.zero.element_size() if self.float_zeros else self.bits)

    def nbytes(self) -> int:
        """Bytes in memory, padding of the tiles included."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Flat tensors for safetensors; `from_tensors` with the same bits, group and shape is the inverse."""
        out = {"words": self.words} | ({} if self.columns is None else {"columns": self.columns})
        if isinstance(self.values, Table):
            return out | {"table": self.values.table}
        return out | {"scale": self.values.scale} | ({} if self.values.zero is None else {"zero": self.values.zero})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], bits: int, group: int, shape: tuple[int, int]) -> "PackedWeight":
        values = Table(tensors["table"]) if "table" in tensors else Affine(tensors["scale"], tensors.get("zero"))
        return cls(tensors["words"], values, bits, group, shape, tensors.get("columns"))


def by_groups(g_idx: Tensor, groups: int) -> Tensor | None:
    """The columns of a weight, int64 [k], in the order of their groups g_idx [k]; None where they are in it already.

    ModelError unless `groups` groups of the same size come out.
    """
    k = g_idx.numel()
    if g_idx.dim() != 1 or g_idx.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise ModelError(f"an index of shape {tuple(g_idx.shape)} and {g_idx.dtype}, which is none")
    inside = k > 0 and int(g_idx.min()) >= 0 and int(g_idx.max()) < groups  # first, for counting takes memory for the largest
    if not inside or k % groups or not bool((torch.bincount(g_idx.long(), minlength=groups) == k // groups).all()):
        raise ModelError(f"an index that does not put {k} columns into {groups} groups of {k / groups:g}")
    columns = torch.argsort(g_idx.long(), stable=True)
    return None if torch.equal(columns, torch.arange(k, device=columns.device)) else columns


def learned_of(values: Affine | Table) -> Tensor:
    """The scale or the table."""
    return values.scale if isinstance(values, Affine) else values.table


def zeros_as_floats(scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The zeros of an affine weight [n, G] as tuning starts from them: floats that are left as they are, else float16, float32 where scales are."""
    if zero is not None and zero.is_floating_point():
        return zero
    dtype = torch.float32 if scale.dtype == torch.float32 else torch.float16
    if zero is None:
        return torch.full_like(scale, 1 << (bits - 1), dtype=dtype, requires_grad=False)
    return zero.to(dtype)
