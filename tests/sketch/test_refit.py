"""Tables by least squares and codes by descent, against float64 solutions row by row."""

import pytest
import torch
from torch import Tensor

from compressor.sketch import refit

torch.manual_seed(0)


def problem(n: int, k: int, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w [k, n], ascending tables [S, K, n], codes [k, n], and a well-conditioned H [k, k]."""
    x = torch.randn(4 * k, k) @ (torch.eye(k) + 0.3 * torch.randn(k, k) / k**0.5)
    count = 1 << bits
    table = torch.randn(-(-k // group), count, n).sort(dim=1).values
    return torch.randn(k, n), table, torch.randint(0, count, (k, n), dtype=torch.uint8), x.T @ x / len(x)


def error(w: Tensor, table: Tensor, codes: Tensor, hessian: Tensor, group: int) -> Tensor:
    e = (w - refit.spread(table, codes, group)).double()
    return ((hessian.double() @ e) * e).sum(0)


def pull_of(w: Tensor, table: Tensor, codes: Tensor, hessian: Tensor, group: int) -> Tensor:
    return hessian @ (w - refit.spread(table, codes, group))


@pytest.mark.parametrize(("k", "group", "bits"), [(48, 48, 3), (50, 20, 2), (64, 32, 4), (33, 33, 2)])
def test_tables_are_the_least_squares_solution(k: int, group: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "SYSTEMS", (k << bits) * 2)  # two rows at a time
    w, table, codes, hessian = problem(5, k, group, bits)
    pull = pull_of(w, table, codes, hessian, group)
    found = refit.refit_tables(table, codes, pull, hessian, group)
    root = torch.linalg.cholesky(hessian.double()).T
    for row in range(w.shape[1]):
        flat = (torch.arange(k) // group << bits) + codes[:, row].long()
        hot = torch.nn.functional.one_hot(flat, table.shape[0] << bits).double()
        used = hot.any(0)
        best = torch.linalg.lstsq(root @ hot[:, used], (root @ w[:, row].double()).unsqueeze(1)).solution.squeeze(1)
        assert torch.allclose(found[..., row].flatten()[used].double(), best, rtol=1e-3, atol=1e-4)
        assert torch.equal(found[..., row].flatten()[~used], table[..., row].flatten()[~used]), "entries without codes stay"
    assert torch.allclose(pull, pull_of(w, found, codes, hessian, group), atol=1e-3), "the pull follows"


def test_at_the_optimum_nothing_moves() -> None:
    w, table, codes, hessian = problem(6, 40, 40, 2)
    pull = pull_of(w, table, codes, hessian, 40)
    once = refit.refit_tables(table, codes, pull, hessian, 40)
    again = refit.refit_tables(once, codes, pull, hessian, 40)
    assert torch.allclose(once, again, atol=1e-4)
    exact = refit.spread(table, codes, 40)
    nothing = torch.zeros(40, 6)
    assert torch.equal(refit.refit_tables(table, codes, nothing, hessian, 40), table)
    assert float(error(exact, table, codes, hessian, 40).max()) == 0.0


def test_a_singular_moment_moves_nothing_to_infinity() -> None:
    w, table, codes, _ = problem(4, 32, 32, 2)
    x = torch.randn(3, 32)
    hessian = x.T @ x  # rank 3, four entries
    found = refit.refit_tables(table, codes, pull_of(w, table, codes, hessian, 32), hessian, 32)
    assert bool(torch.isfinite(found).all())


def test_sorting_changes_no_weight() -> None:
    _, table, codes, _ = problem(7, 50, 20, 3)
    shuffled = table[:, torch.randperm(8)]
    ordered, moved = refit.sort_tables(shuffled, codes, 20)
    assert bool((ordered.diff(dim=1) >= 0).all())
    assert torch.equal(refit.spread(ordered, moved, 20), refit.spread(shuffled, codes, 20))


@pytest.mark.parametrize("group", [300, 130])
def test_codes_go_downhill_to_where_no_single_move_helps(group: int) -> None:
    w, table, codes, hessian = problem(9, 300, group, 2)  # more than two blocks of columns
    pull = pull_of(w, table, codes, hessian, group)
    before = error(w, table, codes, hessian, group)
    for _ in range(40):
        old = codes.clone()
        refit.move_codes(table, codes, pull, hessian, group)
        after = error(w, table, codes, hessian, group)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
        if torch.equal(old, codes):
            break
    assert torch.equal(old, codes), "the descent ends"
    assert torch.allclose(pull, pull_of(w, table, codes, hessian, group), atol=2e-3)
    for j in range(0, 300, 37):
        for c in range(4):
            other = codes.clone()
            other[j] = c
            assert bool((error(w, table, other, hessian, group) >= before * (1 - 1e-5)).all())


def test_the_nearest_entry() -> None:
    _, table, _, _ = problem(6, 40, 16, 3)
    w = torch.randn(40, 6)
    codes = refit.nearest_codes(w, table, 16)
    distance = (w - refit.spread(table, codes, 16)).abs()
    for c in range(8):
        assert bool((distance <= (w - refit.spread(table, torch.full_like(codes, c), 16)).abs() + 1e-6).all())
