"""What several processes of one run do apart and what together: refusals, the journal that the first one keeps, and who packs which linear.

Every process loads the model and goes through the same stages. They share the work of calibration (windows), packing (the linears of a block that
read the same input, or all of them where no data is read), tuning (rows of a step) and perplexities (windows); small measurements (samples,
divergence) each makes for itself. The first process alone keeps the journal and writes folders. Nothing of it depends on how many processes there
are but the order of sums, so the number is in no key of the journal: a run may go on with another number of processes, or one.

Refused: pruning, encoders, choosing bits, and absorbing adapters, which would need exchanges of their own. Limits: linears that read the same input
are at most three in LLaMA, and blocks wait for each other, so that GPTQ's part of packing goes at most 1.4 times as fast (docs/scale.md).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from compressor import world
from compressor.errors import NumericError, RecipeError
from compressor.pipelines import journal
from compressor.pipelines.journal import Journal
from compressor.pipelines.packers import needs
from compressor.recipe import Recipe


def check_alone(recipe: Recipe, encoder: bool) -> None:
    """RecipeError for what one process does alone."""
    if world.size() == 1:
        return
    alone = {
        "an encoder": encoder, "pruning (--prune)": recipe.prune.method != "none", "choosing bits (--target-bits, …)": recipe.choose.active,
        "--adapter absorb": recipe.tune.adapter == "absorb",
    }  # fmt: skip
    if found := next((name for name, asked in alone.items() if asked), None):
        raise RecipeError(f"{found} works in one process: start it without torchrun, which is for packing and tuning causal language models")
    if needs(recipe.quant) and recipe.data.nsamples < world.size():
        raise RecipeError(f"{recipe.data.nsamples} calibration windows do not keep {world.size()} processes busy: raise --nsamples")


class Shared(Journal):
    """The journal of several processes: the first keeps it, and all get what it holds."""

    def get(self, stage: str, fingerprint: str) -> Any:
        found = world.share(super().get(stage, fingerprint) if world.lead() else None)
        self.resumed |= found is not None
        return found

    def put(self, stage: str, fingerprint: str, value: Any) -> None:
        if world.lead():
            super().put(stage, fingerprint, value)

    def subfolder(self, stage: str, fingerprint: str) -> Path:
        return Path(world.first(lambda: str(super(Shared, self).subfolder(stage, fingerprint))))


@contextmanager
def open_work(folder: Path) -> Iterator[Journal]:
    """The journal of a work folder, as journal.open_work; of several processes the first locks it."""
    if world.size() == 1:
        with journal.open_work(folder) as found:
            yield found
        return
    with ExitStack() as stack:
        world.first(lambda: stack.enter_context(journal.open_work(folder)) and None)
        yield Shared(folder)


def owners(costs: Mapping[str, int]) -> dict[str, int]:
    """Which process packs which of some linears, by what each costs: dearest first to whoever has least to do."""
    load, out = [0] * world.size(), {}
    for name, cost in sorted(costs.items(), key=lambda item: -item[1]):
        out[name] = load.index(min(load))
        load[out[name]] += cost
    return out


@contextmanager
def together() -> Iterator[None]:
    """A NumericError that one process raises in it is raised in all."""
    text = None
    try:
        yield
    except NumericError as error:
        if world.size() == 1:
            raise
        text = str(error)
    for each in world.gather(text):
        if each is not None:
            raise NumericError(each)
