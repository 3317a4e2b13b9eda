"""Trainable codes: they start at the packed weight, come back as one, and their gradient is that of straight-through rounding."""

import pytest
import torch
from torch import Tensor, nn

from compressor.packed import PackedWeight
from compressor.quant import rtn
from compressor.quant.latent import RoundedLinear
from compressor.recipe import Quant


def layer(symmetric: bool, bits: int = 3, group: int = 8) -> tuple[nn.Linear, PackedWeight]:
    torch.manual_seed(0)
    dense = nn.Linear(32, 12)
    return dense, rtn.pack(dense.weight.detach(), None, Quant(bits=bits, packer="rtn", symmetric=symmetric), group, torch.float16)[0]


def same(one: PackedWeight, other: PackedWeight) -> bool:
    zeros = (one.zero is None and other.zero is None) or torch.equal(one.zero, other.zero)
    return torch.equal(one.words, other.words) and torch.equal(one.learned, other.learned) and zeros


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_untrained_it_is_the_packed_weight(symmetric: bool, bits: int) -> None:
    dense, packed = layer(symmetric, bits)
    found = RoundedLinear(dense, packed)
    x = torch.randn(5, 32)
    assert torch.allclose(found(x), x @ packed.dequantize().T + dense.bias, atol=1e-6)
    assert same(found.packed(), packed)
    wanted = {"position", "stretch", "bias"} | (set() if symmetric else {"zero"})
    assert {name for name, _ in found.named_parameters()} == wanted


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_a_weight_that_is_not_rounded(symmetric: bool) -> None:
    dense, packed = layer(symmetric)
    found = RoundedLinear(dense, packed)
    pull = torch.randn(12, 32)
    (found.rounded() * pull).sum().backward()
    scale = packed.learned.float().repeat_interleave(8, 1)  # [n, k]
    assert torch.allclose(found.position.grad, pull * scale, atol=1e-6)
    by_group = (pull * packed.dequantize()).view(12, -1, 8).sum(-1)  # of s = s0 exp(r) at r = 0
    assert torch.allclose(found.stretch.grad, by_group, atol=1e-5)
    if not symmetric:
        inside = (found.zero > 0) & (found.zero < 7)
        assert torch.allclose(found.zero.grad[inside], (-(pull * scale).view(12, -1, 8).sum(-1))[inside], atol=1e-5)


def test_positions_stay_on_the_grid_and_within_reach() -> None:
    dense, packed = layer(False)
    free, near = RoundedLinear(dense, packed), RoundedLinear(dense, packed, reach=0.5)
    with torch.no_grad():
        for found in (free, near):
            found.position += 100.0
            found.zero -= 100.0
            found.settle()
    assert bool((free.packed().codes() == 7).all()) and bool((free.zero == 0).all())
    exact = dense.weight.detach().view(12, -1, 8) / packed.learned.float().unsqueeze(-1) + packed.zero.float().unsqueeze(-1)
    away = near.packed().codes().float().view(12, -1, 8) - exact
    assert bool((away.abs()[(exact > 0) & (exact < 7)] <= 1.0 + 1e-4).all()) and bool((away > 0).any())


def test_pruned_weights_stay_zero() -> None:
    dense, packed = layer(False)
    keep: Tensor = torch.rand(12, 32) > 0.5
    found = RoundedLinear(dense, packed, keep=keep)
    with torch.no_grad():
        found.position += torch.randn(12, 32)
        found.zero += 0.7
        found.settle()
    assert bool((found.rounded()[~keep] == 0).all()) and bool((found.packed().dequantize()[~keep] == 0).all())
