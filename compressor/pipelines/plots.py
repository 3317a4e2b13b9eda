"""Plots of a report as inline SVG: deterministic, without outside references, readable on light and dark paper.

Matplotlib draws with role colours that stand for nothing else; `_svg` then replaces each by a CSS variable of the page, so one drawing serves
both colour schemes. Heat maps use one colour with varying opacity for the same reason. Text stays text (selectable, in the font of the page).
Every function returns None when the report lacks the numbers.
"""

import io
import math
import re
from itertools import pairwise
from typing import Any

from compressor.pipelines.report import STATES, Report, dicts, number

ROLES = {"ink": "#010203", "muted": "#020304", "line": "#030405", "dense": "#040506", "packed": "#050607", "tuned": "#060708", "accent": "#070809",
         "pruned": "#08090a"}  # fmt: skip
POINTS = 1500  # a longer training curve is thinned to this many points
STYLE = {
    "svg.hashsalt": "compressor",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": ROLES["line"],
    "axes.labelcolor": ROLES["muted"],
    "axes.titlecolor": ROLES["ink"],
    "text.color": ROLES["ink"],
    "xtick.color": ROLES["line"],
    "ytick.color": ROLES["line"],
    "xtick.labelcolor": ROLES["muted"],
    "ytick.labelcolor": ROLES["muted"],
    "grid.color": ROLES["line"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.unicode_minus": False,
}


def quality(report: Report) -> str | None:
    """Perplexity against the size of the folder; one panel a text."""
    panels = []
    for text in ("domain", "outside"):
        points = [(s, number(getattr(report, s), "folder_bytes"), number(getattr(report, s), text, "perplexity")) for s in STATES]
        points = [(s, x, y) for s, x, y in points if x is not None and y is not None and y > 0]
        if points:
            panels.append((_text_name(report, text), points))
    return _draw(lambda figure: _quality(figure, panels), 2.7, "Perplexity against size") if panels else None


def _text_name(report: Report, text: str) -> str:
    section = report.protocol.get(text)
    name = section.get("name") if isinstance(section, dict) else None
    return _ascii(f"{text}: {name}" if name else text)


def _quality(figure: Any, panels: list[tuple[str, list[tuple[str, Any, Any]]]]) -> None:
    unit, word = (1e9, "GB") if max(p[1] for _, points in panels for p in points) >= 1e9 else (1e6, "MB")
    for i, (title, points) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        ys = [y for _, _, y in points]
        widest = max(x for _, x, _ in points) / unit
        spread = max(ys) - min(ys) or max(ys) * 0.1
        if max(ys) > 10 * min(ys):
            axes.set_yscale("log")
        else:
            axes.set_ylim(min(ys) - 0.3 * spread, max(ys) + 0.3 * spread)
        axes.set_xlim(0, widest * 1.12)
        axes.set_xlabel(f"folder on disk, {word}")
        axes.set_ylabel("perplexity (lower is better)")
        axes.set_title(title, parse_math=False)
        axes.grid(axis="y")
        _points(axes, [(s, x / unit, y) for s, x, y in points], widest)


def _points(axes: Any, points: list[tuple[str, float, float]], widest: float) -> None:
    at = {state: (x, y) for state, x, y in points}
    if "dense" in at:
        axes.axhline(at["dense"][1], color=ROLES["dense"], linewidth=0.9, linestyle=(0, (4, 3)))
    arrow = {"arrowstyle": "-|>", "color": ROLES["muted"], "linewidth": 1, "shrinkA": 5, "shrinkB": 5}
    for before, after in pairwise(s for s in ("packed", "tuned") if s in at):
        axes.annotate("", xy=at[after], xytext=at[before], arrowprops=arrow)
    upper = max(STATES[1:], key=lambda s: at.get(s, (0, 0))[1])
    for state, x, y in points:
        axes.plot([x], [y], marker="o", markersize=7, color=ROLES[state], markeredgewidth=0, linestyle="none")
        right = x > 0.6 * widest
        up = 1 if state in ("dense", upper) else -1
        axes.annotate(
            f"{state} {y:.4g}",
            (x, y),
            xytext=(0 if right else 9, 9 * up if right or state != "dense" else 7),
            textcoords="offset points",
            ha="right" if right else "left",
            va="bottom" if up > 0 else "top",
            color=ROLES["ink"],
        )


def training(report: Report, section: str = "training") -> str | None:
    """Loss by step of the training or the pruning, and the perplexity measured on the way, between packed and dense."""
    log = getattr(report, section)
    loss = [(p["step"], p["loss"]) for p in dicts(log.get("curve")) if number(p, "step") is not None and number(p, "loss") is not None]
    evals = [(p["step"], p["perplexity"]) for p in dicts(log.get("evals")) if _both(p)]
    if not loss and not evals:
        return None
    loss = loss[:: max(1, math.ceil(len(loss) / POINTS))]
    return _draw(lambda figure: _training(figure, report, loss, evals), 2.7, "Training curve")


def _both(point: dict[str, Any]) -> bool:
    return number(point, "step") is not None and number(point, "perplexity") is not None


def _training(figure: Any, report: Report, loss: list[tuple[float, float]], evals: list[tuple[float, float]]) -> None:
    panels = [p for p in ((_loss, loss), (_evals, evals)) if p[1]]
    for i, (paint, points) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True)
        paint(axes, report, points)


def _loss(axes: Any, report: Report, points: list[tuple[float, float]]) -> None:
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    long = len(points) >= 20
    axes.plot(xs, ys, color=ROLES["accent"], linewidth=1, alpha=0.35 if long else 1.0)
    if long:
        axes.plot(xs, _smooth(ys), color=ROLES["accent"], linewidth=1.8)
    axes.set_title("training loss" + (" (strong line: running mean)" if long else ""))


