"""Task files: what a tuning moved, alone. One safetensors file of scales, tables, zeros or an adapter, bound to the base that it was tuned on.

Codes never move in tuning, so that is all that tells two tuned models of one base apart, and one base with several small files serves several tasks.
The file carries a digest of everything it does not hold (codes, bits, groups, shapes, names, dense tensors, configuration; zeros beside scales,
scales beside zeros, both beside an adapter): applied to any other base it would make noise, and is refused. Files come from strangers: one is read
once, into memory, and what was judged there is what is used. The bytes are documented in docs/format.md. Price: the digest reads the whole base,
about a second a gigabyte of codes.
Limit: dense tensors, such as norms and embeddings, are part of the base; a tuning that moves them has no task file.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as parse
from safetensors.torch import save_file
from torch import Tensor

from compressor import disk, strict
from compressor.errors import CompressorError, ModelError
from compressor.packed import Affine, PackedWeight, zeros_as_floats

ENTRY, FORMAT, VERSION = "compressor", "task", 1
DIMS = {"scale": 2, "table": 3, "zero": 2}  # [n, G], [n, S, 2**bits], [n, G]
ADAPTER = "adapter"  # tensors of peft under its names for them
KINDS = (*DIMS, ADAPTER)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LONGEST = 1 << 22  # characters of the metadata
# keys of config.json that decide nothing of what the tensors compute
IDLE = (
    "quantization_config", "dtype", "torch_dtype", "_name_or_path", "transformers_version", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """`values` are scales [n, G], tables [n, S, 2**bits] or zeros [n, G] by module name, or tensors of peft by theirs, as `kind` says.

    `base` is the digest of the rest of the model, `config` that of peft for an adapter, and empty for the other kinds. `model`, `recipe` (the tune
    section) and `metrics` (perplexity by text) only inform.
    """

    kind: str
    base: str
    values: dict[str, Tensor]
    model: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def header(self) -> dict[str, Any]:
        """The metadata entry; sections that hold nothing are left out."""
        head = {"format": FORMAT, "version": VERSION, "kind": self.kind, "base": self.base, "model": self.model}
        return head | {key: value for key, value in (("recipe", self.recipe), ("metrics", self.metrics), ("config", self.config)) if value}


def kind_of(packed: Mapping[str, PackedWeight], where: str) -> str:
    """scale, table or, where zeros are floats, zero; ModelError for a model that packs nothing or mixes these."""
    kinds = {"zero" if weight.float_zeros else _kind(weight) for weight in packed.values()}
    if kinds == {"scale", "zero"}:
        raise ModelError(f"{where} holds tuned zeros in some layers and others in the rest, which no task file can hold: tune those of all layers")
    if len(kinds) != 1:
        raise ModelError(f"{where} {'mixes scales and tables' if kinds else 'holds no packed weights'}, which no task file can hold")
    return kinds.pop()


def check_fits(kind: str, packed: Mapping[str, PackedWeight], file: str) -> None:
    """ModelError if a base of these weights cannot take what a file of this kind holds; zeros fit any scales, an adapter anything."""
    if kind == ADAPTER and packed:
        return
    held = kind_of(packed, "the base")
    if held != kind and (held, kind) != ("scale", "zero"):
        raise ModelError(f"{file} holds {kind}s, but the base holds {held}s{' that were tuned' * (held == 'zero')}: it was made for another base")


def computing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a model's config.json that decide what its tensors compute; absent and null are one."""
    return {key: value for key, value in config.items() if key not in IDLE and value is not None}


