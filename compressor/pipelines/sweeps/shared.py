"""One sweep for several machines, through an Optuna storage: a study is the sweep, a trial is an experiment, and whoever asks first has it.

Optuna's storage keeps trials in one order that all workers see, and a table of attributes. Whoever wants an experiment adds a trial that runs; of
several for one experiment the first in that order has it, the others are set aside. (Optuna's own queue of waiting trials is not used: on SQLite two
workers can be given one of them, as a test here showed.) Optuna has no way to notice lost workers that all of its storages share (only databases
have a heartbeat), so each worker counts up a number, and a trial whose number has stood still for GRACE seconds of the watcher's own clock is given
up; no two clocks are compared. Where the lost one worked in this very folder, the lock on its claim says so at once. With `trials`, Optuna's sampler
chooses among the combinations in place of trying all (TPE, for perplexity and bytes).
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError, MissingExtra, RecipeError
from compressor.pipelines.sweeps import rows
from compressor.pipelines.sweeps.grid import Experiment, Grid
from compressor.pipelines.sweeps.rows import DONE, Row
from compressor.pipelines.sweeps.store import Folder

ROW, BEATS, LOST = "row ", "beat ", "lost "  # names of the study's attributes, before the id or number
BEAT, GRACE = 15.0, 75.0  # seconds between signs of life, and without one until a trial is given out again
STARTUP = 5  # times that a fresh database is tried, while another worker makes its tables


class Shared:
    """The store that is an Optuna study; `trials`: how many combinations its sampler tries, None: all that are there."""

    def __init__(
        self, folder: Folder, grid: Grid, experiments: list[Experiment], storage: str, name: str, retry_failed: bool = False,
        trials: int | None = None, seed: int = 42,
    ):  # fmt: skip
        self._optuna = _optuna()
        self.folder, self.grid, self.trials, self._state = folder, grid, trials, self._optuna.trial.TrialState
        self.skipped = [e for e in experiments if e.recipe is None]
        self.known = {e.id: e for e in experiments if e.recipe is not None}
        sampler = self._optuna.samplers.TPESampler(seed=seed + os.getpid() if trials else seed, constant_liar=True)
        self.study = _study(self._optuna, storage, name, sampler)
        if self.study.user_attrs.get("fingerprint", grid.fingerprint) != grid.fingerprint:
            raise RecipeError(f"study {name} of that storage is the sweep of another model: choose another name with --study")
        self.study.set_user_attr("fingerprint", grid.fingerprint)
        self._mine, self._seen = dict[str, _Beat](), dict[int, tuple[int, float]]()
        self.again = {row["id"]: row["attempts"] for row in self._rows().values() if row["status"] == "failed"} if retry_failed else {}

    def take(self) -> Experiment | None:
        self._give_up_lost()
        if self.trials is not None:
            while self.left() > 0:
                drawn = self._drawn()
                if drawn is not None:
                    return drawn
            return None
        taken = {trial.user_attrs.get("id") for trial in self._running()}
        return next((e for e in self.known.values() if e.id not in taken and self._open(e) and self._claim(e)), None)

    def _open(self, experiment: Experiment) -> bool:
        row = self.row(experiment.id)
        return row is None or row["status"] not in DONE or (row["status"] == "failed" and self.again.get(experiment.id) == row["attempts"])

    def _claim(self, experiment: Experiment, draw: Any = None) -> bool:
        """Begin a trial of an experiment, unless somebody is first: of several trials that run, the one with the least number has it.

        draw: the sampler's trial that chose it; the new one has its values, for only trials that are born with an id are in an order that all see.
        """
        if not self.folder.claim(experiment.id):
            return False
        token = uuid.uuid4().hex
        attrs = {"id": experiment.id, "token": token, "place": self.folder.plan["place"], "host": socket.gethostname(), "keys": experiment.keys}
        values = {} if draw is None else {"params": draw.params, "distributions": draw.distributions}
        attrs |= {} if draw is None else {"draw": draw.number}
        self.study.add_trial(self._optuna.trial.create_trial(state=self._state.RUNNING, user_attrs=attrs, **values))
        rivals = [trial for trial in self._running() if trial.user_attrs.get("id") == experiment.id]
        (mine,) = (trial.number for trial in rivals if trial.user_attrs.get("token") == token)
        if mine > min(trial.number for trial in rivals) or not self._open(experiment):
            self.study.tell(mine, state=self._state.FAIL, skip_if_finished=True)
            self.folder.drop(experiment.id)
            return False
        self._mine[experiment.id] = _Beat(self.study, mine)
        return True

    def _drawn(self) -> Experiment | None:
        """The experiment that the sampler chooses, if it is this process's to run; its draw counts in any case."""
        draw = self.study.ask()
        words = {axis: [json.dumps(value) for value in values] for axis, values in self.grid.axes.items()}
        experiment = self.grid.experiment({axis: json.loads(draw.suggest_categorical(axis, options)) for axis, options in words.items()})
        draw.set_user_attr("tried", True)
        if experiment is None or experiment.recipe is None:
            self.skipped += [experiment] if experiment is not None and experiment.id not in {e.id for e in self.skipped} else []
            self._tell(draw.number, None)
            return None
        row = self._rows().get(experiment.id)
        self._tell(draw.number, row)
        if row is not None or not self._claim(experiment, draw):
            return None
        return self.known.setdefault(experiment.id, experiment)

    def _tell(self, number: int, row: Row | None) -> None:
        cost, size = (None, None) if row is None or row["status"] != "ok" else (rows.cost(row), row["folder_bytes"])
        if cost is not None and size is not None:
            self.study.tell(number, [cost, size], skip_if_finished=True)
        else:
            self.study.tell(number, state=self._state.FAIL, skip_if_finished=True)

    def keep(self, experiment: Experiment, row: Row) -> None:
        self.folder.keep(row)
        self.study.set_user_attr(ROW + experiment.id, row)  # not in the trial: the result of one that was given up by mistake counts, too

    def release(self, experiment: Experiment, finished: bool) -> None:
        beat = self._mine.pop(experiment.id)
        beat.stop()
        if finished:
            self._tell(beat.number, self.row(experiment.id))
        else:
            self._lose(beat.number)
        self.folder.drop(experiment.id)

    def _lose(self, number: int) -> None:
        """Give up a trial, so that its experiment is for others to take."""
        self.study.set_user_attr(f"{LOST}{number}", True)
        self.study.tell(number, state=self._state.FAIL, skip_if_finished=True)

    def _give_up_lost(self) -> None:
        for trial in self._running():
            said = trial.user_attrs
            if said.get("id") is None or said["id"] in self._mine:
                continue
            here = said.get("place") == self.folder.plan["place"]
            if (not self.folder.claimed(said["id"])) if here else self._still(trial.number):
                self._lose(trial.number)

    def _still(self, number: int) -> bool:
        """Whether a trial has given no sign of life for GRACE seconds that this process has watched it."""
        beat, (seen, since) = self.study.user_attrs.get(f"{BEATS}{number}", 0), self._seen.get(number, (-1, 0.0))
        if beat != seen:
            self._seen[number] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > GRACE

    def busy(self) -> bool:
        return any(trial.user_attrs.get("id") for trial in self._running())

    def _running(self) -> list[Any]:
        found: list[Any] = self.study.get_trials(deepcopy=False, states=(self._state.RUNNING,))
        return found

    def row(self, name: str) -> Row | None:
        found: Row | None = self.study.user_attrs.get(ROW + name)
        return found

    def _rows(self) -> dict[str, Row]:
        """The row of each experiment that has ended."""
        found = (row for key, row in self.study.user_attrs.items() if key.startswith(ROW))
        return {row["id"]: row for row in found if row["status"] in DONE}

    def rows(self) -> list[Row]:
        at = {trial.user_attrs.get("id") for trial in self._running()}
        found = {key.removeprefix(ROW): row for key, row in self.study.user_attrs.items() if key.startswith(ROW)}
        order = {name: i for i, name in enumerate(self.known)}
        alive = [row for name, row in found.items() if row["status"] in DONE or name in at]
        alive.sort(key=lambda row: order.get(row["id"], len(order)))
        kept = [row | {"kept": row["kept"] and (self.folder.run(row["id"]) / "config.json").exists()} for row in alive]
        skipped = {e.id: rows.blank(e, "skipped", e.reason) for e in self.skipped}
        return rows.mark_front([*kept, *skipped.values()])

    def left(self) -> int:
        if self.trials is None:
            return sum(self._open(e) for e in self.known.values())
        trials, attrs = self.study.get_trials(deepcopy=False), self.study.user_attrs
        lost = sum("draw" in t.user_attrs and f"{LOST}{t.number}" in attrs for t in trials)
        return self.trials + lost - sum(bool(t.user_attrs.get("tried")) for t in trials)


