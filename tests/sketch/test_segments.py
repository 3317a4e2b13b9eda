"""Segments: always as many as asked for, the lengths that kernels like where that is possible."""

import pytest

from compressor.errors import RecipeError
from compressor.recipe import Quant
from compressor.sketch.segments import resolve_segment

SHAPES = [  # k, gpr, length
    (4096, 1, 4096), (4096, 4, 1024), (4096, 8, 512), (11008, 1, 11008), (11008, 2, 5632), (11008, 4, 2816), (11008, 8, 1408),
    (14336, 8, 1792), (5120, 8, 640), (13824, 8, 1792), (384, 2, 256), (384, 4, 96), (128, 2, 64), (128, 4, 32),
    (352, 2, 192), (172, 2, 96), (166, 4, 42), (100, 1, 100),
]  # fmt: skip


@pytest.mark.parametrize(("k", "gpr", "length"), SHAPES)
def test_as_many_segments_as_asked_for(k: int, gpr: int, length: int) -> None:
    found, note = resolve_segment(k, Quant(gpr=gpr), "up_proj")
    assert found == length and -(-k // found) == gpr
    last = k - (gpr - 1) * found
    assert 0 < last <= found and 2 * last >= found
    assert bool(note) == (last != found or (gpr > 1 and found % 32 != 0))


def test_one_segment_unless_asked() -> None:
    assert resolve_segment(300, Quant(), "q_proj") == (300, "")


@pytest.mark.parametrize(("k", "bits", "gpr"), [(128, 4, 8), (34, 2, 8), (36, 2, 8), (514, 2, 64), (8, 3, 1), (528, 3, 32)])
def test_more_tables_than_columns_can_bear(k: int, bits: int, gpr: int) -> None:
    with pytest.raises(RecipeError, match=f"gpr={gpr} tables of {1 << bits} values are too many for the {k} columns of q_proj; use a smaller --gpr"):
        resolve_segment(k, Quant(bits=bits, gpr=gpr), "q_proj")


def test_every_width_gets_what_it_asked_for_or_an_error() -> None:
    for k in [*range(5, 700), 2048, 11008]:
        for gpr in (1, 2, 3, 4, 8, 20):
            try:
                length, _ = resolve_segment(k, Quant(bits=2, gpr=gpr), "q_proj")
            except RecipeError:
                continue
            assert -(-k // length) == gpr and 4 < k - (gpr - 1) * length <= length
