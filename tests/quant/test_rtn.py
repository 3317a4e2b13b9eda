"""What every packer must hold, over bits, symmetry and group sizes; and the grid search and rounding on their own."""

import math

import pytest
import torch
from torch import Tensor

from compressor import packing
from compressor.errors import NumericError
from compressor.packed import PackedWeight
from compressor.packing import relative_error
from compressor.quant import PACKERS
from compressor.recipe import Quant
from compressor.stats import LayerStats

SHAPES = [(40, 352, 32), (24, 172, 4), (64, 256, 128), (33, 172, 172), (5, 352, 352), (1, 16, 16)]  # n, k, group: ragged, per row, tiny
GRIDS = [(bits, symmetric) for bits in (2, 3, 4) for symmetric in (True, False)]


def weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(k: int, tokens: int = 512) -> LayerStats:
    draw = torch.Generator().manual_seed(1)
    stats = LayerStats(k)
    stats.add(torch.randn(tokens, k, generator=draw) @ (torch.randn(k, k, generator=draw) / k**0.5 + 0.2))
    return stats


def rtn(w: Tensor, bits: int, group: int, symmetric: bool, shrink: bool = True, dtype: torch.dtype = torch.float16) -> PackedWeight:
    packed, row = PACKERS["rtn"](w, None, Quant(bits=bits, symmetric=symmetric, shrink=shrink), group, dtype)
    assert row == {"note": ""}
    return packed


