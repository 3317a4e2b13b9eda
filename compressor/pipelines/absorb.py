"""Absorbing trained paths: each packed linear takes up what trained beside it, block by block, and stays packed as it was.

The stream of calibration windows is that of packing (pipelines/compress.py): a block sees what its predecessors, paths already absorbed, put out;
inside it what has not had its turn yet computes with its path. Only one block is dense at a time, in the dtype of its inputs. Bits, group, symmetry
and the dtype of the values of each weight stay what they are. Of the ways `move` and `pack` (tune/absorb.py) the one with the least output error
against W' = Q + D on the calibration inputs wins, layer by layer, unless one is named. Price: that of packing, about twice; without `ids`, or with a
packer that needs no statistics, errors are those of weights and nothing runs. Limits: at 3 bits three tenths of what a LoRA path had gained in
perplexity is lost, at 4 bits an eighth (docs/adapters.md), so the caller judges the model and calls `restore` where that is too much; a model with
pruned weights takes `values` alone, for the others would bring them back.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linear
from compressor.errors import ModelError, NumericError, RecipeError
from compressor.linear import PackedLinear
from compressor.packed import PackedWeight
from compressor.packing import naming, relative_error
from compressor.pipelines.calibrate import Calibration, collect_step, shared_inputs, steps
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Quant
from compressor.stats import LayerStats
from compressor.tune.absorb import move, refit_values

WAYS = ("values", "move", "pack")
Delta = Callable[[], Tensor]  # what a path adds to the weight, [n, k], scaled; called twice


def snapshot(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed linears of the model by name, for `restore`; nothing is copied, for absorbing puts new ones in their place."""
    return linear.packed_linears(model)


def restore(model: nn.Module, kept: Mapping[str, PackedLinear]) -> None:
    """Put the packed linears of a snapshot back, also after absorbing broke off."""
    for name, layer in kept.items():
        linear.swap(model, name, layer)


