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
from compressor.linear import PackedLinear, find_blocks

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
    config: Any = model.config
    out = []
    for index, block in enumerate(blocks):
        names = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear | PackedLinear)}
        start = f"{prefix}.{index}."
        out += [_heads(names, start, index, block, config, unit), _ffn(names, start, index)]
    return out


def _arrangement(names: dict[str, Any], known: tuple[tuple[str, ...], ...], start: str) -> tuple[str, ...]:
    found = next((row for row in known if all(name in names for name in row)), None)
    if found is None:
        raise ModelError(f"{start}* cannot be pruned by structure: it has the linears {', '.join(names)}, not {' or '.join(map(', '.join, known))}")
    return found


def _heads(names: dict[str, Any], start: str, index: int, block: nn.Module, config: Any, unit: str) -> Family:
    query, key, value, out = _arrangement(names, HEADS, start)
    attention = block.get_submodule(query.rpartition(".")[0])
    size = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None) or config.hidden_size // config.num_attention_heads
    queries, keys = names[query].out_features // size, names[key].out_features // size
    if queries % keys or names[query].out_features % size or names[out].in_features != names[query].out_features:
        raise ModelError(f"{start}*: {queries} query heads do not share {keys} key heads evenly")
    share = queries // keys
    if unit == "query" and share > 1:
        return Family(index, "heads", queries, (Part(start + query, 0, size), Part(start + out, 1, size)), within=share)
    wide = size * share
    parts = (Part(start + query, 0, wide), Part(start + key, 0, size), Part(start + value, 0, size), Part(start + out, 1, wide))
    return Family(index, "heads", keys, parts)


def _ffn(names: dict[str, Any], start: str, index: int) -> Family:
    *into, down = _arrangement(names, FFN, start)
    width = names[down].in_features
    if any(names[name].out_features != width for name in into):
        raise ModelError(f"{start}*: {', '.join(into)} do not all feed {down}")
    return Family(index, "ffn", width, (*(Part(start + name, 0, 1) for name in into), Part(start + down, 1, 1)))
