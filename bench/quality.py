"""The headline table: what compression costs a model, by our methods and by those of others, on the same texts in the same run.

One row an arm and width: bits per weight from the bytes of everything that is stored of the packed linears, perplexity in domain and out of it,
accuracy on multiple-choice questions cut from the held-out text (continuations.py), processor seconds and peak memory. A process of its own makes
each arm's folder (quality_arms.py, of peers quality_peers.py in the library's virtual environment), so that seconds and memory are its own; one more
process loads and measures all folders. Peers get the token ids of our calibration windows, and whatever is tuned sees the same windows for the same
number of steps at its method's default rate. A row is kept as soon as it is there: the same command goes on where it stopped, an arm that failed is
a row with the reason, and a row without accuracy is measured again from its folder.

    python bench/quality.py --model tiny --steps 100 --max-tokens 28672 --work DIR          (as the rows of results/quality.csv)
    python bench/quality.py --model ../shared/models/babyllama --data ../shared/data/tinystories/stories.txt --group 32 --work DIR
    python bench/quality.py --model tiny --work DIR --only "GPTQ" --bits 3 --again

--venv NAME=PYTHON: an interpreter that has a library already; else a virtual environment is made below --work. Limits: models of a million
parameters, one seed; their LoRA adapters and indexes weigh more, and packing loses more, than on a large model.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import continuations
from rows import write_rows
from safetensors.torch import save_file

from compressor import __version__
from compressor.pipelines import checkpoint, data, load
from compressor.recipe import Recipe

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "interop"))

from run import QUIET, STEPS, Step, make_venv  # noqa: E402

FIELDS = [
    "model", "arm", "bits", "group", "symmetric", "library", "version", "base", "lr", "steps", "trainable", "bits_per_weight", "adapter_bits",
    "domain_ppl", "outside_ppl", "accuracy", "accuracy_stderr", "pack_seconds", "tune_seconds", "peak_mb", "imports_mb", "settings", "failed",
    "nsamples", "seed", "window", "domain_tokens", "outside_tokens", "domain_sha256", "outside_sha256", "questions", "task", "task_sha256",
    "task_engine", "threads", "torch", "compressor",
]  # fmt: skip
DENSE_RATES = (1e-4, 3e-4, 1e-3)
MINUTES = 20  # of one process
PACKAGES = {
    "gptqmodel": STEPS["gptqmodel"].pip, "hqq": ("hqq==0.2.8.post1",), "llmcompressor": ("llmcompressor==0.14.0.1",),
    "autoround": ("auto-round==0.16.1",),
}  # fmt: skip
QUESTIONS = 300


@dataclass(frozen=True)
class Arm:
    """A row of the table. kind: how quality_arms.py makes it; base: the arm of the same width whose folder it tunes; library: of a peer."""

    name: str
    kind: str
    base: str = ""
    library: str = ""
    bits: tuple[int, ...] = (4, 3, 2)
    keys: dict[str, Any] = field(default_factory=dict)


def ours() -> dict[str, str]:
    """The environment of processes that import compressor."""
    return os.environ | QUIET | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}


def peer(name: str, library: str, **options: Any) -> Arm:
    return Arm(name, "peer", library=library, keys={"options": options})


ARMS = (
    Arm("dense", "dense", bits=(16,)),
    Arm("RTN", "packed", keys={"packer": "rtn"}),
    Arm("GPTQ", "packed", keys={"packer": "gptq"}),
    Arm("block-wise", "packed", keys={"packer": "block"}),
    Arm("preset best", "preset"),
    Arm("sketch", "packed", keys={"packer": "sketch"}),
    peer("GPTQModel", "gptqmodel"),
    peer("GPTQModel, scale search", "gptqmodel", mse=2.0),
    peer("llm-compressor GPTQ", "llmcompressor"),
    peer("llm-compressor GPTQ, mse observer", "llmcompressor", observer="memoryless_mse"),
    peer("HQQ", "hqq"),
    Arm("EfficientQAT Block-AP, published rates", "block", keys={"chosen": False}),
    Arm("EfficientQAT Block-AP", "block", keys={"chosen": True}),
    Arm("bitsandbytes NF4", "nf4", library="bitsandbytes", bits=(4,), keys={"tune": ""}),
    Arm("GPTQ + PEQA", "tuned", base="GPTQ", keys={"tune": "peqa"}),
    Arm("block-wise + PEQA", "tuned", base="block-wise", keys={"tune": "peqa"}),
    Arm("preset best + PEQA", "tuned", base="preset best", keys={"tune": "peqa"}),
    Arm("EfficientQAT", "tuned", base="EfficientQAT Block-AP", keys={"tune": "peqa"}),
    Arm("sketch + table tuning", "tuned", base="sketch", keys={"tune": "table"}),
    Arm("GPTQ + LoRA", "tuned", base="GPTQ", keys={"tune": "lora"}),
    peer("auto-round", "autoround"),
    Arm("pruned, GPTQ", "pruned", bits=(3,)),
    Arm("pruned, GPTQ + PEQA", "tuned", base="pruned, GPTQ", bits=(3,), keys={"tune": "peqa", "half": True}),
    Arm("bitsandbytes NF4 + LoRA", "nf4", library="bitsandbytes", bits=(4,), keys={"tune": "lora"}),
    *(Arm(f"dense tuned, {rate:g}", "full", bits=(16,), keys={"lr": rate}) for rate in DENSE_RATES),
    Arm("RTN + PEQA", "tuned", base="RTN", keys={"tune": "peqa"}),
)  # fmt: skip


class Bench:
    """One model with its texts, its calibration windows and its questions as files below --work, and the rows of the result file."""

    def __init__(self, a: argparse.Namespace):
        self.a, self.name, recipe = a, Path(a.model).name, Recipe()
        self.work = a.work.resolve() / self.name
        self.work.mkdir(parents=True, exist_ok=True)
        splits, source = data.load(a.data), checkpoint.resolve(a.model)
        self.common = {
            "model": str(source.resolve()), "data": a.data, "outside": a.outside, "group": a.group, "max_tokens": a.max_tokens, "steps": a.steps,
            "epochs": recipe.tune.epochs, "nsamples": recipe.data.nsamples, "seed": recipe.seed, "ids": str(self.work / "ids.safetensors"),
            "task": "" if a.no_task else str(self.work / "continuations.jsonl"),
        }  # fmt: skip
        window = load.context(checkpoint.read_config(source))
        ids = data.calibration(splits.train, load.load_tokenizer(source), window, recipe.data.nsamples, recipe.seed)
        save_file({"ids": ids}, self.common["ids"])
        continuations.write(self.work / "continuations.jsonl", [d.text for d in splits.test.documents], QUESTIONS)
        self.measuring: subprocess.Popen[str] | None = None
        self.rows: list[dict[str, Any]] = []
        if a.out.exists():
            with a.out.open(newline="") as file:
                self.rows = list(csv.DictReader(file))
        self.venvs = dict(pair.split("=", 1) for pair in a.venv)

    def row(self, arm: str, bits: int) -> dict[str, Any] | None:
        """The kept row of an arm."""
        return next((r for r in self.rows if (r["model"], r["arm"], str(r["bits"])) == (self.name, arm, str(bits))), None)

    def folder(self, arm: str, bits: int) -> Path:
        return self.work / f"{arm.replace(', ', '-').replace(' ', '_')}-{bits}"

    def state(self, arm: Arm, bits: int) -> str:
        """done, open, or kept: there, but for its accuracy."""
        row = self.row(arm.name, bits)
        if row is None or self.a.again:
            return "open"
        if row["failed"] or not self.common["task"] or row["accuracy"]:
            return "done"
        return "open" if arm.kind == "nf4" else "kept"

    def make(self, arm: Arm, bits: int) -> dict[str, Any]:
        """The new row of an arm; RuntimeError with what its process said last."""
        old = (self.row(arm.name, bits) or {}) if self.state(arm, bits) == "kept" else {}
        folder = self.folder(arm.name, bits)
        folder.parent.mkdir(exist_ok=True)
        base = self.row(arm.base, bits) if arm.base else None
        if arm.base and (base is None or base["failed"]):
            raise RuntimeError(f"there is no {arm.base} to tune")
        job = self.common | {"kind": arm.kind, "bits": bits, "library": arm.library, "folder": str(folder)} | arm.keys
        job["base"] = str(self.folder(arm.base, bits)) if arm.base else ""
        found: dict[str, Any] = {}
        if not old and arm.kind != "dense":
            shutil.rmtree(folder, ignore_errors=True)
            python, script = (self.python(arm.library), "quality_peers.py") if arm.kind == "peer" else (sys.executable, "quality_arms.py")
            found = self.ask(python, script, job)
        found |= {} if arm.kind == "nf4" else self.measured(job)
        seconds = found.pop("seconds", 0.0)
        row = {"model": self.name, "arm": arm.name, "bits": bits, "group": self.a.group, "symmetric": True, "library": arm.library, "base": arm.base}
        row |= (
            {key: self.common[key] for key in ("nsamples", "seed")}
            | {"task": Path(self.common["task"]).name, "compressor": __version__}
            | old
            | found
        )
        if old or arm.kind == "dense":
            return row
        tunes = arm.kind in ("tuned", "full") or arm.keys.get("tune")
        row |= {"tune_seconds" if tunes else "pack_seconds": round(seconds, 1)}
        if base is not None:
            row |= {"pack_seconds": base["pack_seconds"], "peak_mb": max(float(base["peak_mb"]), found["peak_mb"])}
            row["symmetric"] = base["symmetric"]
            row["settings"] = "; ".join(part for part in (row["settings"], base["settings"]) if part)
        return row

    def measured(self, job: dict[str, Any]) -> dict[str, Any]:
        """What the measuring process says of the job's folder."""
        path = self.work / "measure.json"
        path.write_text(json.dumps(job), "utf-8")
        if self.measuring is None or self.measuring.poll() is not None:
            command = [sys.executable, str(HERE / "quality_arms.py"), "--serve"]
            with (self.work / "measure.log").open("a") as log:
                self.measuring = subprocess.Popen(command, env=ours(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        there, back = self.measuring.stdin, self.measuring.stdout
        assert there is not None and back is not None
        there.write(f"{path}\n")
        there.flush()
        for line in back:
            if line.startswith("{"):
                found = json.loads(line)
                if "failed" in found:
                    raise RuntimeError(found["failed"])
                return found
        raise RuntimeError(f"the measuring process ended; {self.work / 'measure.log'} says why")

    def ask(self, python: str, script: str, job: dict[str, Any]) -> dict[str, Any]:
        """The last line that a script prints for a job."""
        path = self.work / "job.json"
        path.write_text(json.dumps(job), "utf-8")
        env = ours() if python == sys.executable else {key: value for key, value in (os.environ | QUIET).items() if key != "PYTHONPATH"}
        ran = subprocess.run(
            [python, str(HERE / script), str(path)], env=env, capture_output=True, text=True, errors="replace", timeout=60 * MINUTES, check=False
        )
        lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
        if ran.returncode or not lines:
            said = (line.strip()[:300] for line in reversed(ran.stderr.splitlines()) if line.strip())
            raise RuntimeError(next(said, f"it ended with {ran.returncode}"))
        return json.loads(lines[-1])

    def python(self, library: str) -> str:
        if library not in self.venvs:
            self.venvs[library] = str(make_venv(self.a.work.resolve() / "venvs" / library, Step(PACKAGES[library], ())))
        return self.venvs[library]

    def go(self, todo: Iterator[tuple[Arm, int]]) -> None:
        for arm, bits in todo:
            if self.state(arm, bits) == "done":
                continue
            start = time.perf_counter()
            try:
                row = self.make(arm, bits)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                row = {
                    "model": self.name,
                    "arm": arm.name,
                    "bits": bits,
                    "library": arm.library,
                    "failed": str(error)[:300],
                    "compressor": __version__,
                }
            self.keep({key: row.get(key, "") for key in FIELDS})
            shown = ("arm", "bits", "bits_per_weight", "domain_ppl", "outside_ppl", "accuracy", "pack_seconds", "tune_seconds", "peak_mb", "failed")
            print({key: row[key] for key in shown if row.get(key, "") != ""} | {"wall": round(time.perf_counter() - start, 1)}, flush=True)

    def keep(self, new: dict[str, Any]) -> None:
        """Writes the rows with a new one, in the order of ARMS within a model; those of another run beside this one stay."""
        key = lambda row: (row["model"], row["arm"], str(row["bits"]))
        order = {arm.name: number for number, arm in enumerate(ARMS)}
        if self.a.out.exists():
            with self.a.out.open(newline="") as file:
                self.rows = list(csv.DictReader(file))
        self.rows = [row for row in self.rows if key(row) != key(new)] + [new]
        models = list(dict.fromkeys(row["model"] for row in self.rows))
        self.rows.sort(key=lambda row: (models.index(row["model"]), -int(row["bits"]), order.get(row["arm"], len(order))))
        write_rows(self.a.out, FIELDS, self.rows)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="tiny")
    ap.add_argument("--data", default="python")
    ap.add_argument("--outside", default="python-source")
    ap.add_argument("--group", type=int, default=128)
    ap.add_argument("--bits", type=int, nargs="+", default=[16, 4, 3, 2], help="16: the dense arms")
    ap.add_argument("--only", nargs="+", help="arms by name; all others are left as they are")
    ap.add_argument("--steps", type=int, help="of tuning; by default three epochs")
    ap.add_argument("--max-tokens", type=int, default=65536, help="of each text that is measured")
    ap.add_argument("--work", type=Path, required=True, help="where virtual environments and the folders of all arms stay")
    ap.add_argument("--venv", nargs="*", default=[], metavar="NAME=PYTHON", help=f"interpreters that have a library: {', '.join(PACKAGES)}")
    ap.add_argument("--again", action="store_true", help="make arms anew that have rows")
    ap.add_argument("--no-task", action="store_true", help="leave the accuracy out")
    ap.add_argument("--out", type=Path, default=HERE / "results" / "quality.csv")
    a = ap.parse_args()
    Bench(a).go((arm, bits) for arm in ARMS for bits in arm.bits if bits in a.bits and (not a.only or arm.name in a.only))


if __name__ == "__main__":
    main()
