"""Adapters on packed bases beside what else trains there: PEQA, tables, QA-LoRA; LoRA on the dense model; and QLoRA of bitsandbytes (NF4).

Every arm of a model sees the same windows for the same number of steps, at several multiples of the default learning rate of its kind (of LoRA on a
dense or NF4 base: that of LoRA on a packed one). The row is that of the rate with the least loss on the last WINDOWS windows of the training text,
which no arm trains on; the texts that are reported choose nothing. Each run has a process of its own, so that its memory is its own: `growth` is the
peak resident size while it trained less what the process took before it loaded a model. `steps_per_second` counts seconds of processor time of one
thread, which other work on the machine lengthens little. An arm that is there is not run again.

    python bench/lora.py --model tiny
    python bench/lora.py --model ../shared/models/babyllama --data ../shared/data/tinystories/stories.txt --group 32
    python bench/lora.py --bits 16 4 --epochs 0.25 --rates 1 --max-tokens 1000 --only "dense, lora r8" peqa "lora r8" --out lora_speed.csv
"""

import argparse
import csv
import gc
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from peers import Absent, quiet, require
from rows import write_rows
from torch import nn

from compressor import __version__
from compressor.integrations.peft import KINDS, Adapters, set_aside, state
from compressor.linear import block_weights, swap
from compressor.pipelines import compress, data, evaluate, load, write
from compressor.pipelines.packers import PACKERS
from compressor.pipelines.stages import peak_bytes, reset_peak
from compressor.pipelines.tuners import Tuning, resolved
from compressor.quant.starts import STARTS
from compressor.recipe import Recipe
from compressor.tune.batches import Batches, CausalLM
from compressor.tune.loop import train

