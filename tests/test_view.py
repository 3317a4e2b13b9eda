"""The weight that a packed linear shows: numbers for who reads, nothing held, an error for who writes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.linear import PackedLinear, linears
from compressor.view import WeightView
from tests.tune.conftest import round_to_nearest


@pytest.fixture
def layer() -> PackedLinear:
    return PackedLinear(round_to_nearest(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), 3, 32, True, torch.float16))


def test_shape_dtype_and_device_cost_nothing(layer: PackedLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "packed", lambda: pytest.fail("it was decoded"))
    weight = layer.weight
    assert isinstance(layer, nn.Linear) and isinstance(weight, WeightView)
    assert weight.shape == (24, 64) and weight.dtype == torch.float32 and weight.device == layer.words.device
    assert weight.data.shape == weight.detach().shape == (24, 64) and not weight.requires_grad


def test_numbers_are_those_of_the_packed_weight_now(layer: PackedLinear) -> None:
    dense, x = layer.packed().dequantize(), torch.randn(5, 64)
    view = layer.weight
    assert torch.equal(view.clone(), dense) and type(view.clone()) is Tensor
    assert torch.equal(view.data.T @ torch.eye(24), dense.T) and torch.equal(nn.functional.linear(x, view), x @ dense.T)
    layer.learned = 2 * layer.learned
    assert torch.equal(view + 0, 2 * dense)


def test_views_of_it_are_views(layer: PackedLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = layer.packed().dequantize()
    parts = (layer.weight.T, layer.weight[2:5, 3], layer.weight.view(-1)[7:], layer.weight.unsqueeze(1).transpose(0, 2))
    for part, same in zip(parts, (dense.T, dense[2:5, 3], dense.view(-1)[7:], dense.unsqueeze(1).transpose(0, 2)), strict=True):
        assert isinstance(part, WeightView) and part.stride() == same.stride() and torch.equal(part + 0, same)


def test_gradients_pass_beside_it(layer: PackedLinear) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    nn.functional.linear(x, layer.weight).sum().backward()
    torch.testing.assert_close(x.grad, layer.packed().dequantize().sum(0).expand(3, -1))


WRITES: dict[str, Callable[[PackedLinear], object]] = {
    "add_": lambda m: m.weight.add_(1),
    "data add_": lambda m: m.weight.data.add_(1),
    "data": lambda m: setattr(m.weight, "data", torch.zeros(24, 64)),
    "copy_": lambda m: m.weight.copy_(torch.zeros(24, 64)),
    "iadd": lambda m: m.weight.__iadd__(1),
    "item": lambda m: m.weight.__setitem__(0, 1.0),
    "out": lambda m: torch.add(torch.zeros(24, 64), 1, out=m.weight),
    "init": lambda m: m.reset_parameters(),
    "another shape": lambda m: m.weight.view(-1).zero_(),
    "transposed": lambda m: m.weight.T.zero_(),
    "a row": lambda m: m.weight.data[0].fill_(0),
    "a slice": lambda m: m.weight[:3, 4:].mul_(2),
    "scattered": lambda m: m.weight.data.reshape(-1).scatter_add_(0, torch.tensor([1]), torch.ones(1)),
    "foreach": lambda m: torch._foreach_add_([torch.zeros(24, 64), m.weight], 1),
    "normal": lambda m: nn.init.normal_(m.weight),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_refused(layer: PackedLinear, name: str) -> None:
    before = layer.packed().dequantize()
    with pytest.raises(ModelError, match="cannot be changed in place"):
        WRITES[name](layer)
    assert torch.equal(layer.packed().dequantize(), before)


def test_no_parameter_takes_its_place(layer: PackedLinear) -> None:
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(torch.zeros(24, 64))
    assert "weight" not in dict(layer.named_parameters()) and list(layer.state_dict()) == ["words", "learned"]
    assert linears(nn.Sequential(layer, nn.Linear(2, 2))).keys() == {"1"}
    with pytest.raises(AttributeError, match="other"):
        layer.get_submodule("other")
