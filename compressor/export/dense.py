"""The dense folder: every packed weight dequantised and rounded, for servers that know no packed format at all.

A layer is formed in panels of rows, rounded, and handed to the shard writer, so that beside the packed model only one shard of dense weights is in
memory. Rounding changes weights: an affine product has up to 11 + 4 significant bits and bfloat16 keeps 8, so every layer's loss is measured while it
is written. Price: 16 bits a weight on disk. Limit: what lies beyond the range of float16 is an error, never an infinity.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compressor.errors import CompressorError, ModelError
from compressor.export import shards
from compressor.export.shards import SHARD_BYTES, Reader
from compressor.kernels import layout
from compressor.packed import PackedWeight
from compressor.packing import PANEL, dense_rows, panels

NAME = "dense safetensors"
DTYPES = {"bf16": torch.bfloat16, "float16": torch.float16}  # by the name that users write
Weights = Iterable[tuple[str, Tensor | PackedWeight]]


def row_panels(weight: PackedWeight) -> Iterator[Tensor]:
    """The dense rows of a packed weight, float32 [rows, k], in panels that bound the memory."""
    n, k = weight.shape
    for rows in panels(n, k, multiple=layout.ROWS):
        yield dense_rows(weight, rows)


def dequantize(weight: PackedWeight) -> Tensor:
    """The dense weight, float32 [n, k], with no more memory beside it than a panel needs."""
    out, done = torch.empty(weight.shape, device=weight.words.device), 0
    for panel in row_panels(weight):
        out[done : done + len(panel)] = panel
        done += len(panel)
    return out


def rounded(value: Tensor | PackedWeight, dtype: torch.dtype, name: str = "a tensor") -> tuple[Tensor, dict[str, float]]:
    """The weight or tensor in `dtype`, and the largest and the mean relative error of its non-zero elements; zeros are exact.

    ModelError, naming `name`, if a finite element would become infinite.
    """
    shape = value.shape
    parts = row_panels(value) if isinstance(value, PackedWeight) else value.reshape(-1).split(PANEL)
    device = value.words.device if isinstance(value, PackedWeight) else value.device
    out, done, largest, total, count = torch.empty(shape, dtype=dtype, device=device), 0, 0.0, 0.0, 0
    flat = out.view(-1)
    for part in parts:
        exact = part.reshape(-1)
        new = exact.to(dtype)
        if not torch.equal(torch.isfinite(new), torch.isfinite(exact)):
            raise ModelError(f"{name} holds values beyond the range of {str(dtype).removeprefix('torch.')}; choose another --to")
        flat[done : done + len(new)] = new
        done += len(new)
        wide = exact if exact.dtype == torch.float64 else exact.float()
        errors = ((new.to(wide.dtype) - wide) / wide).abs()[(wide != 0) & wide.isfinite()]
        if errors.numel():
            largest, total, count = max(largest, float(errors.max())), total + float(errors.sum(dtype=torch.float64)), count + errors.numel()
    return out, {"largest": largest, "mean": total / max(count, 1)}


def unpacked(folder: Path, files: Iterable[Path], parts: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a packed folder that are dense, in their stored dtype, one at a time; `parts` are the leaves of packed modules."""
    try:
        for path in files:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    if key.rpartition(".")[2] not in parts:
                        yield key, file.get_tensor(key)
    except SafetensorError as error:
        raise ModelError(f"{folder} cannot be read: {error}") from None


def write(folder: Path, config: dict[str, Any], weights: Weights, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> list[dict[str, Any]]:
    """config.json and the weights in shards; `config` has no quantization_config. Every floating-point tensor is rounded to `dtype`.

    `weights` yields dotted tensor names with tensors and dotted module names with packed weights. Returns one row per packed layer, and per tensor
    that rounding changed: name, packed, largest and mean relative error.
    """
    rows: list[dict[str, Any]] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, value in weights:
            tensor, loss = _entry(name, value, dtype)
            if isinstance(value, PackedWeight) or loss["largest"]:
                rows.append({"name": name, "packed": isinstance(value, PackedWeight)} | loss)
            yield _key(name, value), tensor

    shards.write_weights(folder, stream(), lambda name, weight: {}, shard_bytes)
    shards.write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    return rows


def prove(folder: Path, files: Iterable[Path], weights: Weights, dtype: torch.dtype) -> None:
    """Read the folder back and compare every tensor, bit for bit, with what `weights` gives again; CompressorError names the first difference."""
    where, reader = dict[str, Path](), Reader()
    for path in files:
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    for name, value in weights:
        key = _key(name, value)
        if key not in where:
            raise CompressorError(f"{folder} was written, but {key} is not in it")
        back = reader.get(where.pop(key), key)
        mine = _entry(name, value, dtype)[0].cpu()
        if back.dtype != mine.dtype or back.shape != mine.shape or not torch.equal(_bytes(back), _bytes(mine)):
            raise CompressorError(f"{folder} was written, but {key} reads back with other values")
    if where:
        raise CompressorError(f"{folder} was written, but {next(iter(where))} in it belongs to nothing")


def _entry(name: str, value: Tensor | PackedWeight, dtype: torch.dtype) -> tuple[Tensor, dict[str, float]]:
    if isinstance(value, Tensor) and (value.dtype == dtype or not value.is_floating_point()):
        return value, {"largest": 0.0, "mean": 0.0}
    return rounded(value, dtype, name)


def _key(name: str, value: Tensor | PackedWeight) -> str:
    return f"{name}.weight" if isinstance(value, PackedWeight) else name


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
