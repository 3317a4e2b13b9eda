"""Whole GGUF files: what is read back is what `held` says, transformers computes the same logits, and what would run otherwise is refused."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from compressor.errors import ModelError
from compressor.export import gguf_blocks
from compressor.linear import packed_linears
from compressor.packed import PackedWeight
from tests.tune.conftest import round_to_nearest

gguf = pytest.importorskip("gguf")
from compressor.integrations import gguf as files  # noqa: E402
from compressor.integrations import gguf_families as families  # noqa: E402

TINY = Path(__file__).resolve().parents[2] / "compressor" / "models" / "tiny"
SIZE = 2048  # rows of the embedding, tokens of TINY
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 96, "vocab_size": SIZE, "max_position_embeddings": 64,
}  # fmt: skip


def weights_of(model: nn.Module) -> list[tuple[str, torch.Tensor | PackedWeight]]:
    packed = {name: layer.packed() for name, layer in packed_linears(model).items()}
    return [(name, p.detach()) for name, p in model.named_parameters()] + list(packed.items())


def config_of(model: nn.Module) -> dict:
    return json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}


@pytest.fixture
def make(packed_llama: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """Packed models with the vocabulary of TINY."""
    monkeypatch.setattr("tests.tune.conftest.VOCAB", SIZE)
    return lambda **keys: packed_llama(**{"bos_token_id": 0, "eos_token_id": 0, **keys})


def write(path: Path, model: nn.Module, kind: str = "auto", **options: str) -> list[dict[str, str]]:
    return files.write(path, config_of(model), iter(weights_of(model)), TINY, kind, **options)


@pytest.mark.parametrize("kind", files.KINDS)
def test_what_is_read_is_what_is_held_and_transformers_computes_it(tmp_path: Path, make: Callable[..., nn.Module], kind: str) -> None:
    model = make(bits=4, group=32, hidden_size=256, intermediate_size=512, attention_bias=False)
    rows = write(tmp_path / "model.gguf", model, kind)
    assert {row["type"] for row in rows[1:]} == {"f32", "q4_0" if kind == "auto" else kind, "f16" if kind not in ("f32", "bf16") else kind}
    rounded = {"model.embed_tokens.weight", "lm_head.weight"} if kind != "f32" else set()
    assert {row["name"]: row["note"] for row in rows if row["note"]} == dict.fromkeys(rounded, "rounded") and list(tmp_path.iterdir()) == [
        tmp_path / "model.gguf"
    ]
    found = files.read(tmp_path / "model.gguf")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    for name, tensor in theirs.named_parameters():
        assert torch.equal(found[name], tensor), name
    for name, weight in ((n, w) for n, w in weights_of(model) if isinstance(w, PackedWeight)):
        held, chosen, _ = files.held(weight, kind)
        assert torch.equal(found[f"{name}.weight"], held if isinstance(held, torch.Tensor) else held.dequantize())
        assert (held is weight) == gguf_blocks.exact(weight, chosen) == (chosen in ("f32", "q4_0", "q4_1", "q5_0", "q8_0"))
    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        seen, ours = theirs(ids).logits, model(ids).logits
    if kind in ("auto", "q4_0", "q5_0", "q8_0", "f32"):  # embeddings are float16
        assert float((seen - ours).abs().max()) < 0.01 * float(ours.std())


def test_the_file_says_what_the_model_is(tmp_path: Path, make: Callable[..., nn.Module]) -> None:
    model = make(bits=3, group=32, head_dim=32)
    write(tmp_path / "model.gguf", model, "q8_0", embeddings="q8_0", name="a model")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    wanted = {
        "general.architecture": "llama", "general.name": "a model", "general.file_type": 7, "general.quantization_version": 2,
        "llama.context_length": 64, "llama.embedding_length": 64, "llama.block_count": 2, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 32, "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0, "llama.vocab_size": SIZE, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted
    assert len(said["tokenizer.ggml.tokens"]) == SIZE and said["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}["token_embd.weight"] == "Q8_0"


def test_rows_of_queries_and_keys_are_neighbours(tmp_path: Path, make: Callable[..., nn.Module]) -> None:
    model = make(bits=4, group=32, attention_bias=True)
    bias = model.model.layers[0].self_attn.q_proj.bias
    bias.data = torch.arange(64.0)
    write(tmp_path / "model.gguf", model, "q4_0")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert stored["blk.0.attn_q.bias"][:6].tolist() == [0, 8, 1, 9, 2, 10]  # heads of 16
    assert torch.equal(files.read(tmp_path / "model.gguf")["model.layers.0.self_attn.q_proj.bias"], bias)


@pytest.mark.parametrize(
    ("kind", "k", "chosen"), [("q4_k", 96, "q4_0"), ("q2_k", 96, "q4_0"), ("q4_0", 48, "f16"), ("q3_k", 48, "f16"), ("auto", 48, "f16")]
)
def test_rows_that_no_block_divides_fall_back(kind: str, k: int, chosen: str) -> None:
    weight = round_to_nearest(torch.randn(8, k, generator=torch.Generator().manual_seed(1)), 3, k, True, torch.float16)
    name, note = files.choose(weight, kind)
    assert name == chosen and str(k) in note
    assert files.held(weight, kind)[1:] == (name, note)


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype", "chosen"),
    [(4, True, torch.float16, "q4_0"), (3, False, torch.float16, "q4_0"), (4, False, torch.float16, "q5_0"), (4, True, torch.float32, "q4_0")],
)
def test_auto_takes_the_smallest_exact_type_or_the_nearest(bits: int, symmetric: bool, dtype: torch.dtype, chosen: str) -> None:
    """Scales in float32 are exact nowhere, and as near in the smallest type that keeps the codes as anywhere."""
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    weight = round_to_nearest(w, bits, 32, symmetric, dtype)
    name, note = files.choose(weight, "auto")
    assert name == chosen and gguf_blocks.exact(weight, name) == (dtype == torch.float16) == (not note)


def in_other_order(bits: int) -> PackedWeight:
    w, order = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)), torch.randperm(512, generator=torch.Generator().manual_seed(2))
    weight = round_to_nearest(w, bits, 128, True, torch.float16)
    return PackedWeight.pack(weight.codes(), weight.values, bits, 128, order)


def in_groups_of_16(bits: int) -> PackedWeight:
    return round_to_nearest(torch.randn(64, 512, generator=torch.Generator().manual_seed(1)), bits, 16, True, torch.float16)


@pytest.mark.parametrize(
    ("weight", "chosen", "limit"),
    [
        (in_groups_of_16(2), "q2_k", 0.04),
        (in_groups_of_16(3), "q3_k", 0.02),
        (in_groups_of_16(4), "q8_0", 0.006),
        (in_other_order(2), "q3_k", 0.1),
        (in_other_order(3), "q5_0", 0.04),
        (in_other_order(4), "q8_0", 0.006),
    ],
    ids=["2 by 16", "3 by 16", "4 by 16", "2 in order", "3 in order", "4 in order"],
)
def test_auto_takes_the_smallest_type_within_the_bound_where_none_is_exact(weight: PackedWeight, chosen: str, limit: float) -> None:
    found, name, note = files.held(weight, "auto")
    assert isinstance(found, torch.Tensor) and name == chosen
    error = float((found - weight.dequantize()).norm() / weight.dequantize().norm())
    assert 0 < error < limit and error <= files.NEAR / 2**weight.bits and note == f"not exact, relative error {error:.2g}"
    smaller = [each for each in files.BLOCKS[: files.BLOCKS.index(name)] if int(each[1]) >= weight.bits]
    assert all(gguf_blocks.fitted(weight, each)[1] > files.NEAR / 2**weight.bits for each in smaller)


def test_rows_that_fall_back_say_what_they_lose() -> None:
    weight = round_to_nearest(torch.randn(8, 96, generator=torch.Generator().manual_seed(1)), 4, 16, True, torch.float16)
    name, note = files.choose(weight, "q4_k")
    assert name == "q8_0" and "no multiple of 256; not exact" in note


def test_a_weight_is_fitted_once_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every type is tried at most once, and of those with fewer bits than the weight none."""
    weight, tried = in_groups_of_16(3), []
    nearest = gguf_blocks.gguf_fit.nearest
    monkeypatch.setattr(gguf_blocks.gguf_fit, "nearest", lambda part, dense, kind: tried.append(kind.name) or nearest(part, dense, kind))
    files.held(weight, "auto")
    assert tried == ["q3_k"]


