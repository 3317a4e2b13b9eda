"""Presets: how much time a run may take for quality, in one word. They say how to pack and what to learn from; bits, tuner and texts are the user's.

    fast       GPTQ
    standard   block-wise training on top of it, within three times its time: what `run` does if nothing else is said
    best       the same, with bits and group sizes chosen by layer at the bytes of one width for all, and scales trained end to end; what is tuned
               learns from the dense model, too

What a flag says, or a recipe file other than the defaults, comes before what a preset does. What each takes and brings: docs/methods.md.
"""

from typing import Any

from compressor.errors import RecipeError

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"quant__packer": "gptq"},
    "standard": {"quant__packer": "block"},
    "best": {"quant__packer": "block", "choose__equal": True, "quant__end_to_end": 4, "tune__distill": 0.25},
}
TARGETS = ("choose__target_bits", "choose__target_size", "choose__max_loss", "quant__layers")
UNMIXED = ("none", "kept", "squeezellm")  # packers whose linears are not chosen among


def keys(name: str | None, said: dict[str, Any], tuned: bool, alone: bool) -> dict[str, Any]:
    """What a preset adds to the keys of the recipe that are `said`, written section__key; None: standard, as far as it can be.

    tuned: whether values or adapters are tuned; alone: whether this is the only process. RecipeError for a name that is none of PRESETS.
    """
    if name is not None and name not in PRESETS:
        raise RecipeError(f"preset {name!r} is unknown; choose {', '.join(PRESETS)}")
    asked, packer = dict(PRESETS[name or "standard"]), said.get("quant__packer")
    beside = said.get("tune__start", "zero") != "zero"  # no path starts beside blocks that are trained
    recomputed = (said.get("memory"), said.get("data__activations")) == ("blocks", "recompute")  # nor are the dense model's states recomputed
    if name is None and (not alone or beside or recomputed):
        return {}
    single = said.get("prune__method") == "obert" or said.get("prune__pattern") not in (None, "structured")  # weights that no choice keeps at zero
    if packer in UNMIXED or single or any(key in said for key in TARGETS):
        asked.pop("choose__equal", None)
    if packer in ("none", "kept") or beside:
        asked.pop("quant__end_to_end", None)
    if not tuned:
        asked.pop("tune__distill", None)
    return {key: value for key, value in asked.items() if key not in said}
