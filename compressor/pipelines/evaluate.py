"""Perplexity with a stated protocol, and a few greedy samples.

Protocol. A text is cut into windows that do not overlap (stride = window); in each, every token but the first is predicted from those before
it; a tail shorter than a window is dropped, unless the whole text is shorter: then it is the only window. Perplexity is exp(sum of -log p /
predicted tokens), log-softmax in float32, sums in float64. GPTQ-style scripts cut WikiText-2 in the same way. With a stride below the window the
next window starts that much later, and of every window but the first only its last `stride` tokens count: each is predicted from at least
window - stride tokens, and none counts twice. That costs window / stride times as much.

Stream. A corpus of one plain text is tokenised in one go with the tokenizer's own special tokens. Of several documents each is preceded by
BOS; a tokenizer without BOS gets EOS between documents, and one with neither a blank line. Pairs are packed like training windows (data.py),
and only their completions count. Every result names its data, its hash and this rule, because a perplexity without them compares with nothing.

Price: logits of a batch are kept below 256 MiB where a single window allows it; the float32 copy below 8 MiB. The first window runs once more,
before the clock starts: kernels are compiled and caches filled in it, which would halve the speed of a short text.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor import world
from compressor.errors import DataError, ModelError, NumericError
from compressor.kernels import cpu
from compressor.pipelines.blockwise.blocks import Blocks
from compressor.pipelines.data import IGNORE, Corpus, ends, token_stream, tokenise, windows
from compressor.pipelines.generate import generate
from compressor.tune.loop import first_nonfinite

LOGIT_BYTES = 256 << 20
CHUNK_BYTES = 8 << 20
BATCH_TOKENS = 8192
SAMPLES, SAMPLE_TOKENS = 3, 40  # sample texts of a run, and their length
SAMPLED_PARAMETERS = 30_000_000  # packed ones, above which a CPU without compiled kernels writes no samples

Progress = Callable[[int, int], None]  # windows done, windows in all


def perplexity(
    model: nn.Module,
    ids: Tensor,
    window: int,
    max_tokens: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    labels: Tensor | None = None,
    stride: int | None = None,
) -> dict[str, Any]:
    """Perplexity of `model` on the first `max_tokens` tokens (0: all) of `ids`, by the protocol above.

    ids int64 [tokens], or [count, window] already cut; labels of the same shape, -100 where a token does not count. `device` None means that
    of the model, `stride` None the window. Returns perplexity, loss (nats a token), tokens (predicted), window, stride, windows,
    tokens_per_second, seconds (both without the warm-up). Raises DataError if nothing is predicted, NumericError, naming the layer, if the loss is
    not finite.
    """
    rows, targets = cut(ids, labels, window, max_tokens, stride)  # [count, window]
    tokens, count = int((targets[:, 1:] != IGNORE).sum()), len(rows)
    check_ids(rows, _vocabulary(model))
    rows, targets = _dealt(rows, targets)
    device = next(model.parameters()).device if device is None else device
    total = 0.0
    with evaluating(model):
        if Blocks.of(model) is None:
            _loss(_logits(model, rows[:1].to(device)), targets[:1].to(device))  # the warm-up; a GPU has done it when the loss is here
        start = time.perf_counter()
        for part, logits in each_logits(model, rows, device):  # [batch, window, vocab]
            loss, last = _loss(logits, targets[part].to(device)), min(part.stop, len(rows))
            if not math.isfinite(loss) and world.size() == 1:
                where = first_nonfinite(model, partial(next, each_logits(model, rows[part], device)))
                raise NumericError(f"the loss of windows {part.start} to {last - 1} is not finite: the model does not predict; first seen in {where}")
            total += loss
            if progress:
                progress(min(last * world.size(), count), count)
    total = sum(world.gather(total))
    if not math.isfinite(total):
        raise NumericError(f"the loss of some of {count} windows is not finite: the model does not predict")
    seconds, length = time.perf_counter() - start, rows.shape[1]
    result = {"perplexity": exp(total / tokens), "loss": total / tokens, "tokens": tokens, "window": length, "stride": min(stride or length, length)}
    return result | {"windows": count, "tokens_per_second": tokens / seconds, "seconds": seconds}


def _dealt(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """This process's share of the windows; as many for each of several, where they run out one more that counts nothing."""
    if world.size() == 1:
        return rows, targets
    each = -(-len(rows) // world.size())
    at = torch.arange(each * world.rank(), each * (world.rank() + 1))  # [each]
    own = at.clamp(max=len(rows) - 1)
    return rows[own], targets[own].masked_fill((at >= len(rows))[:, None], IGNORE)


def _vocabulary(model: Any) -> int:
    """How many tokens a model has embeddings for."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return table.num_embeddings if isinstance(table, nn.Embedding) else 1 << 62


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """ModelError for token ids that the model has no embedding for."""
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise ModelError(f"the tokenizer gives token {int(ids.max())}, and the model knows {vocabulary}: its tokenizer files are not its own")


def tokens_of(corpus: Corpus, tokenizer: Any, window: int) -> tuple[Tensor, Tensor | None, dict[str, int]]:
    """(ids, labels, what was lost): a stream [tokens] without labels, or pairs as windows [count, window] with theirs; pairs cut and dropped."""
    if not corpus.pairs:
        return stream(corpus, tokenizer), None, {}
    packed = windows(corpus, tokenizer, window)
    return packed.ids, packed.labels, {"cut": packed.cut, "dropped": packed.dropped}


def stream(corpus: Corpus, tokenizer: Any) -> Tensor:
    """Token ids [tokens] of a corpus, joined by the rule above; pairs one after the other (`measure` takes them as windows instead)."""
    if corpus.pairs:
        return token_stream(corpus, tokenizer)
    if len(corpus.documents) == 1:
        return torch.tensor(tokenizer(corpus.documents[0].text, verbose=False)["input_ids"], dtype=torch.int64)
    bos, eos = ends(tokenizer)
    mark = bos or eos or next(tokenise(["\n\n"], tokenizer))
    rows = [torch.tensor([*mark, *row], dtype=torch.int64) for row in tokenise((d.text for d in corpus.documents), tokenizer)]
    return torch.cat(rows) if bos else torch.cat(rows)[len(mark) :]


def joining(corpus: Corpus, tokenizer: Any) -> str:
    """The rule by which documents became tokens, in words for a report."""
    if corpus.pairs:
        return "pairs packed whole into windows, completions counted"
    if len(corpus.documents) == 1:
        return "one text with the tokenizer's own special tokens"
    if tokenizer.bos_token_id is not None:
        return f"{tokenizer.bos_token} before each document"
    return f"{tokenizer.eos_token} between documents" if tokenizer.eos_token_id is not None else "a blank line between documents"


def measure(
    model: nn.Module,
    tokenizer: Any,
    corpora: dict[str, Corpus],
    window: int,
    max_tokens: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    device: torch.device | str | None = None,
    stride: int | None = None,
) -> dict[str, dict[str, Any]]:
    """What `perplexity` returns for every corpus, under its key ("domain", "outside"); under "protocol" and the same key how it was measured.

    A protocol has name, data_sha256, documents, bos (how they were joined), counted, window, stride, tokens and max_tokens, for pairs also
    how many were cut or dropped. progress(key, windows done, windows in all) is called after every batch. Raises like `perplexity`.
    """
    out: dict[str, dict[str, Any]] = {"protocol": {}}
    for key, corpus in corpora.items():
        ids, labels, lost = tokens_of(corpus, tokenizer, window)
        report = (lambda done, count, key=key: progress(key, done, count)) if progress else None
        try:
            found = out[key] = perplexity(model, ids, window, max_tokens, device, report, labels, stride)
        except (DataError, NumericError) as error:
            raise type(error)(f"{corpus.name}: {error}") from None
        out["protocol"][key] = protocol(corpus, tokenizer, found, max_tokens) | lost
    return out


def protocol(corpus: Corpus, tokenizer: Any, found: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """How a result of `perplexity` came about: the data, its hash, how documents were joined, and what counted."""
    data = {"name": corpus.name, "data_sha256": corpus.sha256, "documents": len(corpus.documents), "bos": joining(corpus, tokenizer)}
    data |= {"counted": "completions" if corpus.pairs else "all tokens"} | {key: found[key] for key in ("window", "stride", "tokens")}
    return data | {"max_tokens": max_tokens}


def samples_pay(device: torch.device, packed_parameters: int) -> bool:
    """Whether to write sample texts: not where decoding every weight again for each token would take longer than the measuring."""
    return device.type == "cuda" or cpu.available() or packed_parameters <= SAMPLED_PARAMETERS


def prompts(corpus: Corpus, tokenizer: Any, count: int = SAMPLES, tokens: int = 24) -> list[str]:
    """Beginnings of documents spread over a corpus, for `generate_samples`: whole prompts of pairs, else the first `tokens` tokens."""
    step = max(1, len(corpus.documents) // count)
    chosen = corpus.documents[::step][:count]
    if corpus.pairs:
        return [d.prompt for d in chosen if d.prompt and d.prompt.strip()]
    rows = tokenise((d.text[: 40 * tokens] for d in chosen), tokenizer)
    return [text for row in rows if (text := tokenizer.decode(row[:tokens], skip_special_tokens=True)).strip()]


def generate_samples(model: nn.Module, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    """What the model writes after each prompt, greedily, without special tokens."""
    with evaluating(model):
        rows = [generate(model, tokenizer, [prompt], max_new_tokens)[0] for prompt in prompts]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no graph; the training flag comes back. Not inference_mode: what a layer caches here must stay usable in training."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def cut(ids: Tensor, labels: Tensor | None, window: int, max_tokens: int = 0, stride: int | None = None) -> tuple[Tensor, Tensor]:
    """(rows, targets), int64 [count, window]: the windows of the protocol above, and -100 where a token does not count; [1, tokens] for a shorter
    text. ids and labels as of `perplexity`. DataError if nothing is left to predict, or for windows that are cut already and a stride."""
    stride = stride or window
    if ids.ndim == 2 and stride != window:
        raise DataError("pairs of prompt and completion are packed whole into windows, which do not overlap: leave the stride out")
    rows, targets = (_windows(each, window, max_tokens, stride) for each in (ids, ids if labels is None else labels))
    if stride < window and len(rows) > 1:
        targets = targets.clone()
        targets[1:, : window - stride] = IGNORE  # they counted in the windows before
    if not bool((targets[:, 1:] != IGNORE).any()):
        raise DataError(
            f"a text of {ids.numel()} {'token' if ids.numel() == 1 else 'tokens'} leaves nothing to predict; perplexity needs at least two tokens"
        )
    return rows, targets


def _windows(ids: Tensor, window: int, max_tokens: int, stride: int) -> Tensor:
    if ids.ndim == 2:
        return ids[: max(1, max_tokens // window)] if max_tokens else ids
    ids = ids[:max_tokens] if max_tokens else ids
    return ids.unfold(0, window, stride) if len(ids) >= window else ids.reshape(1, -1)


def each_logits(model: nn.Module, rows: Tensor, device: torch.device | str) -> Iterator[tuple[slice, Tensor]]:
    """(which windows, their logits [batch, window, vocab]) of rows int64 [count, window], as many at a time as `batch_of` says.

    A model of which one block at a time is in memory is walked through once for all of them.
    """
    blocks, done, batch = Blocks.of(model), 0, 1
    forward = (lambda part: _logits(model, rows[part].to(device))) if blocks is None else blocks.logits(rows)
    while done < len(rows):
        part = slice(done, done + batch)
        logits = forward(part)
        yield part, logits
        done, batch = min(done + batch, len(rows)), batch_of(logits)


def batch_of(logits: Tensor) -> int:
    """Windows to take at once, from the logits [batch, window, vocab] of some."""
    return max(1, min(LOGIT_BYTES // (logits[0].numel() * logits.element_size()), BATCH_TOKENS // logits.shape[1]))


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Sum of -log p over the targets that count; logits [batch, window, vocab], targets [batch, window], shifted here."""
    vocab = logits.shape[-1]
    rows, wanted = logits[:, :-1].reshape(-1, vocab), targets[:, 1:].reshape(-1)
    keep = max(1, CHUNK_BYTES // (4 * vocab))
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, want in zip(rows.split(keep), wanted.split(keep), strict=True):
        losses = nn.functional.cross_entropy(part.float(), want, ignore_index=IGNORE, reduction="none")
        total += losses.double().sum()
    return float(total)


def exp(loss: float) -> float:
    """Perplexity of a loss in nats a token; NumericError beyond what a float holds."""
    if loss > 700:
        raise NumericError(f"a loss of {loss:.0f} nats a token has no finite perplexity: the model does not predict")
    return math.exp(loss)
