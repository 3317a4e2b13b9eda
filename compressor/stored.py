"""Embeddings and heads that keep their 16-bit weights on a CPU and compute in float32.

On a CPU everything computes in float32, and a vocabulary is the largest thing that is not packed: the embedding and the head of LLaMA-7B take 0.5
GB in 16 bits and 1.0 GB in float32. The embedding casts the rows that it looks up, which is exact; the head casts SLICE weights at a time,
forward and backward, so that a float32 copy of it never exists. Price: the cast of every slice once a call, a few percent of the product with a
hundred tokens. Limits: the head's weight and bias get no gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn

LARGE = 1 << 24  # weights, from which on it pays
SLICE = 1 << 21  # weights that are float32 at a time


class StoredEmbedding(nn.Embedding):
    """An embedding whose rows are float32 once they are looked up."""

    def forward(self, input: Tensor) -> Tensor:
        """ids int64 [...] -> float32 [..., width]."""
        return super().forward(input).float()


class StoredLinear(nn.Linear):
    """A linear layer of a float32 product with a weight [n, k] that is stored in 16 bits."""

    def forward(self, input: Tensor) -> Tensor:
        """float32 [..., k] -> [..., n]."""
        out: Tensor = _Sliced.apply(input, self.weight.detach())
        return out if self.bias is None else out + self.bias


class _Sliced(torch.autograd.Function):
    """x W^T and its gradient in x, the rows of W cast a slice at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        out = x.new_empty(*x.shape[:-1], len(weight))
        for rows in _slices(weight):
            out[..., rows] = x @ weight[rows].to(x.dtype).T
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,), grad = ctx.saved_tensors, grads[0]
        back = grad.new_zeros(*grad.shape[:-1], weight.shape[1])
        for rows in _slices(weight):
            back += grad[..., rows] @ weight[rows].to(grad.dtype)
        return back, None


def _slices(weight: Tensor) -> list[slice]:
    rows = max(1, SLICE // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def keep_stored(model: nn.Module, dtypes: dict[str, torch.dtype], values: bool = False) -> None:
    """Embeddings and heads of LARGE weights, stored in 16 bits, become such layers in place.

    dtypes: in what the folder stores each tensor, by its name. Their weights are new, frozen, tied where they were, and uninitialised unless
    `values` are wanted. Layers of a class of the model's own, which may do more than look up or multiply, stay as they are.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            users.setdefault(weight, []).append(module)
    stored = {p: dtypes[name] for name, p in model.named_parameters(remove_duplicate=False) if name in dtypes}
    for weight, modules in users.items():
        plain = all(type(m) is nn.Embedding or (type(m) is nn.Linear and m is head) for m in modules)
        if weight.numel() < LARGE or stored.get(weight) not in (torch.float16, torch.bfloat16) or not plain:
            continue
        like = weight.detach()
        new = nn.Parameter(like.to(stored[weight]) if values else torch.empty_like(like, dtype=stored[weight]), requires_grad=False)
        for module in modules:
            module.__class__ = StoredEmbedding if isinstance(module, nn.Embedding) else StoredLinear
            module.register_parameter("weight", new)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point dtype that a model computes in: that of its parameters, but for those that wait in 16 bits."""
    kept = stored_names(model)
    return next(p.dtype for name, p in model.named_parameters() if p.is_floating_point() and name not in kept)


def stored_names(model: nn.Module) -> set[str]:
    """Names of the weights that stay in 16 bits."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, StoredEmbedding | StoredLinear)}
