"""The figures of a run: quality against size, the choice of layers' formats, and curves of training. Every function gives
panels, and none where the report lacks the numbers."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from compressor.pipelines.pages import fronts
from compressor.pipelines.pages.figures import Panel, ascii_text, mark
from compressor.pipelines.pages.fronts import Axis, Point
from compressor.pipelines.report import STATES, Report, dicts, number, short_names

POINTS = 1500  # a longer training curve is thinned to this many points
PERPLEXITY = Axis("perplexity (lower is better)", log=True)
Value = Callable[[str], float | None]  # of a state of the run


def unit(bytes_: list[float]) -> tuple[float, str]:
    """What to divide by, and its name, for the largest of these sizes."""
    top = max(bytes_, default=0.0)
    return next(((factor, word) for factor, word in ((1e9, "GB"), (1e6, "MB")) if top >= factor), (1e3, "kB"))


def quality(report: Report) -> list[Panel]:
    """Perplexity on either text and accuracy on tasks, against bits, bytes on disk, memory of a GPU and speed."""
    states = [s for s in STATES if getattr(report, s)]
    out = []
    for name, title, y, value, error in _measures(report):
        for by, x, size in _sizes(report, states):
            found = [(s, fronts.drawable(size(s)), fronts.drawable(value(s)), fronts.drawable(error(s)) or 0.0) for s in states]
            points = [(s, a, b, e) for s, a, b, e in found if a is not None and b is not None and (y.higher or b > 0)]
            if points:
                out.append(
                    Panel(f"{name}-by-{by}", ascii_text(f"{title} against {x.label}", 200), partial(_states, title=title, x=x, y=y, points=points))
                )
    return out


def _measures(report: Report) -> list[tuple[str, str, Axis, Value, Value]]:
    """Name for files, title, axis, and the functions that give the value of a state and its standard error."""

    def of(*keys: str) -> Value:
        return lambda state: number(getattr(report, state), *keys)

    def text(key: str) -> str:
        section = report.protocol.get(key)
        name = section.get("name") if isinstance(section, dict) else None
        return f"{key}: {name}" if name else key

    def paired(state: str) -> float | None:
        """Of the domain's perplexity, from the difference to the dense model on the same windows."""
        perplexity, error = number(getattr(report, state), "domain", "perplexity"), number(getattr(report, state), "divergence", "loss_change_stderr")
        return None if perplexity is None or error is None else perplexity * error

    out: list[tuple[str, str, Axis, Value, Value]] = [("perplexity-domain", text("domain"), PERPLEXITY, of("domain", "perplexity"), paired)]
    out.append(("perplexity-outside", text("outside"), PERPLEXITY, of("outside", "perplexity"), lambda _: None))
    tasks = short_names(t for s in STATES if isinstance(found := getattr(report, s).get("tasks"), dict) for t in found)
    for i, (task, name) in enumerate(tasks.items()):
        axis = Axis("accuracy (higher is better)", higher=True)
        out.append((f"task-{i}", f"task: {name}", axis, of("tasks", task, "value"), of("tasks", task, "stderr")))
    return out


def _sizes(report: Report, states: list[str]) -> list[tuple[str, Axis, Value]]:
    def scaled(value: Value) -> tuple[str, Value]:
        factor, word = unit([v for s in states if (v := value(s)) is not None])
        return word, lambda s: None if (v := value(s)) is None else v / factor

    word, disk = scaled(lambda s: number(getattr(report, s), "folder_bytes"))
    other, memory = scaled(lambda s: number(report.peak_bytes, f"evaluate {s}_gpu"))
    speed = Axis("tokens per second while evaluating", higher=True, zero=True)
    return [
        ("bits", Axis("bits per weight of the linears", zero=True), lambda s: number(getattr(report, s), "bits_per_weight")),
        ("size", Axis(f"folder on disk, {word}", zero=True), disk),
        ("memory", Axis(f"peak GPU memory while evaluating, {other}", zero=True), memory),
        ("speed", speed, lambda s: number(getattr(report, s), "domain", "tokens_per_second")),
    ]


def _states(figure: Any, title: str, x: Axis, y: Axis, points: list[tuple[str, float, float, float]]) -> None:
    named = {s: Point(f"{s}: {a:.4g}, {b:.4g}", a, b, e, f"{s} {b:.4g}", f"role:{s}") for s, a, b, e in points}
    tuned = [(named["packed"], named["tuned"])] if {"packed", "tuned"} <= named.keys() else []
    fronts.paint(figure, title, x, y, [p for s, p in named.items() if s != "dense"], dense=named.get("dense"), arrows=tuned)


