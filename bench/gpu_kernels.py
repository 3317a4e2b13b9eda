"""Time the affine kernels on a GPU against the dense bf16 layer in the same run, and against the card's ceilings.

    python bench/gpu_kernels.py                 every case -> rows appended to bench/results/gpu_kernels.csv
    python bench/gpu_kernels.py --quick         4096 x 4096 only
    python bench/gpu_kernels.py --check         no GPU: build the cases and the byte counts, run the smallest on the CPU reference

A call is repeated over copies of the weight that together exceed the L2 cache, captured in one CUDA graph; the graph is replayed and timed with
events. So launches cost what they cost inside a captured model, and weights come from memory. `share` is the larger of the two shares: bytes
per second of 4.8 TB/s, FLOP per second of 790 TFLOP/s (an H200). `ratio` is dense time over ours, above 1 = faster than dense.
"""

import argparse
import csv
import datetime
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

import compressor
from compressor.kernels import layout, reference

BANDWIDTH, FLOPS = 4.8e12, 790e12
ROTATE_BYTES = 256 << 20  # several times the L2
GROUP = 128
SHAPES = ((4096, 4096), (4096, 11008))  # n, k
FIELDS = [
    "op", "bits", "n", "k", "m", "group", "ms_p20", "ms_p50", "ms_p80", "bytes", "share", "bound", "ratio", "dense_ms_p50", "error",
    "gpu", "torch", "triton", "version", "date",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    op: str
    bits: int
    n: int
    k: int
    m: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def bytes(self, bits: float | None = None) -> int:
        """Bytes that must move: weight (bf16 scales, uint8 zeros), inputs, output; `bits` 16 for the dense layer."""
        weight = self.n * self.k * (bits or self.bits) / 8
        groups = self.n * (self.k // GROUP)
        rows = 2 * self.m * (self.n + self.k)
        if self.op == "grad_scale":  # reads codes and zeros, writes fp32 sums; dense: writes the bf16 gradient of the weight
            return int(weight + rows + (0 if bits else 5 * groups))
        return int(weight + rows + (0 if bits else 3 * groups))


def cases(quick: bool) -> list[Case]:
    out = []
    for n, k in SHAPES[: 1 if quick else None]:
        for bits in (4, 3, 2):
            out += [Case("forward", bits, n, k, m) for m in (1, 16, 256, 2048)]
            out += [Case("grad_input", bits, n, k, 2048), Case("grad_scale", bits, n, k, 2048)]
    return out


Call = Callable[[], Any]


def build(case: Case, ops: Any, device: str, copies: int) -> list[Call]:
    """One call for each copy of a random packed weight."""
    n, k, m = case.n, case.k, case.m
    x, dy = (torch.randn(m, width, device=device).bfloat16() for width in (k, n))
    calls: list[Call] = []
    for _ in range(copies):
        down, across = layout.tiles(n, k)
        words = torch.randint(-(1 << 31), (1 << 31) - 1, (down, across, 64, 8 * case.bits), device=device, dtype=torch.int32)
        scale = (torch.rand(n, k // GROUP, device=device) * 0.01 + 0.01).bfloat16()
        zero = torch.randint(0, 1 << case.bits, (n, k // GROUP), device=device, dtype=torch.uint8)
        packed = (words, scale, zero, case.bits, GROUP)
        if case.op == "forward":
            calls.append(lambda packed=packed: ops.forward(x, *packed, n))
        elif case.op == "grad_input":
            calls.append(lambda packed=packed: ops.grad_input(dy, *packed, k))
        else:
            calls.append(lambda w=words, z=zero: ops.grad_scale(x, dy, w, z, case.bits, GROUP))
    return calls


def build_dense(case: Case, device: str, copies: int) -> list[Call]:
    """The same products by torch on dense bf16 weights; for grad_scale the whole gradient of the weight."""
    x, dy = (torch.randn(case.m, width, device=device).bfloat16() for width in (case.k, case.n))
    if case.op == "grad_scale":
        return [lambda: dy.T @ x] * copies
    weights = [torch.randn(case.n, case.k, device=device).bfloat16() for _ in range(copies)]
    if case.op == "forward":
        return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
    return [lambda w=w: dy @ w for w in weights]


def copies_for(weight_bytes: float) -> int:
    return max(2, min(64, int(ROTATE_BYTES // weight_bytes) + 1))


def milliseconds(calls: list[Call], budget: float = 150.0) -> list[float]:
    """20th, 50th and 80th percentile of the time of one call, over replays of a graph that makes every call once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # compile and create handles outside the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    first = _replay(graph)
    times = sorted(_replay(graph) / len(calls) for _ in range(max(10, min(100, int(budget / max(first, 1e-3))))))
    cuts = statistics.quantiles(times, n=5)
    return [cuts[0], statistics.median(times), cuts[3]]


def _replay(graph: Any) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def check_result(case: Case, ops: Any, device: str) -> float:
    """Relative error of one call against the plain torch reference; NaN shows as NaN."""
    torch.manual_seed(0)
    ours = build(case, ops, device, 1)[0]().double()
    torch.manual_seed(0)
    theirs = build(case, reference, device, 1)[0]().double()
    return float((ours - theirs).norm() / theirs.norm())


def measure(case: Case, ops: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"op": case.op, "bits": case.bits, "n": case.n, "k": case.k, "m": case.m, "group": GROUP}
    row["error"] = f"{check_result(case, ops, 'cuda'):.1e}"
    ours = milliseconds(build(case, ops, "cuda", copies_for(case.n * case.k * case.bits / 8)))
    dense = milliseconds(build_dense(case, "cuda", copies_for(case.n * case.k * 2)))
    by_memory, by_compute = case.bytes() / BANDWIDTH, case.flops / FLOPS
    row |= dict(zip(("ms_p20", "ms_p50", "ms_p80"), (f"{t:.5f}" for t in ours), strict=True))
    row |= {
        "bytes": case.bytes(), "share": f"{max(by_memory, by_compute) / (ours[1] / 1e3):.3f}",
        "bound": "memory" if by_memory > by_compute else "compute", "ratio": f"{dense[1] / ours[1]:.3f}", "dense_ms_p50": f"{dense[1]:.5f}",
    }  # fmt: skip
    return row


def version() -> str:
    """The package's version and, in a checkout, the commit."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return f"{compressor.__version__} {done.stdout.strip()}".strip()


def check() -> int:
    """What can be seen without a GPU."""
    listed = cases(False)
    for case in listed:
        print(case, f"{case.bytes() / 1e6:.1f} MB (dense {case.bytes(16) / 1e6:.1f})", copies_for(case.n * case.k * case.bits / 8), "copies")
    for op in ("forward", "grad_input", "grad_scale"):
        small = Case(op, 3, 64, 256, 2)
        out, dense = build(small, reference, "cpu", 2)[1](), build_dense(small, "cpu", 2)[1]()
        print(op, tuple(out.shape), out.dtype, tuple(dense.shape), f"{check_result(small, reference, 'cpu'):.1e}")
    print(len(listed), "cases;", version())
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="time the affine kernels on a GPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_kernels.csv")
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--check", action="store_true", help="no GPU: list the cases and run tiny ones on the CPU")
    args = parser.parse_args()
    if args.check:
        return check()
    if not torch.cuda.is_available():
        print("no GPU; try --check", file=sys.stderr)
        return 2
    from compressor.kernels import affine

    args.out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not args.out.exists()
    about = {
        "gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "triton": triton.__version__, "version": version(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    failed = 0
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        for case in cases(args.quick):
            try:
                row = measure(case, affine) | about
            except Exception as error:  # one broken case must not cost the others their device time
                failed += 1
                print(f"{case} failed: {type(error).__name__}: {error}", file=sys.stderr)
                torch.cuda.synchronize()
                continue
            writer.writerow(row)
            file.flush()
            print(" ".join(f"{name}={row[name]}" for name in FIELDS[:15]), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
