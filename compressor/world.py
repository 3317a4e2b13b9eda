"""The processes of one run, as `torchrun` or `accelerate launch` starts them: who am I, and sums and values that all have alike.

All of it is PyTorch's own torch.distributed: NCCL between GPUs, gloo between CPUs and for small values. Without a process group, which is how
almost every run goes, there is one process: `size()` is 1 and nothing here does or costs anything. All processes call the same functions in the
same order, so decisions are made on what all have alike: a value of the first process (`share`, `first`), everybody's (`gather`), or a sum
(`add`). Values travel as JSON and tensors as their bytes: nothing is unpickled.

A process that dies closes its connections, so the next thing that the others do here fails; they call the roll and LostProcess names who is
missing, or says that the store through which they meet is gone. Limits: between GPUs a lost process is noticed by the launcher (torchrun ends the
others at once), or else by TIMEOUT.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compressor import errors
from compressor.errors import CompressorError, LostProcess
from compressor.stopping import held

TIMEOUT = timedelta(minutes=30)  # the longest wait for another process that is alive: it may be measuring, or reading a large model
PATIENCE = 5.0  # seconds for the others to answer the roll
_c10d: Any = dist  # whose stores have no types
_board: list[Any] = []  # the store of the run, where processes leave word for each other; none for one process


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def lead() -> bool:
    """Whether this process writes files and speaks to people."""
    return rank() == 0


def join(number: int, count: int, device: torch.device, address: str, port: int, attempt: str = "0") -> None:
    """Become process `number` of `count`, which meet at address:port; `attempt` keeps the words of restarted runs apart.

    The group is PyTorch's own `env://`: MASTER_ADDR and MASTER_PORT in the environment must be this address, as a launcher leaves them.
    """
    backend = f"cpu:gloo,cuda:{'nccl' if dist.is_nccl_available() else 'gloo'}" if device.type == "cuda" else "gloo"
    with _guarded():
        dist.init_process_group(backend, rank=number, world_size=count, timeout=TIMEOUT)
        store = _c10d.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))
        _board.append(_c10d.PrefixStore(f"compressor/{attempt}", store))


def leave() -> None:
    """End it; after an error the others may be gone already."""
    _board.clear()
    with suppress(RuntimeError):
        dist.destroy_process_group()


def dealt(rows: Tensor) -> Tensor:
    """This process's share of rows [count, …]: runs of equal length but for one row."""
    return rows.tensor_split(size())[rank()] if size() > 1 else rows


def share(value: Any) -> Any:
    """The first process's value, JSON, in all."""
    return _send(value, 0) if size() > 1 else value


def gather(value: Any) -> list[Any]:
    """Everybody's values, JSON, in order."""
    return [_send(value, each) for each in range(size())] if size() > 1 else [value]


def some(flag: bool) -> bool:
    """Whether it is so in any process."""
    count = torch.tensor([float(flag)])
    add([count])
    return bool(count)


def first(work: Callable[[], Any]) -> Any:
    """What `work` returns in the first process, JSON, or raises there, an error of ours, in all."""
    if size() == 1:
        return work()
    told, raised = dict[str, Any](), None
    if lead():
        try:
            told = {"value": work()}
        except CompressorError as error:
            told, raised = {"error": type(error).__name__, "text": str(error)}, error
    told = share(told)
    if raised is not None:
        raise raised
    if "error" in told:
        raise getattr(errors, told["error"], CompressorError)(told["text"])
    return told["value"]


def add(tensors: Sequence[Tensor]) -> int:
    """Sum over all processes in place: tensors of one dtype and device, in one all-reduce; returns the bytes that it reduced, 0 for one process."""
    if size() == 1:
        return 0
    flat = torch.cat([t.reshape(-1) for t in tensors])  # [numbers]
    with _guarded():
        dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view(t.shape))
    return flat.numel() * flat.element_size()


def send(tensors: dict[str, Tensor] | None, source: int, device: torch.device) -> dict[str, Tensor]:
    """Tensors by name that process `source` has, on `device` in all, bit for bit; what other processes give does not matter."""
    if size() == 1:
        return tensors or {}
    mine = tensors or {}
    heads = _send([[key, str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in mine.items()], source)
    out = {}
    for key, dtype, shape in heads:
        if rank() == source:
            t = mine[key].detach().to(device).contiguous()
        else:
            t = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        with _guarded():
            dist.broadcast(t.view(-1).view(torch.uint8), source)
        out[key] = t
    return out


def _send(value: Any, source: int) -> Any:
    data = json.dumps(value).encode() if rank() == source else b""
    length = torch.tensor([len(data)])
    with _guarded():
        dist.broadcast(length, source)
        body = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(body, source)
    return json.loads(bytes(body.tolist()))


@contextmanager
def _guarded() -> Iterator[None]:
    """A failed exchange means that somebody is gone."""
    try:
        yield
    except RuntimeError as error:
        with held():  # the launcher asks to end when one is gone, and who it is should be said first
            raise LostProcess(lost() or f"the processes of this run lost each other ({str(error).splitlines()[0]})") from None


def broken(error: BaseException) -> bool:
    """Whether an error from inside PyTorch says that an exchange failed."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def tell(key: str, text: str) -> bool:
    """Leave word for the others; whether nobody has left the same before."""
    with suppress(RuntimeError, IndexError):
        _board[0].set(f"{key}/{rank()}", text)
        return _board[0].add(f"{key}/{text}", 1) == 1
    return True


def left(key: str, text: str) -> bool:
    """Whether any process has left this word."""
    with suppress(RuntimeError, IndexError):
        return bool(_board[0].check([f"{key}/{text}"]))
    return False


def told(key: str, source: int) -> bool:
    """Whether process `source` leaves such word within PATIENCE."""
    end = time.monotonic() + PATIENCE
    with suppress(RuntimeError, IndexError):
        while time.monotonic() < end:
            if _board[0].check([f"{key}/{source}"]):
                return True
            time.sleep(0.05)
    return False


def lost() -> str:
    """A sentence about who does not answer when the roll is called, empty if all do. Every process calls the roll once something is wrong."""
    count = size()
    if count == 1:
        return ""
    try:
        absent, why = _roll(count, rank())
    except (RuntimeError, IndexError):  # nothing is known of the others without the board
        who, why = "processes lost each other: process 0, or the store through which they meet, cannot be reached", ""
    else:
        if not absent:
            return ""
        who = f"process {absent[0]} of {count} was lost" if len(absent) == 1 else f"processes {', '.join(map(str, absent))} of {count} were lost"
    return f"{who} ({why or 'killed, out of memory, or its machine went away'}): the same command goes on from the last checkpoint"


def _roll(count: int, me: int) -> tuple[list[int], str]:
    """The others that do not answer within PATIENCE, and what one of them said before it ended; RuntimeError where the board cannot be reached."""
    board, absent, end = _board[0], list(range(count)), time.monotonic() + PATIENCE
    board.set(f"here/{me}", "here")
    while absent and not left("stopped", "asked") and time.monotonic() < end:
        time.sleep(0.05)
        absent = [each for each in absent if not board.check([f"here/{each}"])]
    why = next((board.get(f"failed/{each}").decode() for each in absent if board.check([f"failed/{each}"])), "")
    return [each for each in absent if each != me], why
