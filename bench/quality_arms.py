"""Arms of the headline table that our own code makes, one a process, and the measuring of all arms, for bench/quality.py.

    python bench/quality_arms.py JOB.json
    python bench/quality_arms.py --serve

The job says model, texts, task file, arm, bits, group, `base` (the folder of the arm that this one tunes) and `folder` (where it goes). The first
form makes the arm's folder in the format that a user would get, and prints what it took as JSON on its last line: processor seconds of loading,
making and writing, and peak memory (VmHWM), in which are the libraries that the process loads (`imports`). The second loads folders by `load.load`,
peers' in the same way, and measures them, one process for all.
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import blockwise
import torch
from lora import nf4
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor import presets
from compressor.errors import CompressorError
from compressor.export import shards
from compressor.integrations.peft import FOLDER as ADAPTER
from compressor.integrations.peft import KINDS, Adapters, state
from compressor.linear import block_weights, find_blocks
from compressor.pipelines import checkpoint, compress, data, evaluate, load, pruning, write
from compressor.pipelines.packers import PACKERS
from compressor.pipelines.run import run
from compressor.pipelines.stages import peak_bytes
from compressor.pipelines.tuners import Tuning, resolved
from compressor.recipe import Recipe
from compressor.tune.batches import Batches, CausalLM
from compressor.tune.dense import Dense
from compressor.tune.loop import train

FACTORS = (30.0, 100.0)  # of Block-AP's published rates, tried where the rates are chosen
HELD = 32  # windows of the training text, not calibrated on, that choose
PRUNED = {"method": "loraprune", "ratio": 0.3, "multiple": 64}


@dataclass
class Job:
    """What bench/quality.py asks for, with the texts."""

    asked: dict[str, Any]

    def __post_init__(self) -> None:
        a = self.asked
        self.domain, self.outside = data.load(a["data"]), data.load_text(a["outside"])
        self.folder = Path(a["folder"])
        keys = {
            "quant__group": a["group"],
            "tune__epochs": a["epochs"],
            "tune__steps": a["steps"],
            "data__nsamples": a["nsamples"],
            "seed": a["seed"],
        }
        self.recipe = Recipe(model=a["model"]).with_(**keys, **({"quant__bits": a["bits"]} if a["bits"] < 16 else {}))
        self.facts: dict[str, Any] = {}

    def dense(self) -> load.Loaded:
        loaded = load.load(self.asked["base"] or self.asked["model"], "cpu")
        self.window = load.context(loaded.config)
        return loaded

    def calibration(self) -> Tensor:
        return load_file(self.asked["ids"])["ids"]

    def windows(self, loaded: load.Loaded) -> CausalLM:
        cut = data.windows(self.domain.train, loaded.tokenizer, self.window)
        return CausalLM(cut.ids, cut.labels)

    def keep(self, loaded: load.Loaded) -> None:
        """The folder of what was made."""
        if loaded.adapter is not None:
            write.write_adapter(loaded, self.folder, self.folder.name)
        write.write_folder(loaded, self.folder)


def packed(job: Job) -> None:
    """Packed by the packer that the arm names."""
    loaded, quant = job.dense(), job.recipe.with_(quant__packer=job.asked["packer"]).quant
    write.round_to_folder(loaded, {t.name for t in compress.plan(loaded.model, quant).packed()})
    ids = job.calibration() if PACKERS[quant.packer].needs else None
    compress.compress(loaded.model, quant, load.scale_dtype("auto", loaded.dtype), ids, seed=job.recipe.seed)
    job.facts |= {"settings": "no calibration" if ids is None else ""}
    job.keep(loaded)


def preset(job: Job) -> None:
    """A whole run with the preset `best`, untuned: bits by layer at the bytes of one width, measured on some of the windows, scales end to end on
    the others."""
    keys = presets.keys("best", {}, tuned=False, alone=True)
    texts = {"data__data": job.asked["data"], "data__outside": job.asked["outside"], "eval__max_tokens": 4096}
    recipe = job.recipe.with_(**texts, **keys)
    recipe = recipe.with_(data__nsamples=recipe.data.nsamples - recipe.choose.windows)
    run(recipe, job.folder, overwrite=True)
    report = json.loads((job.folder / "report.json").read_text("utf-8"))
    job.facts["seconds"] = sum(report["seconds"].get(stage, 0.0) for stage in ("choose", "compress", "teach", "end-to-end"))
    chosen = (report.get("choice") or {}).get("reached") is not None
    job.facts["settings"] = ("bits by layer" if chosen else "one width: no candidate is smaller") + "; scales end to end"


def tuned(job: Job) -> None:
    """The base's folder, tuned as it is."""
    loaded, seed = job.dense(), job.recipe.seed
    options, objective = resolved(job.recipe.with_(tune__method=job.asked["tune"]).tune), job.windows(loaded)
    steps = Batches(objective, options, seed).steps
    if job.asked.get("half"):  # the others went into pruning
        steps -= steps // 2
        options = replace(options, steps=steps)
    tuning = Tuning(loaded, options, seed, steps)
    train(loaded.model, tuning.parameters, objective, options, seed, None, "", None, None, tuning.pruner)
    told = f"rank {options.rank}, beside the packed weights" if options.method in KINDS else "relative"
    job.facts |= {"lr": options.lr, "steps": steps, "trainable": tuning.finish(), "settings": told}
    job.keep(loaded)


