"""How the GPU benches measure: CUDA graphs in turns, memory, ceilings; and processes that check results before anything is timed.

Kernels run for the first time in checkers, never in the process that times: compiling goes in parallel and lands in Triton's cache on disk, and an
illegal access costs a checker, not the run.
"""

import contextlib
import datetime
import json
import math
import os
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compressor
from compressor.kernels import workspace

Call = Callable[[], tuple[Tensor, ...]]
_side: Any = None


def side_stream() -> Any:
    """One stream for all warm-ups and captures, so that cuBLAS's workspace for it exists before a capture begins."""
    global _side
    _side = _side or torch.cuda.Stream()
    return _side


def capture(calls: Sequence[Call]) -> tuple[Any, tuple[Tensor, ...]]:
    """A graph that makes every call once, and the results of the last one, which a replay writes anew."""
    workspace.forget_graphs()  # of our kernels one graph lives at a time; those of dense layers hold no counters
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile, and create handles and workspaces, outside the capture
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            last = call()
    torch.cuda.synchronize()
    return graph, last


class Replay:
    """Calls that are timed together: a graph of them; without `graph` one by one between two events; on a CPU by the clock."""

    def __init__(self, calls: Sequence[Call], device: str, graph: bool = True):
        self.calls, self.device, self.count = calls, device, len(calls)
        self.graph, self.last = capture(calls) if graph and device == "cuda" else (None, ())
        if not graph and device == "cuda":
            for _ in range(2):
                calls[0]()
            torch.cuda.synchronize()

    def seconds(self) -> float:
        """Seconds of one call."""
        if self.device != "cuda":
            start = time.perf_counter()
            self._run()
            return (time.perf_counter() - start) / self.count
        if self.graph is None:  # let the GPU sleep until everything is queued, so that launches by Python are not part of the time
            start = time.perf_counter()
            self._run()
            queued = time.perf_counter() - start
            torch.cuda.synchronize()
            torch.cuda._sleep(int(2.5e9 * min(queued, 0.05)))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self._run() if self.graph is None else self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.count

    def _run(self) -> None:
        for call in self.calls:
            call()

    def drift(self) -> float:
        """Relative distance of what the last replay left from what the same call gives now; 0 where nothing was captured."""
        return max((relative(a, b) for a, b in zip(self.last, self.calls[-1](), strict=True)), default=0.0) if self.last else 0.0


def race(replays: Sequence[Replay], budget: float = 0.2, least: int = 7, most: int = 60) -> list[list[float]]:
    """Seconds of a call of each, taken in turns, so that what happens to the card happens to all."""
    for one in replays:
        one.seconds()
    once = sum(one.seconds() * one.count for one in replays)
    took: list[list[float]] = [[] for _ in replays]
    for _ in range(max(least, min(most, int(budget / max(once, 1e-9))))):
        for times, one in zip(took, replays, strict=True):
            times.append(one.seconds())
    return took


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """20th, 50th, 80th, in milliseconds."""
    cuts = statistics.quantiles(times, n=5)
    return 1e3 * cuts[0], 1e3 * statistics.median(times), 1e3 * cuts[3]


def relative(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||; infinite if there is NaN in either."""
    wide = reference.detach().double()
    found = float((out.detach().double() - wide).norm() / wide.norm().clamp_min(1e-300))
    return found if found == found else math.inf


def extra_bytes(call: Call, device: str) -> int | None:
    """Most memory that a call holds beyond what is there before it and what it returns."""
    if device != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(t.numel() * t.element_size() for t in out)


def ceilings(device: str) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), operations a second of a large product in bf16."""
    big = device == "cuda"
    source = torch.empty(1 << (31 if big else 20), dtype=torch.uint8, device=device)
    target, size = torch.empty_like(source), 8192 if big else 128
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    copy, product = (Replay([call] * 3, device, graph=False) for call in (lambda: (target.copy_(source),), lambda: (a @ b,)))
    found = [statistics.median(one.seconds() for _ in range(5)) for one in (copy, product)]
    return 2 * source.numel() / found[0], 2 * size**3 / found[1]


def about(device: str) -> dict[str, str]:
    """Columns that say what was measured where, when, by which versions."""
    import triton

    gpu = torch.cuda.get_device_name(0) if device == "cuda" else "none"
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        "gpu": gpu,
        "versions": f"torch {torch.__version__}, triton {triton.__version__}, cuda {torch.version.cuda}, python {platform.python_version()}",
        "version": f"{compressor.__version__} {done.stdout.strip()}".strip(),
        "date": datetime.date.today().isoformat(),
    }


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# checkers


class Checker:
    """A process that answers a JSON line with a JSON line; one that dies or takes too long is replaced at the next question."""

    def __init__(self, command: list[str]):
        self.command = command
        self.process: subprocess.Popen[str] | None = None

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process = self.process
        assert process.stdin and process.stdout
        timer = threading.Timer(max(seconds, 0.1), process.kill)
        timer.start()
        line = ""
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            pass
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        self.process = None
        return {"note": f"its checker ended with status {process.wait()} within {seconds:.0f} s"}

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            assert self.process.stdin
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def ask_all(questions: list[dict[str, Any]], checkers: list[Checker], stop: float, limit: float = 90.0) -> list[dict[str, Any] | None]:
    """The answers, None to questions that were not reached before `stop` (by time.monotonic)."""
    free: queue.Queue[Checker] = queue.Queue()
    for checker in checkers:
        free.put(checker)

    def one(question: dict[str, Any]) -> dict[str, Any] | None:
        checker = free.get()
        try:
            left = stop - time.monotonic()
            return checker.ask(question, min(limit, left)) if left > 1 else None
        finally:
            free.put(checker)

    with ThreadPoolExecutor(len(checkers)) as pool:
        return list(pool.map(one, questions))


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A checker's side: ends itself after an error of the device, which nothing later in the process would survive, or an answer with `last`."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    for line in sys.stdin:
        fatal = False
        try:
            reply = answer(json.loads(line))
            fatal = bool(reply.pop("last", False))
        except Exception as error:  # whatever breaks belongs in the row of that case
            reply, text = {"note": first_line(error)}, str(error)
            fatal = "CUDA error" in text or "Triton Error [CUDA]" in text or "capture" in text
        channel.write(json.dumps(reply) + "\n")
        channel.flush()
        if fatal:
            os._exit(1)
