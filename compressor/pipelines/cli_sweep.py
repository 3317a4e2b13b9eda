"""The command for sweeps; `cli.py` gives it its name."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Text = str | None
Count = int | None
STORAGE = "several machines share the sweep: sqlite:///FILE, postgresql://…, mysql://… or journal:FILE (Optuna's storages)"


def sweep(
    model: Annotated[str, typer.Argument(help="tiny, a folder, a hub id or a short name, as for `run`")],
    grid: Annotated[Path, typer.Option(help="axes, base, points and exclude, as YAML: docs/sweeps.md")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="folder of the sweep; default: MODEL-GRID-sweep")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE on top of the grid's base (may be repeated)")] = None,
    data: Annotated[Text, typer.Option("--data", "--dataset", help="tuning text of all experiments")] = None,
    outside: Annotated[Text, typer.Option(help="text from outside the tuning domain, for measuring only")] = None,
    tasks: Annotated[Text, typer.Option(help="tasks that each model is measured on: names or files, by comma")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda or cuda:N")] = None,
    seed: Annotated[Count, typer.Option(help="of data order and calibration choice")] = None,
    keep: Annotated[str, typer.Option(help="models that stay: none, front (no other is smaller and better), all; reports always do")] = "front",
    timeout: Annotated[Text, typer.Option(help="end an experiment after this: 90s, 30m, 2h; its row then says failed")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="try those that failed again")] = False,
    storage: Annotated[Text, typer.Option(help=STORAGE)] = None,
    study: Annotated[Text, typer.Option(help="name of the sweep in the storage; default: that of its folder")] = None,
    trials: Annotated[Count, typer.Option(help="let Optuna's sampler try so many combinations, in place of all")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the experiments with sizes and time, and stop")] = False,
) -> None:
    """Run every combination of a grid, each in a process of its own; ended at any time, the same command goes on."""
    from compressor.pipelines.cli import console, emit, quiet

    quiet()
    from compressor.pipelines.show import RichShow
    from compressor.pipelines.sweeps import child, rows
    from compressor.pipelines.sweeps import sweep as pipeline
    from compressor.pipelines.sweeps.grid import parse_set

    common: dict[str, Any] = {"data": data, "outside": outside, "tasks": tasks, "device": device, "seed": seed}
    overrides = {key: value for key, value in common.items() if value is not None} | parse_set(settings or [])
    options = pipeline.Options(keep, child.parse_timeout(timeout), retry_failed, storage, study, trials, overrides)
    show = RichShow(console)
    if dry_run:
        document, table = pipeline.dry_run(model, grid, output, options, show)
    else:
        try:
            document, found = pipeline.sweep(model, grid, output, options, show, shlex.join(["compressor", *sys.argv[1:]]))
        except KeyboardInterrupt:
            console.print("interrupted; the same command goes on from here", highlight=False)
            raise
        table = rows.table(found)
    console.print(table)
    emit(document)
