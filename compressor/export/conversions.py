"""The same weight in other terms, for formats that know only some: wider codes, and tables in the place of scales.

    widened   codes of b bits in fields of B > b: a symmetric weight moves with its midpoint, q + 2**(B-1) - 2**(b-1); an asymmetric one keeps codes
              and zeros. Exact. Price: B - b bits a weight, for kernels that know no narrower ones.
    positive  no negative scales: such a group is mirrored. Exact.
    tables    the 2**bits values of every group, written out: s (c - z) for c = 0 .. 2**bits - 1, rounded to the dtype of s. Price: 2**bits values
              a group where one scale was.

Source: ours.
"""

import torch

from compressor.errors import ModelError
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight, Table


def widened(weight: PackedWeight, bits: int) -> PackedWeight:
    """The weight in codes of `bits` bits, the same to the last bit; ModelError if these are fewer than it has, or for tables."""
    if bits == weight.bits:
        return weight
    if bits < weight.bits or bits not in layout.STORED or not isinstance(weight.values, Affine):
        held = "a table" if isinstance(weight.values, Table) else f"codes of {weight.bits} bits"
        raise ModelError(f"{held} cannot be written in fields of {bits} bits")
    codes = weight.codes()
    if weight.zero is None:
        codes = codes + ((1 << bits - 1) - (1 << weight.bits - 1))
    return PackedWeight.pack(codes, weight.values, bits, weight.group, weight.columns)


def as_tables(weight: PackedWeight, dtype: torch.dtype | None = None) -> PackedWeight:
    """A table for every group, in `dtype` or that of the scales, with the same codes; a table as it is. ModelError for what tables cannot be."""
    if isinstance(weight.values, Table):
        return weight
    if weight.columns is not None or weight.bits not in layout.BITS:
        raise ModelError("tables are for weights of 2, 3 and 4 bits whose columns are in order")
    scale, zero = weight.values.scale, weight.values.zero
    middle = torch.full_like(scale, 1 << weight.bits - 1, dtype=torch.float32) if zero is None else zero.float()
    steps = torch.arange(1 << weight.bits, device=scale.device) - middle.unsqueeze(-1)  # [n, G, 2**bits]
    table = (scale.float().unsqueeze(-1) * steps).to(dtype or scale.dtype)
    return PackedWeight.pack(weight.codes(), Table(table), weight.bits, weight.group)


def positive(weight: PackedWeight) -> PackedWeight:
    """The same weight, number for number, without negative scales: -s ((M - q) - (M - z)) = s (q - z), M = 2**bits - 1.

    Other formats' folders have them where a zero of 0 could not be said (export/gptq.py). Float zeros are left alone, as M - z would round them; so
    are tables and positive scales.
    """
    if not isinstance(weight.values, Affine) or weight.float_zeros or not bool((weight.learned < 0).any()):
        return weight
    scale, zero, top = weight.values.scale, weight.values.zero, (1 << weight.bits) - 1
    if zero is None:
        zero = torch.full_like(scale, 1 << weight.bits - 1, dtype=torch.uint8)
    mirrored = scale < 0  # bool [n, G]
    codes = weight.codes().view(*scale.shape, weight.group)
    codes = torch.where(mirrored.unsqueeze(-1), top - codes, codes).view(weight.shape)
    values = Affine(scale.abs(), torch.where(mirrored, top - zero, zero))
    return PackedWeight.pack(codes, values, weight.bits, weight.group, weight.columns)
