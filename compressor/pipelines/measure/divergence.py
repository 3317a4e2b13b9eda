"""How far a model's predictions are from those of a reference, token by token, and which distances mean nothing.

For every predicted token: KL(reference || model) = sum over the vocabulary of p (ln p - ln q), in nats, and whether both call the same token the
likeliest. Both models see the same windows, one after the other, a few windows at a time; of the logits nothing is kept but a number a token.
ln p and ln q are float32; with d = ln p - ln q the sum is taken of p (d + expm1(-d)), which is the same number because p and q both sum to one,
but whose terms are never negative and do not feel the rounding of the two normalisers: d of 1e-6 then shows as 1e-12, not as noise of 1e-6.
Terms are summed in float64.

The change of the loss is paired: model minus reference over the same tokens. Its standard error is over windows (sandwich of the ratio estimator:
windows may count unlike numbers of tokens), because tokens of one window depend on each other. It is the error bar of ln(perplexity / perplexity of
the reference), far smaller than that of either perplexity alone. Windows of one long article still depend a little on each other: it is rather low.

Floor. The same numbers between the reference and itself:
  order     the same weights on windows without their last token, which predicts nothing, fewer at a time: equal but for the order of sums.
            What is of its size is noise of the computation.
  rounding  in the other precision. Where the reference computes in float32: its weights, and what every layer gives out, rounded to 16 bits
            (its own type if it has one, else bfloat16), as a server that runs the dense model does. Where it computes in 16 bits: the same weights
            in float32. What is of its size is what anybody accepts who serves the dense model in 16 bits.

Price: a forward of both models for each model, four of the reference for its floor; in memory both models, and of the logits of a few windows two
copies (evaluate.LOGIT_BYTES each) with float32 chunks of evaluate.CHUNK_BYTES. In float32 a 16-bit reference takes twice its size again; if that
does not fit, the floor is without that line and says so.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import DataError, NumericError
from compressor.pipelines import evaluate
from compressor.pipelines.blockwise.hidden import Hidden
from compressor.pipelines.data import IGNORE
from compressor.stored import compute_dtype

SAMPLE_LOGITS = 2**28  # that a Sample keeps: 1 GiB of host memory in float32
COMPARED = 8192  # tokens of the domain's text on which a run compares logits with those of the dense model
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}
Forward = Callable[[Tensor], Tensor]  # ids [batch, window] -> logits [batch, window, vocab]


@dataclass
class Sums:
    """Grows window by window: the divergences of all tokens, and per window its tokens and the losses of both, in nats."""

    kl: list[Tensor] = field(default_factory=list)  # float64 [tokens of a batch]
    same: int = 0
    windows: list[Tensor] = field(default_factory=list)  # float64 [batch, 3]: tokens, loss of the reference, loss of the model

    def result(self) -> dict[str, Any]:
        """mean, stderr, median, p90, p99, max (nats), top1 (share of tokens), tokens, windows, perplexity and reference_perplexity,
        loss_change (nats) and its loss_change_stderr; standard errors are None for a single window."""
        kl, per_window = torch.cat(self.kl), torch.cat(self.windows)  # [tokens], [windows, 3]
        count, before, after = per_window.unbind(1)
        tokens = float(count.sum())
        change, change_error = ratio(after - before, count)
        sizes = count.long().tolist()
        mean, error = ratio(torch.stack([part.sum() for part in kl.split(sizes)]), count)
        quantiles = {name: quantile(kl, share) for name, share in QUANTILES.items()}
        return {
            "mean": mean, "stderr": error, **quantiles, "max": float(kl.max()), "top1": self.same / tokens, "tokens": int(tokens),
            "windows": len(per_window), "perplexity": evaluate.exp(float(after.sum()) / tokens),
            "reference_perplexity": evaluate.exp(float(before.sum()) / tokens), "loss_change": change, "loss_change_stderr": change_error,
        }  # fmt: skip


def ratio(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Sum over sum of two float64 [windows], and its standard error over windows, None for fewer than two."""
    mean = float(sums.sum() / counts.sum())
    number = len(sums)
    if number < 2:
        return mean, None
    spread = float(((sums - mean * counts) ** 2).sum()) * number / (number - 1)
    return mean, math.sqrt(spread) / float(counts.sum())


