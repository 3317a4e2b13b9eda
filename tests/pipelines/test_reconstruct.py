"""Block-wise reconstruction: blocks come nearer to the dense ones, the same with one block at a time in memory, and when it was killed."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressor import linear, world
from compressor.errors import RecipeError
from compressor.pipelines import compress, load, reconstruct
from compressor.pipelines import run as pipeline
from compressor.pipelines.calibrate import Calibration
from compressor.quant import rtn
from compressor.recipe import Quant
from tests.pipelines import toys

IDS = torch.randint(5, 320, (6, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return toys.make(tmp_path / "llama", "llama")


def dense(folder: Path) -> Any:
    return load.load(str(folder), "cpu").model


@pytest.mark.parametrize("packer", ["block", "round"])
@pytest.mark.parametrize("symmetric", [True, False])
@torch.no_grad()
def test_blocks_come_nearer_to_the_dense_ones(llama: Path, packer: str, symmetric: bool) -> None:
    quant, outputs = Quant(bits=2, packer=packer, group=16, symmetric=symmetric, passes=4), {}
    wanted = dense(llama)(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    for each in ("gptq", packer):
        model = dense(llama)
        rows, _, _ = compress.compress(
            model, Quant(bits=2, packer="gptq", group=16, symmetric=symmetric) if each == "gptq" else quant, torch.float16, IDS
        )
        outputs[each] = float((model(input_ids=IDS, output_hidden_states=True).hidden_states[-1] - wanted).square().mean())
    assert outputs[packer] < 0.9 * outputs["gptq"]
    assert all("before it was trained" in row["note"] and row["error"] > 0 for row in rows) and len(rows) == 3 * 7
    again = dense(llama)
    compress.compress(again, quant, torch.float16, IDS)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)  # the same seed, the same codes


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2", "gpt_neox"])
@torch.no_grad()
def test_experts_biases_and_joined_projections(tmp_path: Path, family: str) -> None:
    """Steps of one short window, which do not reach every expert."""
    folder = toys.make(
        tmp_path / family, family, **({"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 1} if "moe" in family else {})
    )
    wanted, errors = dense(folder)(input_ids=IDS).logits, []
    for packer in ("gptq", "block"):
        model = dense(folder)
        quant = Quant(bits=2, packer=packer, group=16, **({"passes": 4, "windows": 1} if packer == "block" else {}))
        compress.compress(model, quant, torch.float16, IDS[:, :4].repeat(8, 1) if "moe" in family else IDS)
        errors.append(float((model(input_ids=IDS).logits - wanted).square().mean()))
    assert all(map(math.isfinite, errors)) and (errors[1] < errors[0] or "moe" in family)


def test_what_the_end_loss_feels_decides_what_is_learned(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for share in (reconstruct.FELT, 0.0):
        monkeypatch.setattr(reconstruct, "FELT", share)
        model = dense(llama)
        compress.compress(model, Quant(bits=2, group=16, packer="block", passes=2), torch.float16, IDS)
        found.append({name: layer.words for name, layer in linear.packed_linears(model).items()})
    assert any(not torch.equal(words, found[1][name]) for name, words in found[0].items())


def test_a_loss_that_is_not_finite_keeps_the_start(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = dense(llama), dense(llama)
    compress.compress(plain, Quant(bits=3, group=16), torch.float16, IDS)
    monkeypatch.setattr(reconstruct.RoundedLinear, "settle", lambda self: self.stretch.data.fill_(1e30))
    compress.compress(model, Quant(bits=3, group=16, packer="block", passes=1), torch.float16, IDS)
    for name, layer in linear.packed_linears(plain).items():
        assert torch.equal(layer.words, linear.packed_linears(model)[name].words), name


def test_a_block_that_does_not_come_nearer_stays_as_it_was(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = dense(llama), dense(llama)
    compress.compress(plain, Quant(bits=3, group=16), torch.float16, IDS)
    monkeypatch.setattr(reconstruct.RoundedLinear, "settle", lambda self: self.position.data.normal_())
    compress.compress(model, Quant(bits=3, group=16, packer="block", passes=1), torch.float16, IDS)
    for name, layer in linear.packed_linears(plain).items():
        assert torch.equal(layer.words, linear.packed_linears(model)[name].words), name


def test_some_linears_may_be_trained_and_pruned_weights_stay_zero(llama: Path) -> None:
    model = dense(llama)
    with torch.no_grad():
        for layer in linear.linears(model.model.layers).values():
            layer.weight[:, ::3] = 0
    quant = Quant(bits=3, packer="block", group=16, symmetric=False, passes=1, layers={"re:o_proj": "3bit:gptq"})
    rows, _, _ = compress.compress(model, quant, torch.float16, IDS, keep_zeros=True)
    assert all(bool((layer.packed().dequantize()[:, ::3] == 0).all()) for layer in linear.packed_linears(model).values())
    assert {row["name"].rpartition(".")[2] for row in rows if "before it was trained" not in row["note"]} == {"o_proj"}


def test_gradients_of_wide_layers_are_far_above_what_adam_takes_for_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(512, 2048, bias=False), torch.nn.SiLU(), torch.nn.Linear(2048, 512, bias=False))
    x, found = torch.randn(2, 64, 512), list[float]()
    real = torch.autograd.grad

    def seen(*args: Any, **more: Any) -> Any:
        out = real(*args, **more)
        found.append(float(out[0].abs().median()))
        return out

    monkeypatch.setattr(torch.autograd, "grad", seen)
    inputs, targets = SimpleNamespace(hidden=[x], batches=[x], arguments=[{2: {}}]), SimpleNamespace(hidden=[block(x).detach()])
    layers = {str(i): block[i] for i in (0, 2)}
    for leaf, layer in layers.items():
        packed = rtn.pack(layer.weight.detach(), None, Quant(bits=3, packer="rtn"), 128, torch.float16)[0]
        linear.swap(block, leaf, linear.to_packed(layer, packed))
    quant = Quant(bits=3, packer="block", passes=1)
    reconstruct.Reconstruction(targets, quant, 0, [torch.eye(512)]).train(block, 0, layers, dict.fromkeys(layers), dict.fromkeys(layers), inputs)
    assert found and min(found) > 1e-5  # Adam's epsilon is 1e-8


def test_calibration_knows_what_blocks_get_with_parts_of_a_batch(llama: Path) -> None:
    model = dense(llama)
    found = Calibration(model, model.model.layers, IDS[:5], part=2)
    assert len(found.hidden) == 1 and set(found.arguments[0]) == {5, 2, 1}


@pytest.mark.parametrize("killed", [False, True])
def test_by_blocks_and_killed_it_gives_the_same_bytes(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    asked = toys.recipe(llama, quant__packer="block", quant__bits=2, quant__passes=1)
    pipeline.run(asked.with_(memory="whole"), tmp_path / "whole")
    real = compress._pack_block
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr(compress, "_pack_block", lambda block, index, *rest: real(block, index, *rest) if index < 2 else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pipeline.run(asked.with_(memory="blocks", data__activations="disk"), tmp_path / "blocks")
    assert pipeline.run(asked.with_(memory="blocks", data__activations="disk"), tmp_path / "blocks")["resumed"] == killed
    assert toys.sums(tmp_path / "whole") == toys.sums(tmp_path / "blocks")


def test_what_cannot_be_is_said_before_any_work(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = toys.recipe(llama, quant__packer="block")
    with pytest.raises(RecipeError, match="finds paths beside weights"):
        pipeline.run(asked.with_(tune__method="lora", tune__start="loftq"), tmp_path / "out")
    with pytest.raises(RecipeError, match="cannot be recomputed once it is packed"):
        pipeline.run(asked.with_(memory="blocks", data__activations="recompute"), tmp_path / "out")
    monkeypatch.setattr(world, "size", lambda: 2)
    with pytest.raises(RecipeError, match="trains blocks in one process"):
        compress.check_trains(asked.quant, "zero")
