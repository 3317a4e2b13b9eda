"""The stage that follows packing if it is asked for: the values of all packed linears learn together what the model predicted before.

Packing sees one linear at a time and block-wise training one block; what is left of their errors meets in the predictions. Here codes stay as they
are, and all scales, or all entries of tables, are trained by

    KL(before || packed), the mean over the tokens of the calibration windows        (tune/distill.py, share 1)

through the one training loop; the model before packing is the dense one, or what pruning made of it. EfficientQAT trains scales end to end as well
(Chen et al., 2024, arXiv 2407.11062, section 3.3), on text: that is tuning, and comes afterwards. No text is learned here.
Price: one forward pass of the calibration windows through the model before, `quant.end_to_end` times forward and backward through the packed one, in
one piece, and the memory that tuning its values takes. A step has BATCH windows, in micro-batches as small as those of tuning are; what else saves
memory there (gradient_checkpointing, offload) saves it here.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor import world
from compressor.errors import RecipeError
from compressor.pipelines import estimate, load, teacher
from compressor.pipelines.blockwise import stage as blockwise
from compressor.pipelines.job import digest
from compressor.pipelines.journal import Journal
from compressor.pipelines.packers import PACKERS
from compressor.pipelines.tuners import Tuning, optimizer, resolved
from compressor.recipe import Choose, Recipe, Tune
from compressor.tune.batches import Batches
from compressor.tune.distill import Distilled
from compressor.tune.loop import train

if TYPE_CHECKING:
    from compressor.pipelines.run import Run

STAGE = "end-to-end"
BATCH = 8  # windows a step
TOLD = "trained end to end"  # the note of this stage says that


def wanted(recipe: Recipe) -> bool:
    return recipe.quant.end_to_end > 0 and recipe.quant.packer in PACKERS


def check(recipe: Recipe) -> None:
    """RecipeError, before any work, for paths that start beside weights which go on to change, and for what the training cannot have."""
    if not wanted(recipe):
        return
    if recipe.tune.start != "zero":
        told = f"tune.start={recipe.tune.start} finds paths beside weights as they are packed, and end_to_end={recipe.quant.end_to_end}"
        raise RecipeError(f"{told} goes on to change these: give --end-to-end 0")
    if min(BATCH, recipe.data.nsamples) < world.size():
        raise RecipeError(f"end_to_end trains on {BATCH} windows a step, too few for {world.size()} processes: give --end-to-end 0, or start fewer")
    optimizer(options(recipe), load.pick_device(recipe.device))


def options(recipe: Recipe) -> Tune:
    """Of the training: scales or tables, at their tuner's own rate, taught by the dense model alone."""
    method = "table" if PACKERS[recipe.quant.packer].table else "peqa"
    part = math.gcd(BATCH, recipe.tune.batch)
    return resolved(
        Tune(
            method=method, epochs=float(recipe.quant.end_to_end), batch=part, accumulate=BATCH // part, eval_every=0, distill=1.0,
            gradient_checkpointing=recipe.tune.gradient_checkpointing, offload=recipe.tune.offload,
        )
    )  # fmt: skip


def lesson(run: "Run", loaded: load.Loaded, ids: Tensor | None, journal: Journal) -> Distilled | None:
    """Calibration windows int64 [count, seqlen] with what the model predicts on them before it is packed; None where nothing learns from that."""
    if ids is None or not wanted(run.recipe):
        return None
    top = options(run.recipe).distill_top
    key = digest(run.key_prune, run.calib.sha256, run.seqlen, run.recipe.data.nsamples, run.recipe.seed, top)
    found = teacher.ask(run, loaded, ids, top, journal.subfolder("lesson", key))
    return Distilled(ids, ids, found, share=1.0)


def learn(run: "Run", loaded: load.Loaded, objective: Distilled | None, key: str, journal: Journal) -> None:
    """The values of a model that was just packed, in place; key: of how it was packed."""
    if objective is None:
        return
    blockwise.settle(run, loaded)
    key = digest(key, run.recipe.quant.end_to_end)
    tune, seed = options(run.recipe), run.recipe.seed
    steps = Batches(objective, tune, seed).steps
    tuning = Tuning(loaded, tune, seed, steps)
    with run.training(STAGE, key, steps, journal) as (folder, on_step):
        log = train(loaded.model, tuning.parameters, objective, tune, seed, folder, key, None, on_step, None, tuning.optimizer)
    tuning.finish()
    journal.resumed |= log.resumed_from > 0
    losses, passes = [record["loss"] for record in log.curve], run.recipe.quant.end_to_end
    part = max(1, len(losses) // passes)
    means = [sum(each) / len(each) for each in (losses[:part], losses[-part:])] if losses else []
    told = f"{'tables' if tune.method == 'table' else 'scales'} of all linears {TOLD} after packing; errors of layers are those from before"
    told += f"; KL to the model before packing in the {passes} passes over the calibration windows: "
    told += " to ".join(f"{mean:.4f}" for mean in means[: min(2, passes)]) or "not measured"
    run.show.say(told)
    run.report.notes = [note for note in run.report.notes if TOLD not in note] + [told]  # of the last packing alone
    run.report.notes += [note for note in log.notes if note not in run.report.notes]


def lessons(recipe: Recipe) -> list[tuple[str, Tune, int]]:
    """(stage, options, windows): this stage, if there is one."""
    return [(STAGE, options(recipe), recipe.data.nsamples)] if wanted(recipe) else []


def counted(run: "Run", found: dict[str, Any], model: nn.Module, folder: torch.dtype, tokens: int) -> dict[str, Any]:
    """What a run costs, by stage as `estimate` has it, with what this stage takes beside predictions; tokens: of the calibration windows."""
    if not wanted(run.recipe):
        return found
    alone = run.recipe.with_(tune=options(run.recipe), choose=Choose(), save="folder")
    counts = estimate.Counts(tokens, tuning=tokens * alone.quant.end_to_end, step=alone.tune.batch * run.seqlen, evaluation=0)
    own = estimate.estimate(alone, model, folder, counts, run.source)
    found["peak_bytes"][STAGE], found["seconds"][STAGE] = own["peak_bytes"]["tune"], own["seconds"]["tune"]
    return found