def quantile(values: Tensor, share: float) -> float:
    """The smallest of float64 [n] that at least `share` of them do not exceed; of any number of values, unlike torch.quantile."""
    rank = max(1, math.ceil(share * len(values) - 1e-9))
    return float(values.kthvalue(rank).values)


def token_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) in nats, float64 [tokens], of logits [tokens, vocab] each, by the sum above."""
    p_log, q_log = (each.float().log_softmax(-1) for each in (reference, logits))  # [tokens, vocab]
    p, q = p_log.exp(), q_log.exp()
    d = (p_log - q_log).masked_fill(p == 0, 0.0)
    near = (d.abs() < 1) & (p > 0)
    return torch.where(near, p * (d + torch.expm1(-d)), p * d - p + q).sum(-1, dtype=torch.float64)


def compare(
    reference: Forward, other: Forward, rows: Tensor, targets: Tensor, device: torch.device, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Divergence of `other` from `reference` over windows: rows and targets int64 [count, window] as `evaluate.cut` gives them.

    Returns `Sums.result`. Raises DataError for vocabularies of unlike size, NumericError if a divergence or a loss is not finite.
    """
    sums, done, batch = Sums(), 0, 1
    while done < len(rows):
        part = slice(done, done + batch)
        ids, wanted = rows[part].to(device), targets[part, 1:].to(device)  # [batch, window], [batch, window - 1]
        first, second = reference(ids), other(ids)  # [batch, window, vocab]
        if first.shape[-1] != second.shape[-1]:
            raise DataError(f"the model has logits for {second.shape[-1]} tokens, the reference for {first.shape[-1]}: they share no vocabulary")
        add(sums, first, second, wanted)
        done, batch = min(done + batch, len(rows)), evaluate.batch_of(first)
        if progress:
            progress(done, len(rows))
    return sums.result()


