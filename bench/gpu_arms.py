"""What bench/gpu_kernels.py times, one function an arm: our packed layers, dense ones, SketchTune's scheme, layers of other libraries.

A case is one product of one arm. `build` gives calls over copies of its weight and, for the check, the same results in float64 by reference.py on
the same numbers. Calls return tuples: forward (y,), grad_input (dx,), grad_values (gradient of the values,), step (y, dx, gradient of the values).
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.kernels import dispatch, layout, reference

GROUP = 128
BATCH = 4  # examples that SketchTune's scheme forms one dense gradient each for
Call = Callable[[], tuple[Tensor, ...]]


class Absent(Exception):
    """Why an arm cannot run here."""


@dataclass(frozen=True)
class Case:
    arm: str
    op: str
    kind: str  # affine, table, dense, or what a peer calls its format
    bits: int
    segments: int  # tables a row, 0 for affine
    n: int
    k: int
    m: int

    @property
    def group(self) -> int:
        return -(-self.k // self.segments) if self.segments else min(GROUP, self.k)

    @property
    def packed_bytes(self) -> int:
        return self.n * self.k * self.bits // 8

    def parts(self) -> list[tuple[int, int]]:
        """(bytes that must move, operations) of every product that the case makes."""
        n, k, m, groups = self.n, self.k, self.m, self.n * (self.k // self.group)
        rows, flops, word = 2 * m * (n + k), 2 * m * n * k, 4 if self.op == "step" else 2  # trained values are float32
        if self.arm == "dense":
            return [(rows + 2 * n * k, flops)] * (3 if self.op == "step" else 1)
        entries = n * self.segments << self.bits
        values = entries * word if self.segments else groups * (word + 1)  # zeros are bytes
        product = (self.packed_bytes + values + rows, flops)
        gradient = (self.packed_bytes + rows + (4 * entries if self.segments else 5 * groups), flops)
        if self.op == "step":
            return [product, product, *([] if self.kind == "nf4" else [gradient])]
        return [gradient if self.op == "grad_values" else product]


@dataclass
class Layer:
    """One copy of a packed weight; random words are codes of any width and order."""

    words: Tensor
    values: Tensor
    zero: Tensor | None


@dataclass
class Built:
    calls: list[Call]
    truth: Callable[[], tuple[Tensor, ...]]
    tolerance: tuple[float, ...]  # relative, of each result


def build(case: Case, device: str, copies: int) -> Built:
    """Calls over `copies` weights with random numbers from torch's current seed."""
    x, dy = (torch.randn(case.m, width, device=device).to(torch.bfloat16) for width in (case.k, case.n))
    if case.op == "step":
        x.requires_grad_()
    if case.arm == "dense":
        return _dense(case, x, dy, copies)
    if case.arm in PEERS:
        return _peer(case, x, dy, copies)
    made = [layer(case, device) for _ in range(copies)]
    make = _sketchtune if case.arm == "sketchtune" else _prepared if case.arm == "ours prepared" else _ours
    return Built([make(case, one, x, dy) for one in made], lambda: truth(case, made[0], x, dy), _tolerance(case))


