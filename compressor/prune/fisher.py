"""The damped block-diagonal empirical Fisher information of a weight, and its inverse, block by block when asked for.

A weight, flattened row-major, is cut into blocks of B consecutive entries (the tail is padded with zeros); each block has its own

    F = damp I + 1/m sum over m mini-batches of g gT        (oBERT, Kurtic et al., 2022, arXiv 2203.07259, section 3.1)

The paper grows the inverse from I/damp by one rank-1 Woodbury update a gradient, in float32. Here the *sum* is grown, by several gradients at once,
and inverted in float64 when a block is scored or updated. Both hold B numbers a weight, but with damp 1e-7 and gradients near 1 the recursion
cancels seven digits: 50 x 50 inverses are wrong by 4e-3 after 1024 updates, by rank 1 or 16 alike, and a plain float32 sum is wrong by 1e-1 where
the spectrum decays over eight decades and useless where there are fewer gradients than B. So each off-diagonal sum is a pair of float32, what one of
them cannot hold in the other: the upper triangle keeps the numbers, the lower what was rounded off, and the diagonal is float64. Largest error
measured: 7e-9 of the inverse. Having F and not its inverse also makes the solve for many weights at once well conditioned (compressor.prune.obs).

Price: 4 B + 8 bytes a weight, and 4 x `held` for the gradients that wait for the next pass over the sums; one pass reads and writes the sums once.
On one core a pass of 16 costs 0.24 s for a million weights with B = 50, against 0.18 s of the recursion; inverting all blocks once costs 1 s.
Limits: entries in different blocks are taken as independent; needs a device with float64.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from compressor.errors import DataError, ModelError, RecipeError

HELD = 16  # gradients that wait for one pass over the sums
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}  # float64 numbers worked on at once: what a core's cache holds, what fills a GPU
Gradients: TypeAlias = Callable[[int], Iterator[None]]


@dataclass(frozen=True)
class Faults:
    """What went wrong in how many blocks of one weight, and what was done."""

    blocks: int
    lost: int  # had gradients that are not finite; those were left out
    diagonal: int  # not positive definite or too large: only the diagonal is used
    magnitude: int  # no finite gradient at all: the same curvature for each entry, so magnitude decides

    def __bool__(self) -> bool:
        return bool(self.lost or self.diagonal or self.magnitude)

    def sentence(self, name: str) -> str:
        """What to tell the user about the weight `name`."""
        parts = [
            f"{self.lost} had gradients that are not finite, which were left out" if self.lost else "",
            f"{self.diagonal} are singular and count by their diagonal" if self.diagonal else "",
            f"{self.magnitude} have no usable gradient and count by magnitude" if self.magnitude else "",
        ]
        return f"{name}: of {self.blocks} blocks of its Fisher matrix " + ", ".join(part for part in parts if part)


class BlockFisher:
    """The Fisher blocks of one weight of `numel` entries: `add` gradients, `finish` once, then ask for `matrix` or `inverse` of some blocks.

    count: m, the planned number of gradients, which divides the sums even when fewer come. RecipeError for values that cannot work.
    """

    def __init__(self, numel: int, block: int, damp: float, count: int, device: torch.device | str = "cpu", held: int = HELD):
        if numel < 1 or block < 1 or count < 1 or held < 1 or not 0 < damp < float("inf"):
            raise RecipeError(f"a Fisher matrix needs block, gradients and damp above 0, not {block}, {count} and {damp:g}")
        self.numel, self.block, self.damp, self.count, self.added = numel, block, damp, count, 0
        self.blocks = -(-numel // block)
        self._pairs = torch.zeros(self.blocks, block, block, device=device)  # float32: numbers above, their remainders below the diagonal
        self._diagonal = torch.zeros(self.blocks, block, dtype=torch.float64, device=device)
        self._lost = torch.zeros(self.blocks, dtype=torch.int64, device=device)
        self._held = torch.zeros(self.blocks, min(held, count), block, device=device)
        self._scale = torch.full((self.blocks,), 1 / count, dtype=torch.float64, device=device)
        self._waiting = 0

    @property
    def nbytes(self) -> int:
        """Bytes that this object holds on its device now."""
        return sum(t.nbytes for t in (self._pairs, self._diagonal, self._lost, self._held, self._scale))

    def chunks(self) -> Iterator[slice]:
        """Consecutive ranges of blocks, small enough to work on in float64."""
        size = max(1, CHUNK.get(self._pairs.device.type, 1 << 22) // self.block**2)
        return (slice(start, min(start + size, self.blocks)) for start in range(0, self.blocks, size))

    def add(self, gradient: Tensor) -> None:
        """Take one mini-batch's gradient, `numel` entries in any shape and dtype. A block of it that is not finite is left out and counted."""
        flat, whole = gradient.detach().reshape(-1), self.numel // self.block * self.block
        place = self._held[:, self._waiting]  # [blocks, B]
        place[: self.numel // self.block] = flat[:whole].view(-1, self.block)
        if whole < self.numel:
            place[-1, : self.numel - whole] = flat[whole:]
        if not bool(torch.isfinite(flat).all()):
            bad = ~torch.isfinite(place).all(1)
            place.masked_fill_(bad.unsqueeze(1), 0.0)
            self._lost += bad
        self._waiting += 1
        self.added += 1
        if self._waiting == self._held.shape[1]:
            self._fold()

    def _fold(self) -> None:
        """Add the outer products of the waiting gradients to the sums."""
        for rows in self.chunks():
            g = self._held[rows, : self._waiting].double()  # [c, r, B]
            total = self._sums(rows).baddbmm_(g.mT, g)
            self._diagonal[rows] += g.square().sum(1)
            number = total.float()
            torch.add(number.triu(1), total.sub_(number).float().tril_(-1), out=self._pairs[rows])
        self._waiting = 0

    def _sums(self, rows: slice) -> Tensor:
        """float64 [c, B, B] of sums, with nothing of use on the diagonal: a pair lies mirrored, so this adds its halves and is symmetric."""
        pairs = self._pairs[rows].double()
        return pairs + pairs.mT

    def finish(self) -> Faults:
        """Close the sums, free what waited, and replace blocks that have no inverse. Before any `matrix` or `inverse`."""
        if self._waiting:
            self._fold()
        self._held = self._held[:0].clone()
        whole = self._lost < max(self.added, 1)  # a block with lost gradients is the mean of the others
        self._scale *= torch.where(whole, self.added / (self.added - self._lost).clamp(min=1), 0.0)
        usable = whole & torch.isfinite(self._diagonal).all(1) & (self.added > 0)
        singular = torch.zeros_like(usable)
        self._pairs[~usable] = 0.0
        self._diagonal[~usable] = 0.0
        for rows in self.chunks():
            factor, failed = torch.linalg.cholesky_ex(self.matrix(rows))
            singular[rows] = (failed != 0) | ~torch.isfinite(factor.diagonal(dim1=1, dim2=2)).all(1)
        self._pairs[singular] = 0.0
        if bool(usable.any()):  # where nothing is known, the curvature is the mean of the known
            self._diagonal[~usable] = float((self._diagonal[usable] * self._scale[usable].unsqueeze(1)).mean()) * self.count
        self._scale[~usable] = 1 / self.count
        lost, missing = int(((self._lost > 0) & usable).sum()), int((~usable).sum())
        return Faults(self.blocks, lost, int(singular.sum()), missing)

    def matrix(self, rows: slice) -> Tensor:
        """F of some blocks, float64 [c, B, B], a copy."""
        scale = self._scale[rows].unsqueeze(1)  # [c, 1]
        total = self._sums(rows) * scale.unsqueeze(2)
        total.diagonal(dim1=1, dim2=2).copy_(self._diagonal[rows] * scale + self.damp)
        return total

    def inverse(self, rows: slice) -> Tensor:
        """The inverse of F of some blocks, float64 [c, B, B], symmetric."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.matrix(rows)))


def collect(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    gradients: Gradients,
    count: int,
    damp: float,
    blocks: Mapping[str, int],
) -> tuple[dict[str, BlockFisher], list[str]]:
    """The Fisher matrix of each named weight from `count` mini-batches, and a sentence on each fault.

    gradients(count) runs the mini-batches one at a time and after each leaves the gradient of its task loss in `.grad`; the model is in eval mode
    meanwhile and as it was afterwards, with all gradients cleared. masks: bool, shaped as the weights; a pruned entry's gradient counts as zero. A
    name without a mask is taken whole. blocks: B by name.

    DataError when there is no mini-batch, ModelError when a weight gets no gradient.
    """
    fishers = {name: BlockFisher(w.numel(), blocks[name], damp, count, w.device) for name, w in weights.items()}
    seen = 0
    with _evaluating(model), torch.enable_grad():
        for seen, _ in zip(range(1, count + 1), gradients(count), strict=False):  # noqa: B007
            for name, w in weights.items():
                if w.grad is None:
                    raise ModelError(f"{name} got no gradient: it is frozen, or the loss does not depend on it; leave it out of what is pruned")
                fishers[name].add(w.grad * masks[name] if name in masks else w.grad)
            model.zero_grad(set_to_none=True)
    if not seen:
        raise DataError("no mini-batch came for the gradients that pruning needs: give more text, or fewer gradients")
    notes = [] if seen == count else [f"only {seen} of {count} mini-batches came for the Fisher matrix"]
    faults = {name: fisher.finish() for name, fisher in fishers.items()}
    return fishers, notes + [fault.sentence(name) for name, fault in faults.items() if fault]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards the modes as before, and zeros in the tensors that held gradients before."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(p, p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, grad in before:
            p.grad = None if grad is None else grad.zero_()