def legal(packed: PackedWeight, bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> None:
    """Shapes, ranges and dtypes that kernels and servers rely on."""
    n, k = packed.shape
    scale, zero = packed.learned, packed.zero
    assert (packed.bits, packed.group) == (bits, group) and scale.shape == (n, k // group)
    assert scale.dtype == dtype and bool(torch.isfinite(scale).all()) and float(scale.min()) >= torch.finfo(dtype).tiny
    assert int(packed.codes().max()) < 1 << bits
    if symmetric:
        assert zero is None
    else:
        assert zero is not None and zero.dtype == torch.uint8 and zero.shape == scale.shape and int(zero.max()) < 1 << bits


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_every_packer_gives_a_legal_close_and_repeatable_weight(name: str, bits: int, symmetric: bool, n: int, k: int, group: int) -> None:
    w, stats, options = weight(n, k), inputs(k), Quant(bits=bits, symmetric=symmetric)
    before = w.clone(), stats.hessian.clone() if stats.hessian is not None else None
    packed, row = PACKERS[name](w, stats, options, group, torch.float16)
    legal(packed, bits, group, symmetric, torch.float16)
    assert row["note"] == ""
    assert relative_error(w, packed, stats if PACKERS[name].needs else None) < {2: 0.6, 3: 0.3, 4: 0.15}[bits]
    assert torch.equal(w, before[0]) and torch.equal(stats.hessian, before[1])  # nothing of the caller's is touched
    again, _ = PACKERS[name](w, stats, options, group, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(packed.tensors().values(), again.tensors().values(), strict=True))


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_stored_in_the_dtype_asked_for(name: str, dtype: torch.dtype) -> None:
    packed, _ = PACKERS[name](weight(8, 64), inputs(64), Quant(bits=3, symmetric=False), 64, dtype)
    legal(packed, 3, 64, False, dtype)


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_bad_weights_raise(name: str, bad: float) -> None:
    w = weight(4, 32)
    w[2, 5] = bad
    with pytest.raises(NumericError, match="1 of 128"):
        PACKERS[name](w, inputs(32), Quant(), 32, torch.float16)


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_zeros_stay_exact_zeros(name: str, bits: int, symmetric: bool) -> None:
    w = weight(6, 64)
    w[1] = 0
    w[3, 16:32] = 0
    packed, _ = PACKERS[name](w, inputs(64) if name == "rtn" else None, Quant(bits=bits, symmetric=symmetric), 16, torch.float16)
    dense = packed.dequantize()
    assert not dense[1].any() and not dense[3, 16:32].any() and bool(dense[0].any())
    nothing, _ = PACKERS[name](torch.zeros(6, 64), inputs(64), Quant(bits=bits, symmetric=symmetric), 16, torch.float16)
    assert not nothing.dequantize().any()


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_without_shrinking_no_weight_is_off_by_more_than_half_a_step(bits: int, symmetric: bool, n: int, k: int, group: int) -> None:
    w = weight(n, k)
    packed = rtn(w, bits, group, symmetric, shrink=False, dtype=torch.float32)
    step = packed.learned.repeat_interleave(group, 1)
    assert bool(((w - packed.dequantize()).abs() <= 0.5001 * step).all())


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_shrinking_never_costs_and_mostly_pays(bits: int, symmetric: bool, n: int, k: int, group: int) -> None:
    w = weight(n, k)
    plain, shrunk = rtn(w, bits, group, symmetric, shrink=False), rtn(w, bits, group, symmetric)
    wrong = [(w - p.dequantize()).view(n, -1, group).square().sum(-1) for p in (plain, shrunk)]
    assert bool((wrong[1] <= wrong[0] * (1 + 1e-5)).all())
    if bits == 2 and group >= 32:
        assert float(wrong[1].sum()) < 0.9 * float(wrong[0].sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_nearest_on_the_stored_grid(symmetric: bool) -> None:
    """Codes chosen with the rounded scale: no other code of the stored grid is nearer."""
    w = weight(16, 64)
    packed = rtn(w, 3, 16, symmetric, dtype=torch.bfloat16)
    scale = packed.learned.float().repeat_interleave(16, 1).unsqueeze(-1)
    zero = 4.0 if packed.zero is None else packed.zero.float().repeat_interleave(16, 1).unsqueeze(-1)
    distance = (w.unsqueeze(-1) - scale * (torch.arange(8.0) - zero)).abs()
    chosen = distance.gather(-1, packed.codes().long().unsqueeze(-1)).squeeze(-1)
    assert bool((chosen <= distance.amin(-1) + 1e-6).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_groups_keep_zero_in_the_grid(bits: int, sign: int) -> None:
    w = sign * (weight(8, 32).abs() + 1.0)
    packed = rtn(w, bits, 32, symmetric=False, shrink=False)
    assert packed.zero is not None
    assert bool((packed.zero == (0 if sign > 0 else (1 << bits) - 1)).all())
    step = packed.learned.float()
    assert bool(((w - packed.dequantize()).abs() <= 0.501 * step).all())


def test_symmetric_grids_use_their_extra_negative_step() -> None:
    w = torch.tensor([[-4.0, 3.0, 1.0, 0.0], [-3.0, 3.0, 0.0, 0.0]])
    packed = rtn(w, 3, 4, symmetric=True, shrink=False)
    assert packed.learned.flatten().tolist() == [1.0, 1.0]
    assert torch.equal(packed.dequantize(), w)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_outlier_is_clipped_when_that_pays_and_stays_in_its_group(symmetric: bool) -> None:
    w = weight(1, 128).clamp(-0.1, 0.1)
    calm = rtn(w, 3, 64, symmetric).dequantize()
    w[0, 7] = 1.0
    packed = rtn(w, 3, 64, symmetric)
    assert torch.equal(packed.dequantize()[:, 64:], calm[:, 64:])
    assert float(packed.dequantize()[0, 7]) == packed.dequantize().max() > 0.2
    w[0, 7] = 1e4
    assert math.isclose(float(rtn(w, 3, 64, symmetric).dequantize()[0, 7]), 1e4, rel_tol=0.15)


def test_panels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, stats = weight(37, 64), inputs(64)
    whole = [PACKERS[name](w, stats, Quant(bits=2), 16, torch.float16)[0] for name in PACKERS]
    monkeypatch.setattr(packing, "PANEL", 64 * 5)
    monkeypatch.setattr("compressor.quant.gptq.PANEL", 64 * 5)
    for name, one in zip(PACKERS, whole, strict=True):
        parts = PACKERS[name](w, stats, Quant(bits=2), 16, torch.float16)[0]
        assert (parts.dequantize() - one.dequantize()).norm() <= 0.02 * one.dequantize().norm()  # matrix products may round differently
        assert name != "rtn" or torch.equal(parts.words, one.words)


def test_relative_error_is_the_root_of_the_ratio_of_energies() -> None:
    w, stats = weight(8, 32), LayerStats(32)
    packed = rtn(w, 2, 32, True)
    e = w - packed.dequantize()
    assert math.isclose(relative_error(w, packed, None), float(e.norm() / w.norm()), rel_tol=1e-5)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    stats.add(x)
    assert math.isclose(relative_error(w, packed, stats), float((x @ e.T).norm() / (x @ w.T).norm()), rel_tol=1e-4)
    nothing = torch.zeros(8, 32)
    assert relative_error(nothing, rtn(nothing, 2, 32, True), stats) == 0.0
    assert relative_error(nothing, packed, None) == math.inf


@pytest.mark.parametrize("symmetric", [True, False])
def test_relative_error_never_holds_the_whole_dense_weight(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w, stats = weight(200, 64), inputs(64)
    packed = rtn(w, 3, 32, symmetric)
    whole = relative_error(w, packed, stats)
    monkeypatch.setattr(PackedWeight, "dequantize", lambda *_: pytest.fail("the whole layer at once"))
    for size in (64 * 7, 64 * 130):  # less than a row of tiles, two of them
        monkeypatch.setattr(packing, "PANEL", size)
        assert math.isclose(relative_error(w, packed, stats), whole, rel_tol=1e-5)
