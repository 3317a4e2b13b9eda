"""Texts and the rules by which perplexity is taken on them: the field's fixed protocols by name, or any text with a window and a stride.

    wikitext2-2048, wikitext2-4096    the test part of wikitext-2-raw-v1, rows joined by blank lines ("\\n\\n"), tokenised in one go with the
                                      tokenizer's own special tokens, windows of 2048 or 4096 that do not overlap, the tail dropped
    c4                                the first 1100 documents of en/c4-validation.00000-of-00008 joined by spaces, tokenised in one go, the first
                                      256 · 2048 tokens in windows of 2048

These are the cuts of GPTQ's datautils.py (for C4 the one that it calls "new", which SparseGPT and Wanda took over). The mean here is over predicted
tokens, 2047 of each window of 2048; those scripts multiply the mean of a window by 2048 and divide by 2048 again: the same number.

The texts come from the hub through `datasets`. Offline, NAME=PATH takes a copy: rows as the hub has them (.jsonl, .json, .parquet, either .gz, with a
column `text`), a wiki.test.raw as WikiText ships it, from which those rows follow (one a line, blank ones empty), or a .txt of the text already
joined. Whether a copy is the real text nothing here can tell: the result says that the data is the user's own, and its hash. wiki.test.tokens is
another text, with rare words as <unk>: results on it compare with nothing that was published on the raw one, and say so.
"""

import gzip
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from compressor import strict
from compressor.errors import DataError, MissingExtra, RecipeError
from compressor.pipelines.data import Corpus, Document, load_text
from compressor.pipelines.sources import EXPANSION, expanded, tables

TOKENS_NOTE = "the text has <unk> for rare words, so it is the tokens variant of WikiText, not the raw one of this protocol"


@dataclass(frozen=True)
class Fixed:
    """A protocol of the field: which rows of which dataset, how they are joined, the window, and how many tokens count (0: all)."""

    dataset: str
    options: dict[str, Any]  # for datasets.load_dataset
    part: str  # word by which the file of a folder is told
    join: str
    window: int
    rows: int | None = None
    limit: int = 0

    def where(self) -> str:
        """The source in words, for reports."""
        inner = self.options.get("name") or next(iter(self.options["data_files"].values()))
        return f"{self.dataset} {inner}, {self.options['split']}"


