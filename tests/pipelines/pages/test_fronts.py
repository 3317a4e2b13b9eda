"""Fronts, scales and labels, against plain truths."""

import math
import random
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from compressor.pipelines.pages import figures, fronts
from compressor.pipelines.pages.fronts import Axis, Point


@pytest.mark.parametrize("more_is_better", [(False, False), (False, True), (True, False), (True, True)])
def test_the_front_is_what_nothing_beats(more_is_better: tuple[bool, bool]) -> None:
    rng = random.Random(3)
    points = [(float(rng.randrange(12)), float(rng.randrange(12))) for _ in range(60)]
    x, y = (Axis("", higher=more) for more in more_is_better)
    signs = [-1 if more else 1 for more in more_is_better]
    cost = [(signs[0] * a, signs[1] * b) for a, b in points]
    beaten = {p for p in cost for q in cost if q != p and q[0] <= p[0] and q[1] <= p[1]}
    found = fronts.front(points, x, y)
    assert {cost[i] for i in found} == set(cost) - beaten and len({cost[i] for i in found}) == len(found)
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_the_front_of_nothing_is_empty_and_of_equals_the_first() -> None:
    assert fronts.front([], Axis(""), Axis("")) == []
    assert fronts.front([(1.0, 2.0), (1.0, 2.0)], Axis(""), Axis("")) == [0]


def drawn(points: list[Point], line: list[int], dense: Point | None, x: Axis, y: Axis) -> Any:
    figure = Figure(figsize=(4.4, 3.2))
    FigureCanvasAgg(figure)
    with figures.roles(figures.LIGHT):
        fronts.paint(figure, "title", x, y, points, line, dense)
    return figure.axes[0]


@pytest.mark.parametrize("worst", [1.5, 7.0, 80.0, 3e4])
def test_logarithmic_axes_carry_readable_ticks(worst: float) -> None:
    points = [Point("a", 1.0, 1.0), Point("b", 2.0, worst)]
    axes = drawn(points, [], None, Axis("x", log=True), Axis("y", log=True))
    low, high = axes.get_ylim()
    ticks = [t for t in axes.get_yticks() if low <= t <= high]
    assert low < 1 < worst < high and 3 <= len(ticks) <= 9
    assert axes.get_yscale() == ("log" if worst > 3 else "linear")


def test_far_points_stand_at_the_edge_and_are_counted() -> None:
    points = [Point("small", 2.0, 50.0), Point("large", 4.0, 30.0), Point("lost", 2.5, 9000.0, faint=True)]
    dense = Point("dense: 16, 29", 16.0, 29.0, label="dense 29")
    axes = drawn(points, [0, 1], dense, Axis("bits", "bits", log=True), Axis("perplexity", log=True))
    assert axes.get_ylim()[1] < 200 and axes.get_xlim()[1] < 8
    assert axes.get_title("right") == "1 off the scale"
    assert {t.get_text() for t in axes.texts} >= {"dense 29 at 16 bits"}
    marks = {line.get_gid(): line for line in axes.lines if str(line.get_gid()).startswith("point:")}
    assert marks["point:lost (off the scale)"].get_marker() == "^" and marks["point:dense: 16, 29 (off the scale)"].get_marker() == ">"
    assert marks["point:small"].get_ydata() == [50.0]


@pytest.mark.parametrize(("more", "corners"), [
    (False, [(1.0, 9.0), (2.0, 9.0), (2.0, 4.0), (5.0, 4.0), (5.0, 3.0)]), (True, [(1.0, 3.0), (1.0, 4.0), (2.0, 4.0), (2.0, 9.0), (5.0, 9.0)]),
])  # fmt: skip
def test_the_line_promises_nothing_between_points(more: bool, corners: list[tuple[float, float]]) -> None:
    ys = (3.0, 4.0, 9.0) if more else (9.0, 4.0, 3.0)
    points = [Point("", a, b) for a, b in zip((1.0, 2.0, 5.0), ys, strict=True)]
    assert fronts.stairs(points, Axis("", higher=more)) == corners and fronts.stairs([], Axis("")) == []


def owners(axes: Any, points: list[Point]) -> dict[str, tuple[str, bool]]:
    """label -> the point that lies nearest to it, and whether a line leads from there."""
    renderer = axes.figure.canvas.get_renderer()
    at = {p.label or p.name: tuple(axes.transData.transform((p.x, p.y))) for p in points}
    ends = {tuple(line.get_xydata()[0]) for line in axes.lines if line.get_linewidth() == 0.6 and len(line.get_xydata()) == 2}
    out = {}
    for text in axes.texts:
        x0, y0, x1, y1 = text.get_window_extent(renderer).extents
        far = {name: math.hypot(max(x0 - x, 0, x - x1), max(y0 - y, 0, y - y1)) for name, (x, y) in at.items()}
        led = any(math.dist(axes.transData.transform(end), at[text.get_text()]) < 0.5 for end in ends)
        out[text.get_text()] = min(far, key=lambda name: far[name]), led
    return out


def test_no_label_stands_nearer_to_another_point() -> None:
    """Neighbours of nearly equal quality, as of two groups at 2 bits; points behind the front have no labels but count."""
    rng = random.Random(5)
    led = 0
    for gap in (0.02, 0.05, 0.1, 0.25):
        points = [Point("a", 2.25, 120.0, label="w2g64"), Point("b", 2.25 + gap, 117.0, label="w2g32"), Point("c", 4.0, 40.0, label="w4g128")]
        crowd = [Point(f"x{i}", 2.2 + rng.random() * (gap + 0.2), 110 + 30 * rng.random(), faint=True) for i in range(8)]
        axes = drawn([*points, *crowd], [0, 1, 2], None, Axis("x"), Axis("y"))
        found = owners(axes, [*points, *crowd])
        assert found and all(name == label or leads for label, (name, leads) in found.items()), (gap, found)
        led += sum(leads for _, leads in found.values())
    assert led > 0


def test_labels_keep_apart_even_in_a_crowd() -> None:
    rng = random.Random(1)
    points = [Point(f"p{i}", 1 + rng.random(), 1 + rng.random(), label=f"w{i}g128-gptq") for i in range(30)]
    axes = drawn(points, list(range(30)), None, Axis("x"), Axis("y"))
    renderer = axes.figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in axes.texts if t.get_text()]
    assert 5 <= len(boxes) < 30
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
