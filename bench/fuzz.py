"""A fuzzer over everything that the package reads: damaged and hostile files against the rule that each ends in a result or in one sentence.

    python bench/fuzz.py --cases 101500 --write                  # the committed campaign (101500 cases), some 10 minutes of a core
    python bench/fuzz.py --target table --cases 2000       # one target; --case 17 runs case 17 of it here, with its traceback

Cases are drawn from (seed, target, number), so each can be run again. They run in a forked worker that is watched: more than SECONDS of processor
time, or WAIT in all, is a hang, more than MEMORY above what the worker had is a blow-up, a worker that dies is a crash. An audit hook of the
interpreter records what no case may do: write or remove outside of its folder, start a process, reach for the network, unpickle, compile code of
the folder. What a case raises must be a CompressorError of one line and at most LONGEST characters. Anything else is a finding; the process ends
with 1 if there is one.
"""

import argparse
import csv
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}

import fuzz_seeds
import fuzz_targets
import torch
from rows import write_rows

from compressor import __version__
from compressor.errors import CompressorError
from compressor.pipelines import cli, digests, load
from compressor.pipelines.sources import Corpus

RESULTS = Path(__file__).resolve().parent / "results" / "fuzz.csv"
FIELDS = ["target", "cases", "fine", "refused", "findings", "slowest_seconds", "largest_growth_mb", "seconds", "seed", "torch", "compressor"]
SECONDS, WAIT, MEMORY, LONGEST = 5.0, 300.0, 400 << 20, 500
ROOM = 3 << 30  # bytes of address space that a worker may take beyond what it has
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FORBIDDEN = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.putenv",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
)
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate", "shutil.rmtree")


class Watch:
    """The audit hook: while `on`, it notes what must not happen, and where files may be written."""

    def __init__(self, place: Path):
        self.place, self.on, self.seen = str(place), False, list[str]()
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        bad = event in FORBIDDEN
        if event == "open":
            path, _, mode = args
            bad = isinstance(path, str | bytes) and bool((mode or 0) & WRITING) and not self._inside(os.fsdecode(path))
        elif event in CHANGING:
            changed = args[1] if event in ("os.symlink", "os.link") else args[0]
            bad = isinstance(changed, str | bytes | os.PathLike) and not self._inside(os.fspath(changed))
        elif event == "compile":
            bad = self.place in str(args[1])
        elif event == "import":
            bad = str(args[0]).partition(".")[0] == "modeling_x"
        if bad:
            self.on = False
            self.seen.append(f"{event} {str(args)[:200]}")
            self.on = True
            raise PermissionError(f"{event} is not allowed here")

    def _inside(self, path: str | bytes) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.place) or os.fsdecode(path) in ("/dev/null", "/dev/tty")


def seeds(place: Path) -> dict[str, Any]:
    """All that cases are made of."""
    found: dict[str, Any] = {"folders": fuzz_seeds.folders(), "data": fuzz_seeds.data(), "questions": fuzz_seeds.questions()}
    base = found["folders"]["compressed-tensors asymmetric"]
    found |= {"tasks": fuzz_seeds.tasks(base), "gguf": fuzz_seeds.gguf(), "recipe": fuzz_seeds.recipe(), "records": dict(fuzz_seeds.records())}
    found |= {"tokenizer": fuzz_seeds.TOKENIZER, "templates": fuzz_seeds.TEMPLATES}
    for name, content in (("dense", found["folders"]["dense"]), ("base", base), ("packed", found["folders"]["compressed-tensors"])):
        fuzz_targets.put(place / name, content)
    found["packed"] = load.packed_weights(load.load(str(place / "base"), "cpu").model)
    reports = {"recipe.yaml": found["recipe"], "report.json": found["records"]["report.json"]}
    digests.seal(fuzz_targets.put(place / "sealed", fuzz_targets.only(found["folders"]["dense"], ".json", ".safetensors") | reports), None)
    found["sealed"] = fuzz_seeds.files(place / "sealed")
    return found | {"dense": place / "dense", "model": lambda: load.load(str(place / "packed"), "cpu").model}


def once(target: str, number: int, seed: int, found: dict[str, Any], place: Path, watch: Watch) -> tuple[str, str]:
    """(fine | refused | finding, what was said) of one case."""
    run, _ = fuzz_targets.TARGETS[target]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.chdir(place)
    watch.seen.clear()
    verdict, said = "fine", ""
    try:
        watch.on = True
        run(random.Random(f"{seed} {target} {number}"), found, place)
    except CompressorError as error:
        said = cli.one_line(error)
        verdict = "refused" if said and len(said) <= LONGEST else "finding"
    except BaseException as error:  # what this is for
        frame = traceback.extract_tb(error.__traceback__)
        where = next((f for f in reversed(frame) if "/compressor/" in f.filename), frame[-1])
        verdict, said = "finding", f"{type(error).__name__}: {str(error)[:200]} at {Path(where.filename).name}:{where.lineno}"
    finally:
        watch.on = False
    if watch.seen:
        verdict, said = "finding", f"forbidden: {watch.seen[0]}"
    if any(place.rglob(fuzz_seeds.CANARY)):
        verdict, said = "finding", "code of a stranger ran"
    return verdict, said


