"""Sweeps through Optuna's storages: two workers share one, a lost worker's experiment is done by another, a sampler chooses; stand-ins for runs."""

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import MissingExtra, RecipeError
from compressor.pipelines.sweeps import rows, sweep
from compressor.pipelines.sweeps.grid import Experiment, Grid
from compressor.pipelines.sweeps.store import Folder
from tests.pipelines.sweeps.fakes import GRID, Runner, table, write_grid

optuna = pytest.importorskip("optuna", reason="Optuna is not installed")
from compressor.pipelines.sweeps import shared  # noqa: E402


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "POLL", 0.05)
    monkeypatch.setattr(shared, "BEAT", 0.05)
    monkeypatch.setattr(sweep, "draw", lambda folder: None)  # takes seconds, and is tested elsewhere


def storages(folder: Path) -> list[str]:
    return [f"sqlite:///{folder / 'study.db'}", f"journal:{folder / 'study.log'}"]


def work(grid: Path, folder: Path, storage: str, runner: Any, **options: Any) -> dict[str, Any]:
    return sweep.sweep("tiny", grid, folder, sweep.Options(storage=storage, study="s", **options), runner=runner)[0]


@pytest.mark.parametrize("kind", [0, 1])
def test_two_workers_run_every_experiment_once(tmp_path: Path, kind: int) -> None:
    grid, storage, together = write_grid(tmp_path / "grid.yaml"), storages(tmp_path)[kind], threading.Barrier(2)
    runners, documents = [Runner(together=together) for _ in range(2)], list[dict[str, Any]]()
    jobs = [lambda i=i: documents.append(work(grid, tmp_path / f"w{i}", storage, runners[i])) for i in range(2)]
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    ran = [name for runner in runners for name in runner.ran]
    assert len(ran) == len(set(ran)) == 12 and all(runner.ran for runner in runners)
    assert [document["rows"] for document in documents] == [{"ok": 12}] * 2 and documents[0]["front"] == documents[1]["front"]
    seen = [{name: (row["perplexity"], row["status"]) for name, row in table(tmp_path / f"w{i}").items()} for i in range(2)]
    assert seen[0] == seen[1] and set(seen[0]) == set(ran)


