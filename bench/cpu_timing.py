"""How the CPU benches measure: ceilings of the machine, arms in turns, a process for every thread count, and the CSV that the rows end in.

A bench is a parent that starts children, each with its own number of threads; a child appends its rows to a file as JSON lines, so that one that dies
leaves what it had. The parent writes the CSV beside its place, as FILE.part, and renames it at the end: a stopped run replaces no result.
"""

import contextlib
import csv
import datetime
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

import compressor

BURST = 0.02  # seconds of a turn
PACKAGES = ("torch", "numba", "bitsandbytes", "gptqmodel")
Row = dict[str, Any]
Name = TypeVar("Name")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


# ceilings


def ceilings(tiny: bool) -> tuple[float, dict[torch.dtype, float]]:
    """(bytes a second of the best of three ways to read memory, operations a second of a large matmul by the better library), best of some tries."""
    count, side = (1 << 20, 256) if tiny else (1 << 27, 2048)
    data, other = torch.ones(count), torch.ones(1 << 10)
    reads = (lambda: data.sum(), lambda: torch.dot(data, data), lambda: data.view(-1, 1 << 10) @ other)
    bandwidth = max(data.nbytes / best(read) for read in reads)
    a, b = torch.randn(side, side), torch.randn(side, side)
    half_a, half_b = a.bfloat16(), b.bfloat16()
    took = best(lambda: a @ b)
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        took = min(took, best(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")))
    return bandwidth, {torch.float32: 2 * side**3 / took, torch.bfloat16: 2 * side**3 / best(lambda: half_a @ half_b)}


def best(call: Callable[[], Any], tries: int = 10) -> float:
    call()
    out = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        out.append(time.perf_counter() - start)
    return min(out)


# turns


def orders(arms: Iterable[Name]) -> Iterator[list[Name]]:
    """The arms in a new random order for every round, without end; the orders are the same in each run."""
    rng, order = random.Random(0), list(arms)
    while True:
        rng.shuffle(order)
        yield order


def take_turns(calls: dict[Name, list[Callable[[], Any]]], guess: dict[Name, float], budget: float, least: int) -> dict[Name, list[float]]:
    """Seconds of a call, one number for a turn: every arm has one in each round, in random order; `guess`: seconds that a call takes."""
    burst = {arm: max(1, min(64, int(BURST / guess[arm]))) for arm in calls}
    took: dict[Name, list[float]] = {arm: [] for arm in calls}
    at, rounds = dict.fromkeys(calls, 0), 0
    order, stop = orders(calls), time.perf_counter() + budget
    gc.collect()
    gc.disable()
    while rounds < least or (time.perf_counter() < stop and rounds < 60):
        for arm in next(order):
            mine = calls[arm]
            if burst[arm] > 1:  # the caches and the thread pool forget the arm before
                mine[at[arm] % len(mine)]()
                at[arm] += 1
            start = time.perf_counter()
            for i in range(at[arm], at[arm] + burst[arm]):
                mine[i % len(mine)]()
            took[arm].append((time.perf_counter() - start) / burst[arm])
            at[arm] += burst[arm]
        rounds += 1
    gc.enable()
    return took


# processes


def thread_counts(asked: list[int]) -> list[int]:
    """Those that the CPUs of this process can run at once."""
    cpus = len(os.sched_getaffinity(0))
    for count in asked:
        if count > cpus:
            say(f"{count} threads left out: this process may use {cpus} CPU{'s' if cpus > 1 else ''}")
    return [count for count in asked if count <= cpus]


def environment(threads: int) -> dict[str, str]:
    count = str(threads)
    return os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "NUMBA_NUM_THREADS": count, "PYTHONUNBUFFERED": "1"}


def rows_of_child(what: str, command: list[str], threads: int) -> list[Row]:
    """What the script of `command`, started by this interpreter with --rows FILE, handed over before it ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        done = subprocess.run([sys.executable, *command, "--rows", str(path)], env=environment(threads), check=False)
        if done.returncode:
            say(f"{what} at {threads} threads ended with status {done.returncode}; rows up to there are kept")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def hand_over(path: Path, rows: list[Row], shown: list[str]) -> None:
    """A child's side: appends rows for the parent and says these columns of each."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        say(" ".join(f"{name}={row[name]}" for name in shown if row.get(name) not in (None, "")))


# the table


def about(*packages: str) -> dict[str, str]:
    """Columns that all rows share: the machine, versions of every package that had a part (PACKAGES and those named), and the day."""
    found = []
    for name in (*PACKAGES, *packages):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    cpu = ""
    with contextlib.suppress(OSError, StopIteration):
        cpu = next(line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        "cpu": f"{cpu} {torch.backends.cpu.get_cpu_capability()}".strip(), "versions": ", ".join(found),
        "version": f"{compressor.__version__} {done.stdout.strip()}".strip(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


class Table:
    """A CSV of rows as they come, in FILE.part until `finish`; without a path rows are only counted."""

    def __init__(self, path: Path | None, fields: list[str], common: dict[str, str]):
        self.path, self.common, self.rows = path, common, 0
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.part = path.with_name(path.name + ".part") if path else Path(os.devnull)
        self.file = self.part.open("w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, fields, restval="", extrasaction="ignore", lineterminator="\n")
        self.writer.writeheader()

    def add(self, row: Row, **own: str) -> None:
        """Adds a row with the common columns, of which `own` replaces some."""
        self.writer.writerow(row | self.common | own)
        self.file.flush()
        self.rows += 1

    def finish(self) -> int:
        """The exit status: 0 with the file in its place, or 1 if there is no row, and then nothing is replaced."""
        self.file.close()
        if not self.rows:
            say("nothing was measured")
            return 1
        if self.path:
            os.replace(self.part, self.path)
        say(f"{self.rows} rows{f' in {self.path}' if self.path else ''}")
        return 0
