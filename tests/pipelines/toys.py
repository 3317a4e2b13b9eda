"""Toy models of any family with random bfloat16 weights as folders, and a recipe that packs them in a moment."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.recipe import Recipe
from tests.pipelines.conftest import make_tokenizer

SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "head_dim": 8, "sliding_window": 16,
}  # fmt: skip


def make(folder: Path, family: str, **more: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | more)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def recipe(model: Path, **changes: Any) -> Recipe:
    text = Path(model).parent / "text.txt"
    text.write_text("The ship left the harbour at dawn, and nobody saw it go. " * 400)
    given = {"data__data": str(text), "data__outside": str(text), "data__nsamples": 6, "data__seqlen": 32, "eval__max_tokens": 512, "device": "cpu"}
    return Recipe(model=str(model)).with_(**given | {"quant__packer": "gptq", "quant__group": 16} | changes)


def sums(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "config.json"}
