"""Loading: names, checks of damaged folders before anything is loaded, packed folders filled completely."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import ModelError, UserError
from compressor.linear import packed_linears
from compressor.pipelines import compress, load, write
from compressor.recipe import Quant


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return Path(shutil.copytree(load.TINY, tmp_path / "dense"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load.load("tiny", "cpu")
    write.round_to_folder(loaded)
    compress.compress(loaded.model, Quant(packer="rtn"), torch.float16, None)
    folder = tmp_path_factory.mktemp("packed")
    write.write_folder(loaded, folder)
    return folder


def test_tiny_is_what_its_card_says() -> None:
    loaded = load.load("tiny", "cpu")
    assert 1_000_000 <= loaded.model.num_parameters() <= 2_000_000
    assert all(m.in_features % 128 == 0 for m in loaded.model.modules() if isinstance(m, torch.nn.Linear))
    assert loaded.config["tie_word_embeddings"] is True
    assert sum(p.stat().st_size for p in load.TINY.iterdir()) < 10_000_000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "there is no model folder"),
        ("/no/such/folder", "there is no model folder"),
        ("llama-9b", "unknown model"),
        ("", "unknown model"),
    ],
)
def test_unknown_names(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load.resolve(name)


def test_hub_ids_are_fetched_and_failures_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fetch(repo: str, **_: object) -> str:
        asked.append(repo)
        if repo == "org/gone":
            raise RuntimeError("404 Client Error\nmore lines")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load.resolve("Llama-7B") == tmp_path
    with pytest.raises(ModelError, match="could not be fetched from the hub: 404 Client Error$"):
        load.resolve("org/gone")
    assert asked == ["huggyllama/llama-7b", "org/gone"]


def test_missing_and_damaged_files(dense: Path) -> None:
    weights = dense / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="truncated"):
        load.load(str(dense), "cpu")
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="header cannot be read"):
        load.load(str(dense), "cpu")
    weights.unlink()
    with pytest.raises(ModelError, match="no safetensors files"):
        load.load(str(dense), "cpu")
    (dense / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled"):
        load.load(str(dense), "cpu")
    (dense / "config.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        load.load(str(dense), "cpu")
    (dense / "config.json").unlink()
    with pytest.raises(ModelError, match="no config.json"):
        load.load(str(dense), "cpu")


def test_not_a_causal_lm(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="LlamaForSequenceClassification, not a causal language model"):
        load.load(str(dense), "cpu")


def test_missing_weights_are_an_error_not_random_numbers(dense: Path) -> None:
    tensors = load_file(dense / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights, they would be random: model.layers.0.mlp.up_proj.weight"):
        load.load(str(dense), "cpu")


def test_packed_folder_loads_packed_and_whole(packed: Path) -> None:
    loaded = load.load(str(packed), "cpu")
    layers = packed_linears(loaded.model)
    assert len(layers) == 7 * 4
    assert all(layer.scale.dtype == torch.float16 for layer in layers.values())
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight  # tied, and stored once


def test_packed_folder_with_a_missing_or_foreign_tensor(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "x"))
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks weights: model.norm.weight"):
        load.load(str(folder), "cpu")
    save_file(tensors | {"model.norm.weight": gone, "model.extra": gone.clone()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="model.extra"):
        load.load(str(folder), "cpu")


def test_dtypes_of_the_output_folder() -> None:
    assert load.folder_dtype({"dtype": "bfloat16", "model_type": "llama"}) == torch.float16
    assert load.folder_dtype({"dtype": "bfloat16", "model_type": "gemma2"}) == torch.bfloat16
    assert load.folder_dtype({"torch_dtype": "float32", "model_type": "llama"}) == torch.float32
    assert load.scale_dtype("auto", {"dtype": "bfloat16", "model_type": "gemma2"}) == torch.bfloat16
    assert load.scale_dtype("float32", {"dtype": "bfloat16", "model_type": "gemma2"}) == torch.float32


def test_devices() -> None:
    assert load.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="unknown"):
        load.pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no GPU"):
            load.pick_device("cuda")
