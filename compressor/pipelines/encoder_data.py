"""`--data X` -> labelled examples for an encoder; the task is told by the columns.

    sentence | text | content, label                                          a label for each text
    sentence1, sentence2 | premise, hypothesis | question, sentence |
        question1, question2 | text1, text2, label                            a label for each pair of texts
    tokens | words, tags | ner_tags | pos_tags | labels                       a tag for each word; or text in lines of "word … tag" (CoNLL)
    question, context, answers; or SQuAD's own .json                          the answer's place in the context

Sources and their parts are as in sources.py: a folder with train and test or validation files keeps them (a test part without labels, as GLUE has
it, is passed over; of validation_matched and validation_mismatched the first counts), any other source gives every tenth example to the test part;
a training example that is in the test part word for word is left out. The columns of the first example are those of all. Labels are the sorted
names of the training part, numbers by value; a model that has a head keeps its own names.

Words in pieces: the first piece carries the word's tag, the others -100. Long contexts are cut into windows that overlap by 128 tokens; a window
without the whole answer points at the first token (Devlin et al., 2019, arXiv 1810.04805). Long texts lose their end, which is counted.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor import strict
from compressor.errors import DataError
from compressor.pipelines.sources import BUILTIN, HELD_OUT_EVERY, tables

TEXTS = ("sentence", "text", "content")
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"), ("text1", "text2"))
WORDS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags", "labels")
SHAPES = "sentence and label, two texts and label, tokens and tags, or question, context and answers"
HELD_OUT = {"test", "testing", "validation", "valid", "val", "dev", "eval"}  # words in the name of a file, or of a split, that is all held out
PARTS = ("test", "validation", "dev")  # what names of parts to measure on start with


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, with its label."""

    text: str
    label: str
    second: str | None = None


@dataclass(frozen=True)
class Tagged:
    """Words with a tag each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question on a context; starts are characters of the context, none where there is no answer."""

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


Example = Labelled | Tagged | Question
KIND: dict[type, str] = {Labelled: "sequence", Tagged: "token", Question: "question"}


