"""Absorbing paths into a packed model: nothing for nothing, nearer to the model with its paths than the base, given back on request."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError, NumericError, RecipeError
from compressor.linear import packed_linears
from compressor.pipelines import absorb, compress, load
from compressor.recipe import Quant
from compressor.stats import LayerStats

IDS = torch.randint(1, 2000, (6, 48), generator=torch.Generator().manual_seed(0))
GPTQ = Quant(bits=3, packer="gptq")


def rounded(symmetric: bool = True) -> nn.Module:
    model = load.load("tiny", "cpu").model
    compress.compress(model, Quant(bits=3, packer="rtn", shrink=False, symmetric=symmetric), torch.float16, None)
    return model


def paths(model: nn.Module, share: float = 0.1) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Random paths, each of a share of its weight's norm."""
    draw, out = torch.Generator().manual_seed(1), {}
    for name, layer in packed_linears(model).items():
        n, k = layer.out_features, layer.in_features
        a, b = torch.randn(4, k, generator=draw), torch.randn(n, 4, generator=draw)
        out[name] = (a, b * float(share * layer.packed().dequantize().norm() / (b @ a).norm()) / 2, 2.0)
    return out


def deltas(model: nn.Module, share: float = 0.1) -> dict[str, absorb.Delta]:
    return {name: lambda a=a, b=b, gamma=gamma: gamma * (b.float() @ a.float()) for name, (a, b, gamma) in paths(model, share).items()}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"{n}.{k}": t for n, layer in packed_linears(model).items() for k, t in layer.packed().tensors().items()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_paths_of_zeros_change_nothing() -> None:
    model = rounded()
    before = tensors(model)
    facts = absorb.absorb(model, deltas(model, 0.0), GPTQ, IDS)
    assert facts["ways"] == {"move": 28} and all(row["error"] == row["dropped"] == 0 for row in facts["layers"])
    assert all(torch.equal(t, before[name]) for name, t in tensors(model).items())


@pytest.mark.parametrize("way", ["best", "values", "move", "pack"])
def test_the_model_comes_nearer_to_the_one_with_paths_and_can_be_had_back(way: str) -> None:
    model = rounded()
    kept, before, base = absorb.snapshot(model), tensors(model), logits(model)
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _m, args, out, a=a, b=b, g=g: out + g * (args[0] @ a.T @ b.T))
        for name, (a, b, g) in paths(model).items()
    ]
    wanted = logits(model)
    for hook in hooks:
        hook.remove()
    seen: list[dict] = []
    facts = absorb.absorb(model, deltas(model), GPTQ, IDS, way, on_layer=seen.append)
    assert seen == facts["layers"] and len(seen) == 28 and sum(facts["ways"].values()) == 28
    for row in seen:
        assert row["error"] == min(row["errors"].values()) and set(row["errors"]) == ({"move", "pack"} if way == "best" else {way})
        assert row["error"] < row["dropped"]
    after = tensors(model)
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert float((logits(model) - wanted).norm()) < (1 if way == "values" else 0.9) * float((base - wanted).norm())
    if way == "values":
        assert all(torch.equal(t, before[n]) for n, t in after.items() if n.endswith("words"))
    absorb.restore(model, kept)
    assert torch.equal(logits(model), base) and all(torch.equal(t, before[n]) for n, t in tensors(model).items())


def test_layers_see_what_the_absorbed_predecessors_put_out(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Tensor] = []

    def recording(old: Any, merged: Tensor, stats: LayerStats, *rest: Any) -> Any:
        assert stats.hessian is not None
        used.append(stats.hessian.clone())
        return best(old, merged, stats, *rest)

    best = absorb._best
    monkeypatch.setattr(absorb, "_best", recording)
    model = rounded()
    facts = absorb.absorb(model, deltas(model), GPTQ, IDS, "values")
    names = [row["name"] for row in facts["layers"]]
    found = {name: LayerStats(model.get_submodule(name).in_features) for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, n=name: found[n].add(args[0]))
    logits(model)
    for name, hessian in zip(names, used, strict=True):
        torch.testing.assert_close(hessian, found[name].hessian, rtol=1e-3, atol=1e-4 * float(hessian.abs().max()))


def test_without_statistics_weights_are_compared_and_only_named_layers_move() -> None:
    model = rounded(symmetric=False)
    before, some = tensors(model), {n: d for n, d in deltas(model).items() if n.endswith("q_proj")}
    facts = absorb.absorb(model, some, Quant(bits=4, packer="rtn"), None)
    assert [row["name"] for row in facts["layers"]] == list(some) and all(row["error"] < row["dropped"] for row in facts["layers"])
    changed = {n.rpartition(".")[0] for n, t in tensors(model).items() if t.shape != before[n].shape or not torch.equal(t, before[n])}
    assert changed == set(some)  # bits, group and zeros are those of the weight, not of the packer's options
    assert all(layer.bits == 3 and layer.zero is not None for layer in packed_linears(model).values())


def test_pruned_weights_stay_zero() -> None:
    model = rounded()
    zeros = {n: layer.packed().dequantize() == 0 for n, layer in packed_linears(model).items()}
    facts = absorb.absorb(model, deltas(model), GPTQ, IDS, keep_zeros=True)
    assert facts["ways"] == {"values": 28}
    assert all(not layer.packed().dequantize()[zeros[n]].any() for n, layer in packed_linears(model).items())
    with pytest.raises(RecipeError, match="would bring pruned weights back"):
        absorb.absorb(model, {}, GPTQ, IDS, "pack", keep_zeros=True)


def test_what_cannot_be_absorbed_is_refused() -> None:
    model = rounded()
    name, some = next(iter(deltas(model).items()))
    with pytest.raises(RecipeError, match="choose best, values, move, pack"):
        absorb.absorb(model, {name: some}, GPTQ, IDS, "merge")
    with pytest.raises(RecipeError, match="squeezellm needs gradients"):
        absorb.absorb(model, {name: some}, Quant(packer="squeezellm"), IDS, "pack")
    with pytest.raises(ModelError, match="lm_head is no packed linear"):
        absorb.absorb(model, {"lm_head": some}, GPTQ, IDS)
    kept, base = absorb.snapshot(model), logits(model)
    with pytest.raises(ModelError, match="is none beside"):
        absorb.absorb(model, {name: lambda: torch.zeros(2, 2)}, GPTQ, IDS)
    with pytest.raises(NumericError, match="is not finite"):
        absorb.absorb(model, {name: lambda: some() * float("nan")}, GPTQ, IDS)
    absorb.restore(model, kept)
    assert torch.equal(logits(model), base)


def test_paths_of_peft_are_absorbed_inside_their_wrappers() -> None:
    peft = pytest.importorskip("peft")
    model = rounded()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    wanted = logits(model)
    changes = {f"{n}.base_layer": lambda m=m: m.get_delta_weight("default") for n, m in layers.items()}
    with wrapped.disable_adapter():
        base = logits(model)
        facts = absorb.absorb(model, changes, GPTQ, IDS)
        after = logits(model)
    assert len(facts["layers"]) == 8 and float((after - wanted).norm()) < float((base - wanted).norm())
