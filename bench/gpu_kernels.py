"""Time packed linears on a GPU against the dense bf16 layer in the same run, against the card's ceilings, and against other libraries.

    python bench/gpu_kernels.py                   every case that fits 400 s, the most telling first -> bench/results/gpu_kernels.csv
    python bench/gpu_kernels.py --seconds 120 --quick      4096 x 4096 only
    python bench/gpu_kernels.py --check           no GPU: cases and byte counts, then tiny cases through the same code on the plain path

Results first: before a case is timed, a checker process compares what it computes with float64 arithmetic on the same numbers (`error` of y and
dx, `error_values` of the gradient of scales or tables). A wrong result marks its row (`correct`), and the exit status is 1.

Then calls over copies of the weight that together exceed the L2 cache are captured in one CUDA graph, whose replays take turns with those of the
dense layer. So launches cost what they cost inside a captured model, weights come from memory, and `ratio` (dense time over ours, above 1 = faster)
stands for the card as it was at that moment. `timing` says `events` where a step could not be captured.

    forward, grad_input, grad_values    y, the gradient of x, the gradient of scales or tables; dense: of the whole weight
    step                                all three through dispatch.linear and autograd, values in float32; dense: its weight is trained
    ours prepared                       a table's bytes split once, as for weights that do not change, not at every call
    sketchtune                          SketchTune's scheme in torch: dense weight gathered, one dense gradient for each of 4 examples, scatter
    gemlite, bitsandbytes, gptqmodel    where they can be imported

`share`: floor over measured time; the floor of a product is the larger of bytes over 4.8 TB/s and operations over 790 TFLOP/s (an H200); what a
copy and a large product reach in this run is in `copy_tbs` and `gemm_tflops`. `extra_mb`: most memory (MiB) of a step beyond inputs and results,
cuBLAS's workspace not counted. `goal`, `met`: what the issue asks for. Rows that were not reached are written with that note.
"""

import argparse
import csv
import json
import math
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_arms
import torch
from gpu_arms import Case
from gpu_timing import Checker, Replay, about, ask_all, capture, ceilings, extra_bytes, first_line, percentiles, race, relative, serve

BANDWIDTH, FLOPS = 4.8e12, 790e12
ROTATE_BYTES = 256 << 20  # several times the L2
GRAPH_SECONDS, GRAPH_CALLS = 5e-4, 384  # least time of a graph by its floor, most calls in it
DRIFT = 2e-3  # distance of a replay from an eager call above which a row counts as wrong
SHAPES = ((4096, 4096), (8192, 28672), (8192, 8192), (4096, 11008))  # n, k; in order of interest
FORMATS = {  # kind, bits, segments: rank, 0 first
    ("affine", 4, 0): 0, ("table", 4, 4): 1, ("affine", 3, 0): 1, ("table", 4, 1): 2, ("affine", 2, 0): 2,
    ("table", 3, 4): 3, ("table", 2, 4): 4, ("table", 3, 1): 4, ("table", 2, 1): 5,
}  # fmt: skip
OPS = {
    ("forward", 1): 0, ("step", 4096): 0, ("forward", 16): 1, ("forward", 256): 1, ("forward", 4096): 1, ("grad_input", 4096): 2,
    ("grad_values", 4096): 2, ("forward", 1024): 2, ("forward", 64): 3, ("grad_input", 256): 4, ("grad_input", 1024): 4, ("step", 1024): 5,
    ("grad_values", 1024): 5, ("grad_input", 16): 6, ("grad_values", 256): 6, ("grad_input", 1): 7, ("grad_input", 64): 7, ("step", 256): 7,
    ("grad_values", 64): 8, ("grad_values", 16): 8, ("grad_values", 1): 9,
}  # fmt: skip
PEERS = {  # kind, bits, ops
    "gemlite": (("affine", 4), ("affine", 2), ("forward",)),
    "bitsandbytes": (("nf4", 4), ("forward", "step")),
    "gptqmodel marlin": (("symmetric", 4), ("forward",)),
}
FIELDS = [
    "arm", "op", "kind", "bits", "segments", "group", "n", "k", "m", "ms_p20", "ms_p50", "ms_p80", "rounds", "bytes", "share", "bound", "ratio",
    "dense_ms_p50", "goal", "met", "error", "error_values", "correct", "extra_mb", "timing", "note", "copy_tbs", "gemm_tflops",
    "gpu", "versions", "version", "date",
]  # fmt: skip


