"""The Python API: a loaded model, and the stages of a run as its methods, each of which changes it in place and returns at the end of it."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressor.errors import ModelError, RecipeError
from compressor.integrations import attach
from compressor.linear import packed_linears
from compressor.pipelines import bases, checkpoint, evaluate, export, methods, pruning, rotating, tasks, write
from compressor.pipelines import compress as blocks
from compressor.pipelines import data as texts
from compressor.pipelines import load as loading
from compressor.pipelines import run as job
from compressor.pipelines.job import source_name
from compressor.pipelines.packers import PACKERS
from compressor.pipelines.projection import Target
from compressor.pipelines.tuners import Tuning, resolved
from compressor.recipe import Recipe
from compressor.tune.batches import Batches, CausalLM
from compressor.tune.loop import train
from compressor.tune.state import TrainLog


class Model:
    """A dense or packed model. `.model` is the transformers model, `.tokenizer` its tokenizer, `.layers` one report row per packed layer."""

    def __init__(self, loaded: loading.Loaded):
        self._loaded = loaded
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self._sparse = write.is_sparse(loaded)  # whether single weights were pruned, which packers keep at zero and folders store as masks
        self._about = tasks.about(loaded.folder, loaded.name)  # what a task file says of the values, and which values they are
        self._values = bases.value_marks(loaded)
        self._base = {"model": self._about["model"]}  # what a task file says of the values that `unload_task` brings back

    def _check_own(self) -> None:
        """ModelError while an adapter is beside the model that was attached by peft itself: what follows would lose it, or take it for the base."""
        if self._loaded.adapter is None and attach.wrapped(self.model):
            raise ModelError(f"{self._loaded.name} has an adapter that peft attached: save it with save_pretrained, take it off with unload")

    @property
    def layers(self) -> list[dict[str, Any]]:
        return self._loaded.rows

    def prune(
        self, ratio: float, method: str = "loraprune", data: str | None = None, seqlen: int | None = None, seed: int = 42, **options: Any
    ) -> dict[str, Any]:
        """Prune a causal language model in place, healing it on the training part of `data`; returns what was done.

        Keys of `options` are those of recipe.Prune (pattern, steps, lr, unit, multiple, uniform, …). A packed model comes out dense: pack it anew.
        """
        self._check_own()
        recipe, loaded = _recipe("prune", options | {"ratio": ratio, "method": method}), self._loaded
        if loaded.adapter is not None:
            raise ModelError(f"{loaded.name} has an adapter, which pruning knows nothing of: export it with --to bf16, and prune that")
        corpus = texts.load("python" if data is None else data).train
        windows = texts.windows(corpus, self.tokenizer, loading.context(loaded.config, seqlen, "seqlen"))
        facts, log = pruning.prune(loaded, recipe.prune, CausalLM(windows.ids, windows.labels), seed)
        self._sparse = pruning.sparse(recipe.prune)
        return facts | {"notes": log.notes}

    def compress(self, calib: str | None = None, nsamples: int = 128, seqlen: int | None = None, seed: int = 42, **quant: Any) -> "Model":
        """Pack the decoder linears; keys of `quant` are those of recipe.Quant (bits, packer, group, symmetric, …).

        `calib` names the calibration text (see pipelines/data.py; None is the builtin one). Raises RecipeError and ModelError.
        """
        loaded, options = self._loaded, _recipe("quant", quant).quant
        if packed_linears(loaded.model):
            raise ModelError(f"{loaded.name} is packed already")
        rotating.check(loaded.model, options, loaded.name)
        blocks.check_finite(loaded.model)
        rotating.apply(loaded, options, seed)
        write.round_to_folder(loaded, {t.name for t in blocks.plan(loaded.model, options).packed()})
        ids = None
        if PACKERS[options.packer].needs:
            ids = texts.calibration(
                texts.load("python" if calib is None else calib).train,
                loaded.tokenizer,
                loading.context(loaded.config, seqlen, "seqlen"),
                nsamples,
                seed,
            )
        dtype = loading.scale_dtype(options.scale_dtype, loaded.dtype)
        loaded.rows, loaded.unpacked, _ = blocks.compress(loaded.model, options, dtype, ids, keep_zeros=self._sparse, seed=seed)
        return self

    def tune(self, data: str | None = None, method: str | None = None, seqlen: int | None = None, seed: int = 42, **options: Any) -> TrainLog:
        """Fine-tune the values on the training part of `data`; keys of `options` are those of recipe.Tune (lr, epochs, …).

        method: by default peqa for scales, table for tables.
        """
        self._check_own()
        layers = packed_linears(self.model)
        if not layers:
            raise ModelError(f"{self._loaded.name} is not packed; call compress first")
        method = method or ("table" if any(layer.table for layer in layers.values()) else "peqa")
        recipe = _recipe("tune", options | {"method": method})
        if self._sparse:
            methods.check_zeros_stay(method)
        windows = texts.windows(
            texts.load("python" if data is None else data).train, self.tokenizer, loading.context(self._loaded.config, seqlen, "seqlen")
        )
        if recipe.tune.distill:
            raise RecipeError("distill is of runs: the dense model, from which a packed one learns, is gone here; `compressor run --distill` has it")
        if recipe.tune.adapter != "keep":
            raise RecipeError("adapter=absorb is of runs: tune, save, and `compressor export --to compressed-tensors` absorbs the adapter")
        chosen, objective = resolved(recipe.tune), CausalLM(windows.ids, windows.labels)
        self._remember()
        tuning = Tuning(self._loaded, chosen, seed, Batches(objective, chosen, seed).steps)
        try:
            log = train(self.model, tuning.parameters, objective, chosen, seed, None, "", None, None, tuning.pruner, tuning.optimizer)
        except BaseException:
            tuning.give_up()
            raise
        tuning.finish()
        self._about, self._values = {"model": self._about["model"], "recipe": asdict(chosen)}, bases.value_marks(self._loaded)
        return log

    def evaluate(self, data: str | None = None, window: int | None = None, max_tokens: int = 65536) -> dict[str, Any]:
        """Perplexity of the held-out part of `data`, with its protocol."""
        corpora = {"text": texts.load("python" if data is None else data).test}
        return evaluate.measure(self.model, self.tokenizer, corpora, loading.context(self._loaded.config, window), max_tokens, None)["text"]

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Write the model as a folder of its format (docs/format.md), proven by reading it back; the folder must be new or empty."""
        self._check_own()
        path = export.new_place(Path(folder))
        if not packed_linears(self.model):
            write.round_to_folder(self._loaded, set())
        with export.published(path, 0, self._origin()) as place:
            beside = write.write_adapter(self._loaded, place, path.name)
            return write.write_folder(self._loaded, place, self._sparse) | ({"adapter_bytes": beside} if beside else {})

    def _origin(self) -> dict[str, str] | None:
        """Name and sha256 of the folder that it was loaded from; None if that is gone."""
        try:
            return {"name": source_name(self._loaded.name), "sha256": checkpoint.digest(self._loaded.folder)}
        except (ModelError, OSError):
            return None

    def export(self, folder: str | Path, to: str, **options: Any) -> dict[str, Any]:
        """Write the model in the format of a server (see `compressor export`), new or empty folder; returns what is lost by it, and the proof.

        Keys of `options` are those of pipelines.projection.Target (bits, group, symmetric, data, max_loss, …).
        """
        with tempfile.TemporaryDirectory() as work:
            self.save(Path(work) / "packed")
            return export.export(str(Path(work) / "packed"), Path(folder), Target(to, device=str(self._loaded.device), **options))[0]

    def save_task(self, path: str | Path) -> dict[str, Any]:
        """Write what a tuning moved alone, as one new safetensors file bound to the rest of the model (docs/format.md); returns its header.

        That is the adapter if one is attached, else zeros if they are floats, else scales or tables.
        """
        self._check_own()
        return tasks.save(self._loaded, Path(path), self._told())

    def load_task(self, path: str | Path) -> "Model":
        """Swap in the scales, tables or zeros of a task file, or attach its adapter, in place of any other task; codes stay.

        path: also the folder of a run with `--save task`. ModelError, with nothing changed, for a damaged file or another base's. The first call
        reads the whole base for its digest, the others take milliseconds.
        """
        self._check_own()
        self._remember()
        found = tasks.swap(self._loaded, Path(path))
        self._about = {"model": found.model, "recipe": found.recipe, "metrics": found.metrics}
        self._values = bases.value_marks(self._loaded)
        return self

    def unload_task(self) -> "Model":
        """Put back, bit for bit, the values that the model had before its first task was loaded, and take its adapter off, if it has one."""
        self._check_own()
        if self._loaded.adapter is not None or tasks.swapped(self._loaded):
            tasks.unload(self._loaded)
            self._about, self._values = self._base, bases.value_marks(self._loaded)
        return self

    def _remember(self) -> None:
        """What is known of the values that `unload_task` will bring back, before a task or an adapter is there."""
        if self._loaded.adapter is None and not tasks.swapped(self._loaded):
            self._base = self._told()

    def _told(self) -> dict[str, Any]:
        """What is known of the values, as long as nobody moved them."""
        untouched = bases.same(self._values, bases.value_marks(self._loaded))
        return self._about if untouched else {"model": self._about["model"]}


def load(name: str, device: str = "auto") -> Model:
    """A dense or packed model by folder, hub id, short name (llama-7b), or `tiny`, the embedded one."""
    return Model(loading.load(name, device))


def run(recipe: Recipe | dict[str, Any], output: str | Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """The whole job of `compressor run`; returns the same document that the command prints as its last line."""
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_dict(recipe)
    return job.run(recipe, None if output is None else Path(output), overwrite)


def _recipe(section: str, values: dict[str, Any]) -> Recipe:
    recipe = Recipe.from_dict({section: values})
    methods.check_names(recipe)
    if section == "tune" and recipe.tune.method == "none":
        raise RecipeError("method 'none' tunes nothing")
    return recipe
