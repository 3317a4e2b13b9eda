"""oBERT in bounded memory: the curvature of one chunk of the model at a time, for models whose Fisher blocks do not fit at once.

The Fisher matrices of a billion weights with B = 50 take 200 GB, and no score or move needs more than those of its own weight. So only the weights
of one chunk, such as one decoder block, require a gradient at a time, and the same mini-batches run again for each. The scores of all chunks wait
on the CPU; under one threshold over all of them, each chunk then moves by its matrices, computed once more with the chunks before it pruned already.

Price: the mini-batches run twice per chunk instead of once, though backward passes end at the first layer that requires a gradient; memory is the
model, one chunk's matrices and gradients, and 4 bytes a weight on the CPU for the scores. Limits: no training between, which for models this large
is a fine-tuning of its own; the masks are returned for it. After Kurtic et al., 2022, arXiv 2203.07259.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.prune.fisher import BlockFisher, Gradients
from compressor.prune.masks import sparsity
from compressor.prune.obert import Settings, check, fishers_of, missing, portions, scores, settle, strike, whole

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


def prune_blocks(model: nn.Module, chunks: Sequence[Chunk], gradients: Gradients, ratio: float, settings: Settings | None = None) -> Pruned:
    """Prune the weights of all chunks, name to [n, k] parameter in each, to the ratio of all together, in place.

    gradients(count): runs `count` mini-batches one at a time and after each leaves the gradient of the task loss in `.grad` of whatever requires one,
    which are the weights of one chunk. The requires_grad flags are as before afterwards.
    """
    settings, weights = settings or Settings(), {name: w for chunk in chunks for name, w in chunk.items()}
    if not weights or len(weights) != sum(map(len, chunks)):
        raise RecipeError("pruning by chunks needs weights, each in one chunk only")
    check(weights, settings, ratio)
    out = Pruned(whole(weights))

    def curvature(chunk: Chunk, masks: Mapping[str, Tensor]) -> dict[str, BlockFisher]:
        """The Fisher matrices of one chunk, whose weights alone require a gradient."""
        model.requires_grad_(False)
        for w in chunk.values():
            w.requires_grad_(True)
        found, notes = fishers_of(model, chunk, masks, gradients, settings)
        out.notes += [note for note in notes if note not in out.notes]
        return found

    with _flags(model):
        for count in portions(missing(out.masks, settings, ratio), settings.rounds):
            before = {name: mask.clone() for name, mask in out.masks.items()}
            marks: dict[str, Tensor] = {}
            for chunk in chunks:
                marks |= {name: score.cpu() for name, score in scores(chunk, curvature(chunk, before), settings).items()}
            after = {name: mask.to("cpu", copy=True) for name, mask in before.items()}
            strike(after, marks, settings, count)
            marks.clear()
            for chunk in chunks:
                for name in chunk:
                    out.masks[name].copy_(after[name])
                settle(chunk, out.masks, curvature(chunk, before), settings)
    return out


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
