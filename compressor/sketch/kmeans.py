"""Weighted k-means in one dimension, for all rows at once: the values that stand for a row of weights with the least weighted squared error.

Lloyd's iteration on sorted rows: clusters are stretches of the sorted row, so their weighted sums are differences of prefix sums (float64) and
an iteration is a binary search of k - 1 borders per row. A cluster without weight takes half of the one with the largest error, which is split
at its mean; so the error never rises, and no value lies idle while a row has enough different weights.

Lloyd's minimum is local: two starts, evenly spaced values and weighted quantiles, are tried, and each row keeps the better one.
Price: a sort, and k log(L) per row and iteration; about 60 bytes a weight of the panel.
"""

import torch
from torch import Tensor

ITERATIONS = 100
SETTLED = 1e-6  # share of a row's error by which an iteration must lower it for any row, or the iteration ends


def fit(w: Tensor, weight: Tensor, count: int) -> Tensor:
    """w [R, L], weight [L] or [R, L], not negative -> `count` values per row in ascending order, float32 [R, count].

    Rows with fewer than `count` different weights repeat values. Where all weights of a row are 0, its columns count alike.
    """
    rows = _Sorted(w, weight)
    best, least = _lloyd(rows, rows.quantiles(count))
    other, error = _lloyd(rows, uniform(w, count).double())
    return torch.where((error < least).unsqueeze(1), other, best).float()


def uniform(w: Tensor, count: int) -> Tensor:
    """Evenly spaced values from the least to the largest weight of each row of w [R, L], [R, count]."""
    low, high = w.aminmax(dim=1, keepdim=True)
    return low + (high - low) * torch.linspace(0, 1, count, device=w.device)


def nearest(w: Tensor, values: Tensor) -> Tensor:
    """Codes int64 [R, L] of w [R, L] among ascending values [R, K]; a tie goes to the lower one."""
    return torch.searchsorted(_borders(values), w.contiguous())


def _borders(values: Tensor) -> Tensor:
    return ((values[:, 1:] + values[:, :-1]) / 2).contiguous()


class _Sorted:
    """Rows in ascending order, float64 [R, L], with the prefix sums of weight, weight * w and weight * w**2, [R, L + 1]."""

    def __init__(self, w: Tensor, weight: Tensor):
        self.x, order = w.double().sort(dim=1)
        share = weight.double().expand_as(self.x).gather(1, order)
        total = share.sum(1, keepdim=True)
        share = torch.where(total > 0, share / total.clamp(min=torch.finfo(torch.float64).tiny), 1 / w.shape[1])
        self.sums = [torch.nn.functional.pad(t.cumsum(1), (1, 0)) for t in (share, share * self.x, share * self.x.square())]

    def quantiles(self, count: int) -> Tensor:
        """The points below which shares 1/(2 count), 3/(2 count), … of the weight lie, [R, count]."""
        shares = (torch.arange(count, dtype=torch.float64, device=self.x.device) + 0.5) / count
        at = torch.searchsorted(self.sums[0][:, 1:].contiguous(), shares.repeat(len(self.x), 1))
        return self.x.gather(1, at.clamp_(max=self.x.shape[1] - 1))

    def edges(self, values: Tensor) -> Tensor:
        """Cluster c of ascending values [R, K] is columns edges[c] to edges[c + 1] - 1; int64 [R, K + 1]."""
        inner = torch.searchsorted(self.x, _borders(values))
        return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=self.x.shape[1])

    def moments(self, first: Tensor, stop: Tensor) -> list[Tensor]:
        """Weight, first and second moment of the stretches from `first` to before `stop`, both int64 [R, K]."""
        return [sums.gather(1, stop) - sums.gather(1, first) for sums in self.sums]

    def mean(self, first: Tensor, stop: Tensor, otherwise: Tensor) -> Tensor:
        """Weighted means of stretches, kept inside them against cancellation; `otherwise` where a stretch has no weight."""
        mass, moment, _ = self.moments(first, stop)
        low = self.x.gather(1, first.clamp(max=self.x.shape[1] - 1))
        high = self.x.gather(1, (stop - 1).clamp(min=0))
        return torch.where(_empty(mass, first, stop), otherwise, (moment / mass).clamp(low, torch.maximum(low, high)))


def _empty(mass: Tensor, first: Tensor, stop: Tensor) -> Tensor:
    return (mass <= 0) | (first >= stop)


def _lloyd(rows: _Sorted, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [R, K] at a minimum, ascending, and the weighted error of each row, [R]."""
    before = torch.full((len(values),), torch.inf, dtype=torch.float64, device=values.device)
    for _ in range(ITERATIONS):
        edges = rows.edges(values)
        first, stop = edges[:, :-1], edges[:, 1:]
        values = rows.mean(first, stop, values)
        mass, moment, square = rows.moments(first, stop)
        empty = _empty(mass, first, stop)
        errors = torch.where(empty, 0.0, (square - values * moment).clamp_(min=0))
        total = errors.sum(1)
        values = _split(rows, values, first, stop, errors, empty).sort(dim=1).values
        if not bool(((before - total > SETTLED * total) | empty.any(1) & (total > 0)).any()):
            break
        before = total
    return values, total


def _split(rows: _Sorted, values: Tensor, first: Tensor, stop: Tensor, errors: Tensor, empty: Tensor) -> Tensor:
    """Gives the first empty cluster of each row, if any, half of its worst cluster, cut at the mean."""
    worst, idle = errors.argmax(1, keepdim=True), empty.int().argmax(1, keepdim=True)
    a, b = first.gather(1, worst), stop.gather(1, worst)
    middle = values.gather(1, worst)
    cut = torch.minimum(torch.maximum(torch.searchsorted(rows.x, middle.contiguous()), a), b)
    possible = empty.any(1, keepdim=True) & (cut > a) & (cut < b)
    low, high = rows.mean(a, cut, middle), rows.mean(cut, b, middle)
    out = values.scatter(1, worst, low).scatter(1, idle, high)
    return torch.where(possible, out, values)
