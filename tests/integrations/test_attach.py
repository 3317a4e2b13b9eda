"""Adapters of strangers: whatever a configuration says, it is judged before peft sees it, and ends in one sentence."""

import copy
import json
from pathlib import Path
from typing import Any

import peft as library
import pytest
import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.integrations import attach, peft
from compressor.linear import packed_linears
from compressor.pipelines.load import Loaded
from compressor.recipe import Tune
from tests.integrations.test_peft import logits

DAMAGES: dict[str, tuple[Any, str]] = {
    "a list": (lambda c, t: [1], "adapter of the kind 'None'"),
    "no kind": (lambda c, t: c.pop("peft_type"), "adapter of the kind 'None'"),
    "an unknown kind": (lambda c, t: c.update(peft_type="MAGIC"), "adapter of the kind 'MAGIC'"),
    "prompts": (lambda c, t: c.update(peft_type="PROMPT_TUNING"), "adapter of the kind 'PROMPT_TUNING'"),
    "a kind that is no name": (lambda c, t: c.update(peft_type=["LORA"]), "adapter of the kind"),
    "not finite": (lambda c, t: c.update(lora_alpha=float("nan")), "is no JSON"),
    "a module to import": (lambda c, t: c.update(megatron_config={"a": 1}, megatron_core="os"), "sets megatron_config"),
    "copies of layers": (lambda c, t: c.update(modules_to_save=["lm_head"]), "sets modules_to_save"),
    "repeated layers": (lambda c, t: c.update(layer_replication=[[0, 9]]), "sets layer_replication"),
    "a library": (lambda c, t: c.update(auto_mapping={"parent_library": "os"}), "names a library of its own"),
    "a mapping that is none": (lambda c, t: c.update(auto_mapping=3), "names a library of its own"),
    "a start that writes": (lambda c, t: c.update(init_lora_weights="pissa"), "starts its paths by 'pissa'"),
    "a pattern": (lambda c, t: c.update(target_modules="(a+)+$"), "without patterns"),
    "a pattern in a list": (lambda c, t: c.update(target_modules=["(a+)+$"]), "without patterns"),
    "a pattern of ranks": (lambda c, t: c.update(rank_pattern={"(a+)+$": 4}), "without patterns"),
    "patterns that are none": (lambda c, t: c.update(rank_pattern=[4]), "without patterns"),
    "a rank of text": (lambda c, t: c.update(r="4"), "must be whole numbers above 0"),
    "a rank below": (lambda c, t: c.update(r=-4), "must be whole numbers above 0"),
    "a true rank": (lambda c, t: c.update(r=True), "must be whole numbers above 0"),
    "a huge rank": (lambda c, t: c.update(r=1 << 40), "wants rank 1099511627776"),
    "a huge rank of one": (lambda c, t: c.update(rank_pattern={"q_proj": 1 << 40}), "wants rank 1099511627776"),
    "another rank": (lambda c, t: c.update(r=2), "cannot attach this adapter"),
    "an unknown task": (lambda c, t: c.update(task_type="MAGIC"), "cannot attach this adapter"),
    "unknown modules": (lambda c, t: c.update(target_modules=["nose"]), "cannot attach this adapter"),
    "fewer modules": (lambda c, t: c.update(target_modules=["model.layers.0.mlp.up_proj"]), "does not fit this model"),
    "no tensors": (lambda c, t: t.clear(), "there is at least one"),
    "integers": (lambda c, t: t.update(a=torch.ones(2, dtype=torch.int64)), "float16, bfloat16 or float32"),
    "eight bits": (lambda c, t: t.update(a=torch.ones(2).to(torch.float8_e4m3fn)), "float16, bfloat16 or float32"),
    "the base's biases": (lambda c, t: c.update(bias="all"), "sets bias"),
    "biases of paths": (lambda c, t: c.update(lora_bias=True), "sets lora_bias"),
    "another way to compute": (lambda c, t: c.update(use_bdlora={"a": 1}), "sets use_bdlora"),
    "a key of another kind": (lambda c, t: c.update(decompose_both=True), "sets decompose_both"),
    "a tensor of the base": (lambda c, t: t.update({"base_model.model.a.base_layer.bias": torch.ones(2)}), "would be a tensor of the base"),
    "no number": (lambda c, t: next(iter(t.values())).fill_(float("inf")), "not finite"),
    "a tensor more": (lambda c, t: t.update(nose=torch.ones(2)), "nose belongs to one of them alone"),
    "a tensor less": (lambda c, t: t.pop(next(iter(t))), "belongs to one of them alone"),
}


