"""The output folder as a place: whether it is ours, whether it is finished, whether the disk will hold it, and how it gets its name."""

import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from compressor import disk, strict
from compressor.errors import ModelError, OutputError
from compressor.export import task
from compressor.integrations import peft
from compressor.pipelines import digests
from compressor.pipelines.checkpoint import COMPANIONS, INDEX, weight_files
from compressor.stopping import held

TASK_FILE = "task.safetensors"
OWN_FILES = ("README.md", "recipe.yaml", "report.json", "report.html", digests.NAME, TASK_FILE)  # about the model, not of it: not counted in its size
WRITTEN = (*OWN_FILES, *COMPANIONS, INDEX, "config.json", "quantize_config.json", "model*.safetensors")


def contract(report: dict[str, Any], output: Path) -> dict[str, Any]:
    """The stable document for scripts, from a report."""
    keys = ("dense", "pruned", "packed", "tuned", "seconds", "peak_bytes", "resumed")
    place = {"output": str(output)} | ({"task": str(output / TASK_FILE)} if task_only(report) else {})
    return place | {key: report[key] for key in keys if report.get(key) is not None}


def task_only(report: dict[str, Any]) -> bool:
    """Whether the run left a task file and no model."""
    recipe = report.get("recipe")
    return isinstance(recipe, dict) and recipe.get("save") == "task"


def read_report(folder: Path) -> dict[str, Any]:
    """report.json of a finished run as a plain dict; empty if the folder has none of ours."""
    try:
        report = strict.read(folder / "report.json")
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) and "compressor" in report and "keys" in report else {}


def finished(output: Path, key: str) -> dict[str, Any] | None:
    """The contract document of a whole output folder, of a model or of a task file, that the same recipe, model and data have written, or None."""
    report = read_report(output)
    if report.get("keys") != key:
        return None
    try:
        if task_only(report):
            task.read_header(output / TASK_FILE)
        else:
            weight_files(output)
    except ModelError:
        return None
    return contract(report, output) | {"resumed": True} | ({"digest": found["root"]} if (found := digests.recorded(output)) else {})


def place_of(output: Path) -> Path:
    """Where an output really lies, whatever links lead there. OutputError for a name that can be none."""
    try:
        place = output.resolve()
        os.path.lexists(place) or place.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError
        raise OutputError(f"{output} cannot be an output: {getattr(error, 'strerror', None) or error}; choose another one with -o") from None
    if not place.name:
        raise OutputError(f"{output} cannot be an output folder; choose another one with -o")
    return place


def check_writable(place: Path) -> None:
    """Refuse before any work where nothing can be written: below a file, in a folder without rights, on a disk that is read-only."""
    above = place.parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise OutputError(f"{place} cannot be written: {above} is no folder; choose another output with -o")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{place} cannot be written: {above} is read-only, or belongs to somebody else; choose another output with -o")


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to touch what is there, unless it is a run's own folder, holds nothing else, and may be overwritten; and what cannot be written."""
    if output == Path.cwd() or output.is_mount():
        raise OutputError(f"{output} is the current folder or a mount point and cannot be replaced; name a folder inside it with -o")
    check_writable(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise OutputError(f"{output} is a file; choose another folder with -o")
    foreign = [p.name for p in sorted(output.iterdir()) if not _ours(p)]
    if foreign or not read_report(output):
        raise OutputError(
            f"{output} already holds files that are not of a run ({foreign[0] if foreign else 'no report'}); choose another folder with -o"
        )
    if not overwrite:
        raise OutputError(f"{output} already holds the result of another run; add --overwrite or choose another folder with -o")


def _ours(path: Path) -> bool:
    """Whether a run may have written this file, or folder of an adapter."""
    if path.is_dir():
        return path.name == peft.FOLDER and all(inner.name in (peft.CONFIG, peft.WEIGHTS) for inner in path.iterdir())
    return any(fnmatch(path.name, pattern) for pattern in WRITTEN)


def check_room(output: Path, need: int) -> None:
    """Refuse before any work where the disk cannot hold what the run will write, `need` bytes."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need:
        room = f"has {free / 1e9:.3f} GB free and the run writes up to {need / 1e9:.3f} GB"
        raise OutputError(f"the disk of {output} {room}; free some space or choose another folder with -o")


def publish(folder: Path, output: Path, work: Path, source: Mapping[str, str] | None, overwrite: bool) -> str:
    """Give the finished folder its digests and, once all of it is on the disk, its name; what lay there moves into the work folder, which goes away.

    source: name and sha256 of the model that it was made from. Returns the folder's root digest. A kill leaves the old folder there, or none, or the
    new one. OutputError where meanwhile something has come that may not be replaced.
    """
    root: str = digests.seal(folder, source)["root"]
    disk.sync_all(folder)
    with held():
        if output.exists():
            check_output(output, overwrite)  # again: the first check may be hours old
            old = work / "old"
            shutil.rmtree(old, ignore_errors=True)
            os.rename(output, old)
        os.rename(folder, output)
        disk.sync(output.parent)
    return root
