"""`compressor merge-tasks`: several task files of one base become one, measured on the data of each (the arithmetic is in export/merge.py).

A text is measured on its held-out part, as a run measures its domain. The mean of several texts is the geometric one of the perplexities, exp of the
mean loss: an arithmetic mean would follow the hardest text. Base, single tasks and the merged one are all measured, in one process, by swapping
values. Greedy soups choose by that same mean, so theirs is a number that they were chosen by; it is said in the notes.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from compressor.errors import ModelError, RecipeError
from compressor.export import merge, task
from compressor.pipelines import data, evaluate, load, tasks
from compressor.pipelines.job import source_name
from compressor.pipelines.report import plain
from compressor.pipelines.show import Show
from compressor.recipe import Recipe


@dataclass(frozen=True)
class Texts:
    """What to measure on: one text a task, in their order, or none."""

    names: tuple[str, ...] = ()
    window: int | None = None
    max_tokens: int = 0  # 0: the whole held-out part

    def check(self, files: int, method: str) -> None:
        """RecipeError for values that cannot work."""
        if self.names and len(self.names) != files:
            raise RecipeError(f"--data names {len(self.names)} texts for {files} tasks: give one for each, in their order, or none")
        if not self.names and (self.window is not None or self.max_tokens):
            raise RecipeError("--window and --max-tokens say how texts are measured, and there are none: give one for each task with --data")
        if method == "greedy" and not self.names:
            raise RecipeError("greedy measures every candidate: give a text for each task with --data")
        Recipe().with_(eval__window=self.window, eval__max_tokens=self.max_tokens)


class Scores:
    """Perplexities of values on the texts; nothing is measured twice."""

    def __init__(self, loaded: load.Loaded, texts: Texts, show: Show, kind: str):
        self.loaded, self.texts, self.show, self.kind = loaded, texts, show, kind
        self.corpora = {str(i): data.load(name).test for i, name in enumerate(texts.names)}
        self.window = load.context(loaded.config, texts.window)
        self.protocol: list[dict[str, Any]] = []
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, values: merge.Values, label: str = "a candidate") -> dict[str, Any]:
        """`perplexity`, one a text, and their `mean`, with `values` in the model."""
        key = _sha256(values)
        if key not in self._known:
            tasks.put(self.loaded, values, self.kind)
            with self.show.task(escape(tasks.line(f"evaluate {label}")[:40]), 1) as advance:
                found = evaluate.measure(self.loaded.model, self.loaded.tokenizer, self.corpora, self.window, self.texts.max_tokens)
                advance(1, "")
            self.protocol = list(found["protocol"].values())
            losses = [found[text]["loss"] for text in self.corpora]
            self._known[key] = {"perplexity": [math.exp(loss) for loss in losses], "mean": math.exp(sum(losses) / len(losses))}
        return self._known[key]


def merge_tasks(
    base: str, paths: Sequence[Path], output: Path, options: merge.Options, texts: Texts, device: str = "auto", show: Show | None = None
) -> tuple[dict[str, Any], Table | None]:
    """Write the merged task file; returns the document for scripts and, with texts, the perplexities for people.

    `base` is the untuned folder, whose values task vectors count from. Raises the errors of its parts, before anything slow.
    """
    options.check(len(paths))
    texts.check(len(paths), options.method)
    tasks.new_file(output)
    paths = tasks.distinct(paths)
    for path in paths:
        if task.read_header(path).kind == task.ADAPTER:
            raise ModelError(f"{path} holds an adapter: load adapters beside the base and join them with peft's add_weighted_adapter")
    loaded, show = tasks.load_source(base, device), show or Show()
    tasks.outside(output, loaded)
    found = tasks.read(loaded, paths)
    kind = found[0].kind
    start = {name: value.detach().cpu().clone() for name, value in tasks.held(load.packed_weights(loaded.model), kind).items()}
    scores = Scores(loaded, texts, show, kind) if texts.names else None
    quality = None if scores is None else lambda values: float(scores.of(values)["mean"])
    notes = [] if options.method in ("soup", "greedy") else tasks.notes(loaded)
    notes += ["the tasks of the soup were chosen by the mean perplexity reported here"] if options.method == "greedy" else []
    for note in notes:
        show.say(tasks.line(note))
    values, done = merge.merge(start, [each.values for each in found], kind, options, quality)
    origin = [{"file": tasks.short(path), "sha256": _file_sha256(path)} | _told(each) for path, each in zip(paths, found, strict=True)]
    told: dict[str, Any] = {"model": found[0].model, "recipe": {"merge": done, "tasks": origin}}
    rows: list[dict[str, Any]] = []
    if scores is not None:
        stages = [("base", start), *((tasks.short(path), each.values) for path, each in zip(paths, found, strict=True)), ("merged", values)]
        rows = [{"name": name} | scores.of(each, name) for name, each in stages]
        told["metrics"] = dict(zip(unique(scores.corpora.values()), rows[-1]["perplexity"], strict=True))
    document = {"base_folder": source_name(base)} | tasks.save(loaded, output, plain(told, "merge", []), values, kind)
    if scores is None:
        return document | {"notes": notes}, None
    return document | {"notes": notes, "scores": rows, "protocol": scores.protocol}, _table(rows, list(scores.corpora.values()))


def unique(corpora: Iterable[data.Corpus]) -> list[str]:
    """The names of texts; those of one name get a number."""
    names: list[str] = []
    for corpus in corpora:
        taken = sum(name == corpus.name or name.startswith(f"{corpus.name} #") for name in names)
        names.append(f"{corpus.name} #{taken + 1}" if taken else corpus.name)
    return names


def _told(each: task.Task) -> dict[str, Any]:
    return {key: value for key, value in (("recipe", each.recipe), ("metrics", each.metrics)) if value}


def _table(rows: list[dict[str, Any]], corpora: list[data.Corpus]) -> Table:
    shown = Table(title="perplexity of the held-out part of each text; geometric mean")
    for name in ("values", *unique(corpora), "mean"):
        shown.add_column(tasks.cell(name))
    for row in rows:
        shown.add_row(tasks.cell(row["name"]), *(f"{value:.3f}" for value in (*row["perplexity"], row["mean"])))
    return shown


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(values: merge.Values) -> str:
    found = hashlib.sha256()
    for name, value in sorted(values.items()):
        found.update(name.encode())
        found.update(task.raw(value))
    return found.hexdigest()


def parse_numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    """ "0.5,0.5" -> (0.5, 0.5); None stays None. RecipeError, naming the flag, for anything else."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"{flag} {text!r} is not understood; write numbers with commas between them, for example 0.5,0.5") from None


def parse_lines(text: str | None) -> tuple[float | None, float | None] | None:
    """ "0.3" or "0.3,0.7" -> alpha and beta; "auto" -> the defaults of both."""
    numbers = (None, None) if text == "auto" else parse_numbers(text, "--lines")
    if numbers is None:
        return None
    if len(numbers) > 2:
        raise RecipeError(f"--lines {text!r} has {len(numbers)} numbers; give alpha, or alpha and beta, for example 0.3,0.7, or auto")
    return numbers[0], numbers[1] if len(numbers) > 1 else None
