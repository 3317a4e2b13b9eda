"""Documents -> windows of tokens, for calibration and training.

    splits = load("notes.txt")                              # sources.py: files, folders, builtin names, hub datasets
    train = windows(splits.train, tokenizer, 2048)          # ids and labels, [count, 2048]
    calib = calibration(splits.train, tokenizer, 2048, nsamples=128, seed=42)       # ids, [128, 2048]

Ends. A document starts with the tokenizer's BOS and ends with its EOS, where it has them; where both are the same token, plain text has it
once between two documents. A chat that a chat template has rendered is complete: nothing is added.

Plain text is joined to one stream and cut into windows; the tail that fills no window is left out. Pairs are never split between training
windows: they are packed in order, a pair that does not fit opens the next window, and the rest is padding with label -100. A pair longer than a
window loses its end; if no completion is left it is dropped. Both are counted. For calibration pairs are a stream too: statistics must not
see padding. Documents in a window see each other: the attention is plain causal, as in pretraining.

Masks. Prompt tokens get label -100 unless `train_on_prompt`. A pair is tokenised as one text; its prompt is what this has in common with the prompt
tokenised alone, so that a token that straddles the border counts as completion. In a chat every assistant turn is learned, from what the generation
prompt of the template leaves open to the end of the turn. Labels stand where their ids stand: the shift is the loss's business.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from compressor.errors import DataError
from compressor.pipelines import limits
from compressor.pipelines.load import unbroken
from compressor.pipelines.shapes import Document, Message, Span, plain_chat
from compressor.pipelines.sources import Corpus, Splits, load, load_text

__all__ = ["IGNORE", "Corpus", "Document", "Splits", "Windows", "calibration", "encode", "load", "load_text", "sample", "tokenise", "windows"]

IGNORE = -100
BATCH = 512  # documents tokenised at once
Row = tuple[list[int], list[int]]  # ids, labels


@dataclass(frozen=True)
class Windows:
    """ids and labels, int64 [count, seqlen]; a label is the id itself, or -100 where nothing is learned (prompt, padding)."""

    ids: Tensor
    labels: Tensor
    cut: int = 0  # pairs that lost their end
    dropped: int = 0  # pairs whose completion did not fit at all

    def __len__(self) -> int:
        return len(self.ids)


def windows(corpus: Corpus, tokenizer: Any, seqlen: int, train_on_prompt: bool = False) -> Windows:
    """Packs a corpus by the rules above. Raises DataError if it does not fill one window of text, or leaves no completion to learn."""
    if corpus.pairs:
        return _pack_pairs(encode(corpus, tokenizer, train_on_prompt), tokenizer, seqlen, corpus.name)
    ids = _fill(token_stream(corpus, tokenizer), seqlen, corpus.name)
    return Windows(ids, ids.clone())


def sample(source: Windows, nsamples: int, seed: int) -> Windows:
    """`nsamples` windows chosen by `seed`, in their order in the text; all of them if there are fewer."""
    chosen = sorted(random.Random(seed).sample(range(len(source)), min(nsamples, len(source))))
    return Windows(source.ids[chosen], source.labels[chosen], source.cut, source.dropped)


def calibration(corpus: Corpus, tokenizer: Any, seqlen: int, nsamples: int, seed: int) -> Tensor:
    """ids [up to nsamples, seqlen] without padding, chosen like `sample`; of pairs, prompts and completions alike. Raises DataError."""
    ids = _fill(token_stream(corpus, tokenizer), seqlen, corpus.name)
    return sample(Windows(ids, ids), nsamples, seed).ids


def token_stream(corpus: Corpus, tokenizer: Any) -> Tensor:
    """All documents with BOS and EOS, one after the other; ids [tokens]."""
    if corpus.pairs:
        return torch.cat([torch.tensor(ids) for ids, _ in encode(corpus, tokenizer)])
    bos, eos = ends(tokenizer)
    between, last = ([], eos) if bos == eos else (eos, [])
    rows = [torch.tensor([*bos, *ids, *between], dtype=torch.int64) for ids in tokenise((d.text for d in corpus.documents), tokenizer)]
    return torch.cat([*rows, torch.tensor(last, dtype=torch.int64)])


def tokenise(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of every text, without special tokens and without warnings about length."""
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        with unbroken("the tokenizer breaks on a text"):
            found = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield from found


