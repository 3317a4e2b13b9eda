"""PackedWeight: pack and unpack are inverses, sizes are counted, what does not fit is refused."""

import pytest
import torch

from compressor.errors import ModelError, RecipeError
from compressor.packed import Affine, PackedWeight


def random_weight(n: int, k: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, PackedWeight]:
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    zero = None if symmetric else torch.randint(0, 1 << bits, (n, k // group), dtype=torch.uint8)
    return codes, PackedWeight.pack(codes, Affine((torch.rand(n, k // group) + 0.1).to(dtype), zero), bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 256, 128), (100, 352, 32), (7, 172, 4), (1, 16, 16)])
def test_round_trip_and_dequantize(bits: int, symmetric: bool, n: int, k: int, group: int) -> None:
    codes, packed = random_weight(n, k, bits, group, symmetric)
    assert torch.equal(packed.codes(), codes)
    zero = torch.full((n, k // group), 1 << (bits - 1)) if packed.zero is None else packed.zero
    dense = packed.learned.double().repeat_interleave(group, 1) * (codes.double() - zero.double().repeat_interleave(group, 1))
    assert torch.equal(packed.dequantize(torch.float64), dense)
    assert torch.equal(packed.dequantize(), dense.float())  # a float32 product of these numbers is exact or rounded once
    again = PackedWeight.from_tensors(packed.tensors(), bits, packed.group, packed.shape)
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_sizes() -> None:
    _, packed = random_weight(128, 512, 3, 128, symmetric=True)
    assert packed.stored_bits() == 128 * 512 * 3 + 128 * 4 * 16
    assert packed.nbytes() == 128 * 512 * 3 // 8 + 128 * 4 * 2  # no padding at these shapes
    _, packed = random_weight(128, 512, 3, 128, symmetric=False)
    assert packed.stored_bits() == 128 * 512 * 3 + 128 * 4 * (16 + 3)


def test_refusals() -> None:
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(RecipeError, match="5 bits"):
        PackedWeight.pack(codes, Affine(torch.ones(4, 1)), 5)
    with pytest.raises(ModelError, match="do not fit"):
        PackedWeight.pack(codes, Affine(torch.ones(4, 3)), 3)
    with pytest.raises(ModelError, match="code 9 does not fit 3 bits"):
        PackedWeight.pack(codes + 9, Affine(torch.ones(4, 1)), 3)
