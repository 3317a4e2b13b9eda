"""Experiments that take no time: what a run would leave behind, with numbers made of its recipe."""

import json
import threading
from pathlib import Path
from typing import Any

import yaml

from compressor.pipelines.report import Report
from compressor.pipelines.sweeps.child import Outcome
from compressor.pipelines.sweeps.grid import Experiment
from compressor.pipelines.sweeps.store import Folder

GRID = {"quant.bits": [4, 3, 2], "quant.packer": ["rtn", "gptq"], "tune": ["none", "peqa"]}


def write_grid(path: Path, grid: Any = GRID) -> Path:
    path.write_text(yaml.safe_dump(grid, sort_keys=False), "utf-8")
    return path


class Runner:
    """Counts what it runs; experiments whose id starts as `fails` says come to nothing."""

    def __init__(self, fails: str | None = None, together: threading.Barrier | None = None):
        self.ran, self.fails, self.together = list[str](), fails, together

    def __call__(self, experiment: Experiment, folder: Folder, timeout: float | None) -> Outcome:
        self.ran.append(experiment.id)
        if self.together is not None and len(self.ran) == 1:
            self.together.wait(20)  # both workers are at work at once
        if self.fails is not None and experiment.id.startswith(self.fails):
            return Outcome("the disk of the tests is full", 0.5)
        write_run(experiment, folder.run(experiment.id))
        return Outcome(None, 2.0)


def write_run(experiment: Experiment, folder: Path) -> None:
    """What `compressor run` leaves behind, in few bytes: better and larger with more bits, better by gptq and by tuning."""
    assert experiment.recipe is not None
    quant, tuned = experiment.recipe.quant, experiment.recipe.tune.method != "none"
    ppl = 100 / quant.bits - 5 * (quant.packer == "gptq")
    text = lambda value: {"perplexity": value, "tokens": 100, "tokens_per_second": 50.0}
    state = lambda value, size: {"domain": text(value), "outside": text(2 * value), "bits_per_weight": quant.bits + 0.125, "folder_bytes": size}
    report = Report(recipe=experiment.recipe.to_dict(), dense=state(20.0, 10_000) | {"bits_per_weight": 16.0}, packed=state(ppl, 1000 * quant.bits))
    report.tuned = state(ppl - 1, 1000 * quant.bits) | {"tasks": {"boolq": {"metric": "accuracy", "value": 0.6, "stderr": 0.1}}} if tuned else {}
    report.seconds, report.peak_bytes = {"compress": 1.0}, {"compress": 1_000_000}
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text("{}")
    report.save(folder / "report.json")


def table(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a sweep's folder by id."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}
