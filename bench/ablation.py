"""What each part of the preset `best` brings at 2 and 3 bits, and its seconds: whole runs with PEQA, one part switched off or on at a time.

One row a run: perplexity in domain and outside, packed and tuned, the bits that were stored, and seconds of the stages that the part is in. Windows,
seed and steps are the same in all rows. A row is kept as soon as it is there, and the same command goes on where it stopped.

    python bench/ablation.py --model tiny --bits 3
    python bench/ablation.py --model ../shared/models/babyllama --data ../shared/data/tinystories/stories.txt --group 32 --bits 2
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rows import write_rows

from compressor import __version__, presets
from compressor.pipelines import reconstruct
from compressor.pipelines.run import run
from compressor.recipe import Recipe

BEST = presets.keys("best", {}, tuned=True, alone=True)
ARMS: dict[str, dict[str, Any]] = {
    "fast": {"quant__packer": "gptq"},
    "fast, three sweeps": {"quant__packer": "gptq", "quant__sweeps": 3},
    "standard": {"quant__packer": "block"},
    "standard, errors of all directions alike": {"quant__packer": "block"},
    "standard, rounding only": {"quant__packer": "round"},
    "standard and end to end": {"quant__packer": "block", "quant__end_to_end": BEST["quant__end_to_end"]},
    "standard and distillation": {"quant__packer": "block", "tune__distill": BEST["tune__distill"]},
    "standard and learned rotation": {"quant__packer": "block", "quant__rotate": "learned"},
    "best": BEST,
    "best, blocks not trained": BEST | {"quant__packer": "gptq"},
    "best, not end to end": BEST | {"quant__end_to_end": 0},
    "best, no distillation": BEST | {"tune__distill": 0.0},
}
STAGES = ("rotate", "choose", "compress", "teach", "end-to-end", "tune")
FIELDS = [
    "model", "arm", "bits", "group", "bits_per_weight", "packed_domain", "packed_outside", "tuned_domain", "tuned_outside", "dense_domain",
    "dense_outside", *(f"{stage}_seconds" for stage in STAGES), "folder_bytes", "steps", "nsamples", "seed", "threads", "torch", "compressor",
]  # fmt: skip
ALIKE = "standard, errors of all directions alike"


def row(a: argparse.Namespace, arm: str, bits: int) -> dict[str, Any]:
    recipe = Recipe(model=a.model, seed=a.seed).with_(
        quant__bits=bits, quant__group=a.group, data__data=a.data, data__nsamples=a.nsamples, tune__method="peqa", tune__steps=a.steps, **ARMS[arm]
    )
    felt = reconstruct.FELT
    reconstruct.FELT = 0.0 if arm == ALIKE else felt
    try:
        with tempfile.TemporaryDirectory() as place:
            run(recipe, Path(place) / "out")
            report = json.loads((Path(place) / "out" / "report.json").read_text("utf-8"))
    finally:
        reconstruct.FELT = felt
    found = {
        f"{state}_{text}": round(report[state][text]["perplexity"], 4) for state in ("dense", "packed", "tuned") for text in ("domain", "outside")
    }
    found |= {f"{stage}_seconds": round(report["seconds"].get(stage, 0.0), 1) for stage in STAGES}
    return found | {
        "model": Path(a.model).name, "arm": arm, "bits": bits, "group": a.group, "bits_per_weight": round(report["tuned"]["bits_per_weight"], 4),
        "folder_bytes": report["tuned"]["folder_bytes"], "steps": a.steps, "nsamples": a.nsamples, "seed": a.seed,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "compressor": __version__,
    }  # fmt: skip


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="tiny")
    ap.add_argument("--data", default="python")
    ap.add_argument("--group", type=int, default=128)
    ap.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    ap.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    ap.add_argument("--steps", type=int, default=100)
    ap.add_argument("--nsamples", type=int, default=128)
    ap.add_argument("--seed", type=int, default=42)
    ap.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ablation.csv")
    a = ap.parse_args()
    rows: list[dict[str, Any]] = []
    if a.out.exists():
        with a.out.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    done = {(each["model"], each["arm"], each["bits"], each["seed"]) for each in rows}
    for bits in a.bits:
        for arm in a.arms:
            if (Path(a.model).name, arm, str(bits), str(a.seed)) in done:
                continue
            rows.append(row(a, arm, bits))
            print({key: rows[-1][key] for key in FIELDS[:16]}, flush=True)
            write_rows(a.out, FIELDS, rows)


if __name__ == "__main__":
    main()
