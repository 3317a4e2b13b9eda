"""Which entries go: patterns that hardware can use, and one exact threshold over all weights.

    unstructured   any entry
    4block         4 consecutive inputs of a row go together (any <Q>block)
    N:M            of each M consecutive inputs of a row the N best stay, 2:4 being what GPUs multiply fast

The threshold is global (oBERT, Kurtic et al., 2022, arXiv 2203.07259): so many of the lowest scores of all weights together go, to the entry; of
equal scores those that come first. Floats that are not negative are ordered like their bits, so the threshold is found by two counts, of the
upper and of the lower 16 bits, instead of a sort: no memory beside the scores but 2**24 integers at a time. With N:M the N best that are alive in
each group cannot go, and the lowest of all others do: a ratio below 1 - N/M is on the way to the pattern, and at 1 - N/M it is reached exactly.

Limits: what went never returns; entries of an N:M group are scored one by one, not as the set that goes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import ModelError, NumericError, RecipeError

PIECE = 1 << 24  # entries counted at once
HALF = 1 << 16


@dataclass(frozen=True)
class Pattern:
    """group: how many consecutive inputs go together; keep and of: how many of each `of` consecutive inputs stay, 0 for no such rule."""

    group: int = 1
    keep: int = 0
    of: int = 0

    def __post_init__(self) -> None:
        if self.group < 1 or (self.of and not 0 < self.keep < self.of) or (self.of and self.group > 1):
            raise RecipeError(f"no sparsity pattern has groups of {self.group} and keeps {self.keep} of {self.of}: use unstructured, 4block or 2:4")

    @property
    def limit(self) -> float:
        """The highest sparsity that the pattern has."""
        return 1 - self.keep / self.of if self.of else 1.0

    def check(self, name: str, shape: torch.Size) -> None:
        """ModelError, naming the layer, for a weight that the pattern does not divide."""
        span = self.of or self.group
        if len(shape) != 2 or shape[1] % span:
            raise ModelError(f"{name}: a weight of shape {tuple(shape)} does not divide into groups of {span} inputs; use the unstructured pattern")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{self.group}block" if self.group > 1 else "unstructured"


def parse_pattern(text: str) -> Pattern:
    """unstructured, <Q>block or <N>:<M>; RecipeError for anything else."""
    if text == "unstructured":
        return Pattern()
    if found := re.fullmatch(r"(\d+)block", text):
        return Pattern(group=int(found[1]))
    if (found := re.fullmatch(r"(\d+):(\d+)", text)) and int(found[2]):
        return Pattern(keep=int(found[1]), of=int(found[2]))
    raise RecipeError(f"{text} is not a sparsity pattern: use unstructured, 4block or 2:4")


def candidates(scores: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """Which units may go: bool [n, k / group] of scores [n, k / group] and the mask of what is alive, bool [n, k]."""
    alive = mask[:, :: pattern.group]
    if not pattern.of:
        return alive
    ranked = scores.masked_fill(~alive, -1.0).unflatten(1, (-1, pattern.of))
    order = ranked.argsort(dim=2, stable=True)[:, :, -pattern.keep :]  # what went is never among the best while `keep` are alive
    best = torch.zeros_like(ranked, dtype=torch.bool).scatter_(2, order, True)
    return alive & ~best.flatten(1)


def lowest(scores: Mapping[str, Tensor], free: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Exactly `count` of the units that are free, those of the lowest scores over all names, as bool tensors of the shapes given.

    scores: float32, not negative; free: bool of the same shapes. Equal scores go in the order of names and indices. NumericError, naming the
    weight, for scores below zero or not a number; RecipeError when fewer are free.
    """
    for name, score in scores.items():
        if not bool((score >= 0).all()):
            raise NumericError(f"{name}: its pruning scores are not numbers above 0, so its weight or gradients are not finite")
    available = sum(int(free[name].sum()) for name in scores)
    if count > available:
        raise RecipeError(f"{count} groups of weights are to go and only {available} can: lower the sparsity, or choose another pattern")
    if count <= 0:
        return {name: torch.zeros_like(mask) for name, mask in free.items()}
    upper, below = _crossing(scores, free, count, None)
    lower, within = _crossing(scores, free, count - below, upper)
    value, ties = upper * HALF + lower, count - below - within
    gone = {}
    for name, score in scores.items():
        bits = _bits(score)
        equal = (bits == value) & free[name]
        out = ((bits < value) & free[name]).contiguous()
        if ties > 0:
            first = equal.flatten().nonzero().flatten()[:ties]
            out.view(-1)[first] = True
            ties -= len(first)
        gone[name] = out
    return gone


def _bits(score: Tensor) -> Tensor:
    """The bits of floats >= 0 as int32, in the same order; -0 counts as 0."""
    return (score.float() + 0.0).view(torch.int32)


def _pieces(scores: Mapping[str, Tensor], free: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for name, score in scores.items():
        for part, mask in zip(score.flatten().split(PIECE), free[name].flatten().split(PIECE), strict=True):
            yield _bits(part)[mask]


def _crossing(scores: Mapping[str, Tensor], free: Mapping[str, Tensor], count: int, upper: int | None) -> tuple[int, int]:
    """The half word at which the count of units, in ascending order, reaches `count`, and how many lie below it.

    Upper halves, or the lower ones of units whose upper half is given.
    """
    histogram = torch.zeros(HALF, dtype=torch.int64)
    for bits in _pieces(scores, free):
        halves = bits >> 16 if upper is None else bits[bits >> 16 == upper] & (HALF - 1)
        histogram += torch.bincount(halves, minlength=HALF).cpu()
    total = histogram.cumsum(0)
    at = int(torch.searchsorted(total, count))
    return at, int(total[at] - histogram[at])


def pruned(masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many entries are gone, and how many there are."""
    return sum(mask.numel() - int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """The share of entries that are gone."""
    gone, total = pruned(masks)
    return gone / total
