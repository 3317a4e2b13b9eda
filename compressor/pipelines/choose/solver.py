"""One option for every unit, so that damages add up to the least that a size allows, or sizes to the least that a damage allows.

    minimise  sum_u a[u][x_u]   such that   sum_u b[u][x_u] <= limit

This is the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11), solved as a mixed-integer
programme by HiGHS through scipy, to GAP or for SECONDS; both come back with the answer. Damages are floats and sizes whole numbers; the limit is kept
exactly, for the answer is counted again in Python.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from compressor.errors import RecipeError

GAP = 1e-6  # relative distance to the best that may remain
SECONDS = 60.0
TRIES = 20  # limits a little lower, where rounding inside the solver went beyond the one asked for

Numbers = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Answer:
    """The option of every unit, what they cost, and how far from the best that may be at most (0: it is the best)."""

    picks: list[int]
    cost: float
    gap: float
    seconds: float


def solve(costs: Numbers, weights: Numbers, limit: float) -> Answer | None:
    """The options of least total cost whose total weight is at most `limit`; None where even the lightest weigh more. All numbers from 0.

    Where the solver finds nothing in its time the lightest option of each unit stands, and the gap is infinite.
    """
    start, least = time.perf_counter(), math.fsum(map(min, weights))
    if least > limit:
        return None
    spare = limit - least
    fits = [[i for i, weight in enumerate(row) if weight - min(row) <= spare] for row in weights]  # others no mix can hold
    few = [[[row[i] for i in own] for row, own in zip(table, fits, strict=True)] for table in (costs, weights)]
    within = limit
    for _ in range(TRIES if any(len(own) > 1 for own in fits) else 0):
        found, gap = _milp(few[0], few[1], within)
        if found is None:
            break
        picks = [own[i] for own, i in zip(fits, found, strict=True)]
        if _sum(weights, picks) <= limit:
            return Answer(picks, _sum(costs, picks), gap, time.perf_counter() - start)
        within -= limit * 1e-6
    picks = [min((weight[i], cost[i], i) for i in own)[2] for own, cost, weight in zip(fits, costs, weights, strict=True)]
    gap = 0.0 if all(len(own) == 1 for own in fits) else math.inf
    return Answer(picks, _sum(costs, picks), gap, time.perf_counter() - start)


def _sum(rows: Numbers, picks: Sequence[int]) -> float:
    return math.fsum(row[pick] for row, pick in zip(rows, picks, strict=True))


def _milp(costs: Numbers, weights: Numbers, limit: float) -> tuple[list[int] | None, float]:
    """One variable an option, scaled so that the solver's tolerances mean the same for bytes and nats."""
    try:
        import numpy as np
        from scipy import optimize, sparse
    except ImportError:
        raise RecipeError("choosing bits by layer needs scipy: pip install scipy") from None
    counts = [len(row) for row in costs]
    cost, weight = np.concatenate([np.asarray(row, float) for row in costs]), np.concatenate([np.asarray(row, float) for row in weights])
    units = np.repeat(np.arange(len(counts)), counts)
    one_each = sparse.csr_array((np.ones(len(cost)), (units, np.arange(len(cost)))))  # [units, options]
    scale = max(limit, 1e-300)
    found = optimize.milp(
        cost / max(float(cost.max()), 1e-300), integrality=np.ones(len(cost)), bounds=optimize.Bounds(0, 1),
        constraints=[optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint((weight / scale)[None], -np.inf, 1)],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )  # fmt: skip
    if found.x is None:
        return None, math.inf
    ends = np.cumsum(counts)
    picks = [int(found.x[end - count : end].argmax()) for end, count in zip(ends, counts, strict=True)]
    return picks, float(found.mip_gap or 0.0)
