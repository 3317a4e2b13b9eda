"""from_pretrained on a sparse folder: ordinary linears with zeros, packed layers with scales, the numbers of our own loader, and a folder again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor import linear
from compressor.errors import ModelError
from compressor.export import bitmask, sparse
from compressor.linear import PackedLinear, packed_linears
from compressor.pipelines import checkpoint, load, write
from compressor.quant import PACKERS
from compressor.recipe import Quant
from tests.integrations.damaged import refuses

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
KINDS = ["llama", "qwen2", "bert", "distilbert"]


def make(kind: str) -> Any:
    """A random model; the decoders have heads of their own, and Qwen2 and the encoders have biases."""
    import transformers as t

    torch.manual_seed(0)
    decoder = SHAPE | {"num_key_value_heads": 2, "vocab_size": 1024, "eos_token_id": None, "bos_token_id": None}
    small = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "initializer_range": 0.3}
    model = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**decoder)),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**SHAPE, vocab_size=1024, num_labels=3)),
        "distilbert": lambda: t.DistilBertForSequenceClassification(t.DistilBertConfig(**small, vocab_size=1024, num_labels=3)),
    }[kind]()
    return model.eval()


def prune(model: Any, bits: int | None = None, every: int = 1) -> Any:
    """Masks the linears of the blocks, unstructured and in 4-blocks in turn, and packs each `every`th of them, if `bits` are given."""
    _, blocks = linear.find_blocks(model)
    for index, (name, layer) in enumerate(linear.linears(blocks).items()):
        n, k = layer.weight.shape
        keep = torch.rand(n, k) < 0.2 if index % 2 else (torch.rand(n, k // 4) < 0.2).repeat_interleave(4, 1)
        layer.weight.data.mul_(keep)
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
        if bits and index % every == 0:
            weight = PACKERS["rtn"](layer.weight.detach(), None, Quant(bits=bits, symmetric=index % 3 > 0), 32, torch.float16)[0]
            linear.swap(blocks, name, linear.to_packed(layer, weight))
    return model


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    loaded = load.Loaded(model, None, checkpoint.TINY, "made", config, dtype)
    write.round_to_folder(loaded, set())
    write.write_folder(loaded, folder, sparse=True)
    return folder


def auto(folder: Path, **options: Any) -> Any:
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    kind = transformers.AutoModelForCausalLM if name.endswith("CausalLM") else transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(folder, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(66).view(2, 33)).logits


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the layers packed, half dense."""
    return save(prune(make("qwen2"), 4, 2), tmp_path_factory.mktemp("sparse") / "one")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "every"), [(None, 1), (3, 1), (4, 2)], ids=["dense", "packed", "both"])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_the_model_is_what_was_written(tmp_path: Path, kind: str, bits: int | None, every: int, device_map: str | None) -> None:
    made = prune(make(kind), bits, every)
    save(made, tmp_path / "x")
    theirs = auto(tmp_path / "x", dtype=torch.float32, device_map=device_map)
    mine, back = made.state_dict(), theirs.state_dict()
    assert mine.keys() == back.keys()
    assert all(torch.equal(mine[name], back[name]) and mine[name].dtype == back[name].dtype for name in mine)
    assert all(type(layer) is PackedLinear for layer in packed_linears(theirs).values())
    assert all(type(layer) is torch.nn.Linear for layer in linear.linears(theirs).values())
    assert linear.linears(theirs).keys() == linear.linears(made).keys()
    assert sum(len(g["modules"]) for g in settings(tmp_path / "x")["groups"]) == {"llama": 14, "qwen2": 14, "bert": 12, "distilbert": 12}[kind]
    assert torch.equal(logits(theirs), logits(made))


def test_our_own_loader_gives_the_same(folder: Path) -> None:
    ours, theirs = load.load(str(folder), "cpu").model, auto(folder, dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(ours))
    ids = torch.arange(14).view(2, 7)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(theirs.generate(ids, **options), ours.generate(ids, **options))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_the_dtype_is_that_of_the_rest(tmp_path: Path, stored: torch.dtype, dtype: Any) -> None:
    made = prune(make("llama"), 4, 2)
    save(made, tmp_path / "x", stored)
    model = auto(tmp_path / "x", dtype=dtype)
    wanted = stored if dtype == "auto" else dtype
    for name, layer in linear.linears(model).items():
        assert layer.weight.dtype == wanted
        assert torch.equal(layer.weight, made.get_submodule(name).weight.to(wanted))
        assert layer.weight.requires_grad
    assert all(torch.equal(layer.learned, made.get_submodule(name).learned) for name, layer in packed_linears(model).items())
    assert logits(model).dtype == wanted


