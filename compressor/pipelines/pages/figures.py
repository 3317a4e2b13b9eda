"""A figure of a report: drawn once by matplotlib, put into a page as inline SVG, or into files for papers as SVG and PNG.

Drawings name colours by their role ("role:ink"), which matplotlib is taught for as long as it draws. In a page a role becomes a CSS variable, so
that one drawing serves light and dark paper; in a file it becomes the colour for light paper. Text of a page stays text (selectable, in the page's
font); text of a file becomes outlines, which look the same everywhere. Artists whose gid is `mark(...)` become a group of class "point" with that
text as its title, which a pointer shows and tests look for; ticks become "xtick" and "ytick", texts of
gid LABEL "label". The same panel always gives the same bytes.
"""

import html
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, WIDE = 4.4, 2.95, 9.6  # inches of a panel, of which two stand side by side on a wide page, and of a figure as wide as the page
MOST, LEAST = 108, 62  # CSS pixels an inch in a page, at most and, for figures that may scroll, at least
DPI = 300  # of PNG files
LIGHT = {
    "ink": "#1c2128", "muted": "#5d6673", "line": "#d9dde3", "paper": "#ffffff", "box": "#f6f7f9", "accent": "#2f6fc4",
    "dense": "#5d6673", "pruned": "#7a4fc4", "packed": "#b4600a", "tuned": "#1f6fd6",
    "c1": "#0069a8", "c2": "#c24e00", "c3": "#00795a", "c4": "#a3488a", "c5": "#7a6400", "c6": "#5b5bd6",
}  # fmt: skip
DARK = {
    "ink": "#e4e7ec", "muted": "#98a2b0", "line": "#333a45", "paper": "#14171c", "box": "#1c2027", "accent": "#5b9bf0",
    "dense": "#98a2b0", "pruned": "#b095ee", "packed": "#eda04a", "tuned": "#6aa9f7",
    "c1": "#56b4e9", "c2": "#f08c4a", "c3": "#2fc79c", "c4": "#e59acb", "c5": "#d9c04a", "c6": "#a5a5ff",
}  # fmt: skip
LABEL = "label_"
STAND_INS = {role: f"#0101{i:02x}" for i, role in enumerate(LIGHT, start=1)}  # what a drawing for SVG uses, to be found again in its text
SERIES = tuple(f"role:{role}" for role in LIGHT if role[1:].isdigit())  # colours of categories, told apart by the colour-blind too
SHAPES = ("o", "s", "D", "P", "X", "h", "d")  # and their markers; triangles point to what lies off the scale
STYLE = {
    "svg.hashsalt": "compressor",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "role:line",
    "axes.labelcolor": "role:muted",
    "axes.titlecolor": "role:ink",
    "text.color": "role:ink",
    "xtick.color": "role:line",
    "ytick.color": "role:line",
    "xtick.labelcolor": "role:muted",
    "ytick.labelcolor": "role:muted",
    "grid.color": "role:line",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Panel:
    """`name`: of its file, letters, digits and hyphens; `label`: what it shows, for those who do not see it; `paint` draws it on a figure.

    `below`: inches under the axes for a legend. `fitted`: margins fit the labels, which takes twice the time; else they are the same in all
    panels, so that axes line up.
    """

    name: str
    label: str
    paint: Callable[[Any], None]
    width: float = WIDTH
    height: float = HEIGHT
    below: float = 0.0
    fitted: bool = False


def mark(text: str) -> str:
    """The gid of an artist that shows a value: `text` names it."""
    return f"point:{text}"


def inline(panel: Panel) -> str:
    """SVG for a page that sets the colours as CSS variables."""
    return _fit(_save(panel, "svg", {"svg.fonttype": "none"}).decode(), panel)


def svg(panel: Panel) -> str:
    """A whole SVG file on white paper, that needs no fonts."""
    text = _marks(_save(panel, "svg", {"svg.fonttype": "path", "figure.facecolor": "role:paper"}).decode())
    for role, colour in STAND_INS.items():
        text = text.replace(colour, LIGHT[role])
    return text


def png(panel: Panel) -> bytes:
    """A PNG file on white paper."""
    return _save(panel, "png", {})


def ascii_text(text: Any, most: int = 60) -> str:
    """Figures know no other font than their own, and need no exotic names: anything but printable ASCII becomes a question mark."""
    return re.sub(r"[^ -~]", "?", str(text))[:most]


def swatch(colour: str, shape: str) -> str:
    """A marker as a tiny inline SVG, for legends in text."""
    from matplotlib.markers import MarkerStyle

    found = MarkerStyle(shape)
    path = found.get_path().transformed(found.get_transform())
    outline: Any = path.to_polygons()[0]
    points = " ".join(f"{6 + 8 * x:.2f},{6 - 8 * y:.2f}" for x, y in outline)
    return f'<svg viewBox="0 0 12 12" aria-hidden="true"><polygon points="{points}" style="fill: var(--{colour.removeprefix("role:")})"/></svg>'


def _save(panel: Panel, kind: str, style: dict[str, Any]) -> bytes:
    """Run the panel's `paint` on a fresh figure of our style."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with roles(LIGHT if kind == "png" else STAND_INS), matplotlib.rc_context(STYLE | {"figure.facecolor": "none", "axes.facecolor": "none"} | style):
        figure = Figure(figsize=(panel.width, panel.height), layout="constrained" if panel.fitted else None)
        FigureCanvasAgg(figure)
        if not panel.fitted:
            tall, wide = panel.height, panel.width
            figure.subplots_adjust(left=0.7 / wide, right=1 - 0.12 / wide, top=1 - 0.28 / tall, bottom=(0.46 + panel.below) / tall)
        panel.paint(figure)
        file = io.BytesIO()
        if kind == "png":
            figure.savefig(file, format="png", dpi=DPI, facecolor=LIGHT["paper"], metadata={"Software": None})
        else:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return file.getvalue()


@contextmanager
def roles(colours: dict[str, str]) -> Iterator[None]:
    """Within, matplotlib knows the roles as names of colours."""
    from matplotlib.colors import get_named_colors_mapping

    known = get_named_colors_mapping()
    for role, colour in colours.items():  # one by one: only so does matplotlib forget what the name meant before
        known[f"role:{role}"] = colour
    try:
        yield
    finally:
        for role in colours:
            del known[f"role:{role}"]


def _marks(text: str) -> str:
    """Marked groups with their text as a title, ticks with a class, and no other ids than those referred to."""
    text = re.sub(r"""<g id=(["'])point:(.*?)\1>""", r'<g class="point"><title>\2</title>', text)
    text = re.sub(r'<g id="([xy]tick|label)_\d*"', r'<g class="\1"', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)


def _fit(text: str, panel: Panel) -> str:
    """Fit matplotlib's file into a page: no XML head, no fixed size but limits, CSS variables for the role colours."""
    least = f"; min-width: {LEAST * panel.width:.0f}px" if panel.width > WIDTH else ""
    style = f'style="max-width: {MOST * panel.width:.0f}px{least}"'
    box = re.search(r'viewBox="[\d. ]+"', text)
    body = _marks(text[text.index(">", text.index("<svg")) + 1 :])
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"font: (?:\w+ )?([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for role, colour in STAND_INS.items():
        body = body.replace(colour, f"var(--{role})")
    return f'<svg {box[0] if box else ""} {style} role="img" aria-label="{html.escape(panel.label)}">{body}'
