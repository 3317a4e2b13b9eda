"""The figures of a sweep: quality against bits, bytes, memory of a GPU and speed, one panel each, with the front of each as a line.

Colour and marker tell the method (what varies of packer, tuner and pruning), so a label need only say the rest. The front is that of the panel's own
two numbers: the one against memory is another than the one against bytes.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from compressor.pipelines.pages import fronts
from compressor.pipelines.pages.figures import SERIES, SHAPES, Panel, ascii_text
from compressor.pipelines.pages.fronts import Axis, Point
from compressor.pipelines.pages.run_plots import PERPLEXITY, unit
from compressor.pipelines.report import number, short_names

Row = dict[str, Any]
Value = Callable[[Row], float | None]
METHODS = ("prune.method", "quant.packer", "tune.method", "finetune.when", "tune.start")  # keys whose values make a method
DENSE = "dense"


def method(row: Row) -> str:
    """What the colour tells: gptq + peqa."""
    keys = row.get("keys") or {}
    return " + ".join(str(keys[key]) for key in METHODS if keys.get(key) not in (None, "none")) or "plain"


def looks(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """method -> colour and marker, in the order of their names; after all colours came once, markers move on by one."""
    names = sorted({method(row) for row in rows})
    return {name: (SERIES[i % len(SERIES)], SHAPES[(i % len(SERIES) + i // len(SERIES)) % len(SHAPES)]) for i, name in enumerate(names)}


def short_label(row: Row) -> str:
    """The row's label without what its colour tells."""
    label, told = str(row.get("label") or row.get("id") or "?"), set(method(row).split(" + "))
    return "-".join(part for part in label.split("-") if part not in told) or label


def memory(row: Row, state: str | None = None) -> float | None:
    """Peak bytes on the GPU while its last state was measured. That of the process is of no use: what earlier stages left stays in it."""
    return number(row, "peak_bytes", f"evaluate {state or row.get('state')}_gpu")


def dense(rows: Sequence[Row]) -> Row | None:
    """The dense model as a row of its own: medians over the rows that measured it, or None."""
    found = [row["dense"] | {"memory": memory(row, DENSE)} for row in rows if isinstance(row.get("dense"), dict)]
    if not found:
        return None
    keys = ("domain", "outside", "bits_per_weight", "folder_bytes", "tokens_per_second", "memory")
    out: Row = {key: statistics.median(values) if (values := [v for f in found if (v := number(f, key)) is not None]) else None for key in keys}
    return out | {"perplexity": out["domain"], "tasks": next((f["tasks"] for f in found if f.get("tasks") and isinstance(f["tasks"], dict)), {})}


def panels(rows: Sequence[Row], legend: bool = False) -> list[Panel]:
    """Of the rows that are ok. `legend`: in each panel, for files that stand alone."""
    good, base = [row | {"memory": memory(row)} for row in rows if row.get("status") == "ok"], dense(rows)
    every = [*good, *([base] if base else [])]
    styles, out = looks(good), []
    for name, title, y, value, error in _measures(every):
        for by, x, size in _sizes(every):
            found = [(row, a, b) for row in good if (a := size(row)) is not None and (b := value(row)) is not None and (y.higher or b > 0)]
            points = [
                Point(f"{row.get('id')}: {a:.4g}, {b:.4g}", a, b, error(row) or 0.0, short_label(row), *styles[method(row)]) for row, a, b in found
            ]
            level = _dense_point(base, size, value, error)
            if points:
                paint = partial(_paint, title=title, x=x, y=y, points=points, level=level, styles=styles if legend else {})
                extra = 0.18 * (1 + (len(styles) - 1) // 3) + 0.1 if legend else 0.0
                out.append(Panel(f"{name}-by-{by}", ascii_text(f"{title} against {x.label}", 200), paint, height=3.2 + extra, below=extra))
    return out


def _dense_point(base: Row | None, size: Value, value: Value, error: Value) -> Point | None:
    a, b = (size(base), value(base)) if base else (None, None)
    if base is None or a is None or b is None:
        return None
    return Point(f"dense: {a:.4g}, {b:.4g}", a, b, error(base) or 0.0, f"dense {b:.4g}", "role:dense", "*")


def _measures(rows: Sequence[Row]) -> list[tuple[str, str, Axis, Value, Value]]:
    """Name for files, title, axis, and the functions that give a row's value and its standard error."""

    def of(*keys: str) -> Value:
        return lambda row: fronts.drawable(number(row, *keys))

    def paired(row: Row) -> float | None:
        """Of the domain's perplexity, from the difference to the dense model on the same windows."""
        perplexity, error = number(row, "perplexity"), number(row, str(row.get("state")), "loss_change_stderr")
        return None if perplexity is None or error is None else perplexity * error

    texts = [(key, text) for key, text in (("perplexity", "domain"), ("outside", "outside")) if any(number(row, key) is not None for row in rows)]
    out: list[tuple[str, str, Axis, Value, Value]] = []
    out += [(f"perplexity-{text}", f"perplexity, {text}", PERPLEXITY, of(key), paired if text == "domain" else lambda _: None) for key, text in texts]
    tasks: dict[str, Any] = {name: task for row in rows for name, task in (row.get("tasks") or {}).items()}
    names = short_names(tasks)
    for i, (name, task) in enumerate(tasks.items()):
        axis = Axis(f"{ascii_text(task['metric']) if isinstance(task, dict) and 'metric' in task else 'score'} (higher is better)", higher=True)
        out.append((f"task-{i}", f"task: {names[name]}", axis, of("tasks", name, "value"), of("tasks", name, "stderr")))
    return out


def _sizes(rows: Sequence[Row]) -> list[tuple[str, Axis, Value]]:
    def plain(key: str) -> Value:
        return lambda row: fronts.drawable(number(row, key))

    def scaled(key: str) -> tuple[str, Value]:
        value = plain(key)
        factor, word = unit([v for row in rows if (v := value(row)) is not None])
        return word, lambda row: None if (v := value(row)) is None else v / factor

    (disk_word, disk), (memory_word, peak) = scaled("folder_bytes"), scaled("memory")
    return [
        ("bits", Axis("bits per weight of the linears", "bits", log=True), plain("bits_per_weight")),
        ("size", Axis(f"folder on disk, {disk_word}", disk_word, log=True), disk),
        ("memory", Axis(f"peak GPU memory while evaluating, {memory_word}", memory_word, log=True), peak),
        ("speed", Axis("tokens per second while evaluating", "tokens/s", higher=True, log=True), plain("tokens_per_second")),
    ]


def _paint(figure: Any, title: str, x: Axis, y: Axis, points: list[Point], level: Point | None, styles: dict[str, tuple[str, str]]) -> None:
    line = fronts.front([(p.x, p.y) for p in points], x, y)
    shown = [p if i in line else fronts.faint(p) for i, p in enumerate(points)]
    fronts.paint(figure, title, x, y, shown, line, level)
    if styles:
        from matplotlib.lines import Line2D

        marks = [Line2D([], [], color=colour, marker=shape, linestyle="none", markersize=5) for colour, shape in styles.values()]
        figure.legend(marks, [ascii_text(name) for name in styles], loc="lower center", ncols=3, fontsize=7.5, handletextpad=0.2)
