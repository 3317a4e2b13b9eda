"""A report for people: one self-contained page, and a table for the end of a run (the model card: card.py).

All of them print the same formatted rows (`report.results`), so they cannot disagree. The page loads nothing, and its content policy forbids it:
names and samples come from strangers, so everything is escaped. The same report always gives the same bytes. Whatever a report lacks is left out
or shown as a dash; comparisons that the numbers do not support are said in words (`remarks`).
"""

import html
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import yaml

from compressor.pipelines import plots
from compressor.pipelines.report import DASH, STATES, Report, dicts, duration, fixed, heads, number, plain, remarks, results, size, write_text

if TYPE_CHECKING:
    from rich.console import RenderableType

CSS = """
:root { color-scheme: light dark; --paper: #fff; --box: #f6f7f9; --ink: #1c2128; --muted: #5d6673; --line: #d9dde3;
  --dense: #7a8492; --pruned: #7a4fc4; --packed: #c2710c; --tuned: #1f6fd6; --accent: #3d7fd6 }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --box: #1c2027; --ink: #e4e7ec; --muted: #98a2b0; --line: #333a45;
  --dense: #97a1af; --pruned: #b095ee; --packed: #eda04a; --tuned: #6aa9f7; --accent: #5b9bf0 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.2rem 1.2rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 2.4rem 0 .6rem } p { margin: .4rem 0 }
.muted, caption, th, dt { color: var(--muted) } .remarks { border-left: 3px solid var(--packed); padding: .1rem .9rem; margin: 1.2rem 0 }
dl.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin: 1.4rem 0 0 }
dl.cards div { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem }
dl.cards dd { margin: .1rem 0 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums }
dl.cards dd i { font-style: normal; font-weight: 400; color: var(--muted) } dl.cards dt { font-size: .85rem }
dl.cards dd + dd { font-size: .8rem; font-weight: 400; color: var(--muted) } table.keys td:first-child,
table.rows td:not(:last-child) { white-space: nowrap }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500; vertical-align: bottom } th, td { padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line) }
td { vertical-align: top; overflow-wrap: anywhere } .right th:not(:first-child),
.right td:not(:first-child) { text-align: right; padding: .28rem 0 .28rem .8rem; white-space: nowrap }
table td.bar { width: 35%; vertical-align: middle } td.bar b { display: block; height: .6rem; border-radius: 2px; background: var(--accent) }
svg { display: block; width: 100%; min-width: 38rem; height: auto } svg text { font-family: inherit }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto;
  font-size: .82rem; line-height: 1.45 }
.sample { border: 1px solid var(--line); border-radius: 8px; padding: .8rem; margin: .8rem 0; break-inside: avoid }
.sample div { white-space: pre-wrap; overflow-wrap: anywhere; font: .82rem/1.45 ui-monospace, monospace; padding: .5rem 0;
  border-top: 1px solid var(--line) }
.sample div:first-child { border: 0; padding-top: 0 } .sample div:last-child { padding-bottom: 0 }
.sample b { display: block; font: 500 .8rem system-ui, sans-serif; color: var(--muted) } summary { cursor: pointer; padding: .3rem 0 }
@media print { body { max-width: none; padding: 0; font-size: 11px } svg { min-width: 0 } h2 { break-after: avoid } pre { white-space: pre-wrap }
  details::details-content { content-visibility: visible; block-size: auto } section > .scroll:has(svg) { break-inside: avoid } }
"""


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


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """One file that needs nothing but itself."""
    write_text(path, page(report))


