"""Local task files: questions with answers from .jsonl or .json, in the shapes that tasks come in.

A file's shape is told by its columns, the first rule that fits; every row must have it, and a row that lacks something is an error that names it.

    instruction (+ input | context) with "Answer format: a/b/c", output, answer       choice: the output with each option in the answer's place
    choices | options | endings, and answer | label | gold | answerKey                choice: each of them after a space
    question, passage, answer true or false                                           choice: yes or no
    question | prompt | query | context | ctx | instruction, and answer               match: the model writes the answer (one of a list)

Prompts. An instruction reads as in training (the Alpaca template of shapes.py), so that a model tuned on such rows is asked as it was taught. A
question becomes "Question: ...\\nAnswer:", after its passage or context if it has one; any other prompt stays as it is, but for blanks at its end.
The right choice is given by its place (from 0), its text, or its letter (A is the first; the file's own labels where it has them).

Match. An answer that ends in "#### 72" (GSM8K) or comes with a worked `output` is looked for in WORKED tokens: the number after the first "####",
else the last one. Any other answer is the first line of SHORT tokens. Numbers are compared as numbers (1,000 = 1000.0; the 12 of 10-12 is not -12),
texts without case, doubled blanks and punctuation at their ends; one of several answers is enough.

Limits: one shape a file; a blank before each choice is right for languages that write blanks. A hub task of the same data may have another template
(MMLU's letters, HellaSwag's headings), and then the numbers do not compare.
"""

import hashlib
import math
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from compressor.errors import DataError, RecipeError
from compressor.pipelines import sources
from compressor.pipelines.shapes import documents

SUFFIXES = (".jsonl", ".json")
SHORT, WORKED = 32, 256  # new tokens for an answer that is one line, and for one with its working
PROMPTS = ("question", "prompt", "query", "context", "ctx")
CHOICES = ("choices", "options", "endings")
GOLD = ("answer", "label", "gold", "answerKey")
ACCEPTED = "instruction/output/answer with its answer format, question or prompt with choices and answer, question/passage/answer, or prompt/answer"

_FORMAT = re.compile(r"Answer format:[ \t]*(\S[^\n]*)")
_NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_HELD = re.compile(r"(?<![a-z])(test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class TaskFile:
    """Rows of a file, ready to be asked: {"text", "choices", "gold"}, or {"text", "target", "answers"} to be written.

    `target` is what a few-shot example shows as answer. `join` goes between prompt and choice or answer.
    """

    name: str
    shape: str
    rows: list[dict[str, Any]]
    sha256: str
    join: str = " "
    worked: bool = False

    @property
    def choice(self) -> bool:
        return "choices" in self.rows[0]


def is_file(name: str) -> bool:
    """Whether a name means a local file; any other name means a task of the harness."""
    return Path(name).suffix.lower() in SUFFIXES or name.startswith(("./", "../", "/", "~")) or "\\" in name


def find(name: str) -> Path:
    """The file of that name; RecipeError where there is none or its name ends in something else."""
    path = Path(name).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise RecipeError(f"the task file {name!r} must end in {' or '.join(SUFFIXES)}")
    try:
        found = path.is_file()
    except (OSError, ValueError):  # names too long, or with a zero byte
        found = False
    if not found:
        raise RecipeError(f"there is no task file {name[:200]!r}")
    return path


def read(path: Path) -> TaskFile:
    """A task file by the rules above. Raises DataError, naming file and row."""
    try:
        rows = sources.tables(str(path.absolute()))[1]["train"]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"task file {path.name!r} cannot be read: {str(error)[:200]}") from None
    if not rows:
        raise DataError(f"task file {path.name!r} holds no rows")
    shape, out = _shape(rows[0], f"{path.name} row 1"), []
    for number, row in enumerate(rows, 1):
        where = f"{path.name} row {number}"
        if (found := _shape(row, where)) != shape:
            raise DataError(f"{where} has the shape {found!r}, row 1 the shape {shape!r}; a task file holds one shape")
        out.append(_READERS[shape](row, where))
    worked = any(row.pop("worked", False) for row in out)
    return TaskFile(path.name, shape, out, digest, "" if shape.startswith("instruction") else " ", worked)


