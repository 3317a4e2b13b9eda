"""The cut model computes what the masked one did, its configuration says what it is, and its blocks can go."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compressor.errors import ModelError
from compressor.linear import PackedLinear
from compressor.prune import slicing
from compressor.prune.lowrank import LowRank
from compressor.prune.slicing import WIDTHS, cut, describe, dissolve, drop_blocks, plain, resize
from compressor.prune.unit_masks import UnitMasks
from compressor.prune.units import families
from tests.prune.helpers import bert, causal, logits, pack, paths_of, windows
from tests.tolerances import RELATIVE, error

FLOAT = 5 * RELATIVE[torch.float32]
LIKE_LLAMA = {"llama": {}, "qwen2": {}, "qwen3": {}, "gemma2": {"query_pre_attn_scalar": 16}, "mistral": {}}


def mask(masks: UnitMasks, seed: int, even: bool = True) -> None:
    """Take about half of the units, scattered; as many in every block if `even`, and in every group of query heads."""
    generator = torch.Generator().manual_seed(seed)
    for key, family in masks.families.items():
        run = family.within or family.count
        for start in range(0, family.count, run):
            left = max(1, run // 2 - (0 if even else family.block % 3 - 1))
            masks.masks[key][start + torch.randperm(run, generator=generator)[left:]] = 0


def masked(model: Any, unit: str, seed: int = 0, even: bool = True) -> tuple[list[Any], dict[str, Tensor], Tensor]:
    """Families, masks, and the logits under them; the masks are off again."""
    units = families(model, unit)
    masks = UnitMasks(model, units)
    mask(masks, seed, even)
    out = logits(model, windows())
    masks.remove()
    return units, masks.masks, out


@pytest.mark.parametrize("base", ["dense", "paths", "packed with paths"])
@pytest.mark.parametrize(("kind", "keys", "unit"), [
    ("llama", 2, "group"), ("llama", 4, "query"), ("llama", 8, "group"), ("qwen2", 2, "group"), ("qwen2", 4, "query"), ("qwen3", 4, "query"),
    ("gemma2", 4, "group"),
])  # fmt: skip
def test_the_cut_model_computes_what_the_masked_one_did(kind: str, keys: int, unit: str, base: str) -> None:
    model = causal(kind, keys, **LIKE_LLAMA[kind])
    if base == "packed with paths":
        pack(model, 3)
    if base != "dense":
        paths_of(model)
    dense = logits(model, windows())
    units, masks, expected = masked(model, unit)
    assert error(expected, dense) > 0.05, "the masks must matter"
    cut(model, units, masks, torch.float32)
    assert error(logits(model, windows()), expected) < FLOAT
    assert not any(isinstance(m, LowRank | PackedLinear) for m in model.modules())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "o_proj.weight" in name)
    left = {"group": (4, keys // 2), "query": (4, keys)}[unit] if keys < 8 else (4, 4)
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (*left, 24)
    attention = model.model.layers[1].self_attn
    assert attention.q_proj.weight.shape == (left[0] * 16, 64) and attention.k_proj.weight.shape == (left[1] * 16, 64)
    assert attention.o_proj.weight.shape == (64, left[0] * 16) and attention.num_key_value_groups == left[0] // left[1]
    assert (attention.q_proj.bias is not None) == (kind == "qwen2")
    assert not hasattr(config, WIDTHS)


def test_generation_with_a_cache_follows_the_cut() -> None:
    model = causal(keys=4)
    units, masks, _ = masked(model, "query")
    cut(model, units, masks, torch.float32)
    prompt = windows(2, 6)
    made = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
    again = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0)
    assert made.shape == (2, 14) and torch.equal(made, again)


def test_encoders_are_cut_with_their_biases() -> None:
    model = bert()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    units = families(model)
    masks = UnitMasks(model, units)
    mask(masks, 0)
    ids = windows()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    masks.remove()
    cut(model, units, masks.masks, torch.float32)
    with torch.no_grad():
        assert error(model(input_ids=ids).logits, expected) < FLOAT
    attention = model.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size, attention.query.bias.shape) == (2, 16, (16,))
    kept = {"queries": [2, 2], "keys": [2, 2], "ffn": [int(masks.masks[f"{i}.ffn"].sum()) for i in range(2)]}
    assert getattr(model.config, WIDTHS) == kept, "fewer heads of the same size is what BERT's configuration cannot say"
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (4, 40)


# --- one linear ----------------------------------------------------------------------------------------------------------------------------


def test_plain_takes_rows_columns_and_biases() -> None:
    torch.manual_seed(0)
    layer, rows, columns = nn.Linear(6, 5).eval(), torch.tensor([0, 3, 4]), torch.tensor([5, 1])
    out = plain(layer, torch.float32, rows, columns)
    assert torch.equal(out.weight, layer.weight[rows][:, columns]) and torch.equal(out.bias, layer.bias[rows])
    assert (out.in_features, out.out_features, out.training) == (2, 3, False) and out.weight.is_contiguous()
    whole = plain(layer, torch.bfloat16)
    assert whole.weight.dtype == torch.bfloat16 and torch.equal(whole.weight, layer.weight.bfloat16()) and torch.equal(whole.bias, layer.bias)
    out.weight.data.zero_()
    out.bias.data.zero_()
    copy = plain(layer, torch.float32)
    copy.weight.data.zero_()
    copy.bias.data.zero_()
    assert bool(layer.weight.any()) and bool(layer.bias.all()), "the copy has memory of its own"
    with pytest.raises(ModelError, match="Conv1d is no linear layer"):
        plain(nn.Conv1d(1, 1, 1), torch.float32)


def test_plain_reads_a_weight_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    path = paths_of(pack(causal(), 2))["model.layers.0.self_attn.q_proj"]
    whole = plain(path, torch.float32)
    assert error(whole.weight, path.merged(slice(0, 128))) == 0
    monkeypatch.setattr("compressor.packing.PANEL", 1)
    assert error(plain(path, torch.float32).weight, whole.weight) < RELATIVE[torch.float32]


def test_dissolving_folds_every_path_in() -> None:
    model = causal("qwen2", keys=4)
    paths_of(model)
    expected = logits(model, windows())
    dissolve(model, torch.float32)
    assert not any(isinstance(m, LowRank) for m in model.modules()) and error(logits(model, windows()), expected) < FLOAT


def test_a_block_must_keep_something() -> None:
    model = causal()
    units = families(model)
    masks = {f.key: torch.ones(f.count) for f in units}
    masks["1.heads"].zero_()
    with pytest.raises(ModelError, match="block 1 would keep no heads: prune less"):
        cut(model, units, masks, torch.float32)


# --- widths that differ --------------------------------------------------------------------------------------------------------------------


def uneven(model: Any) -> tuple[Any, Tensor]:
    units, masks, expected = masked(model, "group", even=False)
    cut(model, units, masks, torch.float32)
    return model, expected


def test_widths_that_differ_are_listed_and_computed_with() -> None:
    model, expected = uneven(causal(keys=4))
    assert error(logits(model, windows()), expected) < FLOAT
    assert getattr(model.config, WIDTHS) == {"queries": [6, 4, 2], "keys": [3, 2, 1], "ffn": [25, 24, 23]}
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.intermediate_size) == (8, 4, 48)
    prompt = windows(2, 6)
    cached, plain_ = (model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False))
    assert torch.equal(cached, plain_)


def test_a_fresh_model_is_given_the_widths_that_its_configuration_lists() -> None:
    model, expected = uneven(causal(keys=4))
    fresh = causal(keys=4, seed=5)
    setattr(fresh.config, WIDTHS, getattr(model.config, WIDTHS))
    resize(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, windows()), logits(model, windows())) and error(logits(fresh, windows()), expected) < FLOAT
    shapes = {name: p.shape for name, p in fresh.named_parameters()}
    resize(untouched := causal(keys=4))
    assert shapes != {name: p.shape for name, p in untouched.named_parameters()} and untouched.config.intermediate_size == 48


@pytest.mark.parametrize("widths", [
    {}, {"keys": [1, 1, 1]}, {"keys": [1, 1], "ffn": [4, 4, 4]}, {"keys": [1, 1, 0], "ffn": [4, 4, 4]}, {"keys": [1, 1, 5], "ffn": [4, 4, 4]},
    {"keys": [1, 1, 1], "ffn": [4, 4, "4"]}, {"keys": [1, 1, 1], "ffn": [4, 4, -1]}, {"keys": 1, "ffn": 4}, [1, 2], "no",
])  # fmt: skip
def test_widths_of_strangers_are_refused(widths: Any) -> None:
    model = causal(keys=4)
    setattr(model.config, WIDTHS, widths)
    with pytest.raises(ModelError, match=f"{WIDTHS} in the configuration does not fit the 3 blocks"):
        resize(model)


def test_widths_that_were_listed_follow_a_second_cut() -> None:
    model = causal(keys=4)
    setattr(model.config, WIDTHS, {"queries": [8] * 3, "keys": [4] * 3, "ffn": [48] * 3})
    units, masks, _ = masked(model, "group")
    cut(model, units, masks, torch.float32)
    assert getattr(model.config, WIDTHS) == {"queries": [4] * 3, "keys": [2] * 3, "ffn": [24] * 3} and model.config.intermediate_size == 24


def test_dropping_a_block_keeps_the_widths_of_the_others() -> None:
    model, _ = uneven(causal(keys=4))
    drop_blocks(model, [0, 2])
    assert getattr(model.config, WIDTHS) == {"queries": [6, 2], "keys": [3, 1], "ffn": [25, 23]}
    fresh = causal(keys=4, num_hidden_layers=2)
    setattr(fresh.config, WIDTHS, getattr(model.config, WIDTHS))
    resize(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, windows()), logits(model, windows()))
    drop_blocks(model, [1])
    describe(model)
    assert getattr(model.config, WIDTHS) == {"queries": [2], "keys": [1], "ffn": [23]} and model.config.num_attention_heads == 2


# --- whole blocks --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("keep", [[0, 2, 3], [1], [3, 4], [0, 1, 2, 4]])
def test_dropped_blocks_are_as_if_they_handed_their_input_on(kind: str, keep: list[int]) -> None:
    extra = LIKE_LLAMA[kind] | ({} if kind == "llama" else {"sliding_window": 4})
    if kind == "qwen3":
        extra |= {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "use_sliding_window": True,
        }
    model, skipped = (causal(kind, keys=4, num_hidden_layers=5, eos_token_id=[1, 2, 3, 4, 5], **extra) for _ in range(2))
    types = list(getattr(model.config, "layer_types", None) or [])
    for i, block in enumerate(skipped.model.layers):
        if i not in keep:
            block.register_forward_hook(_skip, with_kwargs=True)
    drop_blocks(model, keep)
    ids = windows()
    assert torch.equal(logits(model, ids), logits(skipped, ids))
    assert model.config.num_hidden_layers == len(model.model.layers) == len(keep)
    assert [block.self_attn.layer_idx for block in model.model.layers] == list(range(len(keep)))
    assert list(getattr(model.config, "layer_types", None) or []) == [types[i] for i in keep if types]
    assert model.config.eos_token_id == [1, 2, 3, 4, 5]
    model.generation_config.eos_token_id = None
    made, again = (model.generate(ids[:2, :6], max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False))
    assert made.shape == (2, 14) and torch.equal(made, again)


def _skip(_block: Any, args: Any, kwargs: Any, output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def test_the_name_of_the_widths_is_part_of_the_format() -> None:
    assert slicing.WIDTHS == "compressor_widths"


def test_a_head_size_that_followed_from_the_heads_is_written_down(tmp_path: Path) -> None:
    model = causal("qwen2", keys=4, head_dim=8)
    del model.config.head_dim
    units = families(model)
    masks = {f.key: torch.arange(f.count) < (2 if f.kind == "heads" else f.count) for f in units}
    cut(model, units, masks, torch.float32)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert again.config.head_dim == 8 and not info["missing_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(again(input_ids=windows()).logits, model(input_ids=windows()).logits, rtol=0, atol=0)
