"""A rotated model computes what it did, whatever its family; what cannot be rotated says why."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from compressor import linear
from compressor.quant import rtn
from compressor.recipe import Quant
from compressor.rotate import merge, roles
from tests.pipelines.toys import SMALL

IDS = torch.randint(5, 320, (2, 32), generator=torch.Generator().manual_seed(3))
WHOLE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "granite", "smollm3", "glm", "helium")
HEADS = (*WHOLE, "gemma2", "gemma3_text", "olmo2", "starcoder2", "qwen2_moe", "mixtral")


def build(family: str, **more: Any) -> Any:
    """Random weights everywhere, gains and biases included; three query heads a value head."""
    torch.manual_seed(0)
    shapes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 16}
    given = SMALL | shapes | {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 1.0, **more}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def rotated(model: Any, method: str, seed: int = 1) -> merge.Merge:
    found = merge.planned(model, method, seed)
    found.outside(model, torch.float16)
    for index, block in enumerate(linear.find_blocks(model)[1]):
        found.block(index, block)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "method"), [*((each, "hadamard") for each in WHOLE), *((each, "heads") for each in HEADS)])
def test_logits_stay(family: str, method: str, tied: bool) -> None:
    model = build(family, tie_word_embeddings=tied)
    before, weights = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    assert merge.why_not(model, method) == ""
    more = merge.added(model, method)
    rotated(model, method)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert more == (model.lm_head.weight.numel() if tied and method == "hadamard" else 0) and merge.added(model, method) == 0
    moved = {name.rpartition(".layers.")[2].partition(".")[2] for name, p in model.named_parameters() if not torch.equal(p, weights.get(name, p))}
    values = "self_attn.qkv_proj.weight" if family == "phi3" else "self_attn.v_proj.weight"
    assert {values, "self_attn.o_proj.weight"} <= moved
    assert (any("norm" in name for name in moved), model.config.tie_word_embeddings) == (method == "hadamard", tied and method == "heads")
    if "self_attn.v_proj.bias" in dict(model.model.layers[0].named_parameters()):
        assert "self_attn.v_proj.bias" in moved


def test_a_rotation_spreads_what_few_channels_held() -> None:
    model = build("llama", tie_word_embeddings=False)
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[3] *= 50
            block.mlp.down_proj.weight[7] *= 30

    def kurtosis(name: str) -> float:
        w = model.model.layers[1].get_submodule(name).weight.detach() * (
            model.model.layers[1].input_layernorm.weight.detach() if name.endswith("q_proj") else 1
        )
        return float(w.pow(4).mean() / w.square().mean() ** 2)

    before = [kurtosis(name) for name in ("self_attn.q_proj", "mlp.down_proj")]
    rotated(model, "hadamard")
    after = [kurtosis(name) for name in ("self_attn.q_proj", "mlp.down_proj")]
    assert min(before) > 15 and max(after) < 5


def test_packed_linears_keep_their_codes_and_get_their_biases_turned() -> None:
    """What a block loses when it is loaded again next to codes that were chosen in the rotated basis."""
    dense, model = build("qwen2"), build("qwen2")
    found = rotated(dense, "hadamard")
    block, wanted = model.model.layers[0], dense.model.layers[0]
    for name, layer in linear.linears(wanted).items():
        packed = rtn.pack(layer.weight.detach(), None, Quant(bits=4, packer="rtn", group=8), 8, torch.float32)[0]
        linear.swap(block, name, linear.to_packed(block.get_submodule(name), packed))
    words = {name: layer.words.clone() for name, layer in linear.packed_linears(block).items()}
    found.block(0, block)
    for name, layer in linear.packed_linears(block).items():
        assert torch.equal(layer.words, words[name])
        bias = wanted.get_submodule(name).bias
        assert (layer.bias is None and bias is None) or torch.equal(layer.bias, bias), name
    assert torch.equal(block.input_layernorm.weight, wanted.input_layernorm.weight)


@pytest.mark.parametrize(
    ("family", "method", "why"),
    [
        ("gemma2", "hadamard", "post_feedforward_layernorm"), ("olmo2", "hadamard", "have no input_layernorm"),
        ("starcoder2", "hadamard", "one norm is what can be merged"), ("gpt_neox", "heads", "no v_proj and o_proj"),
        ("gpt_neox", "hadamard", "one norm"), ("qwen2_moe", "hadamard", "mlp.experts"), ("olmo", "hadamard", "no norm"),
    ],
)  # fmt: skip
def test_what_cannot_be_rotated_says_why(family: str, method: str, why: str) -> None:
    assert why in merge.why_not(build(family).to("meta"), method)


class Centred(nn.Module):
    """A norm with a mean taken away, in the clothes of one without."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def test_norms_are_known_by_what_they_do() -> None:
    assert roles.offset(build("llama").model.norm, 48) == 0 and roles.offset(build("gemma").model.norm, 48) == 1
    assert roles.offset(Centred(48), 48) is None and roles.offset(nn.LayerNorm(48), 48) is None
    model = build("llama")
    model.model.layers[1].post_attention_layernorm = Centred(48)
    assert "no norm by the root mean square" in merge.why_not(model, "hadamard")


def test_every_block_has_rotations_of_its_own_by_seed() -> None:
    model = build("llama")
    one, again, other = (merge.planned(model, "hadamard", seed) for seed in (1, 1, 2))
    assert torch.equal(one.heads(0, 8).signs, again.heads(0, 8).signs)
    assert one.residual is not None and other.residual is not None and not torch.equal(one.residual.signs, other.residual.signs)
    assert len({tuple(one.heads(index, 64).signs.tolist()) for index in range(4)}) == 4
