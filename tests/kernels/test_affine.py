"""The Triton kernels against a dense float64 weight: outputs, gradients, panels, odd shapes, every width and group size, every kind of zeros."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from compressor.kernels import configs, dispatch, layout, reference, workspace
from tests.kernels.conftest import ODD_TILES, between
from tests.tolerances import RELATIVE, ROUNDED, error

pytestmark = pytest.mark.usefixtures("poison")

# m, n, k, group: plain; one row; groups of 256; ragged in n and k; many rows and narrow groups; one group a row, no multiple of anything;
# cut reductions; groups longer than a tile; one padded row more than a tile; several groups, but no whole blocks (twice)
SHAPES = [
    (5, 128, 512, 128),
    (1, 64, 256, 64),
    (17, 192, 768, 256),
    (3, 100, 352, 32),
    (70, 64, 256, 32),
    (2, 70, 100, 100),
    (3, 256, 1024, 64),
    (2, 64, 1024, 512),
    (4, 65, 768, 768),
    (2, 70, 896, 128),
    (3, 64, 320, 64),
]
OPS = ("forward", "grad_input", "grad_scale")
ALL = (*OPS, "dequantize")


@dataclass
class Layer:
    """A random layer, its inputs, and what float64 arithmetic on the same numbers gives."""

    x: Tensor
    dy: Tensor
    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int
    dense: Tensor  # float64 [n, k]
    steps: Tensor  # float64 [n, k], code - zero

    def run(self, ops: ModuleType, op: str) -> Tensor:
        (n, k), packed = self.dense.shape, (self.words, self.scale, self.zero, self.bits, self.group)
        if op == "forward":
            return ops.forward(self.x, *packed, n)
        if op == "grad_input":
            return ops.grad_input(self.dy, *packed, k)
        if op == "dequantize":
            return ops.dequantize(*packed, n, k, self.x.dtype)
        return ops.grad_scale(self.x, self.dy, self.words, self.zero, self.bits, self.group)

    def expect(self, op: str) -> Tensor:
        x, dy = self.x.double(), self.dy.double()
        if op == "forward":
            return x @ self.dense.T
        if op == "grad_input":
            return dy @ self.dense
        if op == "dequantize":
            return self.dense
        return ((dy.T @ x) * self.steps).view(self.dense.shape[0], -1, self.group).sum(-1)


Make = Callable[..., Layer]
Tuned = Callable[[dict], None]


@pytest.fixture
def make(device: str) -> Make:
    def build(
        m: int,
        n: int,
        k: int,
        group: int,
        bits: int,
        asymmetric: bool,
        dtype: torch.dtype = torch.float32,
        scale_dtype: torch.dtype | None = None,
        codes: Tensor | None = None,
        zeros: torch.dtype = torch.uint8,
    ) -> Layer:
        torch.manual_seed(m + n + k + group + bits)
        if codes is None:
            codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
        scale = (torch.rand(n, k // group) + 0.5).to(scale_dtype or dtype)
        zero = torch.randint(0, 1 << bits, (n, k // group), dtype=torch.uint8) if asymmetric else None
        if zero is not None and zeros.is_floating_point:
            zero = (zero + torch.rand(zero.shape) - 0.5).to(zeros)
        middle = 1 << (bits - 1) if zero is None else zero.double().repeat_interleave(group, 1)
        steps = codes.double() - middle
        dense = steps * scale.double().repeat_interleave(group, 1)
        tensors = [torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), layout.pack_tiles(codes, bits), scale]
        x, dy, words, scale = (between(t.to(device)) for t in tensors)
        return Layer(x, dy, words, scale, None if zero is None else between(zero.to(device)), bits, group, dense.to(device), steps.to(device))

    return build


def main_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_dense(affine: ModuleType, make: Make, device: str, shape: tuple[int, int, int, int], bits: int, kind: str) -> None:
    """Symmetric weights with the main dtype, asymmetric ones with fp16, which takes the tiles and the decoding of 16-bit inputs everywhere."""
    assert affine.fits(shape[3], shape[2])
    layer = make(*shape, bits, kind == "asymmetric", torch.float16 if kind == "asymmetric" else main_dtype(device))
    for op in ALL:
        assert error(layer.run(affine, op), layer.expect(op)) <= ROUNDED[layer.x.dtype], op


@pytest.mark.parametrize(("m", "bits"), [(4, 3), (4, 4), (66, 2)])
def test_float_zeros(affine: ModuleType, make: Make, m: int, bits: int) -> None:
    """Trained zeros are no integers; in fp32, so that rounding hides nothing, and with 16-bit inputs."""
    for dtype, zeros, group in ((torch.float32, torch.float32, 128), (torch.float16, torch.bfloat16, 32)):
        layer = make(m, 100, 256, group, bits, True, dtype, zeros=zeros)
        for op in ALL:
            assert error(layer.run(affine, op), layer.expect(op)) <= ROUNDED[dtype], (op, dtype)


@pytest.mark.parametrize("group", [32, 128, 256, 768, 1536])
def test_group_sums(affine: ModuleType, make: Make, group: int) -> None:
    """Sums by group, and a forward that is handed them instead of taking them itself."""
    layer = make(3, 64, 1536, group, 4, True)
    sums = affine.group_sums(layer.x, group)
    assert error(sums, layer.x.double().unflatten(1, (-1, group)).sum(-1)) <= RELATIVE[torch.float32]
    packed = (layer.words, layer.scale, layer.zero, 4, group, 64)
    assert torch.equal(affine.forward(layer.x, *packed, sums=sums), affine.forward(layer.x, *packed))


@pytest.mark.parametrize(("m", "r"), [(3, 16), (17, 8), (70, 40)])  # cut in parts; two tiles; scales in the weights
def test_low_rank(affine: ModuleType, make: Make, m: int, r: int) -> None:
    layer = make(m, 100, 1024, 128, 3, True)
    u, b = (between(torch.randn(rows, r, device=layer.x.device)) for rows in (m, 100))
    y = affine.forward(layer.x, layer.words, layer.scale, layer.zero, 3, 128, 100, low=(u, b))
    assert error(y, layer.expect("forward") + u.double() @ b.double().T) <= RELATIVE[torch.float32]


@pytest.mark.parametrize("tile", ODD_TILES, ids=str)
def test_tiles_of_a_user(affine: ModuleType, make: Make, tuned: Tuned, tile: tuple[int, ...]) -> None:
    tuned({"tiles": {f"{op} {width}": [[None, *tile]] for op in ALL for width in (16, 32)}})
    for m, n, k, group in ((9, 140, 300, 300), (70, 70, 256, 32), (3, 64, 512, 128)):
        layer = make(m, n, k, group, 3, True, torch.float16)
        for op in ALL:
            assert error(layer.run(affine, op), layer.expect(op)) <= ROUNDED[torch.float16], (op, group)


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("shape", [(3, 300, 600, 600), (2, 320, 512, 64)], ids=str)
def test_panels(affine: ModuleType, tuned: Tuned, make: Make, device: str, shape: tuple[int, int, int, int], bits: int) -> None:
    """Ends of panels in rows and columns, with and without a low-rank path, which is added afterwards here."""
    tuned({"panel_from": 1, "panel": 256})
    layer = make(*shape, bits, True, main_dtype(device))
    for op in ("forward", "grad_input"):
        assert error(layer.run(affine, op), layer.expect(op)) <= ROUNDED[layer.x.dtype], op
    u, b = (torch.randn(rows, 4, device=device).to(layer.x.dtype) for rows in shape[:2])
    y = affine.forward(layer.x, layer.words, layer.scale, layer.zero, bits, shape[3], shape[1], low=(u, b))
    assert error(y, layer.expect("forward") + u.double() @ b.double().T) <= ROUNDED[layer.x.dtype]


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dequantize_has_the_bits_of_the_reference(affine: ModuleType, make: Make, dtype: torch.dtype, bits: int) -> None:
    for zeros in (torch.uint8, torch.float32):
        layer = make(1, 100, 352, 32, bits, True, dtype, zeros=zeros)
        packed = (layer.words, layer.scale, layer.zero, bits, 32, 100, 352, dtype)
        assert torch.equal(affine.dequantize(*packed), reference.dequantize(*packed))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(affine: ModuleType, make: Make, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    """Every input dtype with every dtype of the scales; y and dx come in the input's dtype, dscale in at least fp32."""
    for m, bits in ((5, 4), (65, 3)):  # scales on the accumulator, scales in the weights
        layer = make(m, 64, 256, 128, bits, True, dtype, scale_dtype)
        for op in OPS:
            out = layer.run(affine, op)
            assert out.dtype == (torch.promote_types(dtype, torch.float32) if op == "grad_scale" else dtype)
            assert error(out, layer.expect(op)) <= ROUNDED[dtype], (op, bits)


