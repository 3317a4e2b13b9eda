"""The command that writes a report as files: report; `cli.py` gives it its name."""

from pathlib import Path
from typing import Annotated

import typer

SOURCE = "folder of a run or of a sweep, or a report.json"


def report(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help=SOURCE)],
    svg: Annotated[bool, typer.Option("--svg", help="figures as SVG files, text as outlines")] = False,
    png: Annotated[bool, typer.Option("--png", help="figures as PNG files, 300 dots an inch")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="results and layers as CSV files, numbers as measured")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="the table of results, for a model card")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="folder to write; default: beside the source, its name with -report")] = None,
) -> None:
    """Figures for papers, tables for machines and for model cards, and the page, of a run or a sweep; without a flag, all of them."""
    from compressor.pipelines.cli import console, emit
    from compressor.pipelines.pages import files
    from compressor.pipelines.show import RichShow

    asked = [kind for kind, wanted in zip(files.KINDS, (svg, png, csv, markdown), strict=True) if wanted]
    emit(files.write(source, output, asked or files.KINDS, RichShow(console)))
