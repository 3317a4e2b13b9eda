"""oBERT on causal language models: one decoder block's curvature at a time, so that memory is the model and the Fisher matrices of one block.

Single weights go under one threshold over all blocks, for which the scores of every block are kept and its mini-batches run twice. Whole units go
block by block, as many from each, so that the widths are uniform. Either way all at once, before any training: what is left is tuned by the stages
that follow (scales of a packed model keep zeros zero). The result is written down when it is there; a run that was stopped before it starts anew.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.linear import block_weights, find_blocks
from compressor.pipelines import journal
from compressor.prune import slicing
from compressor.prune.obert import Settings
from compressor.prune.obert_blocks import prune_blocks
from compressor.prune.structured_obert import StructuredObert
from compressor.prune.unit_masks import UnitMasks
from compressor.prune.units import Family, families
from compressor.prune.widths import Widths
from compressor.recipe import Prune
from compressor.stored import compute_dtype
from compressor.tune.batches import CausalLM
from compressor.tune.gradients import Gradients

DONE = "pruned.safetensors"


def single_weights(model: nn.Module, options: Prune, objective: CausalLM, seed: int, folder: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Zero the cheapest weights of the blocks' linears, in place; facts for the report, and notes."""
    weights, prefix = block_weights(model), find_blocks(model)[0]
    chunks: dict[str, dict[str, nn.Parameter]] = {}
    for name, weight in weights.items():
        chunks.setdefault(name.removeprefix(f"{prefix}.").partition(".")[0], {})[name] = weight
    stored = _kept(folder)
    if stored is None:
        pruned = prune_blocks(model, list(chunks.values()), _stream(model, objective, seed), options.ratio, Settings.of(options))
        stored = {name: weight.detach() for name, weight in weights.items()}, pruned.notes
        _keep(folder, *stored)
    tensors, notes = stored
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
    gone = sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())
    return {"ratio": gone, "pattern": options.pattern or "unstructured"}, notes


def whole_units(model: nn.Module, options: Prune, widths: Widths, objective: CausalLM, seed: int, folder: Path | None = None) -> list[str]:
    """Cut the cheapest units out of every block, in place; notes. Later blocks are scored with earlier ones masked."""
    units = families(model, widths.unit)
    stored, masks = _kept(folder), UnitMasks(model, units)
    if stored is None:
        notes = []
        for block in sorted({f.block for f in units}):
            own = [f for f in units if f.block == block]
            pruner = _block_pruner(model, own, options, widths, _stream(model, objective, seed))
            try:
                pruner.prune(0)
            finally:
                pruner.masks.remove()
            for f in own:
                masks.masks[f.key].copy_(pruner.masks.masks[f.key])
            notes += pruner.notes
        weights = {part.name: model.get_submodule(part.name).get_parameter("weight").detach() for f in units for part in f.parts}
        stored = {f"mask.{key}": m for key, m in masks.masks.items()} | weights, notes
        _keep(folder, *stored)
    tensors, notes = stored
    masks.remove()
    with torch.no_grad():
        for name in {part.name for f in units for part in f.parts}:
            model.get_submodule(name).get_parameter("weight").copy_(tensors[name])
    slicing.cut(model, units, {f.key: tensors[f"mask.{f.key}"] for f in units}, compute_dtype(model))
    return notes


def _stream(model: nn.Module, objective: CausalLM, seed: int) -> Callable[[int], Iterator[None]]:
    """gradients(count): one window of the objective a mini-batch, the same ones at every call, of whatever requires a gradient then."""
    return lambda count: Gradients(model, None, objective, 1, seed)(count)


def _block_pruner(model: nn.Module, own: list[Family], options: Prune, widths: Widths, stream: Callable[[int], Iterator[None]]) -> StructuredObert:
    """The pruner of one block's families, whose weights alone require a gradient."""
    model.requires_grad_(False)
    kept = {f.key: widths.kept(f) for f in own}
    for part in (part for f in own for part in f.parts):
        model.get_submodule(part.name).get_parameter("weight").requires_grad_(True)
    return StructuredObert(model, UnitMasks(model, own), stream, ((0, options.ratio),), lambda _ratio: kept, Settings.of(options))


def _keep(folder: Path | None, tensors: dict[str, Tensor], notes: list[str]) -> None:
    if folder is not None:
        journal.keep(folder / DONE, tensors, notes)


def _kept(folder: Path | None) -> tuple[dict[str, Tensor], list[str]] | None:
    """What `_keep` wrote into the folder, which the caller guards by a fingerprint."""
    return None if folder is None else journal.kept(folder / DONE)