@dataclass(frozen=True)
class Task:
    """Examples of one kind: trained on, measured on, the names of their labels (none of questions), and how they came apart."""

    name: str
    kind: str  # sequence | token | question
    train: list[Any]
    test: list[Any]
    labels: tuple[str, ...]
    rule: str
    notes: list[str] = field(default_factory=list)

    def sha256(self, part: str) -> str:
        """Of one JSON line an example."""
        digest = hashlib.sha256()
        for example in self.train if part == "train" else self.test:
            digest.update(json.dumps(list(vars(example).values()), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()


def load(source: str | None) -> Task:
    """Training and held-out examples of a source, by the rules above. DataError, in one sentence, for what cannot be learnt from."""
    if source is None:
        raise DataError("an encoder is pruned and tuned on labelled examples: give them with --data, a file or folder of .tsv, .csv, .jsonl or .json")
    if source in BUILTIN:
        raise DataError(f"{source} is plain text, and an encoder is trained on labelled examples: give a file or folder of them with --data")
    name, parts = tables(source)
    train = examples(parts["train"], name)
    held, _ = _measured(parts, name)
    rule = "train and test parts of the source"
    if held is None:
        if len(train) < HELD_OUT_EVERY:
            raise DataError(
                f"{name} has {len(train)} labelled examples, too few to hold out every tenth: give more, or a folder with train and test files"
            )
        held, rule = _tenth(train)
        train = [e for i, e in enumerate(train) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    seen = {_text(e) for e in held}
    kept = [e for e in train if _text(e) not in seen]
    if len(kept) < len(train):
        rule += f"; left out of training because they are in the test part too: {len(train) - len(kept)}"
    if not kept or type(kept[0]) is not type(held[0]):
        raise DataError(f"{name} leaves nothing to train on: its training examples are all in the test part, or of another kind than that")
    return Task(name, KIND[type(kept[0])], kept, held, label_names(kept, held, name), rule)


def load_test(source: str) -> Task:
    """The examples of a source to measure on, nothing is trained on: its own test or validation part if it has one with labels, else the tenth that
    `load` holds out of it. A file that is called test, validation or dev, or has fewer than ten examples, is measured whole.
    """
    name, parts = tables(source)
    held, part = _measured(parts, name)
    rule = f"{part} part of the source"
    if held is None:
        held, rule = examples(parts["train"], name), "all of the source"
        part = Path(source).stem if Path(source).is_file() else source.partition("@")[2]
        whole = not HELD_OUT.isdisjoint(re.split(r"[^a-z]+", part.lower()))
        if not whole and len(held) >= HELD_OUT_EVERY:
            held, rule = _tenth(held)
    return Task(name, KIND[type(held[0])], [], held, _in_order(_labels(held)), rule)


def _measured(parts: dict[str, list[Any]], name: str) -> tuple[list[Example] | None, str]:
    """The first part to measure on that has labels, with its name."""
    for start in PARTS:
        for key in sorted(key for key in parts if key.startswith(start)):  # _matched before _mismatched
            if found := _labelled(parts[key], f"{name} [{key}]"):
                return found, key
    return None, ""


def _tenth(found: list[Example]) -> tuple[list[Example], str]:
    """What is held out of examples that came in one part, and the rule in words."""
    return found[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY], f"one in {HELD_OUT_EVERY} of {len(found)} examples held out"


def _labelled(rows: list[Any], where: str) -> list[Example]:
    """The examples of rows, none if these have no labels."""
    if not rows or not isinstance(rows[0], dict):
        return []
    told = any(key in rows[0] for key in (*TAGS, "answers", "paragraphs", "lines"))
    return examples(rows, where) if told or str(rows[0].get("label", "")) not in ("", "-1") else []


def examples(rows: list[Any], where: str) -> list[Example]:
    """Rows of a table -> examples of one kind."""
    if not rows:
        raise DataError(f"{where} holds no examples")
    first = rows[0]
    if not isinstance(first, dict):
        raise DataError(f"{where} holds {type(first).__name__} where rows with columns are expected: {SHAPES}")
    kind = next((name for name, fits in _KINDS.items() if fits(first)), None)
    if kind is None:
        raise DataError(f"{where} has the columns {', '.join(map(str, first))}, which are no task: give {SHAPES}")
    columns = _columns(kind, first)
    out: list[Example] = []
    for number, row in enumerate(rows, 1):
        try:
            if lacking := [column for column in columns if column not in row]:
                raise DataError(f"{where}, example {number}, is not like the first one: it has no {lacking[0]}")
            out += _READ[kind]({column: row[column] for column in columns}, f"{where}, example {number}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DataError(f"{where}, example {number}, is not like the first one: {type(error).__name__} {error}") from None
    if not out:
        raise DataError(f"{where} holds no examples")
    return out


def _string(value: Any, where: str, number: bool = False) -> str:
    """Text as it is, and a number where that may stand for a word; DataError for anything else, such as null."""
    if isinstance(value, str) or (number and isinstance(value, int | float) and value == value):
        return str(value)
    raise DataError(f"{where} has {json.dumps(value, default=str)[:40]} where text is expected: give text, or leave the example out")


def _column(row: dict[str, Any], names: Sequence[str]) -> str | None:
    return next((n for n in names if n in row), None)


def _pair(row: dict[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), None)


def _columns(kind: str, first: dict[str, Any]) -> list[str]:
    """The columns that are read of every row, as the first has them."""
    if kind == "text":
        return [*(_pair(first) or (_column(first, TEXTS) or "",)), "label"]
    if kind == "tagged":
        return [_column(first, WORDS) or "", _column(first, TAGS) or ""]
    return {"lines": ["lines"], "squad": ["paragraphs"], "question": ["question", "context", "answers"]}[kind]


def _read_lines(row: dict[str, Any], where: str) -> list[Example]:
    columns = [line.split() for line in row["lines"] if not line.startswith("-DOCSTART-")]
    if any(len(c) < 2 for c in columns):
        raise DataError(f"{where} has the line {next(c for c in columns if len(c) < 2)[0][:40]!r} without a tag: each line is a word and its tag")
    return [Tagged(tuple(c[0] for c in columns), tuple(c[-1] for c in columns))] if columns else []


def _read_tagged(row: dict[str, Any], where: str) -> list[Example]:
    words, tags = ([_string(v, where, number=True) for v in row[_column(row, names) or ""]] for names in (WORDS, TAGS))
    if len(words) != len(tags):
        raise DataError(f"{where} has {len(words)} words and {len(tags)} tags: give one tag a word")
    return [Tagged(tuple(words), tuple(tags))] if words else []


def _read_question(row: dict[str, Any], where: str) -> list[Example]:
    found = row["answers"]
    if isinstance(found, str):
        found = strict.parse(found, unique=False)
    if isinstance(found, dict):
        texts, starts = found["text"], found["answer_start"]
        texts, starts = ([texts], [starts]) if isinstance(texts, str) else (texts, starts)
    else:
        texts, starts = [a["text"] for a in found], [a["answer_start"] for a in found]
    context = _string(row["context"], where)
    for text, start in zip(texts, starts, strict=True):
        if context[int(start) : int(start) + len(text)] != text:
            raise DataError(f"{where}: the context does not say {text[:40]!r} at character {start}: answer_start counts characters from 0")
    starts = tuple(int(start) + len(text) - len(text.lstrip()) for text, start in zip(texts, starts, strict=True))
    return [Question(_string(row["question"], where).strip(), context, tuple(text.strip() for text in texts), starts)]


def _read_squad(row: dict[str, Any], where: str) -> list[Example]:
    if any("answers" not in q for p in row["paragraphs"] for q in p["qas"]):
        raise DataError(f"{where} has no answers: give data with answers, there is nothing to learn or measure without them")
    rows = [{"context": p["context"], "question": q["question"], "answers": q["answers"]} for p in row["paragraphs"] for q in p["qas"]]
    return [e for r in rows for e in _read_question(r, where)]


def _read_text(row: dict[str, Any], where: str) -> list[Example]:
    label = row["label"]
    if label is None or isinstance(label, list | dict) or str(label).strip() == "":
        raise DataError(f"{where} has no label: give one label a text")
    if isinstance(label, float) and not label.is_integer():
        raise DataError(f"{where} has the label {label}, a number to predict: regression is not supported, give classes")
    name = str(int(label)) if isinstance(label, float | bool) else str(label).strip()
    pair = _pair(row)
    if pair:
        return [Labelled(_string(row[pair[0]], where), name, _string(row[pair[1]], where))]
    return [Labelled(_string(row[_column(row, TEXTS) or ""], where), name)]


_KINDS = {
    "lines": lambda row: "lines" in row,
    "squad": lambda row: "paragraphs" in row,
    "question": lambda row: {"question", "context", "answers"} <= row.keys(),
    "tagged": lambda row: bool(_column(row, WORDS) and _column(row, TAGS)),
    "text": lambda row: "label" in row and bool(_pair(row) or _column(row, TEXTS)),
}
_READ = {"lines": _read_lines, "squad": _read_squad, "question": _read_question, "tagged": _read_tagged, "text": _read_text}


def _text(example: Example) -> tuple[Any, ...]:
    """What of an example is seen, without what is asked."""
    if isinstance(example, Labelled):
        return example.text, example.second
    return example.words if isinstance(example, Tagged) else (example.question, example.context)


def _labels(examples: list[Any]) -> set[str]:
    if isinstance(examples[0], Question):
        return set()
    return {name for e in examples for name in (e.tags if isinstance(e, Tagged) else (e.label,))}


def label_names(train: list[Any], test: list[Any], where: str) -> tuple[str, ...]:
    """The names of the labels of the training part, sorted; DataError where they can be no classes, or the test part has others."""
    names = _labels(train)
    if isinstance(train[0], Question):
        return ()
    if len(names) < 2:
        raise DataError(f"{where} has only the label {next(iter(names))!r}: there is nothing to tell apart")
    if any(_fraction(name) for name in names) or (isinstance(train[0], Labelled) and len(names) > max(2, len(train) // 2)):
        raise DataError(
            f"{where} has {len(names)} labels such as {sorted(names)[0]!r}, numbers to predict rather than classes: regression is not supported"
        )
    foreign = sorted(_labels(test) - names)
    if foreign:
        raise DataError(f"{where}: the label {foreign[0]!r} is only in the test part, where nothing can learn it; give training examples of it")
    return _in_order(names)


def _in_order(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda n: (not _whole(n), int(n) if _whole(n) else 0, n)))


def _whole(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name) is not None


def _fraction(name: str) -> bool:
    try:
        return not float(name).is_integer()
    except (ValueError, OverflowError):
        return False