def encode(corpus: Corpus, tokenizer: Any, train_on_prompt: bool = False) -> Iterator[Row]:
    """(ids, labels) of every document, with BOS and EOS; equally long, labels -100 where nothing is learned."""
    bos, eos = ends(tokenizer)
    docs = iter(corpus.documents)
    while batch := list(islice(docs, BATCH)):
        rendered = [_render(d, tokenizer, corpus.name) for d in batch]
        borders = [[(text[:a], text[:b]) for a, b in spans] for text, spans in rendered]
        prefixes = tokenise(chain.from_iterable(chain.from_iterable(borders)), tokenizer)
        for doc, spans, ids in zip(batch, borders, tokenise([text for text, _ in rendered], tokenizer), strict=True):
            labels = [IGNORE] * len(ids)
            for _ in spans:
                a, b = _common(next(prefixes), ids), _common(next(prefixes), ids)
                labels[a:b] = ids[a:b]
            head, tail = ([], []) if doc.messages and _template(tokenizer) else (bos, eos)
            ids = [*head, *ids, *tail]
            yield ids, list(ids) if train_on_prompt else [*[IGNORE] * len(head), *labels, *tail]


def ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """BOS and EOS as lists of no or one id."""
    bos, eos = ([] if i is None else [i] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    return bos, eos


def _fill(ids: Tensor, seqlen: int, name: str) -> Tensor:
    """[tokens] -> [count, seqlen] without the tail."""
    count = len(ids) // seqlen
    if count == 0:
        raise DataError(f"{name} has {len(ids)} tokens, too few for one window of {seqlen}; give more text or a smaller seqlen")
    return ids[: count * seqlen].reshape(count, seqlen)


def _pack_pairs(rows: Iterable[Row], tokenizer: Any, seqlen: int, name: str) -> Windows:
    """Fills windows in order."""
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    packed: list[Row] = []
    cut = dropped = 0
    room = 0
    for ids, labels in rows:
        cut += len(ids) > seqlen
        ids, labels = ids[:seqlen], labels[:seqlen]
        if all(label == IGNORE for label in labels[1:]):  # nothing predicts the first token of a window
            dropped += 1
            continue
        if len(ids) > room:
            packed.append(([], []))
            room = seqlen
        packed[-1][0].extend(ids)
        packed[-1][1].extend(labels)
        room -= len(ids)
    if not packed:
        raise DataError(f"no completion of {name} fits a window of {seqlen} tokens; give a larger seqlen")
    filled = [[*ids, *[pad] * (seqlen - len(ids))] for ids, _ in packed]
    masked = [[*labels, *[IGNORE] * (seqlen - len(labels))] for _, labels in packed]
    return Windows(torch.tensor(filled), torch.tensor(masked), cut, dropped)


def _template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _render(doc: Document, tokenizer: Any, name: str) -> tuple[str, list[Span]]:
    """The text of a document and the spans of characters that are learned."""
    if doc.messages:
        return _render_chat(doc.messages, tokenizer, name) if _template(tokenizer) else plain_chat(doc.messages)
    prompt = doc.prompt or ""
    return prompt + doc.text, [(len(prompt), len(prompt) + len(doc.text))]


def _render_chat(messages: Sequence[Message], tokenizer: Any, name: str) -> tuple[str, list[Span]]:
    """The chat in the tokenizer's template; turns that a template changes as the chat grows (it may drop their reasoning) are not learned."""
    turns = [{"role": role, "content": content} for role, content in messages]
    spans = []
    try:
        with limits.bounded():
            full = tokenizer.apply_chat_template(turns, tokenize=False)
            for i, (role, content) in enumerate(messages):
                if role != "assistant":
                    continue
                asked = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True) if i else ""
                upto = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
                start, end = _common(asked, full), len(upto)
                if full.startswith(upto) and content.strip() in full[start:end]:
                    spans.append((start, end))
    except Exception as error:  # templates raise what they like
        raise DataError(f"the tokenizer's chat template refuses a chat of {name}: {str(error).splitlines()[0] if str(error) else error!r}") from None
    if not spans:
        raise DataError(f"the tokenizer's chat template does not show what the assistant says in a chat of {name}")
    return full, spans


def _common(a: Sequence, b: Sequence) -> int:
    """Length of the common beginning."""
    if a == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
