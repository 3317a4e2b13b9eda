"""The same run twice, in fresh processes: the same bytes of every file of weights? And under other conditions, how much differs?

Each condition is one process that does all cases on `tiny`, each a short run with all its stages; `first` is what the others are compared with.

    again       another PYTHONHASHSEED, cases in the reverse order: must give the same bytes
    resumed     stopped after some linears were packed and again while training, then gone on with: must give the same bytes
    threads     two threads in place of one
    plain       plain torch in place of the compiled CPU kernels
    batches     one window at a time in evaluation, which only perplexity can feel

A row says how many files are equal, the share of codes that differ, the largest change of a scale, zero or table entry relative to the largest
of its tensor, that of tensors that are not packed alike, and the change of perplexity.

    python bench/determinism.py [--cases gptq,sketch] [--work FOLDER] [--out bench/results/determinism.csv]
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rows import write_rows
from soak_recipes import texts
from torch import Tensor

from compressor import __version__
from compressor.kernels import cpu
from compressor.pipelines import evaluate, load, write
from compressor.pipelines.export import export
from compressor.pipelines.projection import Target
from compressor.pipelines.run import run
from compressor.pipelines.show import Show
from compressor.recipe import Recipe

RESULTS = Path(__file__).resolve().parent / "results"
FIELDS = ["case", "condition", "must", "files", "equal", "codes_changed", "values_change", "dense_change", "perplexity", "perplexity_change",
          "threads", "instructions", "torch", "compressor"]  # fmt: skip
TUNE = {"steps": 6, "batch": 2, "checkpoint_every": 2, "eval_every": 0}
PRUNE = {"steps": 8, "batch": 2, "rank": 4}
CASES: dict[str, dict[str, Any]] = {
    "rtn": {"quant": {"packer": "rtn", "bits": 4}},
    "gptq": {"quant": {"packer": "gptq"}, "tune": TUNE | {"method": "peqa"}},
    "sketch": {"quant": {"packer": "sketch"}, "tune": TUNE | {"method": "table"}},
    "squeezellm": {"quant": {"packer": "squeezellm"}},
    "qalora": {"quant": {"packer": "rtn", "bits": 4}, "tune": TUNE | {"method": "qalora"}},
    "lora": {"quant": {"packer": "gptq"}, "tune": TUNE | {"method": "lora", "dropout": 0.1, "start": "loftq", "rank": 4}},
    "choose": {"quant": {"packer": "gptq"}, "choose": {"target_bits": 3.2, "candidates": ["w2g128", "w3g128", "w4g128"], "windows": 2}},
    "loraprune": {"quant": {"packer": "gptq"}, "prune": PRUNE | {"method": "loraprune", "ratio": 0.3, "multiple": 32}},
    "obert": {"quant": {"packer": "gptq"}, "prune": {"method": "obert", "ratio": 0.5, "pattern": "2:4", "gradients": 8}},
}
EXPORTS = {"rtn": ("gptq", "gguf:q4_0", "mlx", "bf16"), "sketch": ("compressed-tensors",)}
CONDITIONS = {"again": True, "resumed": True, "threads": False, "plain": False, "batches": False}  # whether bytes must be equal


class Stopping(Show):
    """Stops a run in the middle of a task, once for each of these labels."""

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Any]:
        done = 0

        def advance(count: int, note: str = "") -> None:
            nonlocal done
            done += count
            if label in self.labels and done >= max(1, 2 * total // 3):
                self.labels.remove(label)
                raise InterruptedError(label)

        yield advance


def child(condition: str, cases: list[str], work: Path) -> None:
    """All cases under a condition, each into work/condition/case."""
    torch.set_num_threads(2 if condition == "threads" else 1)
    evaluate.SAMPLE_TOKENS = 4
    if condition == "plain":
        cpu.why_not = lambda: "switched off"
    if condition == "batches":
        evaluate.BATCH_TOKENS = 1
    place, source = work / condition, work / "texts" / "notes.txt"
    for case in reversed(cases) if condition == "again" else cases:
        text = {"data": str(source), "outside": str(source), "nsamples": 8, "seqlen": 64}
        recipe = Recipe.from_dict({"model": "tiny", "device": "cpu", "data": text, "eval": {"max_tokens": 1024}} | CASES[case])
        show = Stopping(["prune", "compress", "tune"] if condition == "resumed" else [])
        for _ in range(4):
            with suppress(InterruptedError):
                run(recipe, place / case, show=show)
                break
        for to in EXPORTS.get(case, ()):
            target = Target(to, data=str(source), window=64, max_tokens=512, consumers=False) if to != "bf16" else Target(to, consumers=False)
            export(str(place / case), place / f"{case} as {to.replace(':', ' ')}", target)
        print(condition, case, file=sys.stderr, flush=True)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights in a folder, by its name."""
    files = sorted(path for kind in ("*.safetensors", "*.gguf") for path in folder.rglob(kind))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def change(old: Tensor, new: Tensor) -> float:
    """The largest difference, relative to the largest number of the old."""
    if old.shape != new.shape:
        return float("nan")
    return float((new.double() - old.double()).abs().max() / old.double().abs().max().clamp(min=1e-30)) if old.numel() else 0.0


