"""`--data X` -> documents: local files and folders, builtin names, datasets of the hub.

    notes.txt rows.jsonl rows.json rows.csv rows.tsv rows.parquet     a file; .md, .raw and .tokens are read as .txt
    folder/                       all such files in it, or its train and test files if it has them
    python, python-source         texts of the running Python (see builtin.py); write ./python for a folder of that name
    name, name:config, name:config@split        a dataset of the hub, through the `datasets` library

Split. A source with a part of its own for measuring keeps it: builtin, folder or hub dataset with train and test (else validation), or a second
source passed as `test`. Every other source gives every tenth document to the test part; a source of fewer than ten documents is first cut into
pieces at blank lines, else line breaks, else spaces: 2,000 to 4,000 characters each, shorter in a short text, so that there are about ten or
more. A document that is in both parts word for word stays in the test part only.

In a folder, hidden files and README, LICENSE, NOTICE, SOURCE and CITATION are not data; parts are told by a word in the name (wiki.valid.tokens,
test/a.txt). A plain text file is one document, or as many as `<|endoftext|>` (or `<|end_of_text|>`) separates. Line ends are read as "\n".

Hash. A corpus of one plain text is hashed as that text in UTF-8, so that `sha256sum` of a file gives the same number; any other corpus as one
JSON line a document: a string, [prompt, completion], or [[role, content], ...].

Price: everything is read into memory, and the hub library downloads a whole dataset even for a slice like `@train[:1000]`.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from compressor import strict
from compressor.errors import DataError, MissingExtra
from compressor.pipelines import builtin
from compressor.pipelines.shapes import Document, documents

HELD_OUT_EVERY = 10
PIECE = 2000  # characters
TEXT_SUFFIXES = (".txt", ".md", ".raw", ".tokens")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".csv", ".tsv", ".parquet")
COLUMN_SUFFIXES = (".conll", ".iob", ".bio")  # a word and its tag on each line
BUILTIN = ("python", "python-source")

EXPANSION = 50  # a compressed file may grow so many times, and by SPARE bytes more
SPARE = 16 << 20
_SEPARATOR = re.compile(r"<\|end_?of_?text\|>")
_SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval"), "validation"
)
_NOT_DATA = ("readme", "license", "licence", "notice", "source", "sources", "citation")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Corpus:
    """Documents with the name and the hash that reports give them: all plain text, or all pairs."""

    name: str
    documents: list[Document]
    sha256: str

    @classmethod
    def of(cls, name: str, docs: list[Document]) -> "Corpus":
        """Hashes the documents; raises DataError if there are none, or if plain text and pairs are mixed."""
        if not docs:
            raise DataError(f"{name} holds no text")
        _one_kind(name, docs)
        return cls(name, docs, _digest(docs))

    @property
    def pairs(self) -> bool:
        return self.documents[0].prompt is not None


@dataclass(frozen=True)
class Splits:
    """`train` is tuned and calibrated on, `test` only measured; `rule` says in words how they came apart."""

    train: Corpus
    test: Corpus
    rule: str


@dataclass(frozen=True)
class _Source:
    """What was found: its own train and test parts, or everything in `train` and no test."""

    name: str
    train: list[Document]
    test: list[Document] | None = None

    def __post_init__(self) -> None:
        _one_kind(self.name, self.train + (self.test or []))


def _one_kind(name: str, docs: list[Document]) -> None:
    if len({d.prompt is None for d in docs}) > 1:
        raise DataError(f"{name} mixes plain text with prompts and completions; give one kind")


def load(source: str, test: str | None = None) -> Splits:
    """Training and held-out part of `source` by the rule above; with `test`, that source is measured instead. Raises DataError, MissingExtra."""
    found = _open(source)
    name = found.name
    if not found.train:
        raise DataError(f"{name} holds no text")
    if test is not None:
        held = _open(test)
        train, measured, rule = found.train, held.train if held.test is None else held.test, f"measured on {held.name}"
    elif found.test is not None:
        train, measured, rule = found.train, found.test, "train and test parts of the source"
    else:
        train, measured, rule = _hold_out(found.train, name)
    seen = set(measured)
    kept = [d for d in train if d not in seen]
    if len(kept) < len(train):
        rule += f"; left out of training because they are in the test part too: {len(train) - len(kept)}"
    if not kept:
        raise DataError(f"every training document of {name} is in its test part too; give other data")
    return Splits(Corpus.of(f"{name} [train]", kept), Corpus.of(f"{name} [test]" if test is None else held.name, measured), rule)


def load_text(source: str) -> Corpus:
    """One corpus for measuring: the source's own test part if it has one (as published numbers do), else all of it."""
    found = _open(source)
    return Corpus.of(found.name, found.train) if found.test is None else Corpus.of(f"{found.name} [test]", found.test)


