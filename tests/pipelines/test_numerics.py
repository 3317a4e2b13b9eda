"""Whole runs on models that numbers break on: what is told names the layer, and what is written is finite; packers alone: tests/test_numerics.py."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import CompressorError, ModelError, NumericError
from compressor.pipelines import writers
from compressor.pipelines.export import export
from compressor.pipelines.projection import Target
from compressor.pipelines.run import run
from compressor.recipe import Recipe
from tests.pipelines.foreign_folders import dense_folder

DOWN, QUERY, NORM = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.post_attention_layernorm"


@pytest.fixture
def damaged(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    """Maker of a model of which one tensor is changed."""

    def make(name: str, change: Callable[[Tensor], object]) -> Path:
        folder = dense_folder(tmp_path / "dense", tokenizer, torch.float32)
        tensors = load_file(folder / "model.safetensors")
        change(tensors[f"{name}.weight"])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def go(model: Path, quant: dict[str, Any], **tune: Any) -> tuple[Path, dict[str, Any]]:
    """The folder of a short run and its report."""
    out = model.with_name("out")
    text = str(model / "notes.txt")
    recipe = Recipe.from_dict(
        {
            "model": str(model), "quant": quant, "data": {"data": text, "outside": text, "nsamples": 2, "seqlen": 32},
            "tune": {"steps": 2, "batch": 2, "eval_every": 1} | tune, "eval": {"max_tokens": 64},
        }
    )  # fmt: skip
    run(recipe, out)
    return out, json.loads((out / "report.json").read_text())


def finite(folder: Path) -> bool:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())


@pytest.mark.parametrize(
    ("quant", "tune"),
    [
        ({"packer": "gptq", "group": 32}, {"method": "peqa"}),
        ({"packer": "rtn", "group": 32, "symmetric": False, "bits": 2}, {"method": "peqa", "parametrization": "absolute"}),
        ({"packer": "sketch"}, {"method": "table"}),
        ({"packer": "squeezellm"}, {"method": "table", "parametrization": "absolute"}),
        ({"packer": "rtn", "group": 32, "bits": 4}, {"method": "qalora"}),
        ({"packer": "gptq", "group": 32, "bits": 4}, {"method": "lora", "start": "loftq", "rank": 2}),
    ],
    ids=lambda each: "-".join(str(v) for v in each.values()),
)
def test_blocks_of_zeros_are_packed_and_tuned(damaged: Callable[..., Path], quant: dict[str, Any], tune: dict[str, Any]) -> None:
    folder, report = go(damaged(DOWN, Tensor.zero_), quant, **tune)
    assert finite(folder) and report["training"].get("notes", []) == [] and all(row["loss"] for row in report["training"]["curve"])
    row = next(row for row in report["layers"] if row["name"] == DOWN)
    assert row["error"] == 0 and "not finite" not in str(report.get("notes"))


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        (DOWN, lambda w: w[3].fill_(math.nan), ModelError, f"{DOWN}.weight holds NaN or infinite"),
        (NORM, lambda w: w.fill_(1e30), NumericError, "is not finite: the model does not predict; first seen in model.layers.1.mlp"),
        (DOWN, lambda w: w.mul_(1e-8), NumericError, f"{DOWN}: weights of at most .* below what float16 values resolve: use --scale-dtype float32"),
        (DOWN, lambda w: w.mul_(1e8), NumericError, f"{DOWN}: weights up to .* beyond the range of float16: use --scale-dtype bfloat16"),
    ],
    ids=["nan", "activations", "tiny", "huge"],
)
def test_what_cannot_be_is_one_sentence_with_the_layer(damaged: Callable[..., Path], name: str, change: Any, kind: type, message: str) -> None:
    model = damaged(name, change)
    with pytest.raises(kind, match=message) as caught:
        go(model, {"packer": "rtn", "group": 32})
    assert type(caught.value) is kind and not model.with_name("out").exists()


def test_the_advice_works_and_float16_formats_say_no(damaged: Callable[..., Path], tmp_path: Path) -> None:
    folder, report = go(damaged(DOWN, lambda w: w.mul_(1e-8)), {"packer": "rtn", "group": 32, "bits": 4, "scale_dtype": "float32"})
    row = next(row for row in report["layers"] if row["name"] == DOWN)
    assert 0 < row["error"] < 0.2
    for to, why in (("gptq", f"scales of {DOWN} are so small"), ("gguf:q4_0", f"{DOWN}: its weights are below what GGUF q4_0 resolves")):
        if to == "gptq" or pytest.importorskip("gguf"):
            with pytest.raises(ModelError, match=why):
                export(str(folder), tmp_path / "export", Target(to, device="cpu", consumers=False))
    assert not (tmp_path / "export").exists()


def test_dora_refuses_rows_of_zeros(damaged: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=f"1 of the 64 rows of {QUERY} are zero, and dora divides by their size"):
        go(damaged(QUERY, lambda w: w[5].zero_()), {"packer": "rtn", "group": 32}, method="dora", rank=2)


@pytest.mark.parametrize("to", [*writers.FOLDERS, "gguf:q4_0", "gguf:q4_1", "gguf:q4_k", "gguf:q3_k", "gguf:q2_k", "gguf:q8_0"])
def test_formats_hold_hard_weights_or_say_why(to: str) -> None:
    from tests.test_numerics import changed, pack

    pytest.importorskip("gguf")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "num_attention_heads": 4}
    writer = writers.of(to)
    assert writer is not None
    wide = lambda w: w.repeat(2, 4)[:16]  # [16, 256]
    for change in (Tensor.zero_, lambda w: w[3].zero_(), lambda w: w[:, 5].mul_(1000), lambda w: w[::2].mul_(1e-7), lambda w: w.fill_(0.25)):
        weight, _ = pack(wide(changed(change)), None, "rtn", 4, True)
        if why := writers.lacks(writer, {DOWN: weight}) or writer.fits(config, {DOWN: weight}):
            assert DOWN in why or "it is" in why
            continue
        try:
            error = writers.loss(weight, writer.held(weight))
        except CompressorError as caught:
            assert "choose" in str(caught)
            continue
        assert 0 <= error < 0.35


def test_a_block_of_which_all_linears_stay_dense(damaged: Callable[..., Path]) -> None:
    for packer in ("rtn", "gptq"):
        model = damaged(DOWN, lambda w: w)
        _, report = go(model, {"packer": packer, "group": 32, "ignore": [r"layers\.0\."]})
        assert {row["name"].split(".")[2] for row in report["layers"]} == {"1"}
        shutil.rmtree(model.with_name("out"))
