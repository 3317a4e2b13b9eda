"""Which rows and columns a unit owns, by architecture, and what is refused."""

import pytest
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from compressor.errors import ModelError
from compressor.prune.units import Family, arrangement, families, head_size
from tests.prune.helpers import bert, causal, pack


def parts(family: Family) -> list[tuple[str, int, int]]:
    return [(part.name.rpartition("layers.")[2].rpartition("layer.")[2], part.axis, part.width) for part in family.parts]


@pytest.mark.parametrize("prepare", [lambda m: m, pack])
def test_groups_of_query_heads_share_a_key_head(prepare) -> None:
    found = families(prepare(causal(keys=2)))
    assert [(f.block, f.kind, f.key) for f in found] == [(b, k, f"{b}.{k}") for b in range(3) for k in ("heads", "ffn")]
    heads, ffn = found[2:4]
    assert (heads.count, heads.within, ffn.count, ffn.within) == (2, 0, 48, 0)
    assert parts(heads) == [
        ("1.self_attn.q_proj", 0, 64), ("1.self_attn.k_proj", 0, 16), ("1.self_attn.v_proj", 0, 16), ("1.self_attn.o_proj", 1, 64)
    ]  # fmt: skip
    assert parts(ffn) == [("1.mlp.gate_proj", 0, 1), ("1.mlp.up_proj", 0, 1), ("1.mlp.down_proj", 1, 1)]
    assert heads.gate == heads.parts[-1] and ffn.gate.name == "model.layers.1.mlp.down_proj"


def test_query_heads_leave_keys_and_values_alone() -> None:
    heads, ffn = families(causal(keys=2), "query")[:2]
    assert (heads.count, heads.within) == (8, 4)
    assert parts(heads) == [("0.self_attn.q_proj", 0, 16), ("0.self_attn.o_proj", 1, 16)]
    assert ffn == families(causal(keys=2))[1]


def test_without_sharing_both_units_are_whole_heads() -> None:
    model = causal(keys=8)
    assert families(model, "query") == families(model, "group")
    heads = families(model)[0]
    assert (heads.count, heads.within, [p.width for p in heads.parts]) == (8, 0, [16] * 4)


def test_biases_do_not_matter_and_encoders_have_other_names() -> None:
    assert families(causal("qwen2", head_dim=8, keys=4)) == families(causal("llama", head_dim=8, keys=4))
    heads, ffn = families(bert())[2:]
    assert (heads.count, ffn.count, heads.within) == (4, 40, 0)
    assert parts(heads) == [(f"1.attention.{n}", a, 8) for n, a in (("self.query", 0), ("self.key", 0), ("self.value", 0), ("output.dense", 1))]
    assert parts(ffn) == [("1.intermediate.dense", 0, 1), ("1.output.dense", 1, 1)]


def test_every_weight_of_the_blocks_is_owned_once_by_each_axis() -> None:
    for model, unit in ((causal(keys=2), "group"), (causal("qwen3", keys=4), "query"), (bert(), "group")):
        for family in families(model, unit):
            for part in family.parts:
                assert model.get_submodule(part.name).weight.shape[part.axis] == family.count * part.width


def test_head_size_is_the_modules_own_or_follows_from_the_configuration() -> None:
    config = causal().config
    assert head_size(nn.Module(), config) == 8  # 64 channels, 8 heads
    assert head_size(causal().model.layers[0].self_attn, config) == 16
    assert head_size(bert().bert.encoder.layer[0].attention.self, bert().config) == 8


def test_fused_and_unknown_arrangements_are_refused_by_name() -> None:
    config = GPTNeoXConfig(vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(
        ModelError, match=r"^gpt_neox.layers.0 cannot be pruned by structure: it has the linears .*query_key_value.* and not self_attn.q_proj"
    ):
        families(GPTNeoXForCausalLM(config))
    model = causal()
    model.model.layers[2].mlp.up_proj = nn.Identity()
    with pytest.raises(
        ModelError, match=r"^model.layers.2 cannot be pruned .* and not mlp.gate_proj, mlp.up_proj, mlp.down_proj or mlp.fc1, mlp.fc2"
    ):
        families(model)
    with pytest.raises(ModelError, match="^the block cannot"):
        arrangement(nn.ModuleList([nn.Linear(2, 2)]))


@pytest.mark.parametrize(
    ("name", "n", "k", "match"),
    [
        ("self_attn.k_proj", 48, 64, "8 query heads do not share 3 key heads evenly"),
        ("self_attn.k_proj", 8, 64, "do not share 0 key heads evenly"),
        ("self_attn.q_proj", 120, 64, "do not share"),
        ("self_attn.k_proj", 40, 64, "do not share"),
        ("self_attn.v_proj", 48, 64, "not of one width"),
        ("self_attn.o_proj", 64, 112, "not of one width"),
        ("mlp.up_proj", 40, 64, "mlp.gate_proj, mlp.up_proj do not all feed mlp.down_proj"),
    ],
)
def test_shapes_that_do_not_fit_together_are_refused(name: str, n: int, k: int, match: str) -> None:
    model = causal()
    model.model.layers[1].set_submodule(name, nn.Linear(k, n, bias=False))
    with pytest.raises(ModelError, match=rf"model.layers.1.*{match}"):
        families(model)