def cases(quick: bool) -> list[Case]:
    """All, the most telling first."""
    ranked: list[tuple[float, Case]] = []
    for far, (n, k) in enumerate(SHAPES[: 1 if quick else None]):
        for (op, m), late in OPS.items():
            for (kind, bits, segments), rank in FORMATS.items():
                ranked.append((far + late + rank, Case("ours", op, kind, bits, segments, n, k, m)))
                if kind == "table" and op == "forward" and m <= 64:
                    ranked.append((far + late + rank + 1, Case("ours prepared", op, kind, bits, segments, n, k, m)))
            if (op, m) in (("step", 4096), ("forward", 1), ("forward", 4096)):
                ranked.append((far + late + 2, Case("sketchtune", op, "table", 4, 4, n, k, m)))
            for arm, (*formats, ops) in PEERS.items():
                if op in ops and (op == "forward" or m == 4096):
                    ranked += [(far + late + 2, Case(arm, op, kind, bits, 0, n, k, m)) for kind, bits in formats]
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


# goals: section 7 of the kernels' specification, as the issue states them

ONE_ROW = {(4096, 4096): 2.4, (8192, 8192): 2.8, (8192, 28672): 3.2}
MILLISECONDS = {  # where only times are stated
    (4096, 4096): {"affine": 0.195, "table": 0.226},
    (4096, 11008): {"affine": 0.520, "table": 0.608, "one row": {4: 0.0075, 3: 0.0063, 2: 0.0052}},
    (8192, 28672): {"affine": 2.720, "table": 3.160},
}
TABLES_COST = {4: 1.2, 3: 1.15, 2: 1.1}  # over affine weights, where decoding is the limit


def goals(case: Case) -> dict[str, float]:
    """Bounds by column: `ratio` at least, `ms` and `extra_mb` at most."""
    if not case.arm.startswith("ours"):
        return {}
    shape, cost = (case.n, case.k), TABLES_COST[case.bits] if case.segments else 1.0
    stated: Any = MILLISECONDS.get(shape, {})
    if case.op == "forward" and case.m == 1:
        least = ONE_ROW.get(shape) if case.bits == 4 else {3: 3.0, 2: 3.5}[case.bits]
        if least:
            return {"ratio": least / cost}
        return {"ms": stated["one row"][case.bits] * cost} if "one row" in stated else {}
    if case.op == "forward" and case.m <= 256:
        return {"ratio": 2.0 / cost if case.m <= 16 else 1.6 / cost if case.m <= 64 else 1.0}
    if case.op in ("forward", "grad_input") and case.m >= 1024:
        return {"ratio": 0.93}
    if case.op == "grad_values" and case.m == 4096 and case.kind in stated and (case.kind == "affine" or case.bits == 4):
        return {"ms": stated[case.kind]}
    if case.op == "step" and case.m == 4096:
        times = 1.12 if case.kind == "affine" else 1.2
        return ({"ratio": 1 / times} if case.kind == "affine" or case.bits == 4 else {}) | {"extra_mb": 64.0}
    return {}


def judge(row: dict[str, Any], wanted: dict[str, float]) -> dict[str, str]:
    """The columns `goal` and `met`."""
    if not wanted:
        return {}
    found = {"ratio": row["ratio"], "ms": row["ms_p50"], "extra_mb": row.get("extra_mb")}
    held = [float(found[name]) >= bound if name == "ratio" else float(found[name]) <= bound for name, bound in wanted.items() if found[name]]
    goal = " ".join(f"{name}{'>=' if name == 'ratio' else '<='}{bound:.3g}" for name, bound in wanted.items())
    return {"goal": goal, "met": "yes" if held and all(held) and row["correct"] == "yes" else "no"}


# one case


def verify(case: Case, device: str) -> dict[str, Any]:
    """Errors of one call against float64, and whether a step can be captured. In a checker."""
    torch.manual_seed(zlib.crc32(repr(case).encode()))
    built = gpu_arms.build(case, device, 1)
    if device == "cuda":
        torch.full((64 << 20,), math.nan, device=device)  # freed at once: memory that the allocator hands out next is likely full of NaN
    found, expected = built.calls[0](), built.truth()
    assert [t.shape for t in found] == [t.shape for t in expected], "shapes differ from the reference"
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    gradient = case.op == "grad_values" or len(errors) == 3
    reply: dict[str, Any] = {"correct": all(e <= most for e, most in zip(errors, built.tolerance, strict=False))}
    reply |= {"error": max(errors[: len(errors) - gradient], default=None)}
    reply |= {"error_values": errors[-1] if gradient else None, "graph": True}
    del expected
    if case.op == "step" and device == "cuda":
        try:
            graph, last = capture(built.calls)
            graph.replay()
            torch.cuda.synchronize()
            reply["graph"] = all(relative(a, b) <= DRIFT for a, b in zip(last, found, strict=True))
        except Exception as error:  # the process may be of no more use, but the result counts
            reply |= {"graph": False, "note": f"not captured: {first_line(error)}", "last": True}
    return reply


