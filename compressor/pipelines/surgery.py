"""oBERT on causal language models: one decoder block's curvature at a time, so that memory is the model and the Fisher matrices of one block.

Single weights go under one threshold over all blocks, for which the scores of every block are kept and its mini-batches run twice. Whole units go
block by block, as many from each, so that the widths are uniform. Either way all at once, before any training: what is left is tuned by the stages
that follow (scales of a packed model keep zeros zero). The result is written down when it is there; a run that was stopped before it starts anew.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.linear import find_blocks, linears
from compressor.prune import slicing
from compressor.prune.masks import Pattern, parse_pattern
from compressor.prune.obert import Settings
from compressor.prune.obert_blocks import prune_blocks
from compressor.prune.structured_obert import StructuredObert
from compressor.prune.unit_masks import UnitMasks
from compressor.prune.units import families
from compressor.prune.widths import Widths
from compressor.recipe import Prune
from compressor.tune.batches import CausalLM
from compressor.tune.gradients import Gradients

DONE = "pruned.safetensors"


def settings(options: Prune) -> Settings:
    """RecipeError for options that cannot work."""
    pattern = Pattern() if options.pattern == "structured" else parse_pattern(options.pattern or "unstructured")
    return Settings(pattern, options.method, options.damp, options.block or 0, options.gradients, options.recompute)


def check(model: nn.Module, options: Prune) -> None:
    """RecipeError or ModelError, with the reason, for weights or a ratio that the pattern does not allow."""
    pattern = settings(options).pattern
    if options.ratio > pattern.limit:
        raise RecipeError(
            f"{options.pattern} prunes at most {pattern.limit:.0%}, not {options.ratio:.0%}: lower the ratio, or choose another pattern"
        )
    for name, layer in linears(find_blocks(model)[1]).items():
        pattern.check(name, layer.weight.shape)


class _Stream:
    """gradients(count): one window of the objective a mini-batch, of whatever requires a gradient when it is asked."""

    def __init__(self, model: nn.Module, objective: CausalLM, seed: int):
        self.model, self.objective, self.seed = model, objective, seed

    def __call__(self, count: int) -> Iterator[None]:
        wanted = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        yield from Gradients(self.model, wanted, self.objective, 1, self.seed)(count)


def single_weights(
    model: nn.Module, options: Prune, objective: CausalLM, seed: int, folder: Path | None, fingerprint: str
) -> tuple[dict[str, Any], list[str]]:
    """Zero the cheapest weights of the blocks' linears, in place; facts for the report, and notes."""
    prefix, blocks = find_blocks(model)
    chunks = [
        {f"{prefix}.{i}.{name}.weight": layer.get_parameter("weight") for name, layer in linears(block).items()} for i, block in enumerate(blocks)
    ]
    weights = {name: weight for chunk in chunks for name, weight in chunk.items()}
    stored = _read(folder, fingerprint)
    if stored is None:
        pruned = prune_blocks(model, chunks, _Stream(model, objective, seed), options.ratio, settings(options))
        stored = {name: weight.detach() for name, weight in weights.items()}, {"notes": pruned.notes}
        _write(folder, fingerprint, *stored)
    tensors, facts = stored
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
    gone = sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())
    return {"ratio": gone, "pattern": options.pattern or "unstructured"}, facts["notes"]


def whole_units(model: nn.Module, options: Prune, widths: Widths, objective: CausalLM, seed: int, folder: Path | None, fingerprint: str) -> list[str]:
    """Cut the cheapest units out of every block, in place; notes. Later blocks are scored with earlier ones masked."""
    units = families(model, widths.unit)
    stored = _read(folder, fingerprint)
    masks = UnitMasks(model, units)
    if stored is None:
        notes = []
        for block in sorted({f.block for f in units}):
            own = [f for f in units if f.block == block]
            pruner = _block_pruner(model, own, options, widths, _Stream(model, objective, seed))
            try:
                pruner.prune(0)
            finally:
                pruner.masks.remove()
            for f in own:
                masks.masks[f.key].copy_(pruner.masks.masks[f.key])
            notes += pruner.notes
        weights = {part.name: model.get_submodule(part.name).get_parameter("weight").detach() for f in units for part in f.parts}
        stored = {f"mask.{key}": m for key, m in masks.masks.items()} | weights, {"notes": notes}
        _write(folder, fingerprint, *stored)
    tensors, facts = stored
    masks.remove()
    with torch.no_grad():
        for name in {part.name for f in units for part in f.parts}:
            model.get_submodule(name).get_parameter("weight").copy_(tensors[name])
    slicing.cut(model, units, {f.key: tensors[f"mask.{f.key}"] for f in units}, next(model.parameters()).dtype)
    return facts["notes"]


def _block_pruner(model: nn.Module, own: list[Any], options: Prune, widths: Widths, stream: _Stream) -> StructuredObert:
    """The pruner of one block's families, whose weights alone require a gradient."""
    model.requires_grad_(False)
    kept = {f.key: widths.kept(f) for f in own}
    for part in (part for f in own for part in f.parts):
        model.get_submodule(part.name).get_parameter("weight").requires_grad_(True)
    return StructuredObert(model, UnitMasks(model, own), stream, ((0, options.ratio),), lambda _ratio: kept, settings(options))


def _write(folder: Path | None, fingerprint: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (DONE + ".tmp")
    save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, temporary, metadata={"fingerprint": fingerprint, "facts": json.dumps(facts)})
    temporary.replace(folder / DONE)


def _read(folder: Path | None, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `_write` wrote under this fingerprint; None if nothing did, or it cannot be read."""
    if folder is None or not (folder / DONE).exists():
        return None
    try:
        with safe_open(folder / DONE, "pt") as file:
            if file.metadata()["fingerprint"] != fingerprint:
                return None
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, TypeError):
        return None
