"""What of a decoder or encoder block can be removed as a whole: attention heads, or the groups that share keys and values, and FFN channels.

A *family* lists, for one block, the units that are kept or removed alike and the rows and columns that each owns in the linears around it. The
inputs of the last linear of a family (its gate) are the units' only way out, so multiplying them by a mask is the same as cutting the units off:
what feeds a masked input is never seen, whatever the activation function. The residual width does not change.

    heads    rows of query, key, value; columns of the output projection. With grouped keys and values the unit is either a KV group, one key and
             value head with all its query heads (LLM-Pruner, Ma et al., arXiv 2305.11627, roots its groups there), or a query head alone, where
             every group must lose equally many
    ffn      rows of gate and up (or of the one linear in); columns of down

Units are consecutive: unit u of a part owns its rows or columns u * width to (u + 1) * width. Limits: layers that fuse these linears (qkv_proj,
gate_up_proj, Conv1D, experts) and architectures of other names are refused with the reason.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from compressor.errors import ModelError
from compressor.linear import expert_of, find_blocks

HEADS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
         ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"))  # fmt: skip
FFN = (("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), ("mlp.fc1", "mlp.fc2"), ("intermediate.dense", "output.dense"))
UNITS = ("group", "query")


@dataclass(frozen=True)
class Part:
    """The share of one linear in a family: `width` consecutive rows (axis 0) or columns (axis 1) a unit."""

    name: str  # dotted name in the model
    axis: int
    width: int


@dataclass(frozen=True)
class Family:
    """The units of one kind in one block; the last part is the gate, the linear whose inputs are the units' outputs."""

    block: int
    kind: str  # heads | ffn
    count: int
    parts: tuple[Part, ...]
    within: int = 0  # query heads: as many of every `within` consecutive units must stay; 0: any may go

    @property
    def key(self) -> str:
        return f"{self.block}.{self.kind}"

    @property
    def gate(self) -> Part:
        return self.parts[-1]


def families(model: nn.Module, unit: str = "group") -> list[Family]:
    """All families of a model with nn.Linear or PackedLinear blocks, block by block; `unit` says what of grouped attention is a unit.

    ModelError, with the reason, for a block whose linears are not of a known arrangement.
    """
    prefix, blocks = find_blocks(model)
    out = []
    for index, block in enumerate(blocks):
        heads, ffn = arrangement(block, f"{prefix}.{index}")
        out += [_heads(block, heads, index, f"{prefix}.{index}.", model.config, unit), _ffn(block, ffn, index, f"{prefix}.{index}.")]
    return out


def arrangement(block: nn.Module, where: str = "the block") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names within the block of (query, key, value, out) and of (into the FFN ..., down); ModelError if they are of no known arrangement."""
    names = {name for name, m in block.named_modules() if hasattr(m, "in_features")}
    found = [next((row for row in known if names.issuperset(row)), None) for known in (HEADS, FFN)]
    heads, ffn = found
    if heads is None or ffn is None:
        known = HEADS if heads is None else FFN
        wanted = " or ".join(", ".join(row) for row in known)
        shown = sorted({name if (expert := expert_of(name)) is None else f"{expert[0]}.*.{expert[2]}" for name in names})
        raise ModelError(f"{where} cannot be pruned by structure: it has the linears {', '.join(shown)}, and not {wanted}")
    return heads, ffn


def shape(layer: nn.Module) -> tuple[int, int]:
    """(n, k) of a linear of whatever kind."""
    return int(getattr(layer, "out_features", 0)), int(getattr(layer, "in_features", 0))


def head_size(attention: nn.Module, config: Any) -> int:
    """Channels of a head."""
    own = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _heads(block: nn.Module, names: tuple[str, ...], index: int, start: str, config: Any, unit: str) -> Family:
    query, key, value, out = names
    size = head_size(block.get_submodule(query.rpartition(".")[0]), config)
    wide, narrow, values = (shape(block.get_submodule(name))[0] for name in (query, key, value))
    queries, keys = wide // size, narrow // size
    if not keys or queries % keys or wide % size or narrow % size:
        raise ModelError(f"{start}*: {queries} query heads do not share {keys} key heads evenly")
    if values != narrow or shape(block.get_submodule(out))[1] != wide:
        raise ModelError(f"{start}*: keys and values, or queries and outputs, are not of one width, and its heads cannot be told apart")
    share = queries // keys
    if unit == "query" and share > 1:
        return Family(index, "heads", queries, (Part(start + query, 0, size), Part(start + out, 1, size)), within=share)
    own = size * share
    parts = (Part(start + query, 0, own), Part(start + key, 0, size), Part(start + value, 0, size), Part(start + out, 1, own))
    return Family(index, "heads", keys, parts)


def _ffn(block: nn.Module, names: tuple[str, ...], index: int, start: str) -> Family:
    *into, down = names
    width = shape(block.get_submodule(down))[1]
    if any(shape(block.get_submodule(name))[0] != width for name in into):
        raise ModelError(f"{start}*: {', '.join(into)} do not all feed {down}")
    return Family(index, "ffn", width, (*(Part(start + name, 0, 1) for name in into), Part(start + down, 1, 1)))