def checker(device: str) -> None:
    def answer(question: dict[str, Any]) -> dict[str, Any]:
        reply = verify(Case(**question), device)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return reply

    serve(answer)


class Bench:
    """Everything that lives as long as a run: the card, dense layers already captured, the table."""

    def __init__(self, device: str, writer: Any, file: Any):
        self.device, self.writer, self.file = device, writer, file
        copy, product = ceilings(device)
        self.common = about(device) | {"copy_tbs": f"{copy / 1e12:.3f}", "gemm_tflops": f"{product / 1e12:.1f}"}
        self.dense: dict[tuple[str, int, int, int], Replay] = {}
        self.wrong = 0

    def write(self, case: Case, row: dict[str, Any]) -> None:
        row = {name: getattr(case, name) for name in ("arm", "op", "kind", "bits", "segments", "group", "n", "k", "m")} | row
        self.writer.writerow(self.common | row)
        self.file.flush()
        if row.get("note") != "not reached":
            print(" ".join(f"{name}={row[name]}" for name in FIELDS[:26] if row.get(name) not in (None, "", 0)), flush=True)

    def replay(self, case: Case, graph: bool) -> Replay:
        copies = copies_for(case) if self.device == "cuda" else 2
        built = gpu_arms.build(case, self.device, copies)
        again = math.ceil(GRAPH_SECONDS / (floor(case) * copies)) if self.device == "cuda" and graph else 1
        return Replay((built.calls * again)[: max(copies, GRAPH_CALLS)], self.device, graph)

    def measure(self, case: Case, checked: dict[str, Any]) -> None:
        """Time a checked case beside the dense layer; its row, and the dense layer's when it is new."""
        graph = checked["graph"]
        key = (case.op, case.n, case.k, case.m)
        first = key not in self.dense
        other = Case("dense", case.op, "dense", 16, 0, case.n, case.k, case.m)
        if first:
            self.dense[key] = self.replay(other, graph)
            self.dense[key].last = ()
        dense = self.dense[key]
        mine = self.replay(case, graph)
        ours, theirs = race([mine, dense], 0.2 if self.device == "cuda" else 0.02)
        middle = percentiles(theirs)[1]
        right, note = checked["correct"], checked.get("note", "frozen, no gradient of values" if (case.op, case.kind) == ("step", "nf4") else "")
        if case.arm.startswith("ours") and not (drift := mine.drift()) <= DRIFT:
            right, note = False, f"a replay of the graph differs by {drift:.1e} from a call"
        extra = {} if case.op != "step" else {"extra_mb": megabytes(extra_bytes(mine.calls[0], self.device))}
        row = columns(case, ours, middle) | extra | {"timing": timing(mine, self.device), "note": note}
        row |= {name: "" if checked[name] is None else f"{checked[name]:.1e}" for name in ("error", "error_values")}
        row |= {"correct": "yes" if right else "NO"}
        self.wrong += not right
        self.write(case, row | judge(row, goals(case)))
        if first:
            extra = {} if case.op != "step" else {"extra_mb": megabytes(extra_bytes(dense.calls[0], self.device))}
            self.write(other, columns(other, theirs, middle) | extra | {"timing": timing(dense, self.device)})


def timing(replay: Replay, device: str) -> str:
    return "clock" if device != "cuda" else "events" if replay.graph is None else "graph"


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / (1 << 20):.1f}"


def floor(case: Case) -> float:
    """Seconds below which the case cannot run."""
    return sum(max(size / BANDWIDTH, flops / FLOPS) for size, flops in case.parts())


def columns(case: Case, times: list[float], dense_ms: float) -> dict[str, Any]:
    low, middle, high = percentiles(times)
    parts = case.parts()
    size, flops = sum(p[0] for p in parts), sum(p[1] for p in parts)
    return {
        "ms_p20": f"{low:.5f}", "ms_p50": f"{middle:.5f}", "ms_p80": f"{high:.5f}", "rounds": len(times), "bytes": size,
        "share": f"{1e3 * floor(case) / middle:.3f}", "bound": "memory" if size / BANDWIDTH > flops / FLOPS else "compute",
        "ratio": f"{dense_ms / middle:.3f}", "dense_ms_p50": f"{dense_ms:.5f}",
    }  # fmt: skip