@pytest.fixture
def given(packed_llama: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tuner = peft.KINDS["lora"](Tune(method="lora", rank=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tuner.attach(packed_llama(), None, 4).values():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    tuner.model.eval()
    return attach.plain(tuner.model), {key: value.clone() for key, value in peft.state(tuner.model).items()}


def loaded(model: Any) -> Any:
    return Loaded(model, None, Path(), "m", {}, torch.float16)


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_fit_gives_one_sentence_and_changes_nothing(packed_llama: Any, given: Any, name: str) -> None:
    held, (config, tensors) = loaded(packed_llama()), copy.deepcopy(given)
    before, names = logits(held.model), set(packed_linears(held.model))
    damage, words = DAMAGES[name]
    replaced = damage(config, tensors)
    with pytest.raises(ModelError, match=words) as error:
        attach.exchange(held, replaced if name == "a list" else config, tensors, "t.safetensors")
    assert str(error.value).startswith("t.safetensors") and "\n" not in str(error.value) and len(str(error.value)) < 600
    assert held.adapter is None and set(packed_linears(held.model)) == names and torch.equal(logits(held.model), before)
    attach.exchange(held, *given, "t.safetensors")
    assert not torch.equal(logits(held.model), before)


@pytest.mark.parametrize("error", [ModelError, KeyboardInterrupt])
def test_a_refusal_leaves_gradients_and_modes(packed_llama: Any, given: Any, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    held = loaded(packed_llama().train())
    asking = {name: parameter.requires_grad_("norm" in name).requires_grad for name, parameter in held.model.named_parameters()}
    assert len({*asking.values()}) == 2

    def late(*args: Any, beside: Any = peft.beside) -> None:
        beside(*args)
        raise error("stopped")

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(peft, "beside", late)
        attach.exchange(held, *given, "t")
    assert held.adapter is None and all(module.training for module in held.model.modules())
    assert {name: parameter.requires_grad for name, parameter in held.model.named_parameters()} == asking
    attach.exchange(held, *given, "t")
    assert {name: p.requires_grad for name, p in held.model.named_parameters() if name in asking}.items() <= asking.items()
    before = logits(held.model)

    def half(made: Any, tensors: Any, load: Any = library.set_peft_model_state_dict) -> None:
        load(made, tensors)
        patch.setattr(library, "set_peft_model_state_dict", load)
        raise error("stopped")

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(library, "set_peft_model_state_dict", half)
        attach.exchange(held, given[0], {key: 2 * tensor for key, tensor in given[1].items()}, "t")
    assert torch.equal(logits(held.model), before)


def test_what_peft_writes_is_let_in() -> None:
    """Every kind with its defaults, and what each lets be set."""
    for name, config in attach.TYPES.items():
        more = {"IA3": {"feedforward_modules": []}, "ADALORA": {"total_step": 9}}.get(name, {})
        made = library.PeftConfig.from_peft_type(peft_type=name, target_modules=["q_proj"], **more)
        held = {key: sorted(value) if isinstance(value, set) else value for key, value in made.to_dict().items()}
        attach.check(json.loads(json.dumps(held, default=str)), {"a": torch.ones(2)}, "t")
        assert {*config} - {*attach.SAME} <= {*held}, name


def test_an_adapter_is_set_aside_and_comes_back(packed_llama: Any, given: Any) -> None:
    held = loaded(packed_llama())
    before = logits(held.model)
    names = set(packed_linears(held.model))
    attach.exchange(held, *given, "t")
    after, made = logits(held.model), held.adapter
    with peft.set_aside(held):
        assert held.adapter is None and set(packed_linears(held.model)) == names
        assert torch.equal(logits(held.model), before)
    assert held.adapter is made and torch.equal(logits(held.model), after)
    addresses = {name: tensor.data_ptr() for name, tensor in attach.stored(held.model)}
    moved = {key: 2 * tensor for key, tensor in given[1].items()}
    attach.exchange(held, given[0] | {attach.BASE: "other"}, moved, "t")
    assert held.adapter is made and attach.plain(made)[attach.BASE] == "other"
    assert {name: tensor.data_ptr() for name, tensor in attach.stored(held.model)} == addresses
    assert not torch.equal(logits(held.model), after)
    made.unload()
    assert torch.equal(logits(held.model), before)


def test_paths_of_this_computer_are_told_to_nobody(packed_llama: Any, given: Any) -> None:
    held = loaded(packed_llama())
    attach.exchange(held, *given, "t")
    for told, name in (("/home/me/base", "base"), ("~/a/base/", "base"), ("org/base", "org/base"), ("C:\\me\\base", "base"), (None, None)):
        held.adapter.peft_config[peft.NAME].base_model_name_or_path = told
        assert attach.plain(held.adapter)[attach.BASE] == name
