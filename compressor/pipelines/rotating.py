"""The stage that changes the basis of a dense model before it is packed (compressor/rotate), and proves that nothing else changed.

It comes after the dense model was measured and pruned, and after what it predicts was kept for --distill; calibration sees the rotated model.
Rotations follow from the seed, so that a run that goes on makes the same ones. Where one block at a time is in memory, a block is turned whenever it
is loaded. Price: two forward passes of one short window, and seconds of products. Weights are turned in float64 and rounded once, to float32 on a
CPU, and on a GPU to the 16 bits that the model has there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor import linear, world
from compressor.errors import ModelError, RecipeError
from compressor.pipelines import compress, load
from compressor.pipelines.blockwise.blocks import Blocks
from compressor.pipelines.journal import Journal, keep, kept
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Quant
from compressor.rotate import learned, merge

if TYPE_CHECKING:
    from compressor.pipelines.run import Run

WINDOW = 32  # tokens, drawn at random, whose logits are compared
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}  # norm of the change of the logits over their norm


def check(model: nn.Module, quant: Quant, name: str) -> None:
    """ModelError, before any work, for a model that cannot be rotated so, RecipeError for what cannot be learned; model: with or without weights."""
    method = quant.rotate
    if method == "none":
        return
    if method == "learned" and (tables := [kind.packer for kind in quant.kinds() if PACKERS[kind.packer].table]):
        raise RecipeError(f"quant.rotate=learned is for even grids, and {tables[0]} makes tables: give --rotate hadamard, or leave it out")
    if method == "learned" and world.size() > 1:
        raise RecipeError("rotations are learned in one process: start it without torchrun, or give --rotate hadamard")
    if why := merge.why_not(model, method):
        instead = " or give --rotate heads," if method in merge.RESIDUAL and not merge.why_not(model, "heads") else ""
        raise ModelError(f"{name} cannot be rotated by {method}: {why};{instead} leave --rotate out")


def rotate(run: "Run", loaded: load.Loaded, journal: Journal) -> None:
    """What the recipe asks for, in place, with what the user should know of it."""
    method = run.recipe.quant.rotate
    if not run.packs or method == "none":
        return
    more = merge.added(loaded.model, method) * loaded.dtype.itemsize
    folder = journal.subfolder("rotation", run.key_compress) if method == "learned" else None
    with run.stage("rotate"), run.show.task("rotate", learned.STEPS if folder else 1) as advance:
        moved = apply(loaded, run.recipe.quant, run.recipe.seed, folder, lambda step: advance(1, f"step {step}"))
    for told in (
        f"rotated by {method} before packing, which moved the logits by {moved:.1e} of their size",
        *([merge.sentence(more)] if more else []),
    ):
        run.show.say(told)
        run.report.notes += [told] if told not in run.report.notes else []


@torch.no_grad()
def apply(loaded: load.Loaded, quant: Quant, seed: int, folder: Path | None = None, tell: Callable[[int], None] | None = None) -> float:
    """Rotate a dense model in place; by how much its logits moved, over their size. ModelError if that is more than rounding.

    folder: where learned rotations are kept, and found again; tell(step): of learning.
    """
    method = quant.rotate
    if method == "none":
        return 0.0
    model: Any = loaded.model
    window = torch.randint(0, model.config.vocab_size, (1, WINDOW), generator=torch.Generator().manual_seed(seed))
    before, found, blocks = _logits(model, window), merge.planned(model, method, seed), Blocks.of(model)
    if method == "learned":
        found = _learned(model, found, quant, seed, folder, tell)
    found.outside(model, loaded.dtype)
    if blocks is not None:
        blocks.turn = found.block
    else:
        for index, block in enumerate(linear.find_blocks(model)[1]):
            found.block(index, block)
    moved = float((_logits(model, window) - before).norm() / before.norm())
    allowed = max(TOLERANCES.get(p.dtype, 0.0) for p in model.parameters())
    if not moved <= allowed:
        told = f"its logits move by {moved:.1e} of their size, and rounding explains {allowed:.0e}"
        raise ModelError(f"{loaded.name} computes something else once it is rotated by {method}: {told}; leave --rotate out")
    if method in merge.RESIDUAL:
        loaded.config |= {"tie_word_embeddings": False}
    return moved


def _learned(model: nn.Module, start: merge.Merge, quant: Quant, seed: int, folder: Path | None, tell: Callable[[int], None] | None) -> merge.Merge:
    """Rotations under which the weights lose least, as they will be packed; those in the folder if they are there."""
    path = None if folder is None else folder / "rotation.safetensors"
    stored = None if path is None else kept(path)
    if stored is None:
        targets = compress.plan(model, quant).packed()
        grids = {t.name: learned.Grid(t.quant.bits, t.group, t.quant.symmetric) for t in targets}
        stored = learned.learn(model, start, grids, seed, tell)
        if path is not None:
            keep(path, *stored)
    return learned.merged(start, stored[0])


def stored(method: str, loaded: load.Loaded, dtypes: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
    """In what embedding and head may wait (compressor/stored.py), of a model whose files hold `dtypes`; rotated, in what the folder will hold."""
    model: Any = loaded.model
    if method not in merge.RESIDUAL:
        return dtypes
    names = {id(p): name for name, p in model.named_parameters()}
    table, head = (names[id(module.weight)] for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    found = dtypes | {head: dtypes.get(head, dtypes[table])}
    return {name: loaded.dtype if dtype.itemsize == 2 else dtype for name, dtype in found.items()}


def _logits(model: Any, window: Tensor) -> Tensor:
    """float32 [1, window, vocab]."""
    device = next(p.device for p in model.parameters() if not p.is_meta)
    out: Tensor = model(input_ids=window.to(device), use_cache=False).logits
    return out.float()