def page(report: Report) -> str:
    title = clean(report.model.get("name") or "a model")
    facts = [report.model.get("architecture"), count(report), report.created, f"compressor {report.compressor}"]
    warnings = "".join(f"<p>{_esc(r)}</p>" for r in remarks(report))
    parts = [
        f"<h1>{_esc(title)}</h1><p class=muted>{_esc(' · '.join(str(f) for f in facts if f))}</p>",
        _headline(report),
        f"<div class=remarks>{warnings}</div>" if warnings else "",
        _section("Results", _table(heads(report), results(report), "right")),
        _section("Protocol", _protocol(report)),
        _section("Quality against size", _figure(plots.quality(report))),
        _section(
            "Pruning", _pairs({k: v for k, v in report.pruning.items() if k not in ("curve", "notes")}) + _figure(plots.training(report, "pruning"))
        ),
        _section("Training", _figure(plots.training(report))),
        _section("Packing error", _figure(plots.layers(report))),
        _section("Layers", _layers(report)),
        _section("Time and memory", _stages(report)),
        _section("Samples", "".join(_sample(s) for s in dicts(report.samples))),
        _section("Recipe", _pre(recipe_yaml(report)) + (f"<p class=muted>Command</p>{_pre(report.command)}" if report.command else "")),
        _section("Model, folder and environment", _pairs(report.model) + _pairs(report.export) + _pairs(report.environment)),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="viewport" content="width=device-width">'
    head += f"\n<title>{_esc(title)} · compressor</title><style>{CSS}</style>"
    body = "\n".join(p for p in parts if p)
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def clean(value: Any) -> str:
    """Text without control and direction-changing characters; new lines and tabs stay."""
    return "".join(
        c if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\ufffd" for c in str(value).replace("\r\n", "\n")
    )


def _esc(value: Any) -> str:
    return html.escape(clean(DASH if value is None else value))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _pre(text: str | None) -> str:
    return f"<pre>{_esc(text)}</pre>" if text else ""


def _figure(svg: str | None) -> str:
    return f"<div class=scroll>{svg}</div>" if svg else ""


def _table(heads: Iterable[str], rows: list[list[Any]], kind: str = "") -> str:
    if not rows:
        return ""
    body = "".join("<tr>" + "".join(f"<td>{_esc(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class=scroll><table class="{kind}"><tr>{"".join(f"<th>{_esc(h)}</th>" for h in heads)}</tr>\n{body}</table></div>'


def _pairs(values: dict[str, Any]) -> str:
    return _table(("", ""), [[key.replace("_", " "), short(value)] for key, value in values.items() if value not in (None, {}, [])], "keys")


def short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {short(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


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
        return " <i>→</i> ".join(_esc(c) for c in cells.values()), " → ".join(cells) if len(cells) > 1 else ""

    names = heads(report)
    cards = [(names[i], *trend(i, list(STATES))) for i in (1, 2)]
    if last:
        cards.append(("folder on disk", *trend(5, ["dense", last[0]])))
        cards += [(names[i], *trend(i, [last[0]])) for i in (6, 3, 4)]
    filled = "".join(f"<div><dt>{name}</dt><dd>{value}</dd>{legend and f'<dd>{legend}</dd>'}</div>" for name, value, legend in cards if value)
    return f"<dl class=cards>{filled}</dl>" if filled else ""


def _protocol(report: Report) -> str:
    texts = {text: values for text in ("domain", "outside", "task") if isinstance(values := report.protocol.get(text), dict)}
    keys = list(dict.fromkeys(key for values in texts.values() for key in values))
    rows = [[key.replace("_", " "), *(short(v[key]) if key in v else None for v in texts.values())] for key in keys]
    rates = [[f"{s}, evaluated tokens/s", *(fixed(number(getattr(report, s), t, "tokens_per_second"), 0) for t in texts)] for s in STATES]
    return _table(("", *texts), rows + [row for row in rates if set(row[1:]) != {DASH}], "keys")


def _layers(report: Report) -> str:
    rows = [row | {"zero": _zero(row, report)} for row in dicts(report.layers)]
    kinds = Counter(tuple(str(DASH if r.get(key) is None else r[key]) for key in ("bits", "group", "zero", "packer")) for r in rows)
    counts = [
        [many(n, "linear"), f"{bits} bits", "one scale a row" if group == "-1" else f"group {group}", zero, packer]
        for (bits, group, zero, packer), n in kinds.items()
    ]
    known = ("name", "shape", "bits", "group", "zero", "packer", "error", "start_error", "damp", "seconds", "note")
    keys = tuple(h for h in known if any(r.get(h) is not None for r in rows))
    names = ["error with its path" if key == "start_error" else key for key in keys]
    cells = [[_shape(r.get(h)) if h == "shape" else _cell(r.get(h)) for h in keys] for r in rows]
    every = f"<details><summary>{many(len(rows), 'packed linear')}, one by one</summary>{_table(names, cells, 'rows')}</details>" if rows else ""
    left = [[r.get("name"), _shape(r.get("shape")), r.get("reason")] for r in dicts(report.unpacked)]
    dense = f"<p class=muted>Left dense</p>{_table(('name', 'shape', 'reason'), left, 'rows')}" if left else ""
    return _table(("packed", "bits", "group", "zero", "packer"), counts) + every + dense


def _zero(row: dict[str, Any], report: Report) -> str | None:
    """What stands for zero in a layer: as it was packed, or floats that were tuned since."""
    tune = report.recipe.get("tune")
    if report.tuned and isinstance(tune, dict) and tune.get("method") == "qalora":
        targets = tune.get("targets")
        if targets is None or str(row.get("name")).rpartition(".")[2] in [part.strip() for part in str(targets).split(",")]:
            return "float zeros"
    words = {"True": "symmetric", "False": "asymmetric", "None": "table"}
    return words.get(str(row["symmetric"])) if "symmetric" in row else None


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else short(value)


def many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _shape(value: Any) -> str:
    return " × ".join(str(v) for v in value) if isinstance(value, list | tuple) else _cell(value)


def _stages(report: Report) -> str:
    names = list(dict.fromkeys([*report.seconds, *(k.removesuffix("_gpu") for k in report.peak_bytes)]))
    longest = max([number(report.seconds, n) or 0 for n in names], default=0)
    gpu = any(n.endswith("_gpu") for n in report.peak_bytes)
    rows = []
    for n in names:
        spent = number(report.seconds, n)
        bar = f'<b style="width:{100 * (spent or 0) / longest:.1f}%"></b>' if longest else ""
        peaks = [size(number(report.peak_bytes, key)) for key in ((n, n + "_gpu") if gpu else (n,))]
        rows.append(f"<tr><td>{_esc(n)}</td><td class=bar>{bar}</td>{''.join(f'<td>{_esc(c)}</td>' for c in (duration(spent), *peaks))}</tr>\n")
    heads = "<th>stage</th><th></th><th>time</th><th>peak memory</th>" + ("<th>peak on the GPU</th>" if gpu else "")
    return f"<div class=scroll><table class=right><tr>{heads}</tr>\n{''.join(rows)}</table></div>" if rows else ""


def _sample(sample: dict[str, Any]) -> str:
    texts = [("prompt", sample.get("prompt")), *((s, sample.get(s)) for s in STATES)]
    return f"<div class=sample>{''.join(f'<div><b>{name}</b>{_esc(text)}</div>' for name, text in texts if text is not None)}</div>"


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
