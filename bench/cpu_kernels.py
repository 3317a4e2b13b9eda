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
import copy
import csv
import datetime
import functools
import gc
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one worker its thread pool refuses to start
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no compile workers beside the measurement

import torch
from torch import Tensor

import compressor
from compressor.kernels import dispatch, layout, reference

GROUP = 128
SHAPES = ((4096, 4096), (4096, 11008))  # n, k
ROWS = (1, 2, 4, 8, 16, 128)
STEP = 512
ROTATE_BYTES = 128 << 20  # four times the L3 cache
BURST = 0.02  # seconds of a turn
FIELDS = [
    "op", "arm", "bits", "segments", "values", "x", "n", "k", "m", "threads", "ms_min", "ms_p20", "ms_p50", "ms_p80", "rounds", "bytes", "share",
    "bound", "ratio", "ratio_min", "ratio_onednn", "ratio_bf16", "error", "error_values", "extra_mb", "engine", "read_gbs", "gemm_gflops", "cpu",
    "versions", "version", "date",
]  # fmt: skip


class Absent(Exception):
    """Why an arm cannot run."""


@dataclass
class Layer:
    """One copy of a weight: its product, what is trained beside x, the bytes it occupies, and its true values in the sampled rows."""

    call: Callable[[Tensor], Tensor]
    nbytes: int
    truth: Tensor | None = None  # float64 [sample, k]
    leaves: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Arm:
    name: str
    make: Callable[["Arm", int, int, bool], Layer]  # (arm, n, k, train)
    bits: int
    values: str = ""
    segments: int = 0
    x: torch.dtype = torch.float32
    ops: tuple[str, ...] = ("forward", "step")
    copies: int = 0  # 0: as many as exceed the cache

    @property
    def key(self) -> str:
        parts = [self.name, str(self.bits), f"{self.segments} segments" if self.segments else "", self.values]
        return " ".join(p for p in parts if p)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def sample(n: int) -> list[slice]:
    """Rows whose results are checked: the first, middle and last tile."""
    return [slice(64 * i, 64 * i + 64) for i in sorted({0, n // 128, n // 64 - 1})]


def index(n: int) -> Tensor:
    return torch.cat([torch.arange(s.start, s.stop) for s in sample(n)])


# arms


def make_ours(arm: Arm, n: int, k: int, train: bool) -> Layer:
    """Random words are codes of any width and order, so nothing needs packing."""
    group = -(-k // arm.segments) if arm.segments else GROUP
    down, across = layout.tiles(n, k)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (down, across, 64, 8 * arm.bits), dtype=torch.int32)
    dtype = getattr(torch, arm.values)
    if arm.segments:
        levels = (torch.arange(1 << arm.bits) + 0.5 * torch.rand(n, arm.segments, 1 << arm.bits)) / (1 << arm.bits) - 0.5
        values, zero = (0.06 * levels).to(dtype), None  # distinct, so that a value tells its code
    else:
        values = (torch.rand(n, k // group) * 0.01 + 0.01).to(dtype)
        zero = torch.randint(0, 1 << arm.bits, (n, k // group), dtype=torch.uint8)

    def true(rows: slice) -> Tensor:
        part = words[rows.start // 64 : rows.stop // 64]
        return reference.dequantize(part, values.detach()[rows], None if zero is None else zero[rows], arm.bits, group, 64, k, torch.float64)

    truth = torch.cat([true(rows) for rows in sample(n)])
    if train:
        values.requires_grad_()
    call = lambda x: dispatch.linear(x, words, values, zero, None, arm.bits, group, n)
    return Layer(call, nbytes(words, values, zero), truth, [values] if train else [])


def make_dense(arm: Arm, n: int, k: int, train: bool) -> Layer:
    w = (torch.randn(n, k) * 0.02).to(arm.x)
    if arm.name == "dense onednn":
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            raise Absent("this torch has no mkldnn._linear_pointwise")
        call = lambda x: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    else:
        call = lambda x: torch.nn.functional.linear(x, w)
    truth = w[index(n)].double()
    trained = train and arm.name == "dense trained"
    return Layer(call, nbytes(w), truth, [w.requires_grad_()] if trained else [])


def make_int4pack(arm: Arm, n: int, k: int, train: bool) -> Layer:
    """torch's 4-bit kernel: weight = (code - 8) * scale + offset, all bf16."""
    aten = torch.ops.aten
    if not hasattr(aten, "_weight_int4pack_mm_for_cpu") or not hasattr(aten, "_convert_weight_to_int4pack_for_cpu"):
        raise Absent("this torch has no int4pack for CPUs")
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    both = torch.stack([torch.rand(k // GROUP, n) * 0.01 + 0.01, torch.randn(k // GROUP, n) * 0.02], -1).bfloat16()
    scale, offset = (both[..., i][:, index(n)].T.double().unsqueeze(-1) for i in (0, 1))
    truth = ((codes[index(n)].double().unflatten(1, (-1, GROUP)) - 8) * scale + offset).flatten(1)
    words = aten._convert_weight_to_int4pack_for_cpu(codes, 1).clone()
    return Layer(lambda x: aten._weight_int4pack_mm_for_cpu(x, words, GROUP, both), nbytes(words, both), truth)


@functools.lru_cache(maxsize=1)
def _nf4(n: int, k: int) -> tuple[Any, Tensor]:
    """A quantised bitsandbytes layer, which others are copied from (quantising takes seconds), and its dense weight in the sampled rows."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict({"weight": torch.randn(n, k) * 0.02})
    layer.to("cpu")
    state = layer.weight.quant_state
    state.dtype = torch.float32
    truth = bnb.functional.dequantize_4bit(layer.weight.data, state)[index(n)].double()
    return layer, truth


def make_nf4(arm: Arm, n: int, k: int, train: bool) -> Layer:
    """bitsandbytes' Linear4bit, blocks of 64: in eval mode it repacks at the first call where the CPU multiplies bf16, in train mode it does not."""
    require("bitsandbytes")
    layer, truth = _nf4(n, k)
    layer = copy.deepcopy(layer).train(train)
    layer.compute_dtype, layer.compute_type_is_set = arm.x, True
    layer.weight.quant_state.dtype = arm.x
    return Layer(layer, nbytes(layer.weight.data, layer.weight.quant_state.absmax), truth)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [rows * bits / 32, cols] -> codes [rows, cols]; down every column runs one stream of bits, lowest first."""
    ones = (words.unsqueeze(1) >> torch.arange(32).view(1, 32, 1)) & 1
    return (ones.reshape(-1, bits, words.shape[1]) << torch.arange(bits).view(1, bits, 1)).sum(1)


@functools.lru_cache(maxsize=1)
def _gptqmodel() -> types.ModuleType:
    name = "gptqmodel.models.definitions.internvl_chat"
    if importlib.util.find_spec("torchvision") is None:  # 7.4.0 imports it, undeclared, for one family of vision models
        stand_in = types.ModuleType(name)
        stand_in.InternVLChatQModel = type("InternVLChatQModel", (), {})  # type: ignore[attr-defined]
        sys.modules.setdefault(name, stand_in)
    torch._dynamo.config.recompile_limit = 256  # its kernel compiles one dequantiser for all layers of a shape, with a guard for each
    with quiet():
        import gptqmodel
        import gptqmodel.utils.importer

    return gptqmodel


def make_gptqmodel(arm: Arm, n: int, k: int, train: bool) -> Layer:
    """GPTQModel's layer for a CPU: the torch kernel (dequantise, compiled, then matmul), or the one that it selects by itself."""
    require("gptqmodel")
    lib = _gptqmodel()
    from gptqmodel.quantization import FORMAT, METHOD

    about = {"bits": arm.bits, "group_size": GROUP, "desc_act": False, "sym": False, "pack_dtype": torch.int32}
    backend = lib.BACKEND.AUTO if arm.name == "gptqmodel auto" else lib.BACKEND.GPTQ_TORCH
    with quiet():
        kind = lib.utils.importer.select_quant_linear(device="cpu", backend=backend, format=FORMAT.GPTQ_V2, quant_method=METHOD.GPTQ, **about)
        layer = kind(in_features=k, out_features=n, bias=False, format=FORMAT.GPTQ_V2, **about)
        layer.qweight.random_(-(1 << 31), (1 << 31) - 1)
        layer.qzeros.random_(-(1 << 31), (1 << 31) - 1)
        layer.scales = (torch.rand(layer.scales.shape) * 0.01 + 0.01).to(arm.x)
        layer.qzero_format(2)
        codes = unpack(layer.qweight[:, index(n)], arm.bits).T.double().unflatten(1, (-1, GROUP))
        zero = unpack(layer.qzeros.T.contiguous(), arm.bits)[index(n)]
        truth = ((codes - zero.double().unsqueeze(-1)) * layer.scales[:, index(n)].T.double().unsqueeze(-1)).flatten(1)
        size = nbytes(layer.qweight, layer.qzeros, layer.scales)
        layer.post_init()
    return Layer(layer.train(train), size, truth)


def require(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise Absent(f"{name} is not installed here")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what a library prints, at the level of the file descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, sink = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in enumerate(kept, 1):
            os.dup2(old, number)
            os.close(old)
        os.close(sink)


def arms() -> list[Arm]:
    forward = ("forward",)
    out = [
        Arm("dense", make_dense, 32),
        Arm("dense trained", make_dense, 32, ops=("step",)),
        Arm("dense onednn", make_dense, 32, ops=forward),
        Arm("dense bf16", make_dense, 16, x=torch.bfloat16),
    ]
    out += [Arm("ours affine", make_ours, bits, "bfloat16") for bits in (4, 3, 2)]
    out += [Arm("ours table", make_ours, bits, dtype, parts) for bits in (4, 3, 2) for parts in (1, 4) for dtype in ("float16", "float32")]
    out += [Arm("torch int4pack", make_int4pack, 4, "bfloat16", x=torch.bfloat16, ops=forward)]
    out += [Arm("bitsandbytes nf4", make_nf4, 4, "float32", x=torch.bfloat16), Arm("bitsandbytes nf4 fp32", make_nf4, 4, "float32")]
    out += [Arm("gptqmodel auto", make_gptqmodel, 4, "bfloat16", x=torch.bfloat16)]
    # the torch kernel writes a dense panel as large as the cache, so two copies are enough; every copy costs guards and compilations
    out += [Arm("gptqmodel torch", make_gptqmodel, bits, "bfloat16", x=torch.bfloat16, copies=2) for bits in (4, 3, 2)]
    return out


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


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


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
    return [lambda layer=layer: run(case, layer, x, dy) for layer in layers], time.perf_counter() - start, error, values


def take_turns(calls: dict[Arm, list[Callable[[], Any]]], guess: dict[Arm, float], budget: float, least: int) -> dict[Arm, list[float]]:
    """Seconds of a call, one number for a turn: every arm has one in each round, in random order."""
    burst = {arm: max(1, min(64, int(BURST / guess[arm]))) for arm in calls}
    took: dict[Arm, list[float]] = {arm: [] for arm in calls}
    at = dict.fromkeys(calls, 0)
    rng, order, stop = random.Random(0), list(calls), time.perf_counter() + budget
    gc.collect()
    gc.disable()
    while len(took[order[0]]) < least or (time.perf_counter() < stop and len(took[order[0]]) < 60):
        rng.shuffle(order)
        for arm in order:
            mine = calls[arm]
            if burst[arm] > 1:  # the caches and the thread pool forget the arm before
                mine[at[arm] % len(mine)]()
                at[arm] += 1
            start = time.perf_counter()
            for i in range(at[arm], at[arm] + burst[arm]):
                mine[i % len(mine)]()
            took[arm].append((time.perf_counter() - start) / burst[arm])
            at[arm] += burst[arm]
    gc.enable()
    return took


def ceilings(tiny: bool) -> tuple[float, dict[torch.dtype, float]]:
    """(bytes a second of the best of three ways to read memory, operations a second of a large matmul by the better library), best of some tries."""
    count, side = (1 << 20, 256) if tiny else (1 << 27, 2048)
    data, other = torch.ones(count), torch.ones(1 << 10)
    reads = (lambda: data.sum(), lambda: torch.dot(data, data), lambda: data.view(-1, 1 << 10) @ other)
    bandwidth = max(nbytes(data) / best(read) for read in reads)
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


def measure(args: argparse.Namespace) -> None:
    """The child: rows as JSON lines, appended as they come."""
    torch.set_num_threads(args.threads[0])
    torch.manual_seed(0)
    n, k = args.shape
    bandwidth, peaks = ceilings(args.check)
    about = {"read_gbs": f"{bandwidth / 1e9:.1f}", "engine": engine(), "n": n, "k": k, "threads": args.threads[0]}
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
            rows = [row_of(case, arm, layers[arm][0], took[arm], errs[arm], bandwidth, peaks[arm.x]) | about for arm in guess]
            with args.rows.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in compare(rows))
            for row in rows:
                say(" ".join(f"{name}={row[name]}" for name in FIELDS[:25] if row.get(name) not in (None, "")))
        layers.clear()
        gc.collect()


def row_of(case: Case, arm: Arm, layer: Layer, took: list[float], errs: list[float | None], bandwidth: float, peak: float) -> dict[str, Any]:
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


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def select(names: list[str] | None) -> list[Arm]:
    return [a for a in arms() if not names or a.name == "dense" or any(name in a.key for name in names)]


# memory of a step, in a process of its own


def status_kb(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def memory(args: argparse.Namespace) -> None:
    """The other child: prints {"extra_mb": growth of resident memory in one step beyond y, grad x and the gradients of the values}."""
    torch.set_num_threads(args.threads[0])
    arm = next(a for a in arms() if a.key == args.memory)
    case = Case("step", *args.shape, STEP)
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
    _nf4.cache_clear()
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


def environment(threads: int) -> dict[str, str]:
    count = str(threads)
    return os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "NUMBA_NUM_THREADS": count, "PYTHONUNBUFFERED": "1"}


def child(args: argparse.Namespace, shape: tuple[int, int], threads: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        lengths = ["--budget", str(args.budget), "--rounds", str(args.rounds)]
        command = [sys.executable, __file__, "--rows", str(path), *common(args, shape, threads), *lengths]
        done = subprocess.run(command, env=environment(threads), check=False)
        if done.returncode:
            say(f"{shape} at {threads} threads ended with status {done.returncode}; rows up to there are kept")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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


def about() -> dict[str, str]:
    """The machine, versions of every package that had a part, and the day."""
    found = []
    for name in ("torch", "numba", "bitsandbytes", "gptqmodel"):
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


def thread_counts(asked: list[int]) -> list[int]:
    """Those that the CPUs of this process can run at once."""
    cpus = len(os.sched_getaffinity(0))
    for count in asked:
        if count > cpus:
            say(f"{count} threads left out: this process may use {cpus} CPU{'s' if cpus > 1 else ''}")
    return [count for count in asked if count <= cpus]


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
    if write:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".part") if write else Path(os.devnull)
    common_columns, rows = about(), 0
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for count in threads:
            for shape in shapes:
                for row in child(args, shape, count):
                    key = row["key"]
                    wanted = row["op"] == "step" and count == max(threads) and not args.no_memory
                    if wanted and (not args.check or key in ("dense 32", "ours affine 4 bfloat16")):
                        row["extra_mb"] = extra_memory(args, key, shape, count)
                        say(f"{key} {shape}: extra_mb {row['extra_mb']}")
                    writer.writerow(row | common_columns)
                    rows += 1
                file.flush()
    if not rows:
        say("nothing was measured")
        return 1
    if write:
        os.replace(part, args.out)
    say(f"{rows} rows{f' in {args.out}' if write else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
