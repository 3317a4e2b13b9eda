"""oBERT in bounded memory: the curvature of one chunk of the model at a time, for models whose Fisher blocks do not fit at once.

The Fisher matrices of a billion weights with B = 50 take 200 GB, and no score or move needs more than those of its own weight. So only the weights
of one chunk, such as one decoder block, require a gradient at a time; the same mini-batches run again for each chunk. Two ways:

    global   scores of all chunks, float32 on the CPU; one threshold over all; then each chunk's matrices once more for its move, with the curvature
             that it has when the chunks before it are pruned already
    local    each chunk is pruned to the ratio by itself, in one pass over the chunks

Price: the mini-batches run once per chunk, twice with the global threshold, instead of once, though backward passes end at the first layer that
requires a gradient; memory is the model, one chunk's matrices and gradients, and 4 bytes a weight on the CPU for the scores. Limits: no training
between, which for models this large is a fine-tuning of its own; the masks are returned for it. After Kurtic et al., 2022, arXiv 2203.07259.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.prune.fisher import BlockFisher, Gradients
from compressor.prune.masks import sparsity
from compressor.prune.obert import Settings, fishers_of, missing, portions, scores, settle, strike, whole

Chunk = Mapping[str, nn.Parameter]


@dataclass
class Pruned:
    """What was pruned. masks: bool [n, k] by name, True where a weight is kept; notes: a sentence on each fault of a Fisher matrix."""

    masks: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """The share of the prunable weights that is gone."""
        return sparsity(self.masks)


def prune_blocks(
    model: nn.Module,
    chunks: Sequence[Chunk],
    gradients: Gradients,
    ratio: float,
    settings: Settings | None = None,
    local: bool = False,
    masks: Mapping[str, Tensor] | None = None,
) -> Pruned:
    """Prune the weights of all chunks, name to [n, k] parameter in each, to the ratio, in place; of all together, or with `local` of each chunk.

    gradients(count): runs `count` mini-batches one at a time and after each leaves the gradient of the task loss in `.grad` of whatever requires one,
    which are the weights of one chunk. masks: what was pruned before, to go on from. The requires_grad flags are as before afterwards.
    """
    settings, names = settings or Settings(), [name for chunk in chunks for name in chunk]
    if not names or len(set(names)) != len(names):
        raise RecipeError("pruning by chunks needs weights, each in one chunk only")
    start = {name: mask for chunk in chunks for name, mask in whole(chunk, settings).items()}
    for name, mask in (masks or {}).items():
        start[name].copy_(mask)
    walk = _Walk(model, gradients, settings, Pruned(start))
    with _flags(model):
        if not local:
            for count in portions(missing(start, settings, ratio), settings.rounds):
                walk.together(chunks, count)
        for chunk in chunks if local else ():
            for count in portions(missing({name: start[name] for name in chunk}, settings, ratio), settings.rounds):
                walk.alone(chunk, count)
    return walk.out


@dataclass
class _Walk:
    """One call of prune_blocks."""

    model: nn.Module
    gradients: Gradients
    settings: Settings
    out: Pruned

    def together(self, chunks: Sequence[Chunk], count: int) -> None:
        """One round under a global threshold."""
        before = {name: mask.clone() for name, mask in self.out.masks.items()}
        marks: dict[str, Tensor] = {}
        for chunk in chunks:
            marks |= {name: score.cpu() for name, score in scores(chunk, self._fishers(chunk, before), self.settings).items()}
        after = {name: mask.cpu() for name, mask in self.out.masks.items()}
        strike(after, marks, self.settings, count)
        marks.clear()
        for chunk in chunks:
            for name in chunk:
                self.out.masks[name].copy_(after[name])
            settle(chunk, self.out.masks, self._fishers(chunk, before), self.settings)

    def alone(self, chunk: Chunk, count: int) -> None:
        """One round of one chunk under its own threshold."""
        masks = {name: self.out.masks[name] for name in chunk}
        fishers = self._fishers(chunk, masks)
        strike(masks, scores(chunk, fishers, self.settings), self.settings, count)
        settle(chunk, masks, fishers, self.settings)

    def _fishers(self, chunk: Chunk, masks: Mapping[str, Tensor]) -> dict[str, BlockFisher]:
        """The Fisher matrices of one chunk; the only weights that require a gradient meanwhile are its own."""
        self.model.requires_grad_(False)
        for w in chunk.values():
            w.requires_grad_(True)
        found, notes = fishers_of(self.model, chunk, masks, self.gradients, self.settings)
        self.out.notes += [note for note in notes if note not in self.out.notes]
        self.model.requires_grad_(False)
        return found


@contextmanager
def _flags(model: nn.Module) -> Iterator[None]:
    """The requires_grad flags as before at the end."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
            if not flag:
                p.grad = None
