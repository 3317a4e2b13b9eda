"""Processes that a launcher such as torchrun has started, for tests and benches that kill one."""

import contextlib
from pathlib import Path


def member(launcher: int, rank: int) -> int:
    """The process of this rank that a launcher started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # others come and go
            own = int(stat.read_text().rpartition(")")[2].split()[1]) == launcher
            if own and f"RANK={rank}".encode() in (stat.parent / "environ").read_bytes().split(b"\0"):
                return int(stat.parent.name)
    raise RuntimeError(f"the launcher {launcher} has no process {rank}")
