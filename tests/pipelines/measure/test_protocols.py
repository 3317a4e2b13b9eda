"""The field's protocols word for word, copies of their texts, and strides, each against a naive computation."""

import gzip
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressor.errors import DataError, MissingExtra, RecipeError
from compressor.pipelines import evaluate
from compressor.pipelines.data import Corpus, Document
from compressor.pipelines.measure import protocols

ROWS = ["", " = Robert = \n", "", " Robert is an actor . \n", " He acts\x0b . \n"]
RAW = " \n = Robert = \n \n Robert is an actor . \n He acts\x0b . \n"


class Rows(list[Any]):
    """As much of a dataset as is asked of it."""

    def select(self, indices: Any) -> "Rows":
        return Rows(self[i] for i in indices)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A hub that knows both datasets; what was asked of it."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, /, **options: Any) -> Rows:
        calls.append((path, options))
        return Rows({"text": text} for text in (ROWS if "wikitext" in path else [f"page {i}" for i in range(1500)]))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_wikitext(hub: list[Any]) -> None:
    for window in (2048, 4096):
        text = protocols.read(f"wikitext2-{window}")
        assert text.corpus.documents == [Document("\n\n".join(ROWS))]
        assert (text.window, text.stride, text.max_tokens, text.own, text.label) == (window, window, 0, False, f"wikitext2-{window}")
    assert hub[0] == ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"})
    assert text.corpus.name == "Salesforce/wikitext wikitext-2-raw-v1, test"


