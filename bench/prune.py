"""Structured pruning of a decoder: LoRAPrune beside LLM-Pruner's Taylor score, a Wanda-style score and magnitude, all in one loop.

Every arm trains the same low-rank paths on the same windows for the same number of steps at the same rate; what differs is the score, and whether
units go gradually or all at once (LLM-Pruner's own way: a few batches are scored, then everything goes, then the model is healed). Perplexities in
domain and outside of it, before anything is packed. With --bytes instead: pruned, 3 bits and PEQA beside dense, 2 bits and PEQA at equal bytes.
With --sparse: single weights, by oBERT and by magnitude, all at once and without training.

Each finished row is kept: the same command goes on where it stopped. Rows of another version of the package are replaced.

    python bench/prune.py --model tiny --seeds 3
    python bench/prune.py --model ../shared/models/babyllama --data ../shared/data/tinystories/stories.txt
    python bench/prune.py --model tiny --bytes
"""

import argparse
import csv
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import write_rows

from compressor import __version__
from compressor.pipelines import compress, data, evaluate, load, pruning, write
from compressor.recipe import Recipe
from compressor.tune import TUNERS, resolved
from compressor.tune.batches import CausalLM
from compressor.tune.loop import train

FIELDS = [
    "model", "arm", "method", "way", "asked", "ratio", "unit", "heads", "ffn", "blocks", "quant", "seed", "steps", "lr", "tokens", "domain_ppl",
    "outside_ppl", "block_bytes", "seconds", "domain_sha256", "outside_sha256", "window", "threads", "torch", "compressor",
]  # fmt: skip
PAPER = {"estimate": "paper", "start": "random", "parts": "all"}
ARMS: dict[str, dict[str, Any]] = {
    "loraprune": {"method": "loraprune"}, "llm-pruner": {"method": "taylor"}, "wanda": {"method": "wanda"}, "magnitude": {"method": "magnitude"},
    "loraprune as published": {"method": "loraprune"} | PAPER, "llm-pruner, gate": {"method": "taylor", "parts": "gate"},
    "wanda, gate": {"method": "wanda", "parts": "gate"},
}  # fmt: skip

SPARSE = (("unstructured", 0.5), ("unstructured", 0.7), ("4block", 0.5), ("2:4", 0.5))


