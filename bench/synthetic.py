"""A model folder of a real shape with random bfloat16 weights, for measuring memory and time where no model can be fetched.

    python bench/synthetic.py llama-7b OUT          13.5 GB; also tinyllama-1.1b, llama-160m

Weights are normal, of standard deviation 0.02; every 97th input column of a block's linears is ten times as large, so that groups are not all alike.
Shards hold one block each and are written one after the other. The tokenizer is that of the embedded model, whose ids are a part of the vocabulary.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from compressor.export import shards
from compressor.pipelines import checkpoint

SHAPES = {  # hidden, FFN, blocks, heads, key and value heads, vocabulary
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000),
    "llama-160m": (768, 3072, 12, 12, 12, 32000),
}
SHARD = 1 << 30


def config_of(name: str) -> dict[str, object]:
    """config.json of a LLaMA of that shape."""
    hidden, inner, layers, heads, shared, vocab = SHAPES[name]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": shared, "vocab_size": vocab, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    }  # fmt: skip


def tensors(name: str, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(name, bfloat16 tensor) of every weight."""
    hidden, inner, layers, heads, shared, vocab = SHAPES[name]
    random = torch.Generator().manual_seed(seed)
    width = shared * hidden // heads
    linears = {"q": (hidden, hidden), "k": (width, hidden), "v": (width, hidden), "o": (hidden, hidden)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).mul_(0.02)

    yield "model.embed_tokens.weight", normal(vocab, hidden).bfloat16()
    for index in range(layers):
        at = f"model.layers.{index}"
        for room, shapes in (("self_attn", linears), ("mlp", mlp)):
            for leaf, shape in shapes.items():
                weight = normal(*shape)
                weight[:, ::97] *= 10
                yield f"{at}.{room}.{leaf}_proj.weight", weight.bfloat16()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield "lm_head.weight", normal(vocab, hidden).bfloat16()


def make(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards.write_weights(folder, tensors(name), lambda module, weight: {}, SHARD)
    shards.write_json(folder / "config.json", config_of(name))
    for pattern in checkpoint.COMPANIONS:
        for path in checkpoint.TINY.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    make(asked.name, asked.folder)
    size = sum(path.stat().st_size for path in asked.folder.glob("*.safetensors"))
    print(json.dumps({"folder": str(asked.folder), "bytes": size}))


if __name__ == "__main__":
    main()
