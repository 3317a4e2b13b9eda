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
    """The options of least total cost whose total weight is at most `limit`; None where even the lightest weigh more. All numbers from 0."""
    start = time.perf_counter()
    if math.fsum(map(min, weights)) > limit:
        return None
    within = limit
    for _ in range(TRIES):
        picks, gap = _milp(costs, weights, within)
        if picks is None:
            break
        if math.fsum(row[pick] for row, pick in zip(weights, picks, strict=True)) <= limit:
            return Answer(picks, math.fsum(row[pick] for row, pick in zip(costs, picks, strict=True)), gap, time.perf_counter() - start)
        within -= limit * 1e-6
    picks = [min(range(len(row)), key=row.__getitem__) for row in weights]  # the lightest of each fit, as seen above
    return Answer(picks, math.fsum(row[pick] for row, pick in zip(costs, picks, strict=True)), math.inf, time.perf_counter() - start)


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
