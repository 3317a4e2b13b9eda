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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import strict
from compressor.errors import ModelError
from compressor.export import foreign, shards
from compressor.export.shards import SHARD_BYTES
from compressor.kernels import layout
from compressor.linear import expert_of
from compressor.packed import Affine, PackedWeight, by_groups

NAME = "compressed-tensors pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
Schemes = defaultdict[tuple[int, int, bool], list[str]]  # modules by bits, group (-1: whole rows), symmetric


@dataclass(frozen=True)
class Group:
    """One of config_groups as read: columns that share a scale in `size`, -1 for whole rows; `targets` are names, re:patterns and classes."""

    bits: int
    size: int
    symmetric: bool
    targets: tuple[str, ...]


def fits(packed: dict[str, PackedWeight]) -> str | None:
    """Why this model cannot be written in this format, or None: affine weights can, unless zeros are floats or columns out of order."""
    if why := foreign.affine_reason(packed, layout.STORED):
        return why
    ordered = sum(weight.columns is not None for weight in packed.values())
    if ordered:
        return f"{ordered} of its {len(packed)} packed layers have columns in another order (act-order), which the format's library no longer reads"
    for name, weight in packed.items():
        if weight.learned.dtype not in foreign.SCALES or not bool(torch.isfinite(weight.learned).all()):
            return f"the scales of {name} are not finite numbers in float16, bfloat16 or float32"
    return None


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
    """Regular expressions by the last part of the name where that part is of one scheme only, else the full names.

    Experts of a mixture are named together where they are all of this scheme: transformers looks for the word, vLLM asks for gate_proj whatever the
    checkpoint calls it, and thousands of names take long.
    """
    wide = dict.fromkeys(pattern for name in names for pattern in _wider(name))
    free = {pattern for pattern in wide if not any(map(re.compile(pattern).match, others))}
    chosen = {next((pattern for pattern in _wider(name) if pattern in free), f"^{re.escape(name)}$") for name in names}
    return [f"re:{pattern}" for pattern in sorted(chosen)]


def _wider(name: str) -> tuple[str, ...]:
    """Patterns of this module and others, the widest first: its last part; of an expert's all experts, or its place in them, also by block."""
    expert, leaf = expert_of(name), name.rpartition(".")[2]
    if expert is None:
        return (rf".*\.{re.escape(leaf)}$",)
    within, block = rf"\.\d+\.{re.escape(expert[2])}$", f"^{re.escape(expert[0])}"
    return r".*experts\.\d+\.", rf"{block}\.\d+\.", f".*experts{within}", f"{block}{within}"


def read(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """(dense tensors by name, packed weights by module name) of a pack-quantized folder; `config` is its quantization_config."""
    dense, packed = each(folder, files, config)
    return dense, dict(packed)


def each(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], Iterator[tuple[str, PackedWeight]]]:
    """As `read`, the packed weights one after the other, so that they need not be in memory together."""
    groups = groups_of(config, str(folder))
    dense, parts = shards.read_weights(folder, files, PARTS)
    return dense, ((module, decode(parts.pop(module), f"{folder}: {module}", module, groups)) for module in list(parts))


def groups_of(config: Mapping[str, Any], where: str) -> list[Group]:
    """What a quantization_config says of its weights; ModelError if it is damaged, or of a folder that we do not read."""
    if config.get("quant_method") != "compressed-tensors" or config.get("format") != "pack-quantized":
        kind = f"{config.get('quant_method')}/{config.get('format')}"
        raise ModelError(f"{where} is quantised as {kind}, not as compressed-tensors/pack-quantized")
    rotations = config.get("transform_config")
    if rotations and (not isinstance(rotations, dict) or rotations.get("config_groups", True)):
        raise ModelError(f"{where} rotates activations while it runs (transform_config), which compressor does not: start from the dense model")
    found = config.get("config_groups")
    if not isinstance(found, dict) or not found or not all(isinstance(group, dict) for group in found.values()):
        raise ModelError(f"{where} is damaged: config_groups of its quantization_config must be a mapping of mappings")
    return [_group(group, where) for group in found.values()]


