"""Reading, splitting and hashing of texts: every shape and file ending, with real files."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compressor.errors import DataError, MissingExtra, UserError
from compressor.pipelines import builtin, data, sources
from compressor.pipelines.data import Corpus, Document
from compressor.pipelines.shapes import documents

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not in ../shared/data beside this checkout")
    return path


def one_sentence(error: pytest.ExceptionInfo[Any], *words: str) -> None:
    text = str(error.value)
    assert isinstance(error.value, UserError)
    assert "\n" not in text and len(text) < 400 and "Traceback" not in text
    for word in words:
        assert word in text


def texts(corpus: Corpus) -> list[str]:
    return [d.text for d in corpus.documents]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "\n", "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    elif path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        lines = [mark.join(rows[0])] + [mark.join(str(v) for v in r.values()) for r in rows]
        path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


# --- files and shapes


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".tsv"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "some text"}, Document("some text")),
        ({"sentence": "a fine film ", "label": 1}, Document("a fine film ")),
        ({"unheard_of": "only column"}, Document("only column")),
        ({"instruction": "Add 1 and 2", "input": "", "output": "3", "answer": "3"}, Document("3", f"{ALPACA}Add 1 and 2\n\n### Response:\n")),
        ({"prompt": "2+2=", "completion": "4"}, Document("4", "2+2=")),
        ({"question": "Why?", "answer": "Because."}, Document(" Because.", "Question: Why?\nAnswer:")),
    ],
)
def test_every_ending_reads_every_flat_shape(tmp_path: Path, suffix: str, row: dict[str, Any], expected: Document) -> None:
    path = write_rows(tmp_path / f"x{suffix}", [row, row])
    assert data.load_text(str(path)).documents == [expected, expected]


def test_alpaca_input_has_its_own_section(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"instruction": "Sum", "input": "1, 2", "output": "3"}])
    (doc,) = data.load_text(str(path)).documents
    assert doc.prompt is not None and doc.prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert doc.prompt.endswith("### Instruction:\nSum\n\n### Input:\n1, 2\n\n### Response:\n")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_chats_in_both_spellings(tmp_path: Path, suffix: str) -> None:
    one = write_rows(tmp_path / f"a{suffix}", [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]}])
    two = write_rows(tmp_path / f"b{suffix}", [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ahoy"}]}])
    (doc,) = data.load_text(str(one)).documents
    assert data.load_text(str(two)).documents == [doc]
    assert doc == Document(" Ahoy", "User: Hi\n\nAssistant:", (("user", "Hi"), ("assistant", "Ahoy")))


def test_a_chat_ends_with_the_assistant_and_one_without_is_skipped() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (doc,) = documents([{"messages": talk}, {"messages": talk[:1]}], "x")
    assert doc.messages == (("user", "a"), ("assistant", "b"))


def test_empty_rows_are_skipped_and_missing_values_are_empty() -> None:
    rows = [{"prompt": "p", "completion": ""}, {"prompt": None, "completion": "c"}, {"prompt": "p", "completion": None}]
    assert documents(rows, "x") == [Document("c", "")]
    assert documents([{"text": "a"}, {"text": None}, {"text": " \n"}], "x") == [Document("a")]


def test_rows_that_are_lines_of_one_text_are_joined() -> None:
    rows = [{"text": ""}, {"text": " = Title = \n"}, {"text": ""}, {"text": " A line . \n"}] * 6
    assert documents(rows, "x") == [Document("\n\n".join(r["text"] for r in rows))]
    assert len(documents(rows[1:2] * 24, "x")) == 24


def test_json_variants(tmp_path: Path) -> None:
    for number, content in enumerate(['["a", "b"]', '{"data": [{"text": "a"}, {"text": "b"}]}', '{"text": "a"}\n{"text": "b"}\n']):
        (tmp_path / f"{number}.json").write_text(content)
        assert texts(data.load_text(str(tmp_path / f"{number}.json"))) == ["a", "b"]
    (tmp_path / "one.json").write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}')
    assert len(data.load_text(str(tmp_path / "one.json")).documents) == 1


def test_csv_quotes_long_fields_and_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('text,n\n"a, ""b""\nc",1\n' + "long " * 40000 + ",2\n")
    assert texts(data.load_text(str(tmp_path / "x.csv"))) == ['a, "b"\nc', "long " * 40000]
    (tmp_path / "x.tsv").write_text('sentence\tlabel\nan "open quote\t1\nnext\x85line\t0\n', "utf-8")
    assert texts(data.load_text(str(tmp_path / "x.tsv"))) == ['an "open quote', "next\x85line"]


def test_text_with_separators_bom_and_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n<|endoftext|>\r\nthree\r\n<|endoftext|>\n")
    assert texts(data.load_text(str(tmp_path / "a.txt"))) == ["one\ntwo", "three"]
    (tmp_path / "b.txt").write_text("\n raw text, as it is \n\n")
    assert texts(data.load_text(str(tmp_path / "b.txt"))) == ["\n raw text, as it is \n\n"]


# --- errors


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"foo": 1, "bar": 2}\n', ("foo, bar", "a text column", "messages")),
        ("a.jsonl", '{"text": "x"}\nnot json\n', ("a.jsonl line 2",)),
        ("a.jsonl", '{"text": ["x"]}\n', ("row 1", "'text'", "list")),
        ("a.jsonl", "3\n", ("int",)),
        ("a.jsonl", '{"messages": "hi"}\n', ("row 1", "list of messages")),
        ("a.jsonl", '{"messages": [{"who": "me"}]}\n', ("role and content",)),
        ("a.jsonl", '{"text": "x"}\n{"prompt": "a", "completion": "b"}\n', ("mixes",)),
        ("a.json", "{", ("a.json", "line 1")),
        ("a.json", "3", ("list of rows",)),
        ("a.csv", "text,label\nonly one\n", ("line 2", "1 columns", "header 2")),
        ("a.csv", "a,b\n1,2\n", ("a, b",)),
        ("a.txt", " \n\n", ("a.txt", "holds no text")),
        ("a.txt", b"\xff\xfe\x00bad", ("not UTF-8",)),
        ("a.parquet", "no parquet at all", ("not a parquet file",)),
        ("a.pdf", "%PDF", ("must end in", ".jsonl")),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, name: str, content: str | bytes, words: tuple[str, ...]) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (data.load, data.load_text):
        with pytest.raises(DataError) as error:
            read(str(tmp_path / name))
        one_sentence(error, *words)


@pytest.mark.parametrize("source", ["", "missing.txt", "./missing", "a/b/c", "C:\\data\\x", "~/no/such/folder"])
def test_missing_files_never_ask_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_extra", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(DataError) as error:
        data.load(source)
    one_sentence(error)


def test_empty_folder_and_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about the data")
    with pytest.raises(DataError) as error:
        data.load(str(tmp_path))
    one_sentence(error, "holds no file")
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(DataError) as error:
        data.load(str(tmp_path / "a.jsonl"))
    one_sentence(error, "too small")
    (tmp_path / "a.jsonl").write_text('{"text": "same"}\n' * 30)
    with pytest.raises(DataError) as error:
        data.load(str(tmp_path / "a.jsonl"))
    one_sentence(error, "in its test part too")


# --- builtin and hub


def test_builtin_texts() -> None:
    splits = data.load("python")
    held = builtin.topics("test")
    assert texts(splits.test) == held and texts(splits.train) == [t for t in builtin.topics("train") if t not in held]
    assert data.load_text("python").sha256 == splits.test.sha256
    assert texts(data.load_text("python-source")) == builtin.outside()
    code = data.load("python-source")
    assert len(code.test.documents) >= 1 and not set(code.train.documents) & set(code.test.documents)


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[Any, ...]]:
    calls = []

    def load_dataset(name: str, config: str | None, split: str | None) -> Any:
        calls.append((name, config, split))
        if isinstance(answer, Exception):
            raise answer
        return answer

    library = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setattr(sources, "import_module", lambda name: library if name == "datasets" else pytest.fail(name))
    return calls


def test_hub_names_configs_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"row {i}"} for i in range(40)]
    calls = hub(monkeypatch, {"train": rows, "validation": [{"text": "v"}], "test": [{"text": "t"}]})
    splits = data.load("org/name:config")
    assert calls == [("org/name", "config", None)]
    assert (len(splits.train.documents), texts(splits.test), splits.train.name) == (40, ["t"], "org/name:config [train]")
    hub(monkeypatch, {"train": rows, "validation": [{"text": "v"}]})
    assert texts(data.load("name").test) == ["v"] == texts(data.load_text("name"))
    calls = hub(monkeypatch, rows)
    assert texts(data.load("name@train[:40]").test) == [f"row {i}" for i in range(9, 40, 10)]
    assert calls == [("name", None, "train[:40]")]
    hub(monkeypatch, {"test": rows})
    assert len(data.load("name").test.documents) == 4 and len(data.load_text("name").documents) == 40


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"a": [], "b": []})
    with pytest.raises(DataError) as error:
        data.load("name")
    one_sentence(error, "a, b", "name@a")
    hub(monkeypatch, ConnectionError("Couldn't reach 'name' on the Hub\nsecond line " + "x" * 900))
    with pytest.raises(DataError) as error:
        data.load("name")
    one_sentence(error, "'name'", "Couldn't reach")
    assert error.value.__cause__ is None and error.value.__suppress_context__
    with pytest.raises(DataError) as error:
        data.load("what is this?")
    one_sentence(error, "builtin name")


def test_a_dataset_of_the_library_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(20)]
    found = datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:3] + [{"question": "x", "answer": "y"}])
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: found)
    splits = data.load("some/questions")
    assert (len(splits.train.documents), len(splits.test.documents)) == (17, 4)
    assert splits.rule.endswith("too: 3")


@pytest.mark.parametrize("source", ["org/name", "x.parquet"])
def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    if source == "x.parquet":
        (tmp_path / source).write_bytes(b"PAR1")
        source = str(tmp_path / source)
    with pytest.raises(MissingExtra) as error:
        data.load(source)
    one_sentence(error, "compressor[data]")


def test_import_is_lean() -> None:
    code = "import sys, compressor.pipelines.data as d; print([m for m in ('transformers', 'datasets', 'pyarrow', 'tokenizers') if m in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- splits and hashes


def test_every_tenth_document_is_held_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"text": f"document {i}"} for i in range(34)])
    one, two = data.load(str(path)), data.load(str(path))
    assert one == two
    assert texts(one.test) == [f"document {i}" for i in (9, 19, 29)]
    assert len(one.train.documents) == 31 and not set(texts(one.train)) & set(texts(one.test))
    assert "one in 10 of 34 documents" in one.rule


def test_documents_in_both_parts_stay_in_test(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"text": f"document {i % 10}"} for i in range(30)])
    splits = data.load(str(path))
    assert set(texts(splits.test)) == {"document 9"} and len(splits.train.documents) == 27
    (tmp_path / "d").mkdir()
    write_rows(tmp_path / "d" / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    write_rows(tmp_path / "d" / "test.jsonl", [{"text": "b"}])
    splits = data.load(str(tmp_path / "d"))
    assert (texts(splits.train), texts(splits.test)) == (["a"], ["b"]) and splits.rule.endswith("too: 1")


@pytest.mark.parametrize("joint", ["\n\n", "\n", " ", ""])
def test_one_text_is_cut_into_pieces(tmp_path: Path, joint: str) -> None:
    paragraphs = [f"{i:04d}" + "abcdefghi" * 11 for i in range(300)]
    (tmp_path / "x.txt").write_text(joint.join(paragraphs))
    splits = data.load(str(tmp_path / "x.txt"))
    train, test = texts(splits.train), texts(splits.test)
    size = sum(map(len, train + test))
    assert abs(size - len(joint.join(paragraphs))) <= 2 * 20 and 0.05 < sum(map(len, test)) / size < 0.15
    assert not set(train) & set(test) and splits == data.load(str(tmp_path / "x.txt"))
    if joint == "\n\n":
        assert all(set(piece.split("\n\n")) <= set(paragraphs) for piece in train + test)  # no paragraph is torn


def test_cut_loses_nothing_but_line_breaks_at_the_borders() -> None:
    text = "one two\n\nthree four five\nsix\n \nseven " * 50
    pieces = sources.cut(text, 40)
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")
    assert all(len(p) <= 80 for p in pieces) and all(len(p) >= 38 for p in pieces[:-1])


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.txt").write_text("not data")
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.md").write_text("third")
    (tmp_path / "image.png").write_bytes(b"png")
    assert texts(data.load_text(str(tmp_path))) == ["first", "second", "third"]
    for name in ("wiki.train.tokens", "valid-00000-of-00001.txt"):
        (tmp_path / name).write_text(name)
    splits = data.load(str(tmp_path))
    assert (texts(splits.train), texts(splits.test)) == (["wiki.train.tokens"], ["valid-00000-of-00001.txt"])
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.txt").write_text("from the folder")
    assert texts(data.load(str(tmp_path)).test) == ["from the folder"]
    assert data.load_text(str(tmp_path)).name == f"{tmp_path.name} [test]"


def test_a_second_source_to_measure_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("tuned on")
    (tmp_path / "b.txt").write_text("measured on")
    splits = data.load(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    assert (texts(splits.train), texts(splits.test), splits.test.name, splits.rule) == (["tuned on"], ["measured on"], "b.txt", "measured on b.txt")


def test_hashes_name_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("gréen\n".encode())
    corpus = data.load_text(str(tmp_path / "a.txt"))
    assert corpus.sha256 == hashlib.sha256("gréen\n".encode()).hexdigest()
    assert corpus.sha256 == Corpus.of("another name", [Document("gréen\n")]).sha256
    (tmp_path / "a.txt").write_bytes("gréen\r\n".encode())
    assert data.load_text(str(tmp_path / "a.txt")).sha256 == corpus.sha256
    docs = [Document("a", "b"), Document("é", "")]
    talk = [Document("a", "b", (("user", "b"), ("assistant", "a")))]
    assert Corpus.of("x", talk).sha256 == hashlib.sha256(b'[["user", "b"], ["assistant", "a"]]\n').hexdigest()
    assert Corpus.of("x", docs).sha256 == hashlib.sha256('["b", "a"]\n["", "é"]\n'.encode()).hexdigest()
    others = [
        docs[::-1],
        [Document("ab", "")],
        [Document("a"), Document("b")],
        [Document("ab")],
        [Document("a", "b", (("user", "b"), ("assistant", "a")))],
    ]
    assert len({Corpus.of("x", d).sha256 for d in others}) == len(others)


# --- the texts beside this checkout


def test_shared_instruction_sets() -> None:
    for name, rows, held, twice in (("boolq", 9427, 3270, 0), ("arc_easy", 2251, 2376, 2)):
        splits = data.load(str(shared(name)))
        assert (len(splits.train.documents), len(splits.test.documents)) == (rows - twice, held)
        assert splits.rule.endswith(f"too: {twice}") == bool(twice)
        assert all(d.prompt is not None and d.prompt.startswith(ALPACA) and d.text.startswith("the correct answer is") for d in splits.test.documents)
        alone = data.load(str(shared(name) / "train.json"))
        assert len(alone.test.documents) == rows // 10


def test_shared_texts() -> None:
    stories = data.load_text(str(shared("tinystories")))
    assert len(stories.documents) == 317 and not any("endoftext" in t for t in texts(stories))
    assert len(data.load(str(shared("tinystories"))).test.documents) == 31
    wiki = data.load(str(shared("wikitext2")))
    raw = (shared("wikitext2") / "wiki.test.tokens").read_bytes()
    assert wiki.test.sha256 == hashlib.sha256(raw).hexdigest() and len(wiki.train.documents) == 1
    films = data.load(str(shared("sst2")))
    assert texts(films.test)[0] == "the expressive power of the camera " and len(films.test.documents) == 6735
    assert not set(texts(films.train)) & set(texts(films.test))