def differences(first: Path, other: Path) -> dict[str, Any]:
    """What differs between two folders of the same recipe."""
    mine, theirs = (load.load(str(folder), "cpu") for folder in (first, other))
    old, new = load.packed_weights(mine.model), load.packed_weights(theirs.model)
    alike = [
        name
        for name in old
        if name in new and (old[name].bits, old[name].group, old[name].shape) == (new[name].bits, new[name].group, new[name].shape)
    ]
    changed = sum(int((old[name].codes() != new[name].codes()).sum()) for name in alike)
    values = [change(old[name].learned, new[name].learned) for name in alike]
    values += [change(a.float(), b.float()) for name in alike if (a := old[name].zero) is not None and (b := new[name].zero) is not None]
    before, after = write.dense_tensors(mine), write.dense_tensors(theirs)
    dense = [change(tensor, after[name]) for name, tensor in before.items() if name in after and tensor.is_floating_point()]
    total = sum(old[name].shape[0] * old[name].shape[1] for name in alike)
    return {
        "codes_changed": f"{changed / max(total, 1):.2g}",
        "values_change": f"{max(values, default=0.0):.2g}",
        "dense_change": f"{max(dense, default=0.0):.2g}",
    }


def told(folder: Path) -> float:
    report = json.loads((folder / "report.json").read_text("utf-8"))
    return float(next(report[name] for name in ("tuned", "packed", "pruned") if report.get(name))["domain"]["perplexity"])


def compare(condition: str, cases: list[str], work: Path) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        for name in (case, *(f"{case} as {to.replace(':', ' ')}" for to in EXPORTS.get(case, ()))):
            first, other = work / "first" / name, work / condition / name
            old, new = hashes(first), hashes(other)
            row: dict[str, Any] = {"case": name, "condition": condition, "must": CONDITIONS[condition], "files": len(old)}
            row |= {"equal": sum(new.get(key) == value for key, value in old.items()), "threads": 2 if condition == "threads" else 1}
            if name == case:
                was, now = told(first), told(other)
                row |= {"perplexity": round(was, 4), "perplexity_change": f"{now / was - 1:.1e}"} | differences(first, other)
            rows.append(row | {"instructions": cpu.instructions(), "torch": torch.__version__, "compressor": __version__})
    return rows


def spawn(condition: str, cases: list[str], work: Path) -> None:
    """A process of its own for a condition."""
    seed = "1" if condition == "again" else "0"
    environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "2" if condition == "threads" else "1"}
    subprocess.run([sys.executable, __file__, "--child", condition, "--cases", ",".join(cases), "--work", str(work)], env=environment, check=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "determinism.csv")
    parser.add_argument("--child")
    options = parser.parse_args()
    cases = options.cases.split(",")
    if options.child:
        child(options.child, cases, options.work)
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        work = Path(place)
        texts(work / "texts")
        spawn("first", cases, work)
        for condition in options.conditions.split(","):
            spawn(condition, cases, work)
            rows += compare(condition, cases, work)
            write_rows(options.out, FIELDS, rows)
    wrong = [f"{row['case']} {row['condition']}" for row in rows if row["must"] and row["equal"] != row["files"]]
    print(json.dumps({"rows": len(rows), "equal": sum(row["equal"] == row["files"] for row in rows), "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
