"""What a run does otherwise where one block at a time is in memory: opens the model, and says what memory it will take."""

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.pipelines import checkpoint, compress, estimate, load, rotating
from compressor.pipelines.blockwise import opening, peaks
from compressor.pipelines.blockwise.blocks import Blocks
from compressor.pipelines.blockwise.source import Source
from compressor.stored import keep_stored

if TYPE_CHECKING:
    from compressor.pipelines.run import Run


def wanted(run: "Run") -> bool:
    """Whether this run goes block by block. RecipeError if that is asked for and cannot be."""
    if not run.packs:
        if run.recipe.memory == "blocks":
            raise RecipeError("memory=blocks is for packing a dense model, and this run packs none: leave --memory out")
        return False
    whole = estimate.whole_bytes(run.recipe, run.source, run.config, run.device, run.seqlen)
    return opening.wanted(run.recipe, run.config, run.source, whole, run.device)


def open_model(run: "Run") -> load.Loaded:
    """The dense model, its weights finite, in one piece or block by block."""
    if not wanted(run):
        loaded = load.load(run.recipe.model, run.recipe.device)
        compress.check_finite(loaded.model)
        return loaded
    loaded, blocks = opening.load_blocks(run.recipe.model, run.recipe.device)
    blocks.scratch, blocks.keeping = run.work / "activations", run.recipe.data.activations
    run.show.say("one block at a time is in memory")
    return loaded


def settle(run: "Run", loaded: load.Loaded) -> None:
    """The packed model in one piece, to be tuned; with the same head, to the last bit of a gradient, whether it was packed so or by blocks."""
    if blocks := Blocks.of(loaded.model):
        blocks.settle()
    elif run.packs and loaded.device.type == "cpu":
        source = Source(run.source, str(getattr(loaded.model, "base_model_prefix", "")))
        names = [name for name, _ in loaded.model.named_parameters()]
        found = {name: source.headers[key].dtype for name in names if (key := source.key(name)) is not None}
        keep_stored(loaded.model, rotating.stored(run.recipe.quant.rotate, loaded, found), values=True)


def expected(run: "Run", model: nn.Module, calibration: Tensor | None) -> dict[str, int]:
    """Peak bytes by stage, of a model with or without weights."""
    stored, tests = checkpoint.stored_dtype(run.source), (run.domain.test, run.outside)
    lengths = [sum(len(document.text) for document in text.documents) for text in tests]
    taught = max((windows for _, _, windows in run.lessons()), default=0)
    tokens = replace(peaks.Tokens.of(calibration, lengths, run.recipe.eval.max_tokens, run.window), taught=taught, length=run.seqlen)
    found = peaks.peaks(run.recipe, model, run.device, stored, load.folder_dtype(stored, run.config), tokens, run.base)
    counts = estimate.Counts(
        calibration=0 if calibration is None else calibration.numel(), tuning=0, step=run.recipe.tune.batch * run.seqlen, evaluation=0
    )
    whole = run.cost(model, counts, None)["peak_bytes"] if run.tunes or run.recipe.quant.end_to_end else {}
    found |= {stage: whole[stage] for stage in ("end-to-end", "tune") if stage in whole}  # in one piece, packed
    if "end-to-end" in found:  # and so it is measured
        found["evaluate packed"] = max(found["evaluate packed"], whole["end-to-end"])
    return found


def announce(run: "Run", loaded: load.Loaded, calibration: Tensor | None) -> None:
    """Says, and reports, what is `expected`."""
    if Blocks.of(loaded.model) is None:
        return
    found = run.report.expected = expected(run, loaded.model, calibration)
    stage, most = max(found.items(), key=lambda item: item[1])
    where = ", host and GPU together" if run.device.type == "cuda" else ""
    run.show.say(f"peak memory will be about {most / 1e9:.1f} GB, in {stage}{where}")
