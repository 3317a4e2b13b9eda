"""Decoding with packed weights: a static cache, and torch's compiler over the whole model, change no token."""

from typing import Any

import pytest
import torch

from compressor import linear
from compressor.packed import Affine, PackedWeight


@pytest.fixture
def packed() -> Any:
    """A random LLaMA with two blocks, its linears packed to 3 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, initializer_range=0.3, eos_token_id=None, bos_token_id=None, **shape)).eval()
    _, blocks = linear.find_blocks(model)
    for block in blocks:
        for name, layer in linear.linears(block).items():
            n, k = layer.weight.shape
            weight = PackedWeight.pack(torch.randint(0, 8, (n, k), dtype=torch.uint8), Affine(torch.rand(n, k // 32) * 0.1), 3)
            linear.swap(block, name, linear.to_packed(layer, weight))
    return model


def test_a_static_cache_writes_the_same_tokens(packed: Any) -> None:
    ids = torch.randint(0, 96, (4, 7))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    dynamic = packed.generate(ids, **options)
    static = packed.generate(ids, cache_implementation="static", **options)
    assert torch.equal(dynamic, static)


def test_the_whole_model_compiles_without_a_break(packed: Any) -> None:
    ids = torch.randint(0, 96, (2, 9))
    with torch.no_grad():
        eager = packed(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