class Bench:
    """One model with its texts; `row` makes the row of one arm."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.domain = data.load(options.data or "python")
        self.outside = data.load_text(options.outside or "python-source")
        loaded = load.load(options.model)
        self.seqlen = min(256, load.context(loaded.config))
        self.windows = data.windows(self.domain.train, loaded.tokenizer, self.seqlen)
        self.calibration = data.calibration(self.domain.train, loaded.tokenizer, self.seqlen, 128, 42)
        self.name = Path(options.model).name

    def row(self, arm: str, recipe: Recipe) -> dict[str, Any]:
        start = time.perf_counter()
        loaded, facts, prune = load.load(self.options.model), {}, recipe.prune
        if prune.method != "none":
            facts, _log = pruning.prune(loaded, prune, CausalLM(self.windows.ids, self.windows.labels), recipe.seed)
        if recipe.quant.packer != "none":
            self._pack(loaded, recipe)
        found = evaluate.measure(loaded.model, loaded.tokenizer, {"domain": self.domain.test, "outside": self.outside}, self.seqlen, 65536)
        packed = write.block_weights(loaded)
        bits = write.bits_per_weight(packed) * sum(w.shape[0] * w.shape[1] for w in packed.values())
        quant = "" if recipe.quant.packer == "none" else f"{recipe.quant.packer} {recipe.quant.bits} bits g{recipe.quant.group}, {recipe.tune.method}"
        return facts | {
            "model": self.name, "arm": arm, "asked": prune.ratio, "quant": quant, "seed": recipe.seed,
            "way": "one shot" if prune.one_shot else "gradual", "steps": prune.steps or "", "lr": prune.lr or "",
            "domain_ppl": round(found["domain"]["perplexity"], 4),
            "outside_ppl": round(found["outside"]["perplexity"], 4), "block_bytes": round(bits / 8), "seconds": round(time.perf_counter() - start, 1),
            "domain_sha256": self.domain.test.sha256[:12], "outside_sha256": self.outside.sha256[:12], "window": self.seqlen,
            "threads": torch.get_num_threads(), "torch": torch.__version__, "compressor": __version__,
        }  # fmt: skip

    def _pack(self, loaded: load.Loaded, recipe: Recipe) -> None:
        dtype = load.scale_dtype(recipe.quant.scale_dtype, loaded.dtype)
        compress.compress(loaded.model, recipe.quant, dtype, self.calibration)
        if recipe.tune.method != "none":
            options = resolved(recipe.tune)
            tuner = TUNERS[options.method](options)
            train(loaded.model, tuner.attach(loaded.model), CausalLM(self.windows.ids, self.windows.labels), options, recipe.seed, None, "")
            tuner.detach(loaded.model)


def arms(options: argparse.Namespace) -> Iterator[tuple[str, Recipe]]:
    """Name and recipe of each arm."""
    base = Recipe(model=options.model).with_(quant__packer="none")
    for seed in range(42, 42 + options.seeds):
        if options.sparse:
            for (pattern, ratio), method in itertools.product(SPARSE, ("obert", "magnitude")):
                keys = {"method": method, "pattern": pattern, "ratio": ratio, "one_shot": True}
                keys |= {"gradients": 128, "damp": options.damp} if method == "obert" else {}
                yield f"{method}, {pattern}", base.with_(seed=seed, **{f"prune__{k}": v for k, v in keys.items()})
            continue
        if options.bytes:
            yield from _equal_bytes(base.with_(seed=seed), options)
            continue
        for ratio in options.ratios:
            keys = {"ratio": ratio, "steps": options.steps, "multiple": options.multiple, "lr": options.lr}
            for name, own in ARMS.items():
                if options.arms and name not in options.arms:
                    continue
                for one_shot in (False, True):
                    way = {"prune__one_shot": one_shot} | {f"prune__{k}": v for k, v in (keys | own).items()}
                    yield f"{name}, {'one shot' if one_shot else 'gradual'}", base.with_(seed=seed, **way)


def _equal_bytes(base: Recipe, options: argparse.Namespace) -> Iterator[tuple[str, Recipe]]:
    """Dense at 2 bits, and pruned at 3 bits by as much as makes the blocks' linears as small; the second trains half of its steps while pruning."""
    two, three = (bits + 16 / options.group for bits in (2, 3))
    tune = {"tune__method": "peqa", "quant__group": options.group, "quant__packer": "gptq"}
    yield "dense + 2 bits + peqa", base.with_(quant__bits=2, tune__steps=2 * options.steps, **tune)
    prune = {"method": "loraprune", "ratio": 1 - two / three, "steps": options.steps, "multiple": options.multiple, "lr": options.lr}
    keys = tune | {f"prune__{k}": v for k, v in prune.items()}
    yield "pruned + 3 bits + peqa", base.with_(quant__bits=3, tune__steps=options.steps, **keys)
    yield "pruned in one shot + 3 bits + peqa", base.with_(quant__bits=3, tune__steps=options.steps, prune__one_shot=True, **keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data")
    parser.add_argument("--outside")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--multiple", type=int, default=64)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="these only")
    parser.add_argument("--sparse", action="store_true", help="single weights by oBERT and by magnitude, at once and without training")
    parser.add_argument("--damp", type=float, default=1e-7)
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prune.csv")
    options = parser.parse_args()
    rows = [r for r in csv.DictReader(options.out.open()) if r["compressor"] == __version__] if options.out.exists() else []
    bench = Bench(options)
    for arm, recipe in arms(options):
        wanted = {"model": bench.name, "arm": arm, "asked": recipe.prune.ratio, "seed": recipe.seed, "steps": recipe.prune.steps or ""}
        if any(all(row[k] == str(v) for k, v in wanted.items()) for row in rows):
            continue
        row = bench.row(arm, recipe)
        rows.append({k: str(row.get(k, "")) for k in FIELDS})
        write_rows(options.out, FIELDS, rows)
        print(f"{arm:36s} {row.get('ratio', 0):.3f} domain {row['domain_ppl']} outside {row['outside_ppl']} {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
