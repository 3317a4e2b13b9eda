"""The tokenizer of a model folder as llama.cpp has it, from tokenizer.json: tokens, scores or merges, kinds, special tokens, chat template.

Two of llama.cpp's tokenizers cover the families that we write:

    gpt2    byte-level BPE. Merges are taken over; `tokenizer.ggml.pre` names the rule that splits text into words, which llama.cpp knows by name, not
            by its regular expression: the expression in the file is looked up in SPLITS.
    llama   SentencePiece's BPE with byte fallback. llama.cpp knows no merges here: of all neighbours whose union is a token it joins those of the
            best score. Minus the rank of a token's first merge is such a score, and gives the same ids where every way to make a token is a merge
            and the merges of one token follow each other, as in everything that was converted from SentencePiece; anything else is refused.

Whether a text begins with BOS, or ends with EOS, is asked of the tokenizer itself. Limits: no WordPiece, no Unigram; NFC normalisation, which
llama.cpp does not do, is a note. Source: what the gguf package and llama.cpp's own converter write.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf

from compressor import strict
from compressor.errors import ModelError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # (regular expression or kind of splitting, whether whole words skip the merges): llama.cpp's name
    ("bytes", False): "gpt-2",
    ("digits, bytes", False): "smollm",
    (_WORDS + r"|\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_WORDS + r"|\p{N}{1,3}" + _REST, False): "smaug-bpe",
    (_WORDS + r"|\p{N}" + _REST, False): "qwen2",
    (_TEKKEN, True): "tekken",
}
SPACE = "\u2581"
Json = Mapping[str, Any]


def add(writer: gguf.GGUFWriter, folder: Path, size: int) -> tuple[str, str]:
    """Write the tokenizer of `folder` for an embedding of `size` rows; returns what llama.cpp calls it, and a note for the report.

    ModelError where there is none, or none that llama.cpp would run alike.
    """
    file = _read(folder / "tokenizer.json")
    model = file.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ModelError(f"{folder}/tokenizer.json is no BPE tokenizer, the only kind that compressor writes into GGUF files: choose another --to")
    _check_model(model, folder)
    note = ""
    if model.get("byte_fallback"):
        name = "llama"
        tokens, kinds, scores = _llama(model, folder)
        writer.add_tokenizer_model(name)
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_prefix(file, folder))
    else:
        pre, note = _pre(file, folder)
        name = f"gpt2 ({pre})"
        tokens, kinds, scores = dict(_ids(model["vocab"], folder)), {}, {}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
    _add_tokens(writer, tokens, kinds, scores if model.get("byte_fallback") else None, _added(file, folder), size, folder)
    _add_special(writer, folder, size, merges=not model.get("byte_fallback"))
    return name, note


def _read(path: Path) -> Json:
    try:
        file = strict.read(path, strict.TOKENIZER)
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no tokenizer.json: load its tokenizer with transformers once and save it there") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}") from None
    if not isinstance(file, dict):
        raise ModelError(f"{path} is damaged: it holds no mapping")
    return file


def _ids(vocab: Json, folder: Path) -> Iterator[tuple[int, str]]:
    for text, number in vocab.items():
        if type(number) is not int or number < 0:
            raise ModelError(f"{folder}/tokenizer.json is damaged: the id of {text!r} is {number!r}")
        yield number, text


def _check_model(model: Json, folder: Path) -> None:
    """ModelError for merges that are no pairs, and for settings of BPE that llama.cpp does not know."""
    for setting in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(setting):
            raise ModelError(f"{folder}/tokenizer.json sets {setting} to {model[setting]!r}, which llama.cpp does not know: choose another --to")
    if not isinstance(model.get("unk_token"), str | None):
        raise ModelError(f"{folder}/tokenizer.json is damaged: its unk_token is {model['unk_token']!r}")
    for each in model["merges"]:
        pair = each.split(" ", 1) if isinstance(each, str) else each
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise ModelError(f"{folder}/tokenizer.json is damaged: the merge {each!r} is no pair of tokens")


def _added(file: Json, folder: Path) -> list[tuple[int, str, bool]]:
    """(id, text, whether special) of the added tokens."""
    found, out = file.get("added_tokens"), []
    if found is None:
        return []
    for each in found if isinstance(found, list) else [found]:
        each = each if isinstance(each, dict) else {"no mapping": each}
        number, text = each.get("id"), each.get("content")
        if type(number) is not int or number < 0 or not isinstance(text, str):
            raise ModelError(f"{folder}/tokenizer.json is damaged: {each!r} is no added token")
        out.append((number, text, bool(each.get("special"))))
    return out


def _add_tokens(
    writer: gguf.GGUFWriter,
    tokens: dict[int, str],
    kinds: Mapping[int, int],
    scores: Mapping[int, float] | None,
    added: Iterable[tuple[int, str, bool]],
    size: int,
    folder: Path,
) -> None:
    """Every row of the embedding gets a token; rows beyond the tokenizer's get unused ones."""
    types = {number: kinds.get(number, int(gguf.TokenType.NORMAL)) for number in tokens}
    for number, text, special in added:
        tokens[number] = text
        if types.get(number) != gguf.TokenType.UNKNOWN:
            types[number] = int(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
    last = max(tokens, default=-1)
    if last >= size:
        raise ModelError(f"{folder}/tokenizer.json has a token {last}, and the model's embedding only {size} rows")
    writer.add_token_list([tokens.get(i, f"[PAD{i}]").encode("utf-8") for i in range(size)])
    if scores is not None:
        writer.add_token_scores([scores.get(i, -1000.0) for i in range(size)])
    writer.add_token_types([types.get(i, int(gguf.TokenType.UNUSED)) for i in range(size)])


def _add_special(writer: gguf.GGUFWriter, folder: Path, size: int, merges: bool) -> None:
    """Ids of special tokens, chat template and merges by the gguf package; what is put around a text as the tokenizer does it."""
    from transformers import AutoTokenizer

    try:
        special = gguf.SpecialVocab(folder, load_merges=merges, n_vocab=size)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = tokenizer("a").input_ids
    except Exception as error:  # tokenizers of strangers raise what they like
        raise ModelError(f"the tokenizer of {folder} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    special.add_special_token["bos"] = bool(ids) and ids[0] == tokenizer.bos_token_id is not None
    special.add_special_token["eos"] = bool(ids) and ids[-1] == tokenizer.eos_token_id is not None
    special.add_to_gguf(writer, quiet=True)


def _llama(model: Json, folder: Path) -> tuple[dict[int, str], dict[int, int], dict[int, float]]:
    """Tokens, their kinds where not normal, and scores of a SentencePiece-like BPE."""
    vocab = model["vocab"]
    tokens = dict(_ids(vocab, folder))
    kinds = {number: int(gguf.TokenType.BYTE) for number, text in tokens.items() if len(text) == 6 and text[:3] == "<0x" and text[5] == ">"}
    if len(kinds) != 256:
        raise ModelError(f"{folder}/tokenizer.json falls back to bytes, and has {len(kinds)} of their 256 tokens")
    if model.get("unk_token") in vocab:
        kinds[vocab[model["unk_token"]]] = int(gguf.TokenType.UNKNOWN)
    pairs = [tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each) for each in model["merges"]]
    order: list[str] = []  # tokens by their first merge
    for left, right in pairs:
        if not order or order[-1] != left + right:
            order.append(left + right)
    known = {text for number, text in tokens.items() if number not in kinds}
    made = set(pairs)
    missing = next((text for text in known for i in range(1, len(text)) if {text[:i], text[i:]} <= known and (text[:i], text[i:]) not in made), None)
    if missing is not None or len(set(order)) != len(order):
        raise ModelError(f"the merges of {folder}/tokenizer.json follow no scores of tokens, by which llama.cpp would merge: choose another --to")
    scores = {vocab[text]: -float(rank) for rank, text in enumerate(order) if text in vocab}
    rest = {number: -float(len(order) + number) for number in tokens if number not in scores and number not in kinds}
    return tokens, kinds, scores | rest | dict.fromkeys(kinds, 0.0)


def _prefix(file: Json, folder: Path) -> bool:
    """Whether a space is put before a text; ModelError for any other change of it than spaces to SentencePiece's mark."""
    steps = [*_flat(file.get("normalizer"), "normalizers", folder), *_flat(file.get("pre_tokenizer"), "pretokenizers", folder)]
    prefix = False
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE and not step.get("split"):
            prefix = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            continue
        elif kind == "Split" and step.get("pattern") == {"String": " "}:
            continue  # after the replacement there are no spaces to split at
        else:
            raise ModelError(f"{folder}/tokenizer.json changes texts by {kind}, which llama.cpp would not do: choose another --to")
    return prefix


def _pre(file: Json, folder: Path) -> tuple[str, str]:
    """llama.cpp's name of how a byte-level tokenizer splits a text, and a note."""
    steps = _flat(file.get("pre_tokenizer"), "pretokenizers", folder)
    normal = {step["type"] for step in _flat(file.get("normalizer"), "normalizers", folder)}
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    split = ""
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        split = "bytes"
    elif kinds == ["Digits", "ByteLevel"] and last.get("use_regex", True) and steps[0].get("individual_digits"):
        split = "digits, bytes"
    elif kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        split = _expression(steps[0])
    name = SPLITS.get((split, bool(file["model"].get("ignore_merges"))))
    if name is None or normal - {"NFC"} or last.get("add_prefix_space"):
        raise ModelError(f"{folder}/tokenizer.json splits or changes texts in a way that llama.cpp is not known to have: choose another --to")
    return name, "llama.cpp does not normalise texts to NFC" if normal else ""


def _expression(step: Json) -> str:
    """The regular expression whose matches are the words of a Split: they are isolated, or what lies between them is removed; "" for any other."""
    pattern = step.get("pattern")
    if (step.get("behavior"), bool(step.get("invert"))) not in (("Isolated", False), ("Removed", True)) or not isinstance(pattern, dict):
        return ""
    return str(pattern.get("Regex"))


def _flat(step: Any, inner: str, folder: Path) -> list[Json]:
    """The steps of a sequence, or the one step; ModelError for what is none."""
    if step is None:
        return []
    parts = step.get(inner) if isinstance(step, dict) else None
    if not isinstance(step, dict) or not isinstance(step.get("type"), str) or (step["type"] == "Sequence" and not isinstance(parts, list)):
        raise ModelError(f"{folder}/tokenizer.json is damaged: {step!r} is no step of a tokenizer")
    return [step] if step["type"] != "Sequence" else [each for part in parts or [] for each in _flat(part, inner, folder)]