class Sample:
    """Logits of a model on a few windows, kept so that what becomes of the same model can be compared with what it was."""

    def __init__(self, model: nn.Module, ids: Tensor, labels: Tensor | None = None, store: Hidden | None = None) -> None:
        """ids int64 [count, window], labels of the same shape, -100 where a token does not count.

        Of the windows that predict something the first are taken whose logits together are at most SAMPLE_LOGITS, one at least; they lie in `store`,
        a list in host memory if none is given, in the dtype that the model computes in. Raises DataError if nothing is predicted.
        """
        rows, targets = evaluate.cut(ids, labels, ids.shape[1])
        useful = (targets[:, 1:] != IGNORE).any(1)  # [count]
        config: Any = model.config
        fit = max(1, SAMPLE_LOGITS // (rows.shape[1] * config.vocab_size))
        rows, targets = rows[useful][:fit], targets[useful][:fit]
        kept: Hidden = [] if store is None else store
        with evaluate.evaluating(model):
            for _, logits in evaluate.each_logits(model, rows, next(model.parameters()).device):  # [batch, window, vocab]
                for window in logits.cpu().unbind():
                    kept.append(window)
        self.rows, self.targets, self.logits = rows, targets, kept  # [count, window] each, count of [window, vocab]

    def compare(self, model: nn.Module) -> dict[str, Any]:
        """Divergence of `model` from what the sample was made of: what `compare` returns for these windows, and raises."""
        sums, device = Sums(), next(model.parameters()).device
        with evaluate.evaluating(model):
            for part, logits in evaluate.each_logits(model, self.rows, device):  # [batch, window, vocab]
                add(sums, torch.stack([self.logits[i] for i in range(len(self.rows))[part]]).to(device), logits, self.targets[part, 1:].to(device))
        return sums.result()


def add(sums: Sums, first: Tensor, second: Tensor, wanted: Tensor) -> None:
    """Count a batch: logits of reference and model [batch, window or window - 1, vocab], targets [batch, window - 1]."""
    counted = wanted != IGNORE  # [batch, window - 1]
    length, vocab = wanted.shape[1], first.shape[-1]
    window_of = counted.nonzero()[:, 0]  # [tokens]
    places = counted.flatten().nonzero()[:, 0]  # [tokens]
    flat = [each[:, :length].reshape(-1, vocab) for each in (first, second)]  # [batch * (window - 1), vocab]
    per_window = torch.zeros(len(wanted), 3, dtype=torch.float64, device=wanted.device)
    for at, window in zip(*(each.split(max(1, evaluate.CHUNK_BYTES // (4 * vocab))) for each in (places, window_of)), strict=True):
        p, q, want = flat[0][at], flat[1][at], wanted.flatten()[at]
        kl = token_divergence(p, q)
        losses = [nn.functional.cross_entropy(each.float(), want, reduction="none").double() for each in (p, q)]
        if not all(bool(each.isfinite().all()) for each in (kl, *losses)):
            raise NumericError("a divergence is not finite: the model or the reference does not predict")
        sums.kl.append(kl.cpu())
        sums.same += int((p.argmax(-1) == q.argmax(-1)).sum())
        per_window.index_add_(0, window, torch.stack([torch.ones_like(kl), *losses], 1))
    sums.windows.append(per_window[per_window[:, 0] > 0].cpu())


def forward_of(model: nn.Module) -> Forward:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def floor(model: nn.Module, stored: torch.dtype, rows: Tensor, targets: Tensor, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """The reference against itself: {"order": …, "rounding": …}, each a `Sums.result` with "how" in words, or {"how", "missing": why}.

    `stored`: the dtype of the folder's weights.
    """
    parameter = next(model.parameters())
    forward, device, compute = forward_of(model), parameter.device, compute_dtype(model)
    order = compare(forward, _otherwise(forward), rows, targets, device, progress)
    out = {"order": {"how": "the same weights, fewer windows at a time and each without its last token: another order of sums"} | order}
    if compute == torch.float32:
        dtype = stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16
        how = f"float32 against weights and the outputs of all layers rounded to {_name(dtype)}, as 16-bit serving of the dense model does"
    else:
        dtype, how = torch.float32, f"{_name(compute)} against the same weights in float32"
    try:
        out["rounding"] = {"how": how} | compare(forward, recomputed(model, dtype), rows, targets, device, progress)
    except torch.OutOfMemoryError:
        out["rounding"] = {"how": how, "missing": "the reference in float32 does not fit into the memory of this device"}
    return out


def _otherwise(forward: Forward) -> Forward:
    """The same logits, but for those of the last token, from smaller batches of shorter windows."""

    def other(ids: Tensor) -> Tensor:
        short = ids[:, :-1] if ids.shape[1] > 2 else ids
        return torch.cat([forward(part) for part in short.split(max(1, (len(ids) + 1) // 2))])

    return other


def recomputed(model: nn.Module, dtype: torch.dtype) -> Forward:
    """The forward of a model in another precision, without a second model: float32 weights in place of 16-bit ones, or, of a model that computes in
    float32, weights and outputs of all modules rounded to `dtype`. Weights that rounding leaves alone are not copied."""
    changed = dict[str, Tensor]()
    for name, p in model.named_parameters():
        if p.is_floating_point():
            cast = p.detach().to(dtype).to(torch.float32)
            if cast.dtype != p.dtype or not torch.equal(cast, p):
                changed[name] = cast

    def forward(ids: Tensor) -> Tensor:
        with _rounding(model, dtype) if dtype != torch.float32 else nullcontext():
            out: Any = torch.func.functional_call(model, changed, (), {"input_ids": ids, "use_cache": False})
        return out.logits

    return forward


@contextmanager
def _rounding(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Meanwhile what every module gives out is rounded."""
    hooks = [module.register_forward_hook(lambda _module, _inputs, out: _rounded(out, dtype)) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounded(out: Any, dtype: torch.dtype) -> Any:
    """A module's output with its float32 tensors rounded; outputs of other kinds as they are."""
    if isinstance(out, Tensor):
        return out.to(dtype).float() if out.dtype == torch.float32 else out
    return tuple(_rounded(each, dtype) for each in out) if type(out) is tuple else out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
