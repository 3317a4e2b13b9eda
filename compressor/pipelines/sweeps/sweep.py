"""A sweep: every experiment of a grid once, each by a process of its own, however often this one is ended and started again.

The loop takes an experiment that nobody has, runs it, and keeps its row; nothing else is known in memory, so the same command goes on after any end.
A run whose folder stands before it starts (its parent was ended, not it) is read, not repeated. Failures are rows, too, and are tried again only if
asked for. Time left is the mean time of the rows that are done, times those that are not, by the processes at work.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor import disk
from compressor.errors import CompressorError, OutputError, RecipeError
from compressor.pipelines.cli import read_yaml
from compressor.pipelines.job import source_name
from compressor.pipelines.report import duration, size
from compressor.pipelines.show import Show
from compressor.pipelines.sweeps import child, rows
from compressor.pipelines.sweeps.child import Outcome
from compressor.pipelines.sweeps.grid import Experiment, Grid, Keys
from compressor.pipelines.sweeps.rows import Row
from compressor.pipelines.sweeps.store import Folder, Local, Store, pause
from compressor.stopping import held, listening

POLL = 1.0  # seconds between looks at what others do
Runner = Callable[[Experiment, Folder, float | None], Outcome]


@dataclass(frozen=True)
class Options:
    """How a sweep goes about its work. timeout: seconds of an experiment; trials: combinations that a sampler tries, None: all."""

    keep: str = "front"  # none | front | all: models that stay
    timeout: float | None = None
    retry_failed: bool = False
    storage: str | None = None  # an Optuna storage that several machines share
    study: str | None = None  # its study; None: the name of the folder
    trials: int | None = None
    overrides: Keys = field(default_factory=dict)  # on top of the grid's base

    def check(self) -> None:
        """RecipeError for what cannot be; MissingExtra where Optuna is needed and absent."""
        if self.keep not in ("none", "front", "all"):
            raise RecipeError(f"--keep {self.keep!r}: choose none, front or all")
        if self.trials is not None and self.trials < 1:
            raise RecipeError(f"--trials {self.trials} must be positive")
        if self.trials is not None and self.retry_failed:
            raise RecipeError("--retry-failed runs failed experiments of a whole grid again; with --trials a combination is tried once: leave it out")
        if self.study is not None and self.storage is None:
            raise RecipeError("--study names a sweep in a storage: add --storage")
        if self.storage is not None or self.trials is not None:
            from compressor.pipelines.sweeps.shared import check_installed

            check_installed()


def default_folder(model: str, grid: Path) -> Path:
    """model-grid in the current folder."""
    return Path(f"{source_name(model).rpartition('/')[2].lower()}-{grid.stem}-sweep")


def sweep(
    model: str, grid: Path, output: Path | None = None, options: Options | None = None, show: Show | None = None, command: str | None = None,
    runner: Runner = child.run,
) -> tuple[dict[str, Any], list[Row]]:  # fmt: skip
    """Do all experiments, or take part in it; the document of the last line of stdout, and the rows."""
    options, show = options or Options(), show or Show()
    options.check()
    plan, path = Grid(model, read_yaml(grid, "grid"), options.overrides), output or default_folder(model, grid)
    if options.trials and (plan.points or not plan.axes):
        raise RecipeError("--trials chooses among the values of axes: give the grid axes and no points")
    experiments = [] if options.trials else plan.experiments()
    folder = Folder(path, source_name(model), plan.fingerprint, command)
    folder.write_plan(list(experiments[0].keys) if experiments else list(plan.spelt), options.trials or len(experiments))
    store = _store(folder, plan, experiments, options)
    for experiment in experiments:
        if experiment.recipe is None:
            show.say(f"{experiment.label} is skipped: {experiment.reason}")
    with listening():
        _work(store, options, show, runner)
    found = gather(store, options.keep)
    draw(path)
    return document(path, found), found


def _store(folder: Folder, grid: Grid, experiments: list[Experiment], options: Options) -> Store:
    if options.storage is None and options.trials is None:
        return Local(folder, experiments, options.retry_failed)
    from compressor.pipelines.sweeps.shared import Shared

    storage = options.storage or f"journal:{folder.path / 'trials.journal'}"
    name = options.study or folder.path.resolve().name
    return Shared(folder, grid, experiments, storage, name, options.retry_failed, options.trials, grid.seed)


def _work(store: Store, options: Options, show: Show, runner: Runner) -> None:
    """Take, run and keep, until nothing is left here and nobody else is at work."""
    with show.task("sweep", max(store.left(), 0)) as advance:
        left = max(store.left(), 0)
        while True:
            others, experiment = store.busy(), store.take()  # in this order: what a lost one leaves is there to take
            if experiment is not None:
                show.say(rows.sentence(_one(experiment, store, options, show, runner)))
            elif others or store.busy() or store.left() > 0:  # left: others only looked whether it is held, or have just let go of it
                pause(POLL)
            else:
                return
            now, found = min(left, max(store.left(), 0)), gather(store, options.keep)
            advance(left - now, time_left(found, now))
            left = now
            if experiment is not None:
                draw(store.folder.path)


def time_left(found: list[Row], left: int) -> str:
    """How long the rest will take, from the rows that are done and the processes at work now."""
    took = [row["wall_seconds"] for row in found if row["status"] == "ok" and row["wall_seconds"]]
    workers = 1 + sum(row["status"] == "running" for row in found)
    return f"about {duration(left * sum(took) / len(took) / workers)} left" if took and left else ""


def _one(experiment: Experiment, store: Store, options: Options, show: Show, runner: Runner) -> Row:
    """Run an experiment that is held, and keep its row; an interrupted one goes back to the others."""
    folder, before = store.folder, store.row(experiment.id)
    attempts = before["attempts"] if before else 0
    done = False
    try:
        if (folder.run(experiment.id) / "report.json").exists():  # its run went on after its sweep was ended
            row = rows.gathered(experiment, folder.run(experiment.id), None, attempts)
        else:
            attempts += 1
            show.say(f"{experiment.id} starts")
            store.keep(experiment, rows.blank(experiment, "running", attempts=attempts))
            gather(store, "all")
            outcome = runner(experiment, folder, options.timeout)
            if outcome.error is None:
                row = rows.gathered(experiment, folder.run(experiment.id), outcome.seconds, attempts)
            elif disk.filled(folder.path, outcome.error):  # so will be the next ones
                raise OutputError(f"the disk is full: {experiment.id} could not be written; free some space and run the same command again")
            else:
                row = rows.failed(experiment, outcome.error, outcome.seconds, attempts)
        store.keep(experiment, row)
        done = True
    finally:
        with held():
            store.release(experiment, done)
    return row


def gather(store: Store, keep: str) -> list[Row]:
    """Take away models that need not stay, and write the table of rows anew; returns the rows."""
    folder = store.folder
    with folder.locked():
        found = store.rows()
        for row in found:
            if keep != "all" and row["status"] == "ok" and row["kept"] and (keep == "none" or not row["front"]) and not folder.claimed(row["id"]):
                folder.strip(row["id"])
                row["kept"] = False
                folder.keep(row)
        folder.write_rows(found)
    return found


def draw(folder: Path) -> None:
    """The page of the rows that are there, and its plots."""
    from compressor.pipelines.sweeps import page

    page.write(folder)


def document(path: Path, found: list[Row]) -> dict[str, Any]:
    """What scripts read of a sweep."""
    front = [{key: row[key] for key in ("id", "bits_per_weight", "folder_bytes", "perplexity")} for row in found if row["front"]]
    counts = Counter(row["status"] for row in found)
    front.sort(key=lambda point: point["folder_bytes"])
    return {"output": str(path), "rows": dict(sorted(counts.items())), "front": front, "csv": str(path / "sweep.csv")}


def dry_run(model: str, grid: Path, output: Path | None, options: Options, show: Show) -> tuple[dict[str, Any], Any]:
    """What a sweep would do: each experiment with its predicted size and time; and a table of it. Runs nothing and writes nothing."""
    from rich.table import Table

    from compressor.pipelines import run

    options.check()
    if options.trials is not None:
        raise RecipeError("--dry-run lists all of a grid, and with --trials a sampler chooses as it goes: leave one of them out")
    experiments = Grid(model, read_yaml(grid, "grid"), options.overrides).experiments()
    path = output or default_folder(model, grid)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; choose another folder with -o")
    out, table = [], Table("experiment", "bits", "folder", "time", "")
    with show.task("estimate", len(experiments)) as advance:
        for e in experiments:
            row: dict[str, Any] = {"id": e.id, "keys": e.keys, "bits_per_weight": None, "folder_bytes": None, "seconds": None, "error": e.reason}
            if e.recipe is not None:
                try:
                    found = run.dry_run(e.recipe, path / "runs" / e.id, Show())
                    row |= {
                        "bits_per_weight": found["bits_per_weight"],
                        "folder_bytes": found["folder_bytes"],
                        "seconds": sum(found["seconds"].values()),
                    }
                except CompressorError as error:
                    row["error"] = str(error)
            out.append(row)
            bits = "–" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
            table.add_row(e.id, bits, size(row["folder_bytes"]), duration(row["seconds"]), row["error"] or "")
            advance(1, e.id)
    total = sum(row["seconds"] or 0.0 for row in out)
    fine = sum(row["error"] is None for row in out)
    show.say(f"{fine} experiments, {len(out) - fine} that cannot be, about {duration(total)} beside starting each; nothing was written")
    return {"output": str(path), "dry_run": True, "experiments": out, "seconds": total}, table
