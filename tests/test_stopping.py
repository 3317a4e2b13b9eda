"""SIGTERM as an interruption: at once, at the end of what is held, through what lets it in, and never lost."""

import contextlib
import os
import signal
import threading

import pytest

from compressor.stopping import Stopped, asked, check, held, let_through, listening


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_is_raised_where_the_program_stands_and_the_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), listening():
        ask()
        raise AssertionError("went on")
    assert signal.getsignal(signal.SIGTERM) is before and not asked()
    assert issubclass(Stopped, KeyboardInterrupt), "whoever undoes things at Ctrl-C does so here"


def test_what_is_held_ends_first() -> None:
    done = []
    with pytest.raises(Stopped), listening():
        with held():
            with held():
                ask()
                done.append("inner")
            assert asked()
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]


def test_it_is_heard_at_once_where_it_is_let_through_and_cleaning_up_is_held() -> None:
    done = []
    with pytest.raises(Stopped), listening(), held():
        try:
            with let_through():
                ask()
                done.append("went on")
        finally:
            ask()
            done.append("cleaned")
    assert done == ["cleaned"]
    with pytest.raises(Stopped), listening(), held():
        ask()
        with let_through():
            done.append("entered")
    assert done == ["cleaned"]


def test_who_swallowed_it_meets_it_again() -> None:
    with pytest.raises(Stopped), listening():
        with contextlib.suppress(KeyboardInterrupt):
            ask()
        check()
        raise AssertionError("went on")


def test_an_error_inside_what_is_held_is_not_hidden() -> None:
    with pytest.raises(ValueError, match="mine"), listening(), held():
        ask()
        raise ValueError("mine")
    with held():
        pass  # forgotten by now


def test_an_inner_listener_forgets_nothing_and_threads_hear_nothing() -> None:
    with pytest.raises(Stopped), listening(), held():
        with listening():
            ask()
        assert asked()
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def other() -> None:
        with listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before]
