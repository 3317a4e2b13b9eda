"""from_pretrained on a table folder: packed layers, the same numbers as our own loader, tables never rounded, and a folder again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor import linear
from compressor.errors import ModelError
from compressor.export import table
from compressor.linear import PackedLinear, packed_linears
from compressor.packed import PackedWeight, Table
from compressor.pipelines import checkpoint, load
from tests.integrations.damaged import refuses

SCHEMES = [(2, 64, torch.float16), (3, 64, torch.bfloat16), (4, 48, torch.float32), (3, 32, torch.float16), (2, 20, torch.bfloat16)]


def model_of_tables(kind: str = "llama", seed: int = 0) -> Any:
    """A random model of two blocks whose linears, of 64 and 96 columns, hold tables of every scheme in turn. Qwen2's projections have biases."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 1024, "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None}
    model = (LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))).eval()
    layers = linear.linears(model.model.layers)
    for index, (name, layer) in enumerate(layers.items()):
        bits, segment, dtype = SCHEMES[index % len(SCHEMES)]
        n, k = layer.weight.shape
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
        values = Table((0.2 * torch.randn(n, -(-k // segment), 1 << bits)).to(dtype))
        weight = PackedWeight.pack(torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8), values, bits, segment)
        linear.swap(model.model.layers, name, linear.to_packed(layer, weight))
    return model


def write(model: Any, folder: Path, **options: int) -> Path:
    packed = packed_linears(model)
    own = {n: t for n, t in model.state_dict().items() if n.endswith(".bias") or not n.startswith(tuple(f"{p}." for p in packed))}
    folder.mkdir()
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__], "dtype": "float32"}
    table.write(folder, config, [*own.items(), *((n, layer.packed()) for n, layer in packed.items())], ["lm_head"], **options)
    for path in checkpoint.TINY.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(66).view(2, 33)).logits


def auto(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def equal(a: Any, b: Any) -> bool:
    """Whether two models hold the same packed weights and dtypes."""
    left, right = packed_linears(a), packed_linears(b)
    same = lambda x, y: torch.equal(x.words, y.words) and torch.equal(x.learned, y.learned) and x.learned.dtype == y.learned.dtype
    return bool(left) and left.keys() == right.keys() and all(same(left[n], right[n]) for n in left)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(model_of_tables(), tmp_path_factory.mktemp("hf") / "one")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"shard_bytes": 20_000}], ids=["one file", "shards"])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_the_model_is_ours_bit_for_bit(tmp_path: Path, kind: str, options: dict, device_map: str | None) -> None:
    made = model_of_tables(kind)
    write(made, tmp_path / "x", **options)
    ours, theirs = load.load(str(tmp_path / "x"), "cpu").model, auto(tmp_path / "x", dtype=torch.float32, device_map=device_map)
    assert equal(theirs, made)
    assert equal(theirs, ours)
    assert all(type(layer) is PackedLinear for layer in packed_linears(theirs).values())
    assert list(linear.linears(theirs)) == ["lm_head"]
    assert torch.equal(logits(theirs), logits(ours))
    assert torch.equal(logits(theirs), logits(made))


def test_greedy_generation_is_ours(folder: Path) -> None:
    ours, theirs = load.load(str(folder), "cpu").model, auto(folder, dtype=torch.float32)
    ids = torch.arange(14).view(2, 7)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(theirs.generate(ids, **options), ours.generate(ids, **options))
    static = theirs.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, ours.generate(ids, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_the_dtype_is_that_of_the_rest(folder: Path, dtype: Any) -> None:
    model = auto(folder, dtype=dtype)
    assert model.lm_head.weight.dtype == (torch.float32 if dtype == "auto" else dtype)
    assert equal(model, model_of_tables())
    assert logits(model).dtype == model.lm_head.weight.dtype
    assert equal(model.to(torch.bfloat16), model_of_tables())


@pytest.mark.parametrize("device_map", [None, "cpu"])
@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_saving_writes_the_same_format(folder: Path, tmp_path: Path, device_map: str | None, size: str) -> None:
    model = auto(folder, dtype=torch.float32, device_map=device_map)
    model.save_pretrained(tmp_path / "again", max_shard_size=size)
    assert (size == "20KB") == (tmp_path / "again" / "model.safetensors.index.json").exists()
    for path in folder.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "again" / path.name)
    again = load.load(str(tmp_path / "again"), "cpu").model
    assert equal(again, model)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(auto(tmp_path / "again", dtype=torch.float32)), logits(model))
    first, second = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path / "again"))
    assert first == second


