"""What every page is made of: one self-contained document, its colours, tables and figures, and text that is safe to show.

A page loads nothing, and its content policy forbids it. Names come from strangers, so everything is escaped. Small multiples stand side by side where
there is room and one below the other on a phone; wide tables and figures scroll inside their own box. Print uses light paper.
"""

import html
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from compressor.pipelines.pages import figures
from compressor.pipelines.pages.figures import DARK, LIGHT, WIDTH, Panel
from compressor.pipelines.report import DASH

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
RULES = """
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.2rem 1.2rem 4rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 2.6rem 0 .6rem } h3 { font-size: .92rem;
  margin: 1.4rem 0 .3rem; font-weight: 600 } p { margin: .4rem 0; max-width: 48rem } .note { font-size: .88rem }
.muted, caption, th, dt { color: var(--muted) } .remarks { border-left: 3px solid var(--packed); padding: .1rem .9rem; margin: 1.2rem 0 }
.remarks p { overflow-wrap: anywhere }
dl.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: .8rem; margin: 1.4rem 0 0 }
dl.cards div { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem }
dl.cards dd { margin: .1rem 0 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums }
dl.cards dd i { font-style: normal; font-weight: 400; color: var(--muted) } dl.cards dt { font-size: .85rem }
dl.cards dd + dd { font-size: .8rem; font-weight: 400; color: var(--muted) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500; vertical-align: bottom } th, td { padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line) }
td { vertical-align: top; overflow-wrap: anywhere } .right th:not(:first-child),
.right td:not(:first-child) { text-align: right; padding: .28rem 0 .28rem .8rem } .right td:not(:first-child) { white-space: nowrap }
.right td:first-child { min-width: 5rem } .named td:first-child { white-space: nowrap } table.keys td:first-child { white-space: nowrap }
table.keys td:not(:first-child) { min-width: 7rem } table.rows td { white-space: nowrap } tr.front td { font-weight: 600 }
table.folded td:first-child { min-width: 9rem; white-space: normal } .named th:not(:first-child) { min-width: 6.1rem; overflow-wrap: anywhere }
table.rows td:last-child { min-width: 12rem; white-space: normal } tr.front td:first-child::before { content: "● "; color: var(--accent) }
table td.bar { width: 35%; min-width: 5rem; vertical-align: middle } td.bar b { display: block; height: .6rem; border-radius: 2px;
  background: var(--accent) }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.1rem 1.4rem; margin: .6rem 0 }
figure { margin: 0; min-width: 0 } .panels figure { max-width: 33rem } svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font-family: inherit }
.label text { paint-order: stroke; stroke: var(--paper); stroke-width: 2.5px; stroke-linejoin: round } 
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; margin: .5rem 0; padding: 0; list-style: none }
.legend svg { width: .8rem; height: .8rem; min-width: 0; display: inline-block; margin-right: .4rem; vertical-align: -.05rem }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto;
  font-size: .82rem; line-height: 1.45 }
.sample { border: 1px solid var(--line); border-radius: 8px; padding: .8rem; margin: .8rem 0; break-inside: avoid }
.sample div { white-space: pre-wrap; overflow-wrap: anywhere; font: .82rem/1.45 ui-monospace, monospace; padding: .5rem 0;
  border-top: 1px solid var(--line) }
.sample div:first-child { border: 0; padding-top: 0 } .sample div:last-child { padding-bottom: 0 }
.sample b { display: block; font: 500 .8rem system-ui, sans-serif; color: var(--muted) } summary { cursor: pointer; padding: .3rem 0 }
@media (max-width: 30rem) { body { padding: 1.2rem .9rem 3rem } dl.cards { grid-template-columns: 1fr 1fr; gap: .5rem }
  dl.cards dd { font-size: 1.02rem } dl.cards div { padding: .5rem .6rem } }
@media print { @page { margin: 14mm } html { font-size: 11px } body { max-width: none; padding: 0; font-size: 11px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact }
  .panels { grid-template-columns: 1fr 1fr; gap: .6rem } .scroll { overflow: visible } figure.scroll svg { min-width: 0 !important }
  h2, h3 { break-after: avoid }
  table.rows td, .right td:not(:first-child) { white-space: normal } table { font-size: 9px } pre { white-space: pre-wrap; overflow-wrap: anywhere }
  figure, dl.cards div, tr { break-inside: avoid } details:not([open]) > * { display: none } }
"""


def css() -> str:
    """Light colours, dark ones only on a screen that asks for them, and the rules that use both."""

    def colours(named: dict[str, str]) -> str:
        return "; ".join(f"--{role}: {colour}" for role, colour in named.items())

    light = f":root {{ color-scheme: light dark; {colours(LIGHT)} }}"
    return f"\n{light}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {colours(DARK)} }} }}{RULES}"


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page; empty parts are left out."""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{esc(title)} · compressor</title><style>{css()}</style>'
    body = "\n".join(p for p in parts if p)
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def clean(value: Any) -> str:
    """Text without control and direction-changing characters; new lines and tabs stay."""
    return "".join(
        c if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\ufffd" for c in str(value).replace("\r\n", "\n")
    )


def esc(value: Any) -> str:
    return html.escape(clean(DASH if value is None else value))


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def note(text: str) -> str:
    return f'<p class="muted note">{esc(text)}</p>' if text else ""


def pre(text: str | None) -> str:
    return f"<pre>{esc(text)}</pre>" if text else ""


def panels(found: Sequence[Panel]) -> str:
    """Small multiples in a grid; figures that are wider scroll in boxes of their own."""
    small = "".join(f"<figure>{figures.inline(p)}</figure>" for p in found if p.width <= WIDTH)
    wide = "".join(f"<figure class=scroll>{figures.inline(p)}</figure>" for p in found if p.width > WIDTH)
    return (f"<div class=panels>{small}</div>" if small else "") + wide


def table(heads: Iterable[str], rows: Sequence[Sequence[Any]], kind: str = "", marked: Iterable[int] = ()) -> str:
    """`marked`: indices of the rows of class "front"."""
    if not rows:
        return ""
    marked = set(marked)
    body = "".join(
        f"<tr{' class=front' if i in marked else ''}>{''.join(f'<td>{esc(cell)}</td>' for cell in row)}</tr>\n" for i, row in enumerate(rows)
    )
    return f'<div class=scroll><table class="{kind}"><tr>{"".join(f"<th>{esc(h)}</th>" for h in heads)}</tr>\n{body}</table></div>'


def pairs(values: dict[str, Any]) -> str:
    return table(("", ""), [[key.replace("_", " "), short(value)] for key, value in values.items() if value not in (None, {}, [])], "keys")


def short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {short(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(short(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


def cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else short(value)


def many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def shape(value: Any) -> str:
    return " × ".join(str(v) for v in value) if isinstance(value, list | tuple) else cell(value)
