"""Which tile sizes the kernels run with, as data: JSON files by GPU, each a few tables by operation, width of the inputs, bits, and rows of x.

A file is looked for by the name of the GPU (`nvidia_h200.json`): in the folder given to `use`, in ~/.cache/compressor/tuned, in the files shipped
beside this module; last comes the shipped file of the architecture (sm_80, sm_90, gfx942), which is complete. The first file that has an entry
wins, so a tuned file may hold a single table. Nothing tunes itself: `candidates` says what a tuning command would try, `save` writes what it found.

    {"shared": 232448, "wave": 264, "max_split": 16, "panel_from": 512, "panel": 2048,
     "tiles": {"forward 16": [[8, 8, 64, 256, 4, 4], [null, 128, 128, 256, 8, 2]], "forward 16 3": ...}}

A key is operation, bits of a number of x, and optionally bits of a weight. A row is: largest m (null: any), then the fields of Tile. Shipped rows
were compiled ahead of time for their chip and have neither spills nor too much shared memory (bench/aot.py); their speeds are starting points.
Limits of shared memory: 227 KiB on sm_90, 64 KiB on gfx942, and 99 KiB on sm_80, whose rows also serve its smaller siblings.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from compressor import strict
from compressor.errors import UserError

SHIPPED = Path(__file__).parent / "tuned"
SETTINGS = ("shared", "wave", "max_split", "panel_from", "panel")
OPS = ("forward", "grad_input", "grad_scale", "dequantize", "table_forward", "table_grad_input", "grad_table", "table_dequantize")
WIDTHS = (64, 128, 256)  # slices of a block that can be decoded
TABLE_ROWS = 128  # prepared tables are padded to a multiple of this, and no tile reads more rows at once
_folder: Path | None = None


class Chip(NamedTuple):
    """A GPU's file name, and the architecture whose shipped file stands behind it."""

    gpu: str
    arch: str


class Tile(NamedTuple):
    """bm rows of x, bn rows of the weight, `width` of the 256 columns of a block: the three sides of one matrix product."""

    bm: int
    bn: int
    width: int
    warps: int
    stages: int


class Table(NamedTuple):
    """One file: settings by name, and for each key rows of (largest m or None, tile), in order."""

    settings: dict[str, int]
    tiles: dict[str, tuple[tuple[int | None, Tile], ...]]


def chip(name: str, major: int, hip: bool) -> Chip:
    """The chip of a device: AMD, Hopper, or the rest.

    What came after Hopper takes the rows of sm_80: those of sm_90 compile for sm_100 (three cases, no spills), but their instruction is gone, and
    the loop for few rows takes half as many instructions again; sm_120 has the shared memory of sm_80's small siblings.
    """
    gpu = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return Chip(gpu, "gfx942" if hip else "sm_90" if major == 9 else "sm_80")


def cache() -> Path:
    """Where a user's own files lie."""
    try:
        return Path.home() / ".cache" / "compressor" / "tuned"
    except RuntimeError:
        raise UserError("there is no home folder to keep tuned tiles in: set HOME or name a file") from None


def use(folder: Path | None) -> None:
    """Look for files in this folder first."""
    global _folder
    _folder = folder
    for cached in (_files, rows, setting):
        cached.cache_clear()


def tile(op: str, where: Chip, m: int, itemsize: int, bits: int) -> Tile:
    """The tile for m rows of x with elements of `itemsize` bytes."""
    return next(t for most, t in rows(op, where, itemsize, bits) if most is None or m <= most)


@functools.lru_cache
def rows(op: str, where: Chip, itemsize: int, bits: int) -> tuple[tuple[int | None, Tile], ...]:
    """(largest m, tile) of every tile that the operation runs with on that chip."""
    width = 32 if itemsize > 2 else 16
    for _, table in _files(where):
        for key in (f"{op} {width} {bits}", f"{op} {width}"):
            if key in table.tiles:
                return table.tiles[key]
    raise UserError(f"no tiles for {op} with {width}-bit inputs in the files of {where.arch}")


@functools.lru_cache
def setting(name: str, where: Chip) -> int:
    """shared: bytes of shared memory; wave: programs that fill the chip; max_split: most parts of a reduction; panel_from: least m for dense panels;
    panel: rows (columns) of one."""
    for _, table in _files(where):
        if name in table.settings:
            return table.settings[name]
    raise UserError(f"no setting {name} in the files of {where.arch}")


def split(where: Chip, programs: int, steps: int) -> int:
    """In how many parts to cut a reduction of `steps` steps so that a grid of `programs` fills the device; a power of two."""
    parts = 1
    while parts < setting("max_split", where) and programs * parts * 2 <= setting("wave", where) and parts * 4 <= steps:
        parts *= 2
    return parts


