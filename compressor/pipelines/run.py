"""The main job: load, measure, prune, measure, pack, measure, tune, measure, write. Every finished stage is in the journal; nothing is done twice.

The work happens in `OUT.partial`; the finished folder is renamed to OUT at the very end, so that OUT either does not exist or is whole.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compressor import __version__, world
from compressor.errors import ModelError, RecipeError
from compressor.integrations.peft import FOLDER as ADAPTER
from compressor.pipelines import (
    adapters,
    checkpoint,
    compress,
    data,
    encoder_load,
    encoder_run,
    end_to_end,
    estimate,
    evaluate,
    load,
    pruning,
    room,
    rotating,
    stages,
    tasks,
    teacher,
    write,
)
from compressor.pipelines.blockwise import stage as blockwise
from compressor.pipelines.blockwise.blocks import Blocks
from compressor.pipelines.blockwise.hidden import Spool
from compressor.pipelines.choose import sensitivity
from compressor.pipelines.choose import stage as choosing
from compressor.pipelines.choose.equal import settled
from compressor.pipelines.job import Job, default_output, digest, plain, source_name
from compressor.pipelines.journal import Journal
from compressor.pipelines.measure import divergence
from compressor.pipelines.measure import tasks as questions
from compressor.pipelines.methods import check_methods, check_zeros_stay
from compressor.pipelines.output import check_output, check_room, contract
from compressor.pipelines.packers import PACKERS, needs
from compressor.pipelines.parallel import check_alone, open_work
from compressor.pipelines.show import Show
from compressor.pipelines.tuners import Tuning, check_layers, resolved
from compressor.recipe import AFTER, KEPT, Finetune, Quant, Recipe, Tune
from compressor.tune.batches import Batches, CausalLM
from compressor.tune.distill import Distilled
from compressor.tune.loop import train


class Run(Job):
    """One run on a causal language model: what its stages share. Data flows through `go`, top to bottom."""

    def __init__(self, recipe: Recipe, output: Path, show: Show, command: str | None = None):
        check_methods(recipe)
        tasks.check(recipe)
        choosing.check(recipe)
        end_to_end.check(recipe)
        if recipe.eval.tasks:
            questions.check(recipe.eval.tasks)
        if recipe.finetune != Finetune():
            raise RecipeError(f"fine-tuning on a task first is for encoders, and {recipe.model} is none: leave --finetune out")
        recipe = recipe.with_(tune=resolved(recipe.tune))
        super().__init__(recipe, output, show, command)
        self.sparse = self.prunes and pruning.sparse(recipe.prune)
        if self.sparse and self.packs:
            compress.check_keep_zeros(recipe.quant)
            check_zeros_stay(recipe.tune.method)
        self.source = checkpoint.resolve(recipe.model)
        self.config = checkpoint.read_config(self.source)
        self.check_source()
        self.seqlen = load.context(self.config, recipe.data.seqlen, "seqlen")
        self.window = load.context(self.config, recipe.eval.window or self.seqlen)
        self.domain = data.load("python" if recipe.data.data is None else recipe.data.data)
        self.outside = data.load_text("python-source" if recipe.data.outside is None else recipe.data.outside)
        self.calib = self.domain.train if recipe.data.calib is None else data.load(recipe.data.calib).train
        self.base = stages.resident_bytes()  # before any model
        self.near: divergence.Sample | None = None  # logits of the dense model, once it is measured
        self.lesson: Distilled | None = None  # what packed values learn, once the model before packing was asked
        self.taught = 0  # windows whose predictions are kept, once the texts are read
        self.origin = checkpoint.digest(self.source)
        self._fingerprints(self.origin[:16])

    def check_source(self) -> None:
        """ModelError for a model that this run cannot start from."""
        quantised = self.config.get("quantization_config")
        if quantised and not self.prunes:
            told = "`compressor tune` tunes it as it is; `run` starts from a dense model, or prunes a packed one with --prune"
            raise ModelError(f"{self.source} is already quantised: {told}")
        if (self.source / ADAPTER).is_dir() and quantised:
            raise ModelError(f"{self.source} has an adapter beside its packed weights: export it with --to bf16, and run on that")

    def _fingerprints(self, model: str) -> None:
        """One key a stage: the model, the texts it reads, the recipe up to it, the kind of device and the version of this program."""
        recipe, base = self.recipe, (model, self.device.type, __version__)
        asked = asdict(recipe.eval) | ({"tasks": questions.digest(recipe.eval.tasks)} if recipe.eval.tasks else {})
        measured = (asked, self.window, self.domain.test.sha256, self.outside.sha256)
        calibration = (self.calib.sha256, self.seqlen) if self.calibrates() else ()
        pruning = (recipe.digest("prune"), self.domain.train.sha256, self.seqlen) if self.prunes else ()
        self.key_dense = digest(base, measured)
        choose, quant = recipe.choose, asdict(recipe.quant) | {"end_to_end": 0}
        candidates = (quant, choose.measure, choose.windows, recipe.data.nsamples, recipe.seed, self.calib.sha256)
        self.key_prune = digest(base, pruning)
        self.key_pruned = digest(self.key_prune, measured)
        loss = () if recipe.choose.max_loss is None else (self.key_dense,)  # what is packed depends on what was measured
        self.key_compress = digest(self.key_prune, recipe.digest("compress"), calibration, *self.started(), *loss)
        self.key_damage = digest(self.key_prune, candidates, calibration)
        self.key_packed = digest(self.key_compress, recipe.quant.end_to_end, measured)
        self.key_tune = digest(self.key_compress, recipe.digest("tune"), self.domain.train.sha256, self.seqlen)
        self.key_tuned = digest(self.key_tune, measured, [getattr(recipe.tune, key) for key in AFTER])
        self.key_written = self.key_tuned if recipe.save == "folder" else digest(self.key_tuned, recipe.save)

    def go(self) -> dict[str, Any]:
        """Run all stages that the journal lacks; returns the contract document of the last stdout line."""
        with open_work(self.work) as journal, self.safe_report():
            loaded = self.read()
            calibration, windows = self.texts(loaded.tokenizer)
            blockwise.announce(self, loaded, calibration)
            self.dense(loaded, journal)
            objective = None if windows is None else teacher.objective(self, loaded, windows, journal)
            if self.prunes and windows is not None:
                self._prune(loaded, windows, journal)
            self.lesson = end_to_end.lesson(self, loaded, calibration, journal)
            rotating.rotate(self, loaded, journal)
            if self.packs and self.recipe.choose.active and calibration is not None:
                loaded = choosing.pack(self, loaded, calibration, journal)
            elif self.packs:
                self.pack(loaded, calibration, self.key_compress, journal)
                self.measured("packed", self.key_packed, loaded, journal)
            if self.tunes and windows is not None and objective is not None:
                blockwise.settle(self, loaded)
                self._tune(loaded, calibration, windows, objective, journal)
            if self.recipe.save == "task":
                self.report.notes.append("only the task file was kept; the sizes are those of the folder that it makes with its base")
            root = self._finish(loaded, journal) if world.lead() else ""
        return contract(self.report.to_dict(), self.output) | {"digest": root}

    def _finish(self, loaded: load.Loaded, journal: Journal) -> str:
        """The finished folder under its name; its digest."""
        self.write_out(loaded, self.key_written, journal)
        if self.recipe.save == "task":
            tasks.leave_only(loaded, self.work / "folder", __version__)
        return self.publish(self.key_written, journal)

    def read(self) -> load.Loaded:
        after = pruning.shell_after(self.source, self.recipe.prune) if self.prunes else None  # whatever cannot be is said before any work
        with self.stage("load"):
            loaded = blockwise.open_model(self)
        found = self.targets(loaded.model if after is None else after)
        if self.recipe.choose.active and after is None:
            choosing.check_size(self.recipe, loaded.model, choosing.fixed_bytes(self.recipe, loaded, 1), loaded.dtype)
        parameters = {id(p): p for p in loaded.model.parameters()}
        self.report.model = {
            "name": source_name(self.recipe.model).rpartition("/")[2], "source": source_name(self.recipe.model),
            "architecture": self.config["architectures"][0], "parameters": sum(p.numel() for p in parameters.values()),
            "packed_parameters": sum(t.shape[0] * t.shape[1] for t in found), "dense_bytes": checkpoint.model_bytes(self.source),
            "dense_dtype": plain(checkpoint.stored_dtype(self.source)), "folder_dtype": plain(loaded.dtype),
            "scale_dtype": plain(load.scale_dtype(self.recipe.quant.scale_dtype, loaded.dtype)),
        }  # fmt: skip
        for note in dict.fromkeys(target.note for target in found if target.note):
            self.show.say(note)
        return loaded

    def targets(self, model: torch.nn.Module) -> list[compress.Target]:
        """The linears that will be packed, found before any work, with all that cannot be; those of the model as it will be by then."""
        prune, quant = self.recipe.prune, self.recipe.quant
        kinds = choosing.kinds(self.recipe)
        if self.packs and self.prunes and not prune.uniform:  # any multiple may come out
            for kind in kinds:
                PACKERS[kind.packer].resolve(pruning.multiple(model, prune), kind, "an FFN of uneven width")
        for kind in kinds if self.recipe.choose.active else ():
            compress.plan(model, kind)
        found = compress.plan(model, quant).packed() if self.packs else []
        rotating.check(model, quant, self.recipe.model)
        for kind in kinds if self.packs else ():
            compress.check_trains(kind, self.recipe.tune.start)
        if self.tunes:
            check_layers(self.recipe.tune, {t.name: t.shape for t in found}, needs(quant) if self.packs else ())
        return found

    def pack(self, loaded: load.Loaded, ids: torch.Tensor | None, key: str, journal: Journal, chosen: Quant | None = None) -> None:
        super().pack(loaded, ids, key, journal, chosen)
        end_to_end.learn(self, loaded, self.lesson, key, journal)

    def stored(self, model: torch.nn.Module, folder: torch.dtype) -> tuple[list[compress.Target], int, int]:
        """(packed linears, their values, the bytes that these take at most); model: a shell of what is packed, folder: the dtype of its folder."""
        return room.packed(self.recipe, model, folder) if self.packs else ([], 0, 0)

    def calibrates(self) -> bool:
        """Whether packing, or choosing how, looks at calibration windows."""
        return self.packs and (self.recipe.choose.active or bool(needs(self.recipe.quant)) or end_to_end.wanted(self.recipe))

    def cost(self, model: torch.nn.Module, counts: estimate.Counts, before: torch.nn.Module | None) -> dict[str, Any]:
        """Sizes, memory and time; model: a shell of what is packed and tuned; before: of what is pruned to that."""
        self.targets(model)
        folder = load.folder_dtype(checkpoint.stored_dtype(self.source), self.config)
        if self.recipe.choose.active:
            windows = sensitivity.windows(self.recipe.choose, self.seqlen, self.config.get("vocab_size", 1))
            forward = estimate.forward_seconds(model, self.device, windows * self.seqlen)
            found = choosing.cost(self.recipe, lambda recipe: estimate.estimate(recipe, model, folder, counts, self.source, before), forward)
        else:
            found = estimate.estimate(self.recipe, model, folder, counts, self.source, before)
        found = end_to_end.counted(self, found, model, folder, counts.calibration)
        return teacher.counted(self, found, model if before is None else before, self.lessons())

    def lessons(self) -> list[tuple[str, Tune, int]]:
        """(stage, options, windows) of every stage that learns from the dense model; those of tuning are known once the texts are read."""
        return end_to_end.lessons(self.recipe) + ([("tune", self.recipe.tune, self.taught)] if self.taught else [])

    def texts(self, tokenizer: Any) -> tuple[torch.Tensor | None, data.Windows | None]:
        """Calibration windows and tuning windows, before anything expensive, so that a text that is too short is known at once."""
        recipe, ids, windows = self.recipe, None, None
        if self.calibrates():
            ids = data.calibration(self.calib, tokenizer, self.seqlen, recipe.data.nsamples, recipe.seed)
        if self.tunes or self.prunes:
            windows = data.windows(self.domain.train, tokenizer, self.seqlen, recipe.data.train_on_prompt)
            if self.tunes:
                batches = Batches(CausalLM(windows.ids, windows.labels), recipe.tune, recipe.seed)  # says what steps cannot be
                self.taught = len(batches.used()) if recipe.tune.distill else 0
        for each in ([] if ids is None else [ids]) + ([] if windows is None else [windows.ids]):
            evaluate.check_ids(each, self.config.get("vocab_size", 1 << 31))
        return ids, windows

    def dense(self, loaded: load.Loaded, journal: Journal) -> None:
        found = journal.get("dense", self.key_dense)
        if found is None:
            found = self.measure(loaded, "dense")
            journal.put("dense", self.key_dense, found)
        bits = torch.finfo(getattr(torch, self.report.model["dense_dtype"])).bits
        packed = load.packed_weights(loaded.model)  # a base that is packed, to be pruned
        self.measured_as("dense", found)
        self.record("dense", bits_per_weight=write.bits_per_weight(packed) if packed else float(bits), folder_bytes=self.report.model["dense_bytes"])
        self.report.protocol = found["protocol"]
        self.report.protocol["domain"]["split"] = self.domain.rule
        ids, labels = evaluate.cut(*self._domain_text(loaded), self.window, self.recipe.eval.max_tokens)
        few = slice(max(1, divergence.COMPARED // self.window))
        store = None if Blocks.of(loaded.model) is None else Spool(self.work / "activations" / "logits")
        with self.stage("evaluate dense"):
            self.near = divergence.Sample(loaded.model, ids[few], labels[few], store)

    def _prune(self, loaded: load.Loaded, windows: data.Windows, journal: Journal) -> None:
        options, seed, objective = self.recipe.prune, self.recipe.seed, CausalLM(windows.ids, windows.labels)
        with self.training("prune", self.key_prune, pruning.steps(options, objective, seed), journal) as (folder, on_step):
            facts, log = pruning.prune(loaded, options, objective, seed, folder, self.key_prune, on_step)
        journal.resumed |= log.resumed_from > 0
        self.report.pruning = facts | {"curve": log.curve, "notes": log.notes}
        if not self.packs:
            write.round_to_folder(loaded, set())
        weights = write.block_weights(loaded)
        bits, full = write.bits_per_weight(weights, self.sparse), float(torch.finfo(loaded.dtype).bits)
        saved = (full - bits) * sum(w.shape[0] * w.shape[1] for w in weights.values()) / 8
        self.measured("pruned", self.key_pruned, loaded, journal)
        self.record("pruned", bits_per_weight=bits, folder_bytes=round(write.tensor_bytes(loaded) - saved))

    def _tune(self, loaded: load.Loaded, ids: torch.Tensor | None, windows: data.Windows, objective: CausalLM, journal: Journal) -> None:
        options, seed = self.recipe.tune, self.recipe.seed
        steps, evaluate = Batches(objective, options, seed).steps, self._domain_perplexity(loaded)
        tuning = Tuning(loaded, options, seed, steps, self.starts)
        with self.training("tune", self.key_tune, steps, journal) as (folder, on_step):
            log = train(
                loaded.model, tuning.parameters, objective, options, seed, folder, self.key_tune, evaluate, on_step, tuning.pruner, tuning.optimizer
            )
        journal.resumed |= log.resumed_from > 0
        self.report.training = {
            "method": options.method, "lr": options.lr, "trainable": tuning.finish(), "windows": len(windows.ids),
            "curve": log.curve, "evals": [{"step": e["step"], "perplexity": e["value"]} for e in log.evals], "notes": log.notes,
            "processes": world.size(),
        }  # fmt: skip
        if options.adapter == "absorb":
            adapters.absorbed(self, loaded, ids, windows.ids, evaluate)
        self.measured("tuned", self.key_tuned, loaded, journal)

    def absorber(self) -> Quant:
        """How linears that take up an adapter are packed anew."""
        return self.recipe.quant

    def measured(self, name: str, key: str, loaded: load.Loaded, journal: Journal) -> dict[str, Any]:
        """What the journal knows of a model, or a measurement of it now; in the report, and returned."""
        found = journal.get(name, key)
        if found is None:
            found = self.measure(loaded, name)
            journal.put(name, key, found)
        self.measured_as(name, found)
        return found

    def measure(self, loaded: load.Loaded, name: str) -> dict[str, Any]:
        corpora = {"domain": self.domain.test, "outside": self.outside}
        with self.stage(f"evaluate {name}"), self.show.task(f"evaluate {name}", 2) as advance:

            def report(key: str, done: int, total: int) -> None:
                advance(int(done == total), f"{key} text, {done} of {total} windows")

            with Blocks.telling(loaded.model, advance):
                found: dict[str, Any] = evaluate.measure(loaded.model, loaded.tokenizer, corpora, self.window, self.recipe.eval.max_tokens, report)
            if self.recipe.eval.tasks:
                found["tasks"] = questions.measure(loaded, self.recipe.eval.tasks, self.recipe.eval.task_limit, seed=self.recipe.seed)
            if self.near is not None:
                found["divergence"] = self.near.compare(loaded.model)
            prompts = evaluate.prompts(self.domain.test, loaded.tokenizer) if self._samples() else []
            return found | {"samples": evaluate.generate_samples(loaded.model, loaded.tokenizer, prompts, evaluate.SAMPLE_TOKENS), "prompts": prompts}

    def _samples(self) -> bool:
        why = ""
        if self.report.expected:  # of one state alone they would compare with nothing
            why = "one block at a time was in memory, and each token needs all of them"
        elif not evaluate.samples_pay(self.device, self.report.model["packed_parameters"]):
            why = "without numba, decoding token by token on a CPU takes too long for a model of this size; pip install numba"
        if why:
            self.report.notes = sorted({*self.report.notes, f"no samples: {why}"})
        return not why

    def _domain_perplexity(self, loaded: load.Loaded) -> Callable[[], float]:
        """What the training loop calls now and then; the text is tokenised once."""
        ids, labels = self._domain_text(loaded)
        return lambda: evaluate.perplexity(loaded.model, ids, self.window, self.recipe.eval.max_tokens, labels=labels)["perplexity"]

    def _domain_text(self, loaded: load.Loaded) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ids and labels as `evaluate.perplexity` takes them."""
        if not self.domain.test.pairs:
            return evaluate.stream(self.domain.test, loaded.tokenizer), None
        cut = data.windows(self.domain.test, loaded.tokenizer, self.window)
        return cut.ids, cut.labels

    def measured_as(self, name: str, found: dict[str, Any]) -> None:
        self.record(name, **{k: found[k] for k in ("domain", "outside", "tasks", "divergence") if k in found})
        for i, prompt in enumerate(found.get("prompts", [])):
            if len(self.report.samples) <= i:
                self.report.samples.append({"prompt": prompt})
            self.report.samples[i][name] = found["samples"][i]


