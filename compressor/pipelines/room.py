"""What a run on a causal language model writes: all that lies on the disk at one time, at most, known from shapes before any work.

The work folder holds the blocks as they are packed, what pruning and training write down, the dense model's predictions where something learns from
them, and, where one block at a time is in memory, its logits; beside them lie the hidden states that wait between two blocks, or else the output
folder. So packing to 8 bits takes about what the 16-bit model does, half of it in either folder. Price: the architecture is built once more; block
by block, and for `--distill`, the texts are tokenised once more.
Limits: journal and report are not counted; tables that tuning makes of scales count as those of 4 bits.
"""

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from compressor import linear
from compressor.kernels import layout
from compressor.pipelines import checkpoint, compress, curvature, end_to_end, estimate, evaluate, load, pruning, teacher
from compressor.pipelines.blockwise import blocks
from compressor.pipelines.blockwise import stage as blockwise
from compressor.pipelines.choose.choice import ways
from compressor.pipelines.measure import divergence
from compressor.pipelines.packers import PACKERS, trains
from compressor.recipe import Recipe
from compressor.rotate import merge
from compressor.tune.optimizers import moment_bytes

if TYPE_CHECKING:
    from compressor.pipelines.run import Run

SAVED = 2  # checkpoints that lie on the disk while one takes the place of the other
MOMENTS = 8  # bytes a number, of AdamW while pruning heals


def needed(run: "Run") -> int:
    """Bytes that must be free; what an earlier attempt has left in the work folder is there already."""
    model = pruning.shell_after(run.source, run.recipe.prune) if run.prunes else estimate.shell(run.source)
    stored = load.folder_dtype(checkpoint.stored_dtype(run.source), run.config)
    targets, values, packed = run.stored(model, stored)
    weights, size = sum(math.prod(t.shape) for t in targets), checkpoint.model_bytes(run.source)
    folder = size
    if run.packs:
        parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()) + merge.added(model, run.recipe.quant.rotate)
        beside = size - sum(path.stat().st_size for path in checkpoint.weight_files(run.source))  # tokenizer, config
        folder = packed + (parameters - weights) * stored.itemsize + beside
    work = (_blocks(run.recipe, targets, packed) if run.packs else 0) + (_pruning(run, stored) if run.prunes else 0)
    if run.tunes:
        adapter = estimate.added(run.recipe.tune, targets)
        work += math.ceil(SAVED * (adapter.numbers or values) * (4 + moment_bytes(run.recipe.tune.optimizer)))
        folder += adapter.bytes or (0 if run.packs else 4 * values)
        if run.recipe.tune.distill:
            run.texts(load.load_tokenizer(run.source))  # counts the windows
    if end_to_end.wanted(run.recipe):
        work += math.ceil(SAVED * values * (4 + moment_bytes(run.recipe.tune.optimizer)))
    work += sum(teacher.held_bytes(options, run.config["vocab_size"], windows * run.seqlen) for _, options, windows in run.lessons())
    states, logits = walking(run, stored) if blockwise.wanted(run) else (0, 0)
    return max(0, work + logits + max(states, folder) - lying(run.work))


def packed(recipe: Recipe, model: nn.Module, stored: torch.dtype) -> tuple[list[compress.Target], int, int]:
    """(linears that will be packed, their values, the bytes that both take); of a choice the largest candidate, as far as the target allows it."""
    found = []
    for kind in ways(recipe.quant, recipe.choose).values() if recipe.choose.active else (recipe.quant,):
        targets = compress.plan(model, kind).packed()
        found.append((targets, sum(map(_values, targets)), estimate.stored_bits(recipe.with_(quant=kind), targets, stored) // 8))
    targets, values, size = max(found, key=lambda each: each[2])
    limits = [recipe.choose.target_size] if recipe.choose.target_size else []
    if recipe.choose.target_bits:
        limits.append(math.ceil(recipe.choose.target_bits * sum(math.prod(t.shape) for t in targets) / 8))
    return targets, values, min(size, *limits) if limits else size


def walking(run: "Run", stored: torch.dtype) -> tuple[int, int]:
    """(hidden states on the disk, logits of the dense model there) of a run of which one block at a time is in memory."""
    width = 4 if run.device.type == "cpu" else stored.itemsize
    tokenizer, most = load.load_tokenizer(run.source), run.recipe.eval.max_tokens or 1 << 62
    domain, outside = (min(most, evaluate.tokens_of(text, tokenizer, run.window)[0].numel()) for text in (run.domain.test, run.outside))
    calibration, waits = run.recipe.data.nsamples * run.seqlen if run.calibrates() else 0, 0
    if run.packs and trains(run.recipe.quant):
        waits = curvature.waiting_bytes(calibration, run.seqlen, run.config["hidden_size"], run.config["num_hidden_layers"], width)
        calibration *= 2  # those of the dense model, too
    longest = max(domain, outside, calibration, run.taught * run.seqlen)
    states, keeping = longest * run.config["hidden_size"] * width, run.recipe.data.activations
    if keeping in ("memory", "recompute") or (keeping == "auto" and states <= blocks.HELD):
        states = 0
    if keeping == "memory":
        waits = 0
    window = run.window * run.config["vocab_size"]
    count = min(max(1, divergence.COMPARED // run.window), max(1, divergence.SAMPLE_LOGITS // window), max(1, domain // run.window))
    return states + waits, count * window * width


def lying(work: Path) -> int:
    """Bytes of the files in a folder; nothing where there is none, or another run takes it away meanwhile."""
    total = 0
    with contextlib.suppress(OSError):
        for path in work.rglob("*"):
            total += path.lstat().st_size if not path.is_symlink() and path.is_file() else 0
    return total


def _blocks(recipe: Recipe, targets: list[compress.Target], size: int) -> int:
    """Of the files of packed blocks: codes fill whole tiles there, a zero takes a byte, and paths that start beside the weights lie with them."""
    for target in targets:
        n, k = target.shape
        down, across = layout.tiles(n, k)
        size += (down * layout.ROWS * across * layout.COLS - n * k) * target.quant.bits // 8
        size += 0 if target.quant.symmetric or PACKERS[target.quant.packer].table else _values(target)
    paths = [] if recipe.tune.start == "zero" else estimate.adapted(recipe.tune, targets)
    return size + 4 * recipe.tune.rank * sum(sum(target.shape) for target in paths)


def _pruning(run: "Run", stored: torch.dtype) -> int:
    """Of what pruning writes down: the weights of the blocks as it leaves them, or the checkpoints of the paths that heal."""
    layers = linear.linears(linear.find_blocks(estimate.shell(run.source))[1]).values()
    if run.recipe.prune.method == "obert" or run.sparse:
        return sum(m.in_features * m.out_features for m in layers) * (4 if run.device.type == "cpu" else stored.itemsize)
    return SAVED * (4 + MOMENTS) * run.recipe.prune.rank * sum(m.in_features + m.out_features for m in layers)


def _values(target: compress.Target) -> int:
    """Scales or table entries of a layer."""
    n, k = target.shape
    return n * -(-k // target.group) * (1 << target.quant.bits if PACKERS[target.quant.packer].table else 1)