def full(job: Job) -> None:
    """The control: all dense linears of the blocks, trained on the same windows."""
    loaded, options = job.dense(), job.recipe.with_(tune__method="full", tune__lr=job.asked["lr"]).tune
    tuner, objective = Dense(options), job.windows(loaded)
    train(loaded.model, tuner.attach(loaded.model), objective, options, job.recipe.seed, None, "")
    tuner.detach(loaded.model)
    job.facts |= {
        "lr": options.lr,
        "steps": Batches(objective, options, job.recipe.seed).steps,
        "settings": "best of three rates, on the measured text",
    }
    job.keep(loaded)


def block(job: Job) -> None:
    """EfficientQAT's first stage at the published rates, or at those of FACTORS that give the least loss on windows it was not calibrated on."""
    loaded, quant, ids = job.dense(), job.recipe.with_(quant__symmetric=False).quant, job.calibration()
    write.round_to_folder(loaded, {t.name for t in compress.plan(loaded.model, quant).packed()})
    dtype, seed, dense = load.scale_dtype("auto", loaded.dtype), job.recipe.seed, loaded.model
    held, found = unseen(job.windows(loaded).ids, ids)[-HELD:], {}
    for factor in FACTORS if job.asked["chosen"] else (1.0,):
        start = time.process_time()
        model = copy.deepcopy(dense)
        blockwise.compress(model, quant, dtype, ids, factor, seed)
        spent = time.process_time() - start
        found[factor] = (evaluate.perplexity(model, held, job.window)["loss"], model, spent)
    factor = min(found, key=lambda f: found[f][0])
    loaded.model, job.facts["seconds"] = found[factor][1], found[factor][2]
    write.round_to_folder(loaded, set())  # norms were trained
    tried = f", chosen of {', '.join(f'{f:g}' for f in FACTORS)} by {HELD} windows of the training text" if job.asked["chosen"] else ""
    told = f"asymmetric; rates {factor:g} times the published ones{tried}; seconds of one"
    job.facts |= {"lr": factor * blockwise.VALUES, "symmetric": False, "settings": told}
    job.keep(loaded)


def unseen(windows: Tensor, ids: Tensor) -> Tensor:
    """Those of `windows` [count, tokens] that are not among the calibration windows `ids`."""
    taken = {tuple(row) for row in ids.tolist()}
    return windows[[tuple(row) not in taken for row in windows.tolist()]]


def pruned(job: Job) -> None:
    """Heads and channels removed while low-rank paths heal the rest, for half of the tuning steps; then GPTQ."""
    loaded = job.dense()
    objective = job.windows(loaded)
    steps = Batches(objective, job.recipe.tune, job.recipe.seed).steps // 2
    recipe = job.recipe.with_(quant__packer="gptq", prune__steps=steps, **{f"prune__{key}": value for key, value in PRUNED.items()})
    facts, _log = pruning.prune(loaded, recipe.prune, objective, recipe.seed)
    write.round_to_folder(loaded, {t.name for t in compress.plan(loaded.model, recipe.quant).packed()})
    compress.compress(loaded.model, recipe.quant, load.scale_dtype("auto", loaded.dtype), job.calibration())
    told = f"loraprune, {100 * facts['ratio']:.0f} % of the weights gone, half of the steps while pruning; bits per weight of the dense model"
    job.facts |= {"lr": facts["lr"], "steps": steps, "settings": told}
    job.keep(loaded)


def bitsandbytes(job: Job) -> load.Loaded:
    """NF4 with double quantisation, and LoRA beside it where the arm tunes; stays in memory, for its format is none of ours."""
    loaded, seed = job.dense(), job.recipe.seed
    write.round_to_folder(loaded, set())
    names = sorted(name.removesuffix(".weight") for name in block_weights(loaded.model))
    job.facts |= {"bits_per_weight": nf4(loaded.model, names), "group": 64, "symmetric": "", "settings": "NF4 of 64, double quantisation, float32"}
    job.facts["version"] = version("bitsandbytes")
    if job.asked["tune"]:
        options, objective = resolved(job.recipe.with_(tune__method="lora").tune), job.windows(loaded)
        adapters = Adapters(KINDS["lora"], options, seed)
        train(loaded.model, adapters.wrap(loaded.model, names), objective, options, seed, None, "")
        extra = 8 * sum(t.nbytes for t in state(adapters.model).values()) / weights_of(job)
        job.facts["bits_per_weight"] += extra
        steps = Batches(objective, options, seed).steps
        job.facts |= {"lr": options.lr, "steps": steps, "adapter_bits": round(extra, 4), "settings": f"rank {options.rank}, as ours; NF4 of 64"}
    return loaded


