"""Sketches beside grids at equal bytes: perplexity before and after tuning, the ablations, and what a float32 master gains.

A table of 2**b entries costs as much as 2**b scales, so `sketch` with g tables a row stands beside RTN and GPTQ with g 2**b groups a row,
symmetric, float16 values all. Tuned: tables by `--tune table`, scales by `--tune peqa`, each at its default learning rate, same steps, same
tokens. With --released also SketchTune's released setting (entries trained at 8e-5, linear schedule, tables in bfloat16): once with parameters
and moments in bfloat16 as there, once with our float32 master, once with tables in float16 too.

Each finished row is kept: the same command goes on where it stopped. Rows of another version of the package are replaced.

    python bench/sketch.py --model tiny --released
    python bench/sketch.py --model ../shared/models/babyllama --data ../shared/data/tinystories/stories.txt
    python bench/sketch.py --model ../shared/models/stories260K --data ../shared/data/tinystories/stories.txt --ignore down_proj
"""

import argparse
import contextlib
import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import write_rows
from torch.optim.optimizer import register_optimizer_step_post_hook

from compressor import __version__
from compressor.pipelines import compress, data, evaluate, load, write
from compressor.recipe import Recipe
from compressor.tune import TUNERS, resolved
from compressor.tune.batches import CausalLM
from compressor.tune.loop import train

FIELDS = [
    "model", "arm", "packer", "bits", "gpr", "tune", "lr", "steps", "bits_per_weight", "entries", "layer_error", "domain_ppl", "outside_ppl",
    "pack_seconds", "tune_seconds", "domain_sha256", "outside_sha256", "window", "tokens", "threads", "torch", "compressor",
]  # fmt: skip
ABLATIONS = {
    "no refit": {"refit": False}, "no refit, uniform start": {"refit": False, "start": "uniform"}, "uniform start": {"start": "uniform"},
    "no feedback": {"feedback": False}, "neither": {"feedback": False, "refit": False}, "exponent 4": {"exponent": 4.0},
    "exponent 4, no refit": {"exponent": 4.0, "refit": False},
}  # fmt: skip
RELEASED = {"parametrization": "absolute", "lr": 8e-5, "schedule": "linear"}


def arms(bits: int, released: bool) -> Iterator[tuple[str, dict[str, Any], dict[str, Any] | None, bool]]:
    """Name, keys of Quant, keys of Tune or None, and whether parameters are kept in bfloat16."""
    for packer in ("rtn", "gptq"):
        quant = {"bits": bits, "packer": packer, "gpr": 1 << bits}
        yield packer, quant, None, False
        yield f"{packer} + peqa", quant, {"method": "peqa"}, False
    sketch = {"bits": bits, "packer": "sketch", "gpr": 1}
    yield "sketch", sketch, None, False
    yield "sketch + table", sketch, {"method": "table"}, False
    for gpr in (2, 4, 8):
        yield f"sketch, {gpr} tables a row", sketch | {"gpr": gpr}, None, False
    yield "gptq, as 2 tables a row", {"bits": bits, "packer": "gptq", "gpr": 2 << bits}, None, False
    yield "squeezellm", sketch | {"packer": "squeezellm"}, None, False
    for name, keys in ABLATIONS.items():
        yield f"sketch, {name}", sketch | keys, None, False
    if released:
        options = {"method": "table"} | RELEASED
        yield "released setting, bfloat16 parameters", sketch | {"scale_dtype": "bfloat16"}, options, True
        yield "released setting, float32 master of bfloat16 tables", sketch | {"scale_dtype": "bfloat16"}, options, False
        yield "released setting, float32 master of float16 tables", sketch, options, False


@contextlib.contextmanager
def bfloat16_parameters(wanted: bool) -> Iterator[None]:
    """After every step of an optimiser, round its parameters and moments to what bfloat16 tensors would hold."""

    def round_all(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                for t in (p.data, *(t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor) and t.dim())):
                    t.copy_(t.bfloat16())

    handle = register_optimizer_step_post_hook(round_all) if wanted else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


