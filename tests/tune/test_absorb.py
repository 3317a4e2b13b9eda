"""Absorbing a path: nothing for nothing, exact where it can be, never worse than before; against least squares in float64."""

import pytest
import torch
from torch import Tensor

from compressor.packed import Affine, PackedWeight, Table
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Quant
from compressor.stats import LayerStats
from compressor.tune import absorb
from tests.tolerances import RELATIVE, error

KINDS = [("gptq", True), ("gptq", False), ("sketch", True)]


def weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def seen(k: int) -> LayerStats:
    draw = torch.Generator().manual_seed(1)
    stats = LayerStats(k)
    stats.add(torch.randn(1024, k, generator=draw) @ (torch.randn(k, k, generator=draw) / k**0.5) * torch.rand(k, generator=draw).add(0.1))
    return stats


def packed(kind: str, symmetric: bool, n: int = 80, k: int = 96, bits: int = 3, dtype: torch.dtype = torch.float16) -> PackedWeight:
    return PACKERS[kind](weight(n, k), seen(k), Quant(bits=bits, symmetric=symmetric), k if kind == "sketch" else 32, dtype)[0]


def energy(e: Tensor, hessian: Tensor | None) -> Tensor:
    return ((e.double() if hessian is None else e.double() @ hessian.double()) * e.double()).sum(1)


def path(n: int, k: int, size: float = 0.02) -> Tensor:
    return size * weight(n, 4, 7) @ weight(4, k, 8) / 0.05**2 / 2


@pytest.mark.parametrize("way", [absorb.refit_values, absorb.move])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("kind", "symmetric"), KINDS)
def test_a_path_of_zeros_changes_nothing(way, weighted: bool, kind: str, symmetric: bool) -> None:
    old = packed(kind, symmetric)
    new = way(old, old.dequantize(), seen(96).hessian if weighted else None)
    assert torch.equal(new.codes(), old.codes()) and torch.equal(new.learned, old.learned)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_constant_factor_in_each_group_is_taken_up_by_the_scales(symmetric: bool, weighted: bool) -> None:
    old = packed("gptq", symmetric, dtype=torch.float32)
    factor = 1 + 0.4 * (torch.rand(80, 3, generator=torch.Generator().manual_seed(2)) - 0.5)
    target = (old.dequantize().view(80, 3, 32) * factor.unsqueeze(-1)).view(80, 96)
    new = absorb.refit_values(old, target, seen(96).hessian if weighted else None)
    assert torch.equal(new.words, old.words)
    assert error(new.learned, old.learned * factor) < RELATIVE[torch.float32] and error(new.dequantize(), target) < RELATIVE[torch.float32]


@pytest.mark.parametrize("weighted", [False, True])
def test_any_change_of_the_entries_is_taken_up_by_tables(weighted: bool) -> None:
    old = packed("sketch", True, dtype=torch.float32)
    table = old.learned + 0.01 * torch.randn(old.learned.shape, generator=torch.Generator().manual_seed(2))
    target = PackedWeight.pack(old.codes(), Table(table), 3, 96).dequantize()
    new = absorb.refit_values(old, target, seen(96).hessian if weighted else None)
    assert torch.equal(new.words, old.words)
    assert error(new.dequantize(), target) < (1e-4 if weighted else RELATIVE[torch.float32])


@pytest.mark.parametrize("weighted", [False, True])
def test_scales_come_near_their_least_squares_values(weighted: bool) -> None:
    old = packed("gptq", True, dtype=torch.float32)
    hessian, target = seen(96).hessian if weighted else None, old.dequantize() + path(80, 96)
    new = absorb.refit_values(old, target, hessian)
    h = torch.eye(96).double() if hessian is None else hessian.double()
    steps = old.codes().double() - 4
    least = torch.empty(80, dtype=torch.float64)
    for row in range(80):
        d = torch.block_diag(*steps[row].view(3, 32, 1))  # [k, G]
        s = torch.linalg.solve(d.T @ h @ d, d.T @ h @ target[row].double())
        e = target[row].double() - d @ s
        least[row] = e @ h @ e
    found = energy(target - new.dequantize(), hessian)
    assert bool((found >= least * (1 - 1e-4)).all()) and float(found.sum()) < 1.02 * float(least.sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("kind", "symmetric"), KINDS)
def test_no_row_gets_worse_and_moving_codes_helps(kind: str, symmetric: bool, bits: int, weighted: bool) -> None:
    old = packed(kind, symmetric, bits=bits)
    hessian, target = seen(96).hessian if weighted else None, old.dequantize() + path(80, 96)
    values, moved = absorb.refit_values(old, target, hessian), absorb.move(old, target, hessian)
    before, then, last = (energy(target - w.dequantize(), hessian) for w in (old, values, moved))
    assert bool((then <= before * (1 + 1e-5)).all()) and bool((last <= then * (1 + 1e-5)).all())
    assert float(last.sum()) < float(then.sum()) < float(before.sum())
    assert moved.learned.dtype == old.learned.dtype and moved.group == old.group and (moved.zero is None) == (old.zero is None)
    assert old.zero is None or (moved.zero is not None and torch.equal(moved.zero, old.zero))


def test_scales_stay_positive_whatever_the_path() -> None:
    old = packed("gptq", True)
    new = absorb.refit_values(old, -3 * old.dequantize(), None)
    assert bool((new.learned > 0).all()) and bool(torch.isfinite(new.learned).all())


def test_tuned_zeros_stay_and_so_do_their_codes() -> None:
    old = packed("gptq", False)
    assert old.zero is not None
    old = PackedWeight(old.words, Affine(old.learned, old.zero.half() + 0.3), 3, 32, old.shape)
    target = old.dequantize() * 1.1
    for new in (absorb.refit_values(old, target, None), absorb.move(old, target, seen(96).hessian)):
        assert torch.equal(new.words, old.words) and new.zero is old.zero
        assert error(new.dequantize(), target) < 2 * RELATIVE[torch.float16]


def test_rows_in_panels_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    old, hessian = packed("gptq", False, n=200), seen(96).hessian
    target = old.dequantize() + path(200, 96)
    whole = absorb.move(old, target, hessian)
    monkeypatch.setattr(absorb, "PANEL", 64 * 96)
    parts = absorb.move(old, target, hessian)
    assert error(parts.dequantize(), whole.dequantize()) < 1e-2
    torch.testing.assert_close(energy(target - parts.dequantize(), hessian), energy(target - whole.dequantize(), hessian), rtol=0.02, atol=1e-9)
