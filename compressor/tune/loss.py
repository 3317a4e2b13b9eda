"""The summed next-token loss of a causal language model, with logits for unmasked tokens only and in bounded chunks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS = 1 << 25  # logits alive at a time
MASKED = -100

Loss = Callable[..., Tensor]  # ids [b, t], labels [b, t] and what else belongs to tokens [b, t, ...] -> summed loss, float32
Part = Callable[..., Tensor]  # logits float32 [tokens, vocab], their next tokens [tokens], what else belongs to them [tokens, ...] -> summed loss


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """-log p of the tokens that come next, summed."""
    return nn.functional.cross_entropy(logits, wanted, reduction="sum")


@torch.no_grad()
def loss_function(model: nn.Module, probe: Tensor, part: Part = cross_entropy) -> Loss:
    """The summed `part` of `model` over all tokens that are not masked, logits made for these only and in bounded chunks.

    That needs a model whose logits are its head applied to the hidden states of its body, nothing else; whether they are is tried on `probe`
    ids [1, t]. Other models (logit scaling or capping) make all logits of a micro-batch.
    """
    body = getattr(model, "base_model", model)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()

    def hidden(ids: Tensor) -> Tensor:
        return body(input_ids=ids, use_cache=False).last_hidden_state

    def logits(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    was = model.training
    model.eval()
    plain = False
    if body is not model and head is not None:
        direct, own = head(hidden(probe)).float(), logits(probe).float()
        plain = torch.allclose(direct, own, rtol=0, atol=0, equal_nan=True)
    model.train(was)
    features, project = (hidden, head) if plain else (logits, nn.Identity())

    def loss(ids: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        wanted = labels[:, 1:] != MASKED
        return _summed(project, part, features(ids)[:, :-1][wanted], labels[:, 1:][wanted], *(each[:, :-1][wanted] for each in more))

    return loss


def _summed(head: Callable[[Tensor], Tensor], part: Part, hidden: Tensor, *told: Tensor) -> Tensor:
    """Summed `part` of head(hidden [t, d]) in float32 and what is told of the tokens [t, ...]; chunks recompute their logits in the backward pass."""

    def of(rows: Tensor, *some: Tensor) -> Tensor:
        return part(head(rows).float(), *some)

    size = max(1, LOGITS // getattr(head, "out_features", hidden.shape[1]))
    if len(hidden) <= size:
        return of(hidden, *told)
    parts = zip(hidden.split(size), *(each.split(size) for each in told), strict=True)
    return torch.stack([checkpoint(of, *each, use_reentrant=False, preserve_rng_state=False) for each in parts]).sum()
