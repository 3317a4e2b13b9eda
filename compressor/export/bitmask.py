"""One linear as a mask of bits and the values that survive: how the `sparse` folder (sparse.py) stores what pruning left.

A bit of the mask stands for a *block* of 1, 2, 4, 8 or 16 consecutive inputs of a row; the blocks whose bit is set are stored whole, row by row,
everything else is exactly zero when read: 0.0 in a dense weight, the zero's own code in a quantised one. Values are floats, or codes in one dense
stream of 2, 3 or 4 bits across rows. A block may hold zeros of its own, so each layer takes the size that is smallest: 4 for masks of 4-blocks, 1 for
most others, more also where few codes of few bits are left. Block 0 means no mask: every weight is stored, the least for what is hardly sparse.

The zeros of affine weights are codes, or floats as tuning leaves them; with those a weight is hardly ever exactly zero, so there is no mask.

Price: 1 bit a weight for the mask, or 1/block; the entropy of a random mask is less (0.47 bits at 90 %, 0.19 at 97 %), and no coder takes that here,
so that readers stay simple. Limits: the saving is on disk and on the wire; in memory a dense weight is dense again, a packed one packed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import ModelError, RecipeError
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight, Table

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ZEROS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}  # that zeros may be stored in as floats
BLOCKS = (1, 2, 4, 8, 16)
SHAPE_BYTES = 16  # weight_shape, two int64
DENSE = ("weight_shape", "weight_mask", "weight_values")
AFFINE = ("weight_shape", "weight_mask", "weight_codes", "weight_scale", "weight_zero_point", "weight_zero")
PARTS = (*DENSE, *AFFINE[2:])
LINE = 4096  # codes that are packed as one row of layout's streams: whole words, so that rows join without gaps


@dataclass(frozen=True, order=True)
class Scheme:
    """How one linear is stored: `bits` 0 means dense values, and then the rest says nothing; `block` 0 means no mask.

    zeros: the dtype of zeros that are floats, for example "float16", with block 0 and not symmetric; "" where they are codes, or none.
    """

    block: int
    bits: int = 0
    group: int = 0
    symmetric: bool = True
    zeros: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that must be there."""
        absent = {"weight_mask" if not self.block else "", "" if self.zeros else "weight_zero"}
        absent.add("weight_zero_point" if self.symmetric or self.zeros else "")
        return tuple(part for part in (AFFINE if self.bits else DENSE) if part not in absent)


