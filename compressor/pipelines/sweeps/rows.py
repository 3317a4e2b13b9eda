"""One row an experiment: what the report of its run says, in few numbers, and which rows lie on the front.

A row is a dict of JSON values with all keys of `blank`, as docs/sweeps.md lists them; what does not apply is null, so that readers need no
guesses. The front is that of quality against bytes: a row is on it if no other is at least as good in both and better in one. Quality is the
perplexity of the domain, or of encoders the first of their scores, turned round. Rows of unlike models or texts must not be compared: a sweep has
one model, and its axes should not be its texts.
"""

import csv
import io
import math
import socket
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compressor import strict
from compressor.errors import CompressorError
from compressor.pipelines.report import SCORES, Report, duration, fixed, number, short_names, size
from compressor.pipelines.sweeps.grid import Experiment

Row = dict[str, Any]
DONE = ("ok", "failed", "skipped")
PLAIN = (
    "front", "state", "perplexity", "outside", "bits_per_weight", "folder_bytes", "ratio", "tokens_per_second", "wall_seconds", "attempts", "kept",
)  # fmt: skip  # columns of the CSV as they are in a row
STATES = ("tuned", "packed", "pruned")  # the last one measured is what the folder holds
SAME = ("bits_per_weight", "folder_bytes", "ratio", "tokens_per_second", "tasks")  # of the row and of its states


def blank(experiment: Experiment, status: str, error: str | None = None, attempts: int = 0) -> Row:
    """A row that knows what is asked for, and nothing of the result."""
    known: Row = {"id": experiment.id, "status": status, "keys": experiment.keys, "label": experiment.label, "front": False, "state": None}
    results: Row = dict.fromkeys(("dense", "pruned", "packed", "tuned", "perplexity", "outside", *SAME))
    rest: Row = {"seconds": {}, "peak_bytes": {}, "wall_seconds": None, "attempts": attempts, "resumed": False, "host": socket.gethostname()}
    return known | results | {"tasks": {}} | rest | {"finished": None, "kept": False, "path": None, "error": error}


def finished(experiment: Experiment, folder: Path, seconds: float | None, attempts: int) -> Row:
    """The row of a run that has written `folder`; seconds: of the child process, None if nobody saw it end. ModelError for a damaged report."""
    report = Report.load(folder / "report.json")
    states = {name: _state(getattr(report, name)) for name in ("dense", *reversed(STATES))}
    last = next((name for name in STATES if states[name]), None)
    final: dict[str, Any] = states[last] or {} if last else {}
    row = blank(experiment, "ok", attempts=attempts) | states | {"state": last, "path": f"runs/{experiment.id}", "kept": True}
    row |= (
        {"perplexity": final.get("domain"), "outside": final.get("outside")}
        | {key: final.get(key) for key in SAME}
        | {"tasks": final.get("tasks", {})}
    )
    row |= {"seconds": report.seconds, "peak_bytes": report.peak_bytes, "resumed": report.resumed, "wall_seconds": seconds}
    return row | {"finished": datetime.now(UTC).isoformat(timespec="seconds")}


