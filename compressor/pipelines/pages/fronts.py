"""Quality against size: points, the Pareto front among them, and labels that keep out of each other's way.

A point is on the front if no other is at least as good in both directions and better in one. Axes are logarithmic where the values spread wide, and
then carry ticks at round numbers, because powers of ten alone would leave most panels with one. Points far worse than the front, and a dense model
far larger than all, would flatten what matters: they stand at the edge as arrows, and are counted there. The front is a line of steps, for nothing
was measured between two points. Labels are placed one after the other, the dense model's first, then the front's from left to right: of some places
around its point each takes the one that hides least, never one over another label or nearer to another point than to its own. If there is none it
stands farther off, at the end of a thin line, or is left out; the page's table has all of them. Price: labels are measured in matplotlib's own font,
which is wider than those of most browsers.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compressor.pipelines.pages.figures import LABEL, ascii_text, mark

WIDE_Y, WIDE_X = 3.0, 4.0  # largest by smallest value above which an axis is logarithmic
STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), tuple(1 + i / 5 for i in range(45)))  # ticks of a decade, ever denser
FEW, MANY = 3, 7  # ticks of a logarithmic axis
SHARE = 0.55  # of an axis that the points of interest fill at least; what would leave them less lies off the scale
ARROW = {"arrowstyle": "-|>", "color": "role:muted", "linewidth": 1, "shrinkA": 4, "shrinkB": 4}
RINGS = ((6, 5), (6, 11), (4, 18))  # how far from its point a label may stand, in points of print, sideways and up or down
HELD = 1e100  # numbers beyond it, or as close to zero, are damage, and axes cannot hold them
CLEAR = 1.3  # how much farther than from its own point a label is from any other, at least
TITLE = 46  # letters over a panel
OTHERS = 30.0  # cost from which on a label is left out: it would hide too much, or be read as another point's
FAR = ((10, 20), (16, 32), (12, 46), (20, 60))  # and at the end of a line
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels of the drawing


@dataclass(frozen=True)
class Point:
    """x and y in the units of their axes; `error`: standard error of y; `label`: what stands beside it, if there is room."""

    name: str
    x: float
    y: float
    error: float = 0.0
    label: str = ""
    colour: str = "role:accent"
    shape: str = "o"
    faint: bool = False  # behind the front


@dataclass(frozen=True)
class Axis:
    """What an axis shows. `higher`: more is better; `zero`: starts there unless logarithmic; `log`: may be logarithmic; `unit`: in a word."""

    label: str
    unit: str = ""
    higher: bool = False
    zero: bool = False
    log: bool = False


def front(points: Iterable[tuple[float, float]], x: Axis, y: Axis) -> list[int]:
    """Indices of the points that none other beats, from left to right; of equal ones the first."""
    signed = [((-a if x.higher else a), (-b if y.higher else b), i) for i, (a, b) in enumerate(points)]
    out, best = [], math.inf
    for _, cost, i in sorted(signed):
        if cost < best:
            out.append(i)
            best = cost
    return out if not x.higher else out[::-1]


def drawable(value: float | None) -> float | None:
    """The value, or None if no axis can hold it."""
    return value if value is not None and (value == 0 or 1 / HELD <= abs(value) <= HELD) else None


def stairs(points: Sequence[Point], x: Axis) -> list[tuple[float, float]]:
    """Corners of the line through a front, which runs from left to right: at each x the best that was measured there or at a better x."""
    out = [(p.x, p.y) for p in points[:1]]
    for a, b in itertools.pairwise(points):
        out += [(a.x, b.y) if x.higher else (b.x, a.y), (b.x, b.y)]
    return out


def faint(point: Point) -> Point:
    """The same point as one behind the front: paler, and without a label."""
    return replace(point, label="", faint=True)


def spread(values: Sequence[float]) -> float:
    """Largest by smallest; 1 if that means nothing."""
    return max(values) / min(values) if values and min(values) > 0 else 1.0


def paint(
    figure: Any,
    title: str,
    x: Axis,
    y: Axis,
    points: Sequence[Point],
    line: Sequence[int] = (),
    dense: Point | None = None,
    arrows: Sequence[tuple[Point, Point]] = (),
) -> None:
    """One panel: `points`, a front through those at the indices `line`, the dense model with a level line, arrows between points."""
    axes = figure.add_subplot()
    first = [points[i] for i in line]
    every = [*points, *([dense] if dense else [])]
    xs = _near([p.x for p in points], dense.x, x) if dense and line else [p.x for p in every]
    ys = _range(first, dense, every, y) if line else [v for p in every for v in (p.y - p.error, p.y + p.error)]
    scale(axes, "x", x, xs)
    scale(axes, "y", y, ys)
    axes.grid(axis="y")
    if dense:
        axes.axhline(dense.y, color="role:dense", linewidth=0.9, linestyle=(0, (4, 3)))
    if line:
        axes.plot(*zip(*stairs(first, x), strict=True), color="role:muted", linewidth=1.1, zorder=2)
    for a, b in arrows:
        axes.annotate("", xy=(b.x, b.y), xytext=(a.x, a.y), arrowprops=ARROW)
    shown = [_inside(axes, point, x) for point in every]
    if off := sum(new is not old for new, old in zip(shown[: len(points)], points, strict=True)):
        axes.set_title(f"{off} off the scale", loc="right", fontsize=7.5, color="role:muted")
    most = TITLE - 14 if off else TITLE
    axes.set_title(ascii_text(title if len(title) <= most else f"{title[: most - 3]}..."), parse_math=False)
    for point in sorted(shown, key=lambda p: not p.faint):
        _dot(axes, point)
    beside = [((a.x, a.y), (b.x, b.y)) for a, b in arrows] + [((p.x, p.y - p.error), (p.x, p.y + p.error)) for p in shown if p.error and not p.faint]
    label(axes, shown, [p for p in [*(p for p in shown if p not in first), *first] if p.label], beside, shown[-1] if dense else None)


def _near(values: Sequence[float], dense: float, axis: Axis) -> list[float]:
    """What the axis of sizes covers: the dense model too, unless the points would then fill less than SHARE of it."""
    log = axis.log and min(*values, dense) > 0
    low, high, far = (math.log(v) if log else v for v in (min(values), max(values), dense))
    whole = max(high, far) - min(low, far)
    return [*values, *([dense] if whole == 0 or high == low or (high - low) / whole >= SHARE else [])]


def _range(first: Sequence[Point], dense: Point | None, every: Sequence[Point], axis: Axis) -> list[float]:
    """What the axis of quality covers: the front, the dense model, and of the rest what leaves the front SHARE of it."""
    focus = [v for p in [*first, *([dense] if dense else [])] for v in (p.y - p.error, p.y + p.error)]
    low, high = min(focus), max(focus)
    if axis.log and low > 0:
        reach = max((high / low) ** (1 / SHARE), 1.5)
        return [*focus, *(p.y for p in every if p.y <= low * reach)]
    reach = max((high - low) / SHARE, 0.1 * abs(high))
    return [*focus, *(p.y for p in every if (p.y >= high - reach if axis.higher else p.y <= low + reach))]


def _inside(axes: Any, point: Point, x: Axis) -> Point:
    """The point; one that lies off the scale goes to the edge as an arrow that points to where it is, and its name says so."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    shape = "<" if point.x < left else ">" if point.x > right else "v" if point.y < low else "^" if point.y > high else ""
    if not shape:
        return point
    label = (
        f"{point.label} at {f'{point.x:,.0f}' if point.x >= 1000 else f'{point.x:.3g}'} {x.unit}" if point.label and shape in "<>" else point.label
    )
    at = {"x": min(max(point.x, left), right), "y": min(max(point.y, low), high)}
    return replace(point, name=f"{point.name} (off the scale)", label=label, shape=shape, error=0.0, **at)