class _Beat:
    """Signs of life of a trial, from a thread of their own, until `stop`."""

    def __init__(self, study: Any, number: int):
        self.study, self.number, self._end = study, number, threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        count = 0
        while not self._end.wait(BEAT):
            count += 1
            with contextlib.suppress(Exception):  # the storage is away: the next beat may reach it
                self.study.set_user_attr(f"{BEATS}{self.number}", count)

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


def check_installed() -> None:
    """MissingExtra without Optuna."""
    _optuna()


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingExtra("sweeps of several machines, and --trials, go through Optuna: pip install 'compressor[sweep]'") from None
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna


def _study(optuna: Any, storage: str, name: str, sampler: Any) -> Any:
    """The study of this name, made if needed. RecipeError for a storage that cannot be used."""
    for attempt in range(STARTUP):
        try:
            made, goals = _storage(optuna, storage), ["minimize"] * 2
            return optuna.create_study(storage=made, study_name=name, sampler=sampler, directions=goals, load_if_exists=True)
        except CompressorError:
            raise
        except Exception as error:  # of its database drivers, whichever is in use; two workers may make the tables at once
            if attempt == STARTUP - 1:
                told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise RecipeError(f"the storage {storage} cannot be used ({told}); write sqlite:///FILE or journal:FILE") from None
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def _storage(optuna: Any, text: str) -> Any:
    """The storage of a URL; `journal:FILE` is a log that also works on network file systems."""
    if text.startswith("journal:"):
        path = Path(text.removeprefix("journal:").removeprefix("//"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    if text.startswith("sqlite"):
        return optuna.storages.RDBStorage(text, engine_kwargs={"connect_args": {"timeout": 60}})
    if "://" not in text:
        raise RecipeError(f"--storage {text!r} is no storage: write sqlite:///FILE, postgresql://…, mysql://… or journal:FILE")
    return optuna.storages.RDBStorage(text)
