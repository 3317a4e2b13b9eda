"""How much a unit (a head, a group of heads, an FFN channel) matters: sums over its rows and columns of the importance of single weights.

    loraprune   G * W with G the gradient of W as far as the gradients of the low-rank path show it (LoRAPrune, Zhang et al., 2023, arXiv
                2305.18403); the gradients of W are never computed
    taylor      g_W * W (LLM-Pruner, Ma et al., 2023, arXiv 2305.11627, first order): needs the gradient of every W, four bytes a weight
    wanda       |W| * norm of the input column over the batch (Wanda, Sun et al., 2023, arXiv 2306.11695, summed over the unit)
    magnitude   |W|

The paper takes for G what one gradient step of unit rate would change B A by, g_B A + B g_A - g_B g_A. Since g_B = G Aᵀ and g_A = Bᵀ G (up to
alpha / rank), that is G times AᵀA, and BBᵀ times G: the more A and B grow, the more a few directions drown the rest. Here, unless PaperGradients
is asked for, the same observations are taken as what they say of G, its projections G P_A + P_B G - P_B G P_A (P_A onto the rows of A, P_B onto
the columns of B).

A family's score is the sum over all its linears, as published, or with `gate` that of its gate alone: what a unit does leaves through its columns
there, and the rows that feed it say the same once more, with more noise. Which pays is measured in docs/pruning.md.

W is always the weight in use, with the low-rank path folded in. Products of a weight's shape exist for a tile of rows at a time. The units' scores of
one linear are divided by their norm, so that linears of different size count alike, then added over the linears of a family. Where blocks
compete with each other they are not, or all blocks would matter alike.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressor.errors import ModelError
from compressor.linear import PackedLinear
from compressor.prune.lowrank import LowRank
from compressor.prune.units import Family, Part

CUTOFF = 1e-4  # of the largest eigenvalue: smaller ones of a Gram matrix are noise
EPSILON = 1e-8  # added to the norm that a linear's scores are divided by


class Importance(Protocol):
    """One way to weigh single weights; reads what a training step left behind."""

    def __init__(self, paths: Mapping[str, LowRank]) -> None: ...

    def entries(self, name: str, rows: slice) -> Tensor:
        """Importance of the weights in these rows of the linear `name`, float32 [rows, k], with its sign where it has one."""

    def clear(self) -> None:
        """Forget the step."""

    def detach(self) -> None:
        """Take off whatever was attached to the model."""


class LoraGradients:
    """From the gradients of the low-rank paths alone."""

    projected = True

    def __init__(self, paths: Mapping[str, LowRank]):
        self.paths = paths
        self.factors: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}  # of the step at hand, by linear

    def entries(self, name: str, rows: slice) -> Tensor:
        if name not in self.factors:
            self.factors[name] = self._gradient(name)
        left, a, b, right = self.factors[name]
        return torch.addmm(left[rows] @ a, b[rows], right).mul_(self.paths[name].merged(rows))

    def _gradient(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(left [n, r], a [r, k], b [n, r], right [r, k]) with G = left a + b right."""
        path = self.paths[name]
        ga, gb = path.a.grad, path.b.grad
        if ga is None or gb is None:
            raise ModelError(f"{name} has no gradients to score it by: it took no part in the step")
        a, b = path.a.detach(), path.b.detach()
        if not self.projected:
            return gb, a - ga, b, ga
        rows = inverse(a @ a.T)
        left, right = gb @ rows, inverse(b.T @ b) @ ga
        right -= (right @ a.T) @ rows @ a  # what both paths show counts once
        return left / path.gamma, a, b, right / path.gamma

    def clear(self) -> None:
        self.factors.clear()

    def detach(self) -> None:
        """Nothing was attached."""


class PaperGradients(LoraGradients):
    """As the paper has it: the change that one gradient step of unit rate on A and B would make."""

    projected = False


def inverse(gram: Tensor) -> Tensor:
    """The pseudo-inverse of a symmetric positive semidefinite matrix [r, r]; directions below CUTOFF of the largest count as none."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > CUTOFF * values[-1].clamp(min=0)
    return (vectors * torch.where(kept, values, 1.0).reciprocal() * kept) @ vectors.T


class FullGradients:
    """From the gradient of every dense weight, summed over the micro-batches of a step."""

    def __init__(self, paths: Mapping[str, LowRank]):
        self.weights: dict[str, Tensor] = {}
        self.paths = paths
        for name, path in paths.items():
            if isinstance(path.base, PackedLinear):
                raise ModelError(f"{name} is packed, and its codes have no gradient: prune it by loraprune, wanda or magnitude")
            self.weights[name] = path.base.weight.requires_grad_(True)

    def entries(self, name: str, rows: slice) -> Tensor:
        grad = self.weights[name].grad
        if grad is None:
            raise ModelError(f"{name} has no gradient to score it by: it took no part in the step")
        return grad[rows].float() * self.paths[name].merged(rows)

    def clear(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    def detach(self) -> None:
        self.clear()
        for weight in self.weights.values():
            weight.requires_grad_(False)


class Activations:
    """From the norms of the inputs that a step's forward passes saw."""

    def __init__(self, paths: Mapping[str, LowRank]):
        self.paths = paths
        self.squares: dict[str, Tensor] = {}  # by linear, float32 [k]
        self.hooks: list[RemovableHandle] = [path.register_forward_pre_hook(self._hook(name)) for name, path in paths.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                seen = args[0].detach().float().square().flatten(0, -2).sum(0)
                self.squares[name] = seen if name not in self.squares else self.squares[name] + seen

        return add

    def entries(self, name: str, rows: slice) -> Tensor:
        if name not in self.squares:
            raise ModelError(f"{name} saw no inputs to score it by: it took no part in the step")
        return self.paths[name].merged(rows).abs_().mul_(self.squares[name].sqrt())

    def clear(self) -> None:
        self.squares.clear()

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()


class Magnitude:
    """From the weights alone."""

    def __init__(self, paths: Mapping[str, LowRank]):
        self.paths = paths

    def entries(self, name: str, rows: slice) -> Tensor:
        return self.paths[name].merged(rows).abs_()

    def clear(self) -> None:
        """Nothing is kept."""

    def detach(self) -> None:
        """Nothing was attached."""


IMPORTANCES: Mapping[str, type[Importance]] = {
    "loraprune": LoraGradients, "taylor": FullGradients, "wanda": Activations, "magnitude": Magnitude,
}  # fmt: skip


@torch.no_grad()
def unit_scores(family: Family, paths: Mapping[str, LowRank], importance: Importance, gate: bool = False, scaled: bool = True) -> Tensor:
    """The importance of every unit of a family, float32 [count]; `gate`: as its gate alone has it; not `scaled`: to compare with other blocks'."""
    total: Tensor | None = None
    for part in (family.gate,) if gate else family.parts:
        sums = _part_sums(part, family.count, paths[part.name], importance)
        share = sums / (torch.linalg.vector_norm(sums) + EPSILON) if scaled else sums
        total = share if total is None else total + share
    assert total is not None
    return total


def _part_sums(part: Part, count: int, path: LowRank, importance: Importance) -> Tensor:
    """Summed importance of each unit's rows or columns in one linear, float32 [count]."""
    sums = torch.zeros(path.out_features if part.axis == 0 else path.in_features, device=path.a.device)
    for rows in path.tiles():
        entries = importance.entries(part.name, rows).abs_()
        if part.axis == 0:
            sums[rows] = entries.sum(1)
        else:
            sums += entries.sum(0)
    return sums.view(count, part.width).sum(1)
