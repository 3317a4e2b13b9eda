"""The report as files: figures for papers (SVG, PNG), tables for machines (CSV) and for model cards (Markdown), and the page again.

It reads the report.json of a run or the rows of a sweep, never a model, so it costs seconds. Numbers in CSV are as measured, not rounded. Cells that
a spreadsheet would take for a formula get an apostrophe in front, because names come from strangers.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import ModelError, OutputError
from compressor.pipelines import card, render
from compressor.pipelines.journal import claimed
from compressor.pipelines.pages import figures
from compressor.pipelines.pages.figures import Panel
from compressor.pipelines.report import STATES, Report, dicts, number, short_names, write_bytes, write_text
from compressor.pipelines.show import Show
from compressor.pipelines.sweeps import page as sweep_page

KINDS = ("svg", "png", "csv", "markdown")


@dataclass(frozen=True)
class Source:
    """What a folder holds: the figures, tables and texts by the names of their files."""

    figures: Sequence[Panel]
    csv: dict[str, str]
    markdown: str
    page: tuple[str, str]


def write(source: str | os.PathLike[str], output: Path | None, kinds: Sequence[str], show: Show) -> dict[str, Any]:
    """Write files of these KINDS, and the page, into `output` (default: beside the source, its name with -report); returns output and files.

    source: a run's folder, a sweep's folder, or a report.json. ModelError if it is none of them, OutputError if the files cannot be written.
    """
    found = read(Path(source))
    folder = output or default_output(Path(source))
    texts = {found.page[0]: found.page[1]}
    if "csv" in kinds:
        texts |= found.csv
    if "markdown" in kinds:
        texts["results.md"] = found.markdown
    drawings = [kind for kind in ("svg", "png") if kind in kinds]
    _make(folder / "plots" if drawings and found.figures else folder)
    with claimed(folder / "report"):
        for name, text in texts.items():
            write_text(folder / name, text)
        with show.task("figures", len(found.figures) * len(drawings)) as advance:
            for panel in found.figures if drawings else ():
                for kind in drawings:
                    path = folder / "plots" / f"{panel.name}.{kind}"
                    write_text(path, figures.svg(panel)) if kind == "svg" else write_bytes(path, figures.png(panel))
                    advance(1, path.name)
    names = [*texts, *(f"plots/{panel.name}.{kind}" for panel in found.figures for kind in drawings)]
    return {"output": str(folder), "files": names}


def read(path: Path) -> Source:
    """The report or the sweep at `path`."""
    if sweep_page.is_sweep(path):
        return _sweep(path)
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{path} holds neither report.json nor rows.jsonl: give the folder of a run or of a sweep, or a report.json")
    report = Report.load(file)
    tables = {"results.csv": result_csv(report)} | ({"layers.csv": table_csv(layer_rows(report))} if dicts(report.layers) else {})
    return Source(list(render.figures_of(report)), tables, card.tables(report), ("report.html", render.page(report)))


def _sweep(folder: Path) -> Source:
    rows = sweep_page.read(folder)[1]
    heads, cells, marked = sweep_page.results(rows)
    starred = [[f"{row[0]} (front)" if i in marked else row[0], *row[1:]] for i, row in enumerate(cells)]
    tables = {"results.csv": table_csv(flat_rows(rows))}
    return Source(sweep_page.figures_of(folder), tables, card.grid(heads, starred), ("sweep.html", sweep_page.page(folder)))


def default_output(source: Path) -> Path:
    place = (source if source.is_dir() else source.parent).resolve()
    return place.with_name(f"{place.name}-report")


def result_csv(report: Report) -> str:
    """A row a measured state."""
    rows = []
    for state in STATES:
        if values := getattr(report, state):
            peak = number(report.peak_bytes, f"evaluate {state}_gpu")
            rows.append({"state": state} | values | ({} if peak is None else {"peak_gpu_bytes": peak}))
    return table_csv(flat_rows(rows))


def layer_rows(report: Report) -> list[dict[str, Any]]:
    return [row | {"shape": "x".join(str(n) for n in row["shape"])} if isinstance(row.get("shape"), list) else row for row in dicts(report.layers)]


def flat_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as `flat`, with tasks by their short names."""
    states = [values for row in rows for values in (row, *map(row.get, STATES)) if isinstance(values, dict)]
    names = short_names(name for values in states if isinstance(tasks := values.get("tasks"), dict) for name in tasks)
    return [flat(row, names) for row in rows]


def flat(values: dict[str, Any], tasks: dict[str, str], above: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots; `tasks`: name -> what it is called here."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            renamed = {str(tasks.get(name, name)): found for name, found in value.items()} if key == "tasks" else value
            out |= flat(renamed, tasks, f"{above}{key}.")
        else:
            out[f"{above}{key}"] = value
    return out


def table_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Columns in the order in which they first occur; what is missing stays empty."""
    file = io.StringIO()
    heads = list(dict.fromkeys(key for row in rows for key in row))
    out = csv.writer(file, lineterminator="\n")
    out.writerow(_cells(heads))
    out.writerows(_cells(row.get(head) for head in heads) for row in rows)
    return file.getvalue()


def _cells(values: Iterable[Any]) -> list[Any]:
    out = []
    for value in values:
        plain = json.dumps(value) if isinstance(value, list | dict) else value
        out.append(f"'{plain}" if isinstance(plain, str) and plain[:1] in ("=", "+", "-", "@", "\t", "\r") and len(plain) > 1 else plain)
    return out


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be a folder ({error.strerror}); choose another one with -o") from None
