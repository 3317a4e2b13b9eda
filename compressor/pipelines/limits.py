"""Foreign programs with an end: templates of chats, which come with tokenizers and may loop for ever or fill the memory.

They run in jinja's sandbox, which keeps them from files, attributes and modules, but not from time and memory: a timer of the process ends them, and
a limit on its address space, where the system has one. Limit: the timer works in the main thread alone, where commands run.
"""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SECONDS, MEMORY = 2.0, 256 << 20


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """TimeoutError inside after SECONDS, MemoryError for what takes more than MEMORY bytes beyond what the process has."""
    with _timer(SECONDS), _room(MEMORY):
        yield


@contextlib.contextmanager
def _timer(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield  # somebody else's timer runs
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _room(memory: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (size if soft == resource.RLIM_INFINITY else min(size, soft), hard))
    except (OSError, ValueError):  # no such limit here
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
