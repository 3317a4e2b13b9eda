"""The plain torch reference, and the autograd function around it, against dense autograd in float64."""

import pytest
import torch
from torch import Tensor

from compressor.kernels import dispatch, layout, reference
from tests.tolerances import RELATIVE, error

# m, n, k, group: one panel; ragged; odd groups; several panels of rows; one group a row; one code a group
SHAPES = [(5, 64, 256, 128), (3, 100, 352, 32), (4, 7, 30, 5), (2, 300, 96, 48), (3, 17, 77, 77), (1, 9, 13, 1)]


def random_layer(n: int, k: int, group: int, bits: int, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(n + k + group + bits)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    zero = torch.randint(0, 1 << bits, (n, k // group), dtype=torch.uint8) if asymmetric else None
    return codes, torch.rand(n, k // group, dtype=torch.float64) + 0.5, zero


def dense(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    middle = float(1 << (bits - 1)) if zero is None else zero.double().repeat_interleave(group, 1)
    return (codes.double() - middle) * scale.repeat_interleave(group, 1)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_match_dense_autograd(shape: tuple[int, int, int, int], bits: int, asymmetric: bool) -> None:
    m, n, k, group = shape
    codes, scale, zero = random_layer(n, k, group, bits, asymmetric)
    bias, x, dy = torch.randn(n).double(), torch.randn(m, k).double(), torch.randn(m, n).double()
    results = []
    for packed in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, scale, bias)]
        if packed:
            y = dispatch.linear(leaves[0], layout.pack_tiles(codes, bits), leaves[1], zero, leaves[2], bits, group, n)
        else:
            y = torch.nn.functional.linear(leaves[0], dense(codes, leaves[1], zero, bits, group), leaves[2])
        y.backward(dy)
        results.append([y, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None
        assert error(ours, theirs) <= RELATIVE[torch.float64]


@pytest.mark.parametrize("bits", layout.BITS)
def test_dequantize_rounds_once(bits: int) -> None:
    codes, scale, zero = random_layer(100, 96, 32, bits, True)
    words, scale = layout.pack_tiles(codes, bits), scale.half()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        exact = dense(codes, scale.double(), zero, bits, 32)
        out = reference.dequantize(words, scale, zero, bits, 32, 100, 96, dtype)
        assert torch.equal(out, exact.to(torch.float32).to(dtype) if dtype != torch.float64 else exact)


@pytest.mark.parametrize("needs", ["x", "scale", "both"])
def test_no_dense_weight_is_saved_for_backward(needs: str) -> None:
    n, k, m, group = 192, 512, 3, 64
    codes, scale, zero = random_layer(n, k, group, 4, True)
    x = torch.randn(m, k).requires_grad_(needs != "scale")
    scale = scale.float().requires_grad_(needs != "x")
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = dispatch.linear(x, layout.pack_tiles(codes, 4), scale, zero, None, 4, group, n)
    assert saved, "nothing was saved: the test looks at the wrong thing"
    assert max(t.numel() for t in saved) < n * k / 4
    y.sum().backward()
    assert (x.grad is not None) == (needs != "scale")
    assert (scale.grad is not None) == (needs != "x")


def test_sixteen_bits_on_a_cpu_keep_their_dtype() -> None:
    codes, scale, zero = random_layer(64, 64, 32, 4, True)
    x = torch.randn(2, 3, 64).bfloat16().requires_grad_()
    y = dispatch.linear(x, layout.pack_tiles(codes, 4), scale.bfloat16(), zero, None, 4, 32, 64)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 64)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    exact = x.double() @ dense(codes, scale.bfloat16().double(), zero, 4, 32).T
    assert error(y, exact) <= RELATIVE[torch.bfloat16]
