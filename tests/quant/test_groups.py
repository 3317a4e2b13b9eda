"""Group sizes that do not divide the width."""

import pytest

from compressor.errors import RecipeError
from compressor.quant.groups import resolve_group
from compressor.recipe import Quant


@pytest.mark.parametrize(("k", "asked", "size"), [(352, -1, 352), (4096, 128, 128), (172, 4, 4), (352, 32, 32), (172, 172, 172)])
def test_what_fits_is_taken_silently(k: int, asked: int, size: int) -> None:
    assert resolve_group(k, Quant(group=asked), "up_proj") == (size, "")


@pytest.mark.parametrize(
    ("k", "asked", "size"),
    [
        *[(352, 128, 32), (11008, 100, 64), (64, 128, 64), (96, 64, 32), (3 * 640, 512, 128)],
        *[(576, 128, 64), (960, 128, 64), (960, 100, 64), (960, 50, 32)],  # SmolLM2's widths
        *[(144, 128, 48), (176, 128, 16), (96, 31, 16), (4096, 24, 16)],  # nothing that the GPU kernels take
    ],
)
def test_a_size_for_the_kernels_is_preferred_and_else_the_largest_multiple_of_sixteen_and_said(k: int, asked: int, size: int) -> None:
    found, note = resolve_group(k, Quant(group=asked), "up_proj")
    assert found == size and k % found == 0 and found % 16 == 0
    assert note == f"group {asked} does not divide {k} in features; {size} used"


@pytest.mark.parametrize(
    ("k", "asked", "hint"), [(172, 128, "divisor of 172"), (352, 10, "one of 16, 32, 176, 352"), (352, 0, "-1"), (352, -7, "-1")]
)
def test_nothing_fits(k: int, asked: int, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint) as caught:
        resolve_group(k, Quant(group=asked), "layers.3.up_proj")
    message = str(caught.value)
    assert "layers.3.up_proj" in message and str(k) in message and str(asked) in message and "-1" in message
