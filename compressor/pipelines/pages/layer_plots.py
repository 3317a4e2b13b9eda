"""The figures of a model's layers: heat maps of packing error and of bits, block by kind of linear; bars where names show no blocks.

Heat maps use one colour with varying opacity, so that they serve light and dark paper. Experts and other numbered parts of a block share one row,
which shows their largest value.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from compressor.pipelines.pages.figures import WIDE, Panel, ascii_text, mark
from compressor.pipelines.pages.fronts import drawable
from compressor.pipelines.report import Report, dicts, number

FAINT, STRONG = 0.06, 0.6  # opacity of the smallest and the largest value; text over the strongest must stay legible on either paper
MOST = 40  # bars
ROOM = 16  # blocks up to which the cells carry their numbers
Cell = tuple[float, str]  # value, and what is written there


def errors(report: Report) -> list[Panel]:
    """Packing error of every layer."""
    rows = [(str(r.get("name", "?")), (value, f"{value:.3g}")) for r in dicts(report.layers) if (value := drawable(number(r, "error"))) is not None]
    if not rows:
        return []
    top = max(v for _, (v, _) in rows)
    return [_panel("error-by-layer", "packing error", rows, f"packing error, from 0 (faint) to {top:.3g} (strong)")]


def bits(report: Report) -> list[Panel]:
    """Bits and group of every layer; none where all are alike."""
    rows, formats = [], set()
    for row in dicts(report.layers):
        width, group = drawable(number(row, "bits")), number(row, "group")
        if width is not None:
            formats.add((width, group))
            rows.append((str(row.get("name", "?")), (width, f"{width:g}" + (f" g{group:g}" if group is not None and group > 0 else ""))))
    if len(formats) < 2:
        return []
    return [_panel("bits-by-layer", "bits", rows, "bits of a code, and how many weights share a scale (g)")]


def _panel(name: str, what: str, rows: list[tuple[str, Cell]], title: str) -> Panel:
    grid, rest = _grid(rows)
    blocks = sorted({block for _, block in grid})
    if len(blocks) < 2:
        rows = sorted(rows, key=lambda r: -r[1][0])[:MOST]
        return Panel(name, f"{what} by layer", partial(_bars, rows=rows, what=what), WIDE, 0.9 + 0.2 * len(rows), fitted=True)
    kinds = list(dict.fromkeys(kind for kind, _ in grid))
    wide = WIDE if len(blocks) > 8 else max(4.6, 1.7 + 0.62 * len(blocks))
    paint = partial(_heat, grid=grid, kinds=kinds, blocks=blocks, rest=rest, what=what, title=title)
    return Panel(name, f"{what} by block and linear", paint, wide, 0.95 + 0.27 * len(kinds), fitted=True)


def _grid(rows: Sequence[tuple[str, Cell]]) -> tuple[dict[tuple[str, int], Cell], list[tuple[str, Cell]]]:
    """(kind, block) -> the largest value there; and the layers outside blocks."""
    grid: dict[tuple[str, int], Cell] = {}
    rest = []
    for name, cell in rows:
        match = re.match(r"(?:.*?\.)?(\d+)\.(.+)", name)
        if match:
            key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", match[2]), int(match[1]))
            grid[key] = max(grid.get(key, cell), cell)
        else:
            rest.append((name, cell))
    return grid, rest


def _heat(
    figure: Any, grid: dict[tuple[str, int], Cell], kinds: list[str], blocks: list[int], rest: list[tuple[str, Cell]], what: str, title: str
) -> None:
    from matplotlib.patches import Rectangle

    axes = figure.add_subplot()
    values = [value for value, _ in grid.values()]
    top, low = max(values), min(values) if what == "bits" else 0.0  # errors are shares of the largest, bits lie between their least and most
    column = {block: i for i, block in enumerate(blocks)}
    for (kind, block), (value, words) in grid.items():
        x, y, share = column[block], kinds.index(kind), (value - low) / (top - low) if top > low else 0.0
        patch = Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, facecolor="role:accent", alpha=FAINT + (STRONG - FAINT) * max(share, 0.0), linewidth=0)
        patch.set_gid(mark(ascii_text(f"{block}.{kind}: {words}")))
        axes.add_patch(patch)
        if len(blocks) <= ROOM:
            axes.annotate(words, (x, y), ha="center", va="center", fontsize=7.5)
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_yticks(range(len(kinds)), labels=[ascii_text(k) for k in kinds], parse_math=False)
    step = max(1, math.ceil(len(blocks) / 20))
    axes.set_xticks(range(0, len(blocks), step), labels=[str(b) for b in blocks[::step]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    outside = "".join(f"; {ascii_text(name)} {words}" for name, (_, words) in rest[:4])
    axes.set_xlabel("block" + (f"     (outside the blocks{outside.replace(';', ':', 1)})" if outside else ""), parse_math=False)
    axes.set_title(title)


def _bars(figure: Any, rows: list[tuple[str, Cell]], what: str) -> None:
    axes = figure.add_subplot()
    for i, (name, (value, words)) in enumerate(rows):
        axes.barh([i], [value], color="role:accent", height=0.65)[0].set_gid(mark(ascii_text(f"{name}: {words}")))
    axes.set_yticks(range(len(rows)), labels=[ascii_text(name) for name, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.set_title(what + (f", the {MOST} largest" if len(rows) == MOST else ""))
