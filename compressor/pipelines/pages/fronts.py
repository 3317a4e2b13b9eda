"""Quality against size: points, the Pareto front among them, and labels that keep out of each other's way.

A point is on the front if no other is at least as good in both directions and better in one. Axes are logarithmic where the values spread wide, and
then carry ticks at round numbers, because powers of ten alone would leave most panels with one. Points far worse than the front, and a dense model
far larger than all, would flatten what matters: they stand at the edge as arrows, and are counted there. Labels are placed one after the other,
the dense model's first, then the front's from left to right: of some places around its point each takes the one that hides least, and is left out
rather than put over another label; the page's table has all of them. Price: labels are measured in matplotlib's own font, which is wider than
those of most browsers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compressor.pipelines.pages.figures import LABEL, ascii_text, mark

WIDE_Y, WIDE_X = 3.0, 4.0  # largest by smallest value above which an axis is logarithmic
STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), tuple(1 + i / 5 for i in range(45)))  # ticks of a decade, ever denser
FEW, MANY = 3, 7  # ticks of a logarithmic axis
SHARE = 0.55  # of an axis that the points of interest fill at least; what would leave them less lies off the scale
ARROW = {"arrowstyle": "-|>", "color": "role:muted", "linewidth": 1, "shrinkA": 4, "shrinkB": 4}
RINGS = ((6, 5), (6, 11), (4, 18))  # how far from its point a label may stand, in points of print, sideways and up or down
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
    axes.set_title(ascii_text(title), parse_math=False)
    axes.grid(axis="y")
    if dense:
        axes.axhline(dense.y, color="role:dense", linewidth=0.9, linestyle=(0, (4, 3)))
    if line:
        axes.plot([p.x for p in first], [p.y for p in first], color="role:muted", linewidth=1.1, zorder=2)
    for a, b in arrows:
        axes.annotate("", xy=(b.x, b.y), xytext=(a.x, a.y), arrowprops=ARROW)
    shown = [_inside(axes, point, x) for point in every]
    if off := sum(new is not old for new, old in zip(shown[: len(points)], points, strict=True)):
        axes.set_title(f"{off} off the scale", loc="right", fontsize=7.5, color="role:muted")
    for point in sorted(shown, key=lambda p: not p.faint):
        _dot(axes, point)
    beside = [((a.x, a.y), (b.x, b.y)) for a, b in arrows] + [((p.x, p.y - p.error), (p.x, p.y + p.error)) for p in shown if p.error and not p.faint]
    label(axes, shown, [p for p in [*(p for p in shown if p not in first), *first] if p.label], beside)


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


def label(axes: Any, points: Sequence[Point], wanted: Sequence[Point], strokes: Sequence[Any] = ()) -> None:
    """Write the labels of `wanted`, in this order, where they hide neither each other nor, if it can be, points, lines of the axes or `strokes`."""
    pixel = axes.figure.dpi / 72
    renderer, frame = axes.figure.canvas.get_renderer(), axes.get_window_extent()
    places = axes.transData.transform([(p.x, p.y) for p in points])
    dots = [(x - 4 * pixel, y - 4 * pixel, x + 4 * pixel, y + 4 * pixel) for x, y in places]
    lines = [_boxes_along(line.get_transform().transform(line.get_xydata()), pixel) for line in axes.lines if len(line.get_xydata()) > 1]
    lines += [_boxes_along(axes.transData.transform(stroke), pixel) for stroke in strokes]
    path, taken = [box for boxes in lines for box in boxes], list[Box]()
    for point in wanted:
        text = axes.annotate(ascii_text(point.label), (point.x, point.y), xytext=(0, 0), textcoords="offset points", fontsize=8, color=point.colour,
                             parse_math=False, annotation_clip=False, zorder=5, gid=LABEL)  # fmt: skip
        found = text.get_window_extent(renderer)
        x, y = axes.transData.transform((point.x, point.y))
        chosen = _place(x, y, found.width, found.height, pixel, (frame.x0, frame.y0, frame.x1 + 8 * pixel, frame.y1), taken, dots, path)
        if chosen is None:
            text.remove()
            continue
        taken.append(chosen)
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


def _place(x: float, y: float, wide: float, tall: float, pixel: float, frame: Box, taken: list[Box], dots: list[Box], path: list[Box]) -> Box | None:
    """Where a label of this size goes beside (x, y): the place with the least cost, or None if each hides another label or leaves the frame."""
    best, least = None, math.inf
    for ring, (side, up) in enumerate(RINGS):
        right, left, middle = x + side * pixel, x - side * pixel - wide, x - wide / 2
        above, below, farther = y + (up - 3) * pixel, y - (up - 3) * pixel - tall, 5 * pixel
        spots = ((right, above), (right, below), (left, above), (left, below), (middle, above + farther), (middle, below - farther))
        for order, (start, low) in enumerate(spots):
            box = (start, low, start + wide, low + tall)
            inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if not inside or any(_meet(box, other, 2 * pixel) for other in taken):
                continue
            cost = 10 * sum(_meet(box, dot) for dot in dots) + 2 * sum(_meet(box, step) for step in path) + 3 * ring + 0.1 * order
            if cost < least:
                best, least = box, cost
    return best if least < 30 or not taken else None


def _meet(a: Box, b: Box, air: float = 0.0) -> bool:
    return a[0] < b[2] + air and b[0] < a[2] + air and a[1] < b[3] + air and b[1] < a[3] + air
