"""Logits through the libraries of others: right folders agree, wrong ones are told, and whatever a library does ends in a Check."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor import linear
from compressor.errors import RecipeError
from compressor.export import compressed_tensors, dense, mlx, table
from compressor.integrations import consumers
from compressor.linear import packed_linears
from compressor.packed import Affine, PackedWeight, Table

IDS = torch.arange(3, 20).view(1, -1)
WEIGHTS = "model.safetensors"


def values(kind: str, n: int, k: int) -> Affine | Table:
    if kind == "table":
        return Table((0.1 * torch.randn(n, 1, 8)).half())
    scale = (0.02 + 0.02 * torch.rand(n, k // 32)).half()
    return Affine(scale, torch.randint(1, 8, scale.shape, dtype=torch.uint8) if kind == "asymmetric" else None)


def model_of(kind: str) -> Any:
    """A random LLaMA with every linear of its blocks packed to 3 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=99, initializer_range=0.2)).eval()
    for name, layer in linear.linears(model.model.layers).items():
        n, k = layer.weight.shape
        weight = PackedWeight.pack(torch.randint(0, 8, (n, k), dtype=torch.uint8), values(kind, n, k), 3, None if kind != "table" else k)
        linear.swap(model.model.layers, name, linear.to_packed(layer, weight))
    return model


def written(folder: Path, kind: str, write: Callable[..., Any], *more: Any) -> tuple[Path, Tensor]:
    """A folder of such a model, and the logits [T, V] of our forward."""
    model = model_of(kind)
    packed = packed_linears(model)
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(tuple(f"{p}." for p in packed))}
    config = json.loads(model.config.to_json_string()) | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    write(folder, config, [*own.items(), *((n, layer.packed()) for n, layer in packed.items())], *more)
    with torch.no_grad():
        return folder, model(IDS).logits[0]


def broken(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


FOLDERS = {
    "compressed-tensors": ("symmetric", compressed_tensors.write, ["lm_head"]),
    "compressed-tensors, asymmetric": ("asymmetric", compressed_tensors.write, ["lm_head"]),
    "table": ("table", table.write, ["lm_head"]),
    "dense": ("asymmetric", dense.write, torch.float32),
    "mlx": ("symmetric", mlx.write, ["lm_head"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_right_folders_agree(tmp_path: Path, name: str) -> None:
    kind = name.partition(",")[0]
    if not consumers.installed(kind):
        pytest.skip(consumers.needs(kind))
    folder, expected = written(tmp_path, *FOLDERS[name])
    found = consumers.measure(kind, folder, IDS, expected)
    assert found.good, found.line()
    bound = consumers.HALF if "asymmetric" in name else consumers.EXACT
    assert found.limit == pytest.approx(bound * float(expected.std()))
    assert f"{found.error:.1e}" in found.line()
    assert found.version[0].isdigit()


def test_a_process_of_its_own_gives_the_same(tmp_path: Path) -> None:
    folder, expected = written(tmp_path, *FOLDERS["compressed-tensors"])
    found = consumers.check("compressed-tensors", folder, IDS, expected)
    assert found is not None
    assert found.good, found.line()
    assert found.error == pytest.approx(consumers.measure("compressed-tensors", folder, IDS, expected).error, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("compressed-tensors", lambda t: t["model.layers.0.mlp.up_proj.weight_scale"][3].mul_(-1)),
        ("compressed-tensors, asymmetric", lambda t: t["model.layers.0.mlp.up_proj.weight_zero_point"][0].bitwise_xor_(7)),
        ("table", lambda t: t["model.layers.0.mlp.down_proj.weight_table"][5].mul_(2)),
        ("dense", lambda t: t["model.layers.0.self_attn.q_proj.weight"][7].mul_(-1)),
    ],
)
def test_other_weights_are_wrong(tmp_path: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    folder, expected = written(tmp_path, *FOLDERS[name])
    found = consumers.measure(name.partition(",")[0], broken(folder, change), IDS, expected)
    assert found.error is not None
    assert not found.good
    assert "WRONG" in found.line()


def test_what_would_be_random_is_refused(tmp_path: Path) -> None:
    folder, expected = written(tmp_path, *FOLDERS["dense"])
    broken(folder, lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    found = consumers.measure("dense", folder, IDS, expected)
    assert "missing keys: model.layers.0.mlp.up_proj.weight" in str(found.refused)
    assert not found.good
    assert "refused the folder" in found.line()


def test_an_unknown_quantization_is_refused_not_random(tmp_path: Path) -> None:
    folder, expected = written(tmp_path, *FOLDERS["compressed-tensors"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "of_another_world"
    (folder / "config.json").write_text(json.dumps(config))
    assert consumers.measure("dense", folder, IDS, expected).refused is not None


@pytest.mark.parametrize("kind", ["dense", "compressed-tensors", "gguf", "llama.cpp", "mlx", "gptq", "awq", "auto-gptq"])
def test_an_empty_folder_is_refused(tmp_path: Path, kind: str) -> None:
    assert consumers.measure(kind, tmp_path, IDS, torch.zeros(17, 99)).refused


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    folder, expected = written(tmp_path, *FOLDERS["dense"])
    assert "where (17, 98) was expected" in str(consumers.measure("dense", folder, IDS, expected[:, 1:]).refused)


def test_logits_that_are_not_finite_are_wrong(tmp_path: Path) -> None:
    folder, expected = written(tmp_path, *FOLDERS["dense"])
    broken(folder, lambda t: t["model.norm.weight"].fill_(float("nan")))
    found = consumers.measure("dense", folder, IDS, expected)
    assert found.error == float("inf")
    assert not found.good


def test_a_process_that_dies_or_stalls_is_a_refusal(tmp_path: Path) -> None:
    late = consumers.check("dense", tmp_path, IDS, torch.zeros(17, 99), seconds=0.01)
    assert late is not None
    assert "no logits after 0.01 seconds" in str(late.refused)
    dead = consumers.check("dense", tmp_path, IDS.float() * float("nan"), torch.zeros(17, 99))
    assert dead is not None
    assert dead.refused


def test_unknown_kinds_and_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="no library is known that reads 'exl3'; choose compressed-tensors"):
        consumers.check("exl3", tmp_path, IDS, torch.zeros(17, 99))
    monkeypatch.setattr(consumers, "find_spec", lambda name: None)
    assert consumers.check("mlx", tmp_path, IDS, torch.zeros(17, 99)) is None
    assert consumers.needs("mlx").startswith("pip install mlx-lm")
