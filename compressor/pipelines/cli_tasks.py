"""The commands for task files; `cli.py` gives them their names."""

from pathlib import Path
from typing import Annotated

import typer

Text = str | None
Number = float | None
ANY = "a packed model folder: the untuned one; for one file also one whose scales, tables or zeros, as it holds, or adapter alone were tuned"
BASE = "the untuned packed folder, whose values changes count from"


def task(
    model: Annotated[str, typer.Argument(help="a packed model folder")],
    output: Annotated[Path, typer.Option("-o", "--output", help="safetensors file to write")],
) -> None:
    """Take what a tuning moved, scales, tables, zeros or an adapter, out of a packed folder, as one small file."""
    from compressor.pipelines.cli import emit, quiet

    quiet()
    from compressor.pipelines.tasks import extract

    emit(extract(model, output))


def apply(
    base: Annotated[str, typer.Argument(help=ANY)],
    files: Annotated[list[Path], typer.Argument(help="task files; several add up, with weight 1 each")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write; new or empty")],
) -> None:
    """Write a packed folder with what a task file holds in place of its own, or with the sum of several."""
    from compressor.pipelines.cli import console, emit, quiet

    quiet()
    from compressor.pipelines.export import apply as apply_tasks
    from compressor.pipelines.show import RichShow

    emit(apply_tasks(base, files, output, RichShow(console)))


def diff(
    a: Annotated[str, typer.Argument(help="a packed model folder or a task file")],
    b: Annotated[str, typer.Argument(help="another")],
) -> None:
    """Say whether two folders or task files have one base, and how far what tuning moves is apart."""
    from compressor.pipelines.cli import console, emit, quiet

    quiet()
    from compressor.pipelines.differences import diff as compare

    document, table = compare(a, b)
    console.print(table)
    emit(document)


def merge_tasks(
    base: Annotated[str, typer.Argument(help=BASE)],
    files: Annotated[list[Path], typer.Argument(help="task files of that base")],
    output: Annotated[Path, typer.Option("-o", "--output", help="task file to write")],
    method: Annotated[str, typer.Option(help="sum, ties, breadcrumbs, lines, soup or greedy")] = "sum",
    weights: Annotated[Text, typer.Option(help="one number a task, with commas; default: 1 each; of ties only their ratios count")] = None,
    density: Annotated[Number, typer.Option(help="share of the changes that stays: ties 0.2, breadcrumbs 0.1")] = None,
    outliers: Annotated[Number, typer.Option(help="breadcrumbs: share of a layer's largest changes that goes; default 0.01")] = None,
    scale: Annotated[float, typer.Option(help="factor of the merged change")] = 1.0,
    lines: Annotated[
        Text, typer.Option(help="scale by depth, after any method: factor of the first block, and its growth up to the last: 0.3, 0.3,0.7 or auto")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="text to measure on, one a task, in their order (repeat it)")] = None,
    window: Annotated[int | None, typer.Option(help="tokens of a window; default: what the model was made for, at most 2048")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="stop after this many tokens a text; 0: the whole held-out part")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
) -> None:
    """Merge task files of one base into one, and measure it on the data of each."""
    from compressor.pipelines.cli import console, emit, quiet

    quiet()
    from compressor.export.merge import Options
    from compressor.pipelines import merging
    from compressor.pipelines.show import RichShow

    options = Options(method, merging.parse_numbers(weights, "--weights"), density, outliers, scale, merging.parse_lines(lines))
    texts = merging.Texts(tuple(data or ()), window, max_tokens)
    document, table = merging.merge_tasks(base, files, output, options, texts, device, RichShow(console))
    if table is not None:
        console.print(table)
    emit(document)