def _open(source: str) -> _Source:
    if source == "python":
        return _Source(source, [Document(t) for t in builtin.topics("train")], [Document(t) for t in builtin.topics("test")])
    if source == "python-source":
        return _Source(source, [Document(t) for t in builtin.outside()])
    path = _path(source)
    if path is None:
        return _hub(source)
    return _folder(path) if path.is_dir() else _Source(path.name, _file(path))


def _path(source: str) -> Path | None:
    """The file or folder of that name, None for what must be a dataset of the hub."""
    path = Path(os.path.expanduser(source))
    if len(source) >= 1024:
        raise DataError(f"there is no file or folder {source[:200]!r}…")
    if not source.strip():
        raise DataError("the name of the data is empty; give a file, a folder, a builtin name or the name of a dataset")
    try:
        if path.is_dir() or path.is_file():
            return path
        if path.exists():
            raise DataError(f"{source!r} is neither a file nor a folder: pipes and devices are not read")
    except (OSError, ValueError):  # names that no file can have
        raise DataError(f"there is no file or folder {source!r}") from None
    if path.suffix in SUFFIXES or source[:1] in "./~" or source.count("/") > 1 or "\\" in source:
        raise DataError(f"there is no file or folder {source!r}")
    return None


def _folder(path: Path) -> _Source:
    parts = _parts(path, SUFFIXES)
    name, held = path.resolve().name, parts.get("test") or parts.get("validation")
    if held and "train" in parts:
        return _Source(name, _files(parts["train"]), _files(held))
    return _Source(name, _files(sorted(f for files in parts.values() for f in files)))


def _parts(path: Path, suffixes: tuple[str, ...]) -> dict[str | None, list[Path]]:
    """The files of a folder that end so, by the part that their names tell."""
    files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in suffixes and f.stem.lower() not in _NOT_DATA and f.is_file()]
    files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    if not files:
        raise DataError(f"folder {str(path)!r} holds no file that ends in {', '.join(suffixes)}")
    parts: dict[str | None, list[Path]] = {}
    for f in files:
        parts.setdefault(_split_word(f.relative_to(path)), []).append(f)
    return parts


def tables(source: str) -> tuple[str, dict[str, list[Any]]]:
    """The name of a source and its rows as they stand in the files: under "train", and under "test" and "validation" where it has such parts.

    Text files (.conll, .txt and the like) become rows {"lines": [...]}, one for each run of lines that are not blank.
    """
    path = _path(source)
    if path is None:
        return source, {("validation" if key in ("valid", "dev") else key): list(rows) for key, rows in _hub_parts(source).items()}
    if path.is_file():
        return path.name, {"train": _rows(path)}
    parts = _parts(path, (*SUFFIXES, *COLUMN_SUFFIXES))
    if "train" not in parts or len(parts) == 1:
        parts = {"train": sorted(f for files in parts.values() for f in files)}
    return path.resolve().name, {key: [row for f in files for row in _rows(f)] for key, files in parts.items() if key is not None}


