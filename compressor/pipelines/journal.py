"""The work folder of a run, `OUT.partial`: what is finished, so that the same command goes on where it stopped.

A stage is known by a fingerprint of everything that decides its result (model, data, recipe up to there). Entries with another fingerprint
count as absent, and the files they promised are removed before the stage starts again. The folder is locked while a run uses it; it
disappears when the finished output folder takes its name. The kernel lets go of a lock when its process ends, however it ends, so that no lock is
ever stale. Limits: two runs on one folder from two machines are told apart only where the file system passes locks on (NFS 4 does); where it has
none at all that is said.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor import disk, strict, world
from compressor.errors import OutputError

LOCK, JOURNAL = "lock", "journal.json"  # of a work folder
ATTEMPTS = 100  # to make a lock whose folder somebody takes away
WRITTEN = "written"  # the stage of a run whose result has its name, or is about to


class Journal:
    """Finished stages of one work folder: JSON, replaced as a whole at every entry."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._path = folder / JOURNAL
        self._entries: dict[str, dict[str, Any]] = {}
        self.resumed = False
        with contextlib.suppress(FileNotFoundError, ValueError):
            entries = strict.read(self._path)
            if isinstance(entries, dict):
                self._entries = {stage: e for stage, e in entries.items() if isinstance(e, dict) and {"fingerprint", "value"} <= e.keys()}

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
        disk.sync(temporary)
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
    disk.sync(temporary)
    os.replace(temporary, path)


def under(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors NAME.PART of one module, by PART."""
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.rpartition(".")[0] == name}


def kept_facts(path: Path) -> Any:
    """The facts of a file that `keep` wrote, or None; a file that cannot be read is as good as none. Several processes ask together."""
    return world.first(lambda: _facts(path))


def _facts(path: Path) -> Any:
    with contextlib.suppress(SafetensorError, OSError, KeyError, ValueError, TypeError), safe_open(path, "pt") as file:
        return strict.parse(file.metadata()["facts"])
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
    """The journal of a work folder, made if needed, locked against a second run. OutputError if it cannot be, or holds what is not of a run."""
    if _strange(folder):
        raise OutputError(f"{folder}, where this run would keep its work, holds files that are not of a run; choose another output folder with -o")
    if link := next((path for path in (folder, folder / LOCK) if path.is_symlink()), None):
        raise _linked(link)
    with locked(folder / LOCK, f"another run is writing {folder}; wait for it or choose another output folder with -o"):
        if link := next((path for path in folder.rglob("*") if path.is_symlink()), None):
            raise _linked(link)
        yield Journal(folder)


def _linked(path: Path) -> OutputError:
    return OutputError(f"{path} is a link, and a run writes none: what it points at could be overwritten; take it away, or choose another folder")


def _strange(folder: Path) -> bool:
    try:
        return any(folder.iterdir()) and not (folder / LOCK).exists() and any(folder.iterdir())  # again: another run may just have taken it away
    except OSError:  # not there, or it will be said when it is written
        return False


@contextlib.contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold the lock on a file, which is made with its folder. OutputError: `taken` if another process holds it, or that it cannot be made.

    Who holds it may take the file away before the end: a process that had opened it then finds that it holds no file's lock, and tries again.
    """
    try:
        handle = _lock(path)
    except BlockingIOError:
        raise OutputError(taken) from None
    except OSError as error:
        raise unlockable(path.parent, error) from None
    with handle:
        yield


def unlockable(folder: Path, error: OSError) -> OutputError:
    """What to tell of a folder in which a lock cannot be made, or on whose file system there are none."""
    if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        return OutputError(f"cannot write {folder}: {error.strerror}; choose another output folder with -o")
    where = f"{folder} lies on a file system without locks ({error.strerror}), where two runs could mix what they write"
    return OutputError(f"{where}; choose an output on a local disk with -o")


def _lock(path: Path) -> IO[str]:
    for _ in range(ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):  # its holder has just taken the folder away, or there can be none here
            if handle := _tried(path):
                return handle
    raise unlockable(path.parent, OSError(errno.ENOENT, os.strerror(errno.ENOENT)))


def _tried(path: Path) -> IO[str] | None:
    """The locked file, or None if its holder took it away meanwhile. No link is followed, and nothing that a file holds is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
            return handle
    except BaseException:
        handle.close()
        raise
    handle.close()
    return None


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """While a file or files at `path` are written that no work folder is kept for: OutputError if another process is at it."""
    lock = _lock_of(path)
    with locked(lock, f"another process is writing {path}; wait for it or choose another output with -o"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{LOCK}")


def unclaim(path: Path) -> None:
    """Take away the lock that a killed process left beside a file that it had written."""
    if path.name and _lock_of(path).exists():
        with contextlib.suppress(OutputError), claimed(path):
            pass


def remove(folder: Path) -> None:
    """Take away a work folder that this process holds: journal and lock last, so that what a kill leaves of it is still known for a work folder."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == LOCK, path.name == JOURNAL)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.rmdir()


def clear(folder: Path, key: str) -> None:
    """Take away the work folder of a run that was ended when its result, known by `key`, had its name; any other stays as it is."""
    if folder.is_dir():
        with contextlib.suppress(OutputError), open_work(folder) as journal:
            if journal.get(WRITTEN, key) or {path.name for path in folder.iterdir()} == {LOCK}:
                remove(folder)
