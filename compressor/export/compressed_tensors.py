"""The native folder: compressed-tensors `pack-quantized`, read by transformers, vLLM and our own commands.

Per packed linear: `weight_packed` int32 [n, ceil(k*bits/32)], the dense bit stream along k of codes 0..2**bits-1 (the format calls them
signed codes plus 2**(bits-1), which is the same number); `weight_scale` [n, G]; `weight_shape` int64 (n, k); for asymmetric weights
`weight_zero_point` int32 [ceil(n*bits/32), G], packed along n with the same offset, hence equal to our zeros. All bytes are documented in
docs/format.md. Exact for every affine weight of 2, 3, 4 and 8 bits whose zeros are integers. `weight_g_idx` int32 [k], of groups that are not of
neighbours, is read and never written: the library refuses `actorder: group` since 0.20. Readers older than compressed-tensors 0.18 know only a
padded 3-bit stream (ten codes a word): this module reads that too and never writes it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.export import foreign, shards
from compressor.export.shards import SHARD_BYTES
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight, Table, by_groups

NAME = "compressed-tensors pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
Schemes = defaultdict[tuple[int, int, bool], list[str]]  # modules by bits, group (-1: whole rows), symmetric


def fits(packed: dict[str, PackedWeight]) -> str | None:
    """Why this model cannot be written in this format, or None: affine weights can, unless zeros are floats or columns out of order."""
    tables = sum(isinstance(weight.values, Table) for weight in packed.values())
    if tables:
        return f"{tables} of its {len(packed)} packed layers hold tables, which the format does not know"
    floats = sum(weight.float_zeros for weight in packed.values())
    if floats:
        return f"{floats} of its {len(packed)} packed layers have tuned zeros, and the format's are integers"
    ordered = sum(weight.columns is not None for weight in packed.values())
    if ordered:
        return f"{ordered} of its {len(packed)} packed layers have columns in another order (act-order), which the format's library no longer reads"
    return None if packed else "no layer is packed"


def held(weight: PackedWeight) -> PackedWeight:
    """What the format stores of a weight that fits: all of it."""
    return weight


def tensors_of(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The format's tensors of one packed linear."""
    out = {
        f"{name}.weight_packed": layout.pack_stream(weight.codes(), weight.bits),
        f"{name}.weight_scale": weight.learned.contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero is not None:
        out[f"{name}.weight_zero_point"] = layout.pack_stream(weight.zero.T.contiguous(), weight.bits).T.contiguous()
    return {key: tensor.cpu() for key, tensor in out.items()}


def write(
    folder: Path, config: dict[str, Any], weights: Iterable[tuple[str, Tensor | PackedWeight]], ignore: list[str], shard_bytes: int = SHARD_BYTES
) -> None:
    """config.json with its quantization_config, and the weights in shards of at most `shard_bytes` (a larger tensor gets its own).

    `weights` yields dotted tensor names with tensors and dotted module names with packed weights; it is consumed as a stream. `ignore` lists
    the nn.Linear modules that stay dense. Every file is written to a temporary name and renamed.
    """
    schemes, sizes = Schemes(list), set[tuple[int, int]]()

    def encode(name: str, weight: PackedWeight) -> dict[str, Tensor]:
        schemes[weight.bits, weight.group, weight.zero is None].append(name)
        sizes.add((weight.group, weight.shape[1]))
        return tensors_of(name, weight)

    shards.write_weights(folder, weights, encode, shard_bytes)
    if all(group == k for group, k in sizes):  # else rows of one group get its size: readers fail on two strategies (dequantize=True)
        schemes = by_rows(schemes)
    shards.write_json(folder / "config.json", config | {"quantization_config": quantization_config(schemes, ignore)})


def by_rows(schemes: Schemes) -> Schemes:
    """The same schemes, of weights with one scale a row."""
    out = Schemes(list)
    for (bits, _, symmetric), names in schemes.items():
        out[bits, -1, symmetric] += names
    return out


def quantization_config(schemes: Schemes, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json; one scheme targets every Linear, several name their modules."""
    groups = {}
    for index, ((bits, group, symmetric), names) in enumerate(sorted(schemes.items())):
        weights = {
            "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel" if group == -1 else "group",
            "group_size": None if group == -1 else group, "dynamic": False, "actorder": None,
            "observer": "minmax", "observer_kwargs": {},
        }  # fmt: skip
        targets = ["Linear"] if len(schemes) == 1 else _targets(names, [n for s in schemes.values() if s is not names for n in s])
        groups[f"group_{index}"] = {
            "targets": targets, "weights": weights, "input_activations": None, "output_activations": None, "format": "pack-quantized",
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "version": "0.18.0",
        "config_groups": groups, "ignore": ignore, "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


def _targets(names: list[str], others: list[str]) -> list[str]:
    """Regular expressions by the last part of the name where that part is of one scheme only, else the full names."""
    leaf = lambda name: name.rpartition(".")[2]
    foreign = {leaf(name) for name in others}
    own = sorted({leaf(name) for name in names} - foreign)
    rest = sorted(name for name in names if leaf(name) in foreign)
    return [rf"re:.*\.{re.escape(part)}$" for part in own] + [f"re:^{re.escape(name)}$" for name in rest]


def read(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """(dense tensors by name, packed weights by module name) of a pack-quantized folder; `config` is its quantization_config."""
    if config.get("quant_method") != "compressed-tensors" or config.get("format") != "pack-quantized":
        kind = f"{config.get('quant_method')}/{config.get('format')}"
        raise ModelError(f"{folder} is quantised as {kind}, not as compressed-tensors/pack-quantized")
    groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, dict)]
    widths: set[Any] = {(g.get("weights") or {}).get("num_bits") for g in groups}
    if any(g.get("input_activations") for g in groups):
        raise ModelError(f"{folder} quantises activations too, which compressor does not run")
    if not widths or not widths <= set(layout.STORED):
        raise ModelError(f"{folder} holds weights of {', '.join(map(str, widths)) or 'unknown'} bits; compressor reads 2, 3, 4 and 8")
    dense, parts = shards.read_weights(folder, files, PARTS)
    packed = {module: decode(parts.pop(module), f"{folder}: {module}", sorted(widths)) for module in list(parts)}
    return dense, packed


def decode(parts: dict[str, Tensor], where: str, widths: list[int]) -> PackedWeight:
    """One linear. `widths`: the bits that the configuration names; which of them a module has follows from its number of words."""
    words, scale, shape = (parts.get(key) for key in PARTS[:3])
    if words is None or scale is None or shape is None or shape.numel() != 2 or words.ndim != 2 or scale.ndim != 2:
        raise ModelError(f"{where} is incomplete or damaged: weight_packed, weight_scale and weight_shape must be there with two dimensions")
    n, k = (int(v) for v in shape)
    if min(n, k) < 1 or words.shape[0] != n or scale.shape[0] != n or k % max(1, scale.shape[1]) or words.dtype != torch.int32:
        raise ModelError(f"{where} is damaged: packed {tuple(words.shape)} and scale {tuple(scale.shape)} do not fit shape {(n, k)}")
    bits = next((b for b in widths if words.shape[1] == -(-k * b // 32)), None)
    if bits is not None:
        codes = layout.unpack_stream(words, bits, k)
    elif 3 in widths and words.shape[1] == -(-k // 10):
        bits, codes = 3, foreign.unpack_fields(words, 3)[:, :k].contiguous()  # before compressed-tensors 0.18: ten codes a word
    else:
        raise ModelError(f"{where} has {words.shape[1]} words for {k} codes, which is no stream of {' or '.join(map(str, widths))} bits")
    zero = parts.get("weight_zero_point")
    if zero is not None:
        if zero.shape != (-(-n * bits // 32), scale.shape[1]):
            raise ModelError(f"{where} is damaged: zero points of shape {tuple(zero.shape)} do not fit {n} rows and {scale.shape[1]} groups")
        zero = layout.unpack_stream(zero.T.contiguous(), bits, n).T.contiguous()
    g_idx, columns = parts.get("weight_g_idx"), None
    if g_idx is not None and not bool((g_idx == -1).all()):  # that is how the library says: none yet
        try:
            columns = by_groups(g_idx, scale.shape[1])
        except ModelError as error:
            raise ModelError(f"{where} is damaged: {error}") from None
    return PackedWeight.pack(codes if columns is None else codes[:, columns], Affine(scale, zero), bits, columns=columns)
