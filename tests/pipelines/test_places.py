"""Where an output cannot be, or fills its disk: one sentence, before the work where that can be known, with what is finished kept."""

import errno
import fcntl
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import OutputError
from compressor.pipelines import api, compress, export, load, output, tasks, write
from compressor.pipelines.journal import claimed, open_work
from compressor.pipelines.measure.cache import Cache
from compressor.pipelines.pages import files
from compressor.pipelines.projection import Target
from compressor.pipelines.show import Show
from compressor.pipelines.sweeps import child, sweep
from compressor.recipe import Quant
from tests.pipelines.commands import call
from tests.pipelines.sweeps.fakes import Runner, write_grid


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    """A random LLaMA of two blocks in 4 bits."""
    folder = tmp_path_factory.mktemp("packed")
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    loaded = load.load(str(folder / "dense"), "cpu")
    write.round_to_folder(loaded, set())
    compress.compress(loaded.model, Quant(packer="rtn", bits=4, group=32), torch.float16, None)
    write.write_folder(loaded, folder / "packed")
    return folder / "packed"


def mounted(place: Path, options: str) -> Iterator[Path]:
    """A file system in memory, where the user may mount one."""
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs rights that this user lacks")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 48 kB that says it is large, so that nobody refuses it before."""
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 1 << 40}))
    yield from mounted(tmp_path / "full", "size=48k")


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A disk that is read-only."""
    yield from mounted(tmp_path / "closed", "ro,size=64k")


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)


@pytest.mark.parametrize("to", ["gptq", "gguf:q4_0", "bf16"])
def test_an_export_that_fills_the_disk_leaves_nothing_and_goes_when_there_is_room(packed: Path, full: Path, to: str) -> None:
    with pytest.raises(OutputError, match="the disk is full.*free some space"):
        export.export(str(packed), full / "out", Target(to, consumers=False))
    assert list(full.iterdir()) == []
    grow(full)
    export.export(str(packed), full / "out", Target(to, consumers=False))
    assert [p.name for p in full.iterdir()] == ["out"]


def test_a_task_file_a_report_and_a_cache_on_a_full_disk(packed: Path, full: Path, reported: Path) -> None:
    (full / "filler").write_bytes(bytes(47 << 10))
    with pytest.raises(OutputError, match="cannot be written"):
        tasks.extract(str(packed), full / "x.safetensors")
    with pytest.raises(OutputError, match="cannot be written.*free space"):
        files.write(reported, full / "pages", ["csv"], Show())
    said: list[str] = []

    class Told(Show):
        def say(self, text: str) -> None:
            said.append(text)

    assert Cache(full, Told()).put({"a": 1}, {"value": 2, "more": "x" * 9000})["value"] == 2
    assert len(said) == 1 and "measurements are not kept" in said[0]
    assert [p.name for p in full.rglob("*") if p.is_file()] == ["filler"]


@pytest.fixture
def reported(tmp_path: Path) -> Path:
    """The folder of a run that left a report."""
    (tmp_path / "run").mkdir()
    layers = [{"name": f"layer{i}", "error": 0.1, "bits": 4, "shape": [64, 64]} for i in range(400)]
    (tmp_path / "run" / "report.json").write_text(json.dumps({"compressor": "0", "keys": "k", "layers": layers}))
    return tmp_path / "run"


@pytest.mark.parametrize("said", ["the disk is full: out.partial could not be written", "x cannot be written (No space left on device); check"])
def test_a_sweep_stops_where_the_disk_is_full_and_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr(sweep, "draw", lambda folder: None)
    grid, ran = write_grid(tmp_path / "grid.yaml"), Runner()

    def runner(experiment: Any, folder: Any, timeout: float | None) -> child.Outcome:
        return ran(experiment, folder, timeout) if len(ran.ran) < 3 else child.Outcome(said, 1.0)

    with pytest.raises(OutputError, match="the disk is full.*run the same command again"):
        sweep.sweep("tiny", grid, tmp_path / "s", runner=runner)
    document, _ = sweep.sweep("tiny", grid, tmp_path / "s", runner=ran)
    assert document["rows"] == {"ok": 12} and len(ran.ran) == 12, "three were done, none failed for it"


def test_read_only_disks_are_known_before_the_work(packed: Path, closed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "load", None)  # nobody comes as far as loading a model
    (tmp_path / "grid.yaml").write_text("quant.bits: [4]\n")
    for command in (
        ["run", str(packed.parent / "dense"), "--quant", "4bit:rtn", "-o", "closed/deep/out"],
        ["tune", str(packed), "-o", "closed/out"],
        ["export", str(packed), "--to", "gptq", "-o", "closed/out"],
        ["apply", str(packed), "x.safetensors", "-o", "closed/out"],
        ["task", str(packed), "-o", "closed/x.safetensors"],
        ["merge-tasks", str(packed), "x.safetensors", "-o", "closed/deep/x.safetensors"],
        ["sweep", str(packed.parent / "dense"), "--grid", "grid.yaml", "-o", "closed/sweep"],
    ):
        code, _, err = call(monkeypatch, capsys, *command)
        assert code == 2 and len(err.strip().splitlines()) <= 2 and ("read-only" in err.lower()), (command, err)


def test_places_that_can_be_none_and_places_behind_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later/deep")
    for name, words in {"file": "is a file", "file/x": "no folder", "loop": "cannot be an output", "x" * 300: "cannot be an output"}.items():
        with pytest.raises(OutputError, match=words):
            export.new_place(tmp_path / name)
    assert export.new_place(tmp_path / "link") == tmp_path / "real"
    assert export.new_place(tmp_path / "dangling") == tmp_path / "later" / "deep"
    assert export.new_place(tmp_path / "missing" / "deep" / "out").name == "out"


@pytest.mark.parametrize("name", ["a new\nline", "größe-模型", "dangling"])
def test_strange_names_hold_whole_folders(packed: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("later/deep")
    code, out, err = call(monkeypatch, capsys, "export", str(packed), "--to", "gptq", "-o", name, "--no-check")
    assert code == 0, err
    assert (tmp_path / name / "model.safetensors").exists() and json.loads(out.splitlines()[-1])["output"] == name


def test_who_comes_second_is_refused_and_who_finishes_second_replaces_nothing(packed: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    with export.published(place, 0, None) as folder:
        (folder / "first").write_text("1")
        with pytest.raises(OutputError, match="another run is writing"):
            export.export(str(packed), place, Target("gptq", consumers=False))
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (place / "first").exists()
    with claimed(tmp_path / "x.safetensors"), pytest.raises(OutputError, match="another process is writing"):
        tasks.extract(str(packed), tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_text("")
    (tmp_path / ".y.safetensors.lock").write_text("")  # its writer was killed right after it had its name
    with pytest.raises(OutputError, match="already exists"):
        tasks.new_file(tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").unlink()
    other = tmp_path / "late"
    with pytest.raises(OutputError, match="already holds"), export.published(other, 0, None) as folder:
        (folder / "second").write_text("2")
        other.mkdir()  # a run ends there meanwhile
        (other / "report.json").write_text(json.dumps({"compressor": "0", "keys": "k"}))
    assert [p.name for p in other.iterdir()] == ["report.json"]
    api.Model(load.load(str(packed), "cpu")).save(tmp_path / "saved")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["late", "out", "saved"]


def test_what_a_kill_after_the_last_rename_leaves_beside_an_export_goes_with_the_next_command(packed: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "remove", lambda work: None)  # as if it had been killed there
        export.export(str(packed), tmp_path / "out", Target("gptq", consumers=False))
    assert (tmp_path / "out.exporting").exists()
    with pytest.raises(OutputError, match="already holds files"):
        export.new_place(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_handle: Any, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(OutputError, match="without locks.*local disk"), open_work(tmp_path / "w"):
        pass
    with pytest.raises(OutputError, match="without locks"):
        sweep.sweep("tiny", write_grid(tmp_path / "grid.yaml"), tmp_path / "s", runner=Runner())
