"""Files for papers, machines and model cards, from a run, a sweep or a report alone."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from compressor.errors import ModelError, OutputError
from compressor.pipelines import cli
from compressor.pipelines.pages import figures, files
from compressor.pipelines.pages.figures import Panel
from compressor.pipelines.show import Show
from tests.pipelines.reports import full, sweep_rows, write_sweep


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    full().save(folder / "report.json")
    return folder


def dot(figure: Any) -> None:
    axes = figure.add_subplot()
    axes.plot([1.0], [2.0], marker="s", markersize=40, color="role:c2", gid=figures.mark('<a> "b" & c'))
    axes.set_title("$not math$", parse_math=False)


def test_a_file_needs_no_variables_and_no_fonts_and_comes_out_the_same() -> None:
    panel = Panel("dot", "a dot", dot)
    text = figures.svg(panel)
    assert text == figures.svg(panel) and figures.png(panel) == figures.png(panel)
    assert text.startswith("<?xml") and "var(" not in text and "<text" not in text and figures.LIGHT["c2"] in text
    assert '<g class="point"><title>&lt;a&gt; "b" &amp; c</title>' in text
    inline = figures.inline(panel)
    assert "var(--c2)" in inline and "$not math$" in inline and figures.LIGHT["c2"] not in inline and "<a>" not in inline


def test_a_png_has_the_colours_of_paper_and_300_dots_an_inch() -> None:
    image = Image.open(io.BytesIO(figures.png(Panel("dot", "a dot", dot))))
    assert image.size == (round(4.4 * 300), round(2.95 * 300)) and round(image.info["dpi"][0]) == 300
    colours = {tuple(c) for c in np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).tolist()}
    assert {(255, 255, 255), tuple(int(figures.LIGHT["c2"][i : i + 2], 16) for i in (1, 3, 5))} <= colours


def test_a_run_as_files(run: Path, tmp_path: Path) -> None:
    document = files.write(run, tmp_path / "out", ("svg", "csv", "markdown"), Show())
    made = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert made == sorted(document["files"]) and len([name for name in made if name.startswith("plots/")]) == 15
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [row["state"] for row in rows] == ["dense", "pruned", "packed", "tuned"]
    assert float(rows[2]["domain.perplexity"]) == 6.4522 and float(rows[3]["tasks.boolq.value"]) == 0.6 and rows[1]["divergence.mean"] == ""
    layers = list(csv.DictReader((tmp_path / "out" / "layers.csv").open()))
    assert len(layers) == 12 and layers[0]["shape"] == "64x256" and float(layers[11]["error"]) == pytest.approx(0.06)
    text = (tmp_path / "out" / "results.md").read_text("utf-8")
    assert "| packed | 6.452 | 3.700 |" in text and "| boolq | 0.620 ± 0.015 | 0.550 ± 0.015 | 0.600 ± 0.015 |" in text and "ab" * 32 in text
    assert (tmp_path / "out" / "report.html").read_text("utf-8").endswith("</html>\n")


def test_readers_see_the_names_of_task_files_and_no_paths(tmp_path: Path) -> None:
    report = full()
    score = {"metric": "accuracy", "value": 0.5, "stderr": 0.1, "data_sha256": "ef" * 32}
    report.packed["tasks"] = dict.fromkeys(("/home/me/a/test.jsonl", "/home/me/b/test.jsonl", "C:\\me\\arc.json", "boolq"), score)
    report.save(tmp_path / "report.json")
    files.write(tmp_path / "report.json", tmp_path / "out", ("svg", "csv", "markdown"), Show())
    texts = {path.name: path.read_text("utf-8") for path in (tmp_path / "out").glob("*.*")}
    assert texts.keys() == {"report.html", "results.csv", "layers.csv", "results.md"} and not any("/me" in t or "\\me" in t for t in texts.values())
    assert all("a/test.jsonl" in texts[name] and "b/test.jsonl" in texts[name] for name in ("report.html", "results.csv", "results.md"))
    assert "tasks.arc.json.value" in texts["results.csv"] and "| arc.json |" in texts["results.md"] and "efef" in texts["results.md"]
    assert "ef" * 9 not in texts["results.md"] + texts["report.html"]
    rows = sweep_rows()
    rows[0]["tasks"] = rows[0]["dense"]["tasks"] = {"/home/me/a/test.jsonl": score}
    files.write(write_sweep(tmp_path / "sweep", rows), None, ("csv", "markdown"), Show())
    for path in (tmp_path / "sweep-report").iterdir():
        assert "/me" not in path.read_text("utf-8") and "test.jsonl" in path.read_text("utf-8")


def test_a_sweep_as_files(tmp_path: Path) -> None:
    rows = sweep_rows()
    document = files.write(write_sweep(tmp_path / "sweep", rows), None, ("csv", "markdown"), Show())
    assert document["output"] == str(tmp_path / "sweep-report") and document["files"] == ["sweep.html", "results.csv", "results.md"]
    table = list(csv.DictReader((tmp_path / "sweep-report" / "results.csv").open()))
    assert [row["id"] for row in table] == [row["id"] for row in rows] and table[-1]["error"] == "the loss is not finite"
    text = (tmp_path / "sweep-report" / "results.md").read_text("utf-8")
    assert "| w2g128-gptq (front) | 120.000 |" in text and "| dense | 29.500 |" in text


def test_the_command_writes_what_was_asked_for(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["report", str(run / "report.json"), "--markdown"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1]) == {"output": str(tmp_path / "run-report"), "files": ["report.html", "results.md"]}


def test_cells_that_spreadsheets_would_run_are_only_text() -> None:
    row = {"name": "=cmd()", "value": -1.5, "other": "-", "list": [1, 2]}
    assert list(csv.reader(io.StringIO(files.table_csv([row])))) == [["name", "value", "other", "list"], ["'=cmd()", "-1.5", "-", "[1, 2]"]]


def test_what_is_no_report_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither report.json nor rows.jsonl"):
        files.write(tmp_path, None, files.KINDS, Show())
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another one with -o"):
        files.write(tmp_path, tmp_path / "file", ("csv",), Show())
