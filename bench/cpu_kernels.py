"""Time packed linears on a CPU against dense layers and other libraries in the same run, and against the machine's ceilings.

    python bench/cpu_kernels.py                 4096 x 4096 and 4096 x 11008, 1 and 2 threads -> bench/results/cpu_kernels.csv
    python bench/cpu_kernels.py --quick         4096 x 4096 only
    python bench/cpu_kernels.py --check         tiny sizes in seconds, printed only

Every thread count and shape gets a process of its own. In it all arms of a case take turns, in a new order each round, so that what happens to
the machine happens to all; each arm walks over copies of its weight that together exceed the L3 cache. A turn is a burst of calls of about
20 ms. Arms that cannot run are named with the reason and left out. Ours is `compressor.kernels.dispatch.linear`, whatever it picks.

    forward     y = x W^T for m rows
    step        512 rows: forward, gradient of x and, where there are trained values (our scales or tables), their gradient; `dense` has a
                frozen weight, `dense trained` forms the gradient of its weight, too

`ratio` is dense time over this arm's, above 1 = faster than dense fp32; `ratio_min` the same of the minima; `ratio_onednn` against oneDNN's
dense linear, `ratio_bf16` against dense bf16. `share` is the larger of the shares of the read bandwidth and of the rate of a large matmul in the
dtype of x, both measured in the same process. `bytes`: weight, x and y once, in a step the weight twice. `error`: relative, of y and grad x, in 192
output rows, against float64 products of the same weight and x; `error_values` of the trained values' gradient, which a 16-bit dtype rounds.
`extra_mb`: most resident memory of a step beyond its inputs and outputs, from a process of its own.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no compile workers beside the measurement

import torch
from cpu_arms import Arm, Layer, arms, index, make_ours, nbytes, nf4_layer, select
from cpu_timing import Row, Table, about, ceilings, environment, first_line, hand_over, rows_of_child, say, take_turns, thread_counts
from peers import Absent, quiet
from torch import Tensor

SHAPES = ((4096, 4096), (4096, 11008))  # n, k
ROWS = (1, 2, 4, 8, 16, 128)
STEP = 512
ROTATE_BYTES = 128 << 20  # four times the L3 cache
FIELDS = [
    "op", "arm", "bits", "segments", "values", "x", "n", "k", "m", "threads", "ms_min", "ms_p20", "ms_p50", "ms_p80", "rounds", "bytes", "share",
    "bound", "ratio", "ratio_min", "ratio_onednn", "ratio_bf16", "error", "error_values", "extra_mb", "engine", "read_gbs", "gemm_gflops", "cpu",
    "versions", "version", "date",
]  # fmt: skip


# one process: all cases of a shape at a thread count


@dataclass(frozen=True)
class Case:
    op: str
    n: int
    k: int
    m: int

    def work(self, layer: Layer, x: torch.dtype) -> tuple[int, int]:
        """Bytes that must move, and operations."""
        flops, size = 2 * self.m * self.n * self.k, x.itemsize
        if self.op == "forward":
            return layer.nbytes + self.m * (self.n + self.k) * size, flops
        return 2 * layer.nbytes + 2 * self.m * (self.n + self.k) * size + nbytes(*layer.leaves), flops * (3 if layer.leaves else 2)


def run(case: Case, layer: Layer, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Everything that the case computes: y, or y, grad x and the gradients of the leaves."""
    if case.op == "forward":
        return (layer.call(x),)
    y = layer.call(x)
    return (y, *torch.autograd.grad(y, [x, *layer.leaves], dy))


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, dy = torch.randn(case.m, case.k).to(dtype), torch.randn(case.m, case.n).to(dtype)
    return x.requires_grad_(case.op == "step"), dy


def errors(case: Case, layer: Layer, x: Tensor, dy: Tensor) -> tuple[float, float | None]:
    """(error of y and grad x, of the gradient of the first leaf or None), in the sampled rows: dy is zero in all others."""
    at = index(case.n)
    if case.op == "step":
        dy = torch.zeros_like(dy).index_copy_(1, at, dy[:, at])
    found = run(case, layer, x, dy)
    wide, wide_dy, truth = x.detach().double(), dy[:, at].double(), layer.truth
    assert truth is not None
    pairs = [(found[0].detach()[:, at], wide @ truth.T)]
    if case.op == "step":
        pairs.append((found[1], wide_dy @ truth))
    values = None
    if layer.leaves and case.op == "step":
        values = relative(found[2][at], true_gradient(layer.leaves[0].detach()[at].double(), truth, wide_dy.T @ wide))
    return max(relative(a, b) for a, b in pairs), values


