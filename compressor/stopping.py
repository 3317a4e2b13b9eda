"""Being asked to end by SIGTERM, which clusters send before they take a machine away, and what such a request must not cut in two.

While `listening` lasts the signal is an interruption like Ctrl-C, `Stopped`, raised where the program stands. Inside `held` it waits for the end of
the block: things are done there that belong together, such as a folder and its name, or a child process and who waits for it. A long loop is held as
a whole and asks `asked` where it can leave something to go on from. Whoever swallows the exception meets it again at the end of the next `held`.

Limits: one state a process, and signals reach its main thread alone. A call into C ends before Python hears of anything.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

CODE = 128 + signal.SIGTERM  # what a shell calls the end by this signal: 143
_asked = False
_depth = 0  # of blocks that are held


class Stopped(KeyboardInterrupt):
    """The process was asked to end."""


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Hear SIGTERM while this lasts; before and after it does what it did. Nothing in threads, which get no signals."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _asked &= before is _hear  # the outermost forgets


def _hear(_signal: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = True
    check()


def asked() -> bool:
    """Whether the process should end as soon as it can."""
    return _asked


def check() -> None:
    """Raise Stopped if the process was asked to end and nothing is held."""
    if _asked and not _depth:
        raise Stopped


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A request to end waits for the end of this block."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    check()


@contextlib.contextmanager
def let_through() -> Iterator[None]:
    """Inside `held`: while this lasts a request to end is heard at once."""
    global _depth
    depth, _depth = _depth, 0
    try:
        check()
        yield
    finally:
        _depth = depth
