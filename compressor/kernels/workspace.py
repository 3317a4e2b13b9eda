"""Small device buffers that outlive a call: counters of split reductions, and constants that kernels read from memory.

Counters are zero before and after every launch, so launches that follow one another may share them: one buffer for each device and stream. A captured
graph may later run beside anything, so each captured launch gets counters of its own, cut from a buffer made at the device's first eager call;
where none is left (or no call came before), zeros are written inside the graph. `forget_graphs` takes all slices back.

Price: 1 MiB a device and 4 KiB a stream. Limits: a graph's counters are not given back when it is deleted.
"""

import threading

import torch
from torch import Tensor

COUNTERS = 1024  # at least, for a stream
CAPTURED = 1 << 18  # for all captured launches of a device

_counters: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[torch.device, Tensor] = {}  # what is left
_constants: dict[tuple[torch.device, int], Tensor] = {}
_lock = threading.Lock()


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def counters(device: torch.device, count: int) -> Tensor:
    """int32 [>= count], all zero, for the next launch on the current stream of `device`, which must leave them zero."""
    with _lock:
        if capturing(device):
            left = _captured.get(device)
            if left is None or left.numel() < count:
                return torch.zeros(count, dtype=torch.int32, device=device)
            _captured[device] = left[count:]
            return left[:count]
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        key = (device, stream.cuda_stream if stream else 0)
        if key not in _counters or _counters[key].numel() < count:
            _counters[key] = torch.zeros(max(COUNTERS, count), dtype=torch.int32, device=device)
        if stream and device not in _captured:
            _captured[device] = torch.zeros(CAPTURED, dtype=torch.int32, device=device)
            stream.synchronize()  # once: a graph may use them on any stream
        return _counters[key]


def forget_graphs() -> None:
    """Give back what captured graphs took; only when none of them will run again."""
    with _lock:
        _captured.clear()


def constant(value: int, device: torch.device) -> Tensor:
    """int32 [1] holding `value`."""
    if capturing(device) and (device, value) not in _constants:
        return torch.full((1,), value, dtype=torch.int32, device=device)  # belongs to the graph
    with _lock:
        if (device, value) not in _constants:
            _constants[device, value] = torch.tensor([value], dtype=torch.int32, device=device)  # waits for the copy, so any stream may read it
        return _constants[device, value]
