"""Toy mixtures of experts with random weights, as configurations and as folders with a tokenizer."""

from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2, "num_experts_per_tok": 2,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16}),
    "olmoe": ("OlmoeConfig", {"num_experts": 8}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "head_dim": 16, "initial_context_length": 128}),
    "llama4": ("Llama4TextConfig", {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 96}),
}


def config(kind: str, **more: Any) -> Any:
    name, own = KINDS[kind]
    return getattr(transformers, name)(**SHAPE | own | more)


def model(kind: str, **more: Any) -> Any:
    """Fused, as transformers makes it, with weights that matter: biases are random too."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config(kind, **more)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return made


def folder(place: Path, kind: str, tokenizer: Any, **more: Any) -> Path:
    """A dense folder as transformers writes it: with the names of the family's checkpoints."""
    model(kind, **more).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place
