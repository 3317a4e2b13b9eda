"""The solver against every combination, and the limits it must keep."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.pipelines.choose.solver import solve

UNIT = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 1 << 20)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(units=st.lists(UNIT, min_size=1, max_size=5), share=st.floats(0, 1.2))
def test_the_best_of_all_combinations(units: list[list[tuple[float, int]]], share: float) -> None:
    costs, weights = [[c for c, _ in unit] for unit in units], [[w for _, w in unit] for unit in units]
    limit = int(share * sum(max(row) for row in weights))
    all_ = [(sum(c for c, _ in way), sum(w for _, w in way)) for way in itertools.product(*units)]
    fitting = [cost for cost, weight in all_ if weight <= limit]
    found = solve(costs, weights, limit)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert sum(row[pick] for row, pick in zip(weights, found.picks, strict=True)) <= limit
    assert found.cost == pytest.approx(min(fitting), rel=1e-4, abs=1e-4)


def test_no_room_leaves_the_cheapest_of_the_lightest() -> None:
    found = solve([[0.0, 1.0, 0.0], [2.0, 1.0]], [[1, 0, 0], [5, 5]], 5)
    assert found is not None
    assert (found.picks, found.cost, found.gap) == ([2, 1], 1.0, pytest.approx(0))


def test_a_model_of_many_layers_is_solved_to_the_gap() -> None:
    """As many units and options as a model of 70B has, damages that fall with bits unlike from layer to layer."""
    costs = [[(1 + (17 * u) % 23) * 4.0**-bits * (1 + group / 256) for bits in (2, 3, 4) for group in (32, 64, 128)] for u in range(320)]
    weights = [[(1 + u % 3) * 4096 * 4096 * (bits + 16 / group) for bits in (2, 3, 4) for group in (32, 64, 128)] for u in range(320)]
    limit = 3.1 * sum((1 + u % 3) * 4096 * 4096 for u in range(320))
    found = solve(costs, weights, limit)
    assert found is not None
    assert found.gap <= 1e-4
    assert sum(row[pick] for row, pick in zip(weights, found.picks, strict=True)) <= limit
