"""Who reads and who writes the residual stream of a decoder, and what carries the values of attention: what a rotation is merged into.

Roles go by the names that LLaMA-like models share. What could make a merge wrong is found by structure: every parameter must have a known role,
shapes must agree, and a norm is tried out: it must give gain * x / rms(x), with a gain that is its weight or, as in Gemma, one more. Works on models
without weights (meta device). What that cannot see, such as a product of values behind attention, the run sees in the logits (pipelines/rotating.py).
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linear

FIRST = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj")  # read what the first norm of a block gives
SECOND = ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
INSIDE = ("self_attn.q_norm.weight", "self_attn.k_norm.weight", "self_attn.sinks")  # touch queries and keys alone
CLOSE = 1e-3  # of what a norm gives for numbers of size 1: its epsilon


@dataclass(frozen=True)
class Heads:
    """The linear that makes values, in rows from `start`, and the one that reads them: `groups` heads of `size`, each read by `times` query heads."""

    values: str
    start: int
    groups: int
    size: int
    times: int


@dataclass(frozen=True)
class Roles:
    """embedding, norm and head: dotted names outside the blocks; offset: what is added to the weight of a norm to give its gain."""

    embedding: str
    norm: str
    head: str
    offset: float


def shape(layer: nn.Module) -> tuple[int, int]:
    """(out features, in features) of a linear, dense or packed."""
    this: Any = layer
    return int(this.out_features), int(this.in_features)


def child(block: nn.Module, name: str) -> nn.Linear | None:
    """The linear of that name, dense or packed; None if the block has none."""
    try:
        found = block.get_submodule(name)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Linear) else None


def heads(block: nn.Module) -> Heads | str:
    """The value heads of a block, or why they are not known."""
    out, apart, joined = (child(block, name) for name in ("self_attn.o_proj", "self_attn.v_proj", "self_attn.qkv_proj"))
    values = apart or joined
    if out is None or values is None:
        return "its attention has no v_proj and o_proj"
    size = getattr(block.get_submodule("self_attn"), "head_dim", None)
    width, rows = shape(out)[1], shape(values)[0]
    if not isinstance(size, int) or size < 2 or width % size or rows % size:
        return "the size of its value heads is not known"
    queries = width // size
    groups = rows // size if values is apart else (rows // size - queries) // 2
    if groups < 1 or queries % groups or (values is joined and rows != (queries + 2 * groups) * size):
        return "its query heads do not share value heads evenly"
    return Heads("self_attn.v_proj" if values is apart else "self_attn.qkv_proj", rows - groups * size, groups, size, queries // groups)


def roles(model: nn.Module) -> Roles | str:
    """What the residual stream passes outside the blocks, or why a rotation of it cannot be merged."""
    prefix, blocks = linear.find_blocks(model)
    this: Any = model
    table, head = this.get_input_embeddings(), this.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if not isinstance(table, nn.Embedding) or not isinstance(head, nn.Linear):
        return "its embedding or its head is of another kind"
    width, known = table.weight.shape[1], {f"{names[id(table)]}.weight", f"{names[id(head)]}.weight", f"{names[id(head)]}.bias"}
    others = [name for name, p in model.named_parameters() if not name.startswith(f"{prefix}.") and name not in known]
    if len(others) != 1 or not others[0].endswith(".weight"):
        return f"beside its blocks it has {', '.join(others[:3]) or 'no norm'}, and one norm is what can be merged"
    norm = others[0].removesuffix(".weight")
    offsets = {offset(model.get_submodule(norm), width)}
    for block in blocks:
        if why := strange(block, width):
            return why
        offsets |= {offset(block.get_submodule(name), width) for name in NORMS}
    if len(offsets) > 1 or None in offsets:
        return f"{type(model.get_submodule(norm)).__name__} is no norm by the root mean square alone, times a gain"
    return Roles(names[id(table)], norm, names[id(head)], float(offsets.pop() or 0))


def strange(block: nn.Module, width: int) -> str:
    """Why the residual stream of `width` cannot be rotated in a block; empty if it can."""
    given = dict(block.named_parameters())
    linears = [name for name in (*FIRST, *SECOND, *WRITERS) if child(block, name) is not None]
    known = {f"{name}.{leaf}" for name in linears for leaf in ("weight", "bias")} | {f"{name}.weight" for name in NORMS} | set(INSIDE)
    if lacking := [name for name in NORMS if f"{name}.weight" not in given]:
        return f"its blocks have no {lacking[0]}"
    if other := sorted(given.keys() - known):
        return f"its blocks have {other[0]}, whose place in the residual stream is not known"
    if lacking := [name for name in WRITERS if name not in linears]:
        return f"its blocks have no {lacking[0]}"
    for name in linears:
        layer = child(block, name)
        if layer is not None and shape(layer)[0 if name in WRITERS else 1] != width:
            return f"{name} does not have the width of the residual stream"
    return ""


def offset(norm: nn.Module, width: int) -> float | None:
    """What a norm adds to its weight to give its gain, found by trying out a copy on random numbers; None for what is no such norm."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.rand(width, generator=generator) + 0.5, torch.randn(4, width, generator=generator)
    tried: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    given = dict(tried.named_parameters())
    if list(given) != ["weight"] or given["weight"].shape != weight.shape:
        return None
    with torch.no_grad():
        given["weight"].copy_(weight)
        plain, found = x * x.square().mean(-1, keepdim=True).rsqrt(), tried(x)
    return next((add for add in (0.0, 1.0) if torch.allclose(found, plain * (weight + add), rtol=CLOSE, atol=CLOSE)), None)


def gain(norm: nn.Module, add: float) -> Tensor:
    """What a norm multiplies by, float64 [width]."""
    return norm.get_parameter("weight").detach().double() + add