def _dot(axes: Any, point: Point) -> None:
    alpha = 0.38 if point.faint else 1.0
    if point.error and not point.faint:
        axes.errorbar([point.x], [point.y], yerr=[point.error], color=point.colour, linewidth=1, capsize=2.5, zorder=3)
    big = 4.5 if point.faint else 11 if point.shape == "*" else 6.5
    gid, edge = mark(ascii_text(point.name, 90)), "none" if point.faint else "role:paper"
    axes.plot([point.x], [point.y], marker=point.shape, markersize=big, color=point.colour, alpha=alpha, markeredgecolor=edge, markeredgewidth=0.6,
              linestyle="none", gid=gid, zorder=3 if point.faint else 4, clip_on=False)  # fmt: skip


def scale(axes: Any, which: str, axis: Axis, values: Sequence[float]) -> None:
    """Limits, scale and ticks of one axis, so that all values lie inside with some air."""
    low, high = min(values), max(values)
    limit, put = (axes.set_xlim, axes.set_xscale) if which == "x" else (axes.set_ylim, axes.set_yscale)
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(axis.label)
    if axis.log and low > 0 and spread(values) > (WIDE_X if which == "x" else WIDE_Y):
        air = (high / low) ** 0.1
        put("log")
        limit(low / air, high * air)
        _ticks(axes.xaxis if which == "x" else axes.yaxis, low / air, high * air)
        return
    span = high - low or abs(high) * 0.2 or 1.0
    start = 0.0 if axis.zero and low >= 0 else low - 0.14 * span
    limit(start, high + (0.1 * (high - start) or 1.0) if axis.zero else high + 0.14 * span)
    axes.locator_params(axis=which, nbins=6)