def test_c4(hub: list[Any]) -> None:
    text = protocols.read("c4")
    assert text.corpus.documents == [Document(" ".join(f"page {i}" for i in range(1100)))]
    assert (text.window, text.stride, text.max_tokens) == (2048, 2048, 524288)
    assert hub == [("allenai/c4", {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"})]
    assert protocols.read("c4", 10**9).label == "c4"
    assert protocols.read("c4", 4096).label == "c4, first 4096 tokens"


def test_as_gptqs_scripts_cut(model: Any, adding: Any, hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One BOS in front, windows of the first count · window tokens, the mean loss of each weighted alike."""
    monkeypatch.setitem(protocols.PROTOCOLS, "c4", protocols.Fixed("allenai/c4", protocols._C4, "validation", " ", 16, 1100, 40 * 16))
    text = protocols.read("c4")
    found = evaluate.measure(model, adding, {"c4": text.corpus}, text.window, text.max_tokens, stride=text.stride)["c4"]
    ids = torch.tensor(adding(" ".join(f"page {i}" for i in range(1100)))["input_ids"])[: 40 * 16]
    with torch.no_grad():
        losses = [float(model(input_ids=part[None], labels=part[None]).loss) * 16 for part in ids.reshape(40, 16)]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / (40 * 16)), rel=1e-5)
    assert found["tokens"] == 40 * 15


@pytest.mark.parametrize("form", ["wiki.test.raw", "rows.jsonl", "rows.json", "rows.jsonl.gz", "joined.txt", "folder"])
def test_copies_are_the_same_text(tmp_path: Path, hub: list[Any], form: str) -> None:
    path = tmp_path / form
    lines = "".join(json.dumps({"text": row}) + "\n" for row in ROWS)
    if form == "folder":
        path.mkdir()
        (path / "wiki.test.raw").write_bytes(RAW.encode())
        (path / "wiki.train.raw").write_bytes(b"other")
    elif form.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_bytes({".raw": RAW, ".txt": "\n\n".join(ROWS)}.get(path.suffix, lines).encode())
    text, real = protocols.read(f"wikitext2-2048={path}"), protocols.read("wikitext2-2048")
    assert text.corpus.sha256 == real.corpus.sha256 and text.own and not text.note
    assert len(hub) == 1 and text.about()["own_data"] and text.label == f"wikitext2-2048 on {text.corpus.name}"


def test_the_tokens_variant_says_so(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.tokens").write_text(" = <unk> = \n")
    assert "tokens variant" in protocols.read(f"wikitext2-2048={tmp_path / 'wiki.test.tokens'}").about()["note"]


def test_the_shared_copy(shared: Path) -> None:
    text = protocols.read(f"wikitext2-2048={shared / 'data' / 'wikitext2'}")
    assert text.corpus.name == "wiki.test.tokens" and text.note
    rows = text.corpus.documents[0].text.split("\n\n")
    assert text.corpus.documents[0].text.startswith("\n\n = Robert <unk> = \n\n\n\n\n Robert <unk> is") and len(rows) == 4358


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("wikitext2-1024", "protocol 'wikitext2-1024' is unknown; choose wikitext2-2048, wikitext2-4096, c4"),
        ("c4=", "names no file: give c4=PATH"),
        ("c4=nowhere.txt", "there is no file or folder 'nowhere.txt'"),
        ("c4=none", "holds no file with 'validation' in the name"),
        ("c4=two", "holds 2 files with 'validation' in the name"),
        ("c4=empty.jsonl", "must hold rows with a column 'text'"),
        ("c4=blank.txt", "blank.txt holds no text"),
        ("c4=broken.json.gz", "holds no gzipped JSON lines"),
        ("c4=several.txt", "holds 2 documents"),
        ("c4=x.pdf", "its name must end in"),
    ],
)
def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("two/c4-validation.00000.json", "two/c4-validation.00001.json", "blank.txt", "x.pdf"):
        (tmp_path / name).write_text(" \n")
    (tmp_path / "empty.jsonl").write_text('{"words": "x"}\n')
    (tmp_path / "broken.json.gz").write_bytes(gzip.compress(b'{"text": "x"}')[:-6])
    (tmp_path / "several.txt").write_text("one<|endoftext|>two")
    with pytest.raises((RecipeError, DataError), match=words.replace(".", r"\.")):
        protocols.read(source)


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=down))
    with pytest.raises(DataError, match=r"could not be fetched from allenai/c4 \(no route\); offline, give c4=PATH"):
        protocols.read("c4")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'compressor\[data\]'"):
        protocols.read("c4")


@pytest.mark.parametrize(
    ("count", "window", "stride"), [(100, 16, 4), (100, 16, 15), (97, 16, 1), (64, 64, 7), (33, 32, 8), (10, 32, 8), (100, 16, 16)]
)
def test_strides_against_a_naive_loop(model: Any, count: int, window: int, stride: int) -> None:
    """Every token counts once, predicted from what stands before it in the first window that reaches it."""
    ids = torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(count))
    losses, end = list[float](), 1
    with torch.no_grad():
        for begin in range(0, max(1, count - window + 1), stride):
            part = ids[begin : begin + window]
            logs = model(input_ids=part[None]).logits[0].double().log_softmax(-1)
            first = end if stride < window else begin + 1  # windows that do not overlap do not predict their first token
            losses += [-float(logs[i - begin - 1, ids[i]]) for i in range(first, begin + len(part))]
            end = begin + len(part)
    found = evaluate.perplexity(model, ids, window, stride=stride)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6) and found["tokens"] == len(losses)
    assert (found["window"], found["stride"]) == (min(window, count), min(stride, count))


def test_strides_keep_masks_and_refuse_pairs(model: Any, tokenizer: Any) -> None:
    ids = torch.arange(40)
    rows, targets = evaluate.cut(ids, torch.where(ids % 2 == 0, ids, -100), 16, 0, 4)
    assert rows.shape == (7, 16) and targets[0].tolist() == [i if i % 2 == 0 else -100 for i in range(16)]
    assert targets[1:, :12].eq(-100).all() and targets[1, 12:].tolist() == [16, -100, 18, -100]
    pairs = Corpus.of("x", [Document("b", "a"), Document("d", "c")])
    with pytest.raises(DataError, match=r"x: pairs .* leave the stride out"):
        evaluate.measure(model, tokenizer, {"x": pairs}, 16, stride=4)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [((1, None, 0), "window=1"), ((16, 17, 0), "from 1 to the window's 16"), ((None, 0, 0), "stride=0"), ((16, 4, 1), "max_tokens=1")],
)
def test_bad_numbers(numbers: tuple[int | None, int | None, int], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        protocols.check(*numbers)
