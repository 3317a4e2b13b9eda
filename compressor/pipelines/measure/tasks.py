"""Accuracy on tasks, measured by lm-evaluation-harness on the model as it is: task files of this machine, and hub tasks by name.

A name that ends in .jsonl or .json, or looks like a path, is a file (task_files.py says in which shapes); every other name must be one of lm-eval's
own, whose data comes from the hub. Names are checked without a network and without a model.

Shots. 0 leaves a hub task what its authors chose (GSM8K: 5) and shows no examples before the questions of a file. The result always says how many
were shown. A file takes them from its sibling (train.json beside test.json), drawn by the seed.

Limits: a hub task that runs generated code, needs pictures, or is only a tag of several tasks is refused. `value_normalised` is lm-eval's acc_norm
(log-likelihood by characters of the choice); by bytes it is among the metrics as acc_bytes. Standard errors are lm-eval's: s / sqrt(n) for means,
bootstrap for the few others, None for a single question; they say nothing of questions that depend on each other. Of a share of right answers 0
of n and n of n have an error of 0 by that formula: "low" and "high" bound it honestly there (Wilson's interval, 95 %).
"""

import difflib
import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError, DataError, MissingExtra, RecipeError
from compressor.pipelines.load import Loaded, first_line
from compressor.pipelines.measure import task_files

Progress = Callable[[str, int, int], None]  # task, requests answered, requests in all
NAMES = {"acc": "accuracy"}  # lm-eval's names of metrics -> ours
FIRST = ("acc", "exact_match")  # the metric that stands for a task, where it has several


def check(names: Sequence[str]) -> None:
    """RecipeError for a name that is no task, DataError for a damaged file, MissingExtra without lm-eval; no network, no model."""
    engine()
    if not names:
        raise RecipeError("no task was named; give task files or names of lm-eval's tasks")
    for name in names:
        if task_files.is_file(name):
            task_files.read(task_files.find(name))
        else:
            _check_hub(name)


