"""Seconds and peak memory of the named stages of a run.

Linux keeps the peak resident size of a process (VmHWM) and resets it when "5" is written to /proc/self/clear_refs, so each stage gets its own
peak at no cost. Where that is not possible the number is the peak of the process so far, an upper bound for the stage. Resident size counts
mapped model files too, as far as they were touched. Stages may nest: time and memory of an inner stage count for the outer one as well.
Limit: one stack of stages a process; threads that open stages at the same time would share it.
"""

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import ClassVar


class Stage:
    """`with Stage("compress", report.seconds, report.peak_bytes): ...` adds to the one and raises the other, also when the body raises."""

    _open: ClassVar[list["Stage"]] = []

    def __init__(self, name: str, seconds: dict[str, float], peaks: dict[str, int], device: str = "cpu") -> None:
        self.name, self.seconds, self.peaks, self.device = name, seconds, peaks, device
        self.peak: dict[str, int] = {}
        self.began = 0.0

    def __enter__(self) -> "Stage":
        for stage in Stage._open:
            stage._look()  # the reset below would lose what they reached
        reset_peak(self.device)
        Stage._open.append(self)
        self.began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for stage in Stage._open:
            stage._look()
        Stage._open.remove(self)
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.began
        for suffix, value in self.peak.items():
            self.peaks[self.name + suffix] = max(self.peaks.get(self.name + suffix, 0), value)

    def _look(self) -> None:
        for suffix, value in peak_bytes(self.device).items():
            self.peak[suffix] = max(self.peak.get(suffix, 0), value)


def reset_peak(device: str = "cpu") -> bool:
    """Start counting peaks anew; False where the operating system does not allow it for host memory."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: str = "cpu") -> dict[str, int]:
    """{"": host bytes, "_gpu": bytes allocated on the CUDA device}, since the last reset; a key is missing where it cannot be known."""
    out = {}
    if host := _host_peak():
        out[""] = host
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)  # so that seconds count the work, too
        out["_gpu"] = torch.cuda.max_memory_allocated(device)
    return out


def resident_bytes() -> int:
    """What the process holds in host memory now; 0 where it cannot be known."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _host_peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