def _group(entry: Mapping[str, Any], where: str) -> Group:
    """One of config_groups; what it leaves out is as the library has it by default."""
    if entry.get("input_activations") or entry.get("output_activations"):
        raise ModelError(f"{where} quantises activations too, which compressor does not run")
    weights = entry.get("weights")
    if not isinstance(weights, dict):
        raise ModelError(f"{where} is damaged: weights in config_groups of its quantization_config must be a mapping")
    bits, size, targets = weights.get("num_bits"), weights.get("group_size"), entry.get("targets")
    if weights.get("type", "int") != "int":
        raise ModelError(f"{where} holds weights of the type {str(weights['type'])[:20]}; compressor reads int")
    if type(bits) is not int or bits not in layout.STORED:
        raise ModelError(f"{where} holds weights of {str(bits)[:20]} bits; compressor reads 2, 3, 4 and 8")
    named = tuple(target for target in targets if isinstance(target, str)) if isinstance(targets, list) else ()
    return Group(bits, size if type(size) is int and size > 0 else -1, weights.get("symmetric", True) is not False, named)


def decode(parts: Mapping[str, Tensor], where: str, module: str, groups: Sequence[Group]) -> PackedWeight:
    """One linear, that the folder calls `module`; `groups`: what the configuration says."""
    words, scale, shape = foreign.parts_of(parts, PARTS[:3], where)
    foreign.check_words(words, "weight_packed", where)
    foreign.check_scales(scale, "weight_scale", where)
    if shape.dtype not in (torch.int32, torch.int64) or shape.numel() != 2:
        raise ModelError(f"{where} is damaged: weight_shape is {foreign.described(shape)}, and must be two whole numbers")
    n, k = (int(v) for v in shape.flatten())
    foreign.check_groups(k, scale.shape[1], [group.size for group in groups], where)
    if min(n, k) < 1 or words.shape[0] != n or scale.shape[0] != n or k % scale.shape[1]:
        raise ModelError(f"{where} is damaged: packed {tuple(words.shape)} and scale {tuple(scale.shape)} do not fit shape {(n, k)}")
    bits = _bits(words.shape[1], k, module, groups, where)
    if words.shape[1] == _words(k, bits):
        codes = layout.unpack_stream(words, bits, k)
    else:
        codes = foreign.unpack_fields(words, bits)[:, :k].contiguous()  # before compressed-tensors 0.18: ten codes a word
    zero = parts.get("weight_zero_point")
    if zero is not None:
        foreign.check_words(zero, "weight_zero_point", where)
        if zero.shape != (_words(n, bits), scale.shape[1]):
            raise ModelError(f"{where} is damaged: zero points of shape {tuple(zero.shape)} do not fit {n} rows and {scale.shape[1]} groups")
        zero = layout.unpack_stream(zero.T.contiguous(), bits, n).T.contiguous()
    columns = _columns(parts.get("weight_g_idx"), k, scale.shape[1], where)
    return PackedWeight.pack(codes if columns is None else codes[:, columns], Affine(scale, zero), bits, columns=columns)


def _words(count: int, bits: int) -> int:
    """int32 words of a stream of so many codes."""
    return -(-count * bits // 32)


def _bits(words: int, k: int, module: str, groups: Sequence[Group], where: str) -> int:
    """The bits of a row of k codes in so many words: of the widths named the one that fits, if several do that of the targets that name it."""
    padded = words == -(-k // 10)
    fit = [group for group in groups if words == _words(k, group.bits) or (group.bits == 3 and padded)]
    if not fit:
        known = " or ".join(map(str, sorted({group.bits for group in groups})))
        raise ModelError(f"{where} has {words} words for {k} codes, which is no stream of {known} bits")
    if len({group.bits for group in fit}) > 1:
        fit = [group for group in fit if _names(group, module)] or [group for group in fit if "Linear" in group.targets]
    widths = sorted({group.bits for group in fit})
    if len(widths) != 1:
        raise ModelError(f"{where} has {words} words for {k} codes, which several widths fit, and no targets in config_groups tell which it is")
    return widths[0]


def _names(group: Group, module: str) -> bool:
    """Whether a target names this module, as it is or by a regular expression; one that could take for ever names none."""
    for target in group.targets:
        if target.startswith("re:") and strict.tame(target[3:]):
            continue
        try:
            if target == module or (target.startswith("re:") and len(module) <= strict.NAME and re.match(target[3:], module)):
                return True
        except (re.error, OverflowError, RecursionError):
            continue
    return False


def _columns(index: Tensor | None, k: int, groups: int, where: str) -> Tensor | None:
    """The columns in the order of their groups."""
    if index is None:
        return None
    if index.dtype not in (torch.int32, torch.int64) or index.shape != (k,):
        raise ModelError(f"{where} is damaged: weight_g_idx is {foreign.described(index)}, and must be {k} whole numbers")
    if bool((index == -1).all()):  # that is how the library says: none yet
        return None
    try:
        return by_groups(index, groups)
    except ModelError as error:
        raise ModelError(f"{where} is damaged: its weight_g_idx is {error}") from None
