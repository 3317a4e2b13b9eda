"""The command that measures: eval; `cli.py` gives it its name."""

import os
from pathlib import Path
from typing import Annotated

import typer

from compressor.errors import RecipeError

Text = str | None
Count = int | None
MODELS = "packed or dense model folders, hub ids, or tiny; several are compared"
DATA = (
    "text to measure on: file, folder, hub dataset, builtin or a protocol's name (may be repeated); an encoder's examples; default: Python's manual"
)
PROTOCOL = "wikitext2-2048, wikitext2-4096 or c4, from the hub, or NAME=PATH for a copy of its text (may be repeated)"
REFERENCE = "the dense model, folder or hub id: KL divergence and top-1 agreement with it; auto: the one that report.json names, if it is here"


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help=MODELS)],
    data: Annotated[list[str], typer.Option("--data", "--dataset", help=DATA)] = [],  # noqa: B006
    protocol: Annotated[list[str], typer.Option("--protocol", help=PROTOCOL)] = [],  # noqa: B006
    window: Annotated[Count, typer.Option(help="tokens of a window of --data; default: what the models were made for, at most 2048")] = None,
    stride: Annotated[
        Count, typer.Option(help="tokens from one window of --data to the next, of which alone each counts; default: the window")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="stop after this many tokens of each text; 0: the whole text")] = 0,
    reference: Annotated[Text, typer.Option(help=REFERENCE)] = None,
    tasks: Annotated[
        Text, typer.Option(help="task files, or names that lm-eval knows, by comma; --data is then measured only if it is given")
    ] = None,
    limit: Annotated[Count, typer.Option(help="tasks: examples of each; default: all, as with 0")] = None,
    shots: Annotated[Count, typer.Option(help="tasks: solved examples in front of each question; default: 0")] = None,
    seed: Annotated[Count, typer.Option(help="tasks: of the choice of solved examples; default: 42")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the tables to this file as Markdown, for a model card")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder of earlier measurements; default: compressor/eval in the user's cache folder")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="measure anew, and keep nothing")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Measure models: perplexity by named protocols, divergence from the dense model, tasks; packed folders run packed."""
    from compressor.pipelines.cli import console, emit, quiet

    quiet()
    from compressor.pipelines.measure import compare, tables
    from compressor.pipelines.report import write_text
    from compressor.pipelines.show import RichShow

    if no_cache and cache is not None:
        raise RecipeError("--cache says where measurements are kept and --no-cache that none are: leave one out")
    names = _names(tasks, {"limit": limit, "shots": shots, "seed": seed})
    if markdown is not None:
        _check_place(markdown)
    asked = compare.Asked(
        tuple(models), tuple(data), tuple(protocol), window, stride, max_tokens, reference, names, limit or 0, shots or 0,
        42 if seed is None else seed, device, None if no_cache else cache or cache_folder(),
    )  # fmt: skip
    document = compare.evaluate_all(asked, RichShow(console))
    emit(document)  # before anything that may fail
    console.print(tables.shown(document))
    if markdown is not None:
        write_text(markdown, tables.markdown(document))
        console.print(f"the tables are in {markdown}", highlight=False, markup=False)


def _names(tasks: str | None, numbers: dict[str, int | None]) -> tuple[str, ...]:
    """The tasks that were named; RecipeError for an option that names none, and for numbers of tasks without any."""
    if tasks is None:
        if flag := next((name for name, value in numbers.items() if value is not None), None):
            raise RecipeError(f"--{flag} says how tasks are asked, and there are none: give --tasks, or leave it out")
        return ()
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise RecipeError(f"--tasks {tasks!r} names no task; give task files or names that lm-eval knows, by comma")
    return names


def _check_place(file: Path) -> None:
    """RecipeError where a file cannot be written for want of a folder."""
    if not file.parent.is_dir():
        raise RecipeError(f"--markdown {str(file)!r}: there is no folder {str(file.parent)!r}; make it first")
    if file.is_dir():
        raise RecipeError(f"--markdown {str(file)!r} is a folder; give the name of a file")


def cache_folder() -> Path:
    """Where earlier measurements lie: $XDG_CACHE_HOME, else ~/.cache, and in it compressor/eval."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise RecipeError("there is no home folder to keep measurements in: set HOME, or give --cache DIR or --no-cache") from None
    return base / "compressor" / "eval"
