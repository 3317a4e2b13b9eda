"""Loading: names, checks of damaged folders before anything is loaded, packed folders filled completely."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import CompressorError, ModelError, UserError
from compressor.linear import linears, packed_linears, swap, to_packed
from compressor.packed import PackedWeight, Table
from compressor.pipelines import checkpoint, compress, load, write
from compressor.recipe import Quant


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint.TINY, tmp_path / "dense"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load.load("tiny", "cpu")
    write.round_to_folder(loaded, set(linears(loaded.model)))
    compress.compress(loaded.model, Quant(packer="rtn"), torch.float16, None)
    folder = tmp_path_factory.mktemp("packed")
    write.write_folder(loaded, folder)
    return folder


def put_tables(loaded: load.Loaded, names: list[str]) -> None:
    """Swap linears of blocks for packed ones with random codes and tables near the weights they replace."""
    torch.manual_seed(0)
    for name in names:
        layer = loaded.model.get_submodule(name)
        n, k = layer.weight.shape
        values = Table((layer.weight.detach().std() * torch.randn(n, -(-k // 96), 8)).half())
        weight = PackedWeight.pack(torch.randint(0, 8, (n, k), dtype=torch.uint8), values, 3, 96)
        swap(loaded.model, name, to_packed(layer, weight))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A folder of tables, and the model that was written."""
    loaded = load.load("tiny", "cpu")
    write.round_to_folder(loaded, set(linears(loaded.model)))
    put_tables(loaded, [name for name in linears(loaded.model) if name != "lm_head"])
    folder = tmp_path_factory.mktemp("tables")
    facts = write.write_folder(loaded, folder)
    bits = write.bits_per_weight(load.packed_weights(loaded.model))
    assert facts == {"format": "compressor table", "verified": True, "layers": 28, "bits_per_weight": bits}
    return folder, loaded.model


def test_tiny_is_what_its_card_says() -> None:
    loaded = load.load("tiny", "cpu")
    assert 1_000_000 <= loaded.model.num_parameters() <= 2_000_000
    assert all(m.in_features % 128 == 0 for m in loaded.model.modules() if isinstance(m, torch.nn.Linear))
    assert loaded.config["tie_word_embeddings"] is True
    assert sum(p.stat().st_size for p in checkpoint.TINY.iterdir()) < 10_000_000


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
        checkpoint.resolve(name)


def test_hub_ids_are_fetched_and_failures_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fetch(repo: str, **_: object) -> str:
        asked.append(repo)
        if repo == "org/gone":
            raise RuntimeError("404 Client Error\nmore lines")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert checkpoint.resolve("Llama-7B") == tmp_path
    with pytest.raises(ModelError, match="could not be fetched from the hub: 404 Client Error$"):
        checkpoint.resolve("org/gone")
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
    assert all(layer.learned.dtype == torch.float16 for layer in layers.values())
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


def test_table_folder_loads_packed_and_computes_the_same(tables: tuple[Path, torch.nn.Module]) -> None:
    folder, model = tables
    loaded = load.load(str(folder), "cpu")
    layers = packed_linears(loaded.model)
    assert len(layers) == 7 * 4
    assert all(layer.table and layer.learned.dtype == torch.float16 for layer in layers.values())
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised as bitsandbytes; compressor reads folders of compressed-tensors and compressor"),
        ({"quant_method": ["x"]}, r"quantised as \['x'\]"),
        ({"quant_method": None}, "quantised as None"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors/table"),
        ({"version": 9}, "version 9"),
    ],
)
def test_unknown_formats_and_versions(tables: tuple[Path, torch.nn.Module], tmp_path: Path, change: dict, words: str) -> None:
    folder = Path(shutil.copytree(tables[0], tmp_path / "x"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        load.load(str(folder), "cpu")


def test_table_of_another_shape_than_the_layer(tables: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tables[0], tmp_path / "x"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_shape"][1] -= 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj has shape \(384, 127\), the model wants \(384, 128\)"):
        load.load(str(folder), "cpu")


def test_a_model_of_scales_and_tables_fits_no_format(tmp_path: Path) -> None:
    loaded = load.load("tiny", "cpu")
    compress.compress(loaded.model, Quant(packer="rtn"), torch.float16, None)
    dense = load.load("tiny", "cpu")
    name = "model.layers.0.mlp.up_proj"
    put_tables(dense, [name])
    swap(loaded.model, name, dense.model.get_submodule(name))
    with pytest.raises(CompressorError, match=r"1 of its 28 packed layers hold tables.*27 of its 28 packed layers hold scales"):
        write.write_folder(loaded, tmp_path / "x")
    assert not list((tmp_path / "x").glob("*"))


def test_dtypes_of_the_output_folder() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert load.folder_dtype(bf16, {"model_type": "llama"}) == fp16
    assert load.folder_dtype(bf16, {"model_type": "gemma2"}) == bf16
    assert load.folder_dtype(fp32, {"model_type": "llama"}) == fp32
    assert load.scale_dtype("auto", bf16) == bf16
    assert load.scale_dtype("auto", fp32) == load.scale_dtype("auto", fp16) == fp16
    assert load.scale_dtype("float32", bf16) == fp32


def test_the_dtype_is_read_from_the_weights_not_from_the_configuration(dense: Path) -> None:
    assert checkpoint.stored_dtype(dense) == torch.bfloat16
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"dtype": "nonsense"}))
    assert checkpoint.stored_dtype(dense) == torch.bfloat16
    del config["dtype"]
    (dense / "config.json").write_text(json.dumps(config))
    assert load.load(str(dense), "cpu").dtype == torch.float16


