"""How good an encoder is at its task, on held-out examples.

    sequence    accuracy; macro F1: the mean over the classes of 2 tp / (2 tp + fp + fn); loss, the mean cross entropy
    token       the same over words, their first pieces counting; with B-/I- tags also F1 of whole entities (conlleval: type and both ends right)
    question    exact match and F1 of the answer's text in percent, as SQuAD's own script counts them (Rajpurkar et al., 2016): lower case, no
                punctuation, no articles, the best of the reference answers

The answer to a question is the span of at most 30 tokens with the highest sum of its two logits over all windows of the context; where the first
token of every window scores higher than any span, and the data has questions without answer, the answer is empty.
Words beyond the longest row are not predicted, so they count neither way; how many examples lost their end is in the result.
"""

import re
import string
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import DataError, NumericError
from compressor.pipelines.encoder_data import Question
from compressor.pipelines.encoder_tokens import Encoded
from compressor.tune.encoder import answering
from compressor.tune.loop import first_nonfinite

BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
ANSWER = 30  # tokens of an answer
HEADLINE = {"sequence": "accuracy", "token": "accuracy", "question": "f1"}


@torch.no_grad()
def measure(
    model: nn.Module, encoded: Encoded, examples: list[Any], names: dict[int, str], progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """The numbers above, shares from 0 to 1 (percent for questions), with examples, cut, seconds. `names`: of the classes.

    NumericError, naming the first layer, if a logit is not finite.
    """
    rows = encoded.rows
    if not len(rows):
        raise DataError("there are no held-out examples to measure on")
    device, start, done = next(model.parameters()).device, time.perf_counter(), 0
    forward = answering(model, rows.kind, rows.types is not None)
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    order: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        for which in rows.sorted_batches(BATCH_TOKENS["cpu" if device.type == "cpu" else "cuda"]):
            batch = tuple(t.to(device) for t in rows.padded(which))
            out, wanted = forward(*batch)  # [m, c], [m]
            if not bool(torch.isfinite(out).all()):
                where = first_nonfinite(model, partial(forward, *batch))
                raise NumericError(f"the logits of held-out examples are not finite: {type(model).__name__} does not predict; first seen in {where}")
            logits.append(_spans(out.cpu(), encoded, which) if rows.kind == "question" else out.cpu())
            targets.append(wanted.cpu())
            order.append(which)
            done += len(which)
            if progress:
                progress(done, len(rows))
    finally:
        model.train(training)
    facts = {"examples": len(examples), "cut": encoded.cut, "seconds": round(time.perf_counter() - start, 2)}
    if rows.kind == "question":
        return _answers(torch.cat(logits), torch.cat(order), encoded, examples) | facts
    scores, wanted = torch.cat(logits), torch.cat(targets)
    found = _classes(scores, wanted)
    if rows.kind == "token" and all(re.match(r"[BI]-|O$", name) for name in names.values()):
        found |= {"entity_f1": _entity_f1(scores.argmax(1), wanted, torch.cat(order), encoded, names)}
    return found | facts


def _classes(scores: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Accuracy, macro F1, loss and count of scores [m, c] with classes wanted [m]."""
    guess, count = scores.argmax(1), scores.shape[1]
    hits, made, real = (torch.bincount(t, minlength=count).double() for t in (guess[guess == wanted], guess, wanted))
    seen = (made + real) > 0
    f1 = (2 * hits / (made + real).clamp(min=1))[seen].mean()
    loss = nn.functional.cross_entropy(scores.double(), wanted)
    return {"accuracy": float((guess == wanted).double().mean()), "macro_f1": float(f1), "loss": float(loss), "labels": len(wanted)}


def _entity_f1(guess: Tensor, wanted: Tensor, order: Tensor, encoded: Encoded, names: dict[int, str]) -> float:
    """F1 of whole entities; guess and wanted [words] row by row in `order`."""
    counts = [int((encoded.rows.labels[encoded.rows.offsets[i] : encoded.rows.offsets[i + 1]] >= 0).sum()) for i in order.tolist()]
    hits = made = real = 0
    for ours, theirs in zip(guess.split(counts), wanted.split(counts), strict=True):
        a, b = (entities([names[c] for c in part.tolist()]) for part in (ours, theirs))
        hits, made, real = hits + len(a & b), made + len(a), real + len(b)
    return 2 * hits / max(1, made + real)


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """(first, last, type) of each entity in B-/I-/O tags; an I- that continues nothing begins one, as in conlleval."""
    out: set[tuple[int, int, str]] = set()
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, _, now = tag.partition("-")
        if kind and (mark != "I" or now != kind):
            out.add((start, i - 1, kind))
            kind = ""
        if now and not kind:
            start, kind = i, now
    return out


def _spans(scores: Tensor, encoded: Encoded, which: Tensor) -> Tensor:
    """[2 b, t] logits of b windows -> [b, 4]: first and last token of the best span (from the row's start), its score, the score of no answer."""
    both, t = scores.unflatten(0, (-1, 2)), scores.shape[1]  # [b, 2, t]
    assert encoded.places is not None
    at = (encoded.rows.offsets[which, None] + torch.arange(t)).clamp(max=len(encoded.places) - 1)
    inside = (encoded.places[at, 0] >= 0) & (torch.arange(t) < encoded.rows.lengths[which, None])  # [b, t]
    first, last = (both[:, i].masked_fill(~inside, -1e8) for i in (0, 1))
    band = torch.ones(t, t, dtype=torch.bool).triu().tril(ANSWER - 1)
    sums = (first[:, :, None] + last[:, None, :]).masked_fill(~band, -4e8).flatten(1)  # [b, t * t]
    best, place = sums.max(1)
    return torch.stack([(place // t).float(), (place % t).float(), best, both[:, 0, 0] + both[:, 1, 0]], 1)


def _answers(found: Tensor, order: Tensor, encoded: Encoded, examples: list[Question]) -> dict[str, Any]:
    """Exact match and F1 in percent; found [windows, 4] of `_spans`, in `order`."""
    assert encoded.places is not None
    texts, best, none = [""] * len(examples), [-1e30] * len(examples), [1e30] * len(examples)
    for row, (first, last, score, empty) in zip(order.tolist(), found.tolist(), strict=True):
        owner, begin = encoded.owner[row], int(encoded.rows.offsets[row])
        none[owner] = min(none[owner], empty)
        if score > best[owner]:
            a, b = int(encoded.places[begin + int(first), 0]), int(encoded.places[begin + int(last), 1])
            texts[owner], best[owner] = examples[owner].context[max(a, 0) : max(b, 0)], score
    if any(not e.answers for e in examples):
        texts = ["" if empty > score else text for text, score, empty in zip(texts, best, none, strict=True)]
    exact = [max(text_of(t) == text_of(a) for a in e.answers or ("",)) for t, e in zip(texts, examples, strict=True)]
    f1 = [max(overlap(t, a) for a in e.answers or ("",)) for t, e in zip(texts, examples, strict=True)]
    return {"exact_match": 100 * sum(exact) / len(exact), "f1": 100 * sum(f1) / len(f1)}


def text_of(answer: str) -> str:
    """What of an answer counts: lower case, without punctuation, articles and repeated spaces."""
    kept = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def overlap(answer: str, wanted: str) -> float:
    """F1 of the words of two answers; two empty ones agree."""
    ours, theirs = text_of(answer).split(), text_of(wanted).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return float(ours == theirs) if not ours or not theirs else 2 * common / (len(ours) + len(theirs))
