"""What the formats of other libraries (gptq.py, awq.py, hqq.py) share: reasons, checks, words of fields, and the form of a weight that reads back.

These formats store every zero, also of symmetric weights, and the group of every column, but not the order of columns inside a group. So a weight
is made plain before it is written: zeros that all are 2**(bits-1) become None, columns of a group ascend. That changes no weight, and what is read
back is the same, tensor by tensor. Scales become float16 where the libraries hold that: callers measure what it costs (`held`).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.packed import Affine, PackedWeight, Table, by_groups

SCALES = (torch.float16, torch.bfloat16, torch.float32)


def affine_reason(packed: Mapping[str, PackedWeight], widths: Iterable[int]) -> str | None:
    """Why a format of integer zeros and `widths` bits cannot hold these weights, or None."""
    if not packed:
        return "no layer is packed"
    tables = sum(isinstance(weight.values, Table) for weight in packed.values())
    if tables:
        return f"{tables} of its {len(packed)} packed layers hold tables, which the format does not know"
    floats = sum(weight.float_zeros for weight in packed.values())
    if floats:
        return f"{floats} of its {len(packed)} packed layers have tuned zeros, and the format's are integers"
    for name, weight in packed.items():
        if weight.bits not in widths:
            return f"{name} has {weight.bits} bits, and the format knows {' and '.join(map(str, widths))}"
    return None


def group_reason(name: str, weight: PackedWeight, sizes: Collection[int]) -> str | None:
    """Why the readers of a format that know groups of `sizes` columns and whole rows refuse this weight, or None."""
    if weight.group in sizes or weight.group == weight.shape[1]:
        return None
    known = ", ".join(map(str, sizes))
    return f"{name} has groups of {weight.group} columns, and the format's readers know groups of {known} and whole rows"


def half_reason(name: str, scale: Tensor) -> str | None:
    """Why float16 cannot hold these scales, or None: rounding may cost digits, never a whole group."""
    half = scale.half()
    if not bool(torch.isfinite(scale).all()):
        return f"the scales of {name} are not finite"
    if not bool(torch.isfinite(half).all()):
        return f"the scales of {name} reach {float(scale.abs().max()):.3g}, beyond the range of float16, in which the format holds them"
    if bool(((half == 0) & (scale != 0)).any()):
        return f"scales of {name} are so small that float16, in which the format holds them, makes them 0"
    return None


def plain(weight: PackedWeight) -> PackedWeight:
    """The same affine weight as it is read back: zeros None if all are 2**(bits-1), columns ascending in their group."""
    zero = symmetric(weight.zero, weight.bits)
    if zero is not weight.zero:
        weight = replace(weight, values=Affine(weight.learned, zero))
    if weight.columns is None:
        return weight
    columns = by_groups(weight.g_idx(), weight.learned.shape[1])
    if columns is not None and torch.equal(columns, weight.columns):
        return weight
    codes = weight.in_order(weight.codes())
    return PackedWeight.pack(codes if columns is None else codes[:, columns], weight.values, weight.bits, weight.group, columns)


def symmetric(zero: Tensor | None, bits: int) -> Tensor | None:
    """None for integer zeros that all are the midpoint, else `zero`."""
    middle = zero is not None and not zero.is_floating_point() and bool((zero == 1 << (bits - 1)).all())
    return None if middle else zero


def with_half_scales(weight: PackedWeight) -> PackedWeight:
    """The weight with its scales rounded to float16."""
    return weight if weight.learned.dtype == torch.float16 else weight.with_learned(weight.learned.half())


def zeros_of(weight: PackedWeight) -> Tensor:
    """Every zero, uint8 [n, G]; ModelError for tables and for zeros that are floats."""
    if isinstance(weight.values, Table) or weight.float_zeros:
        raise ModelError("a format of integer zeros holds neither tables nor tuned zeros")
    return torch.full_like(weight.learned, 1 << (weight.bits - 1), dtype=torch.uint8) if weight.zero is None else weight.zero


def parts_of(parts: Mapping[str, Tensor], names: Iterable[str], where: str) -> list[Tensor]:
    """The tensors of these names; ModelError if one is missing."""
    absent = [name for name in names if name not in parts]
    if absent:
        raise ModelError(f"{where} is incomplete: {' and '.join(absent)} missing")
    return [parts[name] for name in names]


def check_words(tensor: Tensor, name: str, where: str) -> None:
    """ModelError unless the tensor is int32 [a, b]."""
    if tensor.dtype != torch.int32 or tensor.dim() != 2:
        raise ModelError(f"{where} is damaged: {name} is {described(tensor)}, and must be int32 in two dimensions")


def check_scales(tensor: Tensor, name: str, where: str) -> None:
    """ModelError unless the tensor is a finite matrix of floats."""
    if tensor.dtype not in SCALES or tensor.dim() != 2 or not tensor.numel():
        raise ModelError(f"{where} is damaged: {name} is {described(tensor)}, and must be floats of 16 or 32 bits in two dimensions")
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"{where} is damaged: {name} holds numbers that are not finite")


def check_groups(k: int, groups: int, sizes: Iterable[int], where: str) -> None:
    """ModelError if a row of k columns in `groups` groups is, by the group sizes that the configuration names, one whose last group is shorter."""
    named = set(sizes)
    size = next((size for size in sorted(named) if size > 0 and -(-k // size) == groups), None)
    if groups > 1 and size is not None and k not in {groups * each for each in named}:
        raise ModelError(f"{where} has {k} inputs in groups of {size}, the last of them shorter, which compressor does not support")


def described(tensor: Tensor) -> str:
    """Its dtype and shape, for errors."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def unpack_fields(words: Tensor, bits: int) -> Tensor:
    """int32 [n, m] -> uint8 [n, m * (32 // bits)]: whole fields from the low end of every word; the bits that are left over say nothing."""
    shifts = torch.arange(0, 32 - bits + 1, bits, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)


def pack_fields(codes: Tensor, bits: int) -> Tensor:
    """Inverse of unpack_fields: uint8 [n, m * (32 // bits)] -> int32 [n, m]."""
    shifts = torch.arange(0, 32 - bits + 1, bits, device=codes.device)
    words = (codes.view(len(codes), -1, len(shifts)).to(torch.int64) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
