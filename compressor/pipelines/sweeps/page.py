"""The page of a sweep: fronts of quality against size, all rows, failures, and under what protocol it all was measured.

It reads the sweep's folder as docs/sweeps.md describes it, and the reports of the runs that stand there. Like a run's page it loads nothing, escapes
everything, and the same folder always gives the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from compressor import strict
from compressor.errors import CompressorError, ModelError
from compressor.pipelines.pages import figures, quality_parts
from compressor.pipelines.pages.figures import Panel
from compressor.pipelines.pages.parts import document, esc, many, note, pairs, panels, pre, section, short, table
from compressor.pipelines.report import DASH, Report, duration, fixed, number, short_names, size, write_text
from compressor.pipelines.sweeps import front_plots
from compressor.pipelines.sweeps.front_plots import Row

CAPTION = (
    "Each dot is a run. The line of steps is the front of its panel: runs that no other beats in both directions. Runs behind it are faint, and "
    "arrows at an edge stand for what lies beyond it. Bars are one standard error: neighbours whose bars overlap may be equal, on the line or not. "
    "The star and the dashed line are the dense model. Speed is that of measuring, with Python and its libraries."
)
MEMORY = "peak GPU memory"
ORDER = "Smallest first; a dot marks the front of perplexity against the folder's bytes."
VARIES = "(varies)"
OBJECTS = ("keys", "tasks", "dense", "peak_bytes")  # what must be an object, or null, in a row


def write(folder: Path) -> None:
    """sweep.html of a sweep's folder. ModelError if the folder holds no sweep, OutputError if it cannot be written."""
    write_text(folder / "sweep.html", page(folder))


def page(folder: Path) -> str:
    plan, rows = read(folder)
    reports = found_reports(folder, rows)
    name = str(plan.get("model") or "a model")
    good, bad = [r for r in rows if r.get("status") == "ok"], [r for r in rows if r.get("status") in ("failed", "skipped")]
    told = "".join(f"<p>{esc(r)}</p>" for r in remarks(rows, reports))
    heads, cells, marked = results(rows)
    first = reports[0] if reports else Report(created="", compressor="")
    failures = [[r.get("id"), r.get("status"), r.get("error"), r.get("attempts")] for r in bad]
    found = front_plots.panels(rows)
    parts = [
        f"<h1>Sweep of {esc(name)}</h1><p class=muted>{esc(_counts(plan, rows))}</p>",
        _headline(good, front_plots.dense(rows)),
        f"<div class=remarks>{told}</div>" if told else "",
        section("Quality against size", (note(CAPTION) + _legend(good) + panels(found)) if found else ""),
        section("Runs", (note(ORDER) if cells else "") + table(heads, cells, "right named", marked)),
        section("Failures", table(("experiment", "status", "why", "attempts"), failures, "keys")),
        section("Axes", table(("key", "values"), axes(plan, rows), "keys")),
        section("Protocol", quality_parts.protocol(Report(protocol=first.protocol))),
        section("Recipe", pre(base_recipe(reports)) + (f"<p class=muted>Command</p>{pre(str(plan['command']))}" if plan.get("command") else "")),
        section("Model and environment", pairs(first.model) + pairs(first.environment)),
    ]  # fmt: skip
    return document(f"Sweep of {name}", parts)


def figures_of(folder: Path) -> list[Panel]:
    """Every figure of the page, for files of their own."""
    return front_plots.panels(read(folder)[1], legend=True)


def is_sweep(folder: Path) -> bool:
    return (folder / "rows.jsonl").is_file()


