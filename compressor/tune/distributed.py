"""Checkpoints of a tuning run by several processes, written by all of them through torch.distributed.checkpoint (DCP), as safetensors.

DCP's own file format keeps a pickle beside its tensors; its storage for safetensors keeps none, so that one is used. Every process holds the same
state, and DCP lets each write a part of it: `tune-STEP.dcp/` holds a shard a process and `record.json`, what state.py calls the record. The
folder is written under another name and renamed by the first process when all are done. Any number of processes reads it, one included, and
several read the single file of one process: the first reads it, the others get it from there. Limits: the folder of the run must be one that all
machines see; DCP's planning messages between the processes are pickles, which nobody stores.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from compressor import strict, world
from compressor.errors import OutputError
from compressor.tune import state as single
from compressor.tune.state import CHECKPOINT, State, TrainLog

RECORD = "record.json"


def latest(folder: Path) -> Path | None:
    """The checkpoint of several processes that is furthest on, if there is one."""
    return max((p for p in folder.glob(f"tune-{'[0-9]' * 8}.dcp") if (p / RECORD).is_file()), default=None)


def save(folder: Path, fingerprint: str, state: State, log: TrainLog, step: int) -> None:
    """Write the good state after `step` steps, by all processes together; an older checkpoint goes. OutputError if it cannot be written."""
    if world.size() == 1:
        single.save(folder / CHECKPOINT, fingerprint, state, log, step)
        _clean(folder)
        return
    place = folder / f"tune-{step:08d}.dcp"
    work = place.with_suffix(".tmp")
    world.first(lambda: _fresh(work))
    record = {"fingerprint": fingerprint, "step": step, "multiplier": state.multiplier, "strikes": state.strikes, "log": asdict(log)}
    try:
        _write(work, _by_key(state))
    except (OSError, SafetensorError, ValueError) as error:
        raise OutputError(f"the tuning checkpoint {work} cannot be written ({error}): free some space and run the same command again") from None
    world.first(lambda: _finish(work, place, record))


def _by_key(state: State) -> dict[str, Tensor]:
    """The good state with names that say whose; numbers alone as rows of one, as slices of a file have at least one axis."""
    return {key: t.reshape(1) if t.dim() == 0 else t for key, t in state.settled().items()}


def _write(place: Path, tensors: dict[str, Tensor]) -> None:
    """All processes write parts of what all have."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _plain_errors():
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True))


def _read(place: Path, tensors: dict[str, Tensor]) -> None:
    """Each process reads all tensors, in place."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _plain_errors():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(place)), no_dist=world.size() == 1)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What failed in some process as a ValueError in all, and no warnings about choices that are ours."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if world.broken(cause):
            raise cause from None
        raise ValueError(str(cause).partition("\n")[0]) from None


def _fresh(work: Path) -> None:
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"the tuning checkpoint {work} cannot be written ({error}): free some space and run the same command again") from None


def _finish(work: Path, place: Path, record: dict[str, Any]) -> None:
    try:
        with (work / RECORD).open("w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(place, ignore_errors=True)
        os.replace(work, place)
    except OSError as error:
        raise OutputError(f"the tuning checkpoint {place} cannot be written ({error}): free some space and run the same command again") from None
    _clean(place.parent, place)


def _clean(folder: Path, but: Path | None = None) -> None:
    """Remove the checkpoints that another one has taken the place of, and what was never finished."""
    for old in (*folder.glob("tune-*.dcp"), *folder.glob("tune-*.tmp")):
        if old != but:
            shutil.rmtree(old, ignore_errors=True)
    if but is not None:
        with suppress(OSError):
            (folder / CHECKPOINT).unlink()


def resume(folder: Path, fingerprint: str, state: State, fresh: TrainLog) -> TrainLog:
    """Load what checkpoint there is into `state` and return its log; one of another run, or a damaged one, leaves the state and is noted."""
    place = world.first(lambda: _furthest(folder))
    if place is None:
        return _resume_single(folder / CHECKPOINT, fingerprint, state, fresh)
    try:
        record = world.first(lambda: _record(Path(place)))
        if record["fingerprint"] != fingerprint:
            fresh.notes.append(f"the tuning checkpoint {place} is of another run (fingerprint {record['fingerprint']}) and was not used")
            return fresh
        tensors = {key: torch.empty_like(t, device="cpu") for key, t in _by_key(state).items()}
        _read(Path(place), tensors)
        return single.adopt(record, {key: t.reshape(state.good[key].shape) for key, t in tensors.items()}, state, fresh)
    except (OutputError, SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if world.broken(error):
            raise
        fresh.notes.append(f"the tuning checkpoint {place} is damaged or does not fit ({error}) and was not used")
        return fresh


def _furthest(folder: Path) -> str | None:
    """The checkpoint of several processes to go on from; None if there is none, or that of one process is further on."""
    found = latest(folder)
    return None if found is None or single.reached(folder / CHECKPOINT) > int(found.stem.removeprefix("tune-")) else str(found)


def _record(place: Path) -> Any:
    try:
        return strict.read(place / RECORD, 4 * strict.LARGEST)
    except (OSError, ValueError) as error:
        raise OutputError(str(error)) from None


def _resume_single(path: Path, fingerprint: str, state: State, fresh: TrainLog) -> TrainLog:
    """The checkpoint of one process; of several the first reads it."""
    if not world.share(path.exists()):
        return fresh
    log = single.resume(path, fingerprint, state, fresh) if world.lead() else fresh
    if world.size() == 1:
        return log
    told = world.share([asdict(log), state.multiplier, state.strikes])
    for key, t in world.send(state.settled(), 0, torch.device("cpu")).items():
        state.good[key].copy_(t)
    state.restore(state.good)
    state.multiplier, state.strikes = told[1], told[2]
    return TrainLog(**told[0])