def measure(
    loaded: Loaded, names: Sequence[str], limit: int = 0, shots: int = 0, seed: int = 42, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Scores of a model on every task, under the names given.

    Each has metric, value, stderr, low and high (95 %, of a share of right answers), examples, shots, limit, seed, shape ("hub" for lm-eval's own),
    data_sha256 (None for hub tasks), engine, metrics (all that lm-eval gives, with filters and standard errors), and value_normalised for choices.
    `limit` asks only the first so many questions of every task.

    Raises like `check`; DataError where the hub cannot be reached, or a choice does not fit the model.
    """
    if limit < 0 or shots < 0:
        raise RecipeError(f"limit={limit} and shots={shots} must be 0 or more")
    check(names)
    from compressor.pipelines.measure import harness

    current = ""
    report = (lambda done, total: progress(current, done, total)) if progress else None
    out = {}
    with harness.serving(loaded, report) as lm:
        for current in dict.fromkeys(names):
            facts, tasks = _task(current, shots, lm.max_length // 2)
            found = _run(lm, current, tasks, limit, seed)
            out[current] = _scores(found, current) | facts | {"limit": limit, "seed": seed, "engine": engine()}
    return out


def reach(names: Sequence[str], shots: int = 0) -> None:
    """Load what hub tasks ask, so that a hub that does not answer is told before anything is measured. Raises like `measure`."""
    for name in names:
        if not task_files.is_file(name):
            _hub_task(name, shots)


def digest(names: Sequence[str], shots: int = 0) -> str:
    """Hex digest of what is asked: the contents of task files and of the files their examples come from, names and definitions of hub tasks, and
    the engine. The data of a hub task is not among it: that would need the network. Raises for examples that are not there."""
    asked = [_content(task_files.find(name), shots) if task_files.is_file(name) else [name, _definition(name)] for name in names]
    return hashlib.sha256(json.dumps([engine(), shots, *asked]).encode()).hexdigest()


def _content(path: Path, shots: int) -> list[str]:
    file = task_files.read(path)
    return [file.sha256, *([task_files.examples(path, file, shots).sha256] if shots else [])]


def _definition(name: str) -> str:
    """Digest of the file that defines a hub task; what that file includes changes with the engine's version."""
    path = getattr(_hub().task_index.get(name), "yaml_path", None)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def engine() -> str:
    """Name and version of the harness; MissingExtra where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtra("measuring on tasks needs lm-evaluation-harness: pip install 'compressor[eval]'")
    return f"lm-eval {metadata.version('lm_eval')}"


def load_task(name: str, shots: int, most: int) -> dict[str, Any]:
    """A task of either kind as lm-eval's evaluate takes it; `most` bounds the tokens written for an answer to a question of a file."""
    return _task(name, shots, most)[1]


def _task(name: str, shots: int, most: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(facts of the result, {"tasks", "groups", …} for lm-eval)."""
    from compressor.pipelines.measure import harness

    if not task_files.is_file(name):
        return {"shape": "hub", "data_sha256": None}, _hub_task(name, shots)
    path = task_files.find(name)
    file = task_files.read(path)
    shown = task_files.examples(path, file, shots) if shots else None
    with harness.quiet():
        return {"shape": file.shape, "data_sha256": file.sha256}, {"tasks": {name: harness.local_task(name, file, shown, shots, most)}}


def _run(lm: Any, name: str, tasks: dict[str, Any], limit: int, seed: int) -> dict[str, Any]:
    from compressor.pipelines.measure import harness

    try:
        return harness.run(lm, tasks, limit, seed)
    except (ValueError, AssertionError) as error:  # how lm-eval refuses a task: code that would run, pictures, too few examples, no room to write
        raise RecipeError(f"lm-eval cannot run the task {name!r} on this model: {first_line(error)}") from None


def _scores(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The task's metric with its standard error, and all metrics."""
    row = found["results"][name]
    metrics = {k: float(v) for k, v in row.items() if "," in k and isinstance(v, int | float)}
    plain = [key for key in metrics if "_stderr," not in key]
    if not plain:
        raise DataError(f"lm-eval gives no score for the task {name!r}")
    key = next((k for first in FIRST for k in plain if k.startswith(f"{first},")), plain[0])
    metric, _, chosen = key.partition(",")
    members = _members(found, name)
    out: dict[str, Any] = {"metric": NAMES.get(metric, metric), "value": metrics[key], "stderr": metrics.get(f"{metric}_stderr,{chosen}")}
    if f"acc_norm,{chosen}" in metrics:
        out |= {"value_normalised": metrics[f"acc_norm,{chosen}"], "stderr_normalised": metrics.get(f"acc_norm_stderr,{chosen}")}
    examples = sum(found["n-samples"][m]["effective"] for m in members)
    if metric in FIRST and members == [name]:
        out |= dict(zip(("low", "high"), interval(metrics[key], examples), strict=True))
    return out | {"examples": examples, "shots": max(found["n-shot"].get(m) or 0 for m in members), "metrics": metrics}


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of 95 % for a share of `count` questions: (0, 0.037) for none of 100, where the standard error would be 0."""
    square = 1.96**2 / count
    middle, reach = share + square / 2, math.sqrt(square * (max(0.0, share * (1 - share)) + square / 4))
    return max(0.0, (middle - reach) / (1 + square)), min(1.0, (middle + reach) / (1 + square))


def _members(found: dict[str, Any], name: str) -> list[str]:
    """The tasks of a group, or the task itself."""
    children = found.get("group_subtasks", {}).get(name)
    return [name] if not children else [m for child in children for m in _members(found, child)]


@cache
def _hub() -> Any:
    """lm-eval's index of its tasks (seconds; no network)."""
    from lm_eval.tasks import TaskManager

    from compressor.pipelines.measure import harness

    with harness.quiet():
        return TaskManager()


def _check_hub(name: str) -> None:
    """RecipeError for a name that lm-eval does not know, or that has no score of its own."""
    hub = _hub()
    if name not in hub.task_index:
        near = difflib.get_close_matches(name, hub.all_tasks, 3, 0.6)
        hint = f"did you mean {', '.join(near)}?" if near else "task files end in .jsonl or .json"
        raise RecipeError(f"there is no task {name[:100]!r}: {hint}")
    entry = hub.task_index[name]
    if entry.kind.name == "TAG" or (entry.kind.name == "GROUP" and not (entry.cfg or {}).get("aggregate_metric_list")):
        members = sorted(entry.tags) if entry.kind.name == "TAG" else [m for m in (entry.cfg or {}).get("task", []) if isinstance(m, str)]
        raise RecipeError(f"{name!r} names several tasks without a score of their own; name some of them: {', '.join(members[:5])}")


def _hub_task(name: str, shots: int) -> dict[str, Any]:
    """A task or group of lm-eval with its data from the hub or from the hub's cache."""
    from compressor.pipelines.measure import harness

    try:
        with harness.quiet():
            tasks = _hub().load([name])
    except CompressorError:
        raise
    except Exception as error:  # the task's own code, the datasets library, the hub and the network raise what they like
        raise DataError(f"the data of task {name!r} could not be had from the hub: {first_line(error)}; a task file needs no network") from None
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0 or shots == 0:  # as lm-eval does: a task that says 0 means it
            task.set_config(key="num_fewshot", value=shots or own or 0)
    return dict(tasks)