@pytest.mark.parametrize(("m", "bits"), [(16, 2), (33, 3), (64, 4), (65, 2), (200, 4)])
def test_row_buckets(affine: ModuleType, make: Make, m: int, bits: int) -> None:
    """Each tile of the configuration table, full and ragged."""
    layer = make(m, 130, 512, 128, bits, True, torch.float16)
    for op in OPS:
        assert error(layer.run(affine, op), layer.expect(op)) <= ROUNDED[layer.x.dtype], op


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("fill", ["zeros", "largest"])
def test_extreme_codes(affine: ModuleType, make: Make, device: str, bits: int, fill: str) -> None:
    codes = torch.full((64, 256), 0 if fill == "zeros" else (1 << bits) - 1, dtype=torch.uint8)
    layer = make(3, 64, 256, 64, bits, True, main_dtype(device), codes=codes)
    for op in OPS:
        assert error(layer.run(affine, op), layer.expect(op)) <= ROUNDED[layer.x.dtype], op


@pytest.mark.parametrize("bits", layout.BITS)
def test_rows_of_the_identity_return_the_weight(affine: ModuleType, make: Make, device: str, bits: int) -> None:
    """With many rows the kernel multiplies by exactly the weights that `dequantize` would give, bit for bit."""
    layer = make(256, 64, 256, 64, bits, True, main_dtype(device))
    layer.x = torch.eye(256, dtype=layer.x.dtype, device=device)
    weight = reference.dequantize(layer.words, layer.scale, layer.zero, bits, 64, 64, 256, layer.x.dtype)
    assert torch.equal(layer.run(affine, "forward").T, weight)


