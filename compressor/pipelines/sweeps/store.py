"""The folder of a sweep: its rows, and who works on what. Needs nothing but a file system that knows flock; docs/sweeps.md lists the files.

Whoever works on an experiment holds a lock on `claims/ID`, and so does the child process that does it. The kernel lets go of the lock when the last
of them ends, however it ends, so that a lock is the truth about life and death, and no clock is asked. Processes that share the folder see each
other's rows; whoever changes one writes the table anew, under a lock of its own. Limits: one machine; network file systems do not all keep such
locks (several machines share an Optuna storage instead, shared.py).
"""

import contextlib
import fcntl
import json
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from compressor import strict
from compressor.errors import OutputError
from compressor.pipelines.journal import unlockable
from compressor.pipelines.report import write_text
from compressor.pipelines.sweeps import rows
from compressor.pipelines.sweeps.grid import Experiment
from compressor.pipelines.sweeps.rows import DONE, Row

FOLDERS = ("rows", "claims", "recipes", "logs", "runs")
OWN = (*FOLDERS, "plan.json", "lock")  # what lies there before there are rows
KEPT = ("report.json", "report.html", "recipe.yaml", "README.md")  # of a run whose model is not kept


class Store(Protocol):
    """Where the experiments of a sweep are given out, and their rows come together."""

    folder: "Folder"

    def take(self) -> Experiment | None:
        """The next experiment that nobody works on or has finished, which this process then holds; None if there is none now."""

    def keep(self, experiment: Experiment, row: Row) -> None:
        """Store the row of an experiment that this process holds."""

    def release(self, experiment: Experiment, finished: bool) -> None:
        """Let go of it: finished, or for others to take."""

    def busy(self) -> bool:
        """Whether others work on experiments that may come back."""

    def row(self, name: str) -> Row | None:
        """What is known of an experiment."""

    def rows(self) -> list[Row]:
        """All rows there are, in the order of the plan."""

    def left(self) -> int:
        """Experiments that are not finished."""


class Folder:
    """The files of one sweep. OutputError if the folder holds something else, or the sweep of another model."""

    def __init__(self, path: Path, model: str, fingerprint: str, command: str | None = None):
        self.path, self._held = path, dict[str, IO[str]]()
        there = path.exists() and (not path.is_dir() or any(inner.name not in OWN and not inner.name.startswith(".plan") for inner in path.iterdir()))
        if there and self._plan() is None:
            raise OutputError(f"{path} holds files that are not of a sweep; choose another folder with -o")
        try:
            for name in FOLDERS:
                (path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror}); choose another folder with -o") from None
        with self.locked():  # several processes may come at once
            fresh = {"model": model, "fingerprint": fingerprint, "command": command, "place": uuid.uuid4().hex}
            self.plan: dict[str, Any] = fresh | (self._plan() or {})
            if self.plan["fingerprint"] != fingerprint:
                raise OutputError(f"{path} holds the sweep of another model, {self.plan['model']}; choose another folder with -o")
            self._write_plan()

    def _plan(self) -> dict[str, Any] | None:
        try:
            plan = strict.read(self.path / "plan.json")
        except (OSError, ValueError):
            return None
        return plan if isinstance(plan, dict) else None

    def write_plan(self, axes: list[str], experiments: int) -> None:
        """What is planned, for readers of the folder; its `place` names the folder among those of one storage."""
        with self.locked():
            self.plan |= {"axes": axes, "experiments": experiments}
            self._write_plan()

    def _write_plan(self) -> None:
        write_text(self.path / "plan.json", json.dumps(self.plan, indent=1) + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While files that all write are read and written."""
        with (self.path / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                raise unlockable(self.path, error) from None
            yield

    def claim(self, name: str) -> bool:
        """Hold the claim of an experiment until `drop`, if nobody does; True if this process holds it now."""
        handle = (self.path / "claims" / name).open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return False
        self._held[name] = handle
        return True

    def drop(self, name: str) -> None:
        self._held.pop(name).close()

    def lock_of(self, name: str) -> int:
        """The file descriptor of a claim that is held, for the child process to inherit."""
        return self._held[name].fileno()

    def claimed(self, name: str) -> bool:
        """Whether some process, this one or another, holds the claim."""
        if name in self._held:
            return True
        free = self.claim(name)
        if free:
            self.drop(name)
        return not free

    def row(self, name: str) -> Row | None:
        return rows.read(self.path / "rows" / f"{name}.json")

    def keep(self, row: Row) -> None:
        """Write the row of an experiment that is held."""
        write_text(self.path / "rows" / f"{row['id']}.json", json.dumps(row, indent=1) + "\n")

    def write_rows(self, found: list[Row]) -> None:
        """The table of all rows, as JSON lines and CSV."""
        write_text(self.path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in found))
        write_text(self.path / "sweep.csv", rows.as_csv(found))

    def run(self, name: str) -> Path:
        """The folder that the run of an experiment writes."""
        return self.path / "runs" / name

    def strip(self, name: str) -> None:
        """Take away a model and keep what is told of it."""
        for path in self.run(name).iterdir() if self.run(name).is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in KEPT:
                path.unlink()


class Local:
    """The store that is the folder itself. `again`: experiments that had failed when this process came, which it tries once more."""

    def __init__(self, folder: Folder, experiments: list[Experiment], retry_failed: bool = False):
        self.folder, self.experiments = folder, experiments
        known = {e.id: folder.row(e.id) for e in experiments} if retry_failed else {}
        self.again = {name: row["attempts"] for name, row in known.items() if row and row["status"] == "failed"}

    def take(self) -> Experiment | None:
        for experiment in self.experiments:
            if self._open(experiment) and self.folder.claim(experiment.id):
                if self._open(experiment):  # another process may have finished it meanwhile
                    return experiment
                self.folder.drop(experiment.id)
        return None

    def _open(self, experiment: Experiment) -> bool:
        row = self.folder.row(experiment.id)
        if experiment.recipe is None or row is None or row["status"] not in DONE:
            return experiment.recipe is not None
        return row["status"] == "failed" and self.again.get(experiment.id) == row["attempts"]

    def keep(self, experiment: Experiment, row: Row) -> None:
        self.folder.keep(row)

    def release(self, experiment: Experiment, finished: bool) -> None:
        self.folder.drop(experiment.id)

    def busy(self) -> bool:
        return any(self._open(e) and self.folder.claimed(e.id) for e in self.experiments)

    def row(self, name: str) -> Row | None:
        return self.folder.row(name)

    def rows(self) -> list[Row]:
        found = [(e, self.folder.row(e.id) if e.recipe else rows.blank(e, "skipped", e.reason)) for e in self.experiments]
        alive = [row | {"keys": e.keys} for e, row in found if row and (row["status"] in DONE or self.folder.claimed(e.id))]
        return rows.mark_front(alive)

    def left(self) -> int:
        return sum(self._open(e) for e in self.experiments)


def pause(seconds: float) -> None:
    """Wait for others."""
    time.sleep(seconds)
