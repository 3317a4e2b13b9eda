"""What a run does otherwise where one block at a time is in memory: opens the model, and says what memory it will take."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.pipelines import checkpoint, compress, estimate, load
from compressor.pipelines.blockwise import opening, peaks
from compressor.pipelines.blockwise.blocks import Blocks

if TYPE_CHECKING:
    from compressor.pipelines.run import Run


def wanted(run: "Run") -> bool:
    """Whether this run goes block by block. RecipeError if that is asked for and cannot be."""
    if not run.packs:
        if run.recipe.memory == "blocks":
            raise RecipeError("memory=blocks is for packing a dense model, and this run packs none: leave --memory out")
        return False
    whole = estimate.whole_bytes(run.recipe, run.source, run.config, run.device, run.seqlen)
    return opening.wanted(run.recipe, run.config, whole, run.device)


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


def expected(run: "Run", model: nn.Module, calibration: Tensor | None) -> dict[str, int]:
    """Peak bytes by stage, of a model with or without weights."""
    stored, tests = checkpoint.stored_dtype(run.source), (run.domain.test, run.outside)
    lengths = [sum(len(document.text) for document in text.documents) for text in tests]
    tokens = peaks.Tokens.of(calibration, lengths, run.recipe.eval.max_tokens, run.window)
    return peaks.peaks(run.recipe, model, run.device, stored, load.folder_dtype(stored, run.config), tokens, run.base)


def announce(run: "Run", loaded: load.Loaded, calibration: Tensor | None) -> None:
    """Says, and reports, what is `expected`."""
    if Blocks.of(loaded.model) is None:
        return
    found = run.report.expected = expected(run, loaded.model, calibration)
    stage, most = max(found.items(), key=lambda item: item[1])
    where = ", host and GPU together" if run.device.type == "cuda" else ""
    run.show.say(f"peak memory will be about {most / 1e9:.1f} GB, in {stage}{where}")