_WIKI: dict[str, Any] = {"name": "wikitext-2-raw-v1", "split": "test"}
_C4: dict[str, Any] = {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"}
PROTOCOLS = {
    "wikitext2-2048": Fixed("Salesforce/wikitext", _WIKI, "test", "\n\n", 2048),
    "wikitext2-4096": Fixed("Salesforce/wikitext", _WIKI, "test", "\n\n", 4096),
    "c4": Fixed("allenai/c4", _C4, "validation", " ", 2048, 1100, 256 * 2048),
}


@dataclass(frozen=True)
class Text:
    """A text and how to measure on it: `window` and `stride` in tokens, `max_tokens` of the text's beginning (0: all).

    `protocol` is the name of a fixed one or None, `own` whether the user brought its text, `note` what a reader must know of it.
    """

    corpus: Corpus
    window: int
    stride: int
    max_tokens: int = 0
    protocol: str | None = None
    own: bool = True
    note: str = ""

    @property
    def label(self) -> str:
        """What tables call it: the protocol, with what departs from it, or the name of the data."""
        if self.protocol is None:
            return self.corpus.name
        most = PROTOCOLS[self.protocol].limit
        part = f", first {self.max_tokens} tokens" if self.max_tokens != most else ""
        return f"{self.protocol}{part}{' on ' + self.corpus.name if self.own else ''}"

    def about(self) -> dict[str, Any]:
        """The rule, for keys of the cache and for results; the data has a name and a hash of its own."""
        numbers = {"window": self.window, "stride": self.stride, "max_tokens": self.max_tokens}
        own = {"own_data": self.own} if self.protocol else {}
        return {"fixed": self.protocol} | own | numbers | ({"note": self.note} if self.note else {})


def fixed(name: str) -> Fixed:
    if name not in PROTOCOLS:
        raise RecipeError(f"protocol {name!r} is unknown; choose {', '.join(PROTOCOLS)}, or give a text with --data and --window")
    return PROTOCOLS[name]


def is_protocol(source: str) -> bool:
    """Whether a --data means a protocol: its name, or NAME=PATH."""
    return source.partition("=")[0] in PROTOCOLS


def read(source: str, max_tokens: int = 0) -> Text:
    """The text of a protocol, from the hub, or NAME=PATH from a file or folder here. Raises RecipeError, DataError, MissingExtra."""
    name, given, path = source.partition("=")
    rule = fixed(name)
    if given and not path.strip():
        raise RecipeError(f"{source} names no file: give {name}=PATH, or {name} alone to fetch its text from the hub")
    text, title = _local(rule, Path(path).expanduser()) if given else (_joined(rule, _fetch(rule, name)), rule.where())
    if not text.strip():
        raise DataError(f"{title} holds no text")
    corpus = Corpus.of(title, [Document(text)])
    most = min(max_tokens or rule.limit, rule.limit or max_tokens)
    wiki = rule.dataset.endswith("wikitext")
    return Text(corpus, rule.window, rule.window, most, name, bool(given), TOKENS_NOTE if wiki and "<unk>" in text else "")


def plain(source: str, window: int, stride: int | None, max_tokens: int) -> Text:
    """Any text that `sources` reads, with a window and a stride of one's own."""
    return Text(load_text(source), window, stride or window, max_tokens)


def check(window: int | None, stride: int | None, max_tokens: int) -> None:
    """RecipeError for numbers that make no protocol."""
    if window is not None and window < 2:
        raise RecipeError(f"window={window} must be at least 2 tokens: the first of a window is not predicted")
    if stride is not None and (stride < 1 or (window is not None and stride > window)):
        of = f"the window's {window} tokens" if window is not None else "the window"
        raise RecipeError(f"stride={stride} must be from 1 to {of}: a longer one would leave text out")
    if max_tokens < 0 or max_tokens == 1:
        raise RecipeError(f"max_tokens={max_tokens} must be 0 for the whole text, or at least 2")


def _joined(rule: Fixed, rows: Sequence[str]) -> str:
    return rule.join.join(rows[: rule.rows])


def _fetch(rule: Fixed, name: str) -> list[str]:
    try:
        hub = import_module("datasets")
    except ImportError:
        raise MissingExtra(f"fetching {name!r} needs the datasets library: pip install 'compressor[data]'") from None
    try:
        data = hub.load_dataset(rule.dataset, **rule.options)
        return _column(data if rule.rows is None else data.select(range(min(rule.rows, len(data)))), name)
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its loaders, the hub and the network raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise DataError(f"the text of protocol {name} could not be fetched from {rule.dataset} ({reason}); offline, give {name}=PATH") from None


def _local(rule: Fixed, path: Path) -> tuple[str, str]:
    """(text, name) of a copy."""
    if path.is_dir():
        path = _of_folder(rule, path)
    if not path.is_file():
        raise DataError(f"there is no file or folder {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix in (".gz", ".parquet", ".json", ".jsonl"):
        return _joined(rule, _column(_rows(path), path.name)), path.name
    documents = load_text(str(path)).documents
    if len(documents) > 1:
        raise DataError(f"{path.name} holds {len(documents)} documents, where a protocol wants one text: give rows with a column 'text', as .jsonl")
    text = documents[0].text
    if suffix in (".raw", ".tokens"):
        return _joined(rule, [line if line.strip() else "" for line in io.StringIO(text)]), path.name
    return text, path.name


def _of_folder(rule: Fixed, folder: Path) -> Path:
    """The one file of a folder whose name tells the part."""
    found = [path for path in sorted(folder.rglob("*")) if rule.part in path.name.lower() and path.is_file()]
    if len(found) != 1:
        count = f"{len(found)} files" if found else "no file"
        raise DataError(f"folder {str(folder)!r} holds {count} with {rule.part!r} in the name, where one is wanted: name the file itself")
    return found[0]


def _rows(path: Path) -> Iterable[Any]:
    if path.suffix.lower() != ".gz":
        return tables(str(path))[1]["train"]
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            text = file.read((room := expanded(path)) + 1)
        if len(text) > room:
            raise DataError(f"{path.name} grows to more than {room} characters, {EXPANSION} times its size: unpack it first")
        return [strict.parse(line[0], unique=False) for line in re.finditer(r"[^\n]+", text) if not line[0].isspace()]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path.name} holds no gzipped JSON lines: {error}") from None


def _column(rows: Iterable[Any], name: str) -> list[str]:
    texts = [row.get("text") if isinstance(row, dict) else None for row in rows]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{name} must hold rows with a column 'text'")
    return [str(text) for text in texts]
