"""A slice of bench/kills.py, with real processes: kill -9, SIGTERM, two at one output; and a kill that a campaign once found."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.pipelines import journal
from compressor.pipelines.journal import WRITTEN, clear, open_work, remove

ROOT = Path(__file__).resolve().parents[2]


def test_a_campaign_breaks_no_promise(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "kills.py"), "--work", str(tmp_path), "--only", "rtn, peqa", "--trials", "2", "--seed", "32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(tmp_path / "rows.csv")], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["how"] for row in rows if row["how"] in ("SIGTERM", "twice")] and len(rows) >= 3, rows
    assert {row["bytes"] for row in rows if row["bytes"]} == {"equal"} == {row["report"] for row in rows if row["report"]}


@pytest.mark.parametrize("cut", range(5))
def test_whatever_is_left_of_a_work_folder_whose_result_stands_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """A kill after the first, second … deletion."""
    work = tmp_path / "out.partial"
    with open_work(work) as entries:
        entries.put(WRITTEN, "key", True)
        (work / "old").mkdir()
        (work / "old" / "model").write_text("x")
        left = [cut]

        def until(real: Any) -> Any:
            def call(*args: Any, **more: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return real(*args, **more)

            return call

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, until(getattr(os, name)))
            remove(work)
    clear(work, "another")
    assert work.exists() is (cut < 3), "the work of another run stays"
    clear(work, "key")
    assert not work.exists()


def test_a_lock_whose_file_was_taken_away_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a process's opening of the lock and its locking it, the holder may take the folder away."""
    real, work, gone = journal.fcntl.flock, tmp_path / "w", []

    def flock(handle: Any, how: int) -> None:
        if not gone:
            gone.append(True)
            remove(work)
        real(handle, how)

    monkeypatch.setattr(journal.fcntl, "flock", flock)
    with open_work(work) as entries:
        entries.put("x", "y", 1)
        assert (work / "lock").exists()
