"""The report as a value and a file, and the stages that measure time and memory."""

import json
import math
import mmap
from pathlib import Path

import pytest
import torch

from compressor.errors import ModelError, OutputError
from compressor.pipelines import report as module
from compressor.pipelines import stages
from compressor.pipelines.report import Report, duration, environment, fixed, number, remarks, results, short_names, size, write_text
from compressor.pipelines.stages import Stage
from compressor.recipe import Recipe

MB = 1 << 20


def filled() -> Report:
    out = Report(created="2025-01-01T00:00:00+00:00", recipe=Recipe().to_dict(), keys="abc")
    out.model = {"name": "tiny", "parameters": 1000, "dense_bytes": 4000}
    out.dense = {"domain": {"perplexity": 5.5, "tokens": 64}, "folder_bytes": 4000, "bits_per_weight": 32.0, "ratio": 1.0}
    out.packed = {"domain": {"perplexity": 6.25, "tokens": 64}, "folder_bytes": 1000, "bits_per_weight": 3.125, "ratio": 4.0}
    out.layers = [{"name": "a", "shape": [4, 8], "bits": 3, "error": 0.25}]
    return out


def test_round_trip(tmp_path: Path) -> None:
    report = filled()
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_every_value_becomes_plain_json(tmp_path: Path) -> None:
    report = filled()
    report.packed |= {"a": torch.tensor(1.5), "b": torch.arange(3), "c": (1, 2), "d": tmp_path, "e": torch.float16, "f": {"y", "x"}, 7: Recipe().eval}
    packed = json.loads(json.dumps(report.to_dict(), allow_nan=False))["packed"]
    assert [packed[k] for k in "abcdef"] == [1.5, [0, 1, 2], [1, 2], str(tmp_path), "torch.float16", ["x", "y"]]
    assert packed["7"]["window"] is None and packed["7"]["max_tokens"] == 65536


def test_non_finite_numbers_are_null_and_named(tmp_path: Path) -> None:
    report = filled()
    report.packed["domain"]["perplexity"] = math.inf
    report.training = {"curve": [{"step": i, "loss": math.nan} for i in range(20)]}
    report.save(tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    again = Report.load(tmp_path / "r.json")
    assert again.packed["domain"]["perplexity"] is None
    assert len(again.notes) == 1 and "packed.domain.perplexity (inf)" in again.notes[0] and "13 more" in again.notes[0]
    again.save(tmp_path / "s.json")
    assert (tmp_path / "s.json").read_text() == text
    assert report.notes == []  # saving does not change the report


def test_empty_sections_are_left_out() -> None:
    assert set(Report().to_dict()) == {"compressor", "created", "resumed"}
    assert Report.from_dict({}).layers == []
    assert Report.from_dict({"tuned": None, "of_a_later_version": 1}).tuned == {}


@pytest.mark.parametrize("values", [[], {"layers": {}}, {"dense": 3}, {"command": 3}, {"resumed": "yes"}])
def test_a_section_of_the_wrong_kind_is_an_error(values: object) -> None:
    with pytest.raises(ModelError, match="here.json"):
        Report.from_dict(values, "here.json")


def test_load_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing.json cannot be read"):
        Report.load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ModelError, match=r"bad.json is not JSON"):
        Report.load(tmp_path / "bad.json")


def test_a_report_nested_too_deeply_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ModelError, match=r"deep.json is not JSON \(it nests deeper than 64 levels\)"):
        Report.load(tmp_path / "deep.json")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(tmp_path / "no" / "folder", "x")


