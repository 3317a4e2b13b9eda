"""Perplexity of every arm of the main job, on `tiny` and on the small shared models: dense, packed (RTN and GPTQ codes), tuned by PEQA.

Tuning also fits the domain, so the control stands beside it: the dense model with all its decoder linears tuned on the same tokens (best of
three learning rates, chosen on the very text it is measured on, which favours the control), and every number has its partner from
outside the domain. `recovered` is the share of the loss in domain that packing to the same bits by RTN causes and this arm does not have.

Rows of the same model in the result file are replaced.

    python bench/quality.py --model tiny --bits 3 2 --out bench/results/quality.csv
    python bench/quality.py --model ../shared/models/babyllama --data ../shared/data/tinystories/stories.txt --group 32 --bits 3 2
"""

import argparse
import csv
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from rows import write_rows

from compressor import __version__
from compressor.pipelines import compress, data, evaluate, load, write
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Recipe, Tune
from compressor.tune import TUNERS, Tuner, resolved
from compressor.tune.batches import CausalLM
from compressor.tune.dense import Dense
from compressor.tune.loop import train

FIELDS = [
    "model", "method", "bits", "group", "symmetric", "tune", "lr", "steps", "domain_ppl", "outside_ppl", "recovered", "bits_per_weight",
    "seconds", "domain_sha256", "outside_sha256", "window", "tokens", "torch", "compressor",
]  # fmt: skip
DENSE_RATES = (1e-4, 3e-4, 1e-3)


class Bench:
    def __init__(self, a: argparse.Namespace):
        self.a = a
        self.domain, self.outside = data.load(a.data), data.load_text(a.outside)
        self.rows: list[dict[str, Any]] = []
        self.dense, self.rtn = 0.0, 0.0

    def measure(self, loaded: load.Loaded) -> dict[str, Any]:
        window = load.context(loaded.config)
        return evaluate.measure(loaded.model, loaded.tokenizer, {"domain": self.domain.test, "outside": self.outside}, window, self.a.max_tokens)

    def row(self, found: dict[str, Any], recipe: Recipe, method: str, seconds: float, **more: Any) -> dict[str, Any]:
        ppl = found["domain"]["perplexity"]
        protocol = found["protocol"]
        row = {
            "model": Path(self.a.model).name, "method": method, "symmetric": recipe.quant.symmetric, "tune": "none", "seconds": round(seconds, 1),
            "domain_ppl": round(ppl, 4), "outside_ppl": round(found["outside"]["perplexity"], 4), "window": protocol["domain"]["window"],
            "tokens": protocol["domain"]["tokens"], "domain_sha256": protocol["domain"]["data_sha256"][:16],
            "outside_sha256": protocol["outside"]["data_sha256"][:16], "torch": torch.__version__, "compressor": __version__,
        } | more  # fmt: skip
        if self.rtn:
            row["recovered"] = round((self.rtn - ppl) / (self.rtn - self.dense), 3)
        print(
            {k: row.get(k) for k in ("model", "method", "bits", "group", "tune", "lr", "domain_ppl", "outside_ppl", "recovered", "seconds")},
            flush=True,
        )
        self.rows.append(row)
        return row

    def packed(self, recipe: Recipe) -> tuple[load.Loaded, float]:
        loaded = load.load(self.a.model, "cpu")
        write.round_to_folder(loaded, {t.name for t in compress.plan(loaded.model, recipe.quant).packed()})
        start = time.perf_counter()
        ids = None
        if PACKERS[recipe.quant.packer].needs:
            ids = data.calibration(self.domain.train, loaded.tokenizer, load.context(loaded.config), recipe.data.nsamples, recipe.seed)
        compress.compress(loaded.model, recipe.quant, load.scale_dtype("auto", loaded.dtype), ids)
        return loaded, time.perf_counter() - start

    def tuned(self, loaded: load.Loaded, recipe: Recipe) -> tuple[dict[str, Any], float, int]:
        windows = data.windows(self.domain.train, loaded.tokenizer, load.context(loaded.config))
        tuner: Tuner = Dense(recipe.tune) if recipe.tune.method == "full" else TUNERS[recipe.tune.method](recipe.tune)
        start = time.perf_counter()
        log = train(loaded.model, tuner.attach(loaded.model), CausalLM(windows.ids, windows.labels), recipe.tune, recipe.seed, None, "")
        tuner.detach(loaded.model)
        return self.measure(loaded), time.perf_counter() - start, log.steps

    def go(self) -> None:
        base = Recipe(model=self.a.model).with_(tune__epochs=self.a.epochs)
        found = self.measure(load.load(self.a.model, "cpu"))
        self.dense = found["domain"]["perplexity"]
        self.row(found, base, "dense", 0.0)
        for rate in DENSE_RATES:
            loaded = load.load(self.a.model, "cpu")
            recipe = base.with_(tune__method="full", tune__lr=rate)
            found, seconds, steps = self.tuned(loaded, recipe)
            self.row(found, recipe, "dense", seconds, tune="full", lr=rate, steps=steps)
        for bits, group, symmetric in itertools.product(self.a.bits, self.a.group, [not s for s in self.a.asym]):
            self.rtn = 0.0
            for packer in ("rtn", "gptq"):
                recipe = base.with_(quant__bits=bits, quant__group=group, quant__packer=packer, quant__symmetric=symmetric)
                loaded, seconds = self.packed(recipe)
                found = self.measure(loaded)
                self.rtn = self.rtn or found["domain"]["perplexity"]
                facts = {"bits": bits, "group": group, "bits_per_weight": round(write.bits_per_weight(load.packed_weights(loaded.model)), 4)}
                self.row(found, recipe, packer, seconds, **facts)
                recipe = recipe.with_(tune__method="peqa", tune__lr=self.a.lr)
                found, seconds, steps = self.tuned(loaded, recipe)
                self.row(found, recipe, packer, seconds, tune="peqa", lr=self.a.lr, steps=steps, **facts)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="tiny")
    ap.add_argument("--data", default="python")
    ap.add_argument("--outside", default="python-source")
    ap.add_argument("--bits", type=int, nargs="+", default=[3])
    ap.add_argument("--group", type=int, nargs="+", default=[128])
    ap.add_argument("--asym", type=int, nargs="+", default=[0], choices=[0, 1])
    ap.add_argument("--lr", type=float, default=resolved(Tune(method="peqa")).lr)
    ap.add_argument("--epochs", type=float, default=Recipe().tune.epochs)
    ap.add_argument("--max-tokens", type=int, default=65536)
    ap.add_argument("--out", type=Path, default=Path("bench/results/quality.csv"))
    a = ap.parse_args()
    bench = Bench(a)
    bench.go()
    kept = []
    if a.out.exists():
        with a.out.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["model"] != Path(a.model).name]
    write_rows(a.out, FIELDS, kept + bench.rows)


if __name__ == "__main__":
    main()