def layer(case: Case, device: str) -> Layer:
    down, across = layout.tiles(case.n, case.k)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (down, across, layout.ROWS, 8 * case.bits), device=device, dtype=torch.int32)
    if case.segments:
        size = 1 << case.bits
        level = (torch.arange(size, device=device) + 0.5 * torch.rand(case.n, case.segments, size, device=device)) / size - 0.5
        values, zero = (0.06 * level).to(torch.bfloat16), None
    else:
        shape = (case.n, case.k // case.group)
        values = (torch.rand(shape, device=device) * 0.01 + 0.01).to(torch.bfloat16)
        zero = torch.randint(0, 1 << case.bits, shape, device=device, dtype=torch.uint8)
    return Layer(words, values.float() if case.op == "step" else values, zero)


def _tolerance(case: Case) -> tuple[float, ...]:
    """As tests have them: 4e-3 for outputs in bf16, 6e-3 where weights are rounded to bf16 first, 1e-4 for sums in fp32."""
    if case.arm == "sketchtune":
        return (1e-2,) * (3 if case.op == "step" else 1)
    rounded = 6e-3 if case.kind == "affine" and (case.m > 64 or case.op != "forward") else 4e-3
    return {"forward": (rounded,), "grad_input": (rounded,), "grad_values": (1e-4,), "step": (rounded, rounded, 1e-4)}[case.op]


def truth(case: Case, one: Layer, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """What the case computes, in float64."""
    wide, wide_dy, values = x.detach().double(), dy.double(), one.values.detach()
    packed = (one.words, values, one.zero, case.bits, case.group)
    steps: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: reference.forward(wide, *packed, case.n),
        "grad_input": lambda: reference.grad_input(wide_dy, *packed, case.k),
        "grad_values": lambda: _grad_values(reference, case, one, wide, wide_dy),
    }
    return tuple(step() for step in steps.values()) if case.op == "step" else (steps[case.op](),)


def _grad_values(ops: Any, case: Case, one: Layer, x: Tensor, dy: Tensor) -> Tensor:
    if case.segments:
        return ops.grad_table(x, dy, one.words, case.bits, case.group)
    return ops.grad_scale(x, dy, one.words, one.zero, case.bits, case.group)


# ours


def _module(case: Case, device: torch.device) -> Any:
    """The host side of the kernels for the case; the reference where there is no GPU."""
    if device.type == "cpu":
        return reference
    return importlib.import_module(f"compressor.kernels.{'tables' if case.segments else 'affine'}")


def _ours(case: Case, one: Layer, x: Tensor, dy: Tensor) -> Call:
    packed = (one.words, one.values, one.zero, case.bits, case.group)
    if case.op == "step":
        path = "reference" if x.device.type == "cpu" else "triton"
        values = one.values.requires_grad_()
        return _step(lambda: dispatch.linear(x, one.words, values, one.zero, None, case.bits, case.group, case.n, path=path), x, values, dy)
    ops = _module(case, x.device)
    if case.op == "forward":
        return lambda: (ops.forward(x, *packed, case.n),)
    if case.op == "grad_input":
        return lambda: (ops.grad_input(dy, *packed, case.k),)
    return lambda: (_grad_values(ops, case, one, x, dy),)


def _prepared(case: Case, one: Layer, x: Tensor, dy: Tensor) -> Call:
    """Tables that do not change, as a server has them: split into bytes once, not at every call."""
    ops = _module(case, x.device)
    if not hasattr(ops, "prepare"):
        return _ours(case, one, x, dy)
    ready = ops.prepare(one.values, x.dtype, case.bits)
    return lambda: (ops.forward(x, one.words, one.values, None, case.bits, case.group, case.n, prepared=ready),)


def _step(product: Callable[[], Tensor], x: Tensor, values: Tensor | None, dy: Tensor) -> Call:
    def call() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = product()
            return (y.detach(), *torch.autograd.grad(y, [x] if values is None else [x, values], dy))

    return call


# dense


@functools.lru_cache(maxsize=8)
def _weights(n: int, k: int, copies: int, device: torch.device) -> list[Tensor]:
    return [torch.randn(n, k, device=device).mul_(0.02).to(torch.bfloat16) for _ in range(copies)]


def _dense(case: Case, x: Tensor, dy: Tensor, copies: int) -> Built:
    """torch on bf16 weights; the gradient of the values is that of the whole weight, in bf16."""
    weights = _weights(case.n, case.k, copies, x.device)

    def make(w: Tensor) -> Call:
        if case.op == "forward":
            return lambda: (torch.nn.functional.linear(x, w),)
        if case.op == "grad_input":
            return lambda: (dy @ w,)
        if case.op == "grad_values":
            return lambda: (dy.T @ x,)
        leaf = w.detach().requires_grad_()
        return _step(lambda: torch.nn.functional.linear(x, leaf), x, leaf, dy)

    return Built([make(w) for w in weights], tuple, ())


# SketchTune's scheme, after its published code (1cb2192), in torch


def _sketchtune(case: Case, one: Layer, x: Tensor, dy: Tensor) -> Call:
    """Codes in slots of 4 bits at every width; a dense 16-bit weight gathered for each pass; a dense gradient for every example of the batch, their
    sum, scattered into the tables. Gathers and scatters go by panels of rows, for torch wants indices of 64 bits; SketchTune's own kernels do not."""
    codes = layout.unpack_tiles(one.words, case.bits, case.n, case.k, "prmt")
    slots = codes[:, 0::2] | (codes[:, 1::2] << 4)
    segment = torch.arange(case.k, device=x.device) // case.group << case.bits
    panels = [slice(i, min(i + 512, case.n)) for i in range(0, case.n, 512)]

    def index(rows: slice) -> Tensor:
        return torch.stack([slots[rows] & 15, slots[rows] >> 4], -1).flatten(1).long() + segment

    def gather() -> Tensor:
        weight = torch.empty(case.n, case.k, dtype=x.dtype, device=x.device)
        table = one.values.detach().to(x.dtype).flatten(1)
        for rows in panels:
            torch.gather(table[rows], 1, index(rows), out=weight[rows])
        return weight

    if case.op == "forward":
        return lambda: (x @ gather().T,)
    batch = BATCH if case.m % BATCH == 0 else 1

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            y = x @ gather().T
            dx = dy @ gather()
            dense = torch.bmm(dy.view(batch, -1, case.n).transpose(1, 2), x.view(batch, -1, case.k)).sum(0)
            out = torch.zeros(case.n, case.segments << case.bits, device=x.device)
            for rows in panels:
                out[rows].scatter_add_(1, index(rows), dense[rows].float())
        return y, dx, out.view(case.n, case.segments, -1)

    return call


# other libraries: each gives a module for a layer, its kind, and a function that gives its dense weight


def _gemlite(case: Case, device: torch.device) -> tuple[Any, Callable[[], Tensor]]:
    from gemlite.core import DType, GemLiteLinearTriton

    codes = torch.randint(0, 1 << case.bits, (case.n, case.k), dtype=torch.uint8, device=device)
    scale = (torch.rand(case.n, case.k // GROUP, 1, device=device) * 0.01 + 0.01).to(torch.bfloat16)
    zero = torch.full_like(scale, 1 << (case.bits - 1))
    module = GemLiteLinearTriton(
        W_nbits=case.bits, group_size=GROUP, in_features=case.k, out_features=case.n, input_dtype=DType.BF16, output_dtype=DType.BF16
    )
    module.pack(codes, scale, zero, None)
    return module, lambda: ((codes.view(case.n, -1, GROUP).double() - zero.double()) * scale.double()).flatten(1)


def _bitsandbytes(case: Case, device: torch.device) -> tuple[Any, Callable[[], Tensor]]:
    import bitsandbytes as bnb

    module = bnb.nn.Linear4bit(case.k, case.n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False)
    module = module.to(torch.bfloat16).to(device)
    return module, lambda: bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).double()


def _marlin(case: Case, device: torch.device) -> tuple[Any, Callable[[], Tensor]]:
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

    options = {"bits": case.bits, "group_size": GROUP, "desc_act": False, "sym": True, "dtype": torch.bfloat16}
    module = MarlinLinear(in_features=case.k, out_features=case.n, **options).to(device)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, module.qweight.shape, dtype=torch.int32, device=device)
    scale = (torch.rand(module.scales.shape, device=device) * 0.01 + 0.01).to(torch.bfloat16)
    module.qweight.data.copy_(words)
    module.scales.data = scale.clone()
    module.post_init()

    def dense() -> Tensor:
        shifts = 4 * torch.arange(8, device=device).view(1, 8, 1)
        codes = ((words.unsqueeze(1) >> shifts) & 15).view(-1, GROUP, case.n).double() - 8
        return (codes * scale.double().unsqueeze(1)).flatten(0, 1).T

    return module, dense


PEERS: dict[str, tuple[str, Any]] = {
    "gemlite": ("gemlite", _gemlite),
    "bitsandbytes": ("bitsandbytes", _bitsandbytes),
    "gptqmodel marlin": ("gptqmodel", _marlin),
}


def missing_peers() -> list[str]:
    return [arm for arm, (package, _) in PEERS.items() if importlib.util.find_spec(package) is None]


def _peer(case: Case, x: Tensor, dy: Tensor, copies: int) -> Built:
    package, make = PEERS[case.arm]
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed here")
    made = [make(case, x.device) for _ in range(copies)]

    def truth() -> tuple[Tensor, ...]:
        weight = made[0][1]()
        y = x.detach().double() @ weight.T
        return (y, dy.double() @ weight) if case.op == "step" else (y,)

    def call(module: Any) -> Call:
        if case.op == "step":
            return _step(lambda: module(x), x, None, dy)

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (module(x),)

        return forward

    return Built([call(module) for module, _ in made], truth, (1e-2, 1e-2))