def test_weights_beyond_float16_keep_their_dtype(dense: Path) -> None:
    tensors = load_file(dense / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    assert load.load(str(dense), "cpu").dtype == torch.bfloat16


def test_fingerprint_sees_every_byte_of_weights_and_tokenizer_and_nothing_else(dense: Path) -> None:
    first = checkpoint.fingerprint(dense)
    (dense / "notes.txt").write_text("not of the model")
    (dense / "consolidated.safetensors").write_bytes(b"0" * 1000)
    assert checkpoint.fingerprint(dense) == first
    assert checkpoint.model_bytes(dense) == checkpoint.model_bytes(checkpoint.TINY)
    whole = bytearray((dense / "model.safetensors").read_bytes())
    whole[len(whole) // 2] ^= 1
    (dense / "model.safetensors").write_bytes(whole)
    second = checkpoint.fingerprint(dense)
    assert second != first
    (dense / "tokenizer.json").write_text((dense / "tokenizer.json").read_text() + " ")
    assert checkpoint.fingerprint(dense) != second


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{}", "damaged"),
        ("not json", "damaged"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "no safetensors file of this folder"),
        ('{"weight_map": {"a": ".."}}', "no safetensors file of this folder"),
        ('{"weight_map": {"a": "model-folder.safetensors"}}', "is a folder, where a file of weights should be"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "missing although the index names it"),
    ],
)
def test_hostile_indexes(dense: Path, index: str, words: str) -> None:
    (dense / "model.safetensors").unlink()
    (dense / "model-folder.safetensors").mkdir()
    (dense / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=words):
        load.load(str(dense), "cpu")


@pytest.mark.parametrize(
    "change", [{"vocab_size": None}, {"hidden_size": "x"}, {"quantization_config": "x"}, {"num_attention_heads": "many"}, {"architectures": "Foo"}]
)
def test_odd_configurations_are_one_sentence(dense: Path, change: dict) -> None:
    config = json.loads((dense / "config.json").read_text()) | change
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load.load(str(dense), "cpu")
    (dense / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="no mapping"):
        load.load(str(dense), "cpu")


def test_layers_left_dense_are_rounded_before_they_are_measured(tmp_path: Path) -> None:
    loaded = load.load("tiny", "cpu")
    quant = Quant(packer="rtn", ignore=("down_proj",))
    write.round_to_folder(loaded, {t.name for t in compress.plan(loaded.model, quant).packed()})
    compress.compress(loaded.model, quant, torch.float16, None)
    write.write_folder(loaded, tmp_path)
    again = load.load(str(tmp_path), "cpu")
    ids = torch.randint(1, 2000, (1, 32))
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, again.model(ids).logits)


def test_a_bias_that_is_missing_from_a_packed_folder_is_an_error(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**small, vocab_size=2048, tie_word_embeddings=True)).save_pretrained(tmp_path / "dense")
    for path in checkpoint.TINY.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "dense")
    loaded = load.load(str(tmp_path / "dense"), "cpu")
    quant = Quant(packer="rtn", group=32)
    compress.compress(loaded.model, quant, torch.float16, None)
    write.write_folder(loaded, tmp_path / "packed")
    load.load(str(tmp_path / "packed"), "cpu")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    save_file(tensors, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(ModelError, match=r"q_proj lacks its bias"):
        load.load(str(tmp_path / "packed"), "cpu")


def test_devices() -> None:
    assert load.pick_device("cpu") == torch.device("cpu")
    for name in ("abacus", "meta", "mps"):
        with pytest.raises(UserError, match="unknown"):
            load.pick_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no GPU"):
            load.pick_device("cuda")


@pytest.mark.parametrize("packed", [False, True])
def test_sixteen_bits_leave_what_a_model_computes_for_itself_exact(packed: bool) -> None:
    model = load.load("tiny", "cpu").model
    if packed:
        compress.compress(model, Quant(packer="rtn", scale_dtype="float32"), torch.float32, None)
    exact = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    assert exact
    load.cast(model, torch.float16)
    assert {name: buffer.dtype for name, buffer in model.named_buffers() if name in exact} == dict.fromkeys(exact, torch.float32)
    assert model.get_input_embeddings().weight.dtype == model.lm_head.weight.dtype == torch.float16
    if packed:
        assert {weight.learned.dtype for weight in load.packed_weights(model).values()} == {torch.float32}
    assert torch.isfinite(model(torch.arange(1, 9).unsqueeze(0)).logits).all()