def pack_bits(flags: Tensor) -> Tensor:
    """bool [m] -> uint8 [ceil(m/8)]: flag i is bit i mod 8 of byte i div 8; the last byte is filled with zeros."""
    octets = torch.nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
    return (octets << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(1, dtype=torch.uint8)


def unpack_bits(octets: Tensor, count: int) -> Tensor:
    """Inverse of pack_bits: the first `count` flags, bool."""
    flags = (octets.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=octets.device)) & 1
    return flags.flatten()[:count].bool()


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [m], each < 2**bits -> uint8 [ceil(m*bits/8)]: code i occupies bits i*bits .. i*bits+bits-1, least significant first."""
    lines = torch.nn.functional.pad(codes, (0, -len(codes) % LINE)).view(-1, LINE)
    return layout.pack_stream(lines, bits).flatten().view(torch.uint8)[: -(-len(codes) * bits // 8)].clone()


def unpack_codes(octets: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of pack_codes: the first `count` codes, uint8."""
    line = LINE * bits // 8
    words = torch.nn.functional.pad(octets, (0, -len(octets) % line)).view(torch.int32).view(-1, line // 4)
    return layout.unpack_stream(words, bits, LINE).flatten()[:count]


def nonzero(value: Tensor | PackedWeight) -> Tensor:
    """Which weights are not exactly zero, bool [n, k]; ModelError for a table, which has no zero of its own."""
    return value != 0 if isinstance(value, Tensor) else value.codes() != _zeros(_affine(value), value.bits, value.shape)


def _affine(value: PackedWeight) -> Affine:
    if isinstance(value.values, Table):
        raise ModelError("a sketch has no entry that is exactly zero, so its weights cannot be stored as sparse ones")
    return value.values


def _zeros(values: Affine, bits: int, shape: tuple[int, int]) -> Tensor:
    """The code of zero for every weight, uint8 [n, k]."""
    n, k = shape
    if values.zero is None:
        return torch.full((1, 1), 1 << (bits - 1), dtype=torch.uint8, device=values.scale.device).expand(n, k)
    return values.zero.unsqueeze(-1).expand(n, values.zero.shape[1], k // values.zero.shape[1]).reshape(n, k)


def _blocked(kept: Tensor, block: int) -> Tensor:
    """bool [n, k] -> which blocks hold anything, bool [n * k/block]."""
    return kept.flatten() if block == 1 else kept.reshape(-1, block).any(1)


def choices(shape: tuple[int, int]) -> tuple[int, ...]:
    """The blocks that fit a weight: those that divide its rows, so that no block lies across two."""
    return tuple(block for block in BLOCKS if shape[1] % block == 0)


def size(shape: tuple[int, int], kept: int, block: int, width: int, values: int = 0) -> int:
    """Bytes of a linear: its shape, the mask, `kept` stored weights of `width` bits (all for block 0), `values` bytes of scales and zeros."""
    n, k = shape
    mask = -(-n * (k // block) // 8) if block else 0
    return SHAPE_BYTES + mask + -(-(kept if block else n * k) * width // 8) + values


def values_size(weight: PackedWeight) -> int:
    """Bytes of its scales and zeros."""
    return weight.learned.numel() * weight.learned.element_size() + -(-weight.zero_bits() // 8)


def best(value: Tensor | PackedWeight) -> tuple[int, int]:
    """(block, bytes) of the smallest form; a dense weight that a mask does not shrink, or that holds what is not finite, has block 0: as it is."""
    shape = (value.shape[0], value.shape[1])
    if isinstance(value, PackedWeight):
        width, values, masked = value.bits, values_size(value), not value.float_zeros
        plain = size(shape, 0, 0, width, values)
    else:
        width, values, masked = 8 * value.element_size(), 0, value.dtype in DTYPES and bool(torch.isfinite(value).all())
        plain = value.numel() * value.element_size()
    forms = [(plain, 0)]
    if masked:
        kept = nonzero(value)
        forms += [(size(shape, block * int(_blocked(kept, block).sum()), block, width, values), block) for block in choices(shape)]
    least, block = min(forms)
    return block, least


def stored_bits(value: Tensor | PackedWeight) -> int:
    """Bits that a sparse folder takes for one linear's weight: shape, mask, values or codes, scales and zeros; no more than it takes plain."""
    return 8 * best(value)[1]


def encode(value: Tensor | PackedWeight) -> tuple[dict[str, Tensor], Scheme] | None:
    """The smallest form of a linear's weight [n, k], in CPU memory; None for a dense weight that is stored as it is."""
    block = best(value)[0]
    shape = torch.tensor(value.shape, dtype=torch.int64)
    blocks = _blocked(nonzero(value), block) if block else None
    mask = {} if blocks is None else {"weight_mask": pack_bits(blocks)}
    if isinstance(value, Tensor):
        if blocks is None:
            return None
        kept = value.detach().reshape(-1, block)[blocks]  # [blocks kept, block]
        parts, scheme = {"weight_values": torch.where(kept == 0, 0, kept).flatten()}, Scheme(block)  # never -0.0
    else:
        codes = value.codes().flatten() if blocks is None else value.codes().view(-1, block)[blocks].flatten()
        parts = {"weight_codes": pack_codes(codes, value.bits), "weight_scale": value.learned.detach().contiguous()}
        if value.zero is not None and value.float_zeros:
            parts["weight_zero"] = value.zero.detach().contiguous()
        elif value.zero is not None:
            parts["weight_zero_point"] = pack_codes(value.zero.flatten(), value.bits)
        zeros = _plain(value.zero.dtype) if value.zero is not None and value.float_zeros else ""
        scheme = Scheme(block, value.bits, value.group, value.zero is None, zeros)
    return {part: tensor.cpu() for part, tensor in ({"weight_shape": shape} | mask | parts).items()}, scheme


def check(parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], where: str) -> None:
    """ModelError unless the tensors have the dtypes and shapes of a weight [n, k], as far as that is known without their values."""
    _check_parts(parts, scheme, where)
    n, k = shape
    if (scheme.block and k % scheme.block) or (scheme.bits and k % scheme.group):
        raise ModelError(f"{where} is damaged: blocks of {scheme.block} and groups of {scheme.group} columns do not fit a weight of shape {shape}")
    lengths: dict[str, tuple[int, ...]] = {"weight_shape": (2,)}
    if scheme.block:
        lengths["weight_mask"] = (-(-n * (k // scheme.block) // 8),)
    elif scheme.bits:
        lengths["weight_codes"] = (-(-n * k * scheme.bits // 8),)
    if scheme.bits:
        lengths["weight_scale"] = (n, k // scheme.group)
    if scheme.zeros:
        lengths["weight_zero"] = (n, k // scheme.group)
    elif not scheme.symmetric:
        lengths["weight_zero_point"] = (-(-n * (k // scheme.group) * scheme.bits // 8),)
    for part, wanted in lengths.items():
        if tuple(parts[part].shape) != wanted:
            found = tuple(parts[part].shape)
            raise ModelError(f"{where} is damaged: {part} of shape {found} does not fit a weight of shape {shape}, which wants {wanted}")
    most, one = (-(-n * k * scheme.bits // 8), "weight_codes") if scheme.bits else (n * k, "weight_values")
    if parts[one].dim() != 1 or len(parts[one]) > most:
        raise ModelError(f"{where} is damaged: {one} of shape {tuple(parts[one].shape)} is no stream for a weight of shape {shape}")


def _check_parts(parts: Mapping[str, Tensor], scheme: Scheme, where: str) -> None:
    absent, foreign = [part for part in scheme.parts if part not in parts], sorted(set(parts) - set(scheme.parts))
    if absent or foreign:
        why = f"{' and '.join(absent)} missing" if absent else f"config.json says nothing of its {foreign[0]}"
        raise ModelError(f"{where} is {'incomplete' if absent else 'damaged'}: {why}")
    for part in scheme.parts:
        kinds = {"weight_shape": (torch.int64,), "weight_values": DTYPES, "weight_scale": DTYPES}
        wanted = (ZEROS[scheme.zeros],) if part == "weight_zero" else kinds.get(part, (torch.uint8,))
        if parts[part].dtype not in wanted:
            raise ModelError(f"{where} is damaged: {part} is {_plain(parts[part].dtype)}, and must be {' or '.join(map(_plain, wanted))}")


def decode(parts: Mapping[str, Tensor], scheme: Scheme, where: str) -> Tensor | PackedWeight:
    """The weight of one module's tensors, on their device: dense [n, k] in its stored dtype, or packed. ModelError if anything is damaged."""
    stored = parts.get("weight_shape")
    if stored is None or stored.dtype != torch.int64 or tuple(stored.shape) != (2,) or int(stored.min()) < 1:
        raise ModelError(f"{where} is damaged: weight_shape must hold two positive int64 numbers")
    n, k = int(stored[0]), int(stored[1])
    check(parts, scheme, (n, k), where)
    for part in ("weight_values", "weight_scale", "weight_zero"):
        if part in parts and not bool(torch.isfinite(parts[part]).all()):
            raise ModelError(f"{where} is damaged: {part} holds numbers that are not finite")
    blocks = _read_mask(parts["weight_mask"], n * k // scheme.block, where) if scheme.block else None
    count = n * k if blocks is None else int(blocks.sum()) * scheme.block
    if not scheme.bits:
        assert blocks is not None  # schemes_of refuses dense values without a mask
        values = parts["weight_values"]
        if len(values) != count:
            raise ModelError(f"{where} is damaged: its mask keeps {count} weights, and {len(values)} are stored")
        return _spread(torch.zeros(n, k, dtype=values.dtype, device=values.device), values, blocks)
    codes, scale = _read_codes(parts["weight_codes"], scheme.bits, count, where), parts["weight_scale"]
    zero = parts.get("weight_zero")
    if zero is None and not scheme.symmetric:
        zero = _read_codes(parts["weight_zero_point"], scheme.bits, scale.numel(), where).view(scale.shape)
    whole = codes.view(n, k) if blocks is None else _spread(_zeros(Affine(scale, zero), scheme.bits, (n, k)).clone(), codes, blocks)
    return PackedWeight.pack(whole, Affine(scale, zero), scheme.bits)


def _spread(out: Tensor, values: Tensor, blocks: Tensor) -> Tensor:
    """out [n, k], in place, with `values` in the blocks whose flag is set."""
    size = out.numel() // len(blocks)
    out.view(-1, size)[blocks] = values.view(-1, size)
    return out


def _read_mask(octets: Tensor, count: int, where: str) -> Tensor:
    flags = unpack_bits(octets, len(octets) * 8)
    if bool(flags[count:].any()):
        raise ModelError(f"{where} is damaged: weight_mask has bits beyond its {count} blocks")
    return flags[:count]


def _read_codes(octets: Tensor, bits: int, count: int, where: str) -> Tensor:
    if len(octets) != -(-count * bits // 8):
        raise ModelError(f"{where} is damaged: {len(octets)} bytes are no stream of {count} codes of {bits} bits, which its mask or groups ask for")
    spare = len(octets) * 8 - count * bits
    if spare and int(octets[-1]) >> (8 - spare):
        raise ModelError(f"{where} is damaged: its stream has bits beyond the last of {count} codes of {bits} bits")
    return unpack_codes(octets, bits, count)


def estimate_bytes(
    n: int, k: int, sparsity: float, pattern: str, bits: int | None = None, group: int = -1, scale_bytes: int = 2, value_bytes: int = 2,
    symmetric: bool = True,
) -> int:  # fmt: skip
    """Bytes that a sparse folder takes for a linear of n x k whose `sparsity` (a share) is zero in a `pattern`, for dry runs.

    pattern: "unstructured", "<Q>block", such as 4block, or "<N>:<M>", which keeps N of M weights whatever `sparsity` says. `bits` None: dense values
    of `value_bytes` each. Exact for what pruning keeps of dense weights, and a bound from above for quantised ones, of which rounding makes more
    zeros; masks with larger blocks than the pattern's are taken as independent draws would fill them.
    """
    if not 0 <= sparsity <= 1:
        raise RecipeError(f"sparsity={sparsity} is a share of the weights, from 0 to 1")
    scales = n * (1 if group == -1 else -(-k // group))
    values = scales * scale_bytes + (0 if symmetric else -(-scales * bits // 8)) if bits else 0
    width = bits or 8 * value_bytes
    plain = size((n, k), 0, 0, width, values) - (0 if bits else SHAPE_BYTES)
    shares = {block: _filled(block, k, sparsity, pattern) for block in choices((n, k))}  # of its blocks that hold anything
    masked = [size((n, k), block * round(n * k // block * share), block, width, values) for block, share in shares.items()]
    return min([plain, *masked])


def _filled(block: int, k: int, sparsity: float, pattern: str) -> float:
    """The expected share of blocks that hold anything."""
    if found := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern):
        keep, of = int(found[1]), int(found[2])
        if keep <= of and k % of == 0:
            return 1 - math.comb(max(of - block, 0), keep) / math.comb(of, keep)
    if found := re.fullmatch(r"unstructured|([1-9]\d*)block", pattern):
        unit = int(found[1] or 1)
        if k % unit == 0:  # blocks that straddle units are taken as full
            return 1.0 if block % unit and unit % block else 1 - sparsity ** max(1, block / unit)
    raise RecipeError(f"pattern {pattern!r} does not fit {k} in features; choose unstructured, 4block or 2:4, or sizes that divide them")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