def choice(report: Report) -> list[Panel]:
    """Divergence from the dense model against bits and bytes: uniform recipes, what the solver predicted, and what was reached."""
    found = [("uniform", str(row.get("spec", "?")), row) for row in dicts(report.choice.get("uniform"))]
    found += [(key, key, row) for key in ("predicted", "reached") if isinstance(row := report.choice.get(key), dict)]
    factor, word = unit([v for _, _, row in found if (v := number(row, "folder_bytes")) is not None])
    y = Axis("divergence from dense, nats a token" if report.choice.get("measure", "kl") == "kl" else "estimated damage", log=True)
    bits, disk = Axis("bits per weight of the linears"), Axis(f"folder on disk, {word}")
    out = []
    for by, key, scale, x in (("bits", "bits_per_weight", 1.0, bits), ("size", "folder_bytes", factor, disk)):
        points = [
            (kind, name, a / scale, b)
            for kind, name, row in found
            if (a := fronts.drawable(number(row, key))) is not None and (b := fronts.drawable(number(row, "loss"))) is not None
        ]
        if points:
            out.append(Panel(f"choice-by-{by}", f"Choice: loss against {x.label}", partial(_choice, x=x, y=y, points=points)))
    return out


def _choice(figure: Any, x: Axis, y: Axis, points: list[tuple[str, str, float, float]]) -> None:
    looks = {"uniform": ("role:muted", "o"), "predicted": ("role:packed", "D"), "reached": ("role:tuned", "s")}
    marks = [Point(f"{name}: {a:.4g}, {b:.4g}", a, b, 0.0, name, *looks[kind]) for kind, name, a, b in points]
    same = [i for i, (kind, *_) in enumerate(points) if kind == "uniform"]
    line = [same[i] for i in fronts.front([(marks[i].x, marks[i].y) for i in same], x, y)]
    fronts.paint(figure, "chosen by layer, and uniform recipes (grey)", x, y, marks, line)


def training(report: Report, section: str = "training") -> list[Panel]:
    """Loss by step of the training or the pruning, and the perplexity measured on the way, between packed and dense."""
    log = getattr(report, section)
    loss, evals = (_curve(log.get(part), key) for part, key in (("curve", "loss"), ("evals", "perplexity")))
    loss = loss[:: max(1, math.ceil(len(loss) / POINTS))]
    out = [Panel(f"{section}-loss", f"Loss by step of the {section}", partial(_loss, points=loss))] if loss else []
    return out + ([Panel(f"{section}-perplexity", "Perplexity while training", partial(_evals, report=report, points=evals))] if evals else [])


def _curve(rows: Any, key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have both."""
    found = [(fronts.drawable(number(row, "step")), fronts.drawable(number(row, key))) for row in dicts(rows)]
    return [(a, b) for a, b in found if a is not None and b is not None]


def _loss(figure: Any, points: list[tuple[float, float]]) -> None:
    axes = _steps(figure)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    long = len(points) >= 20
    axes.plot(xs, ys, color="role:accent", linewidth=1, alpha=0.35 if long else 1.0, gid=mark("loss"))
    if long:
        axes.plot(xs, _smooth(ys), color="role:accent", linewidth=1.8, gid=mark("running mean of the loss"))
    axes.set_ylabel("nats a token")
    axes.set_title("training loss" + (" (strong line: running mean)" if long else ""))


def _steps(figure: Any) -> Any:
    axes = figure.add_subplot()
    axes.grid(axis="y")
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True, nbins=7)
    return axes


def _smooth(values: list[float]) -> list[float]:
    """Exponential running mean without start-up bias, over about a twentieth of the points."""
    keep, total, weight, out = 1 - 1 / max(2, len(values) / 20), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def _evals(figure: Any, report: Report, points: list[tuple[float, float]]) -> None:
    axes = _steps(figure)
    levels = [(s, y) for s in ("packed", "dense") if (y := fronts.drawable(number(getattr(report, s), "domain", "perplexity"))) is not None]
    for state, level in levels:
        axes.axhline(level, color=f"role:{state}", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(f"{state} {level:.4g}", (0, level), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points")
    axes.plot([p[0] for p in points], [p[1] for p in points], color="role:tuned", linewidth=1.4, marker="o", markersize=4.5, markeredgewidth=0,
              gid=mark("perplexity while training"))  # fmt: skip
    ys = [p[1] for p in points] + [y for _, y in levels]
    spread = max(ys) - min(ys) or abs(ys[0]) * 0.1 or 1.0
    axes.set_ylim(min(ys) - 0.15 * spread, max(ys) + 0.2 * spread)
    axes.set_xlim(0, max(p[0] for p in points) * 1.04 or 1)
    axes.set_ylabel("perplexity")
    axes.set_title("perplexity measured while training")
