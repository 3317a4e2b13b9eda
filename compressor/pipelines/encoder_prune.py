"""Training the whole encoder: on its task while dense, and under a pruner with a dense teacher.

All parameters are trained by AdamW, embeddings, norms and head too; only weights of the linears of the blocks are pruned. Defaults are those of
oBERT's recipes (Kurtic et al., 2022, arXiv 2203.07259): prunes spread evenly from the tenth to nine tenths of the steps, their ratios on a cubic, the
learning rate falling linearly from each prune to the next, and the teacher's answers alone as loss. The first ratio is 0.7, or 0.3 for encoders of
at most 6 blocks, and never more than three quarters of the wanted one.

Magnitude is the same pruner without curvature: same steps, same schedule, same teacher.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.linear import block_weights, find_blocks
from compressor.pipelines.encoder_units import Units
from compressor.pipelines.methods import check_heeded
from compressor.prune import Pruner, obert
from compressor.prune.masks import parse_pattern
from compressor.prune.obert import SCORES, Obert, Settings
from compressor.prune.schedule import cubic, events, shares
from compressor.prune.widths import shape_notes
from compressor.recipe import Finetune, Prune, Tune
from compressor.tune.batches import Batches
from compressor.tune.encoder import EncoderTask, Examples, Teacher
from compressor.tune.gradients import Gradients
from compressor.tune.loop import OnStep, train
from compressor.tune.state import TrainLog

LR = 8e-5
BEGIN, END = 0.1, 0.9  # the ramp, as shares of the steps
FIRST, FIRST_SMALL, SMALL = 0.7, 0.3, 6  # the ratio of the first prune; of models of at most so many blocks


def everything(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, made trainable."""
    model.requires_grad_(True)
    return dict(model.named_parameters())


def finetune_options(options: Finetune) -> Tune:
    return Tune(
        method="dense", steps=options.steps, epochs=options.epochs, lr=options.lr, batch=options.batch, schedule="linear", warmup=0.06, eval_every=0,
        checkpoint_every=200,
    )  # fmt: skip


def finetune(
    model: nn.Module, rows: Examples, options: Finetune, seed: int, folder: Path | None = None, fingerprint: str = "", on_step: OnStep | None = None
) -> TrainLog:
    """Train all of the dense model on the task, in place."""
    log = train(model, everything(model), EncoderTask(rows), finetune_options(options), seed, folder, fingerprint, None, on_step)
    model.requires_grad_(False)
    return log


def teacher_of(model: nn.Module, options: Prune) -> Teacher | None:
    """A frozen copy of the model as it is now, or None if nobody would ask it."""
    if not options.distill:
        return None
    return Teacher(copy.deepcopy(model).eval().requires_grad_(False), options.distill, options.temperature)


def resolved(options: Prune, blocks: int) -> Prune:
    """The options with the method's own values where none were given; RecipeError for a method or pattern that encoders do not have."""
    if options.method not in SCORES:
        raise RecipeError(f"{options.method} does not prune encoders: use --prune {' or '.join(f'{name}:90%' for name in SCORES)}")
    check_heeded(options, heeded(options))
    shares(options, BEGIN, END)
    pattern = options.pattern or "unstructured"
    if pattern != "structured":
        parse_pattern(pattern)
    first = min(FIRST_SMALL if blocks <= SMALL else FIRST, 0.75 * options.ratio) if options.initial is None else options.initial
    return replace(options, pattern=pattern, initial=first, lr=options.lr or LR)


def heeded(options: Prune) -> set[str]:
    """The keys of Prune that say something to a method and pattern on encoders."""
    keys = {"steps", "epochs", "lr", "batch", "distill", "temperature", "one_shot", "initial", "prunes", "begin", "end"}
    curvature = {"gradients", "gradient_batch", "recompute", "damp", "block", "joint"} if options.method == "obert" else set()
    return keys | curvature | ({"multiple", "uniform"} if options.pattern == "structured" else set())


