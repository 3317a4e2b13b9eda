"""PackedWeight: pack and unpack are inverses, sizes are counted, what does not fit is refused."""

import pytest
import torch

from compressor.errors import ModelError, RecipeError
from compressor.packed import Affine, PackedWeight, by_groups
from compressor.packing import dense_rows


def random_weight(n: int, k: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, PackedWeight]:
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    zero = None if symmetric else torch.randint(0, 1 << bits, (n, k // group), dtype=torch.uint8)
    return codes, PackedWeight.pack(codes, Affine((torch.rand(n, k // group) + 0.1).to(dtype), zero), bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
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


def test_columns_in_another_order() -> None:
    """Stored order is the order of groups; what the layer sees is its own."""
    g_idx = torch.randint(0, 4, (96,)).argsort() % 4
    columns = by_groups(g_idx, 4)
    assert columns is not None
    codes, plain = random_weight(70, 96, 3, 24, symmetric=False)
    packed = PackedWeight.pack(codes, plain.values, 3, columns=columns)
    assert torch.equal(packed.codes(), codes)
    assert torch.equal(packed.g_idx().long(), g_idx)
    assert torch.equal(packed.dequantize()[:, columns], plain.dequantize())
    assert torch.equal(dense_rows(packed, slice(64, 70)), packed.dequantize()[64:])
    assert PackedWeight.from_tensors(packed.tensors(), 3, 24, (70, 96)).columns is columns
    assert packed.stored_bits() == plain.stored_bits() + 32 * 96
    assert packed.with_learned(2 * packed.learned).columns is columns


def test_an_index_of_groups() -> None:
    assert by_groups(torch.arange(8) // 2, 4) is None
    for strange in ([0, 0, 0, 1], [0, 1, 2, 2], [-1, 0, 1, 1], [1 << 62, 0, 1, 1], [], [[0, 1]], [0.0, 1.0], [False, True]):
        with pytest.raises(ModelError, match="index"):
            by_groups(torch.tensor(strange), 2)
    with pytest.raises(ModelError, match="permutation"):
        random = PackedWeight.pack(torch.zeros(4, 32, dtype=torch.uint8), Affine(torch.ones(4, 1)), 3, columns=torch.zeros(32, dtype=torch.int64))
        random.codes()


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
    with pytest.raises(ModelError, match="zero 8 does not fit 3 bits"):
        PackedWeight.pack(codes, Affine(torch.ones(4, 1), torch.full((4, 1), 8, dtype=torch.uint8)), 3)
    assert PackedWeight.pack(codes, Affine(torch.ones(4, 1), torch.full((4, 1), 8.5)), 3).float_zeros
