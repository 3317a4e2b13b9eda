"""Safetensors shards, their index and JSON files: what every folder that we write has in common.

A shard is written as soon as it is full, so that a model is never in memory twice. Every file is written to a temporary name and renamed.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor import memory
from compressor.errors import ModelError
from compressor.packed import PackedWeight

SHARD_BYTES = 4 << 30
HELD = 128 << 20  # bytes of a shard that wait in memory before they are written
ROOM, MOST_ROOM = 2, 16 << 20  # times the header that a shard will probably need, and bytes, that are kept free for it
TOUCHED = 64 << 20  # bytes of mapped pages that a Reader lets gather
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U32": torch.uint32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_weights(
    folder: Path,
    weights: Iterable[tuple[str, Tensor | PackedWeight]],
    tensors_of: Callable[[str, PackedWeight], dict[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The weights in shards of at most `shard_bytes` (a larger tensor gets its own), with an index if there are several.

    `weights` yields dotted tensor names with tensors and dotted module names with packed weights; it is consumed as a stream. `tensors_of` gives
    the tensors that a format stores for one packed weight, in CPU memory. At most HELD bytes wait in memory.
    """
    shards: list[list[str]] = []  # tensor names
    shard, total = Shard(_temporary(folder, 1), shard_bytes), 0
    for name, value in weights:
        new = tensors_of(name, value) if isinstance(value, PackedWeight) else {name: value.detach().cpu().contiguous()}
        if not shard.takes(new):
            shards.append(shard.close())
            shard = Shard(_temporary(folder, len(shards) + 1), shard_bytes)
        shard.add(new)
        total += _bytes(new)
    shards.append(shard.close())
    _name_shards(folder, shards, total)


def _temporary(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.tmp"


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


class Shard:
    """A safetensors file that is written as its tensors come.

    Up to HELD bytes wait in memory, and a file of no more is written by the library as it always was. Of a larger one the data follows behind room
    for a header (ROOM times what the first tensors need), which is filled in at the end with spaces behind it, as the format allows; tensors whose
    length is no multiple of 8 bytes wait for the end, so that every tensor begins where its type can be read.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most, self.size, self.room, self.header = path, most, 0, 0, len(_header({}))
        self.names: list[str] = []
        self.waiting: dict[str, Tensor] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.file: IO[bytes] | None = None

    def takes(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether there is room for these, too."""
        if self.file is not None and self.header + _header_bytes(tensors) > self.room:
            return False
        return not self.names or self.size + _bytes(tensors) <= self.most

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        self.names += tensors
        self.size += _bytes(tensors)
        self.header += _header_bytes(tensors)
        self.waiting |= tensors
        if self.file is None and self.size > HELD:
            room = max(self.header, min(ROOM * max(1, self.most // self.size) * self.header, MOST_ROOM))
            self.room = -(-room // 8) * 8
            self.file = self.path.open("wb")
            self.file.write(bytes(8 + self.room))
        if self.file is not None:
            for name in [name for name, t in self.waiting.items() if t.numel() * t.element_size() % 8 == 0]:
                self._write(name)

    def _write(self, name: str) -> None:
        assert self.file is not None
        tensor = self.waiting.pop(name).contiguous()
        begin = self.file.tell() - 8 - self.room
        self.file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        end = begin + tensor.numel() * tensor.element_size()
        self.entries[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}

    def close(self) -> list[str]:
        """Finish the file, still under its temporary name; returns the names of its tensors."""
        if self.file is None:
            save_file(self.waiting, self.path, metadata={"format": "pt"})
        else:
            for name in sorted(self.waiting, key=lambda name: -self.waiting[name].element_size()):
                self._write(name)
            self.file.seek(0)
            self.file.write(struct.pack("<Q", self.room) + _header(self.entries).ljust(self.room))
            self.file.close()
        self.path.chmod(0o644)  # safetensors writes for the owner alone; servers run as somebody else
        return self.names


def _header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What these tensors take in a header at most."""
    longest = {"dtype": "BF16", "data_offsets": [1 << 50, 1 << 50]}
    return sum(len(_header({name: longest | {"shape": list(t.shape)}})) for name, t in tensors.items())


def _header(entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()


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


class Reader:
    """Copies of single tensors of safetensors files, whose headers are parsed once for many of them.

    A mapped file keeps all of its pages in memory that anybody has touched; so all files are closed whenever TOUCHED bytes were read, and opened
    anew when they are asked for again. Beside its copies a Reader thus holds TOUCHED bytes and one tensor at most. Opening costs what the header
    takes: 10 ms with 9,000 entries. `get` raises SafetensorError and OSError as they come.
    """

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}
        self._touched = 0

    def get(self, path: Path, key: str) -> Tensor:
        if path not in self._files:
            self._files[path] = safe_open(path, "pt")
        tensor: Tensor = self._files[path].get_tensor(key).clone()
        self._touched += tensor.numel() * tensor.element_size()
        if self._touched >= TOUCHED:
            self.close()
        return tensor

    def close(self) -> None:
        """Give back all pages, and what was freed between copies that stay; what is asked for later is opened anew."""
        self._files.clear()
        self._touched = 0
        memory.trim()


class Parts(Mapping[str, dict[str, Tensor]]):
    """The tensors {part: tensor} of the packed modules of a folder, each read when it is asked for and held by nobody else.

    They are copies, so that a model which is decoded module by module is in memory once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, dict[str, Path]] = {}
        self._reader = Reader()

    def add(self, module: str, part: str, path: Path) -> None:
        self._where.setdefault(module, {})[part] = path

    def names(self, module: str) -> list[str]:
        """The parts of a module, not read."""
        return list(self._where[module])

    def __getitem__(self, module: str) -> dict[str, Tensor]:
        try:
            return {part: self._reader.get(path, f"{module}.{part}" if module else part) for part, path in self._where[module].items()}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.folder} cannot be read: {error}") from None

    def pop(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module, which is forgotten."""
        found = self[module]
        del self._where[module]
        if not self._where:
            self._reader.close()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def read_weights(folder: Path, files: Iterable[Path], parts: Sequence[str]) -> tuple[dict[str, Tensor], Parts]:
    """(dense tensors by name, {part: tensor} by module name); the tensors whose names end in one of `parts` are of packed modules."""
    dense: dict[str, Tensor] = {}
    packed = Parts(folder)
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    module, _, leaf = key.rpartition(".")
                    if leaf in parts:
                        packed.add(module, leaf, path)
                    else:
                        dense[key] = file.get_tensor(key).clone()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder} cannot be read: {error}") from None
    return dense, packed


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
    except (SafetensorError, OSError, TypeError, RuntimeError) as error:  # the latter of sizes beyond 63 bits
        raise ModelError(f"{folder} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return out
