"""The `table` folder: sketches, which no standard format holds. Read by our own commands and, through integrations/, by transformers.

Per packed linear: `weight_packed` int32 [n, ceil(k*bits/32)], the dense bit stream of the codes along k, as in the compressed-tensors folder;
`weight_table` [n, S, 2**bits] in the dtype it was learned in, weight[i, j] = weight_table[i, j // segment, code[i, j]]; `weight_shape` int64 (n, k).
S = ceil(k / segment), so the last segment may be shorter. `quantization_config` names every module with its bits and segment: nothing is
guessed from shapes, and whatever does not agree with it is an error. All bytes are documented in docs/format.md.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.export import shards
from compressor.export.groups import read_groups, unlike_ours
from compressor.export.shards import SHARD_BYTES
from compressor.kernels import layout
from compressor.packed import PackedWeight, Table

NAME = "compressor table"
METHOD, FORMAT, VERSION = "compressor", "table", 1
PARTS = ("weight_packed", "weight_table", "weight_shape")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Schemes = dict[str, tuple[int, int]]  # module -> bits, segment


def fits(packed: Mapping[str, PackedWeight]) -> str | None:
    """Why this model cannot be written in this format, or None: finite tables in float16, bfloat16 or float32 always can."""
    affine = sum(not isinstance(weight.values, Table) for weight in packed.values())
    if affine:
        return f"{affine} of its {len(packed)} packed layers hold scales, which the format does not know"
    if why := unlike_ours(packed):
        return why
    for name, weight in packed.items():
        if weight.learned.dtype not in DTYPES:
            return f"the tables of {name} are {_plain(weight.learned.dtype)}, and the format knows {_choices()}"
        if weight.group > weight.shape[1]:
            return f"the segments of {name}, {weight.group} columns, are longer than its rows of {weight.shape[1]}"
        if not bool(torch.isfinite(weight.learned).all()):
            return f"the tables of {name} are not finite"
    return None if packed else "no layer is packed"


def held(weight: PackedWeight) -> PackedWeight:
    """What the format stores of a weight that fits: all of it."""
    return weight


def tensors_of(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The format's tensors of one packed linear, in CPU memory."""
    values = (layout.pack_stream(weight.codes(), weight.bits), weight.learned.detach().contiguous(), torch.tensor(weight.shape, dtype=torch.int64))
    return {f"{name}.{part}": tensor.cpu() for part, tensor in zip(PARTS, values, strict=True)}


def write(
    folder: Path, config: dict[str, Any], weights: Iterable[tuple[str, Tensor | PackedWeight]], ignore: list[str], shard_bytes: int = SHARD_BYTES
) -> None:
    """config.json with its quantization_config, and the weights in shards of at most `shard_bytes` (a larger tensor gets its own).

    `weights` yields dotted tensor names with tensors and dotted module names with packed weights; it is consumed as a stream. `ignore` lists
    the nn.Linear modules that stay dense. Every file is written to a temporary name and renamed.
    """
    schemes: Schemes = {}

    def encode(name: str, weight: PackedWeight) -> dict[str, Tensor]:
        schemes[name] = (weight.bits, weight.group)
        return tensors_of(name, weight)

    shards.write_weights(folder, weights, encode, shard_bytes)
    shards.write_json(folder / "config.json", config | {"quantization_config": quantization_config(schemes, ignore)})