def _kind(recipe: Recipe) -> type[Run]:
    """The class of the run that a recipe asks for."""
    if recipe.quant.packer != KEPT:
        return Run
    from compressor.pipelines.retune import Retune  # which is a Run

    return Retune


def run(recipe: Recipe, output: Path | None = None, overwrite: bool = False, show: Show | None = None, command: str | None = None) -> dict[str, Any]:
    """The whole job. An output folder that this very recipe has already written is returned as it is."""
    show = show or Show()
    encoder = encoder_load.is_encoder(checkpoint.any_config(checkpoint.resolve(recipe.model)))
    check_alone(recipe, encoder)
    if encoder:
        if strange := next(
            (f"{key}={getattr(recipe, key)}" for key, usual in (("save", "folder"), ("memory", "auto")) if getattr(recipe, key) != usual), None
        ):
            raise RecipeError(f"{strange} is for causal language models, and {recipe.model} is an encoder: leave it out")
        return encoder_run.run(recipe, output, overwrite, show, command)
    recipe = settled(recipe, show.say)
    job = _kind(recipe)(recipe, output or default_output(recipe), show, command)
    done = world.first(lambda: job.done(job.key_written, overwrite))
    if done is not None:
        return done
    world.first(lambda: check_room(job.place, room.needed(job)))
    return job.go()