@functools.lru_cache
def _files(where: Chip) -> tuple[tuple[Path, Table], ...]:
    folders = [_folder] if _folder else []
    with contextlib.suppress(UserError):  # no home: no user's files
        folders.append(cache())
    folders.append(SHIPPED)
    paths = [folder / f"{where.gpu}.json" for folder in folders if where.gpu]
    return tuple((path, load(path)) for path in [*paths, SHIPPED / f"{where.arch}.json"] if path.is_file())


def load(path: Path) -> Table:
    """Read and check a file."""
    try:
        raw = strict.read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): correct or delete it") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("tiles", {}), dict):
        raise UserError(f'{path} must hold an object with settings and "tiles"')
    settings = {name: value for name, value in raw.items() if name != "tiles"}
    for name, value in settings.items():
        if name not in SETTINGS or type(value) is not int or value < 1:
            raise UserError(f"{path}: {name} must be one of {', '.join(SETTINGS)} with a positive whole number")
    return Table(settings, {key: _rows(path, key, value) for key, value in raw.get("tiles", {}).items()})


def _rows(path: Path, key: str, value: Any) -> tuple[tuple[int | None, Tile], ...]:
    """The rows of one key, or one sentence about what is wrong with them."""
    if not re.fullmatch(r"\w+ (16|32)( [2-8])?", key):
        raise UserError(f'{path}: key "{key}" must read like "forward 16" or "forward 16 3"')
    if key.split()[0] not in OPS:
        raise UserError(f'{path}: key "{key}" must begin with one of {", ".join(OPS)}')
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and len(row) == 6 for row in value):
        raise UserError(f'{path}: "{key}" must be a list of rows [largest m or null, {", ".join(Tile._fields)}]')
    most = [row[0] for row in value]
    if most[-1] is not None or any(type(m) is not int for m in most[:-1]) or most[:-1] != sorted(set(most[:-1])):
        raise UserError(f'{path}: "{key}" must have growing largest m, and null in the last row')
    for _, *fields in value:
        if wrong := _wrong(key.split()[0], fields):
            raise UserError(f'{path}: "{key}" has the tile {fields}, but {wrong}')
    return tuple((m, Tile(*fields)) for m, *fields in value)


def _wrong(op: str, fields: list[Any]) -> str:
    """What the kernels do not take in a tile; with it they would not compile, or read tables beyond their end. The rest costs only time."""
    *sides, stages = fields
    if any(type(side) is not int or side < 1 or side & (side - 1) for side in sides) or type(stages) is not int or stages < 1:
        return "sides and warps must be powers of two, and stages a positive whole number"
    bm, bn, width, _ = sides
    least = 16 if op in ("grad_scale", "grad_table") else 8  # they sum over bm
    if bm < least or bn < 16:
        return f"bm must be at least {least} and bn at least 16"
    if width not in WIDTHS or (op == "grad_table" and width == 256):
        return f"width must be {' or '.join(str(w) for w in WIDTHS if op != 'grad_table' or w < 256)}"
    if "table" in op and bn > TABLE_ROWS:
        return f"bn must be at most {TABLE_ROWS}, to which the rows of tables are padded"
    return ""


def save(path: Path, table: Table) -> None:
    """Write a file that `load` reads back as the same table, one row a line."""
    parts = [f'  "{name}": {value},\n' for name, value in table.settings.items()]
    keys = []
    for key, value in table.tiles.items():
        lines = ",\n".join("      " + json.dumps([most, *t]) for most, t in value)
        keys.append(f'    "{key}": [\n{lines}\n    ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text("{\n" + "".join(parts) + '  "tiles": {\n' + ",\n".join(keys) + "\n  }\n}\n")
    part.replace(path)


def candidates(op: str, where: Chip, itemsize: int) -> list[Tile]:
    """Tiles worth timing: those that the chip's files name for any number of rows, and their neighbours in every side, within shared memory."""
    width = "32" if itemsize > 2 else "16"
    tables = [table for _, table in _files(where)]
    known = {t for table in tables for key, value in table.tiles.items() if key.split()[:2] == [op, width] for _, t in value}
    near = {changed for t in known for changed in _neighbours(t)}
    return sorted(t for t in known | near if _bytes(op, t, itemsize) <= setting("shared", where))


def _neighbours(t: Tile) -> Iterable[Tile]:
    for bm in (t.bm // 2, t.bm, t.bm * 2):
        for bn, warps in ((64, 4), (128, 4), (128, 8)):
            for stages in (t.stages - 1, t.stages, t.stages + 1):
                if 8 <= bm <= 128 and 2 <= stages <= 5:
                    yield t._replace(bm=bm, bn=bn, warps=warps, stages=stages)


def _bytes(op: str, t: Tile, itemsize: int) -> int:
    """A lower bound on shared memory: the operands that are loaded ahead, at 4 bits."""
    if op.endswith("scale") or op == "grad_table":
        return t.stages * t.bm * (t.bn + t.width) * itemsize
    return (t.stages - 1) * (t.bm * t.width * itemsize + t.bn * t.width // 2)
