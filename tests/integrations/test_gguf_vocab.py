"""Tokenizers in GGUF files: the same ids by llama.cpp's rules, and whatever it would do otherwise, or is damaged, refused."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import ModelError

gguf = pytest.importorskip("gguf")
from compressor.integrations import gguf_vocab as vocab  # noqa: E402
from tests.integrations.test_gguf import SIZE, TINY  # noqa: E402

SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"


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
        ([{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Removed", "invert": True}, BYTES], True, "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Removed"}, BYTES], True, None),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": True}, BYTES], True, None),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "MergedWithNext"}, BYTES], True, None),
        ([{"type": "Split", "pattern": "x", "behavior": "Isolated"}, BYTES], True, None),
        ([{"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated"}, BYTES], False, None),
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


@given(text=st.text(alphabet="ab 'sé1中\n!", max_size=20))
def test_what_is_isolated_is_what_remains(text: str) -> None:
    """Both ways to say that the matches are the words, as the tokenizers package has them."""
    from tokenizers import Regex, pre_tokenizers

    isolated = pre_tokenizers.Split(Regex(LLAMA3), "isolated").pre_tokenize_str(text)
    assert pre_tokenizers.Split(Regex(LLAMA3), "removed", invert=True).pre_tokenize_str(text) == isolated


MODEL = json.loads((TINY / "tokenizer.json").read_text())["model"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(({"model": MODEL | {"merges": merges}}, "no pair") for merges in (["ab"], [["a"]], [1], [None], [["a", 1]], [["a", ""]])),
        *(({"model": spm([])["model"] | {"merges": merges}}, "no pair") for merges in (["ab"], [["a"]], [1], [None], [["a", 1]])),
        ({"added_tokens": 5}, "5.* no added token"),
        ({"added_tokens": [{"id": "1", "content": "a"}]}, "no added token"),
        ({"added_tokens": [{"id": None, "content": "a"}]}, "no added token"),
        ({"added_tokens": [{"id": 1, "content": 2}]}, "no added token"),
        ({"added_tokens": [{"content": "a"}]}, "no added token"),
        ({"added_tokens": ["a"]}, "no added token"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}}, "no step"),
        ({"pre_tokenizer": {"type": ["ByteLevel"]}}, "no step"),
        ({"normalizer": "NFC"}, "no step"),
        ({"model": MODEL | {"unk_token": []}}, "unk_token"),
        ({"model": MODEL | {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix"),
        ({"model": MODEL | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": MODEL | {"dropout": 0.1}}, "dropout"),
        (None, "no tokenizer.json"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged: it nests deeper"),
        ('{"model": {}, "model": {}}', "damaged: it names 'model' twice"),
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