def _smooth(values: list[float]) -> list[float]:
    """Exponential running mean without start-up bias, over about a twentieth of the points."""
    keep, total, weight, out = 1 - 1 / max(2, len(values) / 20), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def _evals(axes: Any, report: Report, points: list[tuple[float, float]]) -> None:
    xs = [p[0] for p in points]
    for state in ("packed", "dense"):
        level = number(getattr(report, state), "domain", "perplexity")
        if level is not None:
            axes.axhline(level, color=ROLES[state], linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(
                f"{state} {level:.4g}", (1, level), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", ha="right"
            )
    axes.plot(xs, [p[1] for p in points], color=ROLES["tuned"], linewidth=1.4, marker="o", markersize=4.5, markeredgewidth=0)
    ys = [p[1] for p in points] + [y for s in ("packed", "dense") if (y := number(getattr(report, s), "domain", "perplexity")) is not None]
    spread = max(ys) - min(ys) or abs(ys[0]) * 0.1 or 1.0
    axes.set_ylim(min(ys) - 0.15 * spread, max(ys) + 0.2 * spread)
    axes.set_xlim(0, max(xs) * 1.04 or 1)
    axes.set_title("perplexity measured while training")


def layers(report: Report) -> str | None:
    """Packing error: a heat map of block by kind of linear, or bars where names show no blocks."""
    rows = [(str(r.get("name", "?")), float(r["error"])) for r in dicts(report.layers) if number(r, "error") is not None]
    if not rows:
        return None
    grid, rest = _grid(rows)
    blocks = {block for _, block in grid}
    if len(blocks) < 2:
        rows = sorted(rows, key=lambda r: -r[1])[:40]
        return _draw(lambda figure: _bars(figure, rows), 0.9 + 0.2 * len(rows), "Packing error by layer", True)
    kinds = list(dict.fromkeys(kind for kind, _ in grid))
    return _draw(lambda figure: _heat(figure, grid, kinds, sorted(blocks), rest), 1.0 + 0.26 * len(kinds), "Packing error by block and linear", True)


def _grid(rows: list[tuple[str, float]]) -> tuple[dict[tuple[str, int], float], list[tuple[str, float]]]:
    """(kind, block) -> the largest error there; experts and other numbered parts of a block share one kind. And the layers outside blocks."""
    grid: dict[tuple[str, int], float] = {}
    rest = []
    for name, error in rows:
        match = re.match(r"(?:.*?\.)?(\d+)\.(.+)", name)
        if match:
            key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", match[2]), int(match[1]))
            grid[key] = max(grid.get(key, 0.0), error)
        else:
            rest.append((name, error))
    return grid, rest


def _heat(figure: Any, grid: dict[tuple[str, int], float], kinds: list[str], blocks: list[int], rest: list[tuple[str, float]]) -> None:
    from matplotlib.patches import Rectangle

    axes = figure.add_subplot()
    top, low = max(grid.values()), min(grid.values())
    column = {block: i for i, block in enumerate(blocks)}
    for (kind, block), error in grid.items():
        x, y, share = column[block], kinds.index(kind), error / top if top > 0 else 0.0
        axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, facecolor=ROLES["accent"], alpha=0.06 + 0.74 * max(share, 0.0), linewidth=0))
        if len(blocks) <= 16:
            axes.annotate(f"{error:.3g}", (x, y), ha="center", va="center", fontsize=7.5)
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_yticks(range(len(kinds)), labels=[_ascii(k) for k in kinds], parse_math=False)
    step = max(1, math.ceil(len(blocks) / 20))
    axes.set_xticks(range(0, len(blocks), step), labels=[str(b) for b in blocks[::step]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    outside = "".join(f"; {_ascii(name)} {error:.3g}" for name, error in rest[:4])
    axes.set_xlabel("block" + (f"     (outside the blocks{outside.replace(';', ':', 1)})" if outside else ""), parse_math=False)
    axes.set_title(f"packing error, from {low:.3g} (faint) to {top:.3g} (strong)")


def _bars(figure: Any, rows: list[tuple[str, float]]) -> None:
    axes = figure.add_subplot()
    axes.barh(range(len(rows)), [error for _, error in rows], color=ROLES["accent"], height=0.65)
    axes.set_yticks(range(len(rows)), labels=[_ascii(name) for name, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.set_title("packing error" + (", the 40 largest" if len(rows) == 40 else ""))


def _ascii(text: str) -> str:
    """Plots know no other font than their own, and need no exotic names: anything but printable ASCII becomes a question mark."""
    return re.sub(r"[^ -~]", "?", text)[:60]


def _draw(paint: Any, height: float, label: str, measured: bool = False) -> str:
    """Run `paint` on a fresh figure of our style, `height` inches high; `measured` fits the margins to the labels, which takes twice the time."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, height), layout="constrained" if measured else None)
        if not measured:
            figure.subplots_adjust(left=0.065, right=0.995, top=1 - 0.25 / height, bottom=0.45 / height, wspace=0.16)
        paint(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _svg(file.getvalue(), label)


def _svg(text: str, label: str) -> str:
    """Fit matplotlib's file into a page: no XML head, no fixed size, CSS variables for the role colours, no ids but those referred to."""
    box = re.search(r'viewBox="[\d. ]+"', text)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"font: (?:\w+ )?([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for role, colour in ROLES.items():
        body = body.replace(colour, f"var(--{role})")
    return f'<svg {box[0] if box else ""} role="img" aria-label="{label}">{body}'
