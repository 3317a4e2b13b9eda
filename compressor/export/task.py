"""Task files: what a tuning moved, alone. One safetensors file of scales or tables, bound to the base that it was tuned on.

Codes never move in tuning, so scales or tables are all that tells two tuned models of one base apart, and one base with several small files serves
several tasks. The file carries a digest of everything it does not hold (codes, zeros, bits, groups, shapes, names, dense tensors): applied to any
other base it would make noise, and is refused. Files come from strangers: a header is judged before a tensor is read, and nothing is applied before
every tensor is judged. The bytes are documented in docs/format.md. Price: the digest reads the whole base, about a second a gigabyte of codes.
Limit: dense tensors, such as norms and embeddings, are part of the base; a tuning that moves them has no task file.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor.errors import CompressorError, ModelError
from compressor.export import shards
from compressor.packed import Affine, PackedWeight

ENTRY, FORMAT, VERSION = "compressor", "task", 1
KINDS = ("scale", "table")


@dataclass(frozen=True)
class Task:
    """`values` are scales [n, G] or tables [n, S, 2**bits] by module name, as `kind` says; `base` is the digest of the rest of the model.

    `model`, `recipe` (the tune section) and `metrics` (perplexity by text) only inform.
    """

    kind: str
    base: str
    values: dict[str, Tensor]
    model: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def header(self) -> dict[str, Any]:
        """The metadata entry; sections that hold nothing are left out."""
        head = {"format": FORMAT, "version": VERSION, "kind": self.kind, "base": self.base, "model": self.model}
        return head | {key: value for key, value in (("recipe", self.recipe), ("metrics", self.metrics)) if value}


def kind_of(packed: Mapping[str, PackedWeight], where: str) -> str:
    """scale or table; ModelError for a model that packs nothing, or both."""
    kinds = {_kind(weight) for weight in packed.values()}
    if len(kinds) != 1:
        raise ModelError(f"{where} {'mixes scales and tables' if kinds else 'holds no packed weights'}, which no task file can hold")
    return kinds.pop()


def digest(dense: Mapping[str, Tensor], packed: Mapping[str, PackedWeight]) -> str:
    """sha256, in hex, of everything that a task does not hold; the same for a base and for all that is tuned from it.

    `dense` are the other tensors in the dtype they are stored in. Codes are hashed one byte each in the order of the weight [n, k], whatever their
    layout in memory or on disk.
    """
    found = hashlib.sha256()

    def add(head: dict[str, Any], *tensors: Tensor) -> None:
        found.update((json.dumps(head, sort_keys=True) + "\n").encode())
        for tensor in tensors:
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    for name, weight in sorted(packed.items()):
        zeros = [] if weight.zero is None else [weight.zero.to(torch.uint8)]
        head = {"module": name, "kind": _kind(weight), "bits": weight.bits, "group": weight.group, "shape": list(weight.shape), "zeros": bool(zeros)}
        add(head, weight.codes(), *zeros)
    for name, tensor in sorted(dense.items()):
        add({"tensor": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}, tensor)
    return found.hexdigest()


def write(path: Path, task: Task, packed: Mapping[str, PackedWeight]) -> None:
    """One file, proven by reading it back for the model `packed` before it gets its name. ModelError for values that are not finite."""
    tensors = {f"{name}.{task.kind}": value.detach().cpu().contiguous() for name, value in task.values.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={ENTRY: json.dumps(task.header(), sort_keys=True, allow_nan=False)})
        temporary.chmod(0o644)  # safetensors writes for the owner alone; servers run as somebody else
        again = read(temporary, packed, task.base, path.name)
        if again.header() != task.header() or any(not torch.equal(again.values[name], tensors[f"{name}.{task.kind}"]) for name in task.values):
            raise CompressorError(f"{path} was written, but reads back with other values")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, packed: Mapping[str, PackedWeight], base: str, where: str | None = None) -> Task:
    """The task of a file for the base that `packed` and `base`, its digest, describe; values in CPU memory, in the dtype of the base's.

    ModelError, in one sentence, for anything but a whole task file of that base; `where` names the file in it.
    """
    where = where or str(path)
    task = read_header(path, where)
    kind = kind_of(packed, "the base")
    if task.kind != kind:
        raise ModelError(f"{where} holds {task.kind}s, but the base holds {kind}s: it was made for another base")
    if task.base != base:
        raise ModelError(f"{where} was made for another base: its digest is {task.base[:12]}…, that of this one {base[:12]}…")
    _check(shards.read_headers(where, [path]), packed, kind, where)
    values = {}
    with safe_open(path, "pt") as file:
        for name in packed:
            values[name] = file.get_tensor(f"{name}.{kind}")
            if not bool(torch.isfinite(values[name]).all()):
                raise ModelError(f"{where}: the {kind} of {name} holds values that are not finite")
    return Task(kind, base, values, task.model, task.recipe, task.metrics)


def read_header(path: Path, where: str | None = None) -> Task:
    """The task of a file without its values; ModelError for a file that is none, is damaged, or is of a later version."""
    where = where or str(path)
    if path.is_dir():
        raise ModelError(f"{where} is a folder, not a task file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(ENTRY)
    except FileNotFoundError:
        raise ModelError(f"there is no task file {where}") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}") from None
    if text is None:
        raise ModelError(f"{where} is no task file: its metadata has no entry {ENTRY!r}")
    try:
        head = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ModelError(f"{where} is damaged: its metadata is no JSON") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ModelError(f"{where} is no task file: its metadata is of another format")
    version, kind, base = head.get("version"), head.get("kind"), head.get("base")
    if type(version) is not int or version != VERSION:
        shown = repr(version)[:40]
        raise ModelError(f"{where} has version {shown} of the task format, and this compressor reads version {VERSION}: update compressor")
    if kind not in KINDS or not isinstance(base, str) or not re.fullmatch("[0-9a-f]{64}", base):
        raise ModelError(f"{where} is damaged: its metadata names no kind ({' or '.join(KINDS)}) or no digest of its base")
    model, recipe, metrics = head.get("model", ""), head.get("recipe", {}), head.get("metrics", {})
    if not isinstance(model, str) or not isinstance(recipe, dict) or not isinstance(metrics, dict):
        raise ModelError(f"{where} is damaged: model, recipe and metrics in its metadata must be a name and two mappings")
    return Task(kind, base, {}, model, recipe, metrics)


def finite(section: Any) -> dict[str, Any]:
    """The entries of a mapping that JSON can hold as they are: names, flags and finite numbers; of anything else nothing."""
    if not isinstance(section, dict):
        return {}
    plain = lambda v: isinstance(v, str | int) or v is None or (isinstance(v, float) and math.isfinite(v))
    return {key: value for key, value in section.items() if isinstance(key, str) and plain(value)}


def _check(entries: Mapping[str, Tensor], packed: Mapping[str, PackedWeight], kind: str, where: str) -> None:
    """ModelError unless the tensors, on the meta device, are one per module of the shape and dtype of the base's."""
    wanted = {f"{name}.{kind}": weight.learned for name, weight in packed.items()}
    absent, foreign = sorted(set(wanted) - set(entries)), sorted(set(entries) - set(wanted))
    if absent:
        raise ModelError(f"{where} is incomplete: {absent[0]} is missing")
    if foreign:
        raise ModelError(f"{where} holds {foreign[0][:200]!r}, which belongs to no packed layer of the base")
    for key, learned in wanted.items():
        found = entries[key]
        if found.shape != learned.shape or found.dtype != learned.dtype:
            raise ModelError(f"{where}: {key} is {_plain(found)}, and the base wants {_plain(learned)}")


def _kind(weight: PackedWeight) -> str:
    return "scale" if isinstance(weight.values, Affine) else "table"


def _plain(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _refuse(constant: str) -> None:
    raise ValueError(constant)
