"""What becomes of a trained adapter: folded into dense weights, absorbed by the packed ones if that costs little, or kept beside them.

Folding is peft's own `merge` on W', a dense copy of one layer, so every kind of KINDS folds, also those whose change is no sum. Absorbing packs W'
and so loses some of it (compressor.pipelines.absorb). The loss is measured on the model, not on layers: perplexity of the domain with the adapter
beside the base and after absorbing it, on the same text. Above the limit the base and its adapter come back as they were. A bias that the adapter
changes (IA3) moves with it, rounded as the folder stores it. Price: folding decodes a layer, absorbing is an evaluation and a packing. Limit:
adapters of packed linears only.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor import linear
from compressor.errors import ModelError
from compressor.integrations import peft
from compressor.pipelines.absorb import absorb, restore, snapshot
from compressor.pipelines.load import Loaded
from compressor.recipe import Quant

if TYPE_CHECKING:
    from compressor.pipelines.run import Run

PROBE, TOKENS = 4, 128  # windows, and tokens of each, on which logits are compared


def stored_bytes(folder: Path) -> int:
    """Of the adapter beside a model, 0 if there is none."""
    return sum(path.stat().st_size for path in (folder / peft.FOLDER).glob("*"))


def kind(loaded: Loaded) -> str:
    """The kind of the attached adapter, as `--tune` calls it."""
    found = loaded.adapter.peft_config[peft.NAME]
    return next((name for name in ("dora", "rslora") if getattr(found, f"use_{name}", False)), str(found.peft_type.value).lower())


def take_off(loaded: Loaded) -> dict[str, Any]:
    """Take the adapter off the model, in place; peft's wrappers, with the packed linears inside them, by the linears' names.

    ModelError, with the adapter where it was, if it adapts what is no packed linear.
    """
    made, wrappers = loaded.adapter, peft.strip(loaded.model)
    strange = [name for name, wrapper in wrappers.items() if not isinstance(getattr(wrapper, "base_layer", None), linear.PackedLinear)]
    if strange:
        peft.put_back(loaded.model, wrappers, made)
        raise ModelError(f"the adapter of {loaded.name} changes {strange[0]}, which is no packed linear: keep it beside the base, with peft")
    loaded.adapter = None
    return wrappers


@torch.no_grad()
def fold(wrapper: Any) -> nn.Linear:
    """A dense float32 linear that computes what peft's wrapper of a packed one does; the wrapper is as before afterwards."""
    held = wrapper.base_layer
    plain = nn.Linear(held.in_features, held.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(held.packed().dequantize(), requires_grad=False)
    plain.register_parameter("bias", None if held.bias is None else nn.Parameter(held.bias.float().clone(), requires_grad=False))
    wrapper.base_layer = plain
    try:
        wrapper.merge()
    finally:
        wrapper.base_layer = held
        wrapper.merged_adapters.clear()
    return plain


@torch.no_grad()
def _change(wrapper: Any) -> Tensor:
    """W' - Q, float32 [n, k]."""
    return fold(wrapper).weight.sub_(wrapper.base_layer.packed().dequantize()).detach()


def _take_biases(loaded: Loaded, wrappers: dict[str, Any]) -> None:
    """Give each packed linear the bias that its adapter made of its own, as the folder will store it."""
    for name, wrapper in wrappers.items():
        layer = wrapper.base_layer
        if layer.bias is not None:
            bias = fold(wrapper).bias.to(loaded.dtype).to(layer.bias.dtype)
            linear.swap(loaded.model, name, linear.PackedLinear(layer.packed(), bias).train(layer.training))


def take_up(
    loaded: Loaded, quant: Quant, ids: Tensor | None, windows: Tensor, perplexity: Callable[[], float], limit: float, keep_zeros: bool = False,
    on_layer: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Absorb the adapter of a loaded model in place, or keep it if perplexity would rise by more than the share `limit`; facts for the report.

    ids: calibration windows for packers that need them; windows int64 [count, t]: text whose logits are compared.
    """
    made, before, logits = loaded.adapter, perplexity(), _logits(loaded, windows)
    wrappers = take_off(loaded)
    kept = snapshot(loaded.model)
    _take_biases(loaded, wrappers)
    changes = {name: partial(_change, wrapper) for name, wrapper in wrappers.items()}
    found = absorb(loaded.model, changes, quant, ids, keep_zeros=keep_zeros, on_layer=on_layer)
    after, change = perplexity(), float((_logits(loaded, windows) - logits).abs().max())
    rise = after / before - 1
    if not rise <= limit:  # also what is no number
        restore(loaded.model, kept)
        peft.put_back(loaded.model, wrappers, made)
        loaded.adapter = made
    return {
        "absorbed": loaded.adapter is None, "before": before, "after": after, "rise": rise, "limit": limit, "max_logit_change": change,
        "ways": found["ways"], "seconds": found["seconds"],
    }  # fmt: skip


@torch.no_grad()
def _logits(loaded: Loaded, windows: Tensor) -> Tensor:
    model: Any = loaded.model
    return torch.cat([model(input_ids=row[None, :TOKENS].to(loaded.device), use_cache=False).logits.float().cpu() for row in windows[:PROBE]])


def sentence(facts: dict[str, Any]) -> str:
    """What a user is told."""
    cost = f"perplexity {facts['before']:.4g} -> {facts['after']:.4g} ({facts['rise']:+.1%})"
    cost += f", logits change by {facts['max_logit_change']:.3g} at most"
    if facts["absorbed"]:
        return f"the adapter was absorbed: {cost}"
    return f"the adapter stays beside the base: absorbing it would cost more than {facts['limit']:.1%}: {cost}"


def absorbed(run: "Run", loaded: Loaded, ids: Tensor | None, windows: Tensor, perplexity: Callable[[], float]) -> None:
    """The stage of a run that absorbs, as `take_up`, with what the user should know of it."""
    with run.stage("absorb"), run.show.task("absorb", len(linear.packed_linears(loaded.model))) as advance:
        facts = take_up(
            loaded, run.absorber(), ids, windows, perplexity, run.recipe.tune.absorb_limit, run.sparse,
            lambda row: advance(1, f"{row['name']} {row['way']}"),
        )  # fmt: skip
    run.report.training["absorb"] = facts
    run.report.notes.append(sentence(facts))
    run.show.say(sentence(facts))
