"""The main job for encoders: load, fine-tune, measure, prune, measure, pack, measure, tune, measure, write.

The dense model that was fine-tuned (or came with a head for the task) is the reference of all numbers and the teacher of everything after it.
Packed on top of pruned, and tuned with the same teacher, is the compound compression of oBERT's section 5. Work, resume and folder are as in run.py:
every stage has a key made of the model, the data and the recipe up to it; training goes on from its checkpoints.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import __version__
from compressor.errors import ModelError, RecipeError
from compressor.integrations import peft
from compressor.linear import block_weights, linears
from compressor.pipelines import (
    adapters,
    checkpoint,
    compress,
    encoder_data,
    encoder_eval,
    encoder_load,
    encoder_prune,
    encoder_tokens,
    estimate,
    load,
    write,
)
from compressor.pipelines.job import Job, default_output, digest, plain, source_name
from compressor.pipelines.journal import Journal, open_work
from compressor.pipelines.methods import check_methods, check_zeros_stay
from compressor.pipelines.output import check_output, check_room, contract
from compressor.pipelines.packers import PACKERS, needs
from compressor.pipelines.show import Show
from compressor.pipelines.tuners import Tuning, check_layers, resolved
from compressor.prune import slicing
from compressor.prune.masks import sparsity
from compressor.recipe import Eval, Recipe
from compressor.tune.batches import Batches
from compressor.tune.encoder import EncoderTask, Examples, Teacher
from compressor.tune.loop import train


class EncoderRun(Job):
    """One run on an encoder: what its stages share. Data flows through `go`, top to bottom."""

    encoder: encoder_load.Encoder
    train_rows: Examples
    test: encoder_tokens.Encoded
    teacher: Teacher | None = None

    def __init__(self, recipe: Recipe, output: Path, show: Show, command: str | None = None):
        check(recipe)
        recipe = recipe.with_(tune=resolved(recipe.tune))
        super().__init__(recipe, output, show, command)
        self.source = checkpoint.resolve(recipe.model)
        self.config = checkpoint.any_config(self.source)
        if self.config.get("quantization_config") or self.config.get(slicing.WIDTHS):
            raise ModelError(f"{self.source} is already compressed; `run` starts from a dense encoder")
        if recipe.tune.distill:
            raise RecipeError(f"tune.distill={recipe.tune.distill} is for causal language models; encoders learn from the dense one by prune.distill")
        if recipe.quant.rotate != "none":
            raise RecipeError(f"quant.rotate={recipe.quant.rotate} is for causal language models, and {recipe.model} is an encoder: leave it out")
        if recipe.quant.end_to_end:
            raise RecipeError(
                f"quant.end_to_end={recipe.quant.end_to_end} is for causal language models, and {recipe.model} is an encoder: leave it out"
            )
        compress.check_trains(recipe.quant, recipe.tune.start)
        self.task = encoder_data.load(recipe.data.data)
        self.length = encoder_load.max_length(self.config, self.task.kind, recipe.data.seqlen)
        fresh = encoder_load.task_of(self.config) is None
        self.finetunes = recipe.finetune.when == "always" or (recipe.finetune.when == "auto" and fresh)
        self.sparse = self.prunes and (recipe.prune.pattern or "unstructured") != "structured"
        if self.sparse and self.packs:
            compress.check_keep_zeros(recipe.quant)
            check_zeros_stay(recipe.tune.method)
        self.origin = checkpoint.digest(self.source)
        self._keys(self.origin[:16])

    def _keys(self, model: str) -> None:
        """One key a stage: the model, the examples, the recipe up to it, the kind of device and the version of this program."""
        recipe, base = self.recipe, (model, self.device.type, __version__)
        learnt, measured = (self.task.sha256("train"), self.length, recipe.seed), (self.task.sha256("test"), self.length)
        self.key_finetune = digest(base, learnt, asdict(recipe.finetune) if self.finetunes else None)
        self.key_prune = digest(self.key_finetune, recipe.digest("prune") if self.prunes else None)
        self.key_compress = digest(self.key_prune, recipe.digest("compress") if self.packs else None, *self.started())
        teacher = (recipe.prune.distill, recipe.prune.temperature)  # of the tuner too, where nothing is pruned
        self.key_tune = digest(self.key_compress, recipe.digest("tune"), teacher)
        self.key_measured = {
            name: digest(key, measured)
            for name, key in (("dense", self.key_finetune), ("pruned", self.key_prune), ("packed", self.key_compress), ("tuned", self.key_tune))
        }
        self.key = self.key_measured["tuned"]

    def go(self) -> dict[str, Any]:
        """Run all stages that the journal lacks; returns the contract document of the last stdout line."""
        with open_work(self.work) as journal, self.safe_report():
            self._load()
            if self.finetunes:
                self._finetune(journal)
            self._measure("dense", journal)
            if self.prunes or self.tunes:
                self.teacher = encoder_prune.teacher_of(self.encoder.model, self.recipe.prune)
            if self.prunes:
                self._prune(journal)
            if self.packs:
                self._compress(journal)
            if self.tunes:
                self._tune(journal)
            self.write_out(self.encoder.loaded, self.key, journal)
            root = self.publish(self.key, journal)
        return contract(self.report.to_dict(), self.output) | {"digest": root}

    def _load(self) -> None:
        with self.stage("load"):
            self.encoder = encoder_load.load_encoder(self.recipe.model, self.recipe.device, self.task, self.recipe.seed)
            loaded, model = self.encoder.loaded, self.encoder.model
            compress.check_finite(model)
            targets = compress.plan(model, self.recipe.quant).packed() if self.packs else []
            if self.tunes:
                check_layers(self.recipe.tune, {t.name: t.shape for t in targets}, needs(self.recipe.quant))
            if self.prunes:
                encoder_prune.check(model, self.recipe.prune)
            encode = encoder_tokens.encode
            train_rows = encode(self.task.train, loaded.tokenizer, self.encoder.classes, self.length)
            self.train_rows = train_rows.rows
            self.test = encode(self.task.test, loaded.tokenizer, self.encoder.classes, self.length)
        dtype = load.scale_dtype(self.recipe.quant.scale_dtype, loaded.dtype)
        self.report.model = {
            "name": source_name(self.recipe.model).rpartition("/")[2], "source": source_name(self.recipe.model),
            "architecture": loaded.config["architectures"][0], "parameters": sum(p.numel() for p in model.parameters()),
            "packed_parameters": sum(t.shape[0] * t.shape[1] for t in targets), "dense_bytes": write.tensor_bytes(loaded),
            "dense_dtype": plain(loaded.dtype), "folder_dtype": plain(loaded.dtype), "scale_dtype": plain(dtype),
        }  # fmt: skip
        self.report.protocol = {"task": {
            "kind": self.task.kind, "name": self.task.name, "data_sha256": self.task.sha256("test"), "split": self.task.rule,
            "examples": len(self.task.test), "trained_on": len(self.task.train), "longest": self.length, "cut": self.test.cut,
        }}  # fmt: skip
        self.report.notes += self.encoder.notes
        for note in self.encoder.notes + [t.note for t in targets if t.note]:
            self.show.say(note)

    def _finetune(self, journal: Journal) -> None:
        options, seed = self.recipe.finetune, self.recipe.seed
        total = Batches(EncoderTask(self.train_rows), encoder_prune.finetune_options(options), seed).steps
        with self.training("finetune", self.key_finetune, total, journal) as (folder, on_step):
            log = encoder_prune.finetune(self.encoder.model, self.train_rows, options, seed, folder, self.key_finetune, on_step)
        journal.resumed |= log.resumed_from > 0
        self.report.notes += [
            f"the dense model was fine-tuned on the task for {log.steps} steps of {options.batch} examples at {options.lr:g}",
            *log.notes,
        ]

    def _prune(self, journal: Journal) -> None:
        options, seed = self.recipe.prune, self.recipe.seed
        total = encoder_prune.steps_of(self.train_rows, options, seed)
        with self.training("prune", self.key_prune, total, journal) as (folder, on_step):
            facts, log = encoder_prune.prune(self.encoder.model, self.train_rows, self.teacher, options, seed, folder, self.key_prune, on_step)
        journal.resumed |= log.resumed_from > 0
        self.encoder.loaded.follow_config()
        self.report.pruning = facts | {"curve": log.curve, "notes": log.notes}
        if not self.packs:
            write.round_to_folder(self.encoder.loaded, set())
        self._measure("pruned", journal)
        if self.sparse:
            bits = write.bits_per_weight(write.block_weights(self.encoder.loaded), sparse=True)
            self.record("pruned", bits_per_weight=bits, sparsity=facts["ratio"])

    def _compress(self, journal: Journal) -> None:
        recipe = self.recipe
        ids = calibration(self.train_rows, recipe.data.nsamples, recipe.seed) if needs(recipe.quant) else None
        if ids is not None:
            self.report.notes.append(calibrated(self.train_rows, ids))
        self.pack(self.encoder.loaded, ids, self.key_compress, journal)
        self._measure("packed", journal)

    def _tune(self, journal: Journal) -> None:
        options, seed, objective = self.recipe.tune, self.recipe.seed, EncoderTask(self.train_rows, self.teacher)
        steps = Batches(objective, options, seed).steps
        tuning = Tuning(self.encoder.loaded, options, seed, steps, self.starts)
        with self.training("tune", self.key_tune, steps, journal) as (folder, on_step):
            log = train(
                self.encoder.model, tuning.parameters, objective, options, seed, folder, self.key_tune, None, on_step, tuning.pruner, tuning.optimizer
            )
        journal.resumed |= log.resumed_from > 0
        self.report.training = {
            "method": options.method, "lr": options.lr, "trainable": tuning.finish(), "windows": len(self.train_rows),
            "curve": log.curve, "notes": log.notes,
        }  # fmt: skip
        self._measure("tuned", journal)

    def _measure(self, name: str, journal: Journal) -> None:
        found = journal.get(name, self.key_measured[name])
        if found is None:
            with self.stage(f"evaluate {name}"), self.show.task(f"evaluate {name}", len(self.test.rows)) as advance:
                before = 0

                def report(done: int, _total: int) -> None:
                    nonlocal before
                    advance(done - before, "")
                    before = done

                found = encoder_eval.measure(self.encoder.model, self.test, self.task.test, self.encoder.names, report)
            journal.put(name, self.key_measured[name], found)
        sizes = {} if name != "dense" else {
            "bits_per_weight": float(torch.finfo(self.encoder.loaded.dtype).bits), "folder_bytes": self.report.model["dense_bytes"],
        }  # fmt: skip
        self.record(name, task=found, **sizes)


def check(recipe: Recipe) -> None:
    """RecipeError for methods that do not exist or do not fit together, and for texts that an encoder has no use for."""
    check_methods(recipe)
    if recipe.prune.method != "none":
        encoder_prune.resolved(recipe.prune, 12)
    if recipe.quant.packer in PACKERS and any(PACKERS[kind.packer].fisher for kind in recipe.quant.kinds()):
        raise RecipeError("squeezellm weighs by gradients of a causal model's loss, which an encoder has none of: use sketch or gptq")
    if recipe.choose.active:
        raise RecipeError("choosing bits by layer is for causal language models: leave the target out, or say it by hand with --layer")
    if recipe.eval.tasks:
        raise RecipeError("tasks of questions are for causal language models; an encoder is measured on its own: leave --tasks out")
    if recipe.tune.adapter == "absorb":
        raise RecipeError("absorbing is judged by perplexity, which an encoder has none of: leave --adapter absorb out")
    for key in ("outside", "calib"):
        if getattr(recipe.data, key) is not None:
            raise RecipeError(f"--{key} means nothing to an encoder, which is trained, calibrated and measured on --data: leave it out")
    told = {"window": recipe.eval.window is not None, "max-tokens": recipe.eval.max_tokens != Eval().max_tokens}
    for flag, given in (told | {"train-on-prompt": recipe.data.train_on_prompt}).items():
        if given:
            raise RecipeError(f"--{flag} means nothing to an encoder, which has no windows of text and no prompts: leave it out")


def calibration(rows: Examples, nsamples: int, seed: int) -> Tensor:
    """ids int64 [up to nsamples, t] of whole examples of one length, the one that most tokens have: no padding, which statistics must not see."""
    lengths = rows.lengths
    length = int((torch.bincount(lengths) * torch.arange(int(lengths.max()) + 1)).argmax())
    alike = (lengths == length).nonzero().flatten()
    chosen = alike[torch.randperm(len(alike), generator=torch.Generator().manual_seed(seed))[:nsamples]]
    return rows.padded(chosen.sort().values)[0]


def calibrated(rows: Examples, ids: Tensor) -> str:
    """What the packer saw, in words for the report."""
    typed = rows.types is not None and bool(rows.types.any())
    types = "; their token types were taken as 0, which the second texts of pairs are not" if typed else ""
    return f"calibrated on {len(ids)} examples of {ids.shape[1]} tokens each, {ids.numel()} tokens{types}"


def run(recipe: Recipe, output: Path | None = None, overwrite: bool = False, show: Show | None = None, command: str | None = None) -> dict[str, Any]:
    """The whole job on an encoder. An output folder that this very recipe has already written is returned as it is."""
    job = EncoderRun(recipe, output or default_output(recipe), show or Show(), command)
    done = job.done(job.key, overwrite)
    if done is not None:
        return done
    check_room(job.place, 8 * checkpoint.model_bytes(job.source) if job.finetunes or job.prunes else checkpoint.model_bytes(job.source))
    return job.go()


def dry_run(recipe: Recipe, output: Path | None, show: Show) -> dict[str, Any]:
    """Steps, what stays of the weights, and the time of the run from operations and one short speed measurement; writes nothing."""
    job = EncoderRun(recipe, output or default_output(recipe), show)
    check_output(job.place, overwrite=True)
    job._load()
    model, rows, seed = job.encoder.model, job.train_rows, recipe.seed
    weights = sum(w.numel() for w in block_weights(model).values())
    steps = {
        "finetune": Batches(EncoderTask(rows), encoder_prune.finetune_options(recipe.finetune), seed).steps if job.finetunes else 0,
        "prune": encoder_prune.steps_of(rows, recipe.prune, seed) if job.prunes else 0,
        "tune": Batches(EncoderTask(rows), recipe.tune, seed).steps if job.tunes else 0,
    }
    batch = {"finetune": recipe.finetune.batch, "prune": recipe.prune.batch, "tune": recipe.tune.batch * recipe.tune.accumulate}
    speed, tokens = estimate.matmul_speed(job.device) * estimate.EFFICIENCY, float(rows.lengths.double().mean())
    passes = {"finetune": 6, "prune": 8, "tune": 8}  # operations a weight and token; with a teacher two more
    seconds = {key: round(passes[key] * weights * steps[key] * batch[key] * tokens / speed, 1) for key in steps}
    if job.prunes and recipe.prune.method == "obert":
        prunes = len(encoder_prune.schedule(recipe.prune, steps["prune"])) * recipe.prune.recompute
        seconds["prune"] += round(6 * weights * prunes * recipe.prune.gradients * recipe.prune.gradient_batch * tokens / speed, 1)
    seconds["evaluate"] = round((1 + job.prunes + job.packs + job.tunes) * 2 * weights * float(job.test.rows.lengths.sum()) / speed, 1)
    left = weights - round(weights * recipe.prune.ratio) if job.prunes else weights
    show.say(f"{recipe.model}: {len(job.task.train)} examples to train on, {len(job.task.test)} to measure on; {left:,} of {weights:,} weights stay")
    show.say(f"about {sum(seconds.values()) / 60:.1f} minutes; nothing was written")
    facts = {
        "linears": len(linears(model)),
        "prunable": weights,
        "left": left,
        "steps": steps,
        "seconds": seconds,
        "task": job.report.protocol["task"],
    }
    return {"output": str(job.output), "dry_run": True} | facts


def evaluate_encoder(model: str, source: str, device: str, show: Show, seqlen: int | None = None) -> dict[str, Any]:
    """Accuracy (sequences, words) or exact match and F1 (questions) of an encoder with a head, dense or compressed, on labelled examples."""
    config = checkpoint.any_config(checkpoint.resolve(model))
    if not encoder_load.is_encoder(config):
        raise ModelError(f"{model} holds {encoder_load.architecture(config) or 'no named architecture'}, which is no encoder")
    if encoder_load.task_of(config) is None:
        raise ModelError(f"{model} has no head for a task: prune or fine-tune it first with `compressor run`")
    task = encoder_data.load_test(source)
    encoder = encoder_load.load_encoder(model, device, task, 0)
    rows = encoder_tokens.encode(task.test, encoder.loaded.tokenizer, encoder.classes, encoder_load.max_length(config, task.kind, seqlen))
    with show.task("evaluate", 1) as advance:
        found = encoder_eval.measure(encoder.model, rows, task.test, encoder.names)
        advance(1, "")
    with peft.set_aside(encoder.loaded):
        dense = {name: w != 0 for name, w in write.block_weights(encoder.loaded).items() if isinstance(w, Tensor)}
    document: dict[str, Any] = {"model": model, "data": source, "data_sha256": task.sha256("test"), "split": task.rule}
    document |= {"folder_bytes": checkpoint.model_bytes(encoder.loaded.folder) + adapters.stored_bytes(encoder.loaded.folder)}
    return document | found | ({"sparsity": sparsity(dense)} if dense else {})
