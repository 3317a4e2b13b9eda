"""What becomes of a trained adapter: absorbed by the packed weights if that costs little, or kept beside them.

Absorbing packs W' = Q + D, with D what the adapter adds, and so loses some of it (compressor.pipelines.absorb). The loss is measured on the model,
not on layers: perplexity of the domain with the adapter beside the base and after absorbing it, on the same text. Above the limit the base and its
adapter come back as they were. Price: an evaluation and a packing. Limit: only adapters whose change of a weight is a sum.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compressor import linear
from compressor.integrations import peft
from compressor.pipelines.absorb import absorb, restore, snapshot
from compressor.pipelines.load import Loaded
from compressor.recipe import Quant

PROBE = 4  # windows on which logits are compared


def take_up(
    loaded: Loaded, quant: Quant, ids: Tensor | None, windows: Tensor, perplexity: Callable[[], float], limit: float, keep_zeros: bool = False,
    on_layer: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Absorb the adapter of a loaded model in place, or keep it if perplexity would rise by more than the share `limit`; facts for the report.

    ids: calibration windows for packers that need them; windows int64 [count, t]: text whose logits are compared.
    """
    made, changes = loaded.adapter, peft.deltas(loaded.adapter)
    before, logits = perplexity(), _logits(loaded, windows)
    wrappers, kept = peft.strip(loaded.model), snapshot(loaded.model)
    loaded.adapter = None
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
def fold(loaded: Loaded) -> dict[str, Tensor]:
    """Put dense linears of W + D in place of the packed ones that have an adapter; their weights [n, k] by name.

    RecipeError for an adapter that adds nothing to weights.
    """
    made = loaded.adapter
    changes = peft.deltas(made)
    made.unload()
    loaded.adapter = None
    for name, change in changes.items():
        layer = loaded.model.get_submodule(name)
        assert isinstance(layer, linear.PackedLinear)
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(layer.packed().dequantize() + change().float(), requires_grad=False)
        plain.register_parameter("bias", layer.bias)
        linear.swap(loaded.model, name, plain)
    return {name: loaded.model.get_parameter(f"{name}.weight").detach() for name in changes}


@torch.no_grad()
def _logits(loaded: Loaded, windows: Tensor) -> Tensor:
    model: Any = loaded.model
    logits: Tensor = model(input_ids=windows[:PROBE].to(loaded.device), use_cache=False).logits
    return logits.float().cpu()


def sentence(facts: dict[str, Any]) -> str:
    """What a user is told."""
    cost = f"perplexity {facts['before']:.4g} -> {facts['after']:.4g} ({facts['rise']:+.1%})"
    cost += f", logits change by {facts['max_logit_change']:.3g} at most"
    if facts["absorbed"]:
        return f"the adapter was absorbed: {cost}"
    return f"the adapter stays beside the base: absorbing it would cost more than {facts['limit']:.1%}: {cost}"