def test_what_a_lost_worker_held_is_run_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lost one says nothing any more, and then comes back with its result after all."""
    monkeypatch.setattr(shared, "GRACE", 0.5)
    grid, storage = write_grid(tmp_path / "grid.yaml", {"quant.bits": [4, 2]}), storages(tmp_path)[0]
    plan = Grid("tiny", {"quant.bits": [4, 2]})
    lost = shared.Shared(Folder(tmp_path / "lost", "tiny", plan.fingerprint), plan, plan.experiments(), storage, "s")
    held = lost.take()
    assert held is not None
    lost.keep(held, rows.blank(held, "running", attempts=1))
    lost._mine[held.id].stop()
    runner = Runner()
    assert work(grid, tmp_path / "other", storage, runner)["rows"] == {"ok": 2}
    assert sorted(runner.ran) == sorted(e.id for e in plan.experiments())
    lost.keep(held, rows.failed(held, "late", 1.0, 1) | {"status": "ok"})
    lost.release(held, True)
    assert {row["status"] for row in lost.rows()} == {"ok"} and lost.left() == 0


def test_a_worker_that_is_alive_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "GRACE", 2.0)
    plan, storage = Grid("tiny", {"quant.bits": [4, 2]}), storages(tmp_path)[0]
    slow = shared.Shared(Folder(tmp_path / "slow", "tiny", plan.fingerprint), plan, plan.experiments(), storage, "s")
    held = slow.take()
    assert held is not None
    other = shared.Shared(Folder(tmp_path / "other", "tiny", plan.fingerprint), plan, plan.experiments(), storage, "s")
    mine = other.take()
    assert mine is not None and mine.id != held.id
    other.keep(mine, rows.failed(mine, "no", 1.0, 1))
    other.release(mine, True)
    for _ in range(13):  # longer than GRACE
        assert other.take() is None and other.busy()
        sweep.pause(0.2)
    slow.keep(held, rows.failed(held, "no", 1.0, 1))
    slow.release(held, True)
    assert not other.busy() and {row["status"] for row in other.rows()} == {"failed"}


def test_an_interrupted_worker_gives_back_what_it_had(tmp_path: Path) -> None:
    grid, storage = write_grid(tmp_path / "grid.yaml", {"quant.bits": [4, 2]}), storages(tmp_path)[1]

    def interrupted(experiment: Experiment, folder: Folder, timeout: float | None) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(grid, tmp_path / "one", storage, interrupted)
    runner = Runner()
    assert work(grid, tmp_path / "two", storage, runner)["rows"] == {"ok": 2} and len(runner.ran) == 2


def test_failures_are_rows_until_they_are_asked_for_again(tmp_path: Path) -> None:
    grid, storage = write_grid(tmp_path / "grid.yaml"), storages(tmp_path)[0]
    assert work(grid, tmp_path / "w", storage, Runner("w2g128-rtn"))["rows"] == {"failed": 2, "ok": 10}
    assert work(grid, tmp_path / "w", storage, Runner())["rows"] == {"failed": 2, "ok": 10}
    again = Runner()
    assert work(grid, tmp_path / "w", storage, again, retry_failed=True)["rows"] == {"ok": 12} and len(again.ran) == 2


def test_a_sampler_tries_only_so_many(tmp_path: Path) -> None:
    grid, runner = write_grid(tmp_path / "grid.yaml", GRID | {"quant.group": [32, 64, 7]}), Runner()
    document = sweep.sweep("tiny", grid, tmp_path / "w", sweep.Options(trials=9), runner=runner)[0]
    assert 0 < len(runner.ran) == len(set(runner.ran)) <= 9 and document["rows"]["ok"] == len(runner.ran)
    more = Runner()
    sweep.sweep("tiny", grid, tmp_path / "w", sweep.Options(trials=9), runner=more)
    assert more.ran == []  # nine are tried


@pytest.mark.parametrize("kind", [0, 1])
def test_of_two_that_draw_the_same_at_once_one_has_it(tmp_path: Path, kind: int) -> None:
    plan, storage, together = Grid("tiny", {"quant.bits": [4]}), storages(tmp_path)[kind], threading.Barrier(2)
    stores = [shared.Shared(Folder(tmp_path / f"w{i}", "tiny", plan.fingerprint), plan, [], storage, "s", trials=2) for i in range(2)]
    found = list[Experiment | None]()

    def both(store: shared.Shared) -> None:
        add = store.study.add_trial
        store.study.add_trial = lambda trial: (add(trial), together.wait(20))  # both are there before either looks
        found.append(store.take())

    threads = [threading.Thread(target=both, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (held,) = [experiment for experiment in found if experiment is not None]
    assert len(found) == 2 and [store.left() for store in stores] == [0, 0] and all(store.busy() for store in stores)
    (winner,) = [store for store in stores if held.id in store._mine]
    winner.release(held, False)  # it is lost, and so is the draw
    assert [store.left() for store in stores] == [1, 1] and not any(store.busy() for store in stores)


def test_what_a_trial_found_is_told_to_the_sampler(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "grid.yaml")
    work(grid, tmp_path / "w", storages(tmp_path)[0], Runner(), trials=4)
    told = optuna.load_study(study_name="s", storage=storages(tmp_path)[0]).get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    rows = {(row["perplexity"], row["folder_bytes"]) for row in table(tmp_path / "w").values()}
    assert {tuple(trial.values) for trial in told} == rows and all(set(trial.params) == set(GRID) for trial in told)


def test_storages_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = write_grid(tmp_path / "grid.yaml")
    monkeypatch.setattr(shared, "STARTUP", 1)
    for storage, words in (("study.db", "is no storage"), (f"sqlite:///{tmp_path}/none/x.db", "cannot be used"), ("magic://x", "cannot be used")):
        with pytest.raises(RecipeError, match=words):
            work(grid, tmp_path / "w", storage, Runner())
    work(write_grid(tmp_path / "one.yaml", {"quant.bits": [4]}), tmp_path / "w", storages(tmp_path)[0], Runner())
    study = optuna.load_study(study_name="s", storage=storages(tmp_path)[0])
    study.set_user_attr("fingerprint", "another model")
    with pytest.raises(RecipeError, match="another model"):
        work(grid, tmp_path / "w", storages(tmp_path)[0], Runner())


def test_without_optuna_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for options in (sweep.Options(storage="sqlite:///x.db"), sweep.Options(trials=3)):
        with pytest.raises(MissingExtra, match=r"pip install 'compressor\[sweep\]'"):
            sweep.sweep("tiny", write_grid(tmp_path / "grid.yaml"), tmp_path / "w", options, runner=Runner())
    assert not (tmp_path / "w").exists()