class Bench:
    def __init__(self, a: argparse.Namespace):
        self.a = a
        self.domain, self.outside = data.load(a.data), data.load_text(a.outside)

    def row(self, arm: str, quant: dict[str, Any], tune: dict[str, Any] | None, rounded: bool) -> dict[str, Any]:
        recipe = Recipe(model=self.a.model).with_(**{f"quant__{k}": v for k, v in quant.items()}, quant__ignore=tuple(self.a.ignore))
        loaded = load.load(self.a.model, "cpu")
        window = load.context(loaded.config)
        write.round_to_folder(loaded, {t.name for t in compress.plan(loaded.model, recipe.quant).packed()})
        ids = data.calibration(self.domain.train, loaded.tokenizer, window, recipe.data.nsamples, recipe.seed)
        start = time.perf_counter()
        dtype = load.scale_dtype(recipe.quant.scale_dtype, loaded.dtype)
        rows, _, _ = compress.compress(loaded.model, recipe.quant, dtype, ids if recipe.quant.packer != "rtn" else None)
        facts: dict[str, Any] = {"pack_seconds": round(time.perf_counter() - start, 1), "tune": "none"}
        if tune:
            options = resolved(recipe.with_(**{f"tune__{k}": v for k, v in tune.items()}).tune)
            windows = data.windows(self.domain.train, loaded.tokenizer, window)
            tuner, start = TUNERS[options.method](options), time.perf_counter()
            with bfloat16_parameters(rounded):
                log = train(loaded.model, tuner.attach(loaded.model), CausalLM(windows.ids, windows.labels), options, recipe.seed, None, "")
            tuner.detach(loaded.model)
            facts |= {"tune": options.method, "lr": options.lr, "steps": log.steps, "tune_seconds": round(time.perf_counter() - start, 1)}
        corpora = {"domain": self.domain.test, "outside": self.outside}
        found = evaluate.measure(loaded.model, loaded.tokenizer, corpora, window, self.a.max_tokens)
        packed, protocol = load.packed_weights(loaded.model), found["protocol"]
        return facts | {
            "model": Path(self.a.model).name, "arm": arm, "packer": quant["packer"], "bits": quant["bits"], "gpr": quant["gpr"],
            "bits_per_weight": round(write.bits_per_weight(packed), 4), "entries": sum(w.learned.numel() for w in packed.values()),
            "layer_error": "" if recipe.quant.packer == "rtn" else round(math.exp(sum(math.log(r["error"]) for r in rows) / len(rows)), 5),
            "domain_ppl": round(found["domain"]["perplexity"], 4), "outside_ppl": round(found["outside"]["perplexity"], 4),
            "domain_sha256": protocol["domain"]["data_sha256"][:16], "outside_sha256": protocol["outside"]["data_sha256"][:16],
            "window": protocol["domain"]["window"], "tokens": protocol["domain"]["tokens"], "threads": torch.get_num_threads(),
            "torch": torch.__version__, "compressor": __version__,
        }  # fmt: skip


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="tiny")
    ap.add_argument("--data", default="python")
    ap.add_argument("--outside", default="python-source")
    ap.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    ap.add_argument("--ignore", nargs="*", default=[])
    ap.add_argument("--released", action="store_true", help="SketchTune's released setting too")
    ap.add_argument("--max-tokens", type=int, default=65536)
    ap.add_argument("--out", type=Path, default=Path("bench/results/sketch.csv"))
    a = ap.parse_args()
    rows: list[dict[str, Any]] = []
    if a.out.exists():
        with a.out.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["compressor"] == __version__]
    done = {(row["model"], row["arm"], row["bits"]) for row in rows}
    bench = Bench(a)
    for bits in a.bits:
        for arm, quant, tune, rounded in arms(bits, a.released):
            if (Path(a.model).name, arm, str(bits)) in done:
                continue
            try:
                rows.append(bench.row(arm, quant, tune, rounded))
            except Exception as error:  # an arm that cannot be is a row that is missing, and says why
                print(f"{arm}, {bits} bits: {error}", flush=True)
                continue
            print({k: rows[-1].get(k) for k in ("model", "arm", "bits", "bits_per_weight", "layer_error", "domain_ppl", "outside_ppl")}, flush=True)
            write_rows(a.out, FIELDS, rows)


if __name__ == "__main__":
    main()
