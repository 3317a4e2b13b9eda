"""Peak memory of a run of which one block at a time is in memory, before it starts; docs/scale.md has what was measured beside it.

Every stage holds `base`, what the process takes before the model is opened, and what lies outside the blocks. A visited block is in the dtype
that the device computes in, beside the tensor that is being read, mapped and copied. Hidden states on disk count one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linear
from compressor.export import shards
from compressor.kernels import cpu
from compressor.pipelines import compress, curvature, estimate, evaluate, teacher
from compressor.pipelines.blockwise import blocks as walking
from compressor.pipelines.calibrate import BATCH_TOKENS
from compressor.pipelines.packers import PACKERS, needs, trains
from compressor.recipe import Recipe
from compressor.rotate import merge
from compressor.sketch import learned
from compressor.stored import LARGE

PANELS = 160 << 20  # bytes of the panels of rows that packers work on
OPENING, WORKING = 190 << 20, 400 << 20  # bytes that the process grows by with the first model and its code, and with the first forward pass


@dataclass(frozen=True)
class Tokens:
    """What runs through the blocks: windows and their length, of calibration (none where nothing is calibrated), of one text of the evaluation, and
    of what predictions are kept of (none where nothing learns from them)."""

    calibration: int
    calibrated: int
    windows: int
    window: int
    taught: int = 0
    length: int = 0

    @classmethod
    def of(cls, ids: Tensor | None, characters: Sequence[int], most: int, window: int) -> "Tokens":
        """Of calibration windows, and of texts of so many characters of which `most` tokens are read (0: all); a token is a character at least."""
        longest = max(characters)
        count, length = (0, 0) if ids is None else (int(ids.shape[0]), int(ids.shape[1]))
        return cls(count, length, max(1, min(most or longest, longest) // window), window)


def peaks(
    recipe: Recipe, model: nn.Module, device: torch.device, stored: torch.dtype, folder: torch.dtype, tokens: Tokens, base: int
) -> dict[str, int]:
    """Bytes by stage, before tuning; model: with or without weights; stored: the dtype of its files, folder: that of what stays dense."""
    prefix, list_ = linear.find_blocks(model)
    size = 4 if device.type == "cpu" else folder.itemsize
    block = max(sum(p.numel() for p in each.parameters()) for each in list_)
    layers = [m for each in (list_[0], list_[-1]) for m in linear.linears(each).values()]
    largest, widest = max(m.in_features * m.out_features for m in layers), max(m.in_features for m in layers)
    beside = [*{id(p): p.numel() for name, p in model.named_parameters() if not name.startswith(f"{prefix}.")}.values()]
    beside += [merge.added(model, recipe.quant.rotate)]
    narrow = stored.itemsize if device.type == "cpu" else size
    outside = sum(count * (narrow if count >= LARGE else size) for count in beside)
    reading = 2 * max(largest, *beside) * stored.itemsize
    visit = block * size + 2 * largest * stored.itemsize
    packer = [PACKERS[kind.packer] for kind in recipe.quant.kinds()]
    packing = PANELS + 2 * largest
    if needs(recipe.quant):
        packing += 5 * 4 * widest * widest + 3 * 4 * largest + estimate.expert_sums(estimate.inputs(model))
    if any(each.table for each in packer):
        packing += estimate.SKETCHING * min(learned.PANEL, largest)
    todo = compress.plan(model, recipe.quant)
    packed = max(_stored(recipe, targets, rows, folder) for targets, rows in zip(todo.targets, list_, strict=True))
    paths = 0
    if recipe.tune.start != "zero":
        paths = 4 * recipe.tune.rank * sum(sum(t.shape) for t in estimate.adapted(recipe.tune, todo.packed()))
    config: Any = model.config
    pack = visit + packing
    if tokens.calibration:
        forward, kept = _walk(config, tokens.calibration, tokens.calibrated, size, recipe.data.activations)
        trained = 0
        if trains(recipe.quant):
            step = recipe.quant.windows * tokens.calibrated
            trained = estimate.training_bytes(model, kept // (config.hidden_size * size), step, size) + 3 * 4 * config.hidden_size**2
            if recipe.data.activations == "memory":
                trained += curvature.waiting_bytes(tokens.calibration, tokens.calibrated, config.hidden_size, len(list_), size)
        felt = curvature.logit_bytes(tokens.calibrated, config.vocab_size, size) if trains(recipe.quant) else 0
        pack = block * size + kept + max(packing, forward, trained, felt)
    forward, kept = _walk(config, tokens.windows, tokens.window, size, recipe.data.activations)
    one = tokens.window * config.vocab_size * size
    logits = max(one, min(evaluate.LOGIT_BYTES, tokens.windows * one))
    tail = 2 * logits + 3 * evaluate.CHUNK_BYTES
    compiled = estimate.COMPILER if device.type == "cpu" and cpu.available() else 0
    held = sum(count * folder.itemsize for count in beside)
    out = {
        "load": reading, "evaluate dense": kept + max(visit + forward, tail), "compress": pack + paths,
        "evaluate packed": compiled + paths + kept + max(packed + forward, tail), "export": paths + 2 * held + shards.HELD + packed,
    }  # fmt: skip
    if tokens.taught:
        forward, kept = _walk(config, tokens.taught, tokens.length, size, recipe.data.activations)
        predictions = teacher.held_bytes(recipe.tune, config.vocab_size, tokens.taught * tokens.length)
        out["teach"] = kept + max(visit + forward, predictions + teacher.working_bytes(tokens.length, config.vocab_size, size))
    return {stage: base + outside + value + (OPENING if stage == "load" else WORKING) for stage, value in out.items()}


def _stored(recipe: Recipe, targets: list[compress.Target], block: nn.Module, folder: torch.dtype) -> int:
    """Bytes of a block as it is packed, what stays dense included."""
    packed = [t for t in targets if not t.reason]
    dense = sum(p.numel() for p in block.parameters()) - sum(t.shape[0] * t.shape[1] for t in packed)
    return estimate.stored_bits(recipe, packed, folder) // 8 + dense * folder.itemsize


def _walk(config: Any, windows: int, window: int, size: int, keeping: str) -> tuple[int, int]:
    """(bytes of one batch in a block, bytes of the hidden states that wait) of windows on their way through the blocks."""
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    batch = min(windows, max(1, BATCH_TOKENS // window)) * window
    waiting = windows * window * hidden * size
    on_disk = keeping in ("disk", "recompute") or (keeping == "auto" and waiting > walking.HELD)
    return batch * (8 * hidden + 3 * inner) * size, 0 if on_disk else waiting
