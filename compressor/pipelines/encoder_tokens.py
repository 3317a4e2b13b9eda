"""Examples -> tokens: what encoder_data.py read, as rows for compressor.tune.encoder, and back from the positions of an answer to its text."""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from compressor.errors import DataError, ModelError, RecipeError
from compressor.pipelines.encoder_data import Labelled, Question
from compressor.tune.encoder import Examples
from compressor.tune.loss import MASKED

BATCH = 512  # examples tokenised at once
STRIDE = 128  # tokens that two windows of a context share
QUESTION = 64  # tokens of a question


@dataclass(frozen=True)
class Encoded:
    """Rows of tokens; of questions also which example a row is a window of, and the characters [tokens, 2] of each token, -1 outside the context."""

    rows: Examples
    cut: int = 0  # examples that lost their end
    owner: list[int] = field(default_factory=list)
    places: Tensor | None = None


def encode(examples: list[Any], tokenizer: Any, labels: dict[str, int], max_length: int) -> Encoded:
    """Tokenise; `labels` gives each name its class. ModelError for a tokenizer that cannot tell where its pieces come from, where that is needed."""
    if not getattr(tokenizer, "is_fast", False) and not isinstance(examples[0], Labelled):
        raise ModelError("this tokenizer cannot say which word a token belongs to; use a model folder with a tokenizer.json")
    if isinstance(examples[0], Question):
        return _questions(examples, tokenizer, max_length)
    return _texts(examples, tokenizer, labels, max_length) if isinstance(examples[0], Labelled) else _tagged(examples, tokenizer, labels, max_length)


def _class(name: str, labels: dict[str, int]) -> int:
    if name not in labels:
        raise DataError(f"the label {name!r} is none of the model's: {', '.join(map(str, labels))}; give data of its task, or a model without a head")
    return labels[name]


def _texts(examples: list[Labelled], tokenizer: Any, labels: dict[str, int], max_length: int) -> Encoded:
    ids: list[list[int]] = []
    types: list[list[int]] = []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        second = [e.second for e in part] if part[0].second is not None else None
        found = tokenizer([e.text for e in part], second, truncation=True, max_length=max_length, verbose=False)
        ids += found["input_ids"]
        types += found.get("token_type_ids", [])
    classes = torch.tensor([_class(e.label, labels) for e in examples])
    full = [e for e, row in zip(examples, ids, strict=True) if len(row) >= max_length]
    second = [e.second for e in full] if examples[0].second is not None else None
    whole = tokenizer([e.text for e in full], second, verbose=False)["input_ids"] if full else []
    return Encoded(_rows("sequence", ids, types, classes, tokenizer), cut=sum(len(row) > max_length for row in whole))


def _tagged(examples: list[Any], tokenizer: Any, labels: dict[str, int], max_length: int) -> Encoded:
    ids: list[list[int]] = []
    types: list[list[int]] = []
    tags: list[int] = []
    cut = 0
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        found = tokenizer([list(e.words) for e in part], is_split_into_words=True, truncation=True, max_length=max_length, verbose=False)
        ids += found["input_ids"]
        types += found.get("token_type_ids", [])
        for i, example in enumerate(part):
            words = found.word_ids(i)
            first = [w is not None and w != before for w, before in zip(words, [None, *words], strict=False)]
            tags += [_class(example.tags[w], labels) if new else MASKED for w, new in zip(words, first, strict=True)]
            cut += sum(first) < len(example.words)
    return Encoded(_rows("token", ids, types, torch.tensor(tags), tokenizer), cut=cut)


def _questions(examples: list[Question], tokenizer: Any, max_length: int) -> Encoded:
    questions, left = _short([e.question for e in examples], tokenizer, max_length)
    stride = min(STRIDE, max_length // 4, left - 1)
    ids: list[list[int]] = []
    types: list[list[int]] = []
    owner: list[int] = []
    places: list[Any] = []
    labels: list[tuple[int, int]] = []
    for start in range(0, len(examples), BATCH):
        found = tokenizer(
            questions[start : start + BATCH], [e.context for e in examples[start : start + BATCH]], truncation="only_second", max_length=max_length,
            stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False,
        )  # fmt: skip
        ids += found["input_ids"]
        types += found.get("token_type_ids", [])
        for i, local in enumerate(found["overflow_to_sample_mapping"]):
            inside = [(-1, -1) if s != 1 else place for s, place in zip(found.sequence_ids(i), found["offset_mapping"][i], strict=True)]
            places += inside
            owner.append(start + local)
            labels.append(_answer(examples[start + local], inside))
    rows = _rows("question", ids, types, torch.tensor(labels).view(-1, 2), tokenizer)
    return Encoded(rows, owner=owner, places=torch.tensor(places, dtype=torch.int32))


def _short(texts: list[str], tokenizer: Any, max_length: int) -> tuple[list[str], int]:
    """Questions of at most 64 tokens, and at most a third of a row; and the tokens that the longest leaves to the context.

    RecipeError if it leaves fewer than two.
    """
    most = min(QUESTION, max_length // 3)
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    left = max_length - tokenizer.num_special_tokens_to_add(pair=True) - min(most, max(map(len, found)))
    if most < 1 or left < 2:
        raise RecipeError(f"seqlen={max_length} leaves no room for a context beside its question: give at least 16")
    return [text if len(place) <= most else text[: place[most - 1][1]] for text, place in zip(texts, found, strict=True)], left


def _answer(example: Question, places: list[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of the first answer in a window, or the first token of the window twice."""
    if not example.answers or not example.answers[0]:
        return 0, 0
    begin, end = example.starts[0], example.starts[0] + len(example.answers[0])
    first = next((i for i, (a, b) in enumerate(places) if a <= begin < b), None)
    last = next((i for i, (a, b) in enumerate(places) if a < end <= b), None)
    return (0, 0) if first is None or last is None or last < first else (first, last)


def _rows(kind: str, ids: list[list[int]], types: list[list[int]], labels: Tensor, tokenizer: Any) -> Examples:
    offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
    flat = torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int32)
    kinds = torch.tensor(list(chain.from_iterable(types)), dtype=torch.int8) if types else None
    return Examples(kind, flat, offsets, labels, kinds, tokenizer.pad_token_id or 0)
