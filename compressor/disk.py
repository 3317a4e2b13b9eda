"""Disks: what must be on one, and not only in the memory of the operating system, before a name promises it; and when one is full."""

import errno
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOTHING = 1 << 16  # bytes in which no run ends


def sync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk. OSError if the disk fails; some file systems cannot do it for folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Wait until a folder with everything in it is on the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full; safetensors wraps the number in its message, and numpy leaves it out."""
    if isinstance(error, OSError):
        return error.errno in FULL or (error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error)) is not None)
    return isinstance(error, SafetensorError) and any(f"os error {n}" in str(error) for n in FULL)


def filled(place: Path, said: str) -> bool:
    """Whether a process that failed did so for want of space: by what it said, or because nothing is free where it wrote."""
    return (
        re.match("the disk (is full|of .* has)", said) is not None
        or any(os.strerror(n) in said for n in FULL)
        or shutil.disk_usage(place).free < NOTHING
    )
