"""Many short runs in a row in one process, each of a random recipe on a random tiny model: every one succeeds or gives the one expected error.

Recipes and models come from soak_recipes.py, run i from seed i, but for the folders that a run may tune again. An outcome is

    ok          the folder was loaded again, and measures what the report says of the model that was in memory; its bits are counted anew
                from the headers of its files; it was exported to a random format, or refused by that format in one sentence
    expected    a CompressorError, one sentence, before anything was measured, pruned or packed, and nothing was left behind
    FAILURE     anything else: another exception, an error after work was done, a folder that measures otherwise, bits that differ

A packed folder of an earlier run is now and then tuned as it is. Resident memory after every run is in its row. Rows go to bench/results/soak.csv;
those of runs that are not done now stay there, so --first and --runs repeat some, or do them in several processes.

    python bench/soak.py [--runs 200] [--first 0] [--work FOLDER] [--out bench/results/soak.csv]
"""

import argparse
import csv
import gc
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rows import write_rows
from safetensors import safe_open
from soak_recipes import CAUSAL, ENCODER, TINY, draw, make, texts, unknown

from compressor.errors import CompressorError, RecipeError
from compressor.pipelines import checkpoint, data, encoder_run, evaluate, load, writers
from compressor.pipelines.export import export
from compressor.pipelines.projection import Target
from compressor.pipelines.run import run
from compressor.pipelines.show import Show
from compressor.recipe import Recipe

RESULTS = Path(__file__).resolve().parent / "results"
FIELDS = ["run", "model", "asked", "outcome", "sentence", "stages", "perplexity", "again", "bits", "counted", "export", "export_outcome",
          "seconds", "rss_mb", "recipe"]  # fmt: skip
SAME = 1e-4  # relative difference of a perplexity, in memory and of the folder
NEAR = 1e-6  # of bits a weight


class Recorded(Show):
    """Knows which stages were begun."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Any]:
        self.stages.append(label)
        yield lambda count, note="": None


class Failure(Exception):
    """What the soak finds wrong itself."""


def kind_of(rng: random.Random) -> str:
    return rng.choices((TINY, ENCODER, *CAUSAL), (2.0, 2.0, *(1.5 for _ in CAUSAL)))[0]


def asked(recipe: dict[str, Any]) -> str:
    """The methods of a recipe in a word."""
    parts = [
        recipe.get("prune", {}).get("method"),
        recipe["quant"]["packer"] + str(recipe["quant"].get("bits", "")),
        recipe.get("tune", {}).get("method"),
    ]
    return "+".join(part for part in parts if part and part != "none") or "nothing"


def one(number: int, work: Path, kept: list[Path]) -> dict[str, Any]:
    """The row of a run."""
    rng, place, start = random.Random(number), work / "now", time.perf_counter()
    shutil.rmtree(place, ignore_errors=True)
    again = rng.random() < 0.1 and bool(kept)
    kind = CAUSAL[0] if again else kind_of(rng)
    model: Path | str = rng.choice(kept) if again else make(rng, kind, place / "model")
    recipe = draw(rng, kind, TINY if kind == TINY else model, work / "texts", again)
    row: dict[str, Any] = {"run": number, "model": "packed folder" if again else kind, "asked": asked(recipe), "outcome": "ok"}
    row["recipe"] = json.dumps(recipe | {"model": row["model"]}).replace(str(work) + "/", "")
    show, out = Recorded(), place / "out"
    try:
        done = run(Recipe.from_dict(recipe), out, show=show)
        if recipe.get("save") != "task":
            row |= checked(out, done, recipe, kind == ENCODER) | exported(rng, out, place / "export")
            keep(rng, out, work / f"kept-{number}", kept)
    except CompressorError as error:
        clean = not show.stages and not out.exists() and not out.with_name("out.partial").exists()
        row |= {"outcome": "expected" if clean else "FAILURE", "sentence": f"{type(error).__name__}: {error}".replace(str(work), "WORK")}
    except Failure as error:
        row |= {"outcome": "FAILURE", "sentence": str(error)}
    except Exception as error:
        traceback.print_exc()
        row |= {"outcome": "FAILURE", "sentence": f"crash: {type(error).__name__}: {str(error)[:300]}"}
    gc.collect()
    return row | {"stages": len(show.stages), "seconds": round(time.perf_counter() - start, 1), "rss_mb": round(resident() / 1e6)}


def checked(out: Path, done: dict[str, Any], recipe: dict[str, Any], encoder: bool) -> dict[str, Any]:
    """What the folder measures and stores when it is loaded anew; Failure where that is not what the run said."""
    last = next(done[name] for name in ("tuned", "packed", "pruned") if done.get(name))
    own = Recipe.from_dict(yaml.safe_load((out / "recipe.yaml").read_text("utf-8")))
    found: dict[str, Any] = {}
    if encoder:
        seen = encoder_run.evaluate_encoder(str(out), own.data.data or "", "cpu", Show(), own.data.seqlen)["loss"]
        told = last["task"]["loss"]
    else:
        loaded = load.load(str(out), "cpu")
        window = load.context(loaded.config, own.eval.window or own.data.seqlen)
        texts = {"domain": data.load(own.data.data or "python").test}
        with torch.no_grad():
            seen = evaluate.measure(loaded.model, loaded.tokenizer, texts, window, own.eval.max_tokens)["domain"]["perplexity"]
        told = last["domain"]["perplexity"]
        found["perplexity"] = round(seen, 3)
    if not math.isfinite(seen) or abs(seen - told) > SAME * abs(told):
        raise Failure(f"the folder measures {seen}, and the run said {told}")
    found["again"] = f"{abs(seen - told) / max(abs(told), 1e-9):.1e}"
    return found | counted(out, last["bits_per_weight"])


def counted(out: Path, told: float) -> dict[str, Any]:
    """Bits a weight by the headers of the folder's files, where it holds scales or tables as such; Failure where the run counted otherwise."""
    report = json.loads((out / "report.json").read_text("utf-8"))
    row: dict[str, Any] = {"bits": round(told, 4)}
    if not report.get("layers") or report["export"]["format"] not in ("compressed-tensors pack-quantized", "compressor table"):
        return row
    bits, shapes = 0, {layer["name"]: layer["shape"] for layer in report["layers"]}
    for path in checkpoint.weight_files(out):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, leaf = key.rpartition(".")
                if name in shapes and leaf not in ("bias", "weight_shape"):
                    tensor = file.get_tensor(key)
                    bits += 8 * tensor.numel() * tensor.element_size()
    found = bits / sum(n * k for n, k in shapes.values())
    if found < told * (1 - NEAR) or found > told * 1.05 + 0.1:  # words of 32 bits have room at the end of a row
        raise Failure(f"the files hold {found} bits a weight, and the run said {told}")
    return row | {"counted": round(found, 4)}


