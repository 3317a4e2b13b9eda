"""Several processes of one command, as `torchrun` and `accelerate launch` start them: they meet, one of them speaks, and they end together.

The launcher says in the environment who a process is (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Process 0 speaks;
the others are silent until they have to say something that nobody said yet, but that the first of each machine says why it cannot join the others.
A lost process ends the others with one sentence and code 1. SIGTERM to
one or all (preemption) is heard as in `stopping` and ends all with 143: who stops leaves word, so that the others do not take it for lost.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NoReturn

from compressor import stopping
from compressor.errors import CompressorError, LostProcess, RecipeError

LINGER = 3.0  # seconds that a silent process waits with its error, for the launcher ends the others at the first that is gone
COMMANDS = ("run", "tune")  # that several processes do together


STOPPED = "stopped by a signal; the same command goes on from the last checkpoint"
_first_here = False  # a silent process that speaks for its machine until all have met


def number(name: str, usual: int) -> int:
    """A number that the launcher left in the environment."""
    text = os.environ.get(name, str(usual))
    if not text.isdecimal():
        raise RecipeError(f"{name}={text} in the environment is no number: start several processes with torchrun or accelerate launch")
    return int(text)


def count() -> int:
    """Processes of this run, as the launcher says; RANK tells a launcher from a variable that somebody left behind."""
    return number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


@contextmanager
def one_voice() -> Iterator[None]:
    """Refuse commands that one process does alone; meanwhile all processes but the first write nothing to stdout and stderr."""
    if count() < 2:
        yield
        return
    global _first_here
    if number("RANK", 0):
        _first_here = number("LOCAL_RANK", 0) == 0
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
        except SystemExit as end:
            if end.code == 2:
                time.sleep(LINGER)
            raise
        return
    yield


def aloud(sentence: str) -> None:
    """Say why this process ends, if nobody else on its machine would: before all have met the first process knows nothing of it."""
    if _first_here:
        print(sentence, file=sys.__stderr__, flush=True)


def check(command: str | None) -> None:
    """RecipeError for a command that several processes cannot do together."""
    if count() > 1 and command is not None and not command.startswith("-") and command not in COMMANDS:
        raise RecipeError(f"`compressor {command}` works in one process: start it without torchrun; several do `run` and `tune` together")


@contextmanager
def joined(device: str) -> Iterator[None]:
    """The process group of the run, for as long as it lasts; device as the recipe says. Nothing for a single process."""
    size = count()
    if size < 2:
        yield
        return
    from compressor import world

    global _first_here
    _join(device, size)
    _first_here, before = False, signal.getsignal(signal.SIGTERM)
    try:
        yield
    except stopping.Stopped as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher may send more
        if (loss := _loss(error)) is not None and not world.left("stopped", "asked"):
            _end(f"failed: {loss}", 1)
        world.tell("stopped", "asked")
        _end(STOPPED, stopping.CODE)
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if world.broken(error):
            error = LostProcess(world.lost() or str(error).splitlines()[0])
        if isinstance(error, LostProcess):
            if world.left("stopped", "asked"):
                _end(STOPPED, stopping.CODE)
            _end(f"failed: {error}", 1)
        world.tell("failed", " ".join(str(error).split())[:300])
        if not isinstance(error, CompressorError) or world.rank() == 0 or not world.told("failed", 0):
            raise
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, before)
        world.leave()


def _join(device: str, size: int) -> None:
    import torch

    from compressor import world
    from compressor.pipelines.load import pick_device

    address, port, me = _meeting(size)
    place, local = pick_device(device), number("LOCAL_RANK", 0)
    if place.index is not None:
        raise RecipeError(f"--device {device} would put all {size} processes on one GPU: leave it out, each takes one of its own")
    if place.type == "cuda":
        here, found = max(local + 1, number("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if found < here:
            raise RecipeError(f"{here} processes of this machine find {found} GPUs, and each needs one of its own: start as many as there are")
        torch.cuda.set_device(local)
    world.join(me, size, place, address, port, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _meeting(size: int) -> tuple[str, int, int]:
    """Where the processes meet, and this one's number; RecipeError where the environment is not a launcher's whole one."""
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if lacking:
        why = f"RANK and WORLD_SIZE={size} are in the environment, and {' and '.join(lacking)} not"
        raise RecipeError(f"{why}: start several processes with torchrun or accelerate launch, and unset RANK for one")
    port, me = number("MASTER_PORT", 0), number("RANK", 0)
    if not 0 < port < 1 << 16 or me >= size:
        raise RecipeError(f"MASTER_PORT={port}, RANK={me} and WORLD_SIZE={size} do not fit together: start with torchrun or accelerate launch")
    return os.environ["MASTER_ADDR"], port, me


def _loss(error: BaseException | None) -> LostProcess | None:
    """The loss that the launcher's signal came upon, if that is why it was sent."""
    while error is not None and not isinstance(error, LostProcess):
        error = error.__context__
    return error


def _end(text: str, code: int) -> NoReturn:
    """Say it, unless another process did, and exit at once: what waits for lost processes would wait long, and the launcher's next signal would
    find no handler any more and change the code."""
    from compressor import world

    if world.tell("said", text):
        print(text, file=sys.__stderr__, flush=True)
    sys.stdout.flush()
    os._exit(code)
