"""The work folder of a run, `OUT.partial`: what is finished, so that the same command goes on where it stopped.

A stage is known by a fingerprint of everything that decides its result (model, data, recipe up to there). Entries with another fingerprint
count as absent, and the files they promised are removed before the stage starts again. The folder is locked while a run uses it; it
disappears when the finished output folder takes its name.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor import world
from compressor.errors import OutputError


class Journal:
    """Finished stages of one work folder: JSON, replaced as a whole at every entry."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._path = folder / "journal.json"
        self._entries: dict[str, dict[str, Any]] = {}
        self.resumed = False
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            entries = json.loads(self._path.read_text("utf-8"))
            if isinstance(entries, dict):
                self._entries = entries

    def get(self, stage: str, fingerprint: str) -> Any:
        """The value of a finished stage, or None if it is not finished for this fingerprint."""
        entry = self._entries.get(stage)
        if entry is None or entry["fingerprint"] != fingerprint:
            return None
        self.resumed = True
        return entry["value"]

    def put(self, stage: str, fingerprint: str, value: Any) -> None:
        self._entries[stage] = {"fingerprint": fingerprint, "value": value}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._entries, indent=1) + "\n", "utf-8")
        os.replace(temporary, self._path)

    def subfolder(self, stage: str, fingerprint: str) -> Path:
        """A folder for the files of a stage, emptied if it belongs to another fingerprint."""
        path = self.folder / f"{stage}-{fingerprint}"
        for old in self.folder.glob(f"{stage}-*"):
            if old != path and old.is_dir():
                shutil.rmtree(old)
        path.mkdir(exist_ok=True)
        return path


def keep(path: Path, tensors: dict[str, Tensor], facts: Any) -> None:
    """Tensors with what belongs to them, JSON, in one safetensors file that is whole on the disk before it has its name. Of several
    processes the first writes it."""
    if not world.lead():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, temporary, metadata={"facts": json.dumps(facts)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def kept_facts(path: Path) -> Any:
    """The facts of a file that `keep` wrote, or None; a file that cannot be read is as good as none. Several processes ask together."""
    return world.first(lambda: _facts(path))


def _facts(path: Path) -> Any:
    with contextlib.suppress(SafetensorError, OSError, KeyError, ValueError, TypeError), safe_open(path, "pt") as file:
        return json.loads(file.metadata()["facts"])
    return None


def kept(path: Path) -> tuple[dict[str, Tensor], Any] | None:
    """Tensors and facts of a file that `keep` wrote, or None. Several processes ask together, and all get what the first one reads."""
    found = _read(path) if world.lead() else None
    facts = world.share(None if found is None else found[1])
    if facts is None:
        return None
    return world.send(None if found is None else found[0], 0, torch.device("cpu")), facts


def _read(path: Path) -> tuple[dict[str, Tensor], Any] | None:
    facts = _facts(path)
    if facts is not None:
        with contextlib.suppress(SafetensorError, OSError, ValueError):
            return load_file(path), facts
    return None


@contextlib.contextmanager
def open_work(folder: Path) -> Iterator[Journal]:
    """The journal of a work folder, made if needed, locked against a second run."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "lock").exists():
        raise OutputError(f"{folder}, where this run would keep its work, holds files that are not of a run; choose another output folder with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}; choose another output folder with -o") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another run is writing {folder}; wait for it or choose another output folder with -o") from None
        yield Journal(folder)
