"""`compressor verify FOLDER`: whether a folder is still what was written, by its digests (pipelines/digests.py).

Every listed file is read once and its sha256 compared; only in a file that differs are tensors looked at, one by one, and those named whose bits,
name, dtype or shape changed, with the range of bytes. Then whether weights, recipe, card and reports are of one model: card and reports name the
digest of the model, the recipe must be that of the report. A folder without digests is `unproven`: headers are checked to be whole and floating-point
tensors to be finite, which is all that can be known.

Price: a pass over the folder (docs/trust.md has the seconds); memory, a piece of 1 MiB. Limit: digests in a folder say that it is as it was written,
not who wrote it; for that, compare with a root noted elsewhere (`--digest`).
"""

import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

from compressor import strict
from compressor.errors import ModelError, RecipeError
from compressor.pipelines import checkpoint, digests, yaml_text
from compressor.pipelines.digests import Span
from compressor.pipelines.show import Show
from compressor.pipelines.tasks import cell, line

WHOLE, BROKEN, UNPROVEN = "whole", "broken", "unproven"
CODES = {WHOLE: 0, BROKEN: 1, UNPROVEN: 2}  # that the command exits with
RECIPE = "recipe.yaml"
SHOWN = 40  # faults in the table; the document has all
READ, LONGEST = 1 << 24, 1 << 18  # characters of a report or a card, and of a recipe, that are looked at
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CAPTION = "digests say that a folder is as it was written, not who wrote it: compare the root digest with one noted elsewhere (--digest)"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file, and with which tensor of it; begin and end: the bytes of that tensor among which bits changed."""

    file: str
    what: str
    tensor: str = ""
    begin: int | None = None
    end: int | None = None


def verify(folder: Path, source: str | None = None, digest: str | None = None, show: Show | None = None) -> tuple[dict[str, Any], Table]:
    """Compares a folder with its digests; returns the document for scripts and a table for people. The folder is only read.

    source: the model that it should have been made from. digest: the root, model or weights digest that it should have. ModelError for what is no
    folder, or an empty one; RecipeError for a digest that is none.
    """
    start, show = time.perf_counter(), show or Show()
    wanted = None if digest is None else _digest(digest)
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder here; verify reads what is on this disk, so give a model folder")
    names, faults = digests.listed(folder), list[Fault]()
    try:
        sealed = digests.read(folder)
    except ModelError as error:
        sealed, faults = None, [Fault(digests.NAME, str(error))]
    if sealed is None and not names:
        raise ModelError(f"{folder} holds nothing to verify")
    if sealed is None:
        faults += [*_unlisted(folder), *_checked(folder, names, show)]
    else:
        faults += [*_contradictions(sealed), *_compared(folder, sealed, show, wanted), *_extra(folder, names, sealed), *_together(folder, sealed)]
    faults += _asked(sealed, source, wanted)
    verdict = BROKEN if faults else UNPROVEN if sealed is None else WHOLE
    known = {key: sealed[key] for key in ("root", "model", "weights", "source")} if sealed else {}
    document = {"folder": str(folder), "verdict": verdict} | known | {"files": len(names), "bytes": _bytes(folder, names)}
    document |= {"faults": [_plain(fault) for fault in faults], "notes": _notes(folder, sealed), "seconds": round(time.perf_counter() - start, 3)}
    return document, _table(document)


def _digest(text: str) -> str:
    found = text.lower().removeprefix("sha256:")
    if not re.fullmatch("[0-9a-f]{64}", found):
        raise RecipeError(f"--digest {text[:80]!r} is no sha256, which has 64 hex digits; `compressor verify` prints that of a folder")
    return found


def _bytes(folder: Path, names: list[str]) -> int:
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


def _plain(fault: Fault) -> dict[str, Any]:
    return {key: value for key, value in asdict(fault).items() if key == "file" or value not in ("", None)}


def _notes(folder: Path, sealed: Mapping[str, Any] | None) -> list[str]:
    """What a reader should know beside the verdict; what lies in a folder with digests that they do not list is a fault of it."""
    if sealed:
        return []
    inside = [name for name in _beside(folder, digests.listed(folder)) if (folder / name).is_dir()]
    unseen = [f"the folder {line(name)} inside it was not looked at" for name in inside]
    return ["the folder has no digests, so nothing proves what it holds; headers and numbers were checked", *unseen]


def _beside(folder: Path, names: Iterable[str]) -> list[str]:
    """What lies in a folder that is neither one of these files nor the folder of one; hidden things are passed over."""
    own = {name.partition("/")[0] for name in names} | {digests.NAME}
    return sorted(path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith("."))


def _table(document: Mapping[str, Any]) -> Table:
    """The faults, or that there are none."""
    table = Table("file", "tensor", Column("what", overflow="fold"), title=f"{line(document['folder'])}: {document['verdict']}", caption=CAPTION)
    faults = document["faults"]
    for fault in faults[:SHOWN]:
        table.add_row(cell(fault["file"]), cell(fault.get("tensor", "")), cell(fault["what"]))
    if len(faults) > SHOWN:
        table.add_row("", "", f"and {len(faults) - SHOWN} more")
    if not faults:
        state = "as they were written" if "root" in document else "no damage found"
        table.add_row("", "", f"{document['files']} files, {document['bytes']:,} bytes: {state}")
    for key in ("root", "model", "weights"):
        if key in document:
            table.add_row(cell(f"{key} digest"), "", cell(document[key]))
    for note in document["notes"]:
        table.add_row("", "", cell(note))
    return table


def _contradictions(sealed: Mapping[str, Any]) -> Iterator[Fault]:
    """A list whose sums are not those of its entries."""
    if digests.root(sealed) != sealed["root"] or any(sealed[key] != value for key, value in digests.sums(sealed["files"]).items()):
        yield Fault(digests.NAME, "was edited: its digests are not those of its own entries")


def _compared(folder: Path, sealed: Mapping[str, Any], show: Show, wanted: str | None) -> Iterator[Fault]:
    """Every listed file that is missing or differs; where the digest of the weights alone is asked for, also tensors that are not as listed."""
    by_tensor = wanted is not None and wanted == sealed["weights"]  # of tensors it is, and a list made anew could keep theirs
    total = sum(each["bytes"] for each in sealed["files"].values())
    with show.task("verify", max(total, 1)) as advance:
        for name, listed in sorted(sealed["files"].items()):
            path = folder / name
            if not path.is_file():
                yield Fault(name, "is no plain file" if path.exists() else "is missing")
            elif (found := _sha256(path)) is None:
                yield Fault(name, "cannot be read")
            elif found != listed["sha256"]:
                yield from _changed(path, name, found, sealed["files"])
            elif by_tensor and digests.weights(name):
                yield from _listed_otherwise(path, name, listed)
            advance(listed["bytes"], name)


def _listed_otherwise(path: Path, name: str, listed: Mapping[str, Any]) -> Iterator[Fault]:
    try:
        found = digests.entry(path)
    except (ModelError, OSError) as error:
        yield Fault(name, str(error))
        return
    if found.get("tensors", {}) != listed.get("tensors", {}):
        yield Fault(name, f"does not hold the tensors that {digests.NAME} lists of it")


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _changed(path: Path, name: str, found: str, files: Mapping[str, Any]) -> Iterator[Fault]:
    """What became of a file with another sha256."""
    other = next((key for key, each in files.items() if each["sha256"] == found), None)
    if other is not None:
        yield Fault(name, f"holds what {other} should hold")
    elif "tensors" in files[name]:
        yield from _tensors(path, name, files[name])
    elif name not in (digests.CARD, *digests.REPORTS, RECIPE):  # of which `_together` knows more
        now, then = path.stat().st_size, files[name]["bytes"]
        yield Fault(name, "was changed" + (f": {now} bytes, where {then} were written" if now != then else " in place"))


def _tensors(path: Path, name: str, written: Mapping[str, Any]) -> Iterator[Fault]:
    """The tensors of a file of weights that are not as listed; where there are none, what else of the file is not."""
    try:
        spans = digests.layout(path)
    except ModelError as error:
        yield Fault(name, str(error))
        return
    size, listed, faults, new = path.stat().st_size, written["tensors"], list[Fault](), dict[str, Any]()
    with path.open("rb") as file:
        for span in spans:
            if span.end > size:
                faults.append(Fault(name, "is cut off: the file ends before it does", span.name))
                continue
            file.seek(span.begin)
            found = digests.tensor_entry(span, digests.pieces(file, span.end - span.begin))
            if span.name not in listed:
                new[span.name] = found
            elif found != listed[span.name]:
                faults.append(_difference(name, span, listed[span.name], found))
    faults += _renamed(name, {key: listed[key] for key in listed.keys() - {span.name for span in spans}}, new)
    end = written["bytes"] if path.suffix == ".gguf" else max((span.end for span in spans), default=0)
    if size < end:
        faults.insert(0, Fault(name, f"is truncated: {size} bytes, where there should be {end}"))
    elif size > end:
        faults.insert(0, Fault(name, f"has {size - end} bytes behind its last tensor that nobody wrote"))
    elif len([fault for fault in faults if fault.begin is not None]) == len(listed) > 2:
        faults = [Fault(name, f"holds other numbers in all of its {len(listed)} tensors: it is a file of another model or run")]
    yield from faults or [Fault(name, "has another header, with the same tensors")]


def _difference(name: str, span: Span, then: Mapping[str, Any], now: Mapping[str, Any]) -> Fault:
    """How a tensor of the same name differs."""
    if (then["dtype"], then["shape"]) != (now["dtype"], now["shape"]):
        return Fault(name, f"is {now['dtype']} {now['shape']}, where {then['dtype']} {then['shape']} was written", span.name)
    size, short = span.end - span.begin, digests.SHORT
    before, after = then.get("pieces", ""), now.get("pieces", "")
    changed = [at for at in range(len(after) // short) if before[at * short : (at + 1) * short] != after[at * short : (at + 1) * short]] or [0]
    begin, end = changed[0] * digests.PIECE, min((changed[-1] + 1) * digests.PIECE, size) if after else size
    row = size // span.shape[0] if span.shape and span.shape[0] else 0
    rows = f", rows {begin // row} to {(end - 1) // row}" if row and end - begin < size else ""
    place = "other bits" if end - begin == size else f"other bits within its bytes {begin} to {end - 1}{rows}"
    return Fault(name, f"has {place}", span.name, begin, end)


def _renamed(name: str, missing: dict[str, Any], new: dict[str, Any]) -> Iterator[Fault]:
    """Tensors that are gone, those that nobody wrote, and which of them are one under two names."""
    for key, then in sorted(missing.items()):
        alike = next((other for other, now in new.items() if now == then), None)
        if alike is not None:
            del new[alike]
        yield Fault(name, "is missing" if alike is None else f"is called {alike[:200]!r} now", key)
    for key in sorted(new):
        yield Fault(name, "was not written", key)


def _extra(folder: Path, names: list[str], sealed: Mapping[str, Any]) -> Iterator[Fault]:
    """Whatever else lies there: files, pipes, links to nowhere, and folders, for transformers reads templates from folders inside too."""
    new = [name for name in names if name not in sealed["files"]]
    yield from (Fault(name, "was not written with the folder") for name in [*new, *_beside(folder, [*names, *sealed["files"]])])


def _together(folder: Path, sealed: Mapping[str, Any]) -> Iterator[Fault]:
    """Cards, reports and recipes of other models, and those that were edited."""
    kept = [name for name in (digests.CARD, *digests.REPORTS) if name in sealed["files"] and (folder / name).is_file()]
    edited = {name: _sha256(folder / name) != sealed["files"][name]["sha256"] for name in kept}
    for name in kept:
        told = _told(folder / name)
        if told is None:
            yield Fault(name, "was edited: it names no digest of the model")
        elif told != sealed["model"]:
            yield Fault(name, f"is of another model, whose digest is {told}")
        elif edited[name]:
            yield Fault(name, "was edited after it was written")
    if RECIPE in sealed["files"] and (folder / RECIPE).is_file():
        changed, keys = _sha256(folder / RECIPE) != sealed["files"][RECIPE]["sha256"], list[str]()
        if not edited.get(digests.REPORTS[0], True):
            keys = [line(key) for key in _differing(folder)]
        if changed or keys:
            what = "was edited" if changed else "is not the recipe of report.json"
            yield Fault(RECIPE, what + (f": {', '.join(keys[:8])}" if keys else ""))


def _told(path: Path) -> str | None:
    """The digest of the model that a card or a report names."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(READ)
        if path.name == digests.CARD:
            found: Any = (re.findall(r"`sha256:([0-9a-f]{64})`", text) or [None])[-1]
        else:
            found = strict.parse(text)["digests"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _differing(folder: Path) -> list[str]:
    """The keys in which recipe.yaml differs from the recipe in report.json; none where either cannot be read."""
    try:
        with (folder / RECIPE).open(encoding="utf-8") as file:
            mine = _flat(yaml_text.parse(file.read(LONGEST)))
        with (folder / digests.REPORTS[0]).open(encoding="utf-8") as file:
            theirs = _flat(strict.parse(file.read(READ))["recipe"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values by section.key; what is not set and what is empty are one."""
    out = dict[str, Any]()
    for key, value in recipe.items():
        out |= {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in out.items() if value not in (None, {}, [])}


def _asked(sealed: Mapping[str, Any] | None, source: str | None, digest: str | None) -> Iterator[Fault]:
    """What the folder should be and is not, or cannot be shown to be."""
    if digest is not None and digest not in [(sealed or {}).get(key) for key in ("root", "model", "weights")]:
        yield Fault(digests.NAME, f"is not of the folder that was asked for, {digest}")
    if source is None:
        return
    origin = (sealed or {}).get("source")
    if origin is None:
        yield Fault(digests.NAME, "does not say what the folder was made from")
    elif (found := checkpoint.digest(checkpoint.resolve(source))) != origin["sha256"]:
        yield Fault(digests.NAME, f"says that the folder was made from {origin['name']}, sha256 {origin['sha256']}; {source} has {found}")


def _unlisted(folder: Path) -> Iterator[Fault]:
    """A list that must have been there."""
    for name in (digests.CARD, *digests.REPORTS):
        if (folder / name).is_file() and _told(folder / name) is not None:
            yield Fault(digests.NAME, f"is missing or damaged, although {name} was written with one")
            return


def _checked(folder: Path, names: list[str], show: Show) -> Iterator[Fault]:
    """What can be known to be wrong without digests: damaged headers, missing and truncated files, numbers that are not finite."""
    if (folder / "config.json").exists():
        try:
            checkpoint.any_config(folder)
            checkpoint.weight_files(folder)
        except ModelError as error:
            yield Fault("", str(error))
    held = [name for name in names if digests.weights(name) and (folder / name).is_file()]
    with show.task("verify", max(len(held), 1)) as advance:
        for name in held:
            yield from _strange(folder / name, name)
            advance(1, name)


def _strange(path: Path, name: str) -> Iterator[Fault]:
    """A header that does not fit the file, and floating-point tensors that are not finite."""
    try:
        spans = digests.layout(path)
    except ModelError as error:
        yield Fault(name, str(error))
        return
    with path.open("rb") as file:
        for span in spans:
            size, wanted = span.end - span.begin, digests.needed(span)
            if wanted is not None and (size < wanted or (size > wanted and path.suffix != ".gguf")):
                yield Fault(name, f"has {size} bytes, and {span.dtype} {list(span.shape)} takes {wanted}", span.name)
            elif span.end > path.stat().st_size:
                yield Fault(name, "is cut off: the file ends before it does", span.name)
            elif span.dtype in FLOATS and path.suffix != ".gguf":
                file.seek(span.begin)
                parts = digests.pieces(file, size)
                if not all(bool(torch.frombuffer(bytearray(part), dtype=FLOATS[span.dtype]).isfinite().all()) for part in parts):
                    yield Fault(name, "holds numbers that are not finite", span.name)