def test_text_that_is_not_unicode_survives(tmp_path: Path) -> None:
    report = Report(command="run \udcff ☃")
    report.save(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json").command == report.command


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    keys = {"python", "torch", "transformers", "compressed_tensors", "triton", "cpu", "threads", "device", "gpu"}
    found = environment()
    assert set(found) == keys and found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["gpu"] is None and found["threads"] == torch.get_num_threads()
    assert environment("cuda:1")["gpu"] == "card of cuda:1"


def test_numbers_in_words() -> None:
    assert [fixed(5.68129), fixed(None), fixed(4.4034, 2, "×"), fixed(2.5e7), fixed(1e-7), fixed(0)] == [
        "5.681",
        "–",
        "4.40×",
        "2.5e+07",
        "1e-07",
        "0.000",
    ]
    assert [size(13.478e9), size(2.65e6), size(999), size(None)] == ["13.48 GB", "2.65 MB", "999 bytes", "–"]
    assert [duration(14.23), duration(59.97), duration(61), duration(5210.5)] == ["14.2 s", "1 min 00 s", "1 min 01 s", "1 h 26 min"]
    assert number({"a": {"b": 2}}, "a", "b") == 2
    assert [number({"a": v}, "a") for v in (True, "3", math.nan, math.inf, -math.inf, 10**400, None)] == [None] * 7


def test_short_names_keep_as_many_folders_as_tell_them_apart() -> None:
    names = ["/a/x/t.jsonl", "/b/x/t.jsonl", "/b/y/t.jsonl", "C:\\d\\one.json", "boolq", "/"]
    assert list(short_names(names).values()) == ["a/x/t.jsonl", "b/x/t.jsonl", "y/t.jsonl", "one.json", "boolq", "/"]
    assert short_names(["t.jsonl", "/a/t.jsonl"]) == {"t.jsonl": "t.jsonl", "/a/t.jsonl": "a/t.jsonl"}


def test_results_count_the_whole_folder() -> None:
    assert results(filled()) == [
        ["dense", "5.500", "–", "32.000", "32.000", "4.00 kB", "1.00×"],
        ["packed", "6.250", "–", "3.125", "8.000", "1.00 kB", "4.00×"],
    ]


def test_remarks_say_what_does_not_compare() -> None:
    report = filled()
    assert remarks(report) == []
    report.packed["domain"]["tokens"] = 32
    report.export, report.notes, report.training = {"format": "x"}, ["a note"], {"notes": ["another"]}
    text = "\n".join(remarks(report))
    assert "dense on 64 tokens, packed on 32 tokens" in text and "not verified" in text and text.endswith("a note\nanother")
    report.dense = {}
    assert "dense model was not measured" in remarks(report)[0]


def fill(megabytes: int) -> mmap.mmap:
    """Pages fresh from the system: the allocator may have as many at hand that are resident already."""
    block = mmap.mmap(-1, megabytes * MB)
    for _ in range(megabytes):
        block.write(b"x" * MB)
    return block


def test_the_allocation_counts_in_its_stage() -> None:
    if not stages.reset_peak():
        pytest.skip("this system does not reset the peak of a process")
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    with Stage("before", seconds, peaks):
        pass
    with Stage("big", seconds, peaks):
        fill(64)
    with Stage("after", seconds, peaks):
        pass
    assert peaks["big"] - max(peaks["before"], peaks["after"]) > 48 * MB
    assert abs(peaks["after"] - peaks["before"]) < 32 * MB
    assert set(seconds) == {"before", "big", "after"} and all(s >= 0 for s in seconds.values())


def test_an_inner_stage_counts_for_the_outer_one() -> None:
    if not stages.reset_peak():
        pytest.skip("this system does not reset the peak of a process")
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    with Stage("outer", seconds, peaks):
        fill(64)
        with Stage("small", seconds, peaks):
            pass
        with Stage("large", seconds, peaks):
            fill(128)
    assert peaks["outer"] >= peaks["large"] > peaks["small"] + 96 * MB
    assert seconds["outer"] >= seconds["small"] + seconds["large"]


def test_stages_add_up_and_record_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "peak_bytes", lambda device: {"": 5, "_gpu": 7} if device == "cuda" else {"": 3})
    monkeypatch.setattr(stages, "reset_peak", lambda device: True)
    seconds, peaks = {"s": 100.0}, {"s": 4}
    with pytest.raises(KeyError), Stage("s", seconds, peaks, "cuda"):
        raise KeyError
    with Stage("s", seconds, peaks):
        pass
    assert seconds["s"] > 100 and peaks == {"s": 5, "s_gpu": 7}
    assert Stage._open == []


def test_without_proc_the_lifetime_peak_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(stages.Path, "read_text", absent)
    monkeypatch.setattr(stages.Path, "write_text", absent)
    assert stages.reset_peak() is False
    assert stages.peak_bytes()[""] > 10 * MB