@pytest.mark.parametrize("op", OPS)
def test_no_rows(affine: ModuleType, make: Make, op: str) -> None:
    layer = make(0, 64, 256, 128, 4, True)
    out = layer.run(affine, op)
    assert out.shape == layer.expect(op).shape
    assert not out.any()


def test_strided_inputs(affine: ModuleType, make: Make) -> None:
    """Transposed, cut from a wider tensor, and expanded inputs give what their copies give."""
    layer = make(6, 64, 256, 64, 3, False)
    wide = torch.full((6, 300), float("nan"), device=layer.x.device)
    wide[:, 7 : 7 + 256] = layer.x
    expected = {op: layer.run(affine, op) for op in OPS}
    dense_dy = layer.dy
    for x, dy in ((layer.x.T.contiguous().T, dense_dy.T.contiguous().T), (wide[:, 7 : 7 + 256], dense_dy)):
        layer.x, layer.dy = x, dy
        assert not x.is_contiguous()
        for op in OPS:
            assert torch.equal(layer.run(affine, op), expected[op]), op
    layer.dy = torch.ones(1, 1, device=layer.x.device).expand(6, 64)
    for op in ("grad_input", "grad_scale"):
        assert error(layer.run(affine, op), layer.expect(op)) <= RELATIVE[torch.float32], op


@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit(affine: ModuleType, make: Make, op: str) -> None:
    layer = make(3, 256, 1024, 128, 4, True, torch.float16)
    assert configs.split(affine.launch.chip(layer.x.device), 4, 4) > 1, "this shape is meant to be cut in parts"
    assert torch.equal(layer.run(affine, op), layer.run(affine, op))
    assert not any(counters.any() for counters in workspace._streams.values()), "the last program to arrive puts its counter back"


def test_fits(affine: ModuleType) -> None:
    assert all(affine.fits(group, 1536) for group in (32, 64, 128, 256, 512, 768, 1536))
    assert affine.fits(100, 100)
    assert not any(affine.fits(group, 4096) for group in (0, -1, 1, 16, 48, 96, 100, 384, 768, 8192))
    assert not affine.fits(256, 384)
    assert not affine.fits(128, 64)


def test_gradcheck(affine: ModuleType, make: Make, device: str) -> None:
    """Finite differences in float64 through the public door, along random directions (every single one would take a minute)."""
    if device == "cuda":
        pytest.skip("float64 on a GPU goes to the reference")
    layer = make(3, 16, 64, 32, 3, True, torch.float64)
    x, scale = layer.x.requires_grad_(), layer.scale.requires_grad_()
    call = lambda x, scale: dispatch.linear(x, layer.words, scale, layer.zero, None, 3, 32, 16)
    assert torch.autograd.gradcheck(call, (x, scale), atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("bits", layout.BITS)
def test_through_dispatch(affine: ModuleType, make: Make, device: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dispatch.linear takes the kernels for leading dimensions, bias and both gradients, and only for groups that fit."""
    layer = make(6, 100, 352, 32, bits, True, main_dtype(device))
    called = []
    for op, real in {op: getattr(affine, op) for op in OPS}.items():
        monkeypatch.setattr(affine, op, lambda *args, op=op, real=real: (called.append(op), real(*args))[1])
    x = layer.x.view(2, 3, 352).requires_grad_()
    scale = layer.scale.float().requires_grad_()
    bias = torch.randn(100, device=device).requires_grad_()
    y = dispatch.linear(x, layer.words, scale, layer.zero, bias, bits, 32, 100)
    y.backward(layer.dy.view(2, 3, 100))
    assert called == list(OPS)
    assert x.grad is not None and bias.grad is not None
    tolerance = ROUNDED[x.dtype]
    assert error(y.view(6, 100), layer.expect("forward") + bias.double()) <= tolerance
    assert error(x.grad.view(6, 352), layer.expect("grad_input")) <= tolerance
    assert error(scale.grad, layer.expect("grad_scale")) <= tolerance
    assert error(bias.grad, layer.dy.double().sum(0)) <= tolerance
    assert dispatch.choose(layer.x, 2, 11, 352) is not affine
