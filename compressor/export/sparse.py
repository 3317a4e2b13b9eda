"""The `sparse` folder: what pruning left, as masks of bits and packed values. Read by our own commands and, through integrations/, by transformers.

No standard holds it: compressed-tensors dropped its sparse compressors, of which 0.20 has the configuration classes alone, and its packed format has
no place for a mask. Each linear takes the smallest of the forms in bitmask.py, dense weights as well as affine packed ones, and layers that are not
sparse stay as they are; so do embeddings, norms and biases. `quantization_config` names every module that is stored in another way than as one dense
tensor, with its form: nothing is guessed from shapes, and whatever does not agree with it is an error. All bytes are documented in docs/format.md.

It also holds what no standard does: affine weights whose zeros are floats, as QA-LoRA leaves them, exactly and without a mask.

Price: a few passes over each weight to count. Limits: the saving is on disk and in transfer alone: what is read is an ordinary dense tensor, or an
ordinary packed weight, and takes the memory and time of one. Sketches are refused: no entry of a table is exactly zero.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.export import bitmask, shards
from compressor.export.bitmask import DTYPES, PARTS, Scheme, estimate_bytes, stored_bits
from compressor.export.groups import read_groups, unlike_ours
from compressor.export.shards import SHARD_BYTES
from compressor.kernels import layout
from compressor.packed import PackedWeight, Table

NAME = "compressor sparse"
METHOD, FORMAT, VERSION = "compressor_sparse", "bitmask", 1
Schemes = dict[str, Scheme]  # by module
Weights = Iterable[tuple[str, Tensor | PackedWeight]]
__all__ = ["DTYPES", "METHOD", "NAME", "PARTS", "VERSION", "Scheme", "estimate_bytes", "fits", "read", "stored_bits", "write"]


def fits(packed: Mapping[str, PackedWeight]) -> str | None:
    """Why this model cannot be written in this format, or None: affine weights and dense ones always can."""
    tables = sum(isinstance(weight.values, Table) for weight in packed.values())
    if tables:
        return f"{tables} of its {len(packed)} packed layers hold tables, of which no entry is exactly zero"
    if why := unlike_ours(packed):
        return why
    for name, weight in packed.items():
        if weight.learned.dtype not in DTYPES or not bool(torch.isfinite(weight.learned).all()):
            return f"the scales of {name} are not finite numbers in float16, bfloat16 or float32"
        if weight.zero is not None and weight.float_zeros and (weight.zero.dtype not in DTYPES or not bool(torch.isfinite(weight.zero).all())):
            return f"the zeros of {name} are not finite numbers in float16, bfloat16 or float32"
    return None


def entries(weights: Weights, linears: Iterable[str], schemes: Schemes) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are stored for `weights`; `schemes` gets the form of each module, of `linears` or packed, that is not one dense tensor."""
    names = {f"{name}.weight": name for name in linears}
    for name, value in weights:
        module = name if isinstance(value, PackedWeight) else names.get(name)
        found = None if module is None else bitmask.encode(value)
        if module is None or found is None:
            assert isinstance(value, Tensor)
            yield name, value
            continue
        parts, schemes[module] = found
        yield from ((f"{module}.{part}", tensor) for part, tensor in parts.items())


def write(folder: Path, config: dict[str, Any], weights: Weights, ignore: list[str], shard_bytes: int = SHARD_BYTES) -> None:
    """config.json with its quantization_config, and the weights in shards of at most `shard_bytes` (a larger tensor gets its own).

    `weights` yields dotted tensor names with tensors and dotted module names with packed weights; it is consumed as a stream. `ignore` lists
    the nn.Linear modules whose weights are dense tensors: those that are sparse are stored as such. Every file is written to a temporary name.
    """
    schemes: Schemes = {}
    shards.write_weights(folder, entries(weights, ignore, schemes), lambda name, weight: {}, shard_bytes)
    shards.write_json(folder / "config.json", config | {"quantization_config": quantization_config(schemes, ignore)})


