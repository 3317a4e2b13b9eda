"""Pages as a browser shows them: every point at the pixel where its numbers belong, axes, labels that can be read; on screen, phone and paper."""

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.pipelines import render
from compressor.pipelines.pages.figures import DARK, LIGHT
from compressor.pipelines.sweeps import page as sweep_page
from tests.pipelines.browser import Browser, browsing, program
from tests.pipelines.reports import full, sweep_rows, write_sweep

NEAR = 1.5  # CSS pixels that a marker may stand beside its place
CONTRAST = 4.5  # of text, by the usual rules for the web
UNITS = {"bits": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "speed": 1.0}
FIGURES = """
(() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left + scrollX, r.top + scrollY, r.right + scrollX, r.bottom + scrollY] };
  const part = (e, kind) => e.querySelector(kind) && box(e.querySelector(kind));
  const ticks = (svg, kind) => [...svg.querySelectorAll('.' + kind)].map(t => (
    {text: t.textContent.trim(), at: part(t, 'use'), box: part(t, 'text')}));
  return [...document.querySelectorAll('svg[role=img]')].map(svg => ({
    label: svg.getAttribute('aria-label'), box: box(svg), x: ticks(svg, 'xtick'), y: ticks(svg, 'ytick'),
    texts: [...svg.querySelectorAll('text')].map(t => ({text: t.textContent.trim(), box: box(t)})),
    labels: [...svg.querySelectorAll('.label text')].map(t => ({text: t.textContent.trim(), box: box(t)})),
    points: [...svg.querySelectorAll('.point')].filter(p => p.querySelector('use')).map(
      p => ({name: p.querySelector('title').textContent, box: box(p.querySelector('use'))}))}))
})()
"""
Box = list[float]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = program()
    if path is None:
        pytest.skip("no Chromium or Chrome is installed")
    with browsing(path) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    report = full()
    report.peak_bytes |= {f"evaluate {state}_gpu": 1e9 * (i + 1) for i, state in enumerate(("dense", "pruned", "packed", "tuned"))}
    render.write_html(report, folder / "report.html")
    sweep_page.write(write_sweep(folder / "sweep", sweep_rows()))
    return {"run": folder / "report.html", "sweep": folder / "sweep" / "sweep.html"}


def expected(name: str, label: str) -> dict[str, tuple[float, float]]:
    """point -> its numbers in the units of the panel's axes, from the data and not from the page."""
    title, _, size = label.partition(" against ")
    by = next(key for key in ("bits", "folder", "memory", "tokens") if key in size)
    unit = UNITS.get(size.rpartition(", ")[2], 1.0)
    out = {}
    if name == "run":
        report = full()
        for i, state in enumerate(("dense", "pruned", "packed", "tuned")):
            values = getattr(report, state)
            sizes = {"bits": values["bits_per_weight"], "folder": values["folder_bytes"], "memory": 1e9 * (i + 1), "tokens": 321.5}
            text = "domain" if "domain" in title else "outside"
            y = values.get("tasks", {}).get("boolq", {}).get("value") if "task" in title else values[text]["perplexity"]
            out[state] = (sizes[by] / unit, y)
    else:
        for row in sweep_rows():
            if row["status"] == "ok":
                sizes = {"bits": "bits_per_weight", "folder": "folder_bytes", "tokens": "tokens_per_second"}
                x = row["peak_bytes"]["evaluate packed_gpu"] if by == "memory" else row[sizes[by]]
                y = row["tasks"]["boolq"]["value"] if "task" in title else row["perplexity" if "domain" in title else "outside"]
                out[row["id"]] = (x / unit, y)
        if "task" not in title:
            dense = {"bits": 16.0, "folder": 2_226_625, "tokens": 17_600.0, "memory": 9e8}
            out["dense"] = (dense[by] / unit, 29.5 if "domain" in title else 43.5)
    return {key: (x, y) for key, (x, y) in out.items() if y is not None}


def middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def pixel_of(ticks: list[dict[str, Any]], axis: int) -> Any:
    """value -> pixel, from the ticks of an axis and what is written beside them: linear or logarithmic, whichever all ticks agree with."""
    known = sorted((float(t["text"]), middle(t["at"])[axis]) for t in ticks if t["at"])
    assert len(known) >= 3, "an axis needs three ticks with numbers"
    for way in (lambda v: v, math.log):
        if way is math.log and known[0][0] <= 0:
            continue
        (a, p), (b, q) = ((way(v), at) for v, at in (known[0], known[-1]))
        place = lambda v, a=a, b=b, p=p, q=q, way=way: p + (way(v) - a) / (b - a) * (q - p)  # noqa: E731
        if all(abs(place(v) - at) < NEAR for v, at in known):
            return place
    raise AssertionError(f"ticks lie on no scale: {known}")


def apart(a: Box, b: Box) -> bool:
    return a[0] >= b[2] - 1 or b[0] >= a[2] - 1 or a[1] >= b[3] - 1 or b[1] >= a[3] - 1


