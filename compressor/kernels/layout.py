"""Where each code of a packed weight lies: in memory `tile64x256`, on disk the dense bit stream.

tile64x256: codes [n, k] are padded with zeros to multiples of 64 rows and 256 columns and cut into tiles of 64 x 256, each contiguous:
int32 [n/64, k/256, 64, 8*bits]. Inside one row segment of 256 codes the order is planar, so that one mask of one shifted word yields two
neighbouring codes in the halves of a 32-bit register (the start of a cheap integer-to-float conversion), and so that plane p of every word
meets a contiguous stretch of x:

    4 bits  word j of 32, bits 4p+16h .. +3    hold code 64p + 2j + h            p 0..3, h 0..1
    2 bits  word j of 16, bits 2i+16h .. +1    hold code 32i + 2j + h            i 0..7, h 0..1
    8 bits  word j of 64, byte b                hold code 4j + b
    3 bits  16 words as at 2 bits with the low two bits of each code, then 8 words of high bits:
            word j of 8, bit 4(p+4h)+2c+h'     holds bit 2 of code 32(2p+h') + 2(8c+j) + h     p 0..3, c, h, h' 0..1

Density is exact: 2, 3, 4 and 8 bits cost that many (beyond the padding, which LLM shapes do not need). 8 bits are for folders of others: the plain
versions run them, no kernel does.

That is the order `pair`, which affine weights use. Tables use the order `prmt`, the same with the eight nibbles of every word permuted: nibble
p + 4h moves to 2(p%2) + h + 4(p//2), so that one byte-permute instruction, which looks up the four nibbles of the low half of a register, meets
two neighbouring codes of two planes. At 2 and 3 bits a word masked with 0x33333333 is such a word of nibbles, so the same move serves all widths.

Dense stream (compressed-tensors, GPTQ transposed, MLX): code i of a row occupies bits i*bits .. i*bits+bits-1 of the row, least
significant bit first, in little-endian 32-bit words; the last word is filled with zeros.

All functions work in panels of 256 rows, so that what they need beside input and output stays small, and in cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS, COLS = 64, 256
PANEL = 256  # rows at a time, a multiple of ROWS
BITS = (2, 3, 4)  # that kernels know
STORED = (*BITS, 8)
ORDERS = ("pair", "prmt")
_TO_PRMT = tuple(2 * (p % 2) + h + 4 * (p // 2) for h in range(2) for p in range(4))  # nibble p + 4h of `pair` -> nibble of `prmt`


def tiles(n: int, k: int) -> tuple[int, int]:
    """Number of tiles down and across for a weight of n rows and k columns."""
    return -(-n // ROWS), -(-k // COLS)


def _panels(n: int) -> Iterator[tuple[slice, slice]]:
    """Slices of up to PANEL rows that cover n rows, and of the tiles down that they fill."""
    for start in range(0, n, PANEL):
        stop = min(start + PANEL, n)
        yield slice(start, stop), slice(start // ROWS, -(-stop // ROWS))


def reorder(words: Tensor, source: str, target: str) -> Tensor:
    """The same codes in another order of nibbles; source and target are `pair` or `prmt`."""
    if source == target:
        return words
    out = torch.empty_like(words)
    for i in range(0, words.shape[0], PANEL // ROWS):
        part = words[i : i + PANEL // ROWS]
        moved = torch.zeros_like(part)
        for pair, prmt in enumerate(_TO_PRMT):
            a, b = (pair, prmt) if source == "pair" else (prmt, pair)
            moved = moved | (((part >> (4 * a)) & 15) << (4 * b))
        out[i : i + PANEL // ROWS] = moved
    return out


def pack_tiles(codes: Tensor, bits: int, order: str = "pair") -> Tensor:
    """codes uint8 [n, k], each < 2**bits -> int32 [n/64, k/256, 64, 8*bits] (n, k rounded up)."""
    n, k = codes.shape
    out = torch.empty(*tiles(n, k), ROWS, 8 * bits, dtype=torch.int32, device=codes.device)
    for rows, down in _panels(n):
        out[down] = reorder(_pack_panel(codes[rows], bits), "pair", order)
    return out


def _pack_panel(codes: Tensor, bits: int) -> Tensor:
    n, k = codes.shape
    down, across = tiles(n, k)
    full = codes.new_zeros(down * ROWS, across * COLS)
    full[:n, :k] = codes
    tiled = full.view(down, ROWS, across, COLS).transpose(1, 2)
    if bits == 8:
        return tiled.contiguous().view(torch.int32)
    rows = tiled.to(torch.int32)
    if bits == 4:
        return _planes(rows, 4)
    low = _planes(rows & 3, 2)
    if bits == 2:
        return low
    high = (rows >> 2).view(*rows.shape[:-1], 4, 2, 2, 8, 2)  # [.., p, h', c, j, h]
    words = rows.new_zeros(*rows.shape[:-1], 8)
    for p, h1, c, h in _high_positions():
        words |= high[..., p, h1, c, :, h] << (4 * (p + 4 * h) + 2 * c + h1)
    return torch.cat([low, words], dim=-1)


def unpack_tiles(words: Tensor, bits: int, n: int, k: int, order: str = "pair") -> Tensor:
    """Exact inverse of pack_tiles: int32 words -> codes uint8 [n, k]."""
    out = torch.empty(n, k, dtype=torch.uint8, device=words.device)
    for rows, down in _panels(n):
        out[rows] = _unpack_panel(reorder(words[down], order, "pair"), bits)[: rows.stop - rows.start, :k]
    return out


def _unpack_panel(words: Tensor, bits: int) -> Tensor:
    down, across = words.shape[:2]
    if bits == 8:
        rows = words.contiguous().view(torch.uint8)
    elif bits == 4:
        rows = _unplanes(words, 4)
    else:
        rows = _unplanes(words[..., :16], 2)
        if bits == 3:
            high = words[..., 16:].to(torch.int32)
            bit = torch.empty(*rows.shape[:-1], 4, 2, 2, 8, 2, dtype=torch.uint8, device=words.device)
            for p, h1, c, h in _high_positions():
                bit[..., p, h1, c, :, h] = ((high >> (4 * (p + 4 * h) + 2 * c + h1)) & 1).to(torch.uint8)
            rows = rows | (bit.flatten(-5) << 2)
    return rows.transpose(1, 2).reshape(down * ROWS, across * COLS)


def _high_positions() -> list[tuple[int, int, int, int]]:
    return [(p, h1, c, h) for p in range(4) for h1 in range(2) for c in range(2) for h in range(2)]


def _planes(rows: Tensor, width: int) -> Tensor:
    """int32 [.., 256] of values < 2**width -> int32 [.., 8*width]: plane q of word j, half h is code q*(256/planes) + 2j + h."""
    planes = 16 // width
    parts = rows.view(*rows.shape[:-1], planes, 256 // planes // 2, 2)  # [.., plane, j, h]
    words = rows.new_zeros(*rows.shape[:-1], 8 * width)
    for p in range(planes):
        words |= (parts[..., p, :, 0] << (width * p)) | (parts[..., p, :, 1] << (width * p + 16))
    return words


def _unplanes(words: Tensor, width: int) -> Tensor:
    planes = 16 // width
    mask = (1 << width) - 1
    out = torch.empty(*words.shape[:-1], planes, words.shape[-1], 2, dtype=torch.uint8, device=words.device)
    for p in range(planes):
        out[..., p, :, 0] = ((words >> (width * p)) & mask).to(torch.uint8)
        out[..., p, :, 1] = ((words >> (width * p + 16)) & mask).to(torch.uint8)
    return out.flatten(-3)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [n, k], each < 2**bits -> int32 [n, ceil(k*bits/32)], the dense little-endian bit stream along k."""
    n, k = codes.shape
    out = torch.empty(n, -(-k * bits // 32), dtype=torch.int32, device=codes.device)
    for rows, _ in _panels(n):
        out[rows] = _pack_stream_panel(codes[rows], bits)
    return out


def _pack_stream_panel(codes: Tensor, bits: int) -> Tensor:
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -k % 32)).view(n, -1, 32).to(torch.int64)  # 32 codes fill `bits` words exactly
    words = torch.zeros(n, padded.shape[1], bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= padded[..., i] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= padded[..., i] >> (32 - shift)
    words = words.view(n, -1)[:, : -(-k * bits // 32)]
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_stream(words: Tensor, bits: int, k: int) -> Tensor:
    """Exact inverse of pack_stream: int32 [n, ceil(k*bits/32)] -> codes uint8 [n, k]."""
    out = torch.empty(words.shape[0], k, dtype=torch.uint8, device=words.device)
    for rows, _ in _panels(words.shape[0]):
        out[rows] = _unpack_stream_panel(words[rows], bits)[:, :k]
    return out


def _unpack_stream_panel(words: Tensor, bits: int) -> Tensor:
    n = words.shape[0]
    wide = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, -words.shape[1] % bits)).view(n, -1, bits)
    out = torch.empty(n, wide.shape[1], 32, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = wide[..., word] >> shift
        if shift + bits > 32:
            value = value | (wide[..., word + 1] << (32 - shift))
        out[..., i] = (value & mask).to(torch.uint8)
    return out.view(n, -1)