def check(model: nn.Module, options: Prune) -> None:
    """RecipeError or ModelError, with the reason, for a prune that this model cannot have; before any work."""
    options = resolved(options, len(find_blocks(model)[1]))
    if options.pattern == "structured":
        Units(model, options)
        return
    obert.check(block_weights(model), Settings.of(options), options.ratio)


def training(options: Prune) -> Tune:
    return Tune(
        method="prune", steps=options.steps or None, epochs=options.epochs, lr=options.lr, batch=options.batch, schedule="linear", warmup=0.0,
        eval_every=0, checkpoint_every=200,
    )  # fmt: skip


def schedule(options: Prune, steps: int) -> tuple[tuple[int, float], ...]:
    """(step, ratio) of each prune in `steps` steps; all at once before the first if one_shot, or without steps."""
    if options.one_shot or not steps:
        return ((0, options.ratio),)
    first = 0.0 if options.initial is None else options.initial
    begin, end = shares(options, BEGIN, END)
    at = events(round(begin * steps), min(round(end * steps), steps - 1), options.prunes)
    span = max(1, at[-1] - at[0])
    return tuple((step, options.ratio if step == at[-1] else cubic((step - at[0]) / span, first, options.ratio)) for step in at)


@dataclass
class Resumable:
    """A pruner whose state has the place in the stream of gradients beside the masks, so that an interrupted run takes the same gradients."""

    inner: Pruner
    gradients: Gradients

    @property
    def restarts(self) -> tuple[int, ...]:
        return self.inner.restarts

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.inner.tensors()) | {"position of the gradients": self.gradients.position}

    def prune(self, step: int) -> None:
        self.inner.prune(step)

    def observe(self, step: int) -> None:
        self.inner.observe(step)

    def hold(self) -> None:
        self.inner.hold()


def steps_of(rows: Examples, options: Prune, seed: int) -> int:
    return 0 if options.steps == 0 else Batches(EncoderTask(rows), training(options), seed).steps


def prune(
    model: nn.Module, rows: Examples, teacher: Teacher | None, options: Prune, seed: int, folder: Path | None = None, fingerprint: str = "",
    on_step: OnStep | None = None,
) -> tuple[dict[str, Any], TrainLog]:  # fmt: skip
    """Prune in place, training what is left; facts for the report, and the log of the training. Whole units are cut out at the end."""
    options = resolved(options, len(find_blocks(model)[1]))
    steps, parameters = steps_of(rows, options, seed), everything(model)
    plan, units = schedule(options, steps), Units(model, options) if options.pattern == "structured" else None
    weights = block_weights(model) if units is None else units.weights
    total, trained = sum(w.numel() for w in block_weights(model).values()), sum(p.numel() for p in parameters.values())
    gradients = Gradients(model, weights, EncoderTask(rows), options.gradient_batch, seed + 1)
    pruner = Obert(model, weights, gradients, plan, Settings.of(options)) if units is None else units.pruner(gradients, plan, Settings.of(options))
    log = TrainLog(0)
    try:
        if steps:
            tune = training(options)
            log = train(model, parameters, EncoderTask(rows, teacher), tune, seed, folder, fingerprint, None, on_step, Resumable(pruner, gradients))
        else:
            pruner.prune(0)
    finally:
        if units is not None:
            units.detach()
    left = {"ratio": pruner.sparsity} if isinstance(pruner, Obert) else {} if units is None else units.cut(total)
    model.requires_grad_(False)
    log.notes += pruner.notes + ([] if units is None else shape_notes(model, options.ratio, left["ratio"]))
    facts = {"method": options.method, "pattern": options.pattern, "asked": options.ratio} | left
    facts |= {"steps": log.steps, "lr": options.lr, "schedule": [list(row) for row in plan], "prunable": total, "trainable": trained}
    if options.method == "obert":
        facts |= {"gradients": options.gradients, "damp": options.damp, "recompute": options.recompute, "joint": options.joint}
    return facts, log