def dry_run(recipe: Recipe, output: Path | None, show: Show) -> dict[str, Any]:
    """Sizes, memory and time of the run, from shapes and one short speed measurement; loads no weights and writes nothing."""
    if encoder_load.is_encoder(checkpoint.any_config(checkpoint.resolve(recipe.model))):
        return encoder_run.dry_run(recipe, output, show)
    recipe = settled(recipe, show.say)
    job = _kind(recipe)(recipe, output or default_output(recipe), show)
    check_output(job.place, overwrite=True)
    tokenizer = load.load_tokenizer(job.source)
    cap = recipe.eval.max_tokens or 1 << 62
    read = [evaluate.stream(corpus, tokenizer).numel() for corpus in (job.domain.test, job.outside)]
    ids, windows = job.texts(tokenizer)
    before = estimate.shell(job.source)
    model = pruning.shell_after(job.source, recipe.prune) if job.prunes else before
    steps = heals = tokens = 0
    if windows is not None:
        objective = CausalLM(windows.ids, windows.labels)
        steps = Batches(objective, recipe.tune, recipe.seed).steps if recipe.tune.method != "none" else 0
        heals = pruning.steps(recipe.prune, objective, recipe.seed) if job.prunes else 0
        tokens = pruning.tokens(recipe.prune, objective, recipe.seed, before) if job.prunes else 0
    counts = estimate.Counts(
        calibration=0 if ids is None else ids.numel(), tuning=steps * recipe.tune.batch * recipe.tune.accumulate * job.seqlen,
        step=recipe.tune.batch * job.seqlen, evaluation=sum(min(cap, count) for count in read), pruning=tokens, prune_steps=heals,
    )  # fmt: skip
    found = job.cost(model, counts, before if job.prunes else None)
    if blockwise.wanted(job):
        found |= {"peak_bytes": blockwise.expected(job, before, ids), "memory": "blocks"}
    if job.prunes:
        found |= {"pruning": pruning.plan(before, recipe.prune).facts()}
        show.say(f"{found['pruning']['ratio']:.1%} of the {found['pruning']['prunable']:,} prunable weights go")
    size = f"{found['folder_bytes'] / 1e6:,.1f} MB, {found['ratio']:.2f} times smaller"
    show.say(f"{recipe.model}: {found['packed_layers']} linears at {found['bits_per_weight']:.3f} bits per weight, {size}")
    minutes = sum(found["seconds"].values()) / 60
    show.say(f"peak memory {max(found['peak_bytes'].values()) / 1e9:.1f} GB, about {minutes:.1f} minutes; nothing was written")
    return {"output": str(job.output), "dry_run": True} | found