def quantization_config(schemes: Schemes, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group for each form, with the full names of its modules."""
    modules: dict[Scheme, list[str]] = defaultdict(list)
    for name, scheme in schemes.items():
        modules[scheme].append(name)
    groups = []
    for scheme, names in sorted(modules.items()):
        affine: dict[str, Any] = {"bits": scheme.bits, "group": scheme.group, "symmetric": scheme.symmetric} if scheme.bits else {}
        affine |= {"zeros": scheme.zeros} if scheme.zeros else {}
        groups.append({"kind": "affine" if scheme.bits else "dense", "block": scheme.block} | affine | {"modules": names})
    dense = [name for name in ignore if name not in schemes]
    return {"quant_method": METHOD, "format": FORMAT, "version": VERSION, "groups": groups, "ignore": dense}


def schemes_of(config: Mapping[str, Any], where: Path | str) -> Schemes:
    """{module: its form} of a quantization_config; ModelError if it is of another format or version, or damaged."""
    return read_groups(config, where, (METHOD, FORMAT, VERSION, "sparse"), _scheme)


def _scheme(group: Mapping[str, Any], damaged: str) -> Scheme:
    kind, block = group.get("kind"), group.get("block")
    if kind not in ("dense", "affine"):
        raise ModelError(f"{damaged}: a group is of kind {kind!r}, which is neither dense nor affine")
    if type(block) is not int or block not in (bitmask.BLOCKS if kind == "dense" else (0, *bitmask.BLOCKS)):
        raise ModelError(f"{damaged}: block {block!r} of a group of kind {kind} is none that compressor reads")
    if kind == "dense":
        return Scheme(block)
    bits, columns, symmetric = group.get("bits"), group.get("group"), group.get("symmetric")
    if type(bits) is not int or bits not in layout.BITS:
        raise ModelError(f"{damaged}: a group has weights of {bits!r} bits; compressor reads 2, 3 and 4")
    if type(columns) is not int or columns < 1 or type(symmetric) is not bool:
        raise ModelError(f"{damaged}: group {columns!r} is no number of columns, or symmetric {symmetric!r} is neither true nor false")
    zeros = group.get("zeros")
    if zeros is None:
        return Scheme(block, bits, columns, symmetric)
    if not isinstance(zeros, str) or zeros not in bitmask.ZEROS or block or symmetric:
        raise ModelError(f"{damaged}: zeros {zeros!r} of a group are none of {', '.join(bitmask.ZEROS)}, or it has a mask or is symmetric")
    return Scheme(block, bits, columns, symmetric, zeros)


def check_modules(schemes: Schemes, names: Iterable[str], where: Path | str) -> None:
    """ModelError unless the modules that config.json lists are those of the tensors `names`, and none is there as a dense tensor too."""
    names = set(names)
    held = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in PARTS}
    absent, foreign = sorted(set(schemes) - held), sorted(held - set(schemes))
    twice = [module for module in schemes if f"{module}.weight" in names]
    if absent:
        raise ModelError(f"{where} lacks the weight of {absent[0]}, which its config.json lists")
    if foreign:
        raise ModelError(f"{where} holds a mask or codes of {foreign[0]}, which its config.json does not list")
    if twice:
        raise ModelError(f"{where} holds {twice[0]} twice, as a dense tensor too")


def read(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """(dense tensors by name, packed weights by module name) of a sparse folder; `config` is its quantization_config.

    A pruned weight comes back as exactly 0: sparse dense weights stand among the dense tensors, as `<module>.weight`.
    """
    schemes = schemes_of(config, folder)
    dense, parts = shards.read_weights(folder, files, PARTS)
    check_modules(schemes, [*dense, *(f"{module}.{part}" for module in parts for part in parts.names(module))], folder)
    packed: dict[str, PackedWeight] = {}
    for module in list(parts):
        weight = bitmask.decode(parts.pop(module), schemes[module], f"{folder}: {module}")
        if isinstance(weight, PackedWeight):
            packed[module] = weight
        else:
            dense[f"{module}.weight"] = weight
    return dense, packed