def digest(dense: Mapping[str, Tensor], packed: Mapping[str, PackedWeight], kind: str | None = None, config: Mapping[str, Any] | None = None) -> str:
    """sha256, in hex, of all that a task of this kind (None: of values) does not hold; the same for a base and what is tuned from it.

    `dense` are the other tensors, `config` is what `computing` leaves. Floats count as float32, which holds every number of 16 bits: a model
    in memory and its folder are one base. Codes are hashed one byte each in the order of the weight [n, k], whatever their layout in memory or on
    disk. For zeros the scales count and no zeros do; for an adapter all of them count.
    """
    found = hashlib.sha256()

    def add(head: dict[str, Any], *tensors: Tensor) -> None:
        found.update((json.dumps(head, sort_keys=True) + "\n").encode())
        for tensor in tensors:
            found.update(raw(tensor))

    add({"config": dict(config or {})})
    for name, weight in sorted(packed.items()):
        values = kind if kind in ("zero", ADAPTER) else _kind(weight)
        head = {"module": name, "kind": values, "bits": weight.bits, "group": weight.group, "shape": list(weight.shape)}
        tensors = [weight.codes(), *([] if weight.columns is None else [weight.columns])]
        if values in ("zero", ADAPTER):
            head["values"] = _dtype(weight.learned)
            tensors.append(weight.learned)
        if values == ADAPTER:
            head["of"] = _kind(weight)
        if values != "zero":
            head["zeros"] = weight.zero is not None and (_dtype(weight.zero) if weight.float_zeros else True)
            tensors += [] if weight.zero is None else [weight.zero]
        add(head, *tensors)
    for name, tensor in sorted(dense.items()):
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        add({"tensor": name, "dtype": _dtype(tensor), "shape": list(tensor.shape)}, tensor)
    return found.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write(path: Path, task: Task, packed: Mapping[str, PackedWeight]) -> None:
    """One file, proven by reading it back for the model `packed` before it gets its name. ModelError for values that are not finite."""
    tensors = {name + _ending(task.kind): value.detach().cpu().contiguous() for name, value in task.values.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={ENTRY: json.dumps(task.header(), sort_keys=True, allow_nan=False)})
        temporary.chmod(0o644)  # safetensors writes for the owner alone; servers run as somebody else
        again = read(temporary, packed, task.base, path.name)
        if again.header() != task.header() or any(not torch.equal(again.values[name], tensors[name + _ending(task.kind)]) for name in task.values):
            raise CompressorError(f"{path} was written, but reads back with other values")
        disk.sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, packed: Mapping[str, PackedWeight], base: str, where: str | None = None) -> Task:
    """The task of a file for the base that `packed` and `base`, its digest for that kind, describe; values in CPU memory, in the dtype of the base's.

    ModelError, in one sentence, for anything but a whole task file of that base; `where` names the file in it. Whether an adapter fits the model
    only peft can say (integrations/attach.py).
    """
    where = where or str(path)
    task, tensors = _load(path, where)
    check_fits(task.kind, packed, where)
    if task.base != base:
        raise ModelError(f"{where} was made for another base: its digest is {task.base[:12]}…, that of this one {base[:12]}…")
    if task.kind == ADAPTER:
        _check_alone(tensors, task.kind, where)
    else:
        _check(tensors, packed, task.kind, where)
    found = _with_values(task, tensors, where)
    if task.kind == "scale":
        _check_signs(found.values, packed, where)
    return found


def read_alone(path: Path) -> Task:
    """The task of a file as it stands, without a base to check it against; ModelError for tensors that no base could hold."""
    task, tensors = _load(path, str(path))
    _check_alone(tensors, task.kind, str(path))
    return _with_values(task, tensors, str(path))


def _load(path: Path, where: str) -> tuple[Task, dict[str, Tensor]]:
    """What a file says and its tensors, from one read of it, not judged yet."""
    _check_regular(path, where)
    try:
        content = path.read_bytes()
        tensors = parse(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise ModelError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}") from None
    return _judged((header.get("__metadata__") or {}).get(ENTRY), where), tensors


def _with_values(task: Task, tensors: Mapping[str, Tensor], where: str) -> Task:
    """The task with its tensors, whose shapes were judged; ModelError for numbers that are not finite."""
    values = {key.removesuffix(_ending(task.kind)): tensor for key, tensor in sorted(tensors.items())}
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"{where}: the {task.kind} of {name[:200]} holds values that are not finite")
    return replace(task, values=values)


def _check_regular(path: Path, where: str) -> None:
    """ModelError for what is no file, such as a pipe, which would be waited for."""
    if path.is_dir():
        raise ModelError(f"{where} is a folder, not a task file")
    if not path.is_file():
        raise ModelError(f"{where} is no regular file" if path.exists() else f"there is no task file {where}")