@pytest.mark.parametrize("size", ["50GB", "20KB"])
@pytest.mark.parametrize("kind", ["folder", "bert"])
def test_saving_writes_the_same_format(folder: Path, tmp_path: Path, size: str, kind: str) -> None:
    source = folder if kind == "folder" else save(prune(make(kind)), tmp_path / "made")
    model = auto(source, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again", max_shard_size=size)
    assert torch.equal(logits(auto(tmp_path / "again", dtype=torch.float32)), logits(model))
    assert {g["block"]: sorted(g["modules"]) for g in settings(source)["groups"]} == {
        g["block"]: sorted(g["modules"]) for g in settings(tmp_path / "again")["groups"]
    }
    layer = next(iter(linear.linears(linear.find_blocks(model)[1]).values()))
    layer.weight.data.fill_(1.0)  # no longer sparse
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits(auto(tmp_path / "full", dtype=torch.float32)), logits(model))


def test_tied_heads_are_stored_once(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=1024, tie_word_embeddings=True)
    made = prune(transformers.LlamaForCausalLM(config).eval())
    made.model.embed_tokens.weight.data.mul_(torch.rand(1024, 64) < 0.1)
    model = auto(save(made, tmp_path / "x"), dtype=torch.float32)
    assert torch.equal(logits(model), logits(made))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(auto(tmp_path / "again", dtype=torch.float32)), logits(made))
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "again" / "model.safetensors"))


def test_models_without_the_head(folder: Path) -> None:
    from transformers import AutoModel

    whole, body = auto(folder, dtype=torch.float32), AutoModel.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(66).view(2, 33)
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_layers_on_the_disk(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    options = {"dtype": torch.float32, "device_map": dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}, "offload_folder": tmp_path / "off"}
    with pytest.raises(ModelError, match="cannot be offloaded"):
        auto(folder, **options)


def test_gradients_reach_dense_weights(folder: Path) -> None:
    model = auto(folder, dtype=torch.float32)
    model(torch.arange(8).view(1, 8)).logits.sum().backward()
    assert all(layer.weight.grad is not None for layer in linear.linears(model).values())
    assert not any(layer.learned.requires_grad for layer in packed_linears(model).values())


PACKED, DENSE = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(f"{PACKED}.weight_codes"), f"{PACKED} is incomplete: weight_codes missing"),
        (lambda t: t.pop(f"{DENSE}.weight_mask"), f"{DENSE} is incomplete: weight_mask missing"),
        (lambda t: [t.pop(f"{DENSE}.{part}") for part in bitmask.DENSE], f"lacks the weight of {DENSE}"),
        (lambda t: t.update({"model.extra.weight_mask": torch.zeros(8, dtype=torch.uint8)}), "a mask or codes of model.extra, which"),
        (lambda t: t[f"{DENSE}.weight_mask"].fill_(255), "are stored"),
        (lambda t: t[f"{DENSE}.weight_values"][3].fill_(float("nan")), "not finite"),
        (lambda t: t.update({f"{DENSE}.weight_values": torch.zeros(9999)}), "no stream for a weight"),
        (lambda t: t.update({f"{PACKED}.weight_codes": t[f"{PACKED}.weight_codes"][:-1].clone()}), "are no stream of"),
        (lambda t: t[f"{PACKED}.weight_scale"].view(-1)[3].fill_(float("inf")), "not finite"),
        (lambda t: t[f"{DENSE}.weight_shape"].fill_(0), "two positive int64"),
        (lambda t: t[f"{DENSE}.weight_shape"].copy_(t[f"{DENSE}.weight_shape"].flip(0)), "has shape"),
        (lambda t: t.pop(f"{DENSE}.bias"), "lacks its bias"),
    ],
)
def test_damaged_folders_give_one_sentence(folder: Path, tmp_path: Path, damage, words: str) -> None:
    refuses(auto, folder, tmp_path / "x", damage, words)


def test_sketches_are_not_saved_and_dense_models_not_pruned_on_the_way(folder: Path, tmp_path: Path) -> None:
    from compressor.integrations.transformers import SparseConfig
    from compressor.packed import PackedWeight, Table

    model = auto(folder)
    codes = torch.zeros(64, 64, dtype=torch.uint8)
    model.model.layers[0].self_attn.q_proj = PackedLinear(PackedWeight.pack(codes, Table(torch.ones(64, 1, 4)), 2))
    with pytest.raises(ModelError, match=f"cannot be saved as a {sparse.NAME} folder: 1 of its"):
        model.save_pretrained(tmp_path / "x")
    with pytest.raises(ModelError, match="packs none"):
        auto(checkpoint.TINY, quantization_config=SparseConfig())
