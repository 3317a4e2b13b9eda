"""Weighted k-means in one dimension, for all rows at once: the values that stand for a row of weights with the least weighted squared error.

In one dimension a cluster is a stretch of the sorted row, its error a difference of prefix sums, and the best clusters follow by dynamic
programming: error(c, j) = min over i of error(c - 1, i) + cost(i, j). That is exact up to BUCKETS weights a row. Longer rows are first cut into
BUCKETS stretches, narrow where sensitive weights lie dense (the density (weight * density)**(1/3) of an optimal quantiser: Panter and Dite,
1951), then Lloyd's iteration on the whole row settles the borders, each a binary search. There are no random starts, and no cluster stays
empty while a row has enough different columns that count.

Price: a sort, BUCKETS**2 steps a row and value, and log(L) per row, value and iteration; about 90 bytes a weight of the panel. All in float64.
"""

import torch
from torch import Tensor

BUCKETS = 128
CELLS = {"cpu": 1 << 17, "cuda": 1 << 23}  # numbers of the cost tables of some rows, of which seven live; in cache on a CPU
ITERATIONS = 50
SETTLED = 1e-6  # relative change of all rows' errors that ends the iteration


def fit(w: Tensor, weight: Tensor, count: int) -> Tensor:
    """w [R, L], weight [L] or [R, L], not negative -> `count` values per row in ascending order, float32 [R, count].

    Rows with fewer than `count` different weights repeat values. Where all weights of a row are 0, its columns count alike.
    """
    rows = _Sorted(w, weight)
    buckets = rows.buckets(min(w.shape[1], BUCKETS))
    size = max(1, CELLS.get(w.device.type, CELLS["cpu"]) // buckets.shape[1] ** 2)
    parts = zip(*(t.split(size) for t in (buckets, *(sums.gather(1, buckets) for sums in rows.sums))), strict=True)
    edges = torch.cat([_best_edges(part, sums, count) for part, *sums in parts])
    return (_lloyd(rows, rows.means(edges)) + rows.center).float()


def uniform(w: Tensor, count: int) -> Tensor:
    """Evenly spaced values from the least to the largest weight of each row of w [R, L], [R, count]."""
    low, high = w.aminmax(dim=1, keepdim=True)
    return low + (high - low) * torch.linspace(0, 1, count, device=w.device)


class _Sorted:
    """Rows about their weighted mean in ascending order, float64 [R, L]; prefix sums of weight, weight * w, weight * w**2, [R, L + 1]."""

    def __init__(self, w: Tensor, weight: Tensor):
        x, order = w.double().contiguous().sort(dim=1)
        share = weight.double().expand_as(x).gather(1, order)
        total = share.sum(1, keepdim=True)
        self.share = torch.where(total > 0, share / total.clamp(min=torch.finfo(torch.float64).tiny), 1 / w.shape[1])
        self.center = (self.share * x).sum(1, keepdim=True)
        self.x = x - self.center
        terms = (self.share, self.share * self.x, self.share * self.x.square())
        self.sums = [torch.nn.functional.pad(t.cumsum(1), (1, 0)) for t in terms]

    def buckets(self, count: int) -> Tensor:
        """Edges of `count` stretches of each row, ascending int64 [R, count + 1]; every weight alone if the row has no more."""
        rows, size = self.x.shape
        if count == size:
            return torch.arange(size + 1, device=self.x.device).repeat(rows, 1)
        gaps = self.x.diff(dim=1).square()
        density = ((self.share[:, 1:] + self.share[:, :-1]) * gaps).pow(1 / 3).cumsum(1)  # [R, L - 1]
        shares = torch.arange(1, count, device=self.x.device) / count * density[:, -1:]
        return _closed(torch.searchsorted(density, shares) + 1, size)

    def edges(self, values: Tensor) -> Tensor:
        """Cluster c of ascending values [R, K] is columns edges[c] to edges[c + 1] - 1; int64 [R, K + 1]."""
        return _closed(torch.searchsorted(self.x, ((values[:, 1:] + values[:, :-1]) / 2).contiguous()), self.x.shape[1])

    def means(self, edges: Tensor, otherwise: Tensor | None = None) -> Tensor:
        """Weighted means of the clusters, kept inside them against cancellation; `otherwise`, or the next weight, where one has no weight."""
        first, stop = edges[:, :-1], edges[:, 1:]
        mass, moment = (sums.gather(1, edges).diff(dim=1) for sums in self.sums[:2])
        low = self.x.gather(1, first.clamp(max=self.x.shape[1] - 1))
        high = self.x.gather(1, (stop - 1).clamp(min=0))
        empty = (mass <= 0) | (first >= stop)
        return torch.where(empty, low if otherwise is None else otherwise, (moment / mass).clamp(low, torch.maximum(low, high)))

    def error(self, values: Tensor, edges: Tensor) -> Tensor:
        """The weighted error of each row, [R]."""
        mass, moment, square = (sums.gather(1, edges).diff(dim=1) for sums in self.sums)
        return (square - 2 * values * moment + values.square() * mass).sum(1)


def _closed(inner: Tensor, size: int) -> Tensor:
    """0 in front of, `size` behind the inner edges."""
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=size)


def _best_edges(buckets: Tensor, sums: list[Tensor], count: int) -> Tensor:
    """Edges [R, count + 1] of the best `count` clusters among unions of neighbouring buckets; buckets and each of sums [R, B + 1]."""
    mass, moment, square = (t.unsqueeze(1) - t.unsqueeze(2) for t in sums)  # [R, from, to]
    cost = square - torch.where(mass > 0, moment.square() / mass, 0.0)
    size = buckets.shape[1]
    cost = cost.clamp_(min=0).masked_fill_(torch.ones(size, size, dtype=torch.bool, device=cost.device).tril(-1), torch.inf)
    least, origins = cost[:, 0], []  # [R, to]: one cluster
    for _ in range(count - 1):
        least, origin = (least.unsqueeze(2) + cost).min(1)
        origins.append(origin)
    at = torch.full((len(buckets), 1), size - 1, device=buckets.device)
    path = [at]
    for origin in reversed(origins):
        at = origin.gather(1, at)
        path.append(at)
    path.append(torch.zeros_like(at))
    return buckets.gather(1, torch.cat(path[::-1], 1))


def _lloyd(rows: _Sorted, values: Tensor) -> Tensor:
    """Values [R, K] at a minimum, ascending."""
    before = torch.inf
    for _ in range(ITERATIONS):
        values = values.sort(dim=1).values
        edges = rows.edges(values)
        values = rows.means(edges, values)
        error = float(rows.error(values, edges).sum())
        if not error < before * (1 - SETTLED):
            break
        before = error
    return values.sort(dim=1).values
