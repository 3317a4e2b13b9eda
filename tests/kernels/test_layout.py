"""The two bit layouts against references written bit by bit from the formulas of the docstring."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.kernels import layout

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
shapes = st.tuples(st.integers(1, 70), st.integers(1, 300))
widths = st.sampled_from(layout.STORED)
quick = settings(max_examples=25, deadline=None)


def random_codes(n: int, k: int, bits: int, seed: int) -> Tensor:
    return torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def place(code: int, bits: int) -> list[tuple[int, int, int]]:
    """(word, bit, which bit of the code) of the code at column `code` of a 256-code row segment."""
    if bits == 8:
        return [(code // 4, 8 * (code % 4) + b, b) for b in range(8)]
    if bits == 4:
        p, rest = divmod(code, 64)
        j, h = divmod(rest, 2)
        return [(j, 4 * p + 16 * h + b, b) for b in range(4)]
    i, rest = divmod(code, 32)
    j, h = divmod(rest, 2)
    low = [(j, 2 * i + 16 * h + b, b) for b in range(2)]
    if bits == 2:
        return low
    p, h1 = divmod(i, 2)
    c, j1 = divmod(j, 8)
    return [*low, (16 + j1, 4 * (p + 4 * h) + 2 * c + h1, 2)]


def moved(bit: int, order: str) -> int:
    """In the order `prmt` nibble p + 4h of a word lies at 2(p%2) + h + 4(p//2)."""
    nibble, rest = divmod(bit, 4)
    h, p = divmod(nibble, 4)
    return 4 * (2 * (p % 2) + h + 4 * (p // 2)) + rest if order == "prmt" else bit


def pack_segment(codes: list[int], bits: int, order: str) -> list[int]:
    words = [0] * (8 * bits)
    for column, code in enumerate(codes):
        for word, bit, b in place(column, bits):
            words[word] |= (code >> b & 1) << moved(bit, order)
    return [signed(w) for w in words]


@pytest.mark.parametrize("bits", layout.STORED)
def test_every_bit_of_a_segment_is_used_once(bits: int) -> None:
    places = [(word, bit) for column in range(256) for word, bit, _ in place(column, bits)]
    assert sorted(places) == [(word, bit) for word in range(8 * bits) for bit in range(32)]


@quick
@given(shapes, widths, st.sampled_from(layout.ORDERS), st.integers(0, 1 << 20))
def test_tiles_match_the_formulas(shape: tuple[int, int], bits: int, order: str, seed: int) -> None:
    n, k = shape
    codes = random_codes(n, k, bits, seed)
    words = layout.pack_tiles(codes, bits, order)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert tuple(words.shape) == (*layout.tiles(n, k), 64, 8 * bits)
    for row in sorted({0, n // 2, n - 1}):
        for block in range(words.shape[1]):
            segment = codes[row, 256 * block : 256 * (block + 1)].tolist()
            segment += [0] * (256 - len(segment))
            assert words[row // 64, block, row % 64].tolist() == pack_segment(segment, bits, order)


@quick
@given(shapes, widths, st.integers(0, 1 << 20))
def test_orders_turn_into_each_other(shape: tuple[int, int], bits: int, seed: int) -> None:
    codes = random_codes(*shape, bits, seed)
    pair, prmt = (layout.pack_tiles(codes, bits, order) for order in layout.ORDERS)
    assert torch.equal(layout.reorder(pair, "pair", "prmt"), prmt) and torch.equal(layout.reorder(prmt, "prmt", "pair"), pair)
    assert torch.equal(layout.unpack_tiles(prmt, bits, *shape, "prmt"), codes)


@quick
@given(shapes, widths, st.integers(0, 1 << 20))
def test_tiles_return_the_codes(shape: tuple[int, int], bits: int, seed: int) -> None:
    codes = random_codes(*shape, bits, seed)
    assert torch.equal(layout.unpack_tiles(layout.pack_tiles(codes, bits), bits, *shape), codes)


@quick
@given(widths, st.integers(0, 1 << 20))
def test_any_words_are_legal_tiles(bits: int, seed: int) -> None:
    """Packing is a bijection on whole tiles: any bits unpack to codes that pack to the same bits."""
    words = torch.randint(-(1 << 31), 1 << 31, (1, 2, 64, 8 * bits), generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    assert torch.equal(layout.pack_tiles(layout.unpack_tiles(words, bits, 64, 512), bits), words)


def test_padding_is_zero() -> None:
    words = layout.pack_tiles(torch.full((65, 257), 3, dtype=torch.uint8), 2)
    assert words.shape == (2, 2, 64, 16)
    assert int(layout.unpack_tiles(words, 2, 128, 512).sum()) == 3 * 65 * 257


@quick
@given(shapes, widths, st.integers(0, 1 << 20))
def test_stream_matches_the_formula(shape: tuple[int, int], bits: int, seed: int) -> None:
    n, k = shape
    codes = random_codes(n, k, bits, seed)
    words = layout.pack_stream(codes, bits)
    assert words.dtype == torch.int32 and tuple(words.shape) == (n, -(-k * bits // 32))
    for row in sorted({0, n - 1}):
        number = sum(code << (i * bits) for i, code in enumerate(codes[row].tolist()))  # the row as one long integer
        assert words[row].tolist() == [signed(number >> (32 * w) & 0xFFFFFFFF) for w in range(words.shape[1])]
    assert torch.equal(layout.unpack_stream(words, bits, k), codes)


@pytest.mark.parametrize("bits", layout.STORED)
def test_density_is_exact(bits: int) -> None:
    codes = random_codes(128, 768, bits, 0)
    assert layout.pack_tiles(codes, bits).numel() * 32 == codes.numel() * bits
    assert layout.pack_stream(codes, bits).numel() * 32 == codes.numel() * bits


@pytest.mark.parametrize("bits", layout.STORED)
@pytest.mark.parametrize("n", [256, 257, 600])
def test_rows_do_not_depend_on_the_panel_they_lie_in(n: int, bits: int) -> None:
    codes = random_codes(n, 300, bits, 1)
    words, stream = layout.pack_tiles(codes, bits), layout.pack_stream(codes, bits)
    for tile in range(layout.tiles(n, 300)[0]):
        rows = slice(64 * tile, min(64 * tile + 64, n))
        assert torch.equal(words[tile : tile + 1], layout.pack_tiles(codes[rows], bits))
        assert torch.equal(stream[rows], layout.pack_stream(codes[rows], bits))
    assert torch.equal(layout.unpack_tiles(words, bits, n, 300), codes)
    assert torch.equal(layout.unpack_stream(stream, bits, 300), codes)


class Largest(TorchDispatchMode):
    """Size in bytes of the largest tensor any operation gives."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("bits", layout.BITS)
def test_nothing_wider_than_a_byte_a_code_is_made_of_the_whole_weight(bits: int) -> None:
    n, k = 3000, 256
    codes = random_codes(n, k, bits, 2)
    with Largest() as largest:
        layout.unpack_tiles(layout.pack_tiles(codes, bits), bits, n, k)
        layout.unpack_stream(layout.pack_stream(codes, bits), bits, k)
    assert largest.size == n * k
