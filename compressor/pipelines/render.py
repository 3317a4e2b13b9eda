"""A report for people: one self-contained page, and a table for the end of a run (the model card: card.py).

All of them print the same formatted rows (`report.results`), so they cannot disagree. The page loads nothing, and its content policy forbids it:
names and samples come from strangers, so everything is escaped. The same report always gives the same bytes. Whatever a report lacks is left out
or shown as a dash; comparisons that the numbers do not support are said in words (`remarks`).
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import yaml

from compressor.pipelines.coverage import folded
from compressor.pipelines.pages import layer_plots, quality_parts, run_plots
from compressor.pipelines.pages.figures import Panel
from compressor.pipelines.pages.parts import cell, clean, document, esc, many, note, pairs, panels, pre, section, shape, table
from compressor.pipelines.report import DASH, STATES, Report, dicts, duration, heads, number, plain, remarks, results, size, write_text

if TYPE_CHECKING:
    from rich.console import RenderableType


def scheme(report: Report) -> dict[str, Any]:
    """bits as words, packers, whether any grid is asymmetric, whether values are tables, and method, from the packed layers, else from the recipe."""
    quant = report.recipe.get("quant")
    quant = quant if isinstance(quant, dict) else {}
    rows = dicts(report.layers)
    bits = sorted({int(b) for row in rows if (b := number(row, "bits")) is not None}) or [quant.get("bits", "?")]
    packers = list(Counter(str(row["packer"]) for row in rows if row.get("packer"))) or [str(quant.get("packer", "?"))]
    asymmetric = any(row.get("symmetric") is False for row in rows) if rows else quant.get("symmetric") is False
    tables = bool(rows) and all(row.get("symmetric", True) is None for row in rows)
    tune = report.recipe.get("tune")
    method = str(tune.get("method", "none")) if isinstance(tune, dict) and report.tuned else "none"
    return {
        "bits": " and ".join(str(b) for b in bits),
        "widths": bits,
        "packers": packers,
        "asymmetric": asymmetric,
        "tables": tables,
        "method": method,
    }


def recipe_yaml(report: Report) -> str:
    return yaml.safe_dump(plain(report.recipe, "recipe", []), sort_keys=False, allow_unicode=True, width=10_000) if report.recipe else ""


# The page.

LEVEL = "The dashed line is the dense model; the arrow is what tuning did. Speed is that of measuring, with Python and its libraries."
BARS = (
    "Bars are one standard error: of tasks over their examples, of the domain's perplexity that of its paired difference to the dense model, "
    "on the windows of the divergence. Points whose bars overlap may be equal."
)
ERROR = (
    "The relative root-mean-square error of a linear's outputs on the calibration inputs, or of its weights where it was packed without; "
    "a cell of experts shows the largest of theirs."
)


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """One file that needs nothing but itself."""
    write_text(path, page(report))


def page(report: Report) -> str:
    title = clean(report.model.get("name") or "a model")
    facts = [report.model.get("architecture"), count(report), report.created, f"compressor {report.compressor}"]
    warnings = "".join(f"<p>{esc(r)}</p>" for r in remarks(report))
    pruned = {k: v for k, v in report.pruning.items() if k not in ("curve", "notes")}
    quality, errors = run_plots.quality(report), layer_plots.errors(report)
    parts = [
        f"<h1>{esc(title)}</h1><p class=muted>{esc(' · '.join(str(f) for f in facts if f))}</p>",
        _headline(report),
        f"<div class=remarks>{warnings}</div>" if warnings else "",
        section("Results", table(heads(report), results(report), "right")),
        section("Tasks", quality_parts.tasks(report)),
        section("Divergence from the dense model", quality_parts.divergence(report)),
        section("Quality against size", (note(f"{LEVEL} {BARS}") if quality else "") + panels(quality)),
        section("Choice of bits by layer", quality_parts.choice(report)),
        section("Protocol", quality_parts.protocol(report)),
        section("Pruning", pairs(pruned) + panels(run_plots.training(report, "pruning"))),
        section("Training", panels(run_plots.training(report))),
        section("Packing error", (note(ERROR) if errors else "") + panels(errors)),
        section("Bits per layer", _bits(report)),
        section("Experts", pairs(report.experts)),
        section("Layers", _layers(report)),
        section("Time and memory", _stages(report)),
        section("Samples", "".join(_sample(s) for s in dicts(report.samples))),
        section("Recipe", pre(recipe_yaml(report)) + (f"<p class=muted>Command</p>{pre(report.command)}" if report.command else "")),
        section("Model, folder and environment", pairs(report.model) + pairs(report.export) + pairs(report.environment)),
    ]
    return document(title, parts)


def figures_of(report: Report) -> Iterator[Panel]:
    """Every figure of the page, for files of their own."""
    yield from run_plots.quality(report)
    yield from run_plots.choice(report)
    for name in ("pruning", "training"):
        yield from run_plots.training(report, name)
    yield from layer_plots.errors(report)
    yield from layer_plots.bits(report)


def _bits(report: Report) -> str:
    """A map of bits where layers differ; where they are alike, a sentence."""
    rows = [r for r in dicts(report.layers) if number(r, "bits") is not None]
    if not rows or (found := layer_plots.bits(report)):
        return panels(found) if rows else ""
    group = number(rows[0], "group")
    grouped = "" if group is None else ", one scale a row" if group < 0 else f" in groups of {group:g}"
    return note(f"All {many(len(rows), 'packed linear')} have {number(rows[0], 'bits'):g} bits{grouped}.")


def count(report: Report) -> str | None:
    total, packed = number(report.model, "parameters"), number(report.model, "packed_parameters")
    if not total:
        return None
    return f"{total:,.0f} parameters" + (f", {packed / total:.1%} of them packed" if packed else "")


def _headline(report: Report) -> str:
    rows = {row[0]: row for row in results(report)}
    last = rows.get("tuned") or rows.get("packed") or rows.get("pruned")

    def trend(column: int, states: list[str]) -> tuple[str, str]:
        cells = {s: rows[s][column] for s in states if s in rows and rows[s][column] != DASH}
        return " <i>→</i> ".join(esc(c) for c in cells.values()), " → ".join(cells) if len(cells) > 1 else ""

    names = heads(report)
    cards = [(names[i], *trend(i, list(STATES))) for i in (1, 2)]
    if last:
        cards.append(("folder on disk", *trend(5, ["dense", last[0]])))
        cards += [(names[i], *trend(i, [last[0]])) for i in (6, 3, 4)]
    filled = "".join(f"<div><dt>{name}</dt><dd>{value}</dd>{legend and f'<dd>{legend}</dd>'}</div>" for name, value, legend in cards if value)
    return f"<dl class=cards>{filled}</dl>" if filled else ""


def _layers(report: Report) -> str:
    rows = [row | {"zero": _zero(row, report)} for row in dicts(report.layers)]
    kinds = Counter(tuple(str(DASH if r.get(key) is None else r[key]) for key in ("bits", "group", "zero", "packer")) for r in rows)
    counts = [
        [many(n, "linear"), f"{bits} bits", "one scale a row" if group == "-1" else f"group {group}", zero, packer]
        for (bits, group, zero, packer), n in kinds.items()
    ]
    known, several = ("name", "shape", "bits", "group", "zero", "packer", "error", "start_error", "damp", "tokens", "seconds", "note"), len(rows)
    rows = folded(rows)
    keys = tuple(h for h in known if any(r.get(h) is not None for r in rows))
    names = ["error with its path" if key == "start_error" else key for key in keys]
    cells = [[shape(r.get(h)) if h == "shape" else cell(r.get(h)) for h in keys] for r in rows]
    told = "one by one" if len(rows) == several else "those of experts together; each is in report.json"
    every = f"<details><summary>{many(several, 'packed linear')}, {told}</summary>{table(names, cells, 'rows')}</details>" if rows else ""
    left = [[r.get("name"), shape(r.get("shape")), r.get("reason")] for r in dicts(report.unpacked)]
    dense = f"<p class=muted>Left dense</p>{table(('name', 'shape', 'reason'), left, 'rows')}" if left else ""
    return table(("packed", "bits", "group", "zero", "packer"), counts) + every + dense


def _zero(row: dict[str, Any], report: Report) -> str | None:
    """What stands for zero in a layer: as it was packed, or floats that were tuned since."""
    tune = report.recipe.get("tune")
    if report.tuned and isinstance(tune, dict) and tune.get("method") == "qalora":
        targets = tune.get("targets")
        if targets is None or str(row.get("name")).rpartition(".")[2] in [part.strip() for part in str(targets).split(",")]:
            return "float zeros"
    words = {"True": "symmetric", "False": "asymmetric", "None": "table"}
    return words.get(str(row["symmetric"])) if "symmetric" in row else None


def _stages(report: Report) -> str:
    names = list(dict.fromkeys([*report.seconds, *(k.removesuffix("_gpu") for k in report.peak_bytes)]))
    longest = max([number(report.seconds, n) or 0 for n in names], default=0)
    gpu = any(n.endswith("_gpu") for n in report.peak_bytes)
    rows = []
    for n in names:
        spent = number(report.seconds, n)
        bar = f'<b style="width:{100 * (spent or 0) / longest:.1f}%"></b>' if longest else ""
        peaks = [size(number(report.peak_bytes, key)) for key in ((n, n + "_gpu") if gpu else (n,))]
        rows.append(f"<tr><td>{esc(n)}</td><td class=bar>{bar}</td>{''.join(f'<td>{esc(c)}</td>' for c in (duration(spent), *peaks))}</tr>\n")
    heads = "<th>stage</th><th></th><th>time</th><th>peak memory</th>" + ("<th>peak on the GPU</th>" if gpu else "")
    return f"<div class=scroll><table class=right><tr>{heads}</tr>\n{''.join(rows)}</table></div>" if rows else ""


def _sample(sample: dict[str, Any]) -> str:
    texts = [("prompt", sample.get("prompt")), *((s, sample.get(s)) for s in STATES)]
    return f"<div class=sample>{''.join(f'<div><b>{name}</b>{esc(text)}</div>' for name, text in texts if text is not None)}</div>"


# The terminal.


def summary(report: Report) -> "RenderableType":
    """Two tables for the end of a run: results, and time by stage."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(clean(report.model.get("name") or "results")), title_justify="left", title_style="bold")
    for i, head in enumerate(heads(report)):
        table.add_column(head, justify="right" if i else "left")
    for row in results(report):
        table.add_row(*(Text(clean(cell)) for cell in row))
    stages = Table(title="time and peak memory", title_justify="left", title_style="bold")
    for i, head in enumerate(("stage", "time", "peak memory")):
        stages.add_column(head, justify="right" if i else "left")
    for name in report.seconds:
        stages.add_row(Text(clean(name)), duration(number(report.seconds, name)), size(number(report.peak_bytes, name)))
    return Group(table, *([stages] if report.seconds else []), *(Text(f"! {clean(r)}") for r in remarks(report)))
