"""PackedLinear against a dense linear, and the walk over models."""

import pytest
import torch
from torch import nn

from compressor.errors import ModelError
from compressor.linear import PackedLinear, find_blocks, packed_linears, swap, to_packed
from compressor.packed import Affine, PackedWeight


def layer(n: int = 96, k: int = 160, group: int = 32, bias: bool = True) -> tuple[nn.Linear, PackedLinear]:
    packed = PackedWeight.pack(torch.randint(0, 8, (n, k), dtype=torch.uint8), Affine(torch.rand(n, k // group).half()), 3)
    dense = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        dense.weight.copy_(packed.dequantize())
    return dense, to_packed(dense, packed)


@pytest.mark.parametrize("bias", [True, False])
def test_matches_a_dense_linear_forward_and_backward(bias: bool) -> None:
    dense, packed = layer(bias=bias)
    x = torch.randn(2, 5, 160, requires_grad=True)
    y = torch.autograd.grad(dense(x).square().sum(), x)[0]
    z = torch.autograd.grad(packed(x).square().sum(), x)[0]
    assert torch.allclose(dense(x), packed(x), atol=1e-5)
    assert (y - z).norm() <= 1e-5 * y.norm()


@pytest.mark.parametrize("bits", [3, 8])
def test_columns_in_another_order_and_8_bits(bits: int) -> None:
    """The inputs follow the stored order; gradients of x and of the scale are those of the dense weight."""
    columns = torch.randperm(160)
    codes = torch.randint(0, 1 << bits, (96, 160), dtype=torch.uint8)
    packed = PackedLinear(PackedWeight.pack(codes, Affine(torch.rand(96, 5)), bits, columns=columns))
    weight, x = packed.packed().dequantize().requires_grad_(), torch.randn(7, 160, requires_grad=True)
    assert torch.allclose(packed(x), x @ weight.T, rtol=1e-4, atol=1e-3)
    packed.learned.requires_grad_()
    mine = torch.autograd.grad(packed(x).square().sum(), (x, packed.learned))
    theirs = torch.autograd.grad((x @ weight.T).square().sum(), (x, weight))
    steps = packed.packed().with_learned(torch.ones(96, 5)).dequantize()
    dense = (theirs[1] * steps)[:, columns].view(96, 5, 32).sum(-1)
    for found, wanted in zip(mine, (theirs[0], dense), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_16_bit_inputs_are_computed_in_float32_on_a_cpu() -> None:
    dense, packed = layer()
    x = torch.randn(3, 160).bfloat16()
    out = packed(x)
    assert out.dtype == torch.bfloat16
    exact = dense(x.float())  # the sums run in another order, so a result close to the middle of two bf16 numbers may be rounded to the other one
    assert (out.float() - exact).norm() <= 1.1 * (exact.bfloat16().float() - exact).norm()


def test_casting_the_model_leaves_the_stored_scale() -> None:
    _, packed = layer()
    before = packed.learned.clone()
    for cast in (packed.float, packed.bfloat16, packed.half, packed.double):
        cast()
        assert packed.learned.dtype == torch.float16
        assert torch.equal(packed.learned, before)
        assert packed.words.dtype == torch.int32


@pytest.mark.parametrize("trained", [False, True])
def test_x_is_saved_for_backward_only_to_train_the_scale(trained: bool) -> None:
    dense, packed = layer(bias=False)
    packed.learned.requires_grad_(trained)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(5, 160, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = packed(x)
    assert any(t.data_ptr() == packed.words.data_ptr() for t in saved)
    assert any(t.shape == x.shape for t in saved) == trained
    y.square().sum().backward()
    dx = torch.autograd.grad(dense(x).square().sum(), x)[0]
    assert x.grad is not None and (x.grad - dx).norm() <= 1e-5 * dx.norm()
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed(x.detach())
    assert any(t.data_ptr() == packed.learned.data_ptr() for t in saved) is False, "the scale is needed for the gradient of x only"


def test_gradients_of_gradients_are_refused() -> None:
    _, packed = layer(bias=False)
    x = torch.randn(5, 160, requires_grad=True)
    (dx,) = torch.autograd.grad(packed(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 32)


def test_find_blocks_takes_the_longest_list_with_linears() -> None:
    model = nn.Module()
    model.short = nn.ModuleList([Block()])
    model.layers = nn.ModuleList([Block(), Block(), Block()])
    model.norms = nn.ModuleList([nn.LayerNorm(3) for _ in range(5)])
    assert find_blocks(model)[0] == "layers"


def test_find_blocks_refuses_models_without_blocks() -> None:
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_swap_replaces_nested_modules() -> None:
    model = nn.Sequential(Block())
    _, packed = layer()
    swap(model, "0.proj", packed)
    assert packed_linears(model) == {"0.proj": packed}
