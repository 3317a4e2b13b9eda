"""Bits chosen by layer beside uniform recipes: the front of uniform packing, and what the choice reaches at sizes of that front and between.

Every row is a whole run with the same calibration windows and the same packer, in a process of its own; sizes are those of the written folders.
`loss_predicted` is the sum of the units' damages, `loss_reached` the KL to the dense model that the packed one really has, nats a token on the
sample. `front` says, for a chosen row, the perplexity of the best uniform recipe that keeps to its size; `better` is the share by which the choice is
below it. With --tune the values of every row are tuned afterwards.

    python bench/choose.py --model tiny --sizes 0.9MB 0.975MB 1.02MB
    python bench/choose.py --model ../shared/models/babyllama --data ../shared/data/tinystories/stories.txt --group 32
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import write_rows

FIELDS = [
    "model", "arm", "target", "measure", "tune", "bits_per_weight", "folder_bytes", "domain_ppl", "outside_ppl", "tuned_domain_ppl",
    "tuned_outside_ppl", "dense_ppl", "front", "better", "tuned_front", "tuned_better", "loss_predicted", "loss_reached", "seconds_choosing",
    "seconds", "data_sha256", "window", "tokens", "torch", "compressor",
]  # fmt: skip


class Bench:
    def __init__(self, a: argparse.Namespace, work: Path):
        self.a, self.work = a, work
        self.rows: list[dict[str, Any]] = []

    def run(self, arm: str, *flags: str) -> dict[str, Any]:
        """A run with these flags, as a row."""
        folder = self.work / f"run{len(self.rows)}"
        fixed = ["--data", self.a.data, "--tune", self.a.tune, "-o", str(folder)]
        done = subprocess.run([sys.executable, "-m", "compressor", "run", self.a.model, *fixed, *flags], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{arm}: {done.stderr.strip().splitlines()[-1]}")
        report = json.loads((folder / "report.json").read_text("utf-8"))
        shutil.rmtree(folder)
        choice, protocol, seconds = report.get("choice", {}), report["protocol"]["domain"], report["seconds"]
        row = {
            "model": Path(self.a.model).name, "arm": arm, "tune": self.a.tune, "bits_per_weight": round(report["packed"]["bits_per_weight"], 4),
            "folder_bytes": report["packed"]["folder_bytes"], "domain_ppl": round(report["packed"]["domain"]["perplexity"], 4),
            "outside_ppl": round(report["packed"]["outside"]["perplexity"], 4), "dense_ppl": round(report["dense"]["domain"]["perplexity"], 4),
            "seconds_choosing": round(seconds.get("choose", 0.0), 1), "seconds": round(sum(seconds.values()), 1),
            "data_sha256": protocol["data_sha256"][:16], "window": protocol["window"], "tokens": protocol["tokens"],
            "torch": report["environment"]["torch"], "compressor": report["compressor"],
        }  # fmt: skip
        if self.a.tune != "none":
            row |= {f"tuned_{text}_ppl": round(report["tuned"][text]["perplexity"], 4) for text in ("domain", "outside")}
        if choice:
            row |= {"target": json.dumps(choice["target"]), "measure": choice["measure"]}
            row |= {f"loss_{when}": round(choice[when]["loss"], 4) for when in ("predicted", "reached") if "loss" in choice[when]}
            self._beside(row, "domain_ppl", "front", "better")
            if self.a.tune != "none":
                self._beside(row, "tuned_domain_ppl", "tuned_front", "tuned_better")
        self.rows.append(row)
        print({key: row[key] for key in FIELDS[1:18] if key in row}, flush=True)
        return row

    def same(self, row: dict[str, Any]) -> bool:
        """Whether a row of the result file is of this model and tuner."""
        return (row["model"], row["tune"]) == (Path(self.a.model).name, self.a.tune)

    def _beside(self, row: dict[str, Any], key: str, front: str, better: str) -> None:
        """The best uniform recipe of the size or the bits that were asked for, or, for a target of loss, no larger than the folder."""
        asked = json.loads(row["target"])
        by, most = (
            ("bits_per_weight", asked["target_bits"]) if "target_bits" in asked else ("folder_bytes", asked.get("target_size", row["folder_bytes"]))
        )
        fits = [float(r[key]) for r in self.rows if r["arm"].startswith("uniform") and float(r[by]) <= most]
        if fits:
            row |= {front: min(fits), better: round(1 - row[key] / min(fits), 4)}

    def go(self) -> None:
        groups = [self.a.group >> i for i in range(3) if i == 0 or self.a.group >> i >= 32]
        if self.a.keep:
            self.rows = [
                row for row in kept(self.a.out) if self.same(row) and not (row["arm"].startswith("chosen") and row["measure"] in self.a.measures)
            ]
        uniform = {row["arm"].removeprefix("uniform "): row for row in self.rows}
        for spec in (f"w{bits}g{group}" for bits in (2, 3, 4) for group in groups):
            uniform[spec] = uniform.get(spec) or self.run(f"uniform {spec}", "--quant", spec)
        usual = [int(uniform[f"w{bits}g{self.a.group}"]["folder_bytes"]) for bits in (2, 3, 4)]
        sizes = self.a.sizes or [(usual[0] + usual[1]) // 2, usual[1], (usual[1] + usual[2]) // 2]
        base = ["--group", str(self.a.group)]
        for measure in self.a.measures:
            for size in sizes:
                self.run(f"chosen by {measure}", *base, "--target-size", str(size), "--sensitivity", measure)
            self.run(f"chosen by {measure}", *base, "--target-bits", str(uniform[f"w3g{self.a.group}"]["bits_per_weight"]), "--sensitivity", measure)
        for loss in self.a.losses:
            self.run("chosen by kl", *base, "--max-loss", loss)


def kept(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file that is there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="tiny")
    ap.add_argument("--data", default="python")
    ap.add_argument("--group", type=int, default=128)
    ap.add_argument("--sizes", nargs="*", help="target sizes; default: between 2 and 3 bits, at 3, and between 3 and 4")
    ap.add_argument("--measures", nargs="+", default=["kl", "error"])
    ap.add_argument("--losses", nargs="*", default=["5%"])
    ap.add_argument("--tune", default="none")
    ap.add_argument("--keep", action="store_true", help="of the result file's rows those that are not measured here: uniform ones, other measures")
    ap.add_argument("--out", type=Path, default=Path("bench/results/choose.csv"))
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(a, Path(work))
        bench.go()
    write_rows(a.out, FIELDS, [row for row in kept(a.out) if not bench.same(row)] + bench.rows)


if __name__ == "__main__":
    main()