def worker(target: str, numbers: range, seed: int, found: dict[str, Any], place: Path, pipe: int) -> None:
    """Run cases, one line of JSON before and one after each."""
    for stream in () if os.environ.get("FUZZ_LOUD") else (1, 2):  # libraries in C and Rust write there, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    watch, peak = Watch(place), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        os.write(pipe, (json.dumps([number]) + "\n").encode())
        start = time.process_time()
        verdict, said = once(target, number, seed, found, place, watch)
        seconds, now = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(pipe, (json.dumps([number, verdict, said[:600], seconds, (now - peak) << 10]) + "\n").encode())
        peak = max(peak, now)
    os._exit(0)


def _computed(process: int) -> float:
    """Seconds of processor time that a process has taken; a machine that others use, too, makes no hang."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def watched(target: str, count: int, seed: int, found: dict[str, Any], place: Path, told: Callable[[int, str, str, float, int], None]) -> None:
    """All cases of a target in workers; `told` hears of each."""
    at = 0
    while at < count:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            worker(target, range(at, count), seed, found, place, writer)
        os.close(writer)
        buffer, busy, why, begun = b"", False, "", (0.0, 0.0)
        while True:
            if not select.select([reader], [], [], 0.5)[0]:
                computed, waited = (now - then for now, then in zip((_computed(child), time.monotonic()), begun, strict=True))
                if busy and (computed > SECONDS or waited > WAIT):
                    why = f"hang of more than {SECONDS:g} s"
                    os.kill(child, signal.SIGKILL)
                    break
                continue
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                break
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for line in map(json.loads, lines):
                busy, begun = len(line) == 1, (_computed(child), time.monotonic())
                if not busy:
                    told(*line)
                    at = line[0] + 1
        os.close(reader)
        status = os.waitpid(child, 0)[1]
        if busy or why:
            told(at, "finding", why or f"crash: the worker ended with {os.waitstatus_to_exitcode(status)}", SECONDS, 0)
            at += 1


def campaign(target: str, count: int, seed: int, found: dict[str, Any], place: Path, show: str | None = None) -> dict[str, Any]:
    """A row of results; findings are printed, each kind once, and so is what got the verdict `show`."""
    tally, kinds, most = Counter[str](), defaultdict[str, list[int]](list), [0.0, 0]
    begin = time.perf_counter()

    def told(number: int, verdict: str, said: str, seconds: float, growth: int) -> None:
        if verdict != "finding" and (seconds > SECONDS or growth > MEMORY):
            verdict, said = "finding", f"{seconds:.1f} s, {growth >> 20} MB more: {said}"
        tally[verdict] += 1
        most[:] = [max(most[0], seconds), max(most[1], growth)]
        if verdict == "finding" or verdict == show:
            kinds[said].append(number)

    watched(target, count, seed, found, place, told)
    row = {"target": target, "cases": count, "fine": tally["fine"], "refused": tally["refused"], "findings": tally["finding"], "seed": seed}
    row |= {"slowest_seconds": f"{most[0]:.2f}", "largest_growth_mb": int(most[1]) >> 20, "seconds": f"{time.perf_counter() - begin:.0f}"}
    print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    for said, numbers in sorted(kinds.items(), key=lambda each: -len(each[1]))[:40]:
        print(f"    {len(numbers)}× case {numbers[0]}: {said}", flush=True)
    return row | {"torch": torch.__version__, "compressor": __version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of all targets together, or of each --target")
    parser.add_argument("--target", action="append", choices=list(fuzz_targets.TARGETS))
    parser.add_argument("--case", type=int, help="one case of a --target, here")
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--show", choices=["fine", "refused"], help="what was said of these cases, too")
    parser.add_argument("--write", action="store_true", help="write bench/results/fuzz.csv")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cli.quiet()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        place = Path(name) / "case"
        found = seeds(Path(name))
        Corpus.of("warm", [fuzz_targets.sources.Document("x")])
        if given.case is not None:
            place.mkdir()
            os.chdir(place)
            fuzz_targets.TARGETS[given.target[0]][0](random.Random(f"{given.seed} {given.target[0]} {given.case}"), found, place)
            return
        shares = {key: share for key, (_, share) in fuzz_targets.TARGETS.items() if not given.target or key in given.target}
        total = sum(shares.values())
        done = list(csv.DictReader(RESULTS.open(newline=""))) if given.write and RESULTS.exists() else []  # a campaign may come in slices
        rows: list[dict[str, Any]] = [row for row in done if row["target"] not in shares]
        for target, share in sorted(shares.items(), key=lambda each: each[1]):  # the slow ones first
            count = given.cases if given.target else round(given.cases * share / total)
            rows.append(campaign(target, count, given.seed, found, place, given.show))
            if given.write:
                write_rows(RESULTS, FIELDS, rows)
        print(f"{sum(int(row['cases']) for row in rows)} cases, {sum(int(row['findings']) for row in rows)} findings")
        sys.exit(1 if any(int(row["findings"]) for row in rows) else 0)


if __name__ == "__main__":
    main()
