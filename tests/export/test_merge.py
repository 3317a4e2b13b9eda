"""Merged tasks against plain loops over single numbers, and what must hold of every method, base and dtype."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.export import merge
from compressor.export.merge import METHODS, Options

SHAPES = {"scale": ((6, 2), (4, 3), (5, 1)), "table": ((3, 2, 8), (2, 1, 8), (2, 2, 4))}
NAMES = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.3.mlp.2.up")  # block 2 is not packed
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def values(kind: str, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A base: scales from 0.01 to 1, or entries of tables of either sign."""
    torch.manual_seed(seed)
    scales = lambda shape: 10 ** (-2 * torch.rand(shape))
    return {n: (scales(s) if kind == "scale" else 0.1 * torch.randn(s)).to(dtype) for n, s in zip(NAMES, SHAPES[kind], strict=True)}


def tuned(base: dict[str, Tensor], seed: int, size: float = 0.1) -> dict[str, Tensor]:
    """A task: every value moved at random, a few of them far."""
    torch.manual_seed(100 + seed)
    move = lambda t: size * torch.randn(t.shape) * (1 + 3 * (torch.rand(t.shape) > 0.9))
    return {name: (t.float() * (1 + move(t))).to(t.dtype) for name, t in base.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def numbers(found: dict[str, Tensor]) -> list[float]:
    """All values, layer after layer, row by row."""
    return [x for t in found.values() for x in t.double().flatten().tolist()]


def sizes(base: dict[str, Tensor], kind: str) -> list[float]:
    """The unit of every value, by hand: the scale, or the root mean square of the table that holds it."""
    if kind == "scale":
        return [abs(x) for x in numbers(base)]
    rows = [row for t in base.values() for row in t.double().flatten(0, 1).tolist()]
    return [math.sqrt(sum(x * x for x in row) / len(row)) for row in rows for _ in row]


def top(ranked: list[float], skip: int, count: int) -> set[int]:
    return set(sorted(range(len(ranked)), key=lambda i: -ranked[i])[skip : skip + count])


def changed(base: dict[str, Tensor], task: dict[str, Tensor]) -> list[float]:
    return [t - b for b, t in zip(numbers(base), numbers(task), strict=True)]


def close(found: dict[str, Tensor], wanted: list[float]) -> None:
    assert numbers(found) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.fixture(params=["scale", "table"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def three(kind: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = values(kind, 0)
    return base, [tuned(base, seed) for seed in range(3)]


def test_sum(kind: str, three: Any) -> None:
    base, tasks = three
    weights = (0.5, 0.25, -0.3)
    found, told = merge.merge(base, tasks, kind, Options(weights=weights, scale=0.7))
    moves = [changed(base, t) for t in tasks]
    close(found, [b + 0.7 * sum(w * m[i] for w, m in zip(weights, moves, strict=True)) for i, b in enumerate(numbers(base))])
    assert told == {"method": "sum", "weights": list(weights), "scale": 0.7}


def test_a_sum_of_relative_changes_is_the_same_number(three: Any) -> None:
    base, tasks = three
    found, _ = merge.merge(base, tasks, "table", Options(weights=(0.5, 0.25, 0.1)))
    for name, start in base.items():
        delta = sum(w * (t[name].double() / start.double() - 1) for w, t in zip((0.5, 0.25, 0.1), tasks, strict=True))
        assert torch.allclose(found[name].double(), start.double() * (1 + delta), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", [None, (0.6, 0.3, 1.0), (1.0, -0.5, 0.25)])
def test_ties(kind: str, three: Any, weights: tuple[float, ...] | None) -> None:
    base, tasks = three
    found, told = merge.merge(base, tasks, kind, Options("ties", weights=weights, density=0.5))
    start, units, w = numbers(base), sizes(base, kind), weights or (1.0, 1.0, 1.0)
    moves = [changed(base, t) for t in tasks]
    kept = [top([abs(m / u) for m, u in zip(move, units, strict=True)], 0, round(0.5 * len(start))) for move in moves]
    wanted = []
    for i, b in enumerate(start):
        votes = [w[t] * moves[t][i] if i in kept[t] else 0.0 for t in range(3)]
        agree = [t for t in range(3) if votes[t] * sum(votes) > 0]
        wanted.append(b + sum(votes[t] for t in agree) / max(sum(abs(w[t]) for t in agree), 1e-30))
    close(found, wanted)
    assert told["density"] == 0.5
    assert any(b == x for b, x in zip(start, numbers(found), strict=True)), "what nobody keeps stays as it was"


def test_breadcrumbs(kind: str, three: Any) -> None:
    base, tasks = three
    found, told = merge.merge(base, tasks, kind, Options("breadcrumbs", weights=(1.0, 0.5, 0.25), density=0.4, outliers=0.2))
    wanted = []
    for name, start in base.items():
        layer = {name: start}
        moves = [changed(layer, {name: t[name]}) for t in tasks]
        skip, count = round(0.2 * start.numel()), max(1, round(0.4 * start.numel()))
        kept = [top([abs(m / u) for m, u in zip(move, sizes(layer, kind), strict=True)], skip, count) for move in moves]
        for i, b in enumerate(numbers(layer)):
            wanted.append(b + sum(w * m[i] for w, m, k in zip((1.0, 0.5, 0.25), moves, kept, strict=True) if i in k))
    close(found, wanted)
    assert (told["density"], told["outliers"]) == (0.4, 0.2)


def test_lines(kind: str, three: Any) -> None:
    base, tasks = three
    found, told = merge.merge(base, tasks, kind, Options("lines"))
    assert told["lines"] == pytest.approx([1 / 3, 2 / 3])
    wanted = []
    for name, start in base.items():
        depth = int(name.split(".")[2]) / 3  # of four blocks
        moves = [changed({name: start}, {name: t[name]}) for t in tasks]
        wanted += [b + (1 / 3 + 2 / 3 * depth) * sum(m[i] for m in moves) for i, b in enumerate(numbers({name: start}))]
    close(found, wanted)
    assert merge.depths(["lm_head", "h.4.attn", "h.0.attn", "h.1.attn"]) == {"lm_head": 1.0, "h.4.attn": 1.0, "h.0.attn": 0.0, "h.1.attn": 0.25}
    assert merge.depths(["h.0.attn"]) == {"h.0.attn": 1.0}


def test_lines_after_another_method(kind: str, three: Any) -> None:
    base, tasks = three
    plain, _ = merge.merge(base, tasks, kind, Options("ties", density=0.5))
    found, told = merge.merge(base, tasks, kind, Options("ties", density=0.5, lines=(None, 0.5)))
    total = sum(abs(sum(m[i] for m in [changed(base, t) for t in tasks])) for i in range(len(numbers(base))))
    alpha = total / sum(map(abs, changed(base, plain))) / 3
    assert told["lines"] == pytest.approx([alpha, 0.5], rel=1e-5)
    for name, start in base.items():
        factor = alpha + 0.5 * int(name.split(".")[2]) / 3
        if kind == "table":  # no floor
            wanted = start.double() + factor * (plain[name].double() - start.double())
            assert torch.allclose(found[name].double(), wanted, rtol=1e-4, atol=1e-7)
    single, _ = merge.merge(base, tasks[:1], kind, Options("lines", lines=(0.0, None)))
    assert torch.equal(single[NAMES[0]], base[NAMES[0]])
    assert torch.equal(single[NAMES[2]], tasks[0][NAMES[2]])


def test_soups(kind: str, three: Any) -> None:
    base, tasks = three
    found, told = merge.merge(base, tasks, kind, Options("soup"))
    close(found, [sum(xs) / 3 for xs in zip(*map(numbers, tasks), strict=True)])
    assert told["weights"] == [1 / 3] * 3
    bad = {name: t * 3 for name, t in base.items()}
    close(merge.merge(bad, tasks, kind, Options("soup"))[0], numbers(found))  # an average knows no base


def test_a_greedy_soup_takes_what_helps(kind: str) -> None:
    """Quality is the distance from a goal: two tasks stand on opposite sides of it, a third is far, and a copy of the first changes nothing."""
    goal = values(kind, 0)
    shift = {name: 0.1 * torch.rand_like(t) * t for name, t in goal.items()}
    at = lambda step: {name: t + step * shift[name] for name, t in goal.items()}
    asked: list[float] = []

    def quality(candidate: dict[str, Tensor]) -> float:
        asked.append(math.sqrt(sum((a - b) ** 2 for a, b in zip(numbers(candidate), numbers(goal), strict=True))))
        return asked[-1]

    tasks = [at(4.0), at(-1.0), at(1.5), at(-1.0)]
    found, told = merge.merge(values(kind, 1), tasks, kind, Options("greedy"), quality)
    assert told["chosen"] == [1, 3, 2], "the best, its copy, which is no worse, then the other side; the far one would spoil it"
    assert told["weights"] == [0.0, 1 / 3, 1 / 3, 1 / 3]
    close(found, [sum(xs) / 3 for xs in zip(*(numbers(tasks[t]) for t in (1, 2, 3)), strict=True)])
    assert len(asked) == 4 + 3
    with pytest.raises(RecipeError, match="greedy measures every candidate"):
        merge.merge(goal, tasks, kind, Options("greedy"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_one_task_alone_comes_back_bit_for_bit(kind: str, dtype: torch.dtype, method: str) -> None:
    base = values(kind, 0, dtype)
    far = {name: (t.float() * 1e-3).to(dtype) if i else -t if kind == "table" else t for i, (name, t) in enumerate(base.items())}
    for task in (tuned(base, 1), far, base):
        other = tuned(base, 2, 0.5)
        if method in ("soup", "greedy"):
            options, tasks = Options(method), [task, dict(task), dict(task)]
        else:
            whole: dict[str, Any] = {"ties": {"density": 1.0}, "breadcrumbs": {"density": 1.0, "outliers": 0.0}, "lines": {"lines": (1.0, None)}}
            options, tasks = Options(method, weights=(1.0, 0.0), **whole.get(method, {})), [task, other]
        found, _ = merge.merge(base, tasks, kind, options, lambda _: 0.0)
        assert same(found, dict(task)), method


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_moved_means_nothing_moves(kind: str, dtype: torch.dtype, method: str) -> None:
    base = values(kind, 0, dtype)
    found, _ = merge.merge(base, [dict(base), dict(base)], kind, Options(method), lambda _: 0.0)
    assert same(found, base)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_tasks_does_not_matter(kind: str, three: Any, method: str) -> None:
    base, tasks = three
    quality = lambda found: sum(numbers(found))
    one, _ = merge.merge(base, tasks, kind, Options(method), quality)
    other, _ = merge.merge(base, tasks[::-1], kind, Options(method), quality)
    assert all(torch.allclose(one[name], other[name], rtol=1e-6, atol=0) for name in base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_stay_legal(dtype: torch.dtype) -> None:
    base = values("scale", 0, dtype)
    base[NAMES[0]][0] = torch.finfo(dtype).tiny / 4  # subnormal: a tenth of it might round to zero
    down = {name: (0.2 * t.float()).to(dtype) for name, t in base.items()}
    found, _ = merge.merge(base, [down, down], "scale", Options(weights=(2.0, 2.0)))
    for name, t in found.items():
        least = torch.minimum(0.1 * base[name].double(), down[name].double())
        assert bool((t > 0).all())
        assert torch.allclose(t.double(), least, rtol=0.01, atol=torch.finfo(dtype).tiny)
    top_of = torch.finfo(dtype).max
    for kind in ("scale", "table"):
        start = values(kind, 0, dtype)
        large = {name: torch.full_like(t, 0.9 * top_of) for name, t in start.items()}
        found, _ = merge.merge(start, [large, large], kind, Options())
        assert all(bool((t == top_of).all()) for t in found.values())
    zero = {name: torch.zeros_like(t) for name, t in values("table", 0, dtype).items()}
    some = {name: torch.full_like(t, 0.25) for name, t in zero.items()}
    for method in ("ties", "breadcrumbs"):
        found, _ = merge.merge(zero, [some, some], "table", Options(method))
        assert all(bool(torch.isfinite(t).all()) for t in found.values())


def test_the_floor_is_one_of_size_and_of_tasks_that_count() -> None:
    one = lambda *numbers: {"layers.0.a": torch.tensor([numbers])}
    merged = lambda base, tasks, **options: numbers(merge.merge(base, tasks, "scale", Options(**options))[0])
    down = one(-1.0, -0.6)
    assert merged(one(-0.9, -0.5), [down, down]) == pytest.approx([-1.1, -0.7]), "sizes may grow"
    assert merged(one(-0.9, -0.5), [one(-0.1, -0.1)], weights=(9.0,)) == pytest.approx([-0.09, -0.05]), "and fall to a tenth"
    half, low = one(0.5), one(1e-4)
    assert merged(one(1.0), [half, low], weights=(3.0, 0.0)) == merged(one(1.0), [half], weights=(3.0,)) == pytest.approx([0.1])
    assert merged(one(1.0), [half, low], weights=(3.0, 0.1)) == pytest.approx([1e-4])


def test_a_factor_does_not_fall_with_depth(kind: str) -> None:
    base = values(kind, 0)
    against = {name: (2 * start - t) for (name, start), t in zip(base.items(), tuned(base, 1).values(), strict=True)}
    for tasks in ([tuned(base, 1), against], [tuned(base, 1), tuned(base, 2)]):
        told = merge.merge(base, tasks, kind, Options("ties", lines=(None, None), weights=(4.0, 8.0)))[1]
        assert told["lines"][1] == max(0.0, 1 - told["lines"][0])


def test_what_is_no_number_joins_no_soup(kind: str) -> None:
    base = values(kind, 0)
    tasks = [tuned(base, seed) for seed in range(3)]
    for answers, chosen in (([math.nan, 1.0, 2.0, math.nan, math.nan], [1]), ([math.nan] * 5, [0])):
        assert merge.greedy(base, tasks, kind, lambda _, left=[*answers]: left.pop(0)) == chosen


def test_defaults_keep_the_published_shares(kind: str) -> None:
    base = {"layers.0.a": values(kind, 0)[NAMES[0]].repeat(100, *[1] * (len(SHAPES[kind][0]) - 1))}
    task, whole = tuned(base, 1), base["layers.0.a"].numel()
    for method, share in (("ties", 0.2), ("breadcrumbs", 0.1)):
        found, _ = merge.merge(base, [task], kind, Options(method))
        assert int((found["layers.0.a"] != base["layers.0.a"]).sum()) == pytest.approx(share * whole, abs=1)


@pytest.mark.parametrize(
    ("options", "tasks", "words"),
    [
        (Options("slerp"), 2, "--method 'slerp' is unknown; choose sum, ties"),
        (Options(), 0, "no task is given"),
        (Options(weights=(1.0,)), 2, "--weights has 1 numbers for 2 tasks"),
        (Options("soup", weights=(1.0, 1.0)), 2, "--weights means nothing to soup"),
        (Options("greedy", weights=(1.0, 1.0)), 2, "--weights means nothing to greedy"),
        (Options(weights=(1.0, math.nan)), 2, "must be finite"),
        (Options(scale=math.inf), 2, "must be finite"),
        (Options(lines=(0.3, math.inf)), 2, "must be finite"),
        (Options(density=0.5), 2, "--density means nothing to sum"),
        (Options("ties", outliers=0.1), 2, "--outliers means nothing to ties"),
        (Options("ties", density=0.0), 2, "density=0.0 is a share above 0"),
        (Options("ties", density=1.5), 2, "density=1.5 is a share"),
        (Options("breadcrumbs", outliers=1.0), 2, "outliers=1.0 one from 0 to below 1"),
        (Options(lines=(0.5, -0.5)), 2, "beta=-0.5 is what the factor grows by"),
        (Options("breadcrumbs", density=0.9, outliers=0.2), 2, "density=0.9 and outliers=0.2 are shares of the same changes"),
        (Options("lines"), 1, "add --lines, for example 0.3"),
        (Options("lines", lines=(None, 1.0)), 1, "add --lines, for example 0.3"),
    ],
)
def test_bad_options(options: Options, tasks: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        options.check(tasks)
    assert "\n" not in str(error.value)
