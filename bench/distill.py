"""What learning from the dense model's predictions brings while a packed model is tuned: perplexity in the tuning domain and outside, by share.

A base is measured, pruned where that is asked, packed by `block` and taught once; every arm goes on from a copy of its work folder, so that arms
differ in nothing but how they tune. `teach_seconds` is the one pass of the dense model over all training windows, `kl` that of the tuned model to the
dense one on the sample of the report, nats a token. A row is kept as soon as it is there, and the same command goes on where it stopped.

    OMP_NUM_THREADS=1 python bench/distill.py --model tiny --bits 3 2 --work DIR
    OMP_NUM_THREADS=1 python bench/distill.py --model ../shared/models/babyllama --data ../shared/data/tinystories/stories.txt --group 32 --work DIR
    OMP_NUM_THREADS=1 python bench/distill.py --bits 2 --tune lora --shares 0 0.5 1 --work DIR
"""

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rows import write_rows

from compressor import __version__
from compressor.pipelines.data import Windows
from compressor.pipelines.journal import Journal
from compressor.pipelines.load import Loaded
from compressor.pipelines.run import Run
from compressor.pipelines.show import Show
from compressor.recipe import Recipe
from compressor.tune.batches import CausalLM

FIELDS = [
    "model", "bits", "group", "prune", "tune", "share", "top", "lr", "steps", "seed", "domain_ppl", "outside_ppl", "kl", "packed_domain_ppl",
    "packed_outside_ppl", "dense_domain_ppl", "dense_outside_ppl", "teach_seconds", "tune_seconds", "domain_tokens", "outside_tokens",
    "domain_sha256", "outside_sha256", "torch", "compressor",
]  # fmt: skip
ARM = ("model", "bits", "group", "prune", "tune", "share", "top", "lr", "steps", "seed")


class Taught(Exception):
    """The base has all that its arms share."""


class Quick(Run):
    """A run without samples of text."""

    def _samples(self) -> bool:
        return False


class Base(Quick):
    """A run that ends when it would tune."""

    def _tune(self, loaded: Loaded, ids: torch.Tensor | None, windows: Windows, objective: CausalLM, journal: Journal) -> None:
        raise Taught


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in the file."""
    return row["model"], -int(row["bits"]), float(row["prune"]), row["tune"], *(float(row[key]) for key in ("seed", "lr", "top", "share"))


class Bench:
    def __init__(self, a: argparse.Namespace):
        self.a, self.name, self.rows = a, Path(a.model).name, list[dict[str, Any]]()
        self.out = Path(__file__).parent / "results" / a.out
        if self.out.exists():
            with self.out.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def recipe(self, bits: int, share: float, top: int) -> Recipe:
        a, base = self.a, Recipe(model=self.a.model, seed=self.a.seed, device="cpu")
        keys: dict[str, Any] = {"data__data": a.data, "quant__packer": "block", "quant__bits": bits, "quant__group": a.group}
        keys |= {"tune__method": a.tune, "tune__steps": a.steps, "tune__lr": a.lr, "tune__eval_every": 0, "tune__checkpoint_every": a.steps}
        if a.prune:
            keys |= {"prune__method": "loraprune", "prune__ratio": a.prune}
        return base.with_(**keys, tune__distill=share, tune__distill_top=top, eval__max_tokens=a.max_tokens)

    def base(self, bits: int) -> Path:
        """The work folder that arms go on from, made if it is not there, with the seconds of its stages."""
        place = self.a.work / f"{self.name}-{bits}-{self.a.prune}-{self.a.seed}"
        work, seconds = place.with_name(place.name + ".partial"), place.with_name(place.name + ".json")
        if not seconds.exists():
            run = Base(self.recipe(bits, 0.5, 64), place, Show())
            try:
                run.go()
            except Taught:
                seconds.write_text(json.dumps(run.report.seconds), "utf-8")
        return work

    def arm(self, bits: int, share: float, top: int) -> None:
        recipe = self.recipe(bits, share, top)
        first = Quick(recipe, self.a.work / "arm", Show())
        tune = first.recipe.tune
        known = (self.name, bits, self.a.group, self.a.prune, tune.method, share, top, tune.lr, tune.steps, self.a.seed)
        row: dict[str, Any] = dict(zip(ARM, known, strict=True))
        if any(all(str(old[key]) == str(row[key]) for key in ARM) for old in self.rows):
            return
        base = self.base(bits)
        for left in (first.output, first.work):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(base, first.work)
        first.go()
        report = json.loads((first.output / "report.json").read_text("utf-8"))
        earlier, seconds = json.loads(base.with_suffix(".json").read_text("utf-8")), report["seconds"]
        taught = earlier["teach"] if top == 64 else seconds.get("teach", 0.0)
        row |= {f"{state}_{text}_ppl": round(report[state][text]["perplexity"], 4) for state in ("packed", "dense") for text in ("domain", "outside")}
        row |= {f"{text}_ppl": round(report["tuned"][text]["perplexity"], 4) for text in ("domain", "outside")}
        row |= {"kl": round(report["tuned"]["divergence"]["mean"], 4), "tune_seconds": round(seconds["tune"], 1)}
        row |= {"teach_seconds": round(taught, 1) if share else 0.0, "torch": torch.__version__, "compressor": __version__}
        for text in ("domain", "outside"):
            row |= {f"{text}_tokens": report["protocol"][text]["tokens"], f"{text}_sha256": report["protocol"][text]["data_sha256"][:16]}
        self.rows = sorted([*self.rows, row], key=place)
        write_rows(self.out, FIELDS, self.rows)
        print({key: row[key] for key in (*ARM[:-2], "domain_ppl", "outside_ppl", "kl", "teach_seconds", "tune_seconds")}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default="python")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--prune", type=float, default=0.0, help="share of the weights that loraprune takes away first")
    parser.add_argument("--tune", default="peqa")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, help="by default the tuner's own")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--tops", type=int, nargs="+", default=[64])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--max-tokens", type=int, default=32768, help="of each text that is measured")
    parser.add_argument("--work", type=Path, required=True, help="where the bases stay")
    parser.add_argument("--out", default="distill.csv")
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(a)
    for bits in a.bits:
        for top in a.tops:
            for share in a.shares:
                bench.arm(bits, share, top)


if __name__ == "__main__":
    main()
