"""Classification by encoders, of whole texts, of tokens, and of answers in a text, with or without a dense teacher.

    sequence    one label a row                          cross entropy of logits [b, c]
    token       one label a word, on its first piece     cross entropy of logits [b, t, c] where a label stands; elsewhere it is -100
    question    first and last token of the answer       mean of two cross entropies over the t tokens of the row, padding left out

Distillation (Hinton et al., arXiv 1503.02531): with hardness h and temperature T the loss of a row is

    (1 - h) * cross entropy  +  h * T^2 * KL(softmax(teacher / T) || softmax(student / T))

The teacher is a second, frozen model that answers the very batch in eval mode. Cached answers would spare its forward pass, a quarter of a step,
but would have to be made for all rows in advance, or depend on which rows were padded together: then an interrupted run could not go on as it
was. Rows are stored without padding, end to end. A batch is sorted by length and run in pieces that are padded each to its own longest, so
that short texts do not pay for a long one; on a GPU the pieces are large, because there small ones cost more than padding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import DataError
from compressor.tune.loss import MASKED

KINDS = ("sequence", "token", "question")
PIECE = {"cpu": 256, "cuda": 16384}  # padded tokens that are worth a forward pass of their own
NEVER = -1e9  # the logit of a position that is padding


@dataclass(frozen=True)
class Examples:
    """Tokenised rows, end to end: ids int32 [tokens], types int8 [tokens] where the model takes them, offsets int64 [rows + 1].

    labels int64: [rows] of sequences, [tokens] of tokens, [rows, 2] of questions (first and last token of the answer, counted from the row's start).
    """

    kind: str
    ids: Tensor
    offsets: Tensor
    labels: Tensor
    types: Tensor | None = None
    pad: int = 0

    def __post_init__(self) -> None:
        rows, tokens = len(self.offsets) - 1, len(self.ids)
        wanted = {"sequence": (rows,), "token": (tokens,), "question": (rows, 2)}
        if self.kind not in wanted or tuple(self.labels.shape) != wanted[self.kind]:
            raise DataError(f"labels of {tuple(self.labels.shape)} do not belong to {rows} rows of {tokens} tokens of kind {self.kind!r}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 [rows]"""
        return self.offsets.diff()

    def padded(self, which: Tensor) -> tuple[Tensor, ...]:
        """ids, mask, types, labels of these rows, int64 [b, t] padded on the right to the longest; labels [b] or [b, 2] where rows have them."""
        first, lengths = self.offsets[which], self.lengths[which]
        place = torch.arange(int(lengths.max()))  # [t]
        mask = place < lengths[:, None]  # [b, t]
        at = torch.where(mask, first[:, None] + place, 0)  # [b, t]
        ids = torch.where(mask, self.ids[at].long(), self.pad)
        types = torch.zeros_like(ids) if self.types is None else torch.where(mask, self.types[at].long(), 0)
        labels = torch.where(mask, self.labels[at], MASKED) if self.kind == "token" else self.labels[which]
        return ids, mask.long(), types, labels

    def sorted_batches(self, tokens: int) -> Iterator[Tensor]:
        """All row numbers by ascending length, int64, in batches of at most `tokens` padded tokens (or one row)."""
        order = self.lengths.argsort(stable=True)
        yield from _cut(order, self.lengths[order], tokens)


def _cut(order: Tensor, lengths: Tensor, tokens: int) -> Iterator[Tensor]:
    start = 0
    for i, length in enumerate(lengths.tolist()):
        if i > start and (i + 1 - start) * length > tokens:
            yield order[start:i]
            start = i
    if start < len(order):
        yield order[start:]


def pieces(lengths: Tensor, worth: int) -> list[slice]:
    """Where to cut rows of ascending lengths [b]: a new piece where the rows so far fill `worth` tokens and the next row is longer."""
    out, start = [], 0
    values = lengths.tolist()
    for i in range(1, len(values)):
        if (i - start) * values[i - 1] >= worth and values[i] > values[i - 1]:
            out.append(slice(start, i))
            start = i
    return [*out, slice(start, len(values))]


@dataclass(frozen=True)
class Teacher:
    """A frozen model whose answers are learnt: `share` of the loss, at `temperature`."""

    model: nn.Module
    share: float = 1.0
    temperature: float = 2.0


class EncoderTask:
    """The objective: rows of examples, and their summed cross entropy or distance from the teacher's answers."""

    def __init__(self, examples: Examples, teacher: Teacher | None = None):
        self.examples, self.teacher = examples, teacher if teacher is not None and teacher.share > 0 else None
        self.counts = _counts(examples)

    def rows(self, which: Tensor) -> tuple[Tensor, ...]:
        """ids, mask, types [b, t] and labels of these rows, shortest first."""
        return self.examples.padded(which[self.examples.lengths[which].argsort(stable=True)])

    def loss(self, model: nn.Module) -> Callable[..., Tensor]:
        forward = answering(model, self.examples.kind, self.examples.types is not None)
        teach = None if self.teacher is None else answering(self.teacher.model, self.examples.kind, self.examples.types is not None)
        if self.teacher is not None:
            self.teacher.model.eval()

        def loss(ids: Tensor, mask: Tensor, types: Tensor, labels: Tensor) -> Tensor:
            total = torch.zeros((), device=ids.device)
            lengths = mask.sum(1).cpu()
            for part in pieces(lengths, PIECE["cpu" if ids.device.type == "cpu" else "cuda"]):
                t = int(lengths[part].max())
                rows = (ids[part, :t], mask[part, :t], types[part, :t], labels[part, :t] if self.examples.kind == "token" else labels[part])
                total = total + self._piece(forward, teach, rows)
            return total

        return loss

    def _piece(self, forward: "Answering", teach: "Answering | None", rows: tuple[Tensor, ...]) -> Tensor:
        logits, targets = forward(*rows)  # [m, c], [m]
        weight = 0.5 if self.examples.kind == "question" else 1.0
        share = 0.0 if self.teacher is None else self.teacher.share
        total = torch.zeros((), device=logits.device)
        if share < 1:
            total = total + (1 - share) * nn.functional.cross_entropy(logits, targets, reduction="sum")
        if self.teacher is not None and teach is not None:
            with torch.no_grad():
                wanted, _ = teach(*rows)
            total = total + share * distance(logits, wanted, self.teacher.temperature)
        return weight * total


Answering = Callable[..., tuple[Tensor, Tensor]]


def answering(model: nn.Module, kind: str, typed: bool) -> Answering:
    """A function of (ids, mask, types, labels) -> the logits that count, float32 [m, c], and their targets int64 [m]."""
    called: Any = model

    def answer(ids: Tensor, mask: Tensor, types: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = called(input_ids=ids, attention_mask=mask, **({"token_type_ids": types} if typed else {}))
        if kind == "sequence":
            return out.logits.float(), labels
        if kind == "token":
            learnt = labels != MASKED  # [b, t]
            return out.logits[learnt].float(), labels[learnt]
        both = torch.stack([out.start_logits, out.end_logits], 1).float()  # [b, 2, t]
        return both.masked_fill(mask[:, None] == 0, NEVER).flatten(0, 1), labels.flatten()

    return answer


def distance(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), summed over the rows of logits and wanted, float32 [m, c]."""
    student, teacher = (nn.functional.log_softmax(t / temperature, 1) for t in (logits, wanted))
    return temperature**2 * nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)


def _counts(examples: Examples) -> Tensor:
    """int64 [rows]: labels to learn."""
    if examples.kind != "token":
        return torch.ones(len(examples), dtype=torch.int64)
    learnt = torch.cat([torch.zeros(1, dtype=torch.int64), (examples.labels != MASKED).cumsum(0)])  # [tokens + 1]
    return learnt[examples.offsets].diff()