def quantization_config(schemes: Schemes, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group per combination of bits and segment, with the full names of its modules."""
    modules: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, scheme in schemes.items():
        modules[scheme].append(name)
    groups = [{"bits": bits, "segment": segment, "modules": names} for (bits, segment), names in sorted(modules.items())]
    return {"quant_method": METHOD, "format": FORMAT, "version": VERSION, "groups": groups, "ignore": ignore}


def schemes_of(config: Mapping[str, Any], where: Path | str) -> Schemes:
    """{module: (bits, segment)} of a quantization_config; ModelError if it is of another format or version, or damaged."""
    schemes = read_groups(config, where, (METHOD, FORMAT, VERSION, "table"), _scheme)
    if not schemes:
        raise ModelError(f"{where}/config.json is damaged: its quantization_config lists no modules")
    return schemes


def _scheme(group: Mapping[str, Any], damaged: str) -> tuple[int, int]:
    bits, segment = group.get("bits"), group.get("segment")
    if type(bits) is not int or bits not in layout.BITS:
        raise ModelError(f"{damaged}: a group has weights of {bits!r} bits; compressor reads 2, 3 and 4")
    if type(segment) is not int or segment < 1:
        raise ModelError(f"{damaged}: segment {segment!r} is no number of columns")
    return bits, segment


def check_modules(schemes: Schemes, present: Iterable[str], where: Path | str) -> None:
    """ModelError unless the modules that have packed tensors are those that the configuration lists."""
    held = set(present)
    absent, foreign = sorted(set(schemes) - held), sorted(held - set(schemes))
    if absent:
        raise ModelError(f"{where} lacks the packed weight of {absent[0]}, which its config.json lists")
    if foreign:
        raise ModelError(f"{where} holds a packed weight of {foreign[0]}, which its config.json does not list")


def check(parts: Mapping[str, Tensor], bits: int, segment: int, shape: tuple[int, int], where: str) -> None:
    """ModelError unless the tensors of one module have the dtypes and shapes of a weight [n, k]; values are not looked at."""
    absent = [part for part in PARTS if part not in parts]
    if absent:
        raise ModelError(f"{where} is incomplete: {' and '.join(absent)} missing")
    words, table, stored = (parts[part] for part in PARTS)
    n, k = shape
    if words.dtype != torch.int32 or stored.dtype != torch.int64 or table.dtype not in DTYPES:
        found = f"{_plain(words.dtype)}, {_plain(stored.dtype)} and {_plain(table.dtype)}"
        raise ModelError(f"{where} is damaged: packed codes, shape and table are {found}, and must be int32, int64 and one of {_choices()}")
    if tuple(stored.shape) != (2,):
        raise ModelError(f"{where} is damaged: weight_shape must hold two positive int64 numbers")
    if segment > k:
        raise ModelError(f"{where} is damaged: segments of {segment} columns do not fit a weight of shape {shape}")
    if tuple(words.shape) != (n, -(-k * bits // 32)):
        raise ModelError(f"{where} is damaged: words of shape {tuple(words.shape)} are no stream of {bits}-bit codes for a weight of shape {shape}")
    if tuple(table.shape) != (n, -(-k // segment), 1 << bits):
        raise ModelError(
            f"{where} is damaged: tables of shape {tuple(table.shape)} do not fit a weight of shape {shape}, {bits} bits and segments of {segment}"
        )


def decode(parts: Mapping[str, Tensor], bits: int, segment: int, where: str) -> PackedWeight:
    """The packed weight of one module's tensors, on their device; the table keeps its dtype. ModelError if anything is damaged."""
    stored = parts.get("weight_shape")
    if stored is None or stored.dtype != torch.int64 or tuple(stored.shape) != (2,) or int(stored.min()) < 1:
        raise ModelError(f"{where} is damaged: weight_shape must hold two positive int64 numbers")
    n, k = (int(size) for size in stored)
    check(parts, bits, segment, (n, k), where)
    table = parts["weight_table"]
    if not bool(torch.isfinite(table).all()):
        raise ModelError(f"{where} is damaged: its tables hold values that are not finite")
    return PackedWeight.pack(layout.unpack_stream(parts["weight_packed"], bits, k), Table(table), bits, segment)


def read(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """(dense tensors by name, packed weights by module name) of a table folder; `config` is its quantization_config."""
    dense, packed = each(folder, files, config)
    return dense, dict(packed)


def each(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], Iterator[tuple[str, PackedWeight]]]:
    """As `read`, the packed weights one after the other, so that they need not be in memory together."""
    schemes = schemes_of(config, folder)
    dense, parts = shards.read_weights(folder, files, PARTS)
    check_modules(schemes, parts, folder)
    return dense, ((module, decode(parts.pop(module), *schemes[module], f"{folder}: {module}")) for module in list(parts))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _choices() -> str:
    return ", ".join(_plain(dtype) for dtype in DTYPES)
