"""Experts taken apart: the same outputs, the checkpoint's names, views instead of copies; what is not understood stays as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from compressor.integrations import experts
from compressor.linear import linears
from tests.pipelines import mixtures

IDS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))
NAMES = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2",
    "qwen2_moe": "model.layers.1.mlp.experts.7.down_proj",
    "qwen3_moe": "model.layers.1.mlp.experts.7.down_proj",
    "olmoe": "model.layers.1.mlp.experts.7.down_proj",
    "gpt_oss": "model.layers.1.mlp.experts.3.down_proj",
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_logits_stay_and_names_are_those_of_checkpoints(kind: str) -> None:
    model = mixtures.model(kind)
    before, parameters = logits(model), sum(p.numel() for p in model.parameters())
    assert experts.unfuse(model) is model and not experts.fused(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert NAMES[kind] in linears(model) and sum(p.numel() for p in model.parameters()) == parameters
    assert len(experts.routers(model)) == 2  # the matrices that choose, by block
    for name, layer in linears(model).items():
        if name.rpartition(".")[2] == NAMES[kind].rpartition(".")[2]:
            layer.weight.data *= 2
    assert float((logits(model) - before).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_the_meta_device_gives_the_same_names_and_sources_say_where_weights_lie(kind: str) -> None:
    fused = mixtures.model(kind).state_dict()
    with torch.device("meta"):
        shell = experts.unfuse(mixtures.model(kind))
    whole = experts.unfuse(mixtures.model(kind))
    assert {k: t.shape for k, t in shell.state_dict().items()} == {k: t.shape for k, t in whole.state_dict().items()}
    found = 0
    for name in linears(whole):
        for leaf, place in experts.sources(shell, name).items():
            assert torch.equal(place.of(fused[place.parameter]), whole.state_dict()[f"{name}.{leaf}"])
            found += 1
    assert found == sum("experts." in key for key in whole.state_dict())
    assert experts.sources(shell, "model.layers.0.self_attn.q_proj") == experts.sources(shell, "no.such.thing") == {}


def test_linears_are_views_and_dense_folders_have_the_names_of_checkpoints(tmp_path: Path) -> None:
    model = mixtures.model("mixtral")
    storage = model.model.layers[0].mlp.experts.gate_up_proj.untyped_storage().data_ptr()
    experts.unfuse(model)
    assert model.model.layers[0].block_sparse_moe.experts.get_submodule("2.w3").weight.untyped_storage().data_ptr() == storage
    mixtures.model("mixtral").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())


def test_tokens_of_no_expert_and_experts_of_no_token() -> None:
    model = mixtures.model("qwen3_moe")
    fused: Any = model.model.layers[0].mlp.experts
    fused.config._experts_implementation = "eager"
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    index = torch.tensor([[0, 3], [3, 0], [0, 8], [8, 8], [3, 0]])  # 8: nobody; 1, 2 and 4 to 7 get none
    with torch.no_grad():
        wanted = fused(x, index, weights)
        experts.unfuse(model)
        torch.testing.assert_close(fused(x, index, weights), wanted)
        assert not fused(x, index, weights)[3].any()
        assert fused(x[:0], index[:0], weights[:0]).shape == (0, 64)
    fused(x, index, weights).sum().backward()
    assert fused.get_submodule("0.up_proj").weight.grad is not None and fused.get_submodule("5.up_proj").weight.grad is None


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))


def test_what_is_not_understood_stays_fused_with_its_reason() -> None:
    model = experts.unfuse(mixtures.model("llama4"))
    (held,) = {type(m).__name__ for m in experts.fused(model).values()}
    assert held == "Llama4TextExperts" and "only its own code knows" in experts.reason(next(iter(experts.fused(model).values())))
    assert "without a description" in experts.reason(Strange())
    assert experts.reason(nn.Conv1d(4, 4, 2)) == "a convolution is no linear"


def test_a_class_that_does_something_else_than_it_says_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixtures.model("olmoe")
    kind = type(model.model.layers[0].mlp.experts)
    monkeypatch.setattr(kind, "_apply_gate", lambda self, x: x.chunk(2, -1)[0])  # the class's own forward knows better
    experts.unfuse(model)
    assert len(experts.fused(model)) == 2
    assert "do not give what it gives" in experts.reason(model.model.layers[0].mlp.experts)
    assert not experts.fused(experts.unfuse(mixtures.model("olmoe"), prove=False)), "a model whose weights are to come is not asked"


def test_experts_whose_names_on_disk_nobody_tells_stay_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise TypeError("another signature")

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", refuse)
    model = experts.unfuse(mixtures.model("mixtral"))
    assert all("names in checkpoints" in experts.reason(m) for m in experts.fused(model).values()) and len(experts.fused(model)) == 2


def test_a_folder_with_fused_experts_is_loaded_fused() -> None:
    model = mixtures.model("gpt_oss")
    experts.unfuse(model, {"model.layers.0.mlp.experts.down_proj"})
    assert list(experts.fused(model)) == ["model.layers.0.mlp.experts"]
    assert experts.separate("mixtral") and experts.separate("qwen2_moe") and not experts.separate("gpt_oss") and not experts.separate("llama")
