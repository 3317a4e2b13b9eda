"""The block types of GGUF: what their numbers mean, and where each of them lies in the bytes.

A block holds `block` columns of a row in sub-blocks of `sub` columns, and every type here is one formula:

    weight = d * scale * (code - offset) - dmin * minimum

d and dmin are float16, one a block; scale and minimum are small integers, one a sub-block (the K types), or 1 (the others). Q4_1 stores m = -dmin.

Bytes as in ggml's ggml-common.h, checked bit for bit against `gguf.quants.dequantize`. Limits: little-endian machines; none of the types with
fixed tables (IQ…), of which no packed weight of ours is a member.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """One type; `top` is the largest code, `limit` the largest scale and minimum, `minimum` whether it has minima."""

    name: str
    block: int
    size: int  # bytes of a block
    sub: int
    offset: int
    top: int
    limit: int = 1
    minimum: bool = False

    @property
    def lowest(self) -> int:
        """The least scale: Q3_K's have a sign."""
        return -32 if self.name == "q3_k" else 0


KINDS = {
    kind.name: kind
    for kind in (
        Kind("q8_0", 32, 34, 32, 128, 255),
        Kind("q5_0", 32, 22, 32, 16, 31),
        Kind("q4_0", 32, 18, 32, 8, 15),
        Kind("q4_1", 32, 20, 32, 0, 15, minimum=True),
        Kind("q4_k", 256, 144, 32, 0, 15, 63, minimum=True),
        Kind("q3_k", 256, 110, 16, 4, 7, 31),
        Kind("q2_k", 256, 84, 16, 0, 3, 15, minimum=True),
    )
}


@dataclass(frozen=True)
class Grid:
    """Blocks taken apart: rows n, blocks B a row, sub-blocks J a block."""

    offset: int
    codes: Tensor  # uint8 [n, B, J, sub]
    d: Tensor  # float16 [n, B]
    scale: Tensor  # int16 [n, B, J]
    dmin: Tensor | None = None  # float16 [n, B]
    least: Tensor | None = None  # int16 [n, B, J], the minima

    def steps(self) -> Tensor:
        """d * scale, float32 [n, B, J]."""
        return self.d.float().unsqueeze(-1) * self.scale.float()

    def lows(self) -> Tensor | None:
        """dmin * minimum, float32 [n, B, J]; None for a type without."""
        if self.dmin is None or self.least is None:
            return None
        return self.dmin.float().unsqueeze(-1) * self.least.float()

    def values(self) -> Tensor:
        """What readers compute with, float32 [n, k], formed in their order."""
        out, lows = self.steps().unsqueeze(-1) * (self.codes.float() - self.offset), self.lows()
        return (out if lows is None else out - lows.unsqueeze(-1)).flatten(1)


def to_bytes(grid: Grid, kind: Kind) -> Tensor:
    """uint8 [n, B * size]."""
    codes = grid.codes.flatten(2)  # [n, B, block]
    d = _halves(grid.d)
    if kind.name == "q8_0":
        parts = [d, codes ^ 128]  # two's complement of code - 128
    elif kind.name == "q5_0":
        parts = [d, _bits(codes >> 4, 1, 8).flatten(2), _nibbles(codes & 15, 1)]
    elif kind.name == "q4_0":
        parts = [d, _nibbles(codes, 1)]
    elif kind.name == "q4_1" and grid.dmin is not None:
        parts = [d, _halves(-grid.dmin), _nibbles(codes, 1)]
    elif kind.name == "q3_k":
        high = (codes >> 2).view(*codes.shape[:2], 8, 32)
        parts = [_joined(high, 1), _quarters(codes & 3), _scales3(grid.scale + 32), d]
    else:
        assert grid.dmin is not None and grid.least is not None
        lows = _halves(grid.dmin)
        if kind.name == "q2_k":
            parts = [(grid.scale | grid.least << 4).to(torch.uint8), _quarters(codes), d, lows]
        else:
            parts = [d, lows, _scales4(grid.scale, grid.least), _nibbles(codes, 4)]
    return torch.cat(parts, -1).flatten(1)