def examples(path: Path, asked: TaskFile, count: int) -> TaskFile:
    """The sibling train file of a test file (train.json beside test.json), from which `count` examples are shown, without the rows that are asked.

    Raises RecipeError, DataError."""
    stems = [_HELD.sub("train", path.stem)] if _HELD.search(path.stem) else []
    found = next((p for stem in stems for suffix in (path.suffix, *SUFFIXES) if (p := path.with_name(stem + suffix)).is_file()), None)
    if found is None:
        wanted = f"{stems[0]}{path.suffix} beside it" if stems else "a file whose name has 'test' in it, and one with 'train' beside it"
        raise RecipeError(f"shots={count} needs examples that are not asked: {path.name!r} has none; give {wanted}, or shots=0")
    file = read(found)
    if file.shape != asked.shape:
        raise DataError(f"{found.name} has the shape {file.shape!r}, {path.name} the shape {asked.shape!r}; examples must look like the questions")
    questions = set(map(_question, asked.rows))
    rows = [row for row in file.rows if _question(row) not in questions]
    if len(rows) < count:
        raise RecipeError(f"shots={count} is more than the {len(rows)} examples of {found.name} that are not asked")
    return replace(file, rows=rows)


def _question(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells one question from another: its text, and its choices in whatever order."""
    return row["text"], *sorted(row.get("choices", ()))


def matches(written: str, answers: list[str], worked: bool) -> bool:
    """Whether what a model wrote is one of the answers, by the rule above."""
    number = _said(written, worked)
    text = _normal(written if worked else next((line for line in written.split("\n") if line.strip()), ""))
    return any(text == _normal(answer) if (wanted := _number(answer)) is None else wanted == number for answer in answers)


def _said(written: str, worked: bool) -> Decimal | None:
    """The number that was written: the first after the first "####" (what a model goes on to ask itself is no answer), else the last."""
    _, marked, rest = written.partition("####")
    found = _NUMBER.findall(rest if marked else written)
    return _number(found[0 if marked and worked else -1]) if found else None


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text.strip().rstrip(".").replace(",", "").replace("$", "").rstrip("%"))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def _normal(text: str) -> str:
    plain = " ".join(text.casefold().split())
    return plain.strip(string.punctuation + " ") or plain


def _shape(row: Any, where: str) -> str:
    """Name of the row's shape by the columns it has."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} holds a {type(row).__name__} where a row with named columns was expected")
    if "instruction" in row:
        return "instruction" if _FORMAT.search(str(row["instruction"])) else "instruction, match"
    if any(key in row for key in CHOICES):
        return "choices"
    if "question" in row and "passage" in row and isinstance(row.get("answer"), bool):
        return "yes or no"
    if any(key in row for key in PROMPTS) and "answer" in row:
        return "match"
    raise DataError(f"{where} has the columns {', '.join(map(str, row))[:200] or '(none)'}, which make no question; accepted are {ACCEPTED}")


def _instruction(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every option in the place of the answer at the end of the output."""
    options = [option.strip() for option in _FORMAT.findall(row["instruction"])[-1].split("/")] if isinstance(row["instruction"], str) else []
    answer, output = _text(row, "answer", where), _text(row, "output", where).rstrip()
    if len(options) < 2 or answer not in options:
        raise DataError(f"{where}: the answer {answer[:50]!r} is none of those of its answer format, {'/'.join(options)[:100] or '(none)'}")
    if not output.endswith(answer):
        raise DataError(f"{where}: the output must end in the answer {answer!r}, not {output[-50:]!r}")
    before = output[: -len(answer)]
    return {"text": _asked(row, where), "choices": _different([before + option for option in options], where), "gold": options.index(answer)}


def _instruction_match(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    answers = _answers(row, where)
    output = _text(row, "output", where) if "output" in row else answers[0]
    return _match_row(_asked(row, where), output, [*answers, output], output.strip() not in answers)


def _asked(row: Mapping[str, Any], where: str) -> str:
    """The prompt as training had it."""
    _text(row, "instruction", where)
    for key in ("input", "context"):
        if row.get(key):
            _text(row, key, where)
    document = documents([{key: row[key] for key in ("instruction", "input", "context") if key in row} | {"output": "-"}], where)[0]
    return document.prompt or ""


def _choices(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    key = next(key for key in CHOICES if key in row)
    value, labels = row[key], None
    if isinstance(value, Mapping):  # as ARC has them
        labels, value = value.get("label"), value.get("text")
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"{where}: {key!r} must be a list of two or more texts (or have them under 'text')")
    texts = [_plain(v, f"{where}: {key}").strip() for v in value]
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(texts)):
        raise DataError(f"{where}: {key!r} needs as many labels as texts")
    names = None if labels is None else [str(label).strip() for label in labels]
    return {"text": _prompt(row, where), "choices": _different(texts, where), "gold": _gold(row, texts, names, where)}


def _gold(row: Mapping[str, Any], texts: list[str], labels: list[str] | None, where: str) -> int:
    """Place of the right choice, given as place, label, text or letter."""
    key = next((key for key in GOLD if key in row), None)
    if key is None:
        raise DataError(f"{where} lacks its answer: one of {', '.join(GOLD)}")
    value = row[key]
    if isinstance(value, int) and not isinstance(value, bool) and labels is None and 0 <= value < len(texts):
        return value
    if isinstance(value, str | int) and not isinstance(value, bool):
        said = str(value).strip()
        letters = list(string.ascii_uppercase[: len(texts)])
        for names in (labels or [], texts, letters, [str(i) for i in range(len(texts))] if isinstance(value, str) else []):
            if said in names:
                return names.index(said)
    raise DataError(f"{where}: {key} {str(value)[:50]!r} is no place, text or letter of its {len(texts)} choices")


def _yes_no(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(row["answer"], bool):
        raise DataError(f"{where}: answer must be true or false")
    question = _text(row, "question", where).strip().rstrip("?") + "?"
    return {"text": f"{_text(row, 'passage', where).strip()}\nQuestion: {question}\nAnswer:", "choices": ["no", "yes"], "gold": int(row["answer"])}


def _match(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    answers = _answers(row, where)
    finals = [answer.rpartition("####")[2].strip() for answer in answers]
    if not all(finals):
        raise DataError(f"{where}: nothing stands after '####' in its answer")
    return _match_row(_prompt(row, where), answers[0], finals, any("####" in answer for answer in answers))


def _match_row(text: str, target: str, answers: list[str], worked: bool) -> dict[str, Any]:
    return {"text": text, "target": target, "answers": answers, "worked": worked}


def _answers(row: Mapping[str, Any], where: str) -> list[str]:
    """The texts that count as right."""
    value = row.get("answer")
    if isinstance(value, list) and value:
        return [_plain(v, f"{where}: answer").strip() for v in value]
    return [_text(row, "answer", where).strip()]


def _prompt(row: Mapping[str, Any], where: str) -> str:
    """The question in its template, or the prompt itself."""
    key = next((key for key in PROMPTS if key in row), None)
    if key is None:
        raise DataError(f"{where} lacks what is asked: one of {', '.join(PROMPTS)}")
    if key != "question":
        return _text(row, key, where).rstrip()
    before = next((_text(row, k, where).strip() + "\n" for k in ("passage", "context") if row.get(k)), "")
    return f"{before}Question: {_text(row, key, where).strip()}\nAnswer:"


def _different(choices: list[str], where: str) -> list[str]:
    if len(set(choices)) < len(choices):
        raise DataError(f"{where} has the same choice twice")
    return choices


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise DataError(f"{where} lacks {key!r}")
    return _plain(row[key], f"{where}: {key}")


def _plain(value: Any, where: str) -> str:
    """A text that is not blank; numbers count as texts."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where} holds a {type(value).__name__} where a text was expected")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where} holds {value}, which is no number")
    text = str(value)
    if not text.strip():
        raise DataError(f"{where} is blank")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise DataError(f"{where} holds half a character (a lone surrogate)")
    return text


_READERS = {
    "instruction": _instruction,
    "instruction, match": _instruction_match,
    "choices": _choices,
    "yes or no": _yes_no,
    "match": _match,
}
