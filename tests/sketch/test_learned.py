"""Learned sketches: the sweep against a plain float64 transcription, and what each step must not lose."""

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericError
from compressor.hessian import damped, factorise, living, rounding_order
from compressor.packed import PackedWeight, Table
from compressor.packing import relative_error
from compressor.recipe import Quant, Recipe
from compressor.sketch import PACKERS, kmeans, learned, refit
from compressor.stats import LayerStats

real = learned._pack_panel


def inputs(k: int, tokens: int = 600) -> LayerStats:
    """Correlated inputs of very different size, as a language model's are."""
    mix = torch.eye(k) + 0.5 * torch.randn(k, k) / k**0.5
    stats = LayerStats(k)
    stats.add(torch.randn(tokens, k) * torch.logspace(-1, 1, k) @ mix + 0.3)
    return stats


def sketch(w: Tensor, stats: LayerStats | None, group: int | None = None, dtype: torch.dtype = torch.float32, **options: object) -> PackedWeight:
    quant = Recipe().with_(quant__packer="sketch", **{f"quant__{key}": value for key, value in options.items()}).quant
    return PACKERS["sketch"](w, stats, quant, group or w.shape[1], dtype)[0]


def row_errors(w: Tensor, packed: PackedWeight, stats: LayerStats) -> Tensor:
    assert stats.hessian is not None
    e = (w - packed.dequantize()).double()
    return ((e @ stats.hessian.double()) * e).sum(1)


