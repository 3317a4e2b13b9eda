"""What bench/cpu_kernels.py times: our packed layers, dense ones of torch, layers of other libraries.

An arm makes layers of a size, one at a time, with random weights. A layer comes with its true weight in the rows that are checked: in float64, from
the numbers that it was made of, by none of the kernels that are timed.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peers import Absent, gptqmodel, quiet, require, unpack
from torch import Tensor

from compressor.kernels import dispatch, layout, reference

GROUP = 128


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
def nf4_layer(n: int, k: int) -> tuple[Any, Tensor]:
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
    layer, truth = nf4_layer(n, k)
    layer = copy.deepcopy(layer).train(train)
    layer.compute_dtype, layer.compute_type_is_set = arm.x, True
    layer.weight.quant_state.dtype = arm.x
    return Layer(layer, nbytes(layer.weight.data, layer.weight.quant_state.absmax), truth)


def make_gptqmodel(arm: Arm, n: int, k: int, train: bool) -> Layer:
    """GPTQModel's layer for a CPU: the torch kernel (dequantise, compiled, then matmul), or the one that it selects by itself."""
    require("gptqmodel")
    torch._dynamo.config.recompile_limit = 256  # its kernel compiles one dequantiser for all layers of a shape, with a guard for each
    lib = gptqmodel()
    with quiet():
        from gptqmodel.quantization import FORMAT, METHOD
        from gptqmodel.utils.importer import select_quant_linear

    about = {"bits": arm.bits, "group_size": GROUP, "desc_act": False, "sym": False, "pack_dtype": torch.int32}
    backend = lib.BACKEND.AUTO if arm.name == "gptqmodel auto" else lib.BACKEND.GPTQ_TORCH
    with quiet():
        kind = select_quant_linear(device="cpu", backend=backend, format=FORMAT.GPTQ_V2, quant_method=METHOD.GPTQ, **about)
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


def select(names: list[str] | None) -> list[Arm]:
    return [a for a in arms() if not names or a.name == "dense" or any(name in a.key for name in names)]