def from_bytes(data: Tensor, kind: Kind) -> Grid:
    """The inverse of to_bytes: data uint8 [n, B * size]."""
    blocks = data.view(data.shape[0], -1, kind.size)

    def take(start: int, count: int) -> Tensor:
        return blocks[..., start : start + count]

    def half(start: int) -> Tensor:
        return take(start, 2).contiguous().view(torch.float16).squeeze(-1)

    ones = torch.ones(*blocks.shape[:2], 1, dtype=torch.int16)
    if kind.name == "q8_0":
        return Grid(128, (take(2, 32) ^ 128).unsqueeze(2), half(0), ones)
    if kind.name == "q5_0":
        high = _parted(take(2, 4).unsqueeze(-1), 1).transpose(-1, -2).reshape(*blocks.shape[:2], 32)
        return Grid(16, (_from_nibbles(take(6, 16), 1) | high << 4).unsqueeze(2), half(0), ones)
    if kind.name == "q4_0":
        return Grid(8, _from_nibbles(take(2, 16), 1).unsqueeze(2), half(0), ones)
    if kind.name == "q4_1":
        return Grid(0, _from_nibbles(take(4, 16), 1).unsqueeze(2), half(0), ones, -half(2), ones)
    if kind.name == "q3_k":
        codes = _from_quarters(take(32, 64)) | _parted(take(0, 32), 1).flatten(2) << 2
        return Grid(4, codes.unflatten(2, (16, 16)), half(108), _from_scales3(take(96, 12)) - 32)
    if kind.name == "q2_k":
        scale, least = (take(0, 16) & 15).to(torch.int16), (take(0, 16) >> 4).to(torch.int16)
        return Grid(0, _from_quarters(take(16, 64)).unflatten(2, (16, 16)), half(80), scale, half(82), least)
    scale, least = _from_scales4(take(4, 12))
    return Grid(0, _from_nibbles(take(16, 128), 4).unflatten(2, (8, 32)), half(0), scale, half(2), least)


def _halves(x: Tensor) -> Tensor:
    """float16 [n, B] -> its bytes [n, B, 2]."""
    return x.contiguous().view(torch.uint8).view(*x.shape, 2)


def _joined(planes: Tensor, width: int) -> Tensor:
    """uint8 [.., P, m] of values below 2**width -> bytes [.., m], plane p at bit p * width."""
    out = torch.zeros_like(planes[..., 0, :])
    for p in range(planes.shape[-2]):
        out |= planes[..., p, :] << p * width
    return out


def _parted(data: Tensor, width: int) -> Tensor:
    """The inverse of _joined: bytes [.., m] -> [.., 8 / width, m]."""
    return torch.stack([data >> p * width & (1 << width) - 1 for p in range(8 // width)], -2)


def _bits(bits: Tensor, width: int, count: int) -> Tensor:
    """Bits [.., 32] -> bytes [.., 4, 1], eight neighbours a byte."""
    return _joined(bits.unflatten(-1, (-1, count)).unsqueeze(-1), width)


def _nibbles(codes: Tensor, parts: int) -> Tensor:
    """Codes [n, B, block] -> bytes [n, B, block / 2]: of each of `parts` parts the first half in the low nibbles, the second in the high ones."""
    return _joined(codes.unflatten(2, (parts, 2, -1)), 4).flatten(2)


def _from_nibbles(data: Tensor, parts: int) -> Tensor:
    return _parted(data.unflatten(2, (parts, -1)), 4).flatten(2)


def _quarters(codes: Tensor) -> Tensor:
    """Codes below 4 [n, B, 256] -> bytes [n, B, 64]: of each half, column j of quarter p lies at bits 2p, 2p + 1 of byte j."""
    return _joined(codes.unflatten(2, (2, 4, 32)), 2).flatten(2)


def _from_quarters(data: Tensor) -> Tensor:
    return _parted(data.unflatten(2, (2, 32)), 2).flatten(2)


def _scales4(scale: Tensor, least: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits, int16 [n, B, 8] each -> 12 bytes: the upper four give their high bits to the lower four's bytes."""
    upper = scale[..., 4:] & 15 | (least[..., 4:] & 15) << 4
    lower = [x[..., :4] | x[..., 4:] >> 4 << 6 for x in (scale, least)]
    return torch.cat([*lower, upper], -1).to(torch.uint8)


def _from_scales4(data: Tensor) -> tuple[Tensor, Tensor]:
    first, second, upper = data.to(torch.int16).split(4, -1)
    scale = torch.cat([first & 63, upper & 15 | first >> 6 << 4], -1)
    return scale, torch.cat([second & 63, upper >> 4 | second >> 6 << 4], -1)


def _scales3(scale: Tensor) -> Tensor:
    """Sixteen numbers of 6 bits, int16 [n, B, 16] -> 12 bytes: low nibbles of the halves in eight, then high pairs of the quarters in four."""
    low = _joined((scale & 15).to(torch.uint8).unflatten(2, (2, 8)), 4)
    return torch.cat([low, _joined((scale >> 4).to(torch.uint8).unflatten(2, (4, 4)), 2)], -1)


def _from_scales3(data: Tensor) -> Tensor:
    low, high = _parted(data[..., :8], 4).flatten(2), _parted(data[..., 8:], 2).flatten(2)
    return (low | high << 4).to(torch.int16)