def failed(experiment: Experiment, error: str, seconds: float, attempts: int) -> Row:
    """The row of a run that came to nothing."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return blank(experiment, "failed", error, attempts) | {"wall_seconds": seconds, "finished": now}


def _state(values: dict[str, Any]) -> dict[str, Any] | None:
    """What a row says of the dense, pruned, packed or tuned model; None if it was not measured."""
    if not values:
        return None
    out: dict[str, Any] = {text: number(values, text, "perplexity") for text in ("domain", "outside")}
    out |= {key: number(values, key) for key in ("bits_per_weight", "folder_bytes", "ratio")}
    out["tokens_per_second"] = number(values, "domain", "tokens_per_second")
    return out | {"loss_change_stderr": number(values, "divergence", "loss_change_stderr"), "tasks": _tasks(values)}


def _tasks(values: dict[str, Any]) -> dict[str, Any]:
    """Metrics by task: those of `--tasks`, and the scores of an encoder as tasks of their own."""
    tasks, scores = values.get("tasks"), values.get("task")
    found = {str(name): task for name, task in tasks.items() if isinstance(task, dict)} if isinstance(tasks, dict) else {}
    scored = {name: number(scores, name) for name in SCORES}
    return found | {name: {"metric": name, "value": value, "stderr": None} for name, value in scored.items() if value is not None}


def cost(row: Row) -> float | None:
    """What a good row has little of: the perplexity of the domain; of encoders their first score, negative; None if neither is known."""
    perplexity = number(row, "perplexity")
    if perplexity is not None:
        return perplexity
    scores = (number(row, "tasks", name, "value") for name in SCORES)
    return next((-score for score in scores if score is not None), None)


def mark_front(rows: Iterable[Row]) -> list[Row]:
    """The rows with `front` set anew. Rows that tie in both are all on it; O(n log n)."""
    rows, points = list(rows), list[tuple[float, float, int]]()
    for i, row in enumerate(rows):
        value, folder = cost(row), number(row, "folder_bytes")
        if row["status"] == "ok" and value is not None and folder is not None:
            points.append((folder, value, i))
    best, at, found = math.inf, (0.0, 0.0), set[int]()
    for folder, value, i in sorted(points):
        if value < best or (folder, value) == at:
            best, at = value, (folder, value)
            found.add(i)
    return [row | {"front": i in found} for i, row in enumerate(rows)]


def read(path: Path) -> Row | None:
    """The row of a file, or None if there is none; a file that is no row is as good as none, for its work can be done again."""
    try:
        row = strict.read(path)
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and {"id", "status", "attempts", "folder_bytes"} <= row.keys() else None


def sentence(row: Row) -> str:
    """What a person reads when an experiment ends."""
    if row["status"] != "ok":
        return f"{row['id']} {row['status']}: {row['error']}"
    quality = f"perplexity {fixed(row['perplexity'])}" if row["perplexity"] is not None else f"score {fixed(-(cost(row) or 0.0))}"
    return f"{row['id']} {quality}, {fixed(row['bits_per_weight'])} bits, {size(row['folder_bytes'])}, {duration(row['wall_seconds'])}"


def as_csv(rows: list[Row]) -> str:
    """One line a row, for other programs: what varies, the results of the state that the folder holds, and each task with its standard error."""
    lines, names = [], short_names(name for row in rows for name in row["tasks"])
    for row in rows:
        line = {key: row[key] for key in ("id", "status")} | row["keys"] | {key: row[key] for key in PLAIN}
        line |= {f"{state} perplexity": number(row, state, "domain") for state in ("dense", "packed")}
        line |= {"peak_bytes": max(row["peak_bytes"].values(), default=None)} | {f"seconds {name}": s for name, s in row["seconds"].items()}
        for name, task in row["tasks"].items():
            line |= {names[name]: number(task, "value"), f"{names[name]} stderr": number(task, "stderr")}
        lines.append(line | {"error": row["error"]})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def table(rows: list[Row]) -> Any:
    """All rows for the terminal, the smallest first; a star marks the front, and errors stand beneath."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    out = Table(title="sweep (* on the front of perplexity against bytes)", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("", "experiment", "domain", "outside", "bits", "folder", "time", ""):
        out.add_column(name, no_wrap=name != "experiment", overflow="fold")
    for row in sorted(rows, key=lambda r: (r["folder_bytes"] is None, r["folder_bytes"] or 0, cost(r) or 0.0)):
        numbers = [*(fixed(row[key]) for key in ("perplexity", "outside", "bits_per_weight")), size(row["folder_bytes"])]
        said = "" if row["status"] == "ok" else row["status"]
        out.add_row("*" if row["front"] else "", Text(row["id"]), *numbers, duration(row["wall_seconds"]), said)
    return Group(out, *(Text(sentence(row), overflow="fold") for row in rows if row["status"] != "ok" and row["error"]))


def gathered(experiment: Experiment, folder: Path, seconds: float | None, attempts: int) -> Row:
    """As `finished`; a report that cannot be read makes a row that failed."""
    try:
        return finished(experiment, folder, seconds, attempts)
    except CompressorError as error:
        return failed(experiment, str(error), seconds or 0.0, attempts)
