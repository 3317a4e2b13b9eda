"""A model of which one block at a time is in memory computes, packs and writes what the same model does in one piece."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor import linear, stored
from compressor.errors import ModelError, RecipeError
from compressor.export import shards
from compressor.pipelines import calibrate, estimate, load
from compressor.pipelines import run as pipeline
from compressor.pipelines.blockwise import opening, peaks
from compressor.pipelines.blockwise.blocks import FAMILIES, Blocks
from compressor.pipelines.measure import divergence
from compressor.pipelines.show import Show
from compressor.recipe import Recipe
from tests.pipelines.toys import make, recipe, sums


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(tmp_path / request.param, request.param)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make(tmp_path / "llama", "llama")


def ids(count: int, window: int = 16) -> torch.Tensor:
    return torch.randint(5, 320, (count, window), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_every_family_gives_the_logits_of_the_whole_model(folder: Path) -> None:
    rows, whole = ids(5, 32), load.load(str(folder), "cpu").model
    found, blocks = opening.load_blocks(str(folder), "cpu")
    assert all(parameter.is_meta for parameter in blocks.list.parameters())
    exact = whole(input_ids=rows, use_cache=False).logits
    tail = blocks.logits(rows)
    assert torch.equal(torch.cat([tail(slice(0, 2)), tail(slice(2, 9))]), exact)
    assert torch.equal(found.model(input_ids=rows, use_cache=False).logits, exact)  # each block on demand
    assert all(parameter.is_meta for parameter in blocks.list.parameters())


@pytest.mark.parametrize("keeping", ["memory", "disk", "recompute"])
@torch.no_grad()
def test_hidden_states_may_wait_anywhere(llama: Path, tmp_path: Path, keeping: str) -> None:
    _, blocks = opening.load_blocks(str(llama), "cpu")
    blocks.scratch, blocks.keeping = tmp_path / "states", keeping
    rows = ids(600)  # more than a batch
    assert torch.equal(blocks.logits(rows)(slice(500, 600)), load.load(str(llama), "cpu").model(input_ids=rows[500:], use_cache=False).logits)
    walk = blocks.calibration(rows)
    assert any((tmp_path / "states").glob("walk-*/*")) == (keeping == "disk") and len(walk.hidden) == 2
    del walk
    gc.collect()
    assert not list((tmp_path / "states").glob("walk-*"))  # hidden states go with who kept them


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "num_hidden_layers": 2}
PAIRS = [{"prompt": f"Question: {i}", "completion": f" the ship left the harbour {i} times"} for i in range(200)]


@pytest.mark.parametrize(
    ("family", "packer", "changes"),
    [
        ("llama", "rtn", {}),
        ("llama", "gptq", {"data__activations": "disk"}),
        ("llama", "sketch", {"quant__group": 128}),
        ("qwen2_moe", "gptq", {"data__activations": "disk"}),
        ("llama", "gptq", {"data__data": "pairs.jsonl", "data__activations": "recompute"}),
    ],
)
def test_a_run_writes_the_same_bytes(family: str, packer: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "HELD", 4096)  # so that tensors are written as they come
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    model = make(tmp_path / "model", family, **MIXTURE if family == "qwen2_moe" else {})
    asked, done = recipe(model, quant__packer=packer, **{key: value for key, value in changes.items() if key != "data__activations"}), {}
    for memory in ("whole", "blocks"):
        more = {key: value for key, value in changes.items() if memory == "blocks" and key == "data__activations"}
        done[memory] = pipeline.run(asked.with_(memory=memory, **more), tmp_path / memory)
    assert sums(tmp_path / "whole") == sums(tmp_path / "blocks") and not (tmp_path / "blocks.partial").exists()
    whole, report = (json.loads((tmp_path / memory / "report.json").read_text()) for memory in ("whole", "blocks"))
    assert report["expected"]["compress"] > 0 and any("no samples" in note for note in report["notes"])
    assert report["packed"]["divergence"]["windows"] == whole["packed"]["divergence"]["windows"]
    assert ("experts" in report) == (family == "qwen2_moe") and report.get("experts") == whole.get("experts")
    for state in ("dense", "packed"):
        one, other = (done[memory][state]["domain"]["perplexity"] for memory in ("whole", "blocks"))
        assert one == pytest.approx(other, rel=1e-6)
        assert done["whole"][state]["folder_bytes"] == done["blocks"][state]["folder_bytes"]


@pytest.mark.parametrize("first", ["whole", "blocks"])
def test_a_killed_packing_goes_on_in_the_other_mode(llama: Path, tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(llama, eval__max_tokens=128)
    pipeline.run(asked.with_(memory=first), tmp_path / "whole")
    from compressor.pipelines import compress

    real, packed = compress._pack_block, list[int]()

    def pack(block: Any, index: int, *rest: Any) -> Any:
        packed.append(index)
        return real(block, index, *rest) if packed != [0, 1] else 1 / 0

    monkeypatch.setattr(compress, "_pack_block", pack)
    with pytest.raises(ZeroDivisionError):
        pipeline.run(asked.with_(memory=first), tmp_path / "other")
    second = {"whole": "blocks", "blocks": "whole"}[first]
    assert pipeline.run(asked.with_(memory=second), tmp_path / "other")["resumed"] and packed == [0, 1, 1, 2]
    assert sums(tmp_path / "whole") == sums(tmp_path / "other")


def test_a_run_goes_on_behind_the_last_packed_block_and_may_then_tune(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(llama, memory="blocks", tune__method="peqa", tune__steps=2, tune__batch=2)
    whole = pipeline.run(asked.with_(memory="whole"), tmp_path / "whole")
    from compressor.pipelines import compress

    real = compress._pack_block
    monkeypatch.setattr(compress, "_pack_block", lambda block, index, *rest: real(block, index, *rest) if index < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.run(asked, tmp_path / "blocks")
    monkeypatch.setattr(compress, "_pack_block", lambda block, index, *rest: real(block, index, *rest) if index == 2 else 1 / 0)
    assert pipeline.run(asked, tmp_path / "blocks")["resumed"]
    assert sums(tmp_path / "whole") == sums(tmp_path / "blocks") and whole["tuned"]


@pytest.mark.parametrize("resumed", [False, True])
def test_tuning_gives_the_same_bytes_with_a_large_head(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool) -> None:
    monkeypatch.setattr(stored, "LARGE", 1)
    monkeypatch.setattr(stored, "SLICE", 640)
    asked = recipe(
        llama, quant__packer="rtn", quant__scale_dtype="float32", tune__method="peqa", tune__steps=6, tune__lr=1e-3, tune__checkpoint_every=2
    )
    pipeline.run(asked.with_(memory="whole"), tmp_path / "whole")
    if resumed:  # a run that began in one piece goes on by blocks
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.Tuning, "finish", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pipeline.run(asked.with_(memory="whole"), tmp_path / "blocks")
    pipeline.run(asked.with_(memory="blocks"), tmp_path / "blocks")
    assert sums(tmp_path / "whole") == sums(tmp_path / "blocks")


def test_the_peak_that_is_said_counts_experts_and_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = make(tmp_path / "mixture", "qwen3_moe", moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2)
    found = {}
    for most in (0, 1 << 40):
        monkeypatch.setattr(calibrate, "SUMS", most)
        shell = estimate.shell(mixture)
        tokens = peaks.Tokens(6, 32, 4, 32)
        found[most] = peaks.peaks(recipe(mixture), shell, torch.device("cpu"), torch.bfloat16, torch.float16, tokens, 0)["compress"]
    assert found[1 << 40] - found[0] == 4 * 4 * 48**2  # the downs of four experts
    monkeypatch.undo()
    asked = recipe(mixture, memory="blocks", tune__method="peqa", tune__steps=1)
    found = pipeline.dry_run(asked, tmp_path / "out", Show())["peak_bytes"]
    assert found["tune"] > 0 and "export" in found


def test_what_cannot_go_block_by_block_is_said(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="choice of widths measures the whole model"):
        pipeline.run(recipe(llama, memory="blocks", choose__target_bits=3.0), tmp_path / "out")
    config = json.loads((llama / "config.json").read_text())
    assert not opening.wanted(recipe(llama), config, llama, 1 << 20, torch.device("cpu"))
    assert opening.wanted(recipe(llama), config, llama, 1 << 60, torch.device("cpu"))
    assert not opening.wanted(recipe(llama), config | {"model_type": "strange"}, llama, 1 << 60, torch.device("cpu"))
    save_file({"experts": torch.zeros(2, 2, 2)}, llama / "model-fused.safetensors", metadata={"format": "pt"})
    assert opening.why_not(recipe(llama), config, llama) is None  # not a file of the model
    (llama / "model.safetensors").rename(llama / "away")
    (llama / "model-fused.safetensors").rename(llama / "model.safetensors")
    assert "in one tensor" in str(opening.why_not(recipe(llama), config, llama))
    (llama / "away").rename(llama / "model.safetensors")
    assert not opening.wanted(recipe(llama, memory="whole"), config, llama, 1 << 60, torch.device("cpu"))


def test_whether_it_fits_counts_what_the_run_adds(llama: Path) -> None:
    config, cpu = json.loads((llama / "config.json").read_text()), torch.device("cpu")
    weights = sum(t.numel() * 4 for t in load_file(llama / "model.safetensors").values())
    few, many = (estimate.whole_bytes(recipe(llama, data__nsamples=count), llama, config, cpu, 32) for count in (1, 1 << 24))
    assert weights < few < many and many >= weights + (1 << 24) * 32 * 32 * 4


def test_free_memory_heeds_control_groups_but_not_what_they_hold_of_files(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    most = opening.free_bytes(cpu, tmp_path)
    for name, text in (("memory.max", "5000000\n"), ("memory.current", "4000000\n"), ("memory.stat", "anon 1000000\nfile 3000000\n")):
        (tmp_path / name).write_text(text)
    assert opening.free_bytes(cpu, tmp_path) == 4_000_000 < most
    (tmp_path / "memory.max").write_text("max\n")
    assert opening.free_bytes(cpu, tmp_path) > 4_000_000


def test_a_dry_run_tells_the_memory_of_blocks_and_what_cannot_be(llama: Path, tmp_path: Path) -> None:
    found = {memory: pipeline.dry_run(recipe(llama, memory=memory), tmp_path / "out", Show()) for memory in ("whole", "blocks")}
    assert "export" in found["blocks"]["peak_bytes"] and "export" not in found["whole"]["peak_bytes"]
    pipeline.run(recipe(llama, quant__packer="rtn"), tmp_path / "packed")
    tuned = Recipe(model=str(tmp_path / "packed"), memory="blocks").with_(quant__packer="kept", tune__method="peqa", tune__steps=1)
    with pytest.raises(RecipeError, match="packs none"):
        pipeline.run(tuned, tmp_path / "out")


def test_tensors_that_the_model_does_not_know_do_not_count(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors") | {"model.layers.0.self_attn.masked_bias": torch.tensor([-torch.inf])}
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    assert opening.load_blocks(str(llama), "cpu")[0].dtype == load.load(str(llama), "cpu").dtype


def test_the_floor_of_a_model_with_16_bit_embeddings_is_that_of_float32(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.run(recipe(llama, quant__packer="rtn"), tmp_path / "packed")
    rows = ids(2)
    with torch.no_grad():
        plain = divergence.floor(load.load(str(tmp_path / "packed"), "cpu").model, torch.float16, rows, rows)["rounding"]
        monkeypatch.setattr(stored, "LARGE", 1000)
        found = divergence.floor(load.load(str(tmp_path / "packed"), "cpu").model, torch.float16, rows, rows)["rounding"]
    assert found["how"] == plain["how"] and found["mean"] == pytest.approx(plain["mean"], rel=0.2) and found["mean"] > 0


@pytest.mark.parametrize("damage", ["nan", "absent"])
def test_damaged_weights_are_named(llama: Path, damage: str) -> None:
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = torch.nan
    if damage == "absent":
        del tensors[name]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name):
        opening.load_blocks(str(llama), "cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_large_vocabularies_stay_in_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    folder = make(tmp_path / "llama", "llama", tie_word_embeddings=tied)
    exact = load.load(str(folder), "cpu").model
    monkeypatch.setattr(stored, "LARGE", 1000)
    monkeypatch.setattr(stored, "SLICE", 96)
    found, blocks = opening.load_blocks(str(folder), "cpu")
    model: Any = found.model
    assert model.lm_head.weight.dtype == torch.bfloat16 and (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    blocks.settle()
    assert Blocks.of(model) is None and not any(parameter.is_meta for parameter in model.parameters())
    rows = ids(2)
    assert torch.allclose(model(input_ids=rows).logits, exact(input_ids=rows).logits, rtol=0, atol=1e-5)
    x = torch.randn(3, 32, requires_grad=True)
    (a,) = torch.autograd.grad(model.lm_head(x).square().sum(), x)
    (b,) = torch.autograd.grad(exact.lm_head(x).square().sum(), x)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-4)


def test_a_packed_folder_with_a_large_vocabulary_tunes_on_16_bit_embeddings(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.run(recipe(llama, quant__packer="rtn"), tmp_path / "packed")
    before = load.load(str(tmp_path / "packed"), "cpu").model
    monkeypatch.setattr(stored, "LARGE", 1000)
    after: Any = load.load(str(tmp_path / "packed"), "cpu").model
    assert after.lm_head.weight.dtype == torch.float16 and linear.packed_linears(after)
    rows = ids(2)
    assert torch.allclose(before(input_ids=rows).logits, after(input_ids=rows).logits, rtol=0, atol=1e-5)