def weights_of(job: Job) -> int:
    """Weights of the linears of the dense model's blocks."""
    return sum(w.numel() for w in block_weights(load.load(job.asked["model"], "cpu").model).values())


def stored_bits(folder: Path, loaded: load.Loaded) -> tuple[int, int]:
    """(bits, weights) of the linears of the blocks, from the headers of the folder: all tensors that belong to them but biases."""
    prefix, blocks = find_blocks(loaded.model)
    shapes = {
        f"{prefix}.{name}": m.in_features * m.out_features for name, m in blocks.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name
    }
    shapes = {name.removesuffix(".base_layer"): size for name, size in shapes.items()}
    stored = shards.read_headers(folder, checkpoint.weight_files(folder)).items()
    bits = sum(8 * t.numel() * t.element_size() for key, t in stored if key.rpartition(".")[0] in shapes and not key.endswith(".bias"))
    return bits, sum(shapes.values())


def measure(job: Job, loaded: load.Loaded, made: bool) -> dict[str, Any]:
    """Perplexities, accuracy if there is a task, and the size."""
    a, window = job.asked, load.context(loaded.config)
    found = evaluate.measure(loaded.model, loaded.tokenizer, {"domain": job.domain.test, "outside": job.outside}, window, a["max_tokens"])
    row: dict[str, Any] = {f"{key}_ppl": round(found[key]["perplexity"], 4) for key in ("domain", "outside")}
    for key in ("domain", "outside"):
        row |= {f"{key}_sha256": found["protocol"][key]["data_sha256"][:16], f"{key}_tokens": found["protocol"][key]["tokens"]}
    row |= {"window": found["protocol"]["domain"]["window"], "torch": torch.__version__, "threads": torch.get_num_threads()}
    if a["task"]:
        row |= accuracy(loaded, a["task"])
    if made:
        bits, weights = stored_bits(job.folder, loaded)
        beside = 8 * sum(p.stat().st_size for p in (job.folder / ADAPTER).glob("*.safetensors"))
        dense = weights_of(job)
        row |= {"bits_per_weight": round((bits + beside) / dense, 4), "adapter_bits": round(beside / dense, 4) if beside else ""}
    return row


def accuracy(loaded: load.Loaded, task: str) -> dict[str, Any]:
    """Share of right answers to a task file, through lm-eval."""
    from compressor.pipelines.measure import tasks

    (found,) = tasks.measure(loaded, [task]).values()
    return {
        "accuracy": round(found["value"], 4), "accuracy_stderr": round(found["stderr"], 4), "questions": found["examples"],
        "task_sha256": (found["data_sha256"] or "")[:16], "task_engine": found["engine"],
    }  # fmt: skip


MAKERS: dict[str, Callable[[Job], load.Loaded | None]] = {
    "full": full, "packed": packed, "preset": preset, "tuned": tuned, "block": block, "pruned": pruned, "nf4": bitsandbytes,
}  # fmt: skip


def make(job: Job) -> dict[str, Any]:
    """The arm's folder, and what it took; NF4, which has none, measured."""
    imports, start = peak_bytes()[""], time.process_time()
    loaded = MAKERS[job.asked["kind"]](job)
    row = {"seconds": time.process_time() - start, "peak_mb": round(peak_bytes()[""] / 1e6, 1), "imports_mb": round(imports / 1e6, 1)} | job.facts
    return row if loaded is None else row | measure(job, loaded, False)


def read(job: Job) -> dict[str, Any]:
    """What a folder is worth, whoever made it."""
    job.folder = checkpoint.resolve(job.asked["model"] if job.asked["kind"] == "dense" else str(job.folder))
    return measure(job, load.load(str(job.folder), "cpu"), True)


def serve() -> None:
    """Measures one folder after the other: a path of a job a line of stdin, a row or the reason why there is none a line of stdout."""
    for line in sys.stdin:
        try:
            row = read(Job(json.loads(Path(line.strip()).read_text("utf-8"))))
        except (CompressorError, OSError, ValueError) as error:
            row = {"failed": f"the folder cannot be measured: {load.first_line(error)}"}
        print(json.dumps(row), flush=True)


def main() -> None:
    if sys.argv[1] == "--serve":
        serve()
    else:
        print(json.dumps(make(Job(json.loads(Path(sys.argv[1]).read_text("utf-8"))))), flush=True)


if __name__ == "__main__":
    main()
