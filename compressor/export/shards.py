"""Safetensors shards, their index and JSON files: what every folder that we write has in common.

A shard is written as soon as it is full, so that a model is never in memory twice. Every file is written to a temporary name and renamed.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor.errors import ModelError
from compressor.packed import PackedWeight

SHARD_BYTES = 4 << 30
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U32": torch.uint32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def write_weights(
    folder: Path,
    weights: Iterable[tuple[str, Tensor | PackedWeight]],
    tensors_of: Callable[[str, PackedWeight], dict[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The weights in shards of at most `shard_bytes` (a larger tensor gets its own), with an index if there are several.

    `weights` yields dotted tensor names with tensors and dotted module names with packed weights; it is consumed as a stream. `tensors_of` gives
    the tensors that a format stores for one packed weight, in CPU memory.
    """
    shards: list[list[str]] = []  # tensor names
    pending: dict[str, Tensor] = {}
    total = size = 0
    for name, value in weights:
        new = tensors_of(name, value) if isinstance(value, PackedWeight) else {name: value.detach().cpu().contiguous()}
        grown = sum(t.numel() * t.element_size() for t in new.values())
        if pending and size + grown > shard_bytes:
            shards.append(_save_shard(folder, len(shards) + 1, pending))
            pending, size = {}, 0
        pending |= new
        size, total = size + grown, total + grown
    shards.append(_save_shard(folder, len(shards) + 1, pending))
    _name_shards(folder, shards, total)


def _temporary(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.tmp"


def _save_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    temporary = _temporary(folder, number)
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors writes for the owner alone; servers run as somebody else
    return list(tensors)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    count = len(shards)
    if count == 1:
        os.replace(_temporary(folder, 1), folder / "model.safetensors")
        return
    table: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        final = f"model-{number:05d}-of-{count:05d}.safetensors"
        os.replace(_temporary(folder, number), folder / final)
        table |= dict.fromkeys(names, final)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))})


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
    os.replace(temporary, path)


def read_weights(folder: Path, files: Iterable[Path], parts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(dense tensors by name, {part: tensor} by module name); the tensors whose names end in one of `parts` are of packed modules."""
    dense: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = defaultdict(dict)
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    module, _, leaf = key.rpartition(".")
                    if leaf in parts:
                        packed[module][leaf] = file.get_tensor(key)
                    else:
                        dense[key] = file.get_tensor(key)
    except SafetensorError as error:
        raise ModelError(f"{folder} cannot be read: {error}") from None
    return dense, dict(packed)


def read_headers(folder: Path | str, files: Iterable[Path | str]) -> dict[str, Tensor]:
    """Every tensor's name, shape and dtype, as tensors on the meta device; ModelError where a file is no whole safetensors file."""
    out: dict[str, Tensor] = {}
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    entry = file.get_slice(key)
                    dtype = DTYPES.get(entry.get_dtype(), torch.complex128)  # any dtype that nobody accepts
                    out[key] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder} cannot be read: {error}") from None
    return out
