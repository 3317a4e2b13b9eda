"""Where a low-rank path beside a packed weight starts, found while the dense weight is still at hand.

    W ~ Q + B A        Q = pack(...), A [r, k], B [n, r] float32, H = mean(x xT) of the layer's inputs, [W]_r the best W of rank r

    residual    Q = pack(W); B A = what of rank r makes || (W - Q - B A) H^(1/2) ||_F least. LQER (Zhang et al., 2024, arXiv 2402.02446) scales
                the columns by the sizes of the inputs instead; the exact form is that of CALDERA (Saha et al., 2024, arXiv 2405.18886) and QERA
                (Zhang et al., 2024, arXiv 2410.06040). Without H the plain [W - Q]_r.
    loftq       ROUNDS times in turn Q = pack(W - B A) and B A as above, from B A = 0 (LoftQ, Li et al., 2023, arXiv 2310.08659, algorithm 1,
                which has no H). Of all rounds the one with the least || (W - Q - B A) H^(1/2) || stays; the first is `residual`.
    principal   B A = [W]_r, Q = pack(W - B A) (PiSSA and its QPiSSA, Meng et al., 2024, arXiv 2404.02948).
    eva         Q = pack(W), the rows of A the r leading eigenvectors of H, B = 0 (EVA, Paischer et al., 2024, arXiv 2410.07170; without its
                redistribution of ranks over layers).

The best B A under H needs no root or inverse of H, so inputs that lie in a subspace do no harm: with U [n, r] the leading eigenvectors of E H ET,
E = W - Q, it is U UT E. Each column of B is as long as its row of A, which without H is the usual U S^(1/2), S^(1/2) VT.

Eigenvectors come from an exact decomposition in float64 of layers up to EXACT wide and high, of larger ones by subspace iteration with r + EXTRA
vectors, from a fixed seed, in PASSES products (Halko et al., 2011, arXiv 0909.4061). Price then: (PASSES + 1) (r + EXTRA) (4 n k + 2 k**2)
operations (0.1 TFLOP for 4096 x 11008 and r = 8), no matrix beside E and H; of loftq ROUNDS times that and the packing; all hold a dense copy of W
more, loftq two packed weights. Limits: the error after an iteration was at most 2.3 parts in 10,000 above the least one (docs/log.md); a layer that
saw no tokens gets no eva, and its report row says so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.packed import PackedWeight
from compressor.packing import joined, relative_error
from compressor.stats import UNSEEN, LayerStats

EXACT = 1024
EXTRA = 24
PASSES = 8
ROUNDS = 5
NOTHING = 1e-5  # of a weight's norm

Path = tuple[Tensor, Tensor]  # A [r, k], B [n, r]
Found = tuple[PackedWeight, dict[str, Any], Path | None]  # the packed weight, its report row, and where the path starts
Pack = Callable[[Tensor], tuple[PackedWeight, dict[str, Any]]]


def residual(w: Tensor, pack: Pack, stats: LayerStats | None, rank: int) -> Found:
    packed, facts = pack(w)
    return packed, facts, low_rank(w - packed.dequantize(), _hessian(w, stats), rank)


def loftq(w: Tensor, pack: Pack, stats: LayerStats | None, rank: int) -> Found:
    best: Found | None = None
    path, least = None, torch.inf
    for number in range(ROUNDS):
        packed, facts = pack(w if path is None else _left(w, path))
        path = low_rank(w - packed.dequantize(), _hessian(w, stats), rank)
        error = relative_error(w, packed, stats, path)
        if best is None or error < least:
            best, least = (packed, _noted(facts, f"round {number + 1} of {ROUNDS}"), path), error
    assert best is not None
    return best


def principal(w: Tensor, pack: Pack, stats: LayerStats | None, rank: int) -> Found:
    a, b = low_rank(w, None, rank)
    packed, facts = pack(_left(w, (a, b)))
    return packed, facts, (a, b)


def _left(w: Tensor, path: Path) -> Tensor:
    """w - B A, of which rounding errors are zeros: a path may hold all of a weight."""
    left = w - path[1] @ path[0]
    return left if float(left.norm()) > NOTHING * float(w.norm()) else torch.zeros_like(w)


def eva(w: Tensor, pack: Pack, stats: LayerStats | None, rank: int) -> Found:
    packed, facts = pack(w)
    hessian = _hessian(w, stats)
    if hessian is None:
        return packed, _noted(facts, f"{UNSEEN if stats is None else stats.why}; its path starts at zero"), None
    return packed, facts, (directions(hessian, rank), torch.zeros(w.shape[0], rank, device=w.device))


STARTS: dict[str, Callable[[Tensor, Pack, LayerStats | None, int], Found]] = {
    "residual": residual, "loftq": loftq, "principal": principal, "eva": eva,
}  # fmt: skip
NEEDS: dict[str, tuple[str, ...]] = {"eva": ("hessian",)}  # sums without which a start is none


def check(start: str, rank: int, sums: tuple[str, ...], shapes: dict[str, tuple[int, ...]]) -> None:
    """RecipeError, before any work, if paths of this rank cannot start so beside layers of these shapes, known to statistics of these sums."""
    if start not in STARTS:
        raise RecipeError(f"tune.start={start!r} is no start of a low-rank path: choose zero, {', '.join(STARTS)}")
    if not set(NEEDS.get(start, ())) <= set(sums):
        raise RecipeError(f"tune.start={start} needs statistics of the inputs, which are not collected here: use a calibrated packer, as gptq")
    name = min(shapes, key=lambda n: min(shapes[n]), default="")
    if name and not 1 <= rank <= min(shapes[name]):
        raise RecipeError(f"tune.rank={rank} does not fit {name} of shape {shapes[name]}: use a rank from 1 to {min(shapes[name])}")


def low_rank(e: Tensor, hessian: Tensor | None, rank: int) -> Path:
    """A [r, k] and B [n, r] with the least || (e - B A) H^(1/2) ||_F, of e float32 [n, k]; without H the best approximation of e itself."""
    n, k = e.shape
    if max(n, k) <= EXACT:
        wide = e.double()
        seen = wide if hessian is None else wide @ hessian.double()
        u = torch.linalg.eigh(seen @ wide.T)[1].flip(1)[:, :rank].to(e.dtype)
    else:
        u = _iterated(lambda y: e @ _weighed(e.T @ y, hessian), n, rank, e.device)
    a = u.T @ e  # [r, k]
    size = a.norm(dim=1).sqrt()
    split = torch.where(size > 0, size, 1)  # where nothing is left, B keeps its direction, so that A may learn
    return a / split.unsqueeze(1), (u * split).contiguous()


def directions(hessian: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of H [k, k] as orthonormal rows [r, k], the strongest first."""
    if len(hessian) <= EXACT:
        found = torch.linalg.eigh(hessian.double())[1].flip(1)[:, :rank].to(hessian.dtype)
    else:
        found = _iterated(lambda y: hessian @ y, len(hessian), rank, hessian.device)
    return found.T.contiguous()


def _iterated(times: Callable[[Tensor], Tensor], size: int, rank: int, device: torch.device) -> Tensor:
    """About the leading eigenvectors [size, rank] of the symmetric, positive semidefinite matrix that `times` multiplies [size, c] by."""
    start = torch.randn(size, min(size, rank + EXTRA), generator=torch.Generator().manual_seed(0))
    base = torch.linalg.qr(start.to(device)).Q
    for _ in range(PASSES):
        base = torch.linalg.qr(times(base)).Q
    small = (base.T @ times(base)).double()  # [c, c]
    return base @ torch.linalg.eigh((small + small.T) / 2)[1].flip(1)[:, :rank].to(base.dtype)


def _weighed(y: Tensor, hessian: Tensor | None) -> Tensor:
    return y if hessian is None else hessian @ y


def _hessian(w: Tensor, stats: LayerStats | None) -> Tensor | None:
    return None if stats is None or stats.hessian is None else stats.hessian.to(w.device, torch.float32)


def _noted(facts: dict[str, Any], note: str) -> dict[str, Any]:
    return facts | {"note": joined(facts.get("note", ""), note)}
