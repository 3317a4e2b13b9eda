"""Which families of models llama.cpp runs from what we write, their names of tensors, and the numbers that their configurations become.

Where a number has no place in the file, because llama.cpp takes it for granted, it is compared with what is taken for granted, and another is an
error: a model that would run with other attention scales or windows is never written.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.prune import slicing

Config = Mapping[str, Any]
_LAYER = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_NUMBERS = {  # what a rotary embedding cannot do without
    "linear": ("factor",), "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
_JOINED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Family:
    """arch: llama.cpp's name; turned: whether rows of q and k lie there in pairs; shift: what is added to the weights of norms."""

    arch: str
    turned: bool = False
    shift: float = 0.0
    act: str = "silu"


FAMILIES = {
    "LlamaForCausalLM": Family("llama", turned=True),
    "MistralForCausalLM": Family("llama", turned=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Phi3ForCausalLM": Family("phi3"),
    "Gemma2ForCausalLM": Family("gemma2", shift=1.0, act="gelu_pytorch_tanh"),
    "Gemma3ForCausalLM": Family("gemma3", shift=1.0, act="gelu_pytorch_tanh"),
}


def settings(config: Config) -> dict[str, Any]:
    """A config.json with everything that it leaves to transformers' defaults, which differ between families; ModelError where that knows none."""
    from transformers import CONFIG_MAPPING

    try:
        full = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    except Exception as error:  # configurations of strangers raise what they like
        raise ModelError(f"transformers cannot read the configuration of this model: {type(error).__name__} {error}") from None
    return full | {"architectures": config.get("architectures") or ["no architecture"]}


def family_of(config: Config) -> Family:
    """ModelError for an architecture, or a setting of it, that llama.cpp would not run as the model was trained; config is of `settings`."""
    reason = why_not(config)
    if reason is not None:
        raise ModelError(f"this model cannot become a GGUF file: {reason}")
    return FAMILIES[config["architectures"][0]]


def why_not(config: Config) -> str | None:
    """Why a model of these settings cannot be written, or None."""
    name = config["architectures"][0]
    if name not in FAMILIES:
        return f"compressor writes {', '.join(sorted(FAMILIES))}, and it is {name}"
    if config.get(slicing.WIDTHS):
        return "its blocks differ in width, which llama.cpp's file does not tell"
    act = config.get("hidden_activation") or config.get("hidden_act") or FAMILIES[name].act
    if act != FAMILIES[name].act:
        return f"its activation is {act}, and llama.cpp computes {FAMILIES[name].act}"
    return _rotary(config, name) or (_caps(config, name) if name.startswith("Gemma") else None) or _windows(config, name)


def _rotary(config: Config, name: str) -> str | None:
    rope = rope_of(config)
    kind = rope["rope_type"]
    if kind != "default" and kind not in _NUMBERS:
        return f"its rotary embedding is of type {kind}, which compressor cannot write"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        return "its rotary embedding turns a part of each head"
    if (kind == "llama3" and FAMILIES[name].arch != "llama") or (kind == "yarn" and name.startswith("Gemma")):
        return f"its rotary embedding is of type {kind}, which llama.cpp does not know of this family"
    lacking = [key for key in _NUMBERS.get(kind, ()) if type(rope.get(key)) not in (int, float)]
    if lacking:
        return f"its rotary embedding of type {kind} has no {lacking[0]}"
    if kind == "yarn" and (strange := [key for key, fine in _yarn(rope).items() if not fine]):
        return f"its YaRN has a {' and '.join(strange)} of its own, and llama.cpp computes with its defaults"
    if name.startswith("Gemma3") and rope_of(config, "sliding_attention")["rope_type"] != "default":
        return "the rotary embedding of its sliding windows is scaled, which llama.cpp does not know"
    return None


def _yarn(rope: Config) -> dict[str, bool]:
    """Whether each number of YaRN is what llama.cpp takes for granted: its loader reads the keys that exist for them only for other families."""
    usual = 0.1 * math.log(max(float(rope["factor"]), 1.0)) + 1
    factor, above, below = rope.get("attention_factor"), rope.get("mscale"), rope.get("mscale_all_dim")
    return {
        "attention_factor": factor is None or math.isclose(factor, usual, rel_tol=1e-4),
        "mscale": factor is not None or not (above and below),
        "beta_fast": (rope.get("beta_fast") or 32) == 32,
        "beta_slow": (rope.get("beta_slow") or 1) == 1,
        "truncate": bool(rope.get("truncate", True)),
    }


def _caps(config: Config, name: str) -> str | None:
    """What Gemma's attention and logits go through."""
    if config.get("use_bidirectional_attention"):
        return "its attention looks ahead, and llama.cpp's does not"
    lacking = [key for key in ("attn_logit_softcapping", "final_logit_softcapping") if not config.get(key)]
    if name.startswith("Gemma2"):
        return f"it has no {lacking[0]}, and llama.cpp would take one for granted" if lacking else None
    return None if "attn_logit_softcapping" in lacking else "it has attn_logit_softcapping, which llama.cpp does not know of this family"


def _windows(config: Config, name: str) -> str | None:
    kinds = config.get("layer_types")
    if name.startswith("Gemma"):
        largest = config["num_hidden_layers"] == (46 if name.startswith("Gemma2") else 62)  # by which llama.cpp knows the models of 27B
        scale = config["hidden_size"] / config["num_attention_heads"] if largest else head_dim(config)
        if config.get("query_pre_attn_scalar", 256) != scale:
            return f"its attention is scaled by another number than {scale:g}, by its head_dim or width, which llama.cpp takes for granted"
        every = 2 if name.startswith("Gemma2") else 6
        usual = ["full_attention" if i % every == every - 1 else "sliding_attention" for i in range(config["num_hidden_layers"])]
        strange = kinds not in (None, usual) or config.get("sliding_window_pattern", every) != every
        return f"its layers do not take a full window every {every} layers, which llama.cpp takes for granted" if strange else None
    if config.get("use_sliding_window") and config.get("sliding_window"):
        return "some of its layers have sliding windows, which llama.cpp does not know of this family"
    return None


def head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope_of(config: Config, layers: str = "full_attention") -> dict[str, Any]:
    """rope_type, rope_theta and whatever else, from a configuration of either kind; of several kinds of layers those of `layers`."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found.get(layers) or found
    kind = found.get("rope_type") or found.get("type") or "default"
    return {"rope_theta": config.get("rope_theta", 10000.0)} | found | {"rope_type": kind}


def names_of(family: Family, config: Config) -> dict[str, str]:
    """{a tensor's name in the folder: its name in the file}, for all that such a model may have."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    table = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    modules += [f"model.layers.{i}.{part}" for i in range(config["num_hidden_layers"]) for part in (_JOINED if family.arch == "phi3" else _LAYER)]
    out = {}
    for module in modules:
        for leaf in ("weight", "bias"):
            if (name := table.get_name(f"{module}.{leaf}", try_suffixes=(".weight", ".bias"))) is not None:
                out[f"{module}.{leaf}"] = name
    return out


def heads_turned(family: Family, config: Config, name: str) -> int:
    """Of how many heads the rows of this tensor are laid in pairs; 0: of none."""
    if not family.turned:
        return 0
    if ".q_proj." in name:
        return config["num_attention_heads"]
    return config.get("num_key_value_heads") or config["num_attention_heads"] if ".k_proj." in name else 0


def turn(rows: Tensor, heads: int) -> Tensor:
    """Rows [n, ..] of q or k: the first and second half of each head, which transformers rotates against each other, become neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def turn_back(rows: Tensor, heads: int) -> Tensor:
    """The inverse of turn."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def add_metadata(writer: gguf.GGUFWriter, config: Config, family: Family, name: str) -> str:
    """The numbers of the model; returns a note where what was written says less than the configuration."""
    context, note = config["max_position_embeddings"], ""
    window = config.get("sliding_window")
    if window and family.arch in ("llama", "phi3") and window < context:  # llama.cpp knows no window here: up to that length nothing differs
        context, note = window, f"context cut to the sliding window, {window}"
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    _add_rope(writer, config, family)
    if family.shift:
        writer.add_sliding_window(window or 4096)
        for key, add in (
            ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
            ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ):
            if config.get(key):
                add(config[key])
    return note


def _add_rope(writer: gguf.GGUFWriter, config: Config, family: Family) -> None:
    rope = rope_of(config)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if family.arch == "gemma3":
        writer.add_rope_freq_base_swa(float(rope_of(config, "sliding_attention")["rope_theta"]))
    if family.arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.get("original_max_position_embeddings") or config["max_position_embeddings"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])


def rope_factors(config: Config) -> Tensor | None:
    """What llama.cpp divides the frequencies of a head by, float32 [head_dim / 2], for LLaMA 3.1's scaling; None for any other."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    width, factor, old = head_dim(config), float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    length = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, width, 2, dtype=torch.float64) / width)  # of the waves
    smooth = (old / length - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(length < old / high, 1.0, torch.where(length > old / low, factor, between)).float()
