"""Sweeps in a folder: rows, failures, resuming after kill -9, several processes, models that stay; with stand-ins for runs, and once for real."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compressor.errors import OutputError, RecipeError
from compressor.pipelines.report import Report
from compressor.pipelines.sweeps import child, rows, sweep
from compressor.pipelines.sweeps.grid import Experiment, Grid
from compressor.pipelines.sweeps.store import Folder, Local
from compressor.stopping import Stopped
from tests.pipelines.commands import call
from tests.pipelines.sweeps.fakes import GRID, Runner, table, write_grid, write_run

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "POLL", 0.05)
    monkeypatch.setattr(sweep, "draw", lambda folder: None)  # takes seconds, and is tested elsewhere


def work(grid: Path, folder: Path, runner: Any, **options: Any) -> dict[str, Any]:
    return sweep.sweep("tiny", grid, folder, sweep.Options(**options), runner=runner)[0]


def test_one_row_an_experiment_and_the_front(tmp_path: Path) -> None:
    grid, folder = write_grid(tmp_path / "grid.yaml", GRID | {"points": [{"quant": "3bit", "tune": "table"}]}), tmp_path / "s"
    runner = Runner("w2g128-rtn")
    document = work(grid, folder, runner)
    found = table(folder)
    assert document["rows"] == {"failed": 2, "ok": 10, "skipped": 1} and len(runner.ran) == 12
    assert [point["id"].rpartition("-")[0] for point in document["front"]] == [f"w{bits}g128-gptq-peqa" for bits in (2, 3, 4)]
    assert {name for name, row in found.items() if row["front"]} == {point["id"] for point in document["front"]}
    (best,) = [row for row in found.values() if row["label"] == "w4g128-gptq-peqa"]
    assert best["keys"] == {"quant.bits": 4, "quant.packer": "gptq", "tune.method": "peqa"}
    assert (best["status"], best["state"], best["perplexity"], best["outside"], best["folder_bytes"]) == ("ok", "tuned", 19.0, 38.0, 4000)
    assert (best["packed"]["domain"], best["dense"]["bits_per_weight"], best["tasks"]["boolq"]["stderr"]) == (20.0, 16.0, 0.1)
    assert (best["wall_seconds"], best["seconds"], best["peak_bytes"], best["attempts"]) == (2.0, {"compress": 1.0}, {"compress": 1_000_000}, 1)
    failed = [row for row in found.values() if row["status"] == "failed"]
    assert {row["error"] for row in failed} == {"the disk of the tests is full"} and all(row.keys() == best.keys() for row in found.values())
    assert "tuner table trains tables" in next(row["error"] for row in found.values() if row["status"] == "skipped")
    lines = list(csv.DictReader((folder / "sweep.csv").open()))
    (line,) = [line for line in lines if line["id"] == best["id"]]
    assert len(lines) == 13 and (line["quant.bits"], line["perplexity"], line["boolq"], line["seconds compress"]) == ("4", "19.0", "0.6", "1.0")
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["experiments"] == 13 and plan["axes"] == ["quant.bits", "quant.packer", "tune.method"]


def test_the_same_command_does_nothing_twice_and_a_larger_grid_only_what_is_new(tmp_path: Path) -> None:
    grid, folder = write_grid(tmp_path / "grid.yaml"), tmp_path / "s"
    work(grid, folder, Runner("w2g128-rtn"))
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "rows").iterdir()}
    idle = Runner()
    assert work(grid, folder, idle)["rows"] == {"failed": 2, "ok": 10} and idle.ran == []
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "rows").iterdir()} == before
    again = Runner("w2g128-rtn-peqa")
    assert work(grid, folder, again, retry_failed=True)["rows"] == {"failed": 1, "ok": 11} and len(again.ran) == 2
    more = Runner()
    write_grid(grid, GRID | {"quant.group": [128, 64]})
    assert work(grid, folder, more)["rows"] == {"failed": 1, "ok": 23} and len(more.ran) == 12
    assert {row["keys"]["quant.group"] for row in table(folder).values()} == {64, 128}


@pytest.mark.parametrize(("keep", "stay"), [("none", 0), ("front", 3), ("all", 12)])
def test_models_that_stay(tmp_path: Path, keep: str, stay: int) -> None:
    folder = tmp_path / "s"
    document = work(write_grid(tmp_path / "grid.yaml"), folder, Runner(), keep=keep)
    kept = {path.parent.name for path in folder.glob("runs/*/model.safetensors")}
    assert len(kept) == stay and {name for name, row in table(folder).items() if row["kept"]} == kept
    assert len(list(folder.glob("runs/*/report.json"))) == 12
    if keep == "front":
        assert kept == {point["id"] for point in document["front"]}


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Two stores in threads: their locks are as strange to each other as those of processes."""
    grid, folder, together = write_grid(tmp_path / "grid.yaml"), tmp_path / "s", threading.Barrier(2)
    runners, documents = [Runner(together=together) for _ in range(2)], list[dict[str, Any]]()
    threads = [threading.Thread(target=lambda r=r: documents.append(work(grid, folder, r))) for r in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    ran = [name for runner in runners for name in runner.ran]
    assert len(ran) == len(set(ran)) == 12 and all(runner.ran for runner in runners)
    assert [document["rows"] for document in documents] == [{"ok": 12}] * 2


def test_a_look_by_others_does_not_end_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks whether an experiment is held takes its lock for a moment: just then nothing can be had, and a moment later nobody is busy."""
    grid, folder, looks = write_grid(tmp_path / "grid.yaml"), tmp_path / "s", list[int]()
    plan, take = Grid("tiny", GRID), Local.take
    names = [experiment.id for experiment in plan.experiments()]
    other = Folder(folder, "tiny", plan.fingerprint)
    other.write_plan([], 12)

    def looked_at(store: Local) -> Experiment | None:
        held = [name for name in names if len(looks) < 2 and other.claim(name)]
        looks.append(len(held))
        found = take(store)
        for name in held:
            other.drop(name)
        return found

    monkeypatch.setattr(Local, "take", looked_at)
    assert work(grid, folder, Runner())["rows"] == {"ok": 12} and looks[:3] == [12, 12, 0]


SLOW = """
import sys, time
from pathlib import Path
from compressor.pipelines.sweeps import sweep
from tests.pipelines.sweeps.fakes import Runner
runner = Runner()
def slowly(experiment, folder, timeout):
    if len(runner.ran) == 3:
        print("middle", flush=True)
        time.sleep(60)
    return runner(experiment, folder, timeout)
sweep.draw = lambda folder: None
sweep.sweep("tiny", Path(sys.argv[1]), Path(sys.argv[2]), runner=slowly)
"""


def test_kill_in_the_middle_and_go_on(tmp_path: Path) -> None:
    grid, folder = write_grid(tmp_path / "grid.yaml"), tmp_path / "s"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(grid), str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"middle\n"
    held = [row["id"] for row in table(folder).values() if row["status"] == "running"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder / "rows" / f"{held[0]}.json").write_text('{"id": "half')  # as bad as it could be
    done = {path.name: path.read_bytes() for path in (folder / "rows").iterdir() if path.stem != held[0]}
    assert len(held) == 1 and len(done) == 3
    runner = Runner()
    assert work(grid, folder, runner, keep="all")["rows"] == {"ok": 12}
    assert len(runner.ran) == 9 and held[0] in runner.ran
    assert {name: (folder / "rows" / name).read_bytes() for name in done} == {
        name: text.replace(b'"kept": true', b'"kept": false') if not json.loads(text)["kept"] else text for name, text in done.items()
    }


def test_a_run_that_outlived_its_sweep_is_waited_for_and_read(tmp_path: Path) -> None:
    grid, path = {"quant.bits": [4]}, tmp_path / "s"
    plan = Grid("tiny", grid)
    (experiment,) = plan.experiments()
    orphan = Folder(path, "tiny", plan.fingerprint)  # its lock is that of the child whose parent was killed
    orphan.write_plan([], 1)
    assert orphan.claim(experiment.id)

    def later() -> None:
        time.sleep(0.5)
        write_run(experiment, orphan.run(experiment.id))
        orphan.drop(experiment.id)

    thread = threading.Thread(target=later)
    thread.start()
    runner = Runner()
    assert work(write_grid(tmp_path / "grid.yaml", grid), path, runner)["rows"] == {"ok": 1} and runner.ran == []
    thread.join()


def test_an_interrupted_experiment_is_open_again(tmp_path: Path) -> None:
    grid, folder = write_grid(tmp_path / "grid.yaml"), tmp_path / "s"

    def interrupted(experiment: Experiment, place: Folder, timeout: float | None) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)  # as polite as Ctrl-C
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        work(grid, folder, interrupted)
    assert signal.getsignal(signal.SIGTERM) is before
    assert work(grid, folder, Runner())["rows"] == {"ok": 12}
    assert sorted(row["attempts"] for row in table(folder).values()) == [1] * 11 + [2]


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "grid.yaml")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not of a sweep"):
        work(grid, tmp_path / "theirs", Runner())
    with pytest.raises(OutputError, match="not of a sweep"):
        work(grid, grid, Runner())
    work(grid, tmp_path / "s", Runner())
    plan = json.loads((tmp_path / "s" / "plan.json").read_text())
    (tmp_path / "s" / "plan.json").write_text(json.dumps(plan | {"fingerprint": "0", "model": "llama"}))
    with pytest.raises(OutputError, match="the sweep of another model, llama"):
        work(grid, tmp_path / "s", Runner())


def test_a_damaged_report_is_a_failure(tmp_path: Path) -> None:
    def broken(experiment: Experiment, folder: Folder, timeout: float | None) -> child.Outcome:
        folder.run(experiment.id).mkdir(parents=True)
        (folder.run(experiment.id) / "report.json").write_text("{")
        return child.Outcome(None, 1.0)

    document = work(write_grid(tmp_path / "grid.yaml", {"quant.bits": [4]}), tmp_path / "s", broken)
    assert document["rows"] == {"failed": 1} and "is not JSON" in next(iter(table(tmp_path / "s").values()))["error"]


def test_fronts() -> None:
    (e,) = Grid("tiny", {"quant.bits": [4]}).experiments()
    point = lambda name, size, ppl, **more: rows.blank(replace(e, id=name), "ok") | {"folder_bytes": size, "perplexity": ppl} | more
    best = [point("a", 10, 9.0), point("b", 10, 9.0), point("c", 20, 5.0)]
    behind = [point("d", 20, 6.0), point("e", 30, 5.0), point("f", 5, None), point("g", 1, 1.0, status="failed"), point("h", None, 1.0)]
    assert [row["id"] for row in rows.mark_front(best + behind) if row["front"]] == ["a", "b", "c"]
    scored = [point(name, size, None, tasks={"accuracy": {"value": value}}) for name, size, value in (("x", 1, 0.5), ("y", 2, 0.9), ("z", 3, 0.8))]
    assert [row["id"] for row in rows.mark_front(scored) if row["front"]] == ["x", "y"]


def test_reasons_and_timeouts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"Traceback\n\x1b[31merror: group=7 does not fit\x1b[0m\n\n")
    assert child.reason(2, log) == "group=7 does not fit"
    assert "SIGKILL, most often because the machine had no memory left" in child.reason(-9, log)
    log.write_bytes(b"")
    assert child.reason(3, log) == "its process ended with code 3 and said nothing"
    assert [child.parse_timeout(text) for text in ("90", "1.5m", "2h", None)] == [90, 90, 7200, None]
    for text in ("soon", "0", "-1s", "1w"):
        with pytest.raises(RecipeError, match="--timeout"):
            child.parse_timeout(text)


def test_an_experiment_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    document = work(write_grid(tmp_path / "grid.yaml", {"quant.bits": [4]}), tmp_path / "s", child.run, timeout=0.3)
    assert document["rows"] == {"failed": 1} and "took longer than 0.3 seconds" in next(iter(table(tmp_path / "s").values()))["error"]


def test_the_command_runs_real_experiments(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of a random model, one of which fails in its own process: the model was not made for such windows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    model.save_pretrained("lm", safe_serialization=True)
    tokenizer.save_pretrained("lm")
    torch.manual_seed(0)
    Path("text.txt").write_text("\n\n".join(f"The ship left harbour {i} at dawn, and came back." for i in range(200)))
    base = {"data": "text.txt", "outside": "text.txt", "nsamples": 2, "seqlen": 32, "max_tokens": 64, "quant.packer": "rtn"}
    grid = write_grid(tmp_path / "grid.yaml", {"base": base, "quant.bits": [4], "window": [64, 4096]})
    code, out, _ = call(monkeypatch, capsys, "sweep", "lm", "--grid", str(grid), "-o", "s", "--set", "quant.bits=3")
    assert code == 2 and out == ""
    code, out, err = call(monkeypatch, capsys, "sweep", "lm", "--grid", str(grid), "-o", "s", "--device", "cpu")
    document = json.loads(out.strip().splitlines()[-1])
    assert code == 0 and document["rows"] == {"failed": 1, "ok": 1} and len(document["front"]) == 1, err
    (good,) = [row for row in table(Path("s")).values() if row["status"] == "ok"]
    report = Report.load(Path("s") / good["path"] / "report.json")
    assert good["perplexity"] == report.packed["domain"]["perplexity"] and good["folder_bytes"] == report.packed["folder_bytes"]
    assert good["seconds"] == report.seconds and good["peak_bytes"]["compress"] > 1e6 and good["wall_seconds"] > sum(good["seconds"].values())
    (bad,) = [row for row in table(Path("s")).values() if row["status"] == "failed"]
    assert "4096 is more than the 128 tokens that the model was made for" in bad["error"]
    assert yaml.safe_load((Path("s") / "recipes" / f"{bad['id']}.yaml").read_text())["eval"]["window"] == 4096


def test_a_dry_run_lists_experiments_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    grid = write_grid(tmp_path / "grid.yaml", {"quant": ["3bit:rtn", "3bit:magic"], "base": {"max_tokens": 256}})
    code, out, err = call(monkeypatch, capsys, "sweep", "tiny", "--grid", str(grid), "--dry-run")
    document = json.loads(out.strip().splitlines()[-1])
    first, second = document["experiments"]
    assert code == 0 and (first["bits_per_weight"], first["error"]) == (3.125, None) and first["folder_bytes"] > 500_000 and document["seconds"] > 0
    assert "packer 'magic' is unknown" in second["error"] and second["bits_per_weight"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"] and "nothing was written" in " ".join(err.split())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--grid", "none.yaml"], "there is no grid none.yaml"),
        (["--grid", "grid.yaml", "--keep", "some"], "choose none, front or all"),
        (["--grid", "grid.yaml", "--timeout", "soon"], "--timeout 'soon'"),
        (["--grid", "grid.yaml", "--set", "quant.bitz=3"], "did you mean quant.bits"),
        (["--grid", "grid.yaml", "--trials", "0"], "must be positive"),
        (["--grid", "grid.yaml", "--study", "x"], "add --storage"),
        (["--grid", "grid.yaml", "--trials", "3", "--retry-failed"], "a combination is tried once"),
        (["--grid", "grid.yaml", "--trials", "3", "--dry-run"], "a sampler chooses as it goes"),
    ],
)
def test_bad_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_grid(tmp_path / "grid.yaml")
    code, out, err = call(monkeypatch, capsys, "sweep", "tiny", *args)
    assert code == 2 and out == "" and words in " ".join(err.split()) and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


def test_locals_see_what_others_do(tmp_path: Path) -> None:
    plan = Grid("tiny", GRID)
    here, there = (Local(Folder(tmp_path / "s", "tiny", plan.fingerprint), plan.experiments()) for _ in range(2))
    mine, theirs = here.take(), there.take()
    assert mine is not None and theirs is not None and mine.id != theirs.id
    there.keep(theirs, rows.blank(theirs, "running", attempts=1))
    assert [(row["id"], row["status"]) for row in here.rows()] == [(theirs.id, "running")] and here.busy() and here.left() == 12
    there.release(theirs, False)
    assert here.rows() == []  # nobody is at it any more
