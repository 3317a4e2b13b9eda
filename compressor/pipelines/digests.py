"""What an output folder is made of, as digests: the file `digests.json`, which `compressor verify` compares with what lies there.

It lists every file with its sha256, and every tensor of every file of weights. Three digests sum that up: `weights`, of all tensors by name, dtype,
shape and bytes, however they are cut into files; `model`, of all files that decide what the model computes and how it was made (weights,
configuration, tokenizer, recipe), which the same run gives again; `root`, of all there is, report and card included, which name times. Reports and
card carry `model`, and digests.json, written last, has theirs: so all of them belong together.

A tensor's digest is the sha256 of the sha256 digests of its pieces of 1 MiB; eight hex digits of each piece stay in the file and say where in a
tensor bits changed. Price: the folder is read once more when it is written, each byte hashed twice (docs/trust.md has the seconds); memory, a piece.
Limit: consistency and no authorship: whoever can write the folder can write its digests anew, but not under a root noted elsewhere.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compressor import __version__, strict
from compressor.errors import ModelError
from compressor.export.gguf_types import KINDS
from compressor.integrations import peft
from compressor.pipelines import checkpoint, folder_facts
from compressor.pipelines.report import write_text

NAME, FORMAT, VERSION = "digests.json", "compressor digests", 1
RECORD = "export.json"  # in folders that `apply` and `export` write: what was done
CARD, REPORTS = "README.md", ("report.json", RECORD)
ABOUT = (CARD, *REPORTS, "report.html")  # they tell of the model, with times and places
PIECE, SHORT = 1 << 20, 8  # bytes; hex digits of a piece that are kept
LONGEST = 1 << 26  # bytes of a digests.json
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # bytes
SECTION = """
## Digest

`sha256:{model}` of weights, configuration, tokenizer and recipe; `digests.json` has that of every file and tensor, and
`compressor verify FOLDER` compares.
"""


@dataclass(frozen=True)
class Span:
    """A tensor's place in a file, in bytes from its start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def layout(path: Path) -> list[Span]:
    """The tensors of a safetensors or GGUF file in the order of their bytes, as its header has them; ModelError for a header that cannot be.

    Whether the file is as long as they say is not looked at.
    """
    return _gguf(path) if path.suffix == ".gguf" else _safetensors(path)


def _safetensors(path: Path) -> list[Span]:
    try:
        entries, start = checkpoint.header(path)
        spans = [
            Span(name, str(each["dtype"]), tuple(map(int, each["shape"])), *(start + int(at) for at in each["data_offsets"]))
            for name, each in entries.items()
        ]
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a header of random bytes raises what it likes
        raise ModelError(f"{path} is damaged or truncated: its header cannot be read ({type(error).__name__})") from None
    spans.sort(key=lambda span: (span.begin, span.end))
    at = start
    for span in spans:
        if span.begin != at or span.end < at or min(span.shape, default=0) < 0:
            raise ModelError(f"{path} is damaged: by its header the bytes of {span.name[:200]!r} leave a gap, overlap, or end before they begin")
        at = span.end
    return spans


def _gguf(path: Path) -> list[Span]:
    _, tensors, start = folder_facts.gguf_header(path)
    tensors.sort(key=lambda tensor: tensor.offset)
    ends = [*(start + tensor.offset for tensor in tensors[1:]), path.stat().st_size]  # padding behind a tensor counts with it
    if tensors and start + tensors[-1].offset > ends[-1]:
        raise ModelError(f"{path} is truncated: it ends before its last tensor begins")
    return [Span(t.name, t.type, t.dims[::-1], start + t.offset, stop) for t, stop in zip(tensors, ends, strict=True)]


def needed(span: Span) -> int | None:
    """Bytes that the numbers of a tensor take, by its shape and dtype; None for a dtype that is not known here."""
    count, kind = math.prod(span.shape), KINDS.get(span.dtype.lower())
    if kind is not None:
        return count // kind.block * kind.size
    return count * SIZES[span.dtype] if span.dtype in SIZES else None


def pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes, in pieces; fewer where the file ends."""
    while size > 0 and (piece := file.read(min(PIECE, size))):
        size -= len(piece)
        yield piece


def tensor_entry(span: Span, parts: Iterable[bytes]) -> dict[str, Any]:
    """What is listed of a tensor whose bytes come in pieces."""
    found = [hashlib.sha256(piece).digest() for piece in parts]
    entry = {"dtype": span.dtype, "shape": list(span.shape), "sha256": hashlib.sha256(b"".join(found)).hexdigest()}
    return entry | ({"pieces": "".join(piece.hex()[:SHORT] for piece in found)} if len(found) > 1 else {})


def weights(name: str) -> bool:
    """Whether a file of this name holds tensors."""
    return name.endswith((".safetensors", ".gguf"))


def entry(path: Path) -> dict[str, Any]:
    """What is listed of a file, read once: its bytes, its sha256, and its tensors if it holds weights."""
    spans, whole, tensors = layout(path) if weights(path.name) else [], hashlib.sha256(), {}

    def fed(file: BinaryIO, size: int) -> Iterator[bytes]:
        for piece in pieces(file, size):
            whole.update(piece)
            yield piece

    with path.open("rb") as file:
        for span in spans:
            list(fed(file, span.begin - file.tell()))
            tensors[span.name] = tensor_entry(span, fed(file, span.end - span.begin))
        for _ in fed(file, path.stat().st_size):
            pass
    return {"bytes": path.stat().st_size, "sha256": whole.hexdigest()} | ({"tensors": tensors} if spans else {})


def listed(folder: Path) -> list[str]:
    """The files of a folder, those of its adapter among them, by name; digests.json and what is hidden are not."""
    names = {path.name for path in folder.iterdir() if path.is_file()} | {f"{peft.FOLDER}/{path.name}" for path in (folder / peft.FOLDER).glob("*")}
    return sorted(name for name in names if name != NAME and not name.startswith("."))


def seal(folder: Path, source: Mapping[str, str] | None) -> dict[str, Any]:
    """Write digests.json, and into reports and card the digest of the model; returns what was written.

    source: name and sha256 (`checkpoint.digest`) of the model that this one was made from. The files must be final.
    """
    names = listed(folder)
    files = {name: entry(folder / name) for name in names if name not in ABOUT}
    document = {"format": FORMAT, "version": VERSION, "compressor": __version__, "source": dict(source) if source else None} | sums(files)
    _tell(folder, document)
    document |= {"files": files | {name: entry(folder / name) for name in names if name in ABOUT}}
    document |= {"root": root(document)}
    write_text(folder / NAME, json.dumps(document, indent=1, sort_keys=True) + "\n")
    return document


def _tell(folder: Path, document: Mapping[str, Any]) -> None:
    told = {key: document[key] for key in ("model", "weights", "source") if document[key] is not None}
    for path in (folder / name for name in REPORTS):
        if path.exists():
            values = json.loads(path.read_text("utf-8")) | {"digests": told}
            write_text(path, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    card = folder / CARD
    if card.exists():
        write_text(card, card.read_text("utf-8").rstrip("\n") + "\n" + SECTION.format(model=document["model"]))


def sums(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`weights` and `model` of the entries of files."""
    tensors = [
        (name.rpartition("/")[0], key, found["dtype"], found["shape"], found["sha256"])
        for name, each in files.items()
        for key, found in each.get("tensors", {}).items()
    ]
    model = {name: each["sha256"] for name, each in files.items() if name not in ABOUT}
    return {"weights": _hashed(sorted(tensors)), "model": _hashed(model)}


def root(document: Mapping[str, Any]) -> str:
    """The digest of all that a digests.json says but itself."""
    return _hashed({key: value for key, value in document.items() if key != "root"})


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(folder: Path) -> dict[str, Any] | None:
    """digests.json as it stands, or None where there is none; ModelError for one that is damaged or of a later version."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        found = strict.read(path, LONGEST)
        _check(found)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path} is damaged: it is no list of digests") from None
    if found["version"] != VERSION:
        raise ModelError(f"{path} has version {str(found['version'])[:40]} of its format, and this compressor reads {VERSION}: update compressor")
    checked: dict[str, Any] = found
    return checked


def _check(found: Any) -> None:
    """ValueError, or what Python raises, unless the value is of the shape that `seal` writes."""
    if found["format"] != FORMAT or not all(_hex(found[key]) for key in ("root", "model", "weights")):
        raise ValueError("another format")
    if found["source"] is not None and not (isinstance(found["source"]["name"], str) and _hex(found["source"]["sha256"])):
        raise ValueError("a strange source")
    for name, each in found["files"].items():
        parent, _, leaf = name.rpartition("/")
        if parent not in ("", peft.FOLDER) or leaf in ("", ".", "..") or "\\" in name or "\0" in name or type(each["bytes"]) is not int:
            raise ValueError("a strange file")
        for entry in (each, *each.get("tensors", {}).values()):
            if not _hex(entry["sha256"]) or not isinstance(entry.get("pieces", ""), str):
                raise ValueError("no digest")
        if any(not isinstance(t["dtype"], str) or any(type(size) is not int for size in t["shape"]) for t in each.get("tensors", {}).values()):
            raise ValueError("a strange tensor")


def _hex(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def recorded(folder: Path) -> dict[str, str] | None:
    """model and root of a folder's digests.json, unchecked, or None; what other commands mention."""
    try:
        found = read(folder)
    except ModelError:
        return None
    return None if found is None else {key: found[key] for key in ("model", "root")}


def mention(found: Mapping[str, str] | None) -> str:
    """A line for people about what `recorded` found."""
    if found is None:
        return "no digests: nothing proves what the folder holds"
    return f"model digest {found['model'][:16]}…; `compressor verify` checks it"
