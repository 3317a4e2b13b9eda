"""What training keeps: the parameters with their moments, the good copy of all, and the checkpoint that it is written down in.

The good copy costs a parameter 4 bytes and its moments once more (tune/optimizers.py). It is read after a failed step and by checkpoints only, so it
lies in host memory, whatever the device: a GPU holds 16 bytes a parameter with AdamW, 10 with moments of 8 bits, and sends the rest to pinned pages
once a step. Cheaper copies were weighed and left: moments rounded to 16 bits save 4 bytes of 28, and a checkpoint would no longer be what the next
step starts from; a mapped file saves no memory while its pages are written every step.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor import strict
from compressor.errors import ModelError, OutputError
from compressor.prune import Pruner
from compressor.tune.optimizers import AdamW, Maker

CHECKPOINT = "tune.safetensors"


class _Unpruned:
    """The pruner of a run that prunes nothing."""

    restarts = ()

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def prune(self, step: int) -> None:
        pass

    def observe(self, step: int) -> None:
        pass

    def hold(self) -> None:
        pass


class State:
    """The parameters, their Adam moments and the pruner's tensors, and the good copy of all."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float, pruner: Pruner | None = None, make: Maker = AdamW):
        self.pruner = _Unpruned() if pruner is None else pruner
        for name, p in parameters.items():
            if p.dtype != torch.float32 or not p.requires_grad:
                raise ModelError(f"{name} cannot be trained: trainables are float32 and require a gradient, this one is {p.dtype}")
        if not parameters:
            raise ModelError("there is nothing to train: the tuner attached no parameters")
        self.parameters = dict(parameters)
        self.device = next(iter(parameters.values())).device
        for p in parameters.values():
            p.grad = torch.zeros_like(p)
        self.optimizer = make(list(parameters.values()), weight_decay)
        self.good = {key: _aside(t) for key, t in self.tensors().items()}
        self.multiplier = 1.0
        self.strikes = {"steps": 0, "evaluations": 0}  # failures in a row

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors, flat."""
        out = {f"value/{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            out |= {f"{key}/{name}": t for key, t in self.optimizer.moments(p).items()}
        return out | {f"pruned/{name}": t for name, t in self.pruner.tensors().items()}

    def keep(self) -> None:
        """The state as it is now is good."""
        self.strikes["steps"] = 0
        for key, t in self.tensors().items():
            self.good[key].copy_(t, non_blocking=True)

    def settled(self) -> dict[str, Tensor]:
        """The good copy, once all that was sent to it from a GPU has arrived."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.good

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load all tensors, or raise ValueError before any is changed."""
        live = self.tensors()
        if {k: (t.shape, t.dtype) for k, t in live.items()} != {k: (t.shape, t.dtype) for k, t in tensors.items()}:
            raise ValueError("it belongs to other parameters")
        for key, t in live.items():
            t.copy_(tensors[key])
        self.pruner.hold()

    def update(self, lr: float, clip: float) -> float:
        """One AdamW step on the gradients at hand, those of what is pruned left out; returns their norm before clipping."""
        self.pruner.hold()
        norm = self.norm()
        if clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), clip, norm)
        self.optimizer.step(lr)
        self.pruner.hold()
        return float(norm)

    def norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])


def _aside(live: Tensor) -> Tensor:
    """A copy in host memory, in pages that a GPU can write to while it works on, if that is where it comes from and the system grants them."""
    with suppress(RuntimeError):
        return torch.empty(live.shape, dtype=live.dtype, pin_memory=live.is_cuda).copy_(live)
    return torch.empty(live.shape, dtype=live.dtype).copy_(live)


@dataclass
class TrainLog:
    """What happened. curve: {step, loss, lr, grad_norm, tokens} of each applied step; evals: {step, value}; notes: sentences."""

    steps: int
    curve: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    resumed_from: int = 0


def save(path: Path, fingerprint: str, state: State, log: TrainLog, step: int) -> None:
    """Write the good state after `step` steps: to a temporary name, to the disk, then renamed."""
    record = {"fingerprint": fingerprint, "step": step, "multiplier": state.multiplier, "strikes": state.strikes, "log": asdict(log)}
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state.settled(), temporary, metadata={"state": json.dumps(record)})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"the tuning checkpoint {path} cannot be written ({error}): free some space and run the same command again") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def reached(path: Path) -> int:
    """The step of a checkpoint; -1 if there is none, or none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return int(strict.parse(file.metadata()["state"])["step"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return -1


def resume(path: Path, fingerprint: str, state: State, fresh: TrainLog) -> TrainLog:
    """Load the checkpoint into `state` and return its log; one of another run, or a damaged one, leaves the state and is noted in `fresh`."""
    try:
        with safe_open(path, framework="pt") as file:
            record = strict.parse(file.metadata()["state"])
            if record["fingerprint"] != fingerprint:
                fresh.notes.append(f"the tuning checkpoint {path} is of another run (fingerprint {record['fingerprint']}) and was not used")
                return fresh
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return adopt(record, tensors, state, fresh)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        fresh.notes.append(f"the tuning checkpoint {path} is damaged or does not fit ({error}) and was not used")
        return fresh


def adopt(record: dict[str, Any], tensors: Mapping[str, Tensor], state: State, fresh: TrainLog) -> TrainLog:
    """Put what a checkpoint holds into `state`; its log. KeyError, TypeError or ValueError, with the state as it was, if it does not fit."""
    log = TrainLog(**record["log"] | {"resumed_from": int(record["step"])})
    if log.steps != fresh.steps:
        raise ValueError(f"it is of a run of {log.steps} steps, this one has {fresh.steps}")
    multiplier, failed = float(record["multiplier"]), int(record["strikes"]["evaluations"])
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise ValueError("it holds non-finite numbers")
    state.restore(tensors)
    state.multiplier, state.strikes["evaluations"] = multiplier, failed
    state.keep()
    return log