def copies_for(case: Case) -> int:
    """Copies of the weight that exceed the L2 together; with 1024 rows and more the rows alone do."""
    weight = case.n * case.k * 2 if case.arm == "dense" else case.packed_bytes
    return max(2, min(64 if case.m < 1024 else 4, ROTATE_BYTES // weight + 1))


# the run


def run(listed: list[Case], bench: Bench, checkers: list[Checker], stop: float) -> int:
    """Check a chunk, time it, take the next; the number of cases that broke or were wrong."""
    broken, size = 0, 4 * len(checkers)
    for chunk in (listed[i : i + size] for i in range(0, len(listed), size)):
        now = time.monotonic()
        answers = ask_all([asdict(case) for case in chunk], checkers, now + 0.7 * (stop - now))
        for case, checked in zip(chunk, answers, strict=True):
            if checked is None or time.monotonic() > stop:
                bench.write(
                    case, {"note": "not reached"} | ({} if not checked or "correct" not in checked or checked["correct"] else {"correct": "NO"})
                )
                broken += bool(checked) and not checked.get("correct")
            elif "correct" not in checked:
                broken += 1
                bench.write(case, {"correct": "NO", "note": checked["note"]})
            else:
                try:
                    bench.measure(case, checked)
                except Exception as error:  # one broken case must not cost the others their device time
                    broken += 1
                    bench.write(case, {"correct": "NO", "note": f"not timed: {first_line(error)}"})
                    if bench.device == "cuda":
                        torch.cuda.synchronize()  # raises, and so ends the run, if the device is lost to this process
    return broken + bench.wrong


def check(out: Path | None) -> int:
    """What can be seen without a GPU."""
    for case in cases(False):
        size = sum(p[0] for p in case.parts())
        wanted = judge({"ratio": 1, "ms_p50": 1, "correct": "yes"}, goals(case)).get("goal", "")
        print(f"{case} {size / 1e6:.1f} MB floor {1e6 * floor(case):.2f} us, {copies_for(case)} copies {wanted}")
    print(len(cases(False)), "cases;", ", ".join(gpu_arms.missing_peers()) or "no peer", "missing here")
    listed = [Case("ours", op, *form, 128, 512, 8) for op in ("forward", "grad_input", "grad_values", "step") for form in FORMATS]
    listed += [Case("sketchtune", op, "table", 4, 4, 128, 512, 8) for op in ("forward", "step")]
    listed += [Case("ours prepared", "forward", "table", 3, 1, 128, 512, 1)]
    return whole(listed, out or Path(tempfile.mkdtemp()) / "gpu_kernels.csv", "cpu", 60.0, 1)


def whole(listed: list[Case], out: Path, device: str, seconds: float, workers: int) -> int:
    stop = time.monotonic() + seconds
    out.parent.mkdir(parents=True, exist_ok=True)
    checkers = [Checker([sys.executable, __file__, "--checker", device]) for _ in range(workers)]
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        try:
            bench = Bench(device, writer, file)
            print(json.dumps(bench.common), flush=True)
            broken = run(listed, bench, checkers, stop)
        finally:
            for one in checkers:
                one.close()
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    summary(rows, broken)
    return 1 if broken else 0


def summary(rows: list[dict[str, str]], broken: int) -> None:
    """The last lines: what failed, goals met and missed."""
    missed = [row for row in rows if row["met"] == "no" and row["correct"] == "yes"]
    for row in [r for r in rows if r["correct"] == "NO"] + missed:
        print("WRONG " if row["correct"] == "NO" else "missed", *(f"{name}={row[name]}" for name in _SHORT if row[name]))
    timed, late = sum(bool(row["ms_p50"]) for row in rows), sum(row["note"] == "not reached" for row in rows)
    met = sum(row["met"] == "yes" for row in rows)
    print(f"{timed} rows timed, {late} not reached, {broken} wrong or broken, goals: {met} met, {len(missed)} missed", flush=True)


_SHORT = ("arm", "op", "kind", "bits", "segments", "n", "k", "m", "ms_p50", "ratio", "goal", "extra_mb", "error", "error_values", "note")


def present(listed: list[Case]) -> Iterator[Case]:
    """Without the libraries that are not here, which one line names."""
    missing = gpu_arms.missing_peers()
    if missing:
        print(f"not installed here, so left out: {', '.join(missing)}", flush=True)
    yield from (case for case in listed if case.arm not in missing)


def main() -> int:
    parser = argparse.ArgumentParser(description="time packed linears on a GPU")
    parser.add_argument("--out", type=Path, help="default: results/gpu_kernels.csv beside this file; with --check a temporary file")
    parser.add_argument("--seconds", type=float, default=400.0, help="of the whole run; what does not fit is written as not reached")
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)), help="processes that check results")
    parser.add_argument("--check", action="store_true", help="no GPU: list the cases and run tiny ones on the CPU")
    parser.add_argument("--checker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.checker:
        checker(args.checker)
        return 0
    if args.check:
        return check(args.out)
    if not torch.cuda.is_available():
        print("no GPU; try --check", file=sys.stderr)
        return 2
    out = args.out or Path(__file__).parent / "results" / "gpu_kernels.csv"
    return whole(list(present(cases(args.quick))), out, "cuda", args.seconds, args.workers)


if __name__ == "__main__":
    sys.exit(main())
