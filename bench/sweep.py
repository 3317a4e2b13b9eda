"""A sweep that is ended by `kill -9` in the middle and goes on, and one that two processes share; on `tiny`, by the command that users type.

The first part starts a sweep of 27 experiments in a process group of its own, kills the whole group once --killed rows are finished and the next
experiment has measured its dense model, starts the same command again, and then checks: no finished row was run again (attempts, and times of the
reports), and experiments that a never-killed sweep runs afresh, elsewhere, have the same perplexities to the last digit. The second part starts two
processes with one Optuna storage (SQLite), each in a folder of its own, and checks that every experiment was run once. Rows go to results/sweep.csv:
those of the first sweep, then one a check.

    OMP_NUM_THREADS=1 python bench/sweep.py --work /tmp/sweep
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rows import write_rows

FIELDS = [
    "part", "id", "status", "quant.bits", "quant.group", "quant.packer", "quant.symmetric", "tune.method", "prune.method", "prune.ratio", "front",
    "dense_ppl", "packed_ppl", "tuned_ppl", "domain_ppl", "outside_ppl", "bits_per_weight", "folder_bytes", "ratio", "wall_seconds", "peak_mb",
    "attempts", "resumed", "value", "error",
]  # fmt: skip
BASE = {"nsamples": 32, "max_tokens": 8192, "steps": 20, "batch": 4, "prune_steps": 20}
GRID = {
    "base": BASE, "quant.bits": [4, 3, 2], "quant.group": [32, 64, 128], "quant.packer": ["rtn", "gptq"],
    "points": [
        {"quant": "4bit", "group": 128, "tune": "peqa"}, {"quant": "3bit", "group": 128, "tune": "peqa"},
        {"quant": "sketch4"}, {"quant": "sketch3"}, {"quant": "sketch2"}, {"prune": "loraprune:20%", "quant": "3bit", "group": 64},
        *({"quant": f"{bits}bit:rtn", "group": 64, "sym": False} for bits in (4, 3, 2)),
        {"quant": "sketch3", "tune": "peqa"},  # cannot be: peqa has no scales to move
    ],
}  # fmt: skip
FRESH = {"base": BASE, "points": [GRID["points"][1], {"quant": "3bit:rtn", "group": 32}, {"quant": "sketch2"}]}
SHARED = {"base": BASE | {"max_tokens": 2048}, "quant.bits": [4, 2], "quant.group": [64, 128], "quant.packer": ["rtn", "gptq"]}


def start(grid: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """`compressor sweep` in a process group of its own."""
    command = [sys.executable, "-m", "compressor", "sweep", "tiny", "--grid", str(grid), "-o", str(folder), "--device", "cpu", *more]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The document of a sweep that ends by itself."""
    said = process.communicate()[0].decode().strip().splitlines()
    assert process.returncode == 0, f"the sweep ended with {process.returncode}"
    return json.loads(said[-1])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def finished(folder: Path) -> dict[str, tuple[int, float]]:
    """Of each experiment that went well: how often it was started, and when its report was written."""
    good = [row for row in rows_of(folder) if row["status"] == "ok"]
    return {row["id"]: (row["attempts"], (folder / row["path"] / "report.json").stat().st_mtime) for row in good}


def fact(part: str, name: str, value: Any) -> dict[str, Any]:
    print(f"{part}: {name} = {value}", flush=True)
    return {"part": part, "id": name, "value": value}


def flat(part: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the CSV."""
    ppl = {f"{state}_ppl": (row[state] or {}).get("domain") for state in ("dense", "packed", "tuned")}
    ppl |= {"domain_ppl": row["perplexity"], "outside_ppl": row["outside"]}
    peak = max(row["peak_bytes"].values(), default=0) / 1e6
    keep = {key: row[key] for key in FIELDS if key in row}
    seconds = row["wall_seconds"] and round(row["wall_seconds"], 1)
    return keep | row["keys"] | ppl | {"part": part, "peak_mb": round(peak) or "", "wall_seconds": seconds}


def killed(work: Path, grid: Path, enough: int) -> list[dict[str, Any]]:
    """The sweep that is killed and goes on, beside experiments that never were."""
    folder = work / "killed"
    assert not folder.exists(), f"{folder} is there already: give --work a new folder, so that the kill comes in the middle"
    process = start(grid, folder)
    while len(finished(folder)) < enough or not any(folder.glob("runs/*.partial/journal.json")):
        assert process.poll() is None, f"the sweep ended before {enough} rows were finished"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before, running = finished(folder), [row["id"] for row in rows_of(folder) if row["status"] == "running"]
    document = finish(start(grid, folder))
    after, rows = finished(folder), {row["id"]: row for row in rows_of(folder)}
    again = [name for name, seen in before.items() if after[name] != seen]
    fresh = work / "fresh"
    finish(start(write(work / "fresh.yaml", FRESH), fresh))
    same = {row["id"]: [row[key] == rows[row["id"]][key] for key in ("perplexity", "outside", "folder_bytes")] for row in rows_of(fresh)}
    return [
        *(flat("killed", row) for row in rows.values()),
        fact("killed", "finished before kill -9", len(before)), fact("killed", "running when killed", " ".join(running)),
        fact("killed", "attempts of those", " ".join(str(rows[name]["attempts"]) for name in running)),
        fact("killed", "finished after the same command", document["rows"]["ok"]), fact("killed", "finished rows run again", len(again)),
        fact("killed", "started more than once", sum(attempts > 1 for attempts, _ in after.values())),
        fact("killed", "run afresh in a sweep that was not killed", " ".join(same)),
        fact("killed", "of those, equal in perplexities and bytes", sum(all(each) for each in same.values())),
    ]  # fmt: skip


def shared(work: Path) -> list[dict[str, Any]]:
    """Two processes, each with its own folder, and one storage."""
    grid, storage = write(work / "shared.yaml", SHARED), f"sqlite:///{work / 'shared.db'}"
    processes = [start(grid, work / f"worker{i}", "--storage", storage, "--study", "bench", "--keep", "none") for i in (1, 2)]
    documents = [finish(process) for process in processes]
    runs = [sorted(path.parent.name for path in (work / f"worker{i}").glob("runs/*/report.json")) for i in (1, 2)]
    rows = [{row["id"]: row["perplexity"] for row in rows_of(work / f"worker{i}")} for i in (1, 2)]
    return [
        *(flat("shared", row) for row in rows_of(work / "worker1")),
        fact("shared", "rows seen by each", " ".join(str(document["rows"]["ok"]) for document in documents)),
        fact("shared", "runs of each", " ".join(str(len(each)) for each in runs)),
        fact("shared", "experiments run by both", len(set(runs[0]) & set(runs[1]))), fact("shared", "tables alike", rows[0] == rows[1]),
    ]  # fmt: skip


def write(path: Path, grid: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(grid, sort_keys=False), "utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder for the sweeps")
    parser.add_argument("--killed", type=int, default=12, help="finished rows, of 27, when the group is killed")
    parser.add_argument("--out", default="sweep.csv")
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    rows = killed(a.work, write(a.work / "grid.yaml", GRID), a.killed)
    rows += shared(a.work)
    write_rows(Path(__file__).parent / "results" / a.out, FIELDS, [{key: row[key] for key in FIELDS if key in row} for row in rows])


if __name__ == "__main__":
    main()
