"""Rotations are orthogonal, Hadamard where they say so, the same for the same seed, and `turn` multiplies by them."""

import pytest
import torch

from compressor.rotate import hadamard
from compressor.rotate.hadamard import order, orthogonal, paley, randomised, sylvester, turn


def rotation(width: int, seed: int = 0) -> hadamard.Rotation:
    return randomised(width, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 2, 3, 6, 12, 20, 28, 36, 43, 48, 56, 60, 64, 86, 96, 128, 160, 176, 384, 576, 640, 896, 960, 1376])
def test_rotations_are_orthogonal_and_even_where_that_can_be(width: int) -> None:
    found = rotation(width).matrix()
    torch.testing.assert_close(found @ found.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    even = bool((found.abs() * width**0.5 - 1).abs().max() < 1e-9)
    assert even == (width not in (3, 6, 43, 86, 1376))
    assert width < 3 or width % 2 or bool((found != 0).all())  # every coordinate gets a share of every other


def test_paley_gives_hadamard_matrices_of_the_known_small_orders() -> None:
    found = [width for width in range(4, 101, 4) if order(width)]
    assert {4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 60, 68, 72, 76, 80, 84} <= set(found) and 16 not in found and 92 not in found
    for width in found:
        matrix = paley(width)
        assert bool((matrix.abs() == 1).all()) and torch.equal(matrix @ matrix.T, width * torch.eye(width, dtype=torch.float64)), width


def test_factors_stand_for_their_kronecker_product() -> None:
    found = rotation(1536)
    whole = torch.ones(1, 1, dtype=torch.float64)
    for factor in found.factors:
        whole = torch.kron(whole, factor)
    torch.testing.assert_close(found.matrix(), found.signs.unsqueeze(1) * whole, rtol=0, atol=1e-12)
    assert torch.equal(sylvester(4)[3], torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)) and len(found.factors) > 1


def test_seeds_decide() -> None:
    assert torch.equal(rotation(96, 1).matrix(), rotation(96, 1).matrix()) and not torch.equal(rotation(96, 1).matrix(), rotation(96, 2).matrix())
    assert torch.equal(orthogonal(5, torch.Generator().manual_seed(1)), orthogonal(5, torch.Generator().manual_seed(1)))


def test_turn_multiplies_rows_by_gain_and_rotation_a_panel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hadamard, "ROWS", 40)
    torch.manual_seed(0)
    weight, gain, found = torch.randn(17, 12), torch.rand(12, dtype=torch.float64), rotation(12)
    wanted, rows = (weight.double() * gain) @ found.matrix(), rotation(17)
    right, left, scaled = weight.clone(), weight.clone(), torch.empty(17, 12, dtype=torch.float16)
    turn(right, found, gain)
    torch.testing.assert_close(right, wanted.float(), rtol=1e-6, atol=1e-6)
    turn(left.T, rows)
    torch.testing.assert_close(left, (rows.matrix().T @ weight.double()).float(), rtol=1e-6, atol=1e-6)
    before = weight.clone()
    turn(weight, None, gain, scaled)
    assert torch.equal(weight, before) and torch.equal(scaled, (weight.double() * gain).float().half())