def true_gradient(values: Tensor, truth: Tensor, dw: Tensor) -> Tensor:
    """The gradient of values from that of the dense weight `truth`: the weight itself, a scale (a factor of it), or a table (equal to it)."""
    if values.shape == dw.shape:
        return dw
    if values.dim() == 2:
        return (dw * truth).unflatten(1, (values.shape[1], -1)).sum(-1) / values
    chosen = truth.unflatten(1, (values.shape[1], -1)).unsqueeze(-1) == values.unsqueeze(2)
    return (dw.unflatten(1, (values.shape[1], -1)).unsqueeze(-1) * chosen).sum(2)


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def copies_for(arm: Arm, size: int, op: str) -> int:
    return arm.copies or (3 if op == "step" else max(3, min(64, -(-ROTATE_BYTES // size))))


def build(chosen: list[Arm], op: str, n: int, k: int, tiny: bool) -> dict[Arm, list[Layer]]:
    out: dict[Arm, list[Layer]] = {}
    for arm in chosen:
        if op not in arm.ops:
            continue
        try:
            first = arm.make(arm, n, k, op == "step")
            count = 2 if tiny else copies_for(arm, first.nbytes, op)
            out[arm] = [first, *(arm.make(arm, n, k, op == "step") for _ in range(count - 1))]
            for layer in out[arm][1:]:
                layer.truth = None
        except Absent as why:
            say(f"{arm.key} left out: {why}")
        except Exception as error:  # an arm that breaks is a line, not the end of the run
            say(f"{arm.key} left out: {first_line(error)}")
    return out


def probe(case: Case, layers: list[Layer], arm: Arm) -> tuple[list[Callable[[], Any]], float, float, float | None]:
    """(calls, seconds of one, errors) after every copy has run often enough to have compiled and repacked itself."""
    x, dy = inputs(case, arm.x)
    foreign = arm.name.startswith(("gptqmodel", "bitsandbytes"))
    with quiet() if foreign else contextlib.nullcontext():
        error, values = errors(case, layers[0], x, dy)
        for _ in range(3 if foreign else 0):
            for layer in layers:
                run(case, layer, x, dy)
    start = time.perf_counter()
    run(case, layers[0], x, dy)
    took = time.perf_counter() - start
    return [functools.partial(run, case, layer, x, dy) for layer in layers], took, error, values


def measure(args: argparse.Namespace) -> None:
    """The child: rows as JSON lines, appended as they come."""
    torch.set_num_threads(args.threads[0])
    torch.manual_seed(0)
    n, k = args.shape
    bandwidth, peaks = ceilings(args.check)
    same = {"read_gbs": f"{bandwidth / 1e9:.1f}", "engine": engine(), "n": n, "k": k, "threads": args.threads[0]}
    chosen = select(args.arms)
    for op in ("forward", "step"):
        layers = build(chosen, op, n, k, args.check)
        for m in (STEP,) if op == "step" else ROWS[::4] if args.check else ROWS:
            case = Case(op, n, k, m)
            calls, guess, errs = {}, {}, {}
            with torch.set_grad_enabled(op == "step"):
                for arm, copied in layers.items():
                    try:
                        calls[arm], guess[arm], *errs[arm] = probe(case, copied, arm)
                    except Exception as error:  # as above
                        say(f"{arm.key} cannot do {op} m={m}: {first_line(error)}")
                if not guess:
                    continue
                took = take_turns({a: calls[a] for a in guess}, guess, args.budget, args.rounds)
            rows = [row_of(case, arm, layers[arm][0], took[arm], errs[arm], bandwidth, peaks[arm.x]) | same for arm in guess]
            hand_over(args.rows, compare(rows), FIELDS[:25])
        layers.clear()
        gc.collect()


def row_of(case: Case, arm: Arm, layer: Layer, took: list[float], errs: list[float | None], bandwidth: float, peak: float) -> Row:
    ms = sorted(1e3 * t for t in took)
    cuts = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 4
    middle = statistics.median(ms)
    moved, flops = case.work(layer, arm.x)
    by_memory, by_compute = moved / bandwidth, flops / peak
    return {
        "op": case.op, "arm": arm.name, "bits": arm.bits, "segments": arm.segments or "", "values": arm.values,
        "x": str(arm.x).removeprefix("torch."), "m": case.m,
        "ms_min": f"{ms[0]:.4f}", "ms_p20": f"{cuts[0]:.4f}", "ms_p50": f"{middle:.4f}", "ms_p80": f"{cuts[3]:.4f}",
        "rounds": len(ms), "bytes": moved, "share": f"{max(by_memory, by_compute) / (middle / 1e3):.3f}",
        "bound": "memory" if by_memory > by_compute else "compute", "error": f"{errs[0]:.1e}",
        "error_values": "" if errs[1] is None else f"{errs[1]:.1e}", "key": arm.key,
        "gemm_gflops": f"{peak / 1e9:.0f}",
    }  # fmt: skip


def compare(rows: list[Row]) -> list[Row]:
    """Adds the ratios to the dense arms of the same rounds."""
    by = {row["arm"]: row for row in rows}
    columns = {"ratio": ("dense", "ms_p50"), "ratio_min": ("dense", "ms_min")}
    columns |= {"ratio_onednn": ("dense onednn", "ms_p50"), "ratio_bf16": ("dense bf16", "ms_p50")}
    for column, (arm, quantity) in columns.items():
        for row in rows:
            row[column] = f"{float(by[arm][quantity]) / float(row[quantity]):.3f}" if arm in by else ""
    return rows


def engine() -> str:
    """What dispatch.linear runs on here: numba if a call made before any other library was loaded brought it in."""
    layer = make_ours(next(a for a in arms() if a.name == "ours affine"), 128, 512, False)
    with torch.no_grad():
        layer.call(torch.randn(1, 512))
    return "numba" if "numba" in sys.modules else "torch"


# memory of a step, in a process of its own


def status_kb(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def memory(args: argparse.Namespace) -> None:
    """The other child: prints {"extra_mb": growth of resident memory in one step beyond y, grad x and the gradients of the values}."""
    torch.set_num_threads(args.threads[0])
    arm = next(a for a in arms() if a.key == args.memory)
    n, k = args.shape
    case = Case("step", n, k, STEP)
    same = arm.name.startswith("gptqmodel")  # compiled for one shape: warmed up on other layers of this one
    small = case if same else Case("step", min(case.n, 512), min(case.k, 1024), STEP)
    for _ in range(2):
        warm = arm.make(arm, small.n, small.k, True)
        x, dy = inputs(small, arm.x)
        for _ in range(3):
            run(small, warm, x, dy)
        del warm, x, dy
    layer = arm.make(arm, case.n, case.k, True)
    layer.truth = None
    nf4_layer.cache_clear()
    x, dy = inputs(case, arm.x)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
    before = status_kb("VmRSS")
    out = run(case, layer, x, dy)
    grown = (status_kb("VmHWM") - before) * 1024 - nbytes(*out)
    print(json.dumps({"extra_mb": f"{max(grown, 0) / 1e6:.1f}"}), flush=True)


# parent


def child(args: argparse.Namespace, shape: tuple[int, int], threads: int) -> list[Row]:
    command = [__file__, *common(args, shape, threads), "--budget", str(args.budget), "--rounds", str(args.rounds)]
    return rows_of_child(str(shape), command, threads)


def common(args: argparse.Namespace, shape: tuple[int, int], threads: int) -> list[str]:
    chosen = ["--arms", *args.arms] if args.arms else []
    return ["--shape", *map(str, shape), "--threads", str(threads), *chosen, *(["--check"] if args.check else [])]


def extra_memory(args: argparse.Namespace, key: str, shape: tuple[int, int], threads: int) -> str:
    """Large blocks come from the system and go back to it at once, so that freed memory is not taken for none."""
    env = environment(threads) | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    command = [sys.executable, __file__, "--memory", key, *common(args, shape, threads)]
    try:
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=600)
        return json.loads(done.stdout.splitlines()[-1])["extra_mb"]
    except (subprocess.TimeoutExpired, IndexError, ValueError, KeyError, TypeError):
        say(f"{key}: no memory of a step")
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="time packed linears on a CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_kernels.csv")
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--check", action="store_true", help="tiny sizes and few rounds; writes nothing unless --out is given")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arms", nargs="+", help="only arms whose name contains one of these, and dense")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of one case, all arms together; at least --rounds rounds")
    parser.add_argument("--rounds", type=int, default=7, help="the least number of rounds")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of a step")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("N", "K"), help="this shape only")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        args.budget, args.rounds = min(args.budget, 0.3), 2
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if args.rows or args.memory:
        (measure if args.rows else memory)(args)
        return 0
    shapes = [tuple(args.shape)] if args.shape else [(128, 512)] if args.check else list(SHAPES[: 1 if args.quick else None])
    if any(n % 64 or k % 256 for n, k in shapes):
        parser.error("n must be a multiple of 64 and k of 256")
    threads = thread_counts(args.threads)
    write = not args.check or args.out != parser.get_default("out")
    table = Table(args.out if write else None, FIELDS, about())
    for count in threads:
        for shape in shapes:
            for row in child(args, shape, count):
                key = row["key"]
                wanted = row["op"] == "step" and count == max(threads) and not args.no_memory
                if wanted and (not args.check or key in ("dense 32", "ours affine 4 bfloat16")):
                    row["extra_mb"] = extra_memory(args, key, shape, count)
                    say(f"{key} {shape}: extra_mb {row['extra_mb']}")
                table.add(row)
    return table.finish()


if __name__ == "__main__":
    sys.exit(main())