FIELDS = [
    "model", "arm", "bits", "base", "tune", "start", "rank", "lr", "lr_tried", "steps", "trainable", "held_loss", "untuned_ppl", "domain_ppl",
    "outside_ppl",
    "bits_per_weight", "adapter_bytes", "growth_mb", "steps_per_second", "seconds", "domain_sha256", "outside_sha256", "window", "seed",
    "threads", "torch", "compressor",
]  # fmt: skip
WINDOWS = 32
ARMS: dict[str, dict[str, Any]] = {
    "untuned": {"method": "none"}, "peqa": {"method": "peqa"}, "table": {"method": "table", "base": "sketch"}, "qalora r8": {"method": "qalora"},
    "lora r8": {"method": "lora"}, "lora r16": {"method": "lora", "rank": 16, "alpha": 32.0},
    **{f"lora r8, {start} start": {"method": "lora", "start": start} for start in STARTS},
    **{f"{kind} r8": {"method": kind} for kind in KINDS if kind not in ("lora", "ia3")}, "ia3": {"method": "ia3"},
    "nf4, lora r8": {"method": "lora", "base": "nf4"}, "nf4, lora r16": {"method": "lora", "base": "nf4", "rank": 16, "alpha": 32.0},
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {
    "dense": {"method": "none", "base": "dense"}, "dense, lora r8": {"method": "lora", "base": "dense"},
    "dense, lora r16": {"method": "lora", "base": "dense", "rank": 16, "alpha": 32.0},
}  # fmt: skip


class Bench:
    """One model with its texts; `row` makes the row of one arm."""

    def __init__(self, a: argparse.Namespace):
        self.a = a
        self.domain, self.outside = data.load(a.data), data.load_text(a.outside)

    def row(self, arm: str, bits: int, factor: float) -> dict[str, Any]:
        """The row of one arm, at this multiple of its default learning rate."""
        keys = dict((DENSE if bits == 16 else ARMS)[arm])
        base = keys.pop("base", "gptq")
        packer = base if base in PACKERS else "none"
        recipe = Recipe(model=self.a.model, seed=self.a.seed).with_(quant__bits=min(bits, 4), quant__group=self.a.group if packer == "gptq" else 128)
        recipe = recipe.with_(quant__packer=packer, tune__epochs=self.a.epochs, **{f"tune__{key}": value for key, value in keys.items()})
        recipe = recipe.with_(tune=resolved(recipe.tune))
        if recipe.tune.lr is not None:
            recipe = recipe.with_(tune__lr=factor * recipe.tune.lr)
        gc.collect()
        reset_peak()
        before, start = peak_bytes()[""], time.perf_counter()
        loaded = load.load(self.a.model, "cpu")
        self.window = load.context(loaded.config)
        starts, size = self.based(loaded, base, recipe)
        untuned = self.measure(loaded)
        found, facts = untuned, {"steps": 0, "trainable": 0}
        if recipe.tune.method != "none":
            facts = self.tuned(loaded, recipe, starts, base, before)
            found = self.measure(loaded)
            size = packed_bits(loaded) if packer != "none" else size
        return {
            "model": Path(self.a.model).name, "arm": arm, "bits": bits, "base": base, "tune": recipe.tune.method, "start": recipe.tune.start,
            "rank": recipe.tune.rank if " r" in arm else "", "lr": recipe.tune.lr, "untuned_ppl": round(untuned["domain"]["perplexity"], 4),
            "domain_ppl": round(found["domain"]["perplexity"], 4), "outside_ppl": round(found["outside"]["perplexity"], 4), "bits_per_weight": size,
            "seconds": round(time.perf_counter() - start, 1), "domain_sha256": found["protocol"]["domain"]["data_sha256"][:12],
            "outside_sha256": found["protocol"]["outside"]["data_sha256"][:12], "window": self.window, "seed": self.a.seed,
            "threads": torch.get_num_threads(), "torch": torch.__version__, "compressor": __version__,
        } | facts  # fmt: skip

    def based(self, loaded: load.Loaded, base: str, recipe: Recipe) -> tuple[dict[str, Any], float]:
        """Make the model the arm's base, in place; the starts of adapters, and the bits per weight."""
        starts: dict[str, Any] = {}
        self.names = sorted(name.removesuffix(".weight") for name in block_weights(loaded.model))
        if base not in PACKERS:
            return starts, 32.0 if base == "dense" else nf4(loaded.model, self.names)
        write.round_to_folder(loaded, {t.name for t in compress.plan(loaded.model, recipe.quant).packed()})
        ids = data.calibration(self.domain.train, loaded.tokenizer, self.window, recipe.data.nsamples, recipe.seed)
        compress.compress(
            loaded.model, recipe.quant, load.scale_dtype("auto", loaded.dtype), ids, start=recipe.tune.start, rank=recipe.tune.rank, starts=starts
        )
        return starts, packed_bits(loaded)

    def tuned(self, loaded: load.Loaded, recipe: Recipe, starts: dict[str, Any], base: str, before: int) -> dict[str, Any]:
        options, windows = recipe.tune, data.windows(self.domain.train, loaded.tokenizer, self.window)
        objective, held = CausalLM(windows.ids[:-WINDOWS], windows.labels[:-WINDOWS]), CausalLM(windows.ids[-WINDOWS:], windows.labels[-WINDOWS:])
        steps, adapters = Batches(objective, options, recipe.seed).steps, None
        if base in PACKERS:
            tuning = Tuning(loaded, options, recipe.seed, steps, starts)
            parameters, pruner = tuning.parameters, tuning.pruner
        else:
            adapters = Adapters(KINDS[options.method], options, recipe.seed)
            parameters, pruner = adapters.wrap(loaded.model, self.names), None
        gc.collect()
        reset_peak()
        start = time.process_time()
        train(loaded.model, parameters, objective, options, recipe.seed, None, "", None, None, pruner)
        seconds, grown = time.process_time() - start, peak_bytes()[""] - before
        if adapters is None:
            tuning.finish()
        made = loaded.adapter if adapters is None else adapters.model
        size = sum(t.nbytes for t in state(made).values()) if made is not None else ""
        return {
            "held_loss": round(held_loss(loaded.model, held), 4), "steps": steps, "trainable": sum(p.numel() for p in parameters.values()),
            "growth_mb": round(grown / 1e6, 1),
            "steps_per_second": round(steps / seconds, 2), "adapter_bytes": size,
        }  # fmt: skip

    def measure(self, loaded: load.Loaded) -> dict[str, Any]:
        return evaluate.measure(loaded.model, loaded.tokenizer, {"domain": self.domain.test, "outside": self.outside}, self.window, self.a.max_tokens)


def packed_bits(loaded: load.Loaded) -> float:
    """Bits per weight of the base, with scales, tables or zeros."""
    with set_aside(loaded):
        return round(write.bits_per_weight(load.packed_weights(loaded.model)), 4)


@torch.no_grad()
def held_loss(model: nn.Module, objective: CausalLM) -> float:
    """Mean loss a token of all windows."""
    loss = objective.loss(model.eval())
    parts = [loss(*objective.rows(torch.tensor([i]))) for i in range(len(objective.counts))]
    return float(sum(parts)) / float(objective.counts.sum())


def nf4(model: nn.Module, names: list[str]) -> float:
    """Replace the named linears by bitsandbytes' 4-bit ones that compute in float32; returns their bits per weight."""
    require("bitsandbytes")
    with quiet():
        import bitsandbytes as bnb

    stored = weights = 0
    for name in names:
        dense = model.get_submodule(name)
        layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(dense.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer.support_avx512bf16_for_cpu = False  # the kernel that it takes once evaluated in eval mode has no backward pass (bitsandbytes 0.50.2)
        swap(model, name, layer.to("cpu"))
        quant = layer.weight.quant_state
        stored += layer.weight.numel() * 8 + quant.absmax.nbytes * 8 + quant.state2.absmax.nbytes * 8
        weights += dense.weight.numel()
    return round(stored / weights, 4)


def work(a: argparse.Namespace, arm: str, bits: int, factor: float, pipe: Any) -> None:
    """One arm at one rate, in a process of its own."""
    try:
        pipe.send(Bench(a).row(arm, bits, factor))
    except Absent as why:
        print(f"{arm}: left out, {why}", flush=True)
        pipe.send(None)


def best(a: argparse.Namespace, arm: str, bits: int) -> dict[str, Any] | None:
    """The row of the rate that learnt best; None where the arm cannot run here."""
    context, rows = multiprocessing.get_context("spawn"), []
    untrained = (DENSE if bits == 16 else ARMS)[arm]["method"] == "none"
    for factor in (1.0,) if untrained else a.rates:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(a, arm, bits, factor, there))
        process.start()
        there.close()  # so that a run that dies ends the wait
        row = here.recv()
        process.join()
        if row is None:
            return None
        rows.append(row)
    if untrained:
        return rows[0]
    chosen = min(rows, key=lambda row: row["held_loss"])
    return chosen | {"lr_tried": " ".join(f"{row['lr']:g}" for row in rows)}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="tiny")
    ap.add_argument("--data", default="python")
    ap.add_argument("--outside", default="python-source")
    ap.add_argument("--bits", type=int, nargs="+", default=[16, 3, 4], help="of packed bases; 16: the dense arms")
    ap.add_argument("--group", type=int, default=128)
    ap.add_argument("--epochs", type=float, default=Recipe().tune.epochs)
    ap.add_argument("--seed", type=int, default=42)
    ap.add_argument("--max-tokens", type=int, default=65536)
    ap.add_argument("--rates", type=float, nargs="+", default=[1.0, 4.0], help="multiples of each kind's default learning rate")
    ap.add_argument("--only", nargs="+", help="these arms")
    ap.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lora.csv")
    a = ap.parse_args()
    rows: list[dict[str, Any]] = []
    if a.out.exists():
        with a.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    todo = [(arm, bits) for bits in a.bits for arm in (DENSE if bits == 16 else ARMS) if bits == 4 or ARMS.get(arm, {}).get("base") != "nf4"]
    done = {(row["model"], row["arm"], row["bits"], row["seed"]) for row in rows}
    for arm, bits in todo:
        key = (Path(a.model).name, arm, str(bits), str(a.seed))
        if key in done or (a.only and arm not in a.only):
            continue
        row = best(a, arm, bits)
        if row is not None:
            rows.append(row)
            write_rows(a.out, FIELDS, rows)
            print({k: row[k] for k in ("arm", "bits", "lr", "untuned_ppl", "domain_ppl", "outside_ppl", "steps", "trainable", "seconds")}, flush=True)


if __name__ == "__main__":
    main()
