"""Whole GGUF files: what is read back is what `held` says, transformers computes the same logits, and what would run otherwise is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compressor.errors import ModelError
from compressor.export import gguf_blocks
from compressor.linear import packed_linears
from compressor.packed import PackedWeight
from tests.tune.conftest import round_to_nearest

gguf = pytest.importorskip("gguf")
from compressor.integrations import gguf as files  # noqa: E402
from compressor.integrations import gguf_families as families  # noqa: E402
from compressor.integrations import gguf_vocab as vocab  # noqa: E402

TINY = Path(__file__).resolve().parents[2] / "compressor" / "models" / "tiny"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"
SIZE = 2048  # rows of the embedding, tokens of TINY


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
    [(4, True, torch.float16, "q4_0"), (3, False, torch.float16, "q4_0"), (4, False, torch.float16, "q5_0"), (4, True, torch.float32, "q8_0")],
)
def test_auto_takes_the_smallest_exact_type_or_the_nearest(bits: int, symmetric: bool, dtype: torch.dtype, chosen: str) -> None:
    """Scales in float32 are exact nowhere; of those types that keep the codes the first is as near as any."""
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    weight = round_to_nearest(w, bits, 32, symmetric, dtype)
    name, note = files.choose(weight, "auto")
    assert not note and gguf_blocks.exact(weight, name) == (dtype == torch.float16)
    assert name == chosen or (dtype == torch.float32 and name in ("q4_1", "q5_0", "q8_0"))


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


def test_rope_factors_are_those_of_transformers() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope | {"original_max_position_embeddings": 512})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** (-torch.arange(0, 64, 2) / 64)
    factors = families.rope_factors(config.to_dict())
    assert torch.allclose(plain / factors, scaled, rtol=1e-5) and 1 < len(factors.unique()) < 32
    assert families.rope_factors(LlamaConfig().to_dict()) is None


@given(heads=st.integers(1, 5), half=st.integers(1, 9))
def test_turning_back_is_the_inverse(heads: int, half: int) -> None:
    rows = torch.arange(heads * 2 * half * 3).view(-1, 3)
    turned = families.turn(rows, heads)
    assert torch.equal(families.turn_back(turned, heads), rows)
    assert turned[: 2 * half : 2].equal(rows[:half])


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 96, "vocab_size": SIZE, "max_position_embeddings": 64,
}  # fmt: skip
GEMMA = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 256}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA | {"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM"),
        (LLAMA | {"architectures": []}, "no architecture"),
        (LLAMA | {"model_type": "none"}, "cannot read the configuration"),
        (LLAMA | {"hidden_act": "gelu"}, "gelu"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "part of each head"),
        (LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32}, "sliding windows"),
        (GEMMA | {"query_pre_attn_scalar": 144}, "head_dim"),
        (GEMMA | {"layer_types": ["full_attention"] * 2}, "full window"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(tmp_path: Path, config: dict, words: str) -> None:
    assert words in str(files.fits(config, {}, "auto"))
    with pytest.raises(ModelError, match=words):
        files.write(tmp_path / "model.gguf", config, [], TINY)
    assert not list(tmp_path.iterdir())
    assert files.fits(LLAMA, {}, "auto") is None and files.fits(GEMMA, {}, "q4_k") is None
    assert "q7" in str(files.fits(LLAMA, {}, "q7"))


def test_defaults_are_those_of_transformers() -> None:
    """What config.json leaves out differs between families: Mistral's has a window, Gemma's caps its logits."""
    assert families.settings(LLAMA | {"model_type": "mistral"})["sliding_window"] == 4096
    assert families.settings(LLAMA | {"model_type": "gemma2"})["final_logit_softcapping"] == 30.0
    assert families.rope_of(families.settings(GEMMA))["rope_theta"] == 1e6


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


def test_without_the_library_one_sentence_says_so() -> None:
    code = "import sys; sys.modules['gguf'] = None\nimport compressor.integrations.gguf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtra: GGUF files are written with the gguf package" in done.stderr


# ---- tokenizers


def spm(pieces: list[tuple[str, int]], extra: dict | None = None) -> dict:
    """A SentencePiece-like tokenizer.json: characters, then (piece, its rank) with every way to make it as a merge."""
    characters = sorted({vocab.SPACE, *"abc", *(c for piece, _ in pieces for c in piece)})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *characters]
    made: list[str] = []
    for piece, _ in sorted(pieces, key=lambda each: each[1]):
        if piece not in characters and piece not in made:
            made.append(piece)
    known = {*characters, *made}
    merges = [[piece[:i], piece[i:]] for piece in made for i in range(1, len(piece)) if {piece[:i], piece[i:]} <= known]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": {t: i for i, t in enumerate(tokens + made)}}
    added = [
        {"id": i, "content": tokens[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i in range(3)
    ]
    steps = [{"type": "Prepend", "prepend": vocab.SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": vocab.SPACE}]
    normalizer = {"type": "Sequence", "normalizers": steps}
    return {"version": "1.0", "added_tokens": added, "normalizer": normalizer, "model": model | {"merges": merges}} | (extra or {})


def joined_by_scores(text: str, ids: dict[str, int], scores: dict[int, float]) -> list[str]:
    """What llama.cpp does: of all neighbours whose union is a token, join those of the best score, the leftmost first."""
    parts = list(text)
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ids]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.text(alphabet="abc" + vocab.SPACE, min_size=2, max_size=4), st.integers(0, 9)), max_size=8),
    text=st.text(alphabet="abc ", min_size=1, max_size=12),
)
def test_scores_lead_to_the_ids_of_the_merges(pieces: list[tuple[str, int]], text: str) -> None:
    import tokenizers

    file = spm(pieces)
    ids = file["model"]["vocab"]
    made = tokenizers.Tokenizer.from_str(json.dumps(file | {"truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None}))
    _, _, scores = vocab._llama(file["model"], Path("x"))
    normal = vocab.SPACE + text.replace(" ", vocab.SPACE)
    assert made.encode(text).tokens == joined_by_scores(normal, ids, scores)


def test_merges_without_scores_are_refused() -> None:
    file = spm([("ab", 0), ("bc", 1), ("abc", 2)])
    assert ["a", "bc"] in file["model"]["merges"]
    file["model"]["merges"].remove(["a", "bc"])
    with pytest.raises(ModelError, match="follow no scores"):
        vocab._llama(file["model"], Path("x"))
    again = spm([("ab", 0), ("bc", 1), ("abc", 2)])
    again["model"]["merges"].sort(key=lambda pair: pair[0] == "ab")  # abc before ab
    again["model"]["merges"].insert(0, again["model"]["merges"].pop())
    again["model"]["merges"].append(["a", "b"])
    with pytest.raises(ModelError, match="follow no scores"):
        vocab._llama(again["model"], Path("x"))


@pytest.mark.parametrize("name", ["babyllama", "stories260K"])
def test_tokenizers_with_byte_fallback(tmp_path: Path, name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip("needs ../shared/models")
    config = json.loads((SHARED / name / "config.json").read_text())
    writer = gguf.GGUFWriter(tmp_path / "x", "llama")
    assert vocab.add(writer, SHARED / name, config["vocab_size"]) == ("llama", "")
    said = {key: value.value for key, value in writer.kv_data[0].items()}
    assert said["tokenizer.ggml.add_bos_token"] and said["tokenizer.ggml.add_space_prefix"] and said["tokenizer.ggml.bos_token_id"] == 1
    assert (
        said["tokenizer.ggml.token_type"][:5] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 2
    )


def test_the_chat_template_and_special_tokens_are_taken_over(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|end|>"}))
    writer = gguf.GGUFWriter(tmp_path / "x", "llama")
    vocab.add(writer, tmp_path, SIZE)
    said = {key: value.value for key, value in writer.kv_data[0].items()}
    assert said["tokenizer.chat_template"] == "{{ messages[0].content }}" and said["tokenizer.ggml.padding_token_id"] == 0


LLAMA3 = vocab._WORDS + r"|\p{N}{1,3}" + vocab._REST
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.mark.parametrize(
    ("steps", "skips", "name"),
    [
        ([{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated"}, BYTES], True, "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated"}, BYTES], False, "smaug-bpe"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3.replace("{1,3}", "")}, "behavior": "Isolated"}, BYTES], False, "qwen2"),
        ([{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}], False, "smollm"),
        ([{"type": "Split", "pattern": {"Regex": r"\w+"}}, BYTES], False, None),
        ([BYTES | {"use_regex": True, "add_prefix_space": True}], False, None),
        ([{"type": "Whitespace"}], False, None),
    ],
)
def test_names_of_splits(steps: list[dict], skips: bool, name: str | None) -> None:
    file = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {"ignore_merges": skips}, "normalizer": None}
    if name is None:
        with pytest.raises(ModelError, match="splits or changes"):
            vocab._pre(file, Path("x"))
    else:
        assert vocab._pre(file, Path("x")) == (name, "")
        assert "NFC" in vocab._pre(file | {"normalizer": {"type": "NFC"}}, Path("x"))[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "no tokenizer.json"),
        ("{", "damaged"),
        ("[]", "no mapping"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "no BPE"),
        ({"added_tokens": [{"id": SIZE, "content": "<more>"}]}, "token 2048"),
        ({"normalizer": {"type": "Lowercase"}}, "changes texts"),
    ],
)
def test_strange_tokenizers_are_refused(tmp_path: Path, change: str | dict | None, words: str) -> None:
    shutil.copy(TINY / "tokenizer_config.json", tmp_path)
    if isinstance(change, str):
        (tmp_path / "tokenizer.json").write_text(change)
    elif change is not None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads((TINY / "tokenizer.json").read_text()) | change))
    with pytest.raises(ModelError, match=words):
        vocab.add(gguf.GGUFWriter(tmp_path / "x", "llama"), tmp_path, SIZE)