def read_header(path: Path, where: str | None = None) -> Task:
    """The task of a file without its values; ModelError for a file that is none, is damaged, or is of a later version."""
    where = where or str(path)
    _check_regular(path, where)
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(ENTRY)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}") from None
    return _judged(text, where)


def _judged(text: str | None, where: str) -> Task:
    """The task that the metadata of a file describes, without values."""
    if text is None:
        raise ModelError(f"{where} is no task file: its metadata has no entry {ENTRY!r}")
    if len(text) > LONGEST:
        raise ModelError(f"{where} is damaged: its metadata is longer than {LONGEST} characters")
    try:
        head = strict.parse(text, finite=True)
    except ValueError as error:
        raise ModelError(f"{where} is damaged: its metadata is no JSON that can be: {str(error)[:100]}") from None
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
    config = head.get("config", {})
    if not isinstance(config, dict) or bool(config) != (kind == ADAPTER):
        raise ModelError(f"{where} is damaged: an adapter has a configuration in its metadata, and nothing else has one")
    return Task(kind, base, {}, model, recipe, metrics, config)


def finite(section: Any) -> dict[str, Any]:
    """The entries of a mapping that JSON can hold as they are: names, flags and finite numbers; of anything else nothing."""
    if not isinstance(section, dict):
        return {}
    plain = lambda v: isinstance(v, str | int) or v is None or (isinstance(v, float) and math.isfinite(v))
    return {key: value for key, value in section.items() if isinstance(key, str) and plain(value)}


def _check_signs(values: Mapping[str, Tensor], packed: Mapping[str, PackedWeight], where: str) -> None:
    """ModelError for a scale of 0, or of another sign than the base's: tuning makes neither, and either would destroy weights."""
    for name, value in values.items():
        held = packed[name].learned.to(value.device)
        if not bool(((value.sign() == held.sign()) | (held == 0)).all()):
            raise ModelError(f"{where}: the scale of {name} is 0, or of another sign than the base's, in some groups")


def _check(entries: Mapping[str, Tensor], packed: Mapping[str, PackedWeight], kind: str, where: str) -> None:
    """ModelError unless the tensors are one per module of the shape and dtype of the base's."""
    wanted = {name + _ending(kind): _held(weight, kind) for name, weight in packed.items()}
    absent, foreign = sorted(set(wanted) - set(entries)), sorted(set(entries) - set(wanted))
    if absent:
        raise ModelError(f"{where} is incomplete: {absent[0]} is missing")
    if foreign:
        raise ModelError(f"{where} holds {foreign[0][:200]!r}, which belongs to no packed layer of the base")
    for key, learned in wanted.items():
        found = entries[key]
        if found.shape != learned.shape or found.dtype != learned.dtype:
            raise ModelError(f"{where}: {key} is {_plain(found)}, and the base wants {_plain(learned)}")


def _check_alone(entries: Mapping[str, Tensor], kind: str, where: str) -> None:
    """ModelError for tensors that no base could hold."""
    for key, entry in entries.items():
        fits = key.endswith(_ending(kind)) and entry.dtype in DTYPES and (kind == ADAPTER or entry.dim() == DIMS[kind])
        if not fits:
            what = "tensor of an adapter" if kind == ADAPTER else f"{kind} of a packed layer"
            raise ModelError(f"{where}: {key[:200]!r} is {_plain(entry)}, which is no {what}")
    if kind == ADAPTER and not entries:
        raise ModelError(f"{where} holds no tensors of an adapter")


def _held(weight: PackedWeight, kind: str) -> Tensor:
    """A tensor of the shape and dtype that a task of this kind holds for a layer."""
    if kind != "zero":
        return weight.learned
    dtype = zeros_as_floats(weight.learned[:0], None if weight.zero is None else weight.zero[:0], weight.bits).dtype
    return torch.empty(weight.learned.shape, dtype=dtype, device="meta")


def _ending(kind: str) -> str:
    """What follows a module's name in the name of a tensor; an adapter's tensors keep peft's names."""
    return "" if kind == ADAPTER else f".{kind}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(weight: PackedWeight) -> str:
    return "scale" if isinstance(weight.values, Affine) else "table"


def _plain(tensor: Tensor) -> str:
    return f"{_dtype(tensor)} {tuple(tensor.shape)}"
