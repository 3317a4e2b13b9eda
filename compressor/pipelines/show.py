"""What a person sees while a run goes on: named tasks with a bar and the time left, and single lines. Silent unless the CLI says otherwise."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def _nothing(count: int, note: str = "") -> None:
    pass


class Show:
    """Shows nothing: for the Python API and for tests."""

    @contextlib.contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """A piece of work of `total` steps; the yielded function advances it and may change the text behind the bar."""
        yield _nothing

    def say(self, text: str) -> None:
        """One line."""


class RichShow(Show):
    """Bars with elapsed and remaining time on stderr."""

    def __init__(self, console: Console):
        self.console = console

    @contextlib.contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int, str], None]]:
        label_column, left, note_column = TextColumn("{task.description:<22}"), TextColumn("left"), TextColumn("{task.fields[note]}")
        columns = (label_column, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left, TimeRemainingColumn(), note_column)
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(label, total=total, note="")

            def advance(count: int, note: str = "") -> None:
                progress.update(task, advance=count)
                if note:
                    progress.update(task, note=note)

            yield advance

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)
