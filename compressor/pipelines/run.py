"""The main job: load, measure, pack, measure, tune, measure, write. Every finished stage is in the journal; nothing is done twice.

The work happens in `OUT.partial`; the finished folder is renamed to OUT at the very end, so that OUT either does not exist or is whole.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from compressor.errors import ModelError, OutputError
from compressor.pipelines import compress, data, estimate, evaluate, load, render, write
from compressor.pipelines.journal import Journal, open_work
from compressor.pipelines.report import Report, environment
from compressor.pipelines.show import Show
from compressor.pipelines.stages import Stage
from compressor.quant import PACKERS
from compressor.recipe import Recipe
from compressor.tune import TUNERS
from compressor.tune.loop import Batches, train

SAMPLE_TOKENS = 40


def default_output(recipe: Recipe) -> Path:
    """model-w3g128-gptq-peqa in the current folder."""
    name = Path(recipe.model).name.lower()
    quant = recipe.quant
    group = "channel" if quant.group == -1 else f"g{quant.group}"
    tune = "" if recipe.tune.method == "none" else f"-{recipe.tune.method}"
    return Path(f"{name}-w{quant.bits}{group}-{quant.packer}{tune}")


class Run:
    """One run: what its stages share. Data flows through `go`, top to bottom."""

    def __init__(self, recipe: Recipe, output: Path, show: Show, command: str | None = None):
        self.recipe, self.output, self.show = recipe, output, show
        self.work = output.with_name(output.name + ".partial")
        self.device = load.pick_device(recipe.device)
        self.report = Report(recipe=recipe.to_dict(), environment=environment(self.device.type), command=command)
        self.source = load.resolve(recipe.model)
        self.config = load.read_config(self.source)
        if "quantization_config" in self.config:
            raise ModelError(f"{self.source} is already quantised; `run` starts from a dense model")
        check_methods(recipe)
        self.domain = data.load(recipe.data.data or "python")
        self.outside = data.load_text(recipe.data.outside or "python-source")
        self.calib = data.load(recipe.data.calib).train if recipe.data.calib else self.domain.train
        self.seqlen = recipe.data.seqlen or load.context(self.config)
        self.window = recipe.eval.window or self.seqlen
        self._fingerprints(load.fingerprint(self.source))

    def _fingerprints(self, model: str) -> None:
        recipe = self.recipe
        measured = (asdict(recipe.eval), self.window, self.domain.test.sha256, self.outside.sha256)
        self.key_dense = _digest(model, measured, recipe.device)
        self.key_compress = _digest(model, recipe.digest("compress"), self.calib.sha256, self.seqlen)
        self.key_packed = _digest(self.key_compress, measured)
        self.key_tune = _digest(self.key_compress, recipe.digest("tune"), self.domain.train.sha256)
        self.key_tuned = _digest(self.key_tune, measured)

    def go(self) -> dict[str, Any]:
        """Run all stages that the journal lacks; returns the contract document of the last stdout line."""
        with open_work(self.work) as journal, self._safe_report():
            loaded = self._load()
            self._dense(loaded, journal)
            self._compress(loaded, journal)
            if self.recipe.tune.method != "none":
                self._tune(loaded, journal)
            self._write(loaded, journal)
            document = self.document()
            self._publish()
        shutil.rmtree(self.work, ignore_errors=True)
        return document

    @contextlib.contextmanager
    def _safe_report(self) -> Iterator[None]:
        """A stopped run leaves its report, if anything was finished; a full disk becomes one sentence."""
        try:
            yield
        except BaseException as error:
            self._leave()
            if disk_full(error):
                sentence = (
                    f"the disk is full: {self.work} could not be written; free some space and run the same command again, finished work is kept"
                )
                raise OutputError(sentence) from None
            raise

    def _leave(self) -> None:
        """The report of a stopped run, or no folder at all if no stage was finished."""
        with contextlib.suppress(OSError, OutputError):
            if (self.work / "journal.json").exists() or any(self.work.glob("*/block-*")):
                self.report.save(self.work / "report.json")
            else:
                shutil.rmtree(self.work)

    def _load(self) -> load.Loaded:
        with self._stage("load"):
            loaded = load.load(self.recipe.model, self.recipe.device)
        compress.check_finite(loaded.model)
        todo = compress.plan(loaded.model, self.recipe.quant)
        parameters = {id(p): p for p in loaded.model.parameters()}
        self.report.model = {
            "name": self.recipe.model, "source": source_name(self.recipe.model),
            "architecture": self.config["architectures"][0], "parameters": sum(p.numel() for p in parameters.values()),
            "packed_parameters": sum(t.shape[0] * t.shape[1] for t in todo.packed()), "dense_bytes": write.model_bytes(self.source),
            "dense_dtype": str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32"),
            "folder_dtype": str(load.folder_dtype(self.config)).removeprefix("torch."),
            "scale_dtype": str(load.scale_dtype(self.recipe.quant.scale_dtype, self.config)).removeprefix("torch."),
        }  # fmt: skip
        for target in todo.packed():
            if target.note:
                self.show.say(target.note)
        return loaded

    def _dense(self, loaded: load.Loaded, journal: Journal) -> None:
        found = journal.get("dense", self.key_dense)
        if found is None:
            found = self._measure(loaded, "dense")
            journal.put("dense", self.key_dense, found)
        bits = torch.finfo(getattr(torch, self.report.model["dense_dtype"])).bits
        self._record("dense", found, bits_per_weight=float(bits), folder_bytes=self.report.model["dense_bytes"])
        self.report.protocol = found["protocol"]
        self.report.protocol["domain"]["split"] = self.domain.rule

    def _compress(self, loaded: load.Loaded, journal: Journal) -> None:
        recipe = self.recipe
        write.round_to_folder(loaded)
        ids = None
        if PACKERS[recipe.quant.packer].needs:
            ids = data.calibration(self.calib, loaded.tokenizer, self.seqlen, recipe.data.nsamples, recipe.seed)
        total = len(compress.plan(loaded.model, recipe.quant).packed())
        folder = journal.subfolder("blocks", self.key_compress)
        with self._stage("compress"), self.show.task("compress", total) as advance:
            dtype = load.scale_dtype(recipe.quant.scale_dtype, self.config)
            loaded.rows, loaded.unpacked, resumed = compress.compress(
                loaded.model, recipe.quant, dtype, ids, folder, lambda row: advance(1, f"{row['name']} error {row['error']:.4f}")
            )
        journal.resumed |= resumed > 0
        self.report.layers, self.report.unpacked = loaded.rows, loaded.unpacked
        self._measured("packed", self.key_packed, loaded, journal)

    def _tune(self, loaded: load.Loaded, journal: Journal) -> None:
        recipe = self.recipe
        windows = data.windows(self.domain.train, loaded.tokenizer, self.seqlen, recipe.data.train_on_prompt)
        tuner = TUNERS[recipe.tune.method](recipe.tune)
        parameters = tuner.attach(loaded.model)
        folder = journal.subfolder("tune", self.key_tune)
        steps = Batches(windows.ids, windows.labels, recipe.tune, recipe.seed).steps
        with self._stage("tune"), self.show.task("tune", steps) as advance:
            done = 0

            def on_step(row: dict[str, Any]) -> None:
                nonlocal done
                advance(row["step"] - done, row.get("note") or f"loss {row['loss']:.4f}")
                done = row["step"]

            log = train(
                loaded.model, parameters, windows.ids, windows.labels, recipe.tune, recipe.seed, folder, self.key_tune,
                self._domain_perplexity(loaded), on_step,
            )  # fmt: skip
        journal.resumed |= log.resumed_from > 0
        tuner.detach(loaded.model)
        self.report.training = {
            "method": recipe.tune.method, "trainable": sum(p.numel() for p in parameters.values()), "windows": len(windows.ids),
            "curve": log.curve, "evals": [{"step": e["step"], "perplexity": e["value"]} for e in log.evals], "notes": log.notes,
        }  # fmt: skip
        self._measured("tuned", self.key_tuned, loaded, journal)

    def _write(self, loaded: load.Loaded, journal: Journal) -> None:
        folder = self.work / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        with self._stage("export"):
            self.report.export = write.write_folder(loaded, folder)
        size = write.model_bytes(folder)
        packed = load.packed_weights(loaded.model)
        for name in ("packed", "tuned"):
            if getattr(self.report, name, None):
                self._record(name, {}, bits_per_weight=write.bits_per_weight(packed), folder_bytes=size)
        self.report.resumed, self.report.keys = journal.resumed, self.key_tuned
        self.report.save(folder / "report.json")
        render.write_html(self.report, folder / "report.html")
        render.write_card(self.report, folder / "README.md")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe.to_dict(), sort_keys=False), "utf-8")

    def _publish(self) -> None:
        """Give the finished folder its name; an older folder of ours is replaced only now."""
        old = self.output.with_name(self.output.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.output.exists():
            os.rename(self.output, old)
        os.rename(self.work / "folder", self.output)
        shutil.rmtree(old, ignore_errors=True)

    def _measured(self, name: str, key: str, loaded: load.Loaded, journal: Journal) -> None:
        found = journal.get(name, key)
        if found is None:
            found = self._measure(loaded, name)
            journal.put(name, key, found)
        self._record(name, found)

    def _measure(self, loaded: load.Loaded, name: str) -> dict[str, Any]:
        corpora = {"domain": self.domain.test, "outside": self.outside}
        with self._stage(f"evaluate {name}"), self.show.task(f"evaluate {name}", 2) as advance:

            def report(_key: str, done: int, total: int) -> None:
                if done == total:
                    advance(1, "")

            found: dict[str, Any] = evaluate.measure(loaded.model, loaded.tokenizer, corpora, self.window, self.recipe.eval.max_tokens, report)
            prompts = evaluate.prompts(self.domain.test, loaded.tokenizer)
            return found | {"samples": evaluate.generate_samples(loaded.model, loaded.tokenizer, prompts, SAMPLE_TOKENS), "prompts": prompts}

    def _domain_perplexity(self, loaded: load.Loaded) -> Callable[[], float]:
        """What the training loop calls now and then; the text is tokenised once."""
        if self.domain.test.pairs:
            cut = data.windows(self.domain.test, loaded.tokenizer, self.window)
            ids, labels = cut.ids, cut.labels
        else:
            ids, labels = evaluate.stream(self.domain.test, loaded.tokenizer), None
        return lambda: evaluate.perplexity(loaded.model, ids, self.window, self.recipe.eval.max_tokens, labels=labels)["perplexity"]

    def _record(self, name: str, found: dict[str, Any], **sizes: Any) -> None:
        entry = getattr(self.report, name) or {}
        entry |= {k: found[k] for k in ("domain", "outside") if k in found} | sizes
        if "folder_bytes" in entry:
            entry["ratio"] = self.report.model["dense_bytes"] / entry["folder_bytes"]
        setattr(self.report, name, entry)
        for i, prompt in enumerate(found.get("prompts", [])):
            if len(self.report.samples) <= i:
                self.report.samples.append({"prompt": prompt})
            self.report.samples[i][name] = found["samples"][i]

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        with Stage(name, self.report.seconds, self.report.peak_bytes, self.device.type):
            yield

    def document(self) -> dict[str, Any]:
        return contract(self.report.to_dict(), self.output)


def contract(report: dict[str, Any], output: Path) -> dict[str, Any]:
    """The stable document for scripts, from a report."""
    keys = ("dense", "packed", "tuned", "seconds", "peak_bytes", "resumed")
    return {"output": str(output)} | {key: report[key] for key in keys if report.get(key) is not None}


def run(recipe: Recipe, output: Path | None = None, overwrite: bool = False, show: Show | None = None, command: str | None = None) -> dict[str, Any]:
    """The whole job. An output folder that this very recipe has already written is returned as it is."""
    show = show or Show()
    output = output or default_output(recipe)
    job = Run(recipe, output, show, command)
    done = finished(job)
    if done is not None and not overwrite:
        show.say(f"{output} already holds the result of this recipe; nothing to do (--overwrite runs it again)")
        return done
    check_output(output, overwrite)
    need = 3 * job.config.get("vocab_size", 0) * job.config.get("hidden_size", 0) + write.model_bytes(job.source) // 2
    free = shutil.disk_usage(existing_parent(output)).free
    if free < need:
        room = f"has {free / 1e9:.1f} GB free and the run writes up to {need / 1e9:.1f} GB"
        raise OutputError(f"the disk of {output} {room}; free some space or choose another folder with -o")
    return job.go()


def dry_run(recipe: Recipe, output: Path | None, show: Show) -> dict[str, Any]:
    """Sizes, memory and time of the run, from shapes and one short speed measurement; loads no weights and writes nothing."""
    job = Run(recipe, output or default_output(recipe), show)
    check_output(job.output, overwrite=True)
    tokenizer = load.load_tokenizer(job.source)
    cap = recipe.eval.max_tokens or 1 << 62
    read = [data.windows(c, tokenizer, min(job.window, 128)).ids.numel() for c in (job.domain.test, job.outside)]
    windows = data.windows(job.domain.train, tokenizer, job.seqlen, recipe.data.train_on_prompt)
    steps = Batches(windows.ids, windows.labels, recipe.tune, recipe.seed).steps if recipe.tune.method != "none" else 0
    counts = estimate.Counts(
        calibration=min(recipe.data.nsamples, len(windows)) * job.seqlen, tuning=steps * recipe.tune.batch * recipe.tune.accumulate * job.seqlen,
        step=recipe.tune.batch * job.seqlen, evaluation=sum(min(cap, tokens) for tokens in read),
    )  # fmt: skip
    shell = estimate.shell(job.source)
    found = estimate.estimate(recipe, shell, job.config, counts, write.model_bytes(job.source))
    size = f"{found['weight_bytes'] / 1e6:,.1f} MB, {found['ratio']:.2f} times smaller"
    show.say(f"{recipe.model}: {found['packed_layers']} linears at {found['bits_per_weight']:.3f} bits per weight, {size}")
    minutes = sum(found["seconds"].values()) / 60
    show.say(f"peak memory {max(found['peak_bytes'].values()) / 1e9:.1f} GB, about {minutes:.1f} minutes; nothing was written")
    return {"output": str(job.output), "dry_run": True} | found


def finished(job: Run) -> dict[str, Any] | None:
    """The contract document of an output folder that the same recipe, model and data have written, or None."""
    path = job.output / "report.json"
    try:
        report = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    same = report.get("recipe") == job.recipe.to_dict() and report.get("keys") == job.key_tuned
    return contract(report, job.output) | {"resumed": True} if same else None


def check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    ours = (output / "report.json").exists()
    if ours and overwrite:
        return
    what = "the result of another run" if ours else "files that are not of a run"
    hint = "add --overwrite or choose another folder with -o" if ours else "choose another folder with -o"
    raise OutputError(f"{output} already holds {what}; {hint}")


def source_name(model: str) -> str:
    """The hub id behind a name, or the last part of a local folder (no paths of this machine in a folder that others will read)."""
    return Path(model).name if Path(model).is_dir() else load.ALIASES.get(model.lower(), model)


def check_methods(recipe: Recipe) -> None:
    from compressor.errors import RecipeError

    if recipe.quant.packer not in PACKERS:
        raise RecipeError(f"packer {recipe.quant.packer!r} is unknown; choose {' or '.join(PACKERS)}")
    if recipe.tune.method not in ("none", *TUNERS):
        raise RecipeError(f"tuner {recipe.tune.method!r} is unknown; choose none, {', '.join(TUNERS)}")


def existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, SafetensorError) and ("os error 28" in str(error) or "os error 27" in str(error) or "os error 122" in str(error))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