def _rows(path: Path) -> list[Any]:
    if path.suffix.lower() in _READERS:
        return list(_READERS[path.suffix.lower()](path))
    runs = re.split(r"\n[ \t]*\n", _read(path))
    return [{"lines": lines} for run in runs if (lines := [line for line in run.split("\n") if line.strip()])]


def _split_word(path: Path) -> str | None:
    """Which part a file belongs to, by a word in its name or in its folder's: wiki.valid.tokens, train-00000-of-00001.parquet, test/a.txt."""
    words = [w for part in (path.stem, *reversed(path.parts[:-1])) for w in re.split(r"[^a-z]+", part.lower())]
    return next((_SPLIT_WORDS[w] for w in words if w in _SPLIT_WORDS), None)


def _files(paths: list[Path]) -> list[Document]:
    return [d for p in paths for d in _file(p)]


def _file(path: Path) -> list[Document]:
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        texts = _SEPARATOR.split(_read(path))
        return [Document(t if len(texts) == 1 else t.strip("\n")) for t in texts if t.strip()]
    if suffix not in SUFFIXES:
        raise DataError(f"cannot read {path.name!r}: its name must end in {', '.join(SUFFIXES)}")
    return documents(_READERS[suffix](path), path.name)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name!r} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path.name!r} cannot be read: {error.strerror}") from None