def test_what_is_held_lies_where_the_weight_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of a device that every machine has: what was fitted in CPU memory goes there."""
    weight = in_groups_of_16(3)
    found = files._fitted(weight, "q3_k")
    monkeypatch.setattr(files, "_fitted", lambda weight, kind: found)
    away = files.held(replace(weight, words=weight.words.to("meta")), "q3_k")[0]
    assert isinstance(away, torch.Tensor) and away.device.type == "meta"


def test_on_one_scale_a_row_k_types_are_the_smallest(make: Callable[..., nn.Module]) -> None:
    w = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    for bits in (2, 3, 4):
        chosen = files.choose(round_to_nearest(w, bits, 512, True, torch.float16), "auto")[0]
        assert chosen == {2: "q2_k", 3: "q3_k", 4: "q4_0"}[bits]


def test_norms_of_gemma_are_shifted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = Gemma2ForCausalLM(Gemma2Config(**shape, vocab_size=SIZE, query_pre_attn_scalar=16, max_position_embeddings=64, sliding_window=32))
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    write(tmp_path / "model.gguf", model, "f32")
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert torch.equal(stored["blk.1.post_ffw_norm.weight"], model.model.layers[1].post_feedforward_layernorm.weight + 1)
    found = files.read(tmp_path / "model.gguf")
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.allclose(found[name], p, atol=1e-6) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["Mistral", "Qwen3", "Phi3", "Gemma3Text"])
def test_every_tensor_of_a_family_has_its_place(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    numbers = {"vocab_size": SIZE, "max_position_embeddings": 64, "query_pre_attn_scalar": 16, "sliding_window": 32, "tie_word_embeddings": False}
    others = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = getattr(transformers, f"{name}Config")(**shape, **numbers, **others)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    rows = write(tmp_path / "model.gguf", model, "f32")
    found = files.read(tmp_path / "model.gguf")
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.allclose(found[key], p, atol=1e-6) for key, p in model.named_parameters())
    length = gguf.GGUFReader(tmp_path / "model.gguf").get_field(f"{families.FAMILIES[type(model).__name__].arch}.context_length").contents()
    assert (length, "context" in rows[0]["note"]) == ((32, True) if name in ("Mistral", "Phi3") else (64, False))


def test_tied_embeddings_and_unused_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, vocab_size=SIZE + 3, tie_word_embeddings=True, max_position_embeddings=64))
    write(tmp_path / "model.gguf", model, "f16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert len(types) == SIZE + 3 and set(types[SIZE:]) == {gguf.TokenType.UNUSED}
    assert "model.layers.0.self_attn.q_proj.bias" in files.read(tmp_path / "model.gguf")


def test_values_that_are_not_finite_do_not_fit() -> None:
    weight = in_groups_of_16(3)
    weight.learned[0, 0] = torch.nan
    assert "layer.7 holds NaN" in str(files.fits(LLAMA, {"layer.7": weight}, "auto"))


@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["f16", "f32", "q4_0", "q4_k"])
def test_dense_matrices_that_are_not_finite_are_refused(tmp_path: Path, kind: str, strange: float) -> None:
    matrix = torch.zeros(SIZE, 256)
    matrix[5, 5] = strange
    with pytest.raises(ModelError, match="model.embed_tokens.weight cannot be written: a weight holds NaN or infinite"):
        files.write(tmp_path / "model.gguf", LLAMA, [("model.embed_tokens.weight", matrix)], TINY, embeddings=kind)


def test_nothing_is_written_but_beside_the_output(tmp_path: Path, make: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's folder for temporary files may be small, or in memory."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    write(tmp_path / "out" / "model.gguf", make())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"] and len(files.read(tmp_path / "out" / "model.gguf")) > 3


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([("model.layers.0.mlp.router.weight", torch.zeros(2, 64))], "router"),
        ([("model.embed_tokens.weight", torch.zeros(5, 64))], "5 rows"),
        ([("model.norm.weight", torch.full((64,), torch.inf))], "model.norm.weight cannot be written"),
    ],
)
def test_strange_tensors_are_refused_and_leave_nothing(tmp_path: Path, weights: list, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        files.write(tmp_path / "model.gguf", LLAMA, weights, TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -40])
def test_damaged_files_are_refused(tmp_path: Path, make: Callable[..., nn.Module], keep: int) -> None:
    write(tmp_path / "model.gguf", make())
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[:keep])
    with pytest.raises(ModelError, match="no GGUF file that can be read"):
        files.read(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="no GGUF file that can be read"):
        files.read(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("key", "number"),
    [("attention.head_count_kv", n) for n in (0, 1, 3, 4, 2**31)]
    + [("attention.head_count", 0), ("attention.head_count", 8), ("block_count", 2**31)],
)
def test_damaged_numbers_of_heads_and_layers_are_refused(tmp_path: Path, make: Callable[..., nn.Module], key: str, number: int) -> None:
    path = tmp_path / "model.gguf"
    write(path, make())
    reader = gguf.GGUFReader(path, "r+")
    field = reader.get_field(f"llama.{key}")
    field.parts[field.data[0]][0] = number
    reader.data.flush()
    with pytest.raises(ModelError, match="damaged"):
        files.read(path)


def test_without_the_library_one_sentence_says_so() -> None:
    code = "import sys; sys.modules['gguf'] = None\nimport compressor.integrations.gguf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtra: GGUF files are written with the gguf package" in done.stderr
