"""Disks: what must be on one, and not only in the memory of the operating system, before a name promises it; and when one is full."""

import contextlib
import errno
import os
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk. OSError if the disk fails; some file systems cannot do it for folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(*([OSError] if path.is_dir() else [])):
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Wait until a folder with everything in it is on the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full; safetensors wraps the number in its message."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return isinstance(error, SafetensorError) and any(f"os error {n}" in str(error) for n in FULL)
