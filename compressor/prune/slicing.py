"""Making masks real: linears without the rows and columns of removed units, blocks without the removed ones, and the configuration to match.

The sliced model computes what the masked one did (a masked input contributes nothing), up to the order of sums. Low-rank paths are folded in, and
packed linears come out dense: cutting columns leaves no whole groups, so whoever wants codes packs anew. One linear at a time is copied.
Widths that differ between blocks cannot be said in a stock configuration, nor fewer heads of the same size where their size follows from their number
(BERT): those are listed under WIDTHS, which only our loader reads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.kernels import layout
from compressor.linear import PackedLinear, find_blocks, swap
from compressor.packing import panels
from compressor.prune.lowrank import LowRank, weight_rows
from compressor.prune.units import Family, arrangement, families, head_size, shape

WIDTHS = "compressor_widths"  # key of config.json: {"queries": [heads a block], "keys": [...], "ffn": [...]}


@torch.no_grad()
def plain(layer: nn.Module, dtype: torch.dtype, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """A dense linear of these rows and columns (int64 indices, None for all) of a linear, packed linear or low-rank path."""
    base = layer.base if isinstance(layer, LowRank) else layer
    if not isinstance(base, nn.Linear | PackedLinear):
        raise ModelError(f"{type(layer).__name__} is no linear layer that could be cut")
    n, k = base.out_features, base.in_features
    bias: Tensor | None = base.bias
    weight = torch.empty(n, k, device=base.words.device if isinstance(base, PackedLinear) else base.weight.device)
    for tile in panels(n, k, multiple=layout.ROWS):
        weight[tile] = layer.merged(tile) if isinstance(layer, LowRank) else weight_rows(base, tile)
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    out = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta").train(layer.training)
    out.weight = nn.Parameter(weight.to(dtype, copy=True).contiguous(), requires_grad=False)
    if bias is not None:
        out.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return out


def dissolve(model: nn.Module, dtype: torch.dtype) -> None:
    """Every low-rank path becomes a dense linear."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LowRank)]:
        swap(model, name, plain(layer, dtype))


def cut(model: nn.Module, units: Sequence[Family], masks: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Replace the linears of the families by dense ones without the units whose mask is 0, and tell the attention modules and the configuration."""
    taken: dict[str, dict[int, Tensor]] = {}  # linear -> axis -> indices that stay
    for family in units:
        stays = masks[family.key].bool()
        if not bool(stays.any()):
            raise ModelError(f"block {family.block} would keep no {family.kind}: prune less")
        for part in family.parts:
            taken.setdefault(part.name, {})[part.axis] = stays.repeat_interleave(part.width).nonzero().flatten()
    for name, axes in taken.items():
        swap(model, name, plain(model.get_submodule(name), dtype, axes.get(0), axes.get(1)))
    dissolve(model, dtype)
    describe(model)


def resize(model: nn.Module) -> None:
    """Give a model that was built from a configuration with WIDTHS the shapes it has; its weights are to be filled in. Others stay as they are.

    ModelError if the widths are none of this model.
    """
    config: Any = model.config
    widths = getattr(config, WIDTHS, None)
    if widths is None:
        return
    units = families(model)
    kept = {"heads": "keys", "ffn": "ffn"}
    try:
        masks = {f.key: torch.arange(f.count) < _width(widths[kept[f.kind]][f.block], f.count) for f in units}
    except (KeyError, IndexError, TypeError, ValueError):
        raise ModelError(f"{WIDTHS} in the configuration does not fit the {len(find_blocks(model)[1])} blocks of the model") from None
    cut(model, units, masks, torch.float32)


def _width(value: Any, most: int) -> int:
    if not isinstance(value, int) or not 0 < value <= most:
        raise ValueError(value)
    return value


def describe(model: nn.Module) -> None:
    """Set what attention modules and the configuration say of heads and widths from the linears as they are."""
    config: Any = model.config
    _prefix, blocks = find_blocks(model)
    rows = [_widths(block, config) for block in blocks]
    config.num_hidden_layers = len(rows)
    widths = {key: [row[key] for row in rows] for key in ("queries", "keys", "ffn")}
    fewer, sized = rows[0]["queries"] != config.num_attention_heads, rows[0]["head_dim"]
    special = any(len(set(row)) > 1 for row in widths.values()) or (fewer and not sized)  # BERT: a head's size follows from how many there are
    if special or getattr(config, WIDTHS, None) is not None:
        setattr(config, WIDTHS, widths)
    if special:
        return
    if fewer:
        config.head_dim = sized
    config.num_attention_heads, config.intermediate_size = rows[0]["queries"], rows[0]["ffn"]
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = rows[0]["keys"]


def _widths(block: nn.Module, config: Any) -> dict[str, int]:
    """Heads and FFN channels of a block as its linears have them; its attention module is told."""
    heads, ffn = arrangement(block)
    attention = block.get_submodule(heads[0].rpartition(".")[0])
    size = head_size(attention, config)
    queries, keys = (shape(block.get_submodule(name))[0] // size for name in heads[:2])
    for name, value in (("num_key_value_groups", queries // keys), ("num_heads", queries), ("num_key_value_heads", keys),
                        ("num_attention_heads", queries), ("all_head_size", queries * size)):  # fmt: skip
        if hasattr(attention, name):
            setattr(attention, name, value)
    return {"queries": queries, "keys": keys, "ffn": shape(block.get_submodule(ffn[-1]))[1], "head_dim": size * hasattr(attention, "head_dim")}


def drop_blocks(model: nn.Module, keep: Sequence[int]) -> None:
    """Remove all other blocks, number the rest anew, and shorten what the configuration says of each layer."""
    prefix, blocks = find_blocks(model)
    config: Any = model.config
    count = len(blocks)
    swap(model, prefix, nn.ModuleList(blocks[i] for i in keep))
    for index, block in enumerate(model.get_submodule(prefix).children()):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010  (no attribute that nn.Module declares)
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count and not key.endswith("_token_id"):
            setattr(config, key, [value[i] for i in keep])
    if getattr(config, WIDTHS, None) is not None:
        setattr(config, WIDTHS, {key: [row[i] for i in keep] for key, row in getattr(config, WIDTHS).items()})
    config.num_hidden_layers = len(keep)