def read(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """The plan and the rows. ModelError, with the line, for what is missing or damaged."""
    plan: Any = {}
    where = folder / "plan.json"
    try:
        plan = strict.read(where) if where.exists() else {}
        where = folder / "rows.jsonl"
        rows = []
        for i, line in enumerate(where.read_text("utf-8").splitlines(), start=1):
            where = folder / f"rows.jsonl, line {i},"
            rows.append(strict.parse(line))
    except OSError as error:
        raise ModelError(f"{where} cannot be read ({error.strerror}); give the folder of a sweep") from None
    except ValueError as error:
        raise ModelError(f"{where} is not JSON ({error}); run the sweep's command again, which writes it anew") from None
    if not isinstance(plan, dict) or not all(isinstance(row, dict) for row in rows):
        raise ModelError(f"{folder} holds no sweep: its plan and each line of rows.jsonl must be JSON objects; run the sweep's command again")
    for i, row in enumerate(rows, start=1):
        if wrong := next((key for key in OBJECTS if not isinstance(row.get(key), dict | None)), None):
            raise ModelError(f"{folder / 'rows.jsonl'}, line {i}: {wrong} must be an object; run the sweep's command again, which writes it anew")
    return plan, rows


def found_reports(folder: Path, rows: Sequence[Row]) -> list[Report]:
    """Of the runs whose folders stand, in the rows' order; what cannot be read is passed over, for the rows hold its numbers."""
    out = []
    for row in rows:
        path = folder / "runs" / str(row.get("id")) / "report.json"
        if row.get("status") == "ok" and path.resolve().is_relative_to(folder.resolve()) and path.is_file():
            try:
                out.append(Report.load(path))
            except CompressorError:
                continue
    return out


def remarks(rows: Sequence[Row], reports: Sequence[Report]) -> list[str]:
    """What a reader must know before comparing rows."""
    out = []
    failed = sum(row.get("status") == "failed" for row in rows)
    if failed:
        out.append(f"{many(failed, 'run')} of {len(rows)} failed and {'is' if failed == 1 else 'are'} missing from the plots; see Failures.")
    for text in ("domain", "outside"):
        hashes = {(p.get("data_sha256"), p.get("window"), p.get("tokens")) for r in reports if isinstance(p := r.protocol.get(text), dict)}
        if len(hashes) > 1:
            out.append(f"Perplexities on the {text} text do not compare: runs measured {len(hashes)} unlike texts, windows or numbers of tokens.")
    hosts = sorted({str(row["host"]) for row in rows if row.get("host")})
    if len(hosts) > 1:
        out.append(f"Speed does not compare: {len(hosts)} machines took part.")
    return out


def _counts(plan: dict[str, Any], rows: Sequence[Row]) -> str:
    states = {word: sum(row.get("status") == word for row in rows) for word in ("ok", "failed", "skipped", "running")}
    planned = number(plan, "experiments")
    waiting = max(0, int(planned) - len(rows)) if planned is not None else 0
    words = [f"{count} {word}" for word, count in (states | {"waiting": waiting}).items() if count]
    ended = max((str(row["finished"]) for row in rows if row.get("finished")), default="")
    return " · ".join(word for word in [many(int(planned or len(rows)), "experiment") + (f": {', '.join(words)}" if words else ""), ended] if word)


def _headline(good: Sequence[Row], dense: Row | None) -> str:
    """The ends of the front: the smallest folder, and the best quality among all."""
    measured = [r for r in good if number(r, "perplexity") is not None and number(r, "folder_bytes") is not None]
    if not measured:
        return ""
    cards = [
        ("smallest", min(measured, key=lambda r: (r["folder_bytes"], r["perplexity"]))),
        ("best perplexity", min(measured, key=lambda r: (r["perplexity"], r["folder_bytes"]))),
    ]
    filled = [
        (f"{what}: {r.get('label')}", f"{fixed(r['perplexity'])} at {size(r['folder_bytes'])}", "perplexity, domain, and folder") for what, r in cards
    ]
    if dense:
        filled.append(("dense", f"{fixed(dense['perplexity'])} at {size(dense['folder_bytes'])}", "perplexity, domain, and folder"))
    return f"<dl class=cards>{''.join(f'<div><dt>{esc(a)}</dt><dd>{esc(b)}</dd><dd>{esc(c)}</dd></div>' for a, b, c in filled)}</dl>"


def _legend(good: Sequence[Row]) -> str:
    looks = front_plots.looks(good)
    items = "".join(f"<li>{figures.swatch(colour, shape)}{esc(name)}</li>" for name, (colour, shape) in looks.items())
    return f"<ul class=legend>{items}</ul>" if len(looks) > 1 else ""


def results(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[int]]:
    """Heads and cells of the rows that are ok, the smallest first, and which of them are on the front; the dense model comes last."""
    good = [row for row in rows if row.get("status") == "ok"]
    good.sort(key=lambda r: (number(r, "folder_bytes") or 0.0, number(r, "perplexity") or 0.0, str(r.get("id"))))
    tasks = short_names(name for row in good for name in row.get("tasks") or {})
    base = front_plots.dense(rows)
    cells = [_cells(row, str(row.get("label") or row.get("id")), front_plots.memory(row), list(tasks)) for row in good]
    cells += [_cells(base, "dense", base["memory"], list(tasks))] if base and good else []
    heads = ["run", "perplexity, domain", "perplexity, outside", *tasks.values(), "bits per weight", "folder", "tokens/s", MEMORY, "time"]
    if all(row[heads.index(MEMORY)] == DASH for row in cells):  # no GPU
        at = heads.index(MEMORY)
        heads, cells = heads[:at] + heads[at + 1 :], [row[:at] + row[at + 1 :] for row in cells]
    return heads, cells, [i for i, row in enumerate(good) if row.get("front") is True]


def _cells(row: Row, name: str, memory: float | None, tasks: Sequence[str]) -> list[str]:
    scores = [quality_parts.score((row.get("tasks") or {}).get(task)) for task in tasks]
    bits, speed = fixed(number(row, "bits_per_weight")), fixed(number(row, "tokens_per_second"), 0)
    texts = [fixed(number(row, key)) for key in ("perplexity", "outside")]
    return [name, *texts, *scores, bits, size(number(row, "folder_bytes")), speed, size(memory), duration(number(row, "wall_seconds"))]


def axes(plan: dict[str, Any], rows: Sequence[Row]) -> list[list[str]]:
    """What varied, and the values that occurred, in the order in which they did."""
    found: dict[str, dict[str, None]] = {str(key): {} for key in keys} if isinstance(keys := plan.get("axes"), list) else {}
    for row in rows:
        for key, value in (row.get("keys") or {}).items():
            found.setdefault(str(key), {})[DASH if value is None else short(value)] = None
    return [[key, ", ".join(values)] for key, values in found.items() if values]


def base_recipe(reports: Sequence[Report]) -> str:
    """The recipe that all runs share, with a word where they differ."""
    recipes = [r.recipe for r in reports if r.recipe]
    return yaml.safe_dump(_shared(recipes), sort_keys=False, allow_unicode=True, width=10_000) if recipes else ""


def _shared(values: Sequence[Any]) -> Any:
    if all(isinstance(v, dict) for v in values):
        return {key: _shared([v.get(key) for v in values]) for key in dict.fromkeys(key for v in values for key in v)}
    return values[0] if all(v == values[0] for v in values) else VARIES