def exported(rng: random.Random, out: Path, place: Path) -> dict[str, Any]:
    """The folder in a format drawn from all that there are; a refusal is one sentence and leaves nothing."""
    to = rng.choice([*writers.FOLDERS, *(f"gguf:{kind}" for kind in writers.TYPES), *writers.DTYPES])
    try:
        export(
            str(out), place, Target(to, max_tokens=128, window=32, device="cpu", consumers=False) if writers.of(to) else Target(to, consumers=False)
        )
    except CompressorError as error:
        if place.exists():
            raise Failure(f"export to {to} failed and left a folder: {error}") from None
        return {"export": to, "export_outcome": f"refused: {str(error).replace(str(out), 'OUT')[:200]}"}
    return {"export": to, "export_outcome": "ok"}


def keep(rng: random.Random, out: Path, place: Path, kept: list[Path]) -> None:
    """Now and then a packed folder stays, to be tuned as it is later."""
    config = checkpoint.any_config(out)
    if config.get("quantization_config") and "Bert" not in config["architectures"][0] and rng.random() < 0.3 and len(kept) < 8:
        kept.append(Path(shutil.copytree(out, place, dirs_exist_ok=True)))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.csv")
    options = parser.parse_args()
    if strange := unknown():
        raise RecipeError(f"bench/soak_recipes.py draws no values for {', '.join(strange)}: add them to VALUES")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    evaluate.SAMPLE_TOKENS = 4
    numbers, rows, others = range(options.first, options.first + options.runs), list[dict[str, Any]](), list[dict[str, Any]]()
    if options.out.exists():
        with options.out.open(newline="", encoding="utf-8") as file:
            others = [row for row in csv.DictReader(file) if int(row["run"]) not in numbers]
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        work, kept = Path(place), list[Path]()
        texts(work / "texts")
        for number in numbers:
            rows.append(one(number, work, kept))
            write_rows(options.out, FIELDS, sorted(others + rows, key=lambda row: int(row["run"])))
            told = " ".join(str(rows[-1].get(key, "")) for key in ("run", "model", "asked", "outcome", "export", "seconds", "rss_mb", "sentence"))
            print(told, file=sys.stderr, flush=True)
    counts = Counter(row["outcome"] for row in rows)
    print(json.dumps({"runs": len(rows)} | counts | {"seconds": round(sum(row["seconds"] for row in rows)), "rss_mb": rows[-1]["rss_mb"]}))
    return 1 if counts["FAILURE"] else 0


if __name__ == "__main__":
    sys.exit(main())