def textbook(w: Tensor, table: Tensor, hessian: Tensor, order: list[int], group: int) -> Tensor:
    """Codes by the formulas of LeanQuant, one column of one row after the other, float64; hessian is damped already."""
    permuted = hessian.double()[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(permuted)).T
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for row in range(len(w)):
        rest = w[row, order].double().clone()
        for i, j in enumerate(order):
            entries = table[row, j // group].double()
            code = int((entries - rest[i]).abs().argmin())
            codes[row, j] = code
            rest[i + 1 :] -= (rest[i] - entries[code]) / upper[i, i] * upper[i, i + 1 :]
    return codes


def moments_of(stats: LayerStats, group: int, damp: float = 0.01) -> learned._Moments:
    """As `pack` makes them."""
    assert stats.hessian is not None
    hessian, _ = living(stats.hessian.clone())
    order = rounding_order(hessian, True)
    factor, damp, _ = factorise(hessian, order, damp)
    assert factor is not None
    return learned._Moments(stats.hessian, damped(hessian, damp * hessian.diagonal().mean()), factor, order, group)


@pytest.mark.parametrize(("k", "group", "bits"), [(96, 96, 3), (150, 60, 2), (300, 300, 4)])
def test_the_sweep_is_the_textbooks(k: int, group: int, bits: int) -> None:
    w, stats = torch.randn(7, k), inputs(k)
    moments = moments_of(stats, group)
    table = torch.randn(7, -(-k // group), 1 << bits).sort(dim=2).values
    found = moments.sweep(w.T.contiguous(), table.permute(1, 2, 0).contiguous()).T
    wanted = textbook(w, table, moments.hessian, moments.order.tolist(), group)
    same = (found == wanted).float().mean(1)
    assert float(same.median()) == 1.0 and float(same.min()) > 0.5, "a code at a border may turn by rounding, and all behind it with it"


@pytest.mark.parametrize("exponent", [0.0, 2.0, 4.0])
def test_sensitivity_is_the_factors_diagonal_in_the_order_of_the_columns(exponent: float) -> None:
    stats = inputs(80)
    moments = moments_of(stats, 80)
    assert stats.hessian is not None
    order = stats.hessian.diagonal().argsort(descending=True, stable=True)
    full = stats.hessian.double() + 0.01 * stats.hessian.diagonal().double().mean() * torch.eye(80)
    upper = torch.linalg.cholesky(torch.linalg.inv(full[order][:, order])).T
    wanted = torch.empty(80, dtype=torch.float64)
    wanted[order] = upper.diagonal() ** -exponent
    assert torch.allclose(moments.sensitivity(exponent).double(), wanted / wanted.sum(), rtol=1e-3)
    assert exponent == 0 or float(wanted.max() / wanted.min()) > 3, "the columns must differ for this to test anything"


def test_pack_damps_and_weighs_by_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    stats, seen = inputs(48), []
    monkeypatch.setattr(learned, "_pack_panel", lambda w, start, moments, options: seen.append((start, moments)) or real(w, start, moments, options))
    w = torch.randn(5, 48)
    sketch(w, stats, bits=2, exponent=3.0)
    start, moments = seen[0]
    wanted = moments_of(stats, 48)
    assert torch.equal(moments.hessian, wanted.hessian) and not torch.equal(moments.hessian, moments.raw)
    assert stats.hessian is not None and torch.equal(moments.raw, stats.hessian)
    assert torch.equal(start[:, 0], kmeans.fit(w, wanted.sensitivity(3.0), 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_that_a_table_holds_exactly_stay_exact(dtype: torch.dtype) -> None:
    w, stats = torch.randint(-4, 4, (50, 96)).float(), inputs(96)
    assert torch.equal(sketch(w, stats, bits=3, dtype=dtype).dequantize(), w), "the refit would blur them by its rounding"


def test_the_guard_judges_by_the_inputs_as_seen() -> None:
    stats = inputs(40)
    moments, table = moments_of(stats, 40, damp=0.9), torch.randn(1, 4, 6).sort(dim=1).values
    w = torch.randn(40, 6)
    codes = refit.nearest_codes(w, table, 40)
    e = (w - refit.spread(table, codes, 40)).double()
    assert stats.hessian is not None
    seen = ((stats.hessian.double() @ e) * e).sum(0)
    assert torch.allclose(moments.error(w, table, codes).double(), seen, rtol=1e-4)
    assert not torch.allclose(((moments.hessian.double() @ e) * e).sum(0), seen, rtol=1e-2), "the damping must show for this to test anything"


def test_each_row_keeps_its_best_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    stats, w = inputs(64), torch.randn(8, 64)
    moments = moments_of(stats, 64)
    start = kmeans.fit(w, torch.ones(64), 4).unsqueeze(1).permute(1, 2, 0).contiguous()
    codes = moments.sweep(w.T.contiguous(), start)
    once = learned._refined(w.T.contiguous(), start, codes, moments, 1)
    monkeypatch.setattr(learned._Moments, "sweep", lambda self, w, table: torch.zeros_like(w, dtype=torch.uint8))
    spoiled = learned._refined(w.T.contiguous(), start, codes, moments, 4)
    assert all(torch.equal(a, b) for a, b in zip(once, spoiled, strict=True)), "bad sweeps must not replace good ones"


@pytest.mark.parametrize(("bits", "group"), [(2, 128), (3, 64), (3, 96), (4, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_refit_never_costs_a_row(bits: int, group: int, dtype: torch.dtype) -> None:
    w, stats = torch.randn(40, 128), inputs(128)
    plain = sketch(w, stats, group, dtype, bits=bits, refit=False)
    better = sketch(w, stats, group, dtype, bits=bits)
    before, after = row_errors(w, plain, stats), row_errors(w, better, stats)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.95 * float(before.sum())


def test_every_step_pays() -> None:
    w, stats = torch.randn(64, 192) * torch.rand(64, 1), inputs(192)
    whole = relative_error(w, sketch(w, stats, bits=2), stats)
    unrefined = relative_error(w, sketch(w, stats, bits=2, refit=False), stats)
    assert whole < unrefined
    assert unrefined < relative_error(w, sketch(w, stats, bits=2, refit=False, feedback=False), stats)
    assert unrefined < relative_error(w, sketch(w, stats, bits=2, refit=False, start="uniform"), stats)


def test_more_tables_err_less() -> None:
    w, stats = torch.randn(32, 256) * torch.logspace(-0.5, 0.5, 256), inputs(256)
    errors = [relative_error(w, sketch(w, stats, 256 // gpr, bits=2), stats) for gpr in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("bits", "group", "segments"), [(2, 96, 1), (3, 40, 3), (4, 50, 2)])
def test_what_is_stored(bits: int, group: int, segments: int) -> None:
    w, stats = torch.randn(20, 96), inputs(96)
    packed, row = PACKERS["sketch"](w, stats, Quant(bits=bits, packer="sketch"), group, torch.float16)
    assert isinstance(packed.values, Table) and packed.group == group
    assert packed.values.table.shape == (20, segments, 1 << bits) and packed.values.table.dtype == torch.float16
    assert packed.stored_bits() == 20 * 96 * bits + 20 * segments * (1 << bits) * 16
    assert row == {"damp": 0.01, "note": ""}
    assert relative_error(w, packed, stats) < {2: 0.5, 3: 0.25, 4: 0.15}[bits]


def test_same_input_same_bits_and_rows_alone() -> None:
    w, stats = torch.randn(30, 64), inputs(64)
    first, again = sketch(w, stats, bits=3), sketch(w, stats, bits=3)
    assert all(torch.equal(t, again.tensors()[name]) for name, t in first.tensors().items())
    few = sketch(w[:11], stats, bits=3)
    assert torch.allclose(row_errors(w[:11], few, stats), row_errors(w, first, stats)[:11], rtol=0.2)


def test_panels_change_nothing_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    w, stats = torch.randn(30, 64), inputs(64)
    whole = sketch(w, stats, bits=3)
    monkeypatch.setattr(learned, "PANEL", 64 * 7)
    parts = sketch(w, stats, bits=3)
    assert torch.allclose(row_errors(w, parts, stats), row_errors(w, whole, stats), rtol=0.2)
    assert relative_error(w, parts, stats) == pytest.approx(relative_error(w, whole, stats), rel=0.02)


def test_inputs_that_were_always_zero() -> None:
    w = torch.randn(16, 64)
    x = torch.randn(200, 64)
    x[:, 10:20] = 0
    stats = LayerStats(64)
    stats.add(x)
    w[:, 10:20] = 100.0
    packed = sketch(w, stats, bits=3)
    assert float(packed.dequantize()[:, 10:20].abs().max()) < 5, "what nothing reads must not cost table entries"
    assert float(packed.learned.abs().max()) < 10


def test_without_statistics_the_row_says_so() -> None:
    w = torch.randn(8, 64)
    for stats in (None, LayerStats(64)):
        packed, row = PACKERS["sketch"](w, stats, Quant(packer="sketch"), 64, torch.float16)
        assert row == {"packer": "kmeans", "note": "no calibration tokens reached this layer; plain k-means"}
        assert relative_error(w, packed, None) < 0.2
    stats = LayerStats(64)
    stats.add(torch.randn(4, 64))
    stats.hessian = -torch.eye(64)
    _, row = PACKERS["sketch"](w, stats, Quant(packer="sketch"), 64, torch.float16)
    assert row["packer"] == "kmeans" and "not positive definite" in row["note"]


def test_weights_that_are_not_finite() -> None:
    w = torch.randn(8, 64)
    w[3, 3] = torch.nan
    for name in PACKERS:
        with pytest.raises(NumericError, match="1 of 512 weights"):
            PACKERS[name](w, inputs(64), Quant(packer=name), 64, torch.float16)


def test_rows_of_one_value_and_of_huge_ones() -> None:
    w = torch.zeros(4, 64)
    w[1] = 0.5
    w[2] = torch.randn(64) * 1e-6
    w[3] = torch.randn(64) * 1e4
    stats = inputs(64)
    packed = sketch(w, stats, bits=2, dtype=torch.float16)
    dense = packed.dequantize()
    assert bool(torch.isfinite(dense).all())
    assert torch.equal(dense[:2], w[:2])
    assert relative_error(w[3:], sketch(w[3:], stats, bits=2), stats) < 0.5


def test_squeezellm_follows_the_fisher_information() -> None:
    w, stats = torch.randn(24, 128), inputs(128)
    stats.fisher = torch.rand(24, 128) ** 6
    packed, row = PACKERS["squeezellm"](w, stats, Quant(bits=2, packer="squeezellm"), 128, torch.float32)
    assert row == {"note": ""}
    felt = lambda p: float(((w - p.dequantize()).square() * stats.fisher).sum())
    alike = learned.blind(w, torch.ones(128), Quant(bits=2), 128, torch.float32)
    assert felt(packed) < 0.9 * felt(alike)
    stats.fisher = None
    unseen, row = PACKERS["squeezellm"](w, stats, Quant(bits=2, packer="squeezellm"), 128, torch.float32)
    assert "count alike" in row["note"] and torch.equal(unseen.words, alike.words)
    stats.fisher = torch.zeros(24, 128)
    assert "no gradient" in PACKERS["squeezellm"](w, stats, Quant(bits=2, packer="squeezellm"), 128, torch.float32)[1]["note"]
