"""Rows of a table -> documents: which columns mean what.

Rows are recognised by their columns, in this order (the first rule whose columns are all there wins):

    messages | conversations                        chat: [{role, content}] or [{from, value}]; every assistant turn is learned
    instruction (+ input | context), output | response      the Alpaca template around the prompt
    prompt, completion | response                   joined as they are
    question, answer                                "Question: ...\nAnswer:" and " ..."
    text | content | sentence | document | story | article | code, or the only column there is          plain text; other columns are ignored

A row without a completion or without text is skipped. Chats keep their messages, because only the tokenizer knows the chat template;
without one they read "User: ...\n\nAssistant: ..." (`plain_chat`). The Alpaca template is that of Stanford Alpaca (Taori et al., 2023) with a line
break after "### Response:", as Alpaca-LoRA and LLM-Adapters have it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from compressor.errors import DataError

Message = tuple[str, str]  # role, content
Span = tuple[int, int]  # characters

TEXT_COLUMNS = ("text", "content", "sentence", "document", "story", "article", "code")
ACCEPTED = "a text column (text, content, sentence, ...), instruction/input/output, prompt/completion, question/answer, or messages of a chat"
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}

_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
# shape -> alternatives of every column that must be there
_SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "chat": (("messages", "conversations"),),
    "instruction": (("instruction",), ("output", "response")),
    "prompt": (("prompt",), ("completion", "response")),
    "question": (("question",), ("answer",)),
    "text": (TEXT_COLUMNS,),
}


@dataclass(frozen=True)
class Document:
    """Plain text (`prompt` is None), or a pair: `text` is then the completion of `prompt`; a chat also keeps its messages."""

    text: str
    prompt: str | None = None
    messages: tuple[Message, ...] = ()


def documents(rows: Iterable[Any], where: str) -> list[Document]:
    """Documents of table rows (mappings) or of plain strings; `where` names the source in errors.

    A text table in which more than a tenth of the rows is blank holds one text line by line (WikiText on the hub): its rows are joined with
    blank lines into one document, as the usual WikiText-2 perplexity does. Raises DataError for columns nobody recognises.
    """
    out: list[Document] = []
    texts: list[str] = []
    for number, row in enumerate(rows, 1):
        kind, columns = ("text", ("text",)) if isinstance(row, str) else _shape(row, where)
        if kind == "text":
            texts.append(row if isinstance(row, str) else _text(row, columns[0], f"{where} row {number}"))
        elif (doc := _pair(kind, columns, row, f"{where} row {number}")) is not None:
            out.append(doc)
    if len(texts) >= 20 and sum(not t.strip() for t in texts) > len(texts) / 10:
        texts = ["\n\n".join(texts)]
    return out + [Document(t) for t in texts if t.strip()]


def plain_chat(messages: Iterable[Message]) -> tuple[str, list[Span]]:
    """The text of a chat for tokenizers without a template, and the character spans of the assistant's words."""
    text, spans = "", []
    for role, content in messages:
        text += ("\n\n" if text else "") + role.capitalize() + ":"
        if role == "assistant":
            spans.append((len(text), len(text) + 1 + len(content)))
        text += " " + content
    return text, spans


def _shape(row: Any, where: str) -> tuple[str, tuple[str, ...]]:
    """Name of the row's shape and the columns that make it, in the order of _SHAPES."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} holds a {type(row).__name__} where a row or a text was expected; accepted are {ACCEPTED}")
    for kind, needed in _SHAPES.items():
        found = [next((c for c in names if c in row), None) for names in needed]
        if all(found):
            return kind, tuple(c for c in found if c)
    if len(row) == 1 and isinstance(next(iter(row.values())), str | None):
        return "text", tuple(row)
    raise DataError(f"{where} has the columns {', '.join(map(str, row)) or '(none)'}, which nobody recognises; accepted are {ACCEPTED}")


def _pair(kind: str, columns: tuple[str, ...], row: Mapping[str, Any], where: str) -> Document | None:
    """The pair in a row, or None when its completion is empty."""
    if kind == "chat":
        return _chat(row[columns[0]], where)
    asked, answer = _text(row, columns[0], where), _text(row, columns[1], where)
    if not answer.strip():
        return None
    if kind == "prompt":
        return Document(answer, asked)
    if kind == "question":
        return Document(" " + answer.strip(), f"Question: {asked.strip()}\nAnswer:")
    extra = _text(row, "input" if row.get("input") else "context", where)
    template = _ALPACA_INPUT if extra.strip() else _ALPACA
    return Document(answer, template.format(instruction=asked, input=extra))


def _chat(value: Any, where: str) -> Document | None:
    """A chat up to the assistant's last words, or None when the assistant says nothing."""
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: a chat must be a list of messages, not {type(value).__name__}")
    messages = [_message(m, where) for m in value]
    while messages and (messages[-1][0] != "assistant" or not messages[-1][1].strip()):
        messages.pop()
    if not messages:
        return None
    text, spans = plain_chat(messages)
    return Document(text[spans[-1][0] :], text[: spans[-1][0]], tuple(messages))


def _message(value: Any, where: str) -> Message:
    if isinstance(value, Mapping):
        role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
        if isinstance(role, str) and isinstance(content, str | None):
            return ROLES.get(role, role), content or ""
    raise DataError(f"{where}: a message must have role and content, or from and value, as texts")


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(f"{where}: column {column!r} holds a {type(value).__name__}, not text")