def test_tuned_tables_are_saved_and_affine_layers_refused(folder: Path, tmp_path: Path) -> None:
    from compressor.packed import Affine

    model = auto(folder, dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    layer.learned = layer.learned * 2
    model.save_pretrained(tmp_path / "tuned")
    assert equal(auto(tmp_path / "tuned"), model)
    codes = torch.zeros(layer.out_features, layer.in_features, dtype=torch.uint8)
    model.model.layers[0].mlp.up_proj = PackedLinear(PackedWeight.pack(codes, Affine(torch.ones(layer.out_features, 1)), 2))
    with pytest.raises(ModelError, match="cannot be saved as a compressor table folder: 1 of its 14 packed layers hold scales"):
        model.save_pretrained(tmp_path / "mixed")


def test_models_without_the_head(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    whole = auto(folder, dtype=torch.float32)
    body = AutoModel.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(66).view(2, 33)
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    assert equal(auto(tmp_path / "body", dtype=torch.float32), whole)


def test_layers_on_the_disk(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    options = {"dtype": torch.float32, "device_map": dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}, "offload_folder": tmp_path / "off"}
    assert torch.equal(logits(auto(folder, **options)), logits(auto(folder, dtype=torch.float32)))
    with pytest.raises(ModelError, match="cannot be offloaded"):
        auto(folder, offload_buffers=True, **options)


def test_gradients_pass_and_weights_do_not_move(folder: Path) -> None:
    model = auto(folder, dtype=torch.float32)
    assert model.hf_quantizer.is_trainable
    model(torch.arange(8).view(1, 8)).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None
    assert not any(layer.learned.requires_grad for layer in packed_linears(model).values())


def change_config(folder: Path, **change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(f"{UP}.weight_table"), f"{UP} is incomplete: weight_table missing"),
        (lambda t: [t.pop(f"{UP}.{part}") for part in table.PARTS], f"lacks the packed weight of {UP}"),
        (lambda t: t.update({"model.extra.weight_packed": torch.zeros(8, 12, dtype=torch.int32)}), "a packed weight of model.extra, which"),
        (lambda t: t.update({f"{UP}.weight_packed": torch.zeros(96, 4, dtype=torch.int64)}), "must be int32"),
        (lambda t: t.update({f"{UP}.weight_packed": torch.zeros(96, 9, dtype=torch.int32)}), "no stream of"),
        (lambda t: t.update({f"{UP}.weight_table": t[f"{UP}.weight_table"][:, :, :3].clone()}), "tables of shape"),
        (lambda t: t.update({f"{UP}.weight_table": t[f"{UP}.weight_table"].double()}), "float64"),
        (lambda t: t[f"{UP}.weight_table"].view(-1)[3].fill_(float("nan")), "not finite"),
        (lambda t: t[f"{UP}.weight_shape"].fill_(0), "two positive int64"),
        (lambda t: t["model.layers.0.mlp.down_proj.weight_shape"].copy_(torch.tensor([64, 95])), "has shape"),
        (lambda t: t.update({f"{UP}.bias": torch.zeros(96)}), "has a foreign bias"),
    ],
)
def test_damaged_folders_give_one_sentence(folder: Path, tmp_path: Path, damage, words: str) -> None:
    refuses(auto, folder, tmp_path / "x", damage, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3}, "version 3 of the table format"),
        ({"format": "tables"}, "compressor/tables"),
        ({"groups": []}, "lists no modules"),
        ({"groups": "x"}, "no list of mappings"),
        ({"groups": [{"bits": 3, "segment": 64, "modules": ["nowhere"]}]}, "lacks the packed weight of nowhere"),
    ],
)
def test_damaged_configurations_give_one_sentence(folder: Path, tmp_path: Path, change: dict, words: str) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "x"))
    change_config(broken, **change)
    with pytest.raises(ModelError, match=words):
        auto(broken)


def test_a_module_that_the_architecture_has_not(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "x"))
    tensors = {name.replace(UP, "model.layers.7.mlp.up_proj"): tensor for name, tensor in load_file(broken / "model.safetensors").items()}
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_text((broken / "config.json").read_text().replace(UP, "model.layers.7.mlp.up_proj"))
    with pytest.raises(ModelError, match=r"model.layers.7.mlp.up_proj belongs to no linear layer"):
        auto(broken)


def test_dense_models_are_not_packed_on_the_way() -> None:
    from compressor.integrations.transformers import CompressorConfig

    with pytest.raises(ModelError, match="packs none"):
        auto(checkpoint.TINY, quantization_config=CompressorConfig())