def _jsonl(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            try:
                yield strict.parse(line, unique=False)
            except ValueError as error:
                raise DataError(f"{path.name} line {number} is not JSON: {getattr(error, 'msg', error)}") from None


def _json(path: Path) -> Iterable[Any]:
    """A list of rows, an object that holds one list of rows, or JSON lines under the wrong name."""
    try:
        value = strict.parse(_read(path), unique=False)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _jsonl(path)
        raise DataError(f"{path.name} is not JSON: {error.msg} (line {error.lineno})") from None
    except ValueError as error:
        raise DataError(f"{path.name} is not JSON: {error}") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 and "messages" not in value and "conversations" not in value else [value]
    if not isinstance(value, list):
        raise DataError(f"{path.name} must hold a list of rows, not {type(value).__name__}")
    return value


def _table(path: Path) -> Iterator[dict[str, str]]:
    """Rows by header name; .csv with double quotes, .tsv without any quoting, as GLUE writes it."""
    text, limit = _read(path), csv.field_size_limit()
    tabs = path.suffix.lower() == ".tsv"
    lines = csv.reader(io.StringIO(text), delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    csv.field_size_limit(max(limit, len(text)))  # a text may be longer than the library's 128 KiB
    try:
        header = next(lines, [])
        for row in lines:
            if row and len(row) != len(header):
                raise DataError(f"{path.name} line {lines.line_num} has {len(row)} columns, its header {len(header)}")
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path.name} line {lines.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def expanded(path: Path) -> int:
    """Bytes that a compressed file may grow to: texts shrink some ten times, and what grows more is made to fill the memory."""
    return EXPANSION * path.stat().st_size + SPARE


def _parquet(path: Path) -> Iterator[Any]:
    """Rows; texts stay in the file's dictionaries until a row is made, so that a small file cannot have gigabytes decoded at once."""
    parquet, room = _extra("pyarrow.parquet", path.name), expanded(path)
    grown = DataError(f"{path.name} grows to more than {room} bytes, {EXPANSION} times its size: write it without that much compression")
    try:
        schema = parquet.ParquetFile(path).schema
        texts = [schema.column(i).path for i in range(len(schema)) if schema.column(i).physical_type == "BYTE_ARRAY"]
        file = parquet.ParquetFile(path, read_dictionary=texts)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > room or file.metadata.num_rows > room:
            raise grown
        for batch in file.iter_batches(batch_size=1024):
            for row in chain.from_iterable(batch.slice(start, 16).to_pylist() for start in range(0, batch.num_rows, 16)):
                room -= _characters(row)
                if room < 0:
                    raise grown
                yield row
    except (OSError, ValueError, MemoryError, KeyError) as error:  # of which pyarrow's own errors are kinds
        raise DataError(f"{path.name} is not a parquet file: {_first_line(error)}") from None


def _characters(value: Any) -> int:
    """Those of all texts in a row."""
    if isinstance(value, dict | list):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str | bytes) else 1


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {".jsonl": _jsonl, ".json": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet}


def _hub(source: str) -> _Source:
    parts = _hub_parts(source)
    held = next((parts[k] for k in ("test", "validation", "valid", "dev") if k in parts), None)
    return _Source(source, documents(parts["train"], source), None if held is None else documents(held, source))


def _hub_parts(source: str) -> dict[str, Iterable[Any]]:
    """The splits of a dataset of the hub; the only one there is counts as "train"."""
    head, _, split = source.partition("@")
    name, _, config = head.partition(":")
    if not _HUB_NAME.fullmatch(name):
        raise DataError(f"{source!r} is neither a file, a folder, a builtin name ({', '.join(BUILTIN)}) nor the name of a dataset")
    hub = _extra("datasets", source)
    try:
        data = hub.load_dataset(name, config or None, split=split or None)
    except Exception as error:  # the library raises whatever its loaders, the hub and the network raise
        why = f"nor a dataset that the hub could give: {_first_line(error)}"
        raise DataError(f"{source!r} is neither a file, a folder, a builtin name ({', '.join(BUILTIN)}) {why}") from None
    parts = dict(data) if isinstance(data, dict) else {"train": data}
    if len(parts) == 1:
        parts = {"train": next(iter(parts.values()))}
    if "train" not in parts:
        raise DataError(f"dataset {head!r} has the splits {', '.join(parts)} and none called train; name one, as in {head}@{next(iter(parts))}")
    return parts


def _extra(module: str, what: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise MissingExtra(f"reading {what!r} needs the datasets library: pip install 'compressor[data]'") from None


def _hold_out(docs: list[Document], name: str) -> tuple[list[Document], list[Document], str]:
    """(train, test, rule): every tenth document is measured; too few documents are cut into pieces first."""
    unit = "document"
    if len(docs) < HELD_OUT_EVERY:
        size = min(PIECE, max(1, sum(len(d.text) for d in docs) // (2 * HELD_OUT_EVERY)))
        pieces = [p for d in docs for p in ([d] if d.prompt is not None else map(Document, cut(d.text, size)))]
        unit, docs = ("piece" if len(pieces) > len(docs) else unit), pieces
    step = min(HELD_OUT_EVERY, len(docs))
    if step < 2:
        raise DataError(f"{name} is too small to hold out a part for measuring; give more text, or a separate test source")
    train = [d for i, d in enumerate(docs) if i % step != step - 1]
    return train, docs[step - 1 :: step], f"one in {step} of {len(docs)} {unit}s held out"


def cut(text: str, size: int) -> list[str]:
    """Pieces of `size` to 2 * size characters (the last may be shorter), cut at a blank line, else a line break, else a space, else anywhere."""
    pieces, start = [], 0
    while start < len(text):
        window = text[start + size : start + 2 * size]
        found = next((m for p in (r"\n[ \t]*\n", r"\n", r" ") if (m := re.search(p, window))), None)
        end = start + size + (found.end() if found else len(window))
        pieces.append(text[start:end].strip("\n"))
        start = end
    return [p for p in pieces if p.strip()]


def _digest(docs: list[Document]) -> str:
    if len(docs) == 1 and docs[0].prompt is None:
        return hashlib.sha256(docs[0].text.encode("utf-8", "surrogatepass")).hexdigest()
    digest = hashlib.sha256()
    for d in docs:
        value: Any = d.text if d.prompt is None else d.messages or (d.prompt, d.text)
        digest.update(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else line[:197] + "..."
