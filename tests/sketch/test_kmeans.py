"""Weighted k-means of rows against the exact optimum by dynamic programming, and on rows that leave clusters empty."""

import pytest
import torch
from torch import Tensor

from compressor.sketch import kmeans


def error(w: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """Weighted squared error of each row with the nearest of its values, float64 [R]."""
    distance = (w.double().unsqueeze(2) - values.double().unsqueeze(1)).square().amin(2)
    return (distance * weight.double()).sum(1)


def optimum(w: list[float], weight: list[float], count: int) -> float:
    """The least error that `count` values can have: best[c][j] over cuts of the sorted row."""
    x, m = zip(*sorted(zip(w, weight, strict=True)), strict=True)
    size = len(x)

    def cost(i: int, j: int) -> float:
        mass = sum(m[i:j])
        mean = sum(a * b for a, b in zip(x[i:j], m[i:j], strict=True)) / mass if mass else 0.0
        return sum(b * (a - mean) ** 2 for a, b in zip(x[i:j], m[i:j], strict=True))

    best = [0.0] + [float("inf")] * size
    for _ in range(count):
        best = [min(best[i] + (cost(i, j) if i < j else 0.0) for i in range(j + 1)) for j in range(size + 1)]
    return best[size]


@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy", "two lumps"])
def test_near_the_exact_optimum(count: int, kind: str) -> None:
    w = torch.randn(12, 40)
    w = {"normal": w, "heavy": w**3, "two lumps": w * 0.1 + (w > 0.5) * 5}[kind]
    weight = torch.rand(40) ** 4
    values = kmeans.fit(w, weight, count)
    best = torch.tensor([optimum(row.tolist(), weight.tolist(), count) for row in w.double()])
    found = error(w, weight, values)
    assert bool((values.diff(dim=1) >= 0).all())
    assert bool((found >= best * (1 - 1e-5) - 1e-9).all()), "below the optimum: the test is wrong"
    assert float((found / best).log().mean().exp()) < 1 + 1e-5


def test_better_than_where_it_starts_and_than_plain_values() -> None:
    w, weight = torch.randn(64, 200), torch.rand(64, 200)
    found = error(w, weight, kmeans.fit(w, weight, 8))
    assert bool((found <= error(w, weight, kmeans.uniform(w, 8))).all())
    assert bool((found <= error(w, weight, kmeans.fit(w, torch.ones(200), 8)) * (1 + 1e-5)).float().mean() > 0.95)


def test_a_fixed_point_of_both_steps() -> None:
    w, weight = torch.randn(20, 150), torch.rand(150)
    values = kmeans.fit(w, weight, 8).double()
    codes = torch.searchsorted(((values[:, 1:] + values[:, :-1]) / 2).contiguous(), w.double())
    for c in range(8):
        mask = (codes == c) * weight.double()
        mean = (mask * w.double()).sum(1) / mask.sum(1)
        assert float(((mean - values[:, c]).abs() / w.std()).nan_to_num().max()) < 2e-2
    assert bool((codes.sort(dim=1).values.diff(dim=1).sum(1) >= 6).all()), "values lie idle"


def test_rows_with_few_different_weights_cost_nothing() -> None:
    w = torch.zeros(4, 50)
    w[1] = 0.25
    w[2, ::7] = -3.0
    w[3] = torch.arange(50) % 8
    values = kmeans.fit(w, torch.ones(50), 8)
    assert float(error(w, torch.ones(50), values).max()) == 0.0
    assert bool(torch.isfinite(values).all())


def test_an_outlier_does_not_leave_values_idle() -> None:
    w = torch.randn(8, 300)
    w[:, 0] = 1e4
    values = kmeans.fit(w, torch.ones(300), 4)
    assert bool((values[:, -1] == 1e4).all())
    rest = kmeans.fit(w[:, 1:], torch.ones(299), 3)
    assert torch.allclose(error(w, torch.ones(300), values), error(w[:, 1:], torch.ones(299), rest), rtol=0.05)


def test_weights_of_any_size_and_none() -> None:
    w = torch.randn(6, 100)
    weight = torch.rand(100) ** 4
    assert torch.equal(kmeans.fit(w, weight, 8), kmeans.fit(w, weight * 2.0**-100, 8)), "only the ratio of weights counts"
    assert torch.equal(kmeans.fit(w, torch.zeros(100), 8), kmeans.fit(w, torch.ones(100), 8))
    weight[50:] = 0
    assert torch.allclose(kmeans.fit(w, weight, 8), kmeans.fit(w[:, :50], weight[:50], 8), atol=0.3)
    assert bool(torch.isfinite(kmeans.fit(w, torch.logspace(-30, 30, 100), 16)).all())


def test_rows_do_not_see_each_other() -> None:
    w, weight = torch.randn(10, 64), torch.rand(64)
    whole = kmeans.fit(w, weight, 8)
    alone = torch.cat([kmeans.fit(row.unsqueeze(0), weight, 8) for row in w])
    assert torch.allclose(error(w, weight, whole), error(w, weight, alone), rtol=1e-3)
