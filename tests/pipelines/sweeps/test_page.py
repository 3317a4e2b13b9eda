"""The page of a sweep: all rows, the right front, safe with hostile rows, honest about what does not compare."""

import json
import re
from pathlib import Path

import pytest

from compressor.errors import ModelError
from compressor.pipelines.pages import figures
from compressor.pipelines.sweeps import front_plots, page
from tests.pipelines.reports import full, sweep_rows, write_sweep

EVIL = "<script>alert(1)</script>\u202e"


def test_the_page_shows_every_run_and_failure(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", sweep_rows())
    page.write(folder)
    text = (folder / "sweep.html").read_text("utf-8")
    assert text == page.page(folder)  # the same bytes again
    for title in ("Quality against size", "Runs", "Failures", "Axes", "Protocol", "Recipe", "Model and environment"):
        assert f"<h2>{title}</h2>" in text
    assert text.count("<tr class=front>") == 6 and text.count("<svg viewBox") == 12 + 3
    for words in (
        "11 experiments: 9 ok, 1 failed, 1 waiting",
        "1 run of 10 failed",
        "the loss is not finite",
        "quant.packer",
        "rtn, gptq, sketch",
        "ab" * 32,
    ):
        assert words in text
    assert "default-src 'none'" in text and "<script" not in text


def test_the_line_goes_through_the_front_of_its_own_panel(tmp_path: Path) -> None:
    rows = sweep_rows()
    rows[4] |= {"perplexity": 28.0, "bits_per_weight": 1.0}  # beats all in bits, not in bytes
    panels = {p.name: figures.inline(p) for p in front_plots.panels(rows)}

    def labelled(name: str) -> set[str]:
        return set(re.findall(r'class="label">\s*<text[^>]*>([^<]*)</text>', panels[name])) - {""}

    assert {label for label in labelled("perplexity-domain-by-bits") if not label.startswith("dense")} == {"w3g128"}
    assert len(labelled("perplexity-domain-by-size")) > 2


def test_methods_have_looks_of_their_own_and_labels_do_not_repeat_them() -> None:
    rows = [{"keys": {"quant.packer": f"p{i}", "tune.method": "none"}, "label": f"w3-p{i}", "status": "ok"} for i in range(30)]
    looks = front_plots.looks(rows)
    assert len(set(looks.values())) == 30 and not {"^", "v", "<", ">", "*"} & {shape for _, shape in looks.values()}
    assert front_plots.method(rows[3]) == "p3" and front_plots.short_label(rows[3]) == "w3"
    assert front_plots.method({"keys": {"tune.method": "none"}}) == "plain"


def test_hostile_and_empty_rows(tmp_path: Path) -> None:
    rows = sweep_rows()
    rows[0] |= {"label": EVIL, "id": EVIL, "keys": {"quant.packer": EVIL, EVIL: EVIL}, "tasks": {EVIL: {"metric": EVIL, "value": 0.5}}}
    rows[9] |= {"error": EVIL, "id": EVIL}
    rows.append({"status": "ok"})
    rows.append({"status": "running", "id": "x"})
    folder = write_sweep(tmp_path / "s", rows[1:])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page.page(folder)
    assert "<script" not in text and "\u202e" not in text and "&lt;script&gt;" in text
    write_sweep(tmp_path / "none", [{"id": "a", "status": "running"}])
    assert "1 running" in page.page(tmp_path / "none")


def test_memory_of_processes_is_not_shown(tmp_path: Path) -> None:
    rows = sweep_rows()
    for row in rows:
        row["peak_bytes"] = {"evaluate dense": 9e8, "evaluate packed": 1e9}
    text = page.page(write_sweep(tmp_path / "s", rows))
    assert "memory" not in text.split("<h2>Protocol")[0].partition("<body>")[2] and text.count("<svg viewBox") == 9 + 3


def test_what_does_not_compare_is_said(tmp_path: Path) -> None:
    rows = sweep_rows()
    rows[1]["host"] = "b"
    folder = write_sweep(tmp_path / "s", rows)
    other = full()
    other.protocol["domain"] |= {"window": 128}
    (folder / "runs" / str(rows[1]["id"])).mkdir()
    other.save(folder / "runs" / str(rows[1]["id"]) / "report.json")
    text = page.page(folder)
    assert "Perplexities on the domain text do not compare" in text and "2 machines took part" in text and "outside text do not" not in text


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"rows.jsonl cannot be read"):
        page.write(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n{')
    with pytest.raises(ModelError, match=r"rows.jsonl, line 2, is not JSON"):
        page.write(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n" + "[" * 200_000)
    with pytest.raises(ModelError, match=r"rows.jsonl, line 2, is not JSON .it nests deeper than 64 levels"):
        page.write(tmp_path)
    for key, value in (("keys", 5), ("tasks", [1]), ("dense", "x"), ("peak_bytes", 3)):
        (tmp_path / "rows.jsonl").write_text("{}\n" + json.dumps({"id": "a", "status": "ok", key: value}))
        with pytest.raises(ModelError, match=f"line 2: {key} must be an object"):
            page.write(tmp_path)
    (tmp_path / "rows.jsonl").write_text("[1]\n")
    with pytest.raises(ModelError, match="holds no sweep"):
        page.write(tmp_path)
