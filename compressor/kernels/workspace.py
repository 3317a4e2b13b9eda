"""Small device buffers that outlive a call: counters of split reductions, and constants that kernels read from memory.

Counters are zero before and after every launch, so launches that follow one another may share them: one slice for each device and stream. A captured
graph may later run beside anything, so each captured launch gets a slice of its own. All slices are cut from one arena a device, made at its first
eager call: those of streams from its start, those of graphs from its end. Where none is left (or no eager call came before), zeros are written for
that launch alone, inside the graph if there is one. `forget_graphs` takes back what graphs have.

What persists is made in a thread of its own: torch.compile's "reduce-overhead" warms its graphs up by eager calls whose memory comes from the graph's
pool, where nothing may stay, and that redirection, like inference mode and default devices, holds for one thread only.

Price: 1 MiB a device, and once a device a thread and a wait. Limits: a graph's counters are not given back when it is deleted.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

COUNTERS = 1024  # at least, for a stream
ARENA = 1 << 18  # for all streams and captured launches of a device


@dataclass
class _Arena:
    """int32 zeros; streams have [0, low), graphs [high, end)."""

    zeros: Tensor
    low: int
    high: int

    def for_stream(self, count: int) -> Tensor | None:
        if self.high - self.low < count:
            return None
        self.low += count
        return self.zeros[self.low - count : self.low]

    def for_graph(self, count: int) -> Tensor | None:
        if self.high - self.low < count:
            return None
        self.high -= count
        return self.zeros[self.high : self.high + count]


_arenas: dict[torch.device, _Arena] = {}
_streams: dict[tuple[torch.device, int], Tensor] = {}
_constants: dict[tuple[torch.device, int], Tensor] = {}
_lock = threading.Lock()


def capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def counters(device: torch.device, count: int) -> Tensor:
    """int32 [>= count], all zero, for the next launch on the current stream of `device`, which must leave them zero."""
    with _lock:
        taken = _of_graph(device, count) if capturing(device) else _of_stream(device, count)
    return torch.zeros(count, dtype=torch.int32, device=device) if taken is None else taken


def _of_graph(device: torch.device, count: int) -> Tensor | None:
    arena = _arenas.get(device)
    return None if arena is None else arena.for_graph(count)


def _of_stream(device: torch.device, count: int) -> Tensor | None:
    """The stream's slice, or a longer one in its place."""
    if device not in _arenas:
        _arenas[device] = _Arena(_persistent(device, lambda: torch.zeros(ARENA, dtype=torch.int32, device=device)), 0, ARENA)
    key = (device, _stream(device))
    if key not in _streams or _streams[key].numel() < count:
        taken = _arenas[device].for_stream(max(COUNTERS, count))
        if taken is None:
            return None
        _streams[key] = taken
    return _streams[key]


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _persistent(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, in memory of no graph, and ready for any stream. Not while capturing: memory taken by other threads breaks that off."""

    def work() -> Tensor:
        out = make()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return out

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def forget_graphs() -> None:
    """Give back what captured graphs took; only when none of them will run again."""
    with _lock:
        for arena in _arenas.values():
            arena.high = arena.zeros.numel()


def constant(value: int, device: torch.device) -> Tensor:
    """int32 [1] holding `value`."""
    with _lock:
        if (device, value) not in _constants:
            if capturing(device):
                return torch.full((1,), value, dtype=torch.int32, device=device)  # belongs to the graph
            _constants[device, value] = _persistent(device, lambda: torch.full((1,), value, dtype=torch.int32, device=device))
        return _constants[device, value]
