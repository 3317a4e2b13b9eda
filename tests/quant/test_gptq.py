"""GPTQ against plain rounding and against its textbook form; damping, dead inputs, fallbacks; refinement never loses."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.errors import RecipeError
from compressor.hessian import factorise
from compressor.packed import Affine, PackedWeight
from compressor.quant import PACKERS, gptq, grid, rtn
from compressor.quant.refine import refine
from compressor.recipe import Quant, Recipe
from compressor.stats import LayerStats

GRIDS = [(bits, symmetric) for bits in (2, 3, 4) for symmetric in (True, False)]


def weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated(k: int, tokens: int = 2048) -> LayerStats:
    """Inputs from a mixed, unevenly scaled source."""
    draw = torch.Generator().manual_seed(1)
    mix = torch.randn(k, k, generator=draw) / k**0.5 + 0.1 * torch.randn(k, 1, generator=draw)
    stats = LayerStats(k)
    stats.add(torch.randn(tokens, k, generator=draw) @ mix * torch.rand(k, generator=draw).add(0.1))
    return stats


def given(hessian: Tensor) -> LayerStats:
    stats = LayerStats(hessian.shape[0])
    stats.hessian, stats.tokens = hessian.clone(), 100
    return stats


def energy(w: Tensor, dense: Tensor, hessian: Tensor) -> float:
    e = (w - dense).double()
    return float(((e @ hessian.double()) * e).sum())


def pack(w: Tensor, stats: LayerStats | None, group: int, dtype: torch.dtype = torch.float16, **options: Any) -> tuple[PackedWeight, dict]:
    return PACKERS["gptq"](w, stats, Quant(**options), group, dtype)


def textbook(w: Tensor, hessian: Tensor, values: Affine, bits: int, group: int, order: Tensor, damp: float) -> Tensor:
    """Codes by the unblocked algorithm of the paper in float64, with its three factorisations."""
    h = hessian.double()[order][:, order]
    h += damp * h.diagonal().mean() * torch.eye(len(order))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    rest, codes = w.double()[:, order], torch.empty(w.shape, dtype=torch.uint8)
    for i, j in enumerate(order.tolist()):
        s = values.scale[:, j // group].double()
        z: Tensor | float = 1 << (bits - 1) if values.zero is None else values.zero[:, j // group].double()
        code = grid.encode(rest[:, i], s, z, bits)
        codes[:, j] = code.to(torch.uint8)
        wrong = (rest[:, i] - s * (code - z)) / upper[i, i]
        rest[:, i + 1 :] -= wrong.unsqueeze(1) * upper[i, i + 1 :]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_the_sweep_is_the_textbook_algorithm(monkeypatch: pytest.MonkeyPatch, bits: int, symmetric: bool, act_order: bool) -> None:
    monkeypatch.setattr(gptq, "ROUNDS", 0)
    w, stats, group = weight(24, 352), correlated(352), 32
    packed, row = pack(w, stats, group, bits=bits, symmetric=symmetric, act_order=act_order)
    assert stats.hessian is not None and row == {"damp": 0.01, "note": ""}
    order = stats.hessian.diagonal().argsort(descending=True) if act_order else torch.arange(352)
    truth = textbook(w, stats.hessian, packed.values, bits, group, order, 0.01)
    assert float((packed.codes() != truth).float().mean()) < 0.02  # float32 ties fall either way now and then
    want = energy(w, PackedWeight.pack(truth, packed.values, bits).dequantize(), stats.hessian)
    assert energy(w, packed.dequantize(), stats.hessian) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize(("k", "group"), [(352, 32), (172, 4), (172, 172)])
def test_better_than_rounding_and_refinement_pays(monkeypatch: pytest.MonkeyPatch, bits: int, symmetric: bool, k: int, group: int) -> None:
    w, stats = weight(32, k), correlated(k)
    assert stats.hessian is not None
    plain, _ = PACKERS["rtn"](w, None, Quant(bits=bits, symmetric=symmetric), group, torch.float16)
    refined, _ = pack(w, stats, group, bits=bits, symmetric=symmetric)
    monkeypatch.setattr(gptq, "ROUNDS", 0)
    swept, _ = pack(w, stats, group, bits=bits, symmetric=symmetric)
    errors = [energy(w, p.dequantize(), stats.hessian) for p in (plain, swept, refined)]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < (0.97 if bits == 2 else 1.0) * errors[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_round_of_refinement_lowers_the_error_of_every_row(dtype: torch.dtype, symmetric: bool) -> None:
    w, hessian = weight(16, 96), correlated(96).hessian
    assert hessian is not None
    values = grid.choose(w, 2, 32, symmetric, True, dtype)
    codes, kept = rtn.nearest(w, values, 2, 32), values.scale.clone()
    before = torch.full((16,), torch.inf)
    for rounds in range(4):
        found, scale, told = refine(w, codes, values, hessian, 2, rounds)
        assert (
            found.dtype == torch.uint8
            and int(found.max()) < 4
            and scale.dtype == dtype
            and bool(((scale >= kept / 2.02) & (scale <= kept * 2.02)).all())
        )
        e = w - PackedWeight.pack(found, Affine(scale, values.zero), 2).dequantize()
        error = ((e @ hessian) * e).sum(1)
        torch.testing.assert_close(told, error, rtol=1e-3, atol=1e-6)
        assert bool((error <= before * (1 + 1e-4)).all())
        assert rounds != 1 or float(error.sum()) < 0.9 * float(before.sum())
        before = error
    assert torch.equal(values.scale, kept)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_every_sweep_lowers_the_error_of_every_row(bits: int, symmetric: bool, act_order: bool) -> None:
    w, stats = weight(24, 192), correlated(192)
    assert stats.hessian is not None
    mean = stats.hessian.diagonal().mean()
    hessian, start = stats.hessian + 0.01 * mean * torch.eye(192), grid.choose(w, bits, 32, symmetric, True, torch.float16).scale
    errors = []
    for sweeps in (1, 2, 4):
        packed, _ = pack(w, stats, 32, bits=bits, symmetric=symmetric, act_order=act_order, sweeps=sweeps)
        e = packed.dequantize() - w
        errors.append(((e @ hessian) * e).sum(1))
        assert bool(((packed.learned >= start / 2.02) & (packed.learned <= start * 2.02)).all())
    assert bool((errors[1] <= errors[0] * (1 + 1e-4)).all()) and bool((errors[2] <= errors[1] * (1 + 1e-4)).all())
    assert float(errors[2].sum()) < (0.97 if bits == 2 else 0.995) * float(errors[0].sum())


@pytest.mark.parametrize("sweeps", [0, -1])
def test_sweeps_that_cannot_be(sweeps: int) -> None:
    with pytest.raises(RecipeError, match=f"quant.sweeps={sweeps} must be positive"):
        Recipe().with_(quant__sweeps=sweeps)


def test_refinement_leaves_its_arguments_alone() -> None:
    w, hessian = weight(16, 64), correlated(64).hessian
    assert hessian is not None
    values = grid.choose(w, 2, 64, True, True, torch.float32)  # one float32 scale a row: its transpose shares memory
    scale, codes = values.scale.clone(), rtn.nearest(w, values, 2, 64)
    kept = codes.clone()
    refine(w, codes, values, hessian, 2, 2)
    assert torch.equal(values.scale, scale) and torch.equal(codes, kept)


def test_equal_diagonal_makes_the_order_of_columns_meaningless() -> None:
    w = weight(16, 128)
    ordered, _ = pack(w, given(torch.eye(128) * 3), 32, act_order=True)
    given_order, _ = pack(w, given(torch.eye(128) * 3), 32, act_order=False)
    assert torch.equal(ordered.words, given_order.words) and torch.equal(ordered.learned, given_order.learned)


def test_without_correlations_the_sweep_rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "ROUNDS", 0)
    w = weight(16, 128)
    swept, _ = pack(w, given(torch.diag(torch.rand(128).add(0.5))), 32)
    plain, _ = PACKERS["rtn"](w, None, Quant(), 32, torch.float16)
    assert torch.equal(swept.words, plain.words) and torch.equal(swept.learned, plain.learned)


def test_dead_inputs_get_zero_weights_and_do_not_disturb_the_rest() -> None:
    draw = torch.Generator().manual_seed(5)
    x, w = torch.randn(1000, 64, generator=draw) * 1e-3, weight(16, 64)
    x[:, [3, 40]] = 0
    w[:, 3] = 50.0  # would ruin its group's grid
    stats = LayerStats(64)
    stats.add(x)
    packed, row = pack(w, stats, 32, bits=3)
    dense = packed.dequantize()
    assert row == {"damp": 0.01, "note": "2 of 64 inputs were always zero in the calibration text"} and not dense[:, [3, 40]].any()
    alive = [j for j in range(64) if j not in (3, 40)]
    assert float((dense - w)[:, alive].norm() / w[:, alive].norm()) < 0.3
    nothing, row = pack(w, given(torch.zeros(64, 64)), 32)
    assert row == {"packer": "rtn", "note": "all its calibration inputs were zero; rounded to nearest"}
    assert torch.equal(nothing.dequantize(), PACKERS["rtn"](w, None, Quant(), 32, torch.float16)[0].dequantize())


def test_rank_deficient_inputs_work() -> None:
    stats, w = correlated(128, tokens=20), weight(16, 128)
    assert stats.hessian is not None
    packed, row = pack(w, stats, 32, bits=3)
    plain, _ = PACKERS["rtn"](w, None, Quant(bits=3), 32, torch.float16)
    assert row["note"] == ""
    assert energy(w, packed.dequantize(), stats.hessian) < 0.5 * energy(w, plain.dequantize(), stats.hessian)


def test_damp_is_raised_and_said_when_h_is_not_positive_definite() -> None:
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.05  # eigenvalue -0.05: damp 0.01 is too little, 0.1 enough
    packed, row = pack(weight(8, 64), given(hessian), 32)
    assert row["damp"] == pytest.approx(0.1)
    assert row["note"] == "damp raised from 0.01 to 0.1, for H was not positive definite"
    assert bool(torch.isfinite(packed.dequantize()).all())


@pytest.mark.parametrize("value", [5.0, float("nan"), float("inf")])
def test_a_hopeless_hessian_falls_back_to_rounding(value: float) -> None:
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = value
    w = weight(8, 64)
    packed, row = pack(w, given(hessian), 32)
    plain, _ = PACKERS["rtn"](w, None, Quant(), 32, torch.float16)
    assert torch.equal(packed.words, plain.words)
    assert "not positive definite" in row["note"] and "rounded to nearest" in row["note"]


@pytest.mark.parametrize("stats", [None, LayerStats(64)])
def test_without_tokens_it_falls_back_to_rounding(stats: LayerStats | None) -> None:
    w = weight(8, 64)
    packed, row = pack(w, stats, 32)
    assert row == {"packer": "rtn", "note": "no calibration tokens reached this layer; rounded to nearest"}
    assert torch.equal(packed.words, PACKERS["rtn"](w, None, Quant(), 32, torch.float16)[0].words)


def test_factor_is_the_inverse_in_the_order_asked_for() -> None:
    hessian = correlated(96).hessian
    assert hessian is not None
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    upper, damp, note = factorise(hessian, order, 0.01)
    assert upper is not None and (damp, note) == (0.01, "")
    assert torch.equal(upper, upper.triu()) and float(upper.diagonal().min()) > 0
    damped = hessian[order][:, order] + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    torch.testing.assert_close(upper @ damped @ upper.T, torch.eye(96), rtol=0, atol=1e-3)


class Alive(TorchDispatchMode):
    """Counts the tensors of `numel` float32 elements, other than views of each other, that live at the same time."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.peak = numel, 0
        self.seen: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.numel() == self.numel:
                self.seen.append(weakref.ref(tensor))
        alive = {tensor.untyped_storage().data_ptr() for tensor in (seen() for seen in self.seen) if tensor is not None}
        self.peak = max(self.peak, len(alive))
        return out


@pytest.mark.parametrize("off", [0.0, 1.05])  # the latter raises the damp, so the factor is tried twice
def test_no_more_than_three_square_matrices_live_at_a_time(off: float) -> None:
    hessian = torch.eye(96)
    hessian[0, 1] = hessian[1, 0] = off
    with Alive(96 * 96) as alive:
        pack(weight(8, 96), given(hessian), 32)
    assert alive.peak == 4  # with the caller's, which `given` makes inside
