"""Starts of low-rank paths against decompositions in float64, and against each other."""

import pytest
import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.packed import PackedWeight
from compressor.packing import relative_error
from compressor.pipelines.packers import PACKERS
from compressor.quant import starts
from compressor.recipe import Quant
from compressor.stats import LayerStats
from tests.tolerances import RELATIVE, error


def weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated(k: int, tokens: int = 1024) -> LayerStats:
    """Inputs from a mixed, unevenly scaled source."""
    draw = torch.Generator().manual_seed(1)
    mix = torch.randn(k, k, generator=draw) / k**0.5 + 0.1 * torch.randn(k, 1, generator=draw)
    stats = LayerStats(k)
    stats.add(torch.randn(tokens, k, generator=draw) @ mix * torch.rand(k, generator=draw).add(0.1))
    return stats


def energy(e: Tensor, hessian: Tensor | None) -> float:
    seen = e.double() if hessian is None else e.double() @ hessian.double()
    return float((seen * e.double()).sum())


def best(e: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """The product of rank r nearest to e under a positive definite H, by its root: [e R]_r R^-1, float64."""
    values, vectors = torch.linalg.eigh(hessian.double())
    root = vectors * values.sqrt() @ vectors.T
    u, s, vt = torch.linalg.svd(e.double() @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(root)


def packer(name: str, stats: LayerStats | None, bits: int, group: int = 32) -> starts.Pack:
    return lambda w: PACKERS[name](w, stats, Quant(bits=bits), w.shape[1] if PACKERS[name].table else group, torch.float16)


@pytest.mark.parametrize(("n", "k"), [(48, 96), (96, 48)])
def test_low_rank_is_the_singular_value_decomposition(n: int, k: int) -> None:
    e = weight(n, k)
    u, s, vt = torch.linalg.svd(e.double(), full_matrices=False)
    a, b = starts.low_rank(e, None, 5)
    assert a.shape == (5, k) and b.shape == (n, 5) and a.dtype == b.dtype == torch.float32
    assert error(b @ a, (u[:, :5] * s[:5]) @ vt[:5]) < RELATIVE[torch.float32]
    assert error(a @ a.T, torch.diag(s[:5])) < RELATIVE[torch.float32]  # the root of S on either side
    assert error(b.T @ b, torch.diag(s[:5])) < RELATIVE[torch.float32]


def test_under_h_it_is_that_of_the_weighted_error() -> None:
    e, hessian = weight(40, 64), correlated(64).hessian
    assert hessian is not None
    a, b = starts.low_rank(e, hessian, 6)
    reference = best(e, hessian, 6)
    assert error(b @ a, reference) < 10 * RELATIVE[torch.float32]  # the root and its inverse lose digits
    plain = starts.low_rank(e, None, 6)
    assert energy(e - b @ a, hessian) <= energy(e - reference, hessian) * (1 + 1e-6)
    assert energy(e - b @ a, hessian) < 0.99 * energy(e - plain[1] @ plain[0], hessian)
    assert energy(e - plain[1] @ plain[0], None) < energy(e - b @ a, None)


def test_inputs_in_a_subspace_do_no_harm() -> None:
    e, stats = weight(40, 64), correlated(64, tokens=10)
    a, b = starts.low_rank(e, stats.hessian, 10)
    assert energy(e - b @ a, stats.hessian) < 1e-8 * energy(e, stats.hessian)  # ten directions are all there are
    assert float((b @ a).norm()) < float(e.norm())


def test_nothing_left_over_gives_a_path_that_can_learn() -> None:
    a, b = starts.low_rank(torch.zeros(8, 16), None, 3)
    assert not a.any() and bool((b.norm(dim=0) > 0.9).all())


@pytest.mark.parametrize("weighted", [False, True])
def test_the_iteration_comes_near_the_least_error(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    e, hessian = weight(300, 400), correlated(400).hessian if weighted else None
    exact = starts.low_rank(e, hessian, 8)
    monkeypatch.setattr(starts, "EXACT", 1)
    found, again = starts.low_rank(e, hessian, 8), starts.low_rank(e, hessian, 8)
    least, near = (energy(e - b @ a, hessian) ** 0.5 for a, b in (exact, found))
    assert least <= near * (1 + 1e-6) and near < 1.001 * least
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def test_directions_are_those_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian = correlated(96).hessian
    assert hessian is not None
    hessian = hessian + 5 * torch.diag(torch.arange(96) < 4)  # four directions far above the rest
    values, vectors = torch.linalg.eigh(hessian.double())
    a = starts.directions(hessian, 4)
    assert error(a @ a.T, torch.eye(4)) < RELATIVE[torch.float32]
    assert error((a @ hessian @ a.T).diagonal(), values.flip(0)[:4]) < RELATIVE[torch.float32]
    assert error(a.T @ a, vectors[:, -4:] @ vectors[:, -4:].T) < 10 * RELATIVE[torch.float32]
    monkeypatch.setattr(starts, "EXACT", 1)
    assert error(starts.directions(hessian, 4).T @ starts.directions(hessian, 4), a.T @ a) < 1e-3


@pytest.mark.parametrize("name", sorted(PACKERS))
@pytest.mark.parametrize("bits", [2, 3])
def test_loftq_is_never_worse_than_residual_which_is_better_than_no_path(name: str, bits: int) -> None:
    w, stats = weight(48, 64), correlated(64)
    stats.fisher = torch.ones_like(w)
    seen = stats if PACKERS[name].needs else None
    pack = packer(name, stats, bits)
    plain = relative_error(w, pack(w)[0], seen)
    errors = []
    for start in (starts.residual, starts.loftq):
        packed, _, path = start(w, pack, seen, 4)
        errors.append(relative_error(w, packed, seen, path))
    assert errors[1] <= errors[0] < plain


def test_loftq_keeps_the_best_round() -> None:
    """A packer that gets worse at every call leaves the first round."""
    w, calls = weight(32, 64), 0

    def pack(rest: Tensor) -> tuple[PackedWeight, dict]:
        nonlocal calls
        calls += 1
        return packer("rtn", None, 4 if calls == 1 else 2)(rest)

    packed, facts, path = starts.loftq(w, pack, None, 4)
    first = starts.residual(w, packer("rtn", None, 4), None, 4)
    assert calls == starts.ROUNDS and facts["note"] == f"round 1 of {starts.ROUNDS}" and path is not None and first[2] is not None
    assert torch.equal(packed.words, first[0].words) and torch.equal(path[0], first[2][0])


def test_principal_takes_strong_directions_out_of_the_grid() -> None:
    draw = torch.Generator().manual_seed(3)
    w = weight(64, 128) + torch.randn(64, 4, generator=draw) @ torch.randn(4, 128, generator=draw)
    pack = packer("rtn", None, 2)
    packed, _, path = starts.principal(w, pack, None, 4)
    assert path is not None
    u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
    assert error(path[1] @ path[0], (u[:, :4] * s[:4]) @ vt[:4]) < RELATIVE[torch.float32]
    assert relative_error(w, packed, None, path) < 0.1 * relative_error(w, pack(w)[0], None)


def test_eva_leaves_the_weight_as_it_is_and_says_where_there_were_no_inputs() -> None:
    w, stats = weight(24, 64), correlated(64)
    pack = packer("gptq", stats, 3)
    packed, _, path = starts.eva(w, pack, stats, 4)
    assert torch.equal(packed.words, pack(w)[0].words) and path is not None
    assert path[0].shape == (4, 64) and path[1].shape == (24, 4) and not path[1].any()
    unseen = LayerStats(64)
    _, facts, path = starts.eva(w, packer("gptq", unseen, 3), unseen, 4)
    assert path is None and "its path starts at zero" in facts["note"]


def test_what_cannot_start_is_refused() -> None:
    shapes = {"one": (64, 64), "two": (16, 64)}
    starts.check("loftq", 16, (), shapes)
    with pytest.raises(RecipeError, match="choose zero, residual, loftq, principal, eva"):
        starts.check("pissa", 8, (), shapes)
    with pytest.raises(RecipeError, match="needs statistics of the inputs"):
        starts.check("eva", 8, (), shapes)
    with pytest.raises(RecipeError, match="does not fit two of shape"):
        starts.check("residual", 17, (), shapes)
