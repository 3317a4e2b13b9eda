"""What counts as a full disk, and waiting for it."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from compressor import disk


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "quota"), True),
        (OSError("1000 requested and 12 written"), True),  # numpy's tofile
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("invalid header (os error 2)"), False),
        (ValueError("os error 28"), False),
    ],
)
def test_full(error: Exception, full: bool) -> None:
    assert disk.full(error) is full


def test_a_process_that_failed_for_want_of_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk.filled(tmp_path, "the disk is full: x could not be written") and disk.filled(tmp_path, "the disk of x has 0.001 GB free and the run")
    assert disk.filled(tmp_path, f"x cannot be written ({os.strerror(errno.ENOSPC)})")
    assert not disk.filled(tmp_path, "x is no number")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 4096}))
    assert disk.filled(tmp_path, "x is no number")


def test_everything_of_a_folder_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).write_text("x")
    seen: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.fstat(handle).st_ino))
    disk.sync_all(tmp_path)
    assert seen[-1] == tmp_path.stat().st_ino and set(seen) == {p.stat().st_ino for p in (tmp_path, *tmp_path.rglob("*"))}
