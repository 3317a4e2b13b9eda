"""The summed next-token loss of a causal language model, with logits for unmasked tokens only and in bounded chunks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS = 1 << 25  # logits alive at a time
MASKED = -100

Loss = Callable[[Tensor, Tensor], Tensor]  # ids [b, t], labels [b, t] -> summed loss, float32


@torch.no_grad()
def loss_function(model: nn.Module, probe: Tensor) -> Loss:
    """The summed next-token loss of `model`, logits made for unmasked tokens only and in bounded chunks.

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

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        wanted = labels[:, 1:] != MASKED
        return _summed(project, features(ids)[:, :-1][wanted], labels[:, 1:][wanted])

    return loss


def _summed(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of head(hidden [t, d]) with targets [t], in float32; chunks recompute their logits in the backward pass."""

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(rows).float(), wanted, reduction="sum")

    size = max(1, LOGITS // getattr(head, "out_features", hidden.shape[1]))
    if len(hidden) <= size:
        return part(hidden, targets)
    pairs = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.stack([checkpoint(part, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in pairs]).sum()