def _ticks(axis: Any, low: float, high: float) -> None:
    """Round numbers within, few enough to be read, on a logarithmic axis."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [[s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high] for steps in STEPS]
    ticks = next((c for c in choices if len(c) >= FEW), choices[-1])
    ticks = ticks[:: math.ceil(len(ticks) / MANY)]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([f"{t:g}" if 1e-3 <= t < 1e5 else f"{t:.0e}".replace("e-0", "e-").replace("e+0", "e") for t in ticks]))
    axis.set_minor_locator(NullLocator())


@dataclass
class Room:
    """Where labels may go, in pixels of the drawing: within `frame`, not over `taken`, better not over points or the boxes of a `path`."""

    pixel: float  # of a point of print
    frame: Box
    dots: list[tuple[float, float]]
    path: list[Box]
    taken: list[Box]


def label(axes: Any, points: Sequence[Point], wanted: Sequence[Point], strokes: Sequence[Any] = (), level: Point | None = None) -> None:
    """Write the labels of `wanted`, in this order, where they hide neither each other nor, if it can be, points, lines of the axes or `strokes`.

    `level`: the point whose label may stand anywhere along a line from side to side through it.
    """
    pixel = axes.figure.dpi / 72
    renderer, frame = axes.figure.canvas.get_renderer(), axes.get_window_extent()
    dots = [(float(x), float(y)) for x, y in axes.transData.transform([(p.x, p.y) for p in points])]
    lines = [_boxes_along(line.get_transform().transform(line.get_xydata()), pixel) for line in axes.lines if len(line.get_xydata()) > 1]
    lines += [_boxes_along(axes.transData.transform(stroke), pixel) for stroke in strokes]
    room = Room(pixel, (frame.x0, frame.y0, frame.x1 + 8 * pixel, frame.y1), dots, [box for boxes in lines for box in boxes], [])
    for point in wanted:
        text = axes.annotate(ascii_text(point.label), (point.x, point.y), xytext=(0, 0), textcoords="offset points", fontsize=8, color=point.colour,
                             parse_math=False, annotation_clip=False, zorder=5, gid=LABEL)  # fmt: skip
        found = text.get_window_extent(renderer)
        x, y = axes.transData.transform((point.x, point.y))
        chosen = _place(x, y, found.width, found.height, room, level=point is level)
        if chosen is None:
            chosen = _place(x, y, found.width, found.height, room, led=True)
            if chosen is None:
                text.remove()
                continue
            ends = axes.transData.inverted().transform([(x, y), _nearest(chosen, x, y)])
            axes.plot(ends[:, 0], ends[:, 1], color=point.colour, linewidth=0.6, zorder=2)
        room.taken.append(chosen)
        text.set_position(((chosen[0] - x) / pixel, (chosen[1] - y) / pixel))
        text.set_verticalalignment("bottom")


def _boxes_along(line: Any, pixel: float) -> list[Box]:
    """Small boxes that cover a line: [points, 2] in pixels."""
    out = list[Box]()
    for (a, b), (c, d) in zip(line, line[1:], strict=False):
        steps = max(1, int(math.hypot(c - a, d - b) / (6 * pixel)))
        out += [
            (x - pixel, y - pixel, x + pixel, y + pixel) for i in range(steps + 1) for x, y in [(a + (c - a) * i / steps, b + (d - b) * i / steps)]
        ]
    return out


def _place(x: float, y: float, wide: float, tall: float, room: Room, led: bool = False, level: bool = False) -> Box | None:
    """Where a label of this size goes beside (x, y): the place with the least cost, or None if each hides another label, leaves the frame, or lies
    nearer to another point than to its own. `led`: farther off, at the end of a thin line to its point, which must touch no other point."""
    best, least, pixel = None, math.inf, room.pixel
    marks = [(a - 4 * pixel, b - 4 * pixel, a + 4 * pixel, b + 4 * pixel) for a, b in room.dots]
    for ring, box in _spots(x, y, wide, tall, pixel, FAR if led else RINGS):
        inside = box[0] >= room.frame[0] and box[1] >= room.frame[1] and box[2] <= room.frame[2] and box[3] <= room.frame[3]
        if not inside or any(_meet(box, other, 2 * pixel) for other in room.taken):
            continue
        cost = 10 * sum(_meet(box, dot) for dot in marks) + 2 * sum(_meet(box, step) for step in room.path) + 3 * ring
        if led:
            leader = _boxes_along([(x, y), _nearest(box, x, y)], pixel)
            barred = [*(dot for dot in marks if not _meet(dot, (x, y, x, y))), *room.taken]
            cost += OTHERS if any(_meet(step, other) for step in leader for other in barred) else 0
            cost += 5 * sum(_meet(box, mark, 4 * pixel) for mark in marks)
        else:
            own = max(box[1] - y, y - box[3], 0.0) if level else math.dist((x, y), _nearest(box, x, y))
            others = [dot for dot in room.dots if math.dist(dot, (x, y)) > pixel]  # points in one place share their labels
            cost += OTHERS if any(math.dist(dot, _nearest(box, *dot)) < CLEAR * own for dot in others) else 0
            cost += OTHERS if any(math.dist((x, y), _nearest(other, x, y)) < own for other in room.taken) else 0
        if cost < least:
            best, least = box, cost
    return best if least < OTHERS else None


def _spots(x: float, y: float, wide: float, tall: float, pixel: float, rings: Sequence[tuple[float, float]]) -> Iterator[tuple[float, Box]]:
    """Boxes around (x, y), the better first, each with what it costs to stand there."""
    for ring, (side, up) in enumerate(rings):
        right, left, middle = x + side * pixel, x - side * pixel - wide, x - wide / 2
        above, below, farther = y + (up - 3) * pixel, y - (up - 3) * pixel - tall, 5 * pixel
        spots = ((right, above), (right, below), (left, above), (left, below), (middle, above + farther), (middle, below - farther))
        for order, (start, low) in enumerate(spots):
            yield ring + order / 30, (start, low, start + wide, low + tall)


def _nearest(box: Box, x: float, y: float) -> tuple[float, float]:
    """The place of a box that is nearest to a point."""
    return min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])


def _meet(a: Box, b: Box, air: float = 0.0) -> bool:
    return a[0] < b[2] + air and b[0] < a[2] + air and a[1] < b[3] + air and b[1] < a[3] + air
