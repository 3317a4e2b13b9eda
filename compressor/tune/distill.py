"""Learning from the dense model's predictions beside the text: knowledge distillation (Hinton et al., 2015, arXiv 1503.02531) on kept logits.

    loss of a token = (1 - share) * -log q(next) + share * KL(p || q)

p is what the dense model predicts, of which the `top` likeliest tokens are kept, the rest as one more outcome: KL of that coarser choice is a lower
bound of the whole one, and 0 where all of these probabilities agree, up to the rounding of float16 in which they are kept. Keeping costs 6 bytes a
token and kept token, once, and no second model is in memory while one learns.
Limits: causal language models; temperature 1, so that the loss of a perfect student is that of the text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.errors import DataError
from compressor.tune.batches import CausalLM
from compressor.tune.loss import loss_function

TINY = 1e-7  # probability below which the rest of a vocabulary is not divided by


@dataclass(frozen=True)
class Taught:
    """What the dense model predicts after each token of some windows: ids int32 and natural log-probabilities float16, [count, seqlen, top] each."""

    tokens: Tensor
    logs: Tensor


def top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of logits [..., vocab] and their log-probabilities, as Taught has them."""
    best = logits.float().log_softmax(-1).topk(min(count, logits.shape[-1]), -1)
    return best.indices.to(torch.int32), best.values.to(torch.float16)


class Distilled(CausalLM):
    """Next-token prediction on windows, and the predictions of the dense model on the same.

    used: row numbers, int64, of the windows that `taught` belongs to, in its order; None: all of them. DataError for rows that nothing is known of.
    """

    def __init__(self, ids: Tensor, labels: Tensor, taught: Taught, share: float, used: Tensor | None = None):
        super().__init__(ids, labels)
        used = torch.arange(len(ids)) if used is None else used
        if taught.tokens.shape[:2] != (len(used), ids.shape[1]):
            raise DataError(f"predictions for windows {tuple(taught.tokens.shape[:2])} do not belong to windows {len(used), ids.shape[1]}")
        self.taught, self.share = taught, share
        self.places = torch.full((len(ids),), -1)
        self.places[used] = torch.arange(len(used))

    def rows(self, which: Tensor) -> tuple[Tensor, ...]:
        ids, labels = super().rows(which)
        length, places = ids.shape[1], self.places[which]
        if (places < 0).any():
            raise DataError(f"the dense model's predictions of window {int(which[places < 0][0])} were not kept")
        return ids, labels, self.taught.tokens[places, :length], self.taught.logs[places, :length]

    def loss(self, model: nn.Module) -> Callable[..., Tensor]:
        return loss_function(model, self.ids[:1, :8].to(next(model.parameters()).device), self._part)

    def _part(self, logits: Tensor, wanted: Tensor, tokens: Tensor, logs: Tensor) -> Tensor:
        """logits [n, vocab], wanted [n], tokens and logs [n, top]."""
        said = logits.log_softmax(-1)  # [n, vocab]
        own, theirs = said.gather(-1, tokens.long()), logs.float()  # [n, top]
        p = theirs.exp()
        kl = (p * (theirs - own)).sum()
        if tokens.shape[1] < logits.shape[1]:
            rest, left = ((1 - each.sum(-1)).clamp(min=TINY) for each in (p, own.exp()))
            kl = kl + (rest * (rest / left).log()).sum()
        text = -said.gather(-1, wanted[:, None]).sum()
        return (1 - self.share) * text + self.share * kl
