"""The stage that follows packing if it is asked for: the values of all packed linears learn together what the dense model predicts.

Packing sees one linear at a time and block-wise training one block; what is left of their errors meets in the predictions. Here codes stay as they
are, and all scales, or all entries of tables, are trained by

    KL(dense || packed), the mean over the tokens of the calibration windows        (tune/distill.py, share 1)

through the one training loop. EfficientQAT trains scales end to end as well (Chen et al., 2024, arXiv 2407.11062, section 3.3), on text: that is
tuning, and comes afterwards. No text is learned here beyond what calibration reads.
Price: one forward pass of the calibration windows through the dense model, `quant.end_to_end` times forward and backward through the packed one, in
one piece, and the memory that tuning its values takes. Batches, optimizer and what saves memory are those of tuning.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.pipelines import estimate, load, teacher
from compressor.pipelines.blockwise import stage as blockwise
from compressor.pipelines.job import digest
from compressor.pipelines.journal import Journal
from compressor.pipelines.packers import PACKERS
from compressor.pipelines.tuners import Tuning, resolved
from compressor.recipe import Choose, Recipe, Tune
from compressor.tune.batches import Batches
from compressor.tune.distill import Distilled
from compressor.tune.loop import train

if TYPE_CHECKING:
    from compressor.pipelines.run import Run

STAGE = "end-to-end"
SAME = ("batch", "accumulate", "gradient_checkpointing", "optimizer", "offload", "shard", "distill_top")  # keys of Tune that hold here as well


def wanted(recipe: Recipe) -> bool:
    return recipe.quant.end_to_end > 0 and recipe.quant.packer in PACKERS


def check(recipe: Recipe) -> None:
    """RecipeError for paths that start beside weights which go on to change."""
    if wanted(recipe) and recipe.tune.start != "zero":
        told = f"tune.start={recipe.tune.start} finds paths beside weights as they are packed, and end_to_end={recipe.quant.end_to_end}"
        raise RecipeError(f"{told} goes on to change these: leave --end-to-end out")


def options(recipe: Recipe) -> Tune:
    """Of the training: scales or tables, at their tuner's own rate, taught by the dense model alone."""
    method = "table" if PACKERS[recipe.quant.packer].table else "peqa"
    same = {key: getattr(recipe.tune, key) for key in SAME}
    return resolved(replace(Tune(method=method, epochs=float(recipe.quant.end_to_end), eval_every=0, distill=1.0), **same))


def key(recipe: Recipe) -> tuple[Any, ...]:
    """What the packed weights depend on beside the options of packing; part of a key, empty where nothing is trained so."""
    return tuple(getattr(recipe.tune, key) for key in ("batch", "accumulate", "optimizer", "distill_top")) if wanted(recipe) else ()


def lesson(run: "Run", loaded: load.Loaded, ids: Tensor | None, journal: Journal) -> Distilled | None:
    """Calibration windows int64 [count, seqlen] with what the model, which is still dense, predicts on them; None where nothing learns from that."""
    if ids is None or not wanted(run.recipe):
        return None
    top = run.recipe.tune.distill_top
    found = teacher.ask(run, loaded, ids, journal.subfolder("lesson", digest(run.key_dense, run.key_compress, top)))
    return Distilled(ids, ids, found, share=1.0)


def learn(run: "Run", loaded: load.Loaded, objective: Distilled | None, key: str, journal: Journal) -> None:
    """The values of a model that was just packed, in place; key: of how it was packed."""
    if objective is None:
        return
    blockwise.settle(run, loaded)
    tune, seed = options(run.recipe), run.recipe.seed
    steps = Batches(objective, tune, seed).steps
    tuning = Tuning(loaded, tune, seed, steps)
    with run.training(STAGE, key, steps, journal) as (folder, on_step):
        log = train(loaded.model, tuning.parameters, objective, tune, seed, folder, key, None, on_step, None, tuning.optimizer)
    tuning.finish()
    journal.resumed |= log.resumed_from > 0
    losses = [record["loss"] for record in log.curve]
    part = max(1, len(losses) // run.recipe.quant.end_to_end)
    if losses:
        first, last = (sum(each) / len(each) for each in (losses[:part], losses[-part:]))
        told = (
            f"{'tables' if tune.method == 'table' else 'scales'} of all linears trained end to end: KL to the dense model on the calibration windows"
        )
        told += f" {first:.4f} in the first pass, {last:.4f} in the last"
        run.show.say(told)
        run.report.notes += [told, *(note for note in log.notes if note not in run.report.notes)]


def lessons(recipe: Recipe) -> list[tuple[str, Tune, int]]:
    """(stage, options, windows): this stage, if there is one."""
    return [(STAGE, options(recipe), recipe.data.nsamples)] if wanted(recipe) else []


def counted(run: "Run", found: dict[str, Any], model: nn.Module, folder: Any, tokens: int) -> dict[str, Any]:
    """What a run costs, by stage as `estimate` has it, with what this stage takes beside predictions; tokens: of the calibration windows."""
    if not wanted(run.recipe):
        return found
    alone = run.recipe.with_(tune=options(run.recipe), choose=Choose(), save="folder")
    counts = estimate.Counts(calibration=0, tuning=tokens * alone.quant.end_to_end, step=alone.tune.batch * run.seqlen, evaluation=0)
    own = estimate.estimate(alone, model, folder, counts, run.source)
    found["peak_bytes"][STAGE], found["seconds"][STAGE] = own["peak_bytes"]["tune"], own["seconds"]["tune"]
    return found