@torch.no_grad()
def absorb(
    model: nn.Module,
    deltas: Mapping[str, Delta],
    quant: Quant,
    ids: Tensor | None,
    way: str = "best",
    keep_zeros: bool = False,
    on_layer: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Put what each delta adds into the packed linear of that name, in place; the paths themselves must be off or gone.

    quant: the packer for the way `pack`, with its options; ids: calibration windows int64 [count, seqlen]. `way`: one of WAYS, or best, which
    tries move and pack. `keep_zeros`: weights of code zero stay zero. Returns {"ways": layers by way, "seconds", "layers": rows}; a row has the way
    and its error against W' (relative_error), all `errors` tried and, as `dropped`, the error of leaving the path out. Raises RecipeError for a way
    that cannot be, ModelError for a name that is no packed linear of the blocks or a delta that does not fit, NumericError for one not finite.
    """
    ways, start = _ways(way, quant, keep_zeros), time.perf_counter()
    name, blocks = linear.find_blocks(model)
    assert isinstance(blocks, nn.ModuleList)
    packed = linear.packed_linears(blocks)
    if strange := [key for key in deltas if key.removeprefix(f"{name}.") not in packed]:
        raise ModelError(f"{strange[0]} is no packed linear of the blocks: nothing there can take up a path")
    calibration = Calibration(model, blocks, ids) if PACKERS[quant.packer].needs and ids is not None else None
    rows: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        prefix = f"{name}.{index}."
        inside = {key.removeprefix(prefix): delta for key, delta in deltas.items() if key.startswith(prefix)}
        for row in _absorb_block(block, index, inside, quant, ways, calibration, prefix):
            rows.append(row)
            if on_layer is not None:
                on_layer(row)
        if calibration is not None and index + 1 < len(blocks):
            calibration.run(block, index, keep=True)
    return {"ways": dict(Counter(row["way"] for row in rows)), "seconds": round(time.perf_counter() - start, 3), "layers": rows}


def _ways(way: str, quant: Quant, keep_zeros: bool) -> tuple[str, ...]:
    if way not in ("best", *WAYS):
        raise RecipeError(f"{way!r} is no way to absorb a path: choose best, {', '.join(WAYS)}")
    fitting = ("values",) if keep_zeros else WAYS[:2] if PACKERS[quant.packer].fisher else WAYS
    if way not in ("best", *fitting):
        why = "would bring pruned weights back" if keep_zeros else f"of {quant.packer} needs gradients of dense weights, which are gone"
        raise RecipeError(f"absorbing by {way} {why}: choose {' or '.join(fitting)}")
    return (way,) if way != "best" else fitting[1:] or fitting  # moving begins with the values and is never worse


def _absorb_block(
    block: nn.Module, index: int, deltas: dict[str, Delta], quant: Quant, ways: tuple[str, ...], calibration: Calibration | None, prefix: str
) -> list[dict[str, Any]]:
    layers = {leaf: layer for leaf, layer in linear.packed_linears(block).items() if leaf in deltas}
    todo = [[[leaf]] for leaf in layers]
    if calibration is not None and layers:
        for leaf, layer in layers.items():
            linear.swap(block, leaf, _dense(layer, _merged(layer, deltas[leaf], prefix + leaf), calibration.hidden[0].dtype))
        todo = steps(block, shared_inputs(block, list(layers), lambda: calibration.run(block, index, keep=False, batches=1)))
    rows = []
    for step in todo:
        seen = [None] if calibration is None else collect_step(block, index, step, PACKERS[quant.packer].needs, calibration, prefix)
        for leaf, stats in ((leaf, stats) for group, stats in zip(step, seen, strict=True) for leaf in group):
            layer, start = layers[leaf], time.perf_counter()
            merged = _merged(layer, deltas[leaf], prefix + leaf)
            with naming(prefix + leaf):
                weight, row = _best(layer.packed(), merged, stats, quant, ways)
            linear.swap(block, leaf, PackedLinear(weight, layer.bias).train(layer.training))
            rows.append({"name": prefix + leaf} | row | {"seconds": round(time.perf_counter() - start, 4)})
    return rows


def _best(old: PackedWeight, merged: Tensor, stats: LayerStats | None, quant: Quant, ways: tuple[str, ...]) -> tuple[PackedWeight, dict[str, Any]]:
    """The weight nearest to merged [n, k] that the ways find, and its report row; where a way cannot be, the values alone move."""
    hessian = None if stats is None or stats.hessian is None else stats.hessian.to(merged.device, torch.float32)
    packer, found = PACKERS[quant.packer], {}
    for way in ways:
        if way == "move":
            found[way] = move(old, merged, hessian)
        elif way == "pack" and packer.table == (old.learned.dim() == 3) and not old.float_zeros:
            same = replace(quant, bits=old.bits, symmetric=old.zero is None)
            found[way] = packer(merged, stats, same, old.group, old.learned.dtype)[0]
        else:
            found["values"] = found.get("values") or refit_values(old, merged, hessian)
    errors = {way: relative_error(merged, weight, stats) for way, weight in found.items()}
    way = min(errors, key=lambda w: errors[w])
    return found[way], {"way": way, "error": errors[way], "dropped": relative_error(merged, old, stats), "errors": errors}


def _merged(layer: PackedLinear, delta: Delta, name: str) -> Tensor:
    """W' float32 [n, k]."""
    change, shape = delta().to(layer.words.device, torch.float32), (layer.out_features, layer.in_features)
    if change.shape != shape:
        raise ModelError(f"a path of {tuple(change.shape)} is none beside {name} of {shape}")
    if not bool(torch.isfinite(change).all()):
        raise NumericError(f"the path beside {name} is not finite; train it again with a smaller learning rate")
    return layer.packed().dequantize() + change


def _dense(layer: PackedLinear, weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A plain linear of this weight with the layer's bias, to compute with until the layer's turn comes."""
    out = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    out.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    out.register_parameter("bias", layer.bias)
    return out