def within(inner: Box, outer: Box, slack: float = 1.0) -> bool:
    return all(a >= b - slack for a, b in zip(inner[:2], outer[:2], strict=True)) and all(
        a <= b + slack for a, b in zip(inner[2:], outer[2:], strict=True)
    )


def contrast(picture: Any, box: Box) -> float:
    """Of the text in a box of the picture uint8 [height, width, 3]: its strongest pixel against the commonest one."""
    part = picture[int(box[1]) : math.ceil(box[3]), int(box[0]) : math.ceil(box[2])].reshape(-1, 3)
    colours, counts = np.unique(part, axis=0, return_counts=True)
    linear = np.where(colours / 255 <= 0.04045, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    light = linear @ np.array([0.2126, 0.7152, 0.0722])
    ground = light[counts.argmax()]
    return float(max((max(v, ground) + 0.05) / (min(v, ground) + 0.05) for v in light))


def colour(picture: Any, box: Box) -> list[int]:
    x, y = middle(box)
    return [int(v) for v in picture[int(y), int(x)]]


def rgb(text: str) -> list[int]:
    return [int(text[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_every_point_is_drawn_where_its_numbers_say(browser: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    browser.open(pages[name], dark)
    picture, found = browser.picture(), browser.run(FIGURES)
    panels = [panel for panel in found if " against " in panel["label"] and not panel["label"].startswith("Choice")]
    assert len(panels) == 12
    for panel in panels:
        x, y = pixel_of(panel["x"], 0), pixel_of(panel["y"], 1)
        points = {p["name"].partition(":")[0]: p for p in panel["points"]}
        wanted = expected(name, panel["label"])
        assert points.keys() == wanted.keys(), panel["label"]
        frame = [min(t["at"][0] for t in panel["y"]) - 5, panel["box"][1], panel["box"][2], max(t["at"][3] for t in panel["x"]) + 5]
        for key, (a, b) in wanted.items():
            (left, top), off = middle(points[key]["box"]), "off the scale" in points[key]["name"]
            assert within(points[key]["box"], frame, 4), (panel["label"], key)
            near = abs(left - x(a)) < NEAR, abs(top - y(b)) < NEAR
            assert near == (True, True) if not off else near in ((True, False), (False, True)), (panel["label"], key, left, x(a), top, y(b))
    colours = DARK if dark else LIGHT
    marker = next(p["box"] for p in panels[0]["points"] if p["name"].startswith("packed" if name == "run" else "w3g128-gptq"))
    assert np.abs(np.subtract(colour(picture, marker), rgb(colours["packed" if name == "run" else "c1"]))).max() <= 3
    assert picture[2, 2].tolist() == rgb(colours["paper"])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_labels_can_be_read_and_nothing_complains(browser: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    browser.open(pages[name], dark)
    picture, found = browser.picture(), browser.run(FIGURES)
    assert browser.said == []
    assert sum(len(panel["labels"]) for panel in found) > 2 * len(found)
    for panel in found:
        texts = [t for t in panel["texts"] if t["text"]]
        assert len(texts) >= 4 and all(within(t["box"], panel["box"], 2) for t in texts), panel["label"]
        for a, b in itertools.combinations(panel["labels"], 2):
            assert apart(a["box"], b["box"]), (panel["label"], a, b)
        for kind in "xy":
            for a, b in itertools.combinations([t for t in panel[kind] if t["box"]], 2):
                assert apart(a["box"], b["box"]), (panel["label"], a, b)
        poor = {t["text"]: value for t in texts if (value := contrast(picture, t["box"])) < CONTRAST}
        assert not poor, (panel["label"], poor)


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_phone_shows_all_of_it_without_sideways_scrolling(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], width=375, height=700)
    assert browser.run("document.documentElement.scrollWidth") == 375
    boxes = [p["box"] for p in browser.run(FIGURES) if " against " in p["label"]]
    assert len({box[0] for box in boxes}) == 1 and all(a[3] <= b[1] for a, b in itertools.pairwise(boxes))  # one below the other
    assert all(within([box[0], 0, box[2], 0], [0, 0, 375, 0]) for box in boxes)
    assert min(t["box"][3] - t["box"][1] for p in browser.run(FIGURES) for t in p["texts"] if t["text"] and p["box"][2] <= 375) >= 8
    hidden = "[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > 375 && !t.closest('.scroll')).length"
    assert browser.run(hidden) == 0


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_print_is_light_and_fits_its_paper(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], dark=True, width=718, media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert all(p["box"][2] <= 719 for p in browser.run(FIGURES))
    browser.open(pages[name], dark=True)
    paper = browser.pdf()
    sheets, sizes = re.findall(rb"/Type\s*/Page\b", paper), re.findall(rb"/MediaBox\s*\[([\d. ]+)\]", paper)
    assert 1 < len(sheets) < 16 and all(float(size.split()[3]) < 900 for size in sizes) and sizes
