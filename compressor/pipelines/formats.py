"""The formats of export/ by the names that folders give them: which one a folder is in, and which one can hold a model.

Ours, NATIVE, are what runs write of their own accord. A folder of somebody else's is read as it is and, once tuned, written back in its own format as
long as that holds what the tuning made of it.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.errors import CompressorError, ModelError
from compressor.export import awq, compressed_tensors, conversions, dense, gptq, hqq, mlx, shards, sparse, table
from compressor.packed import Affine, PackedWeight


class Format(Protocol):
    """What a module of export/ offers that writes and reads folders of packed weights."""

    @property
    def NAME(self) -> str: ...

    def fits(self, packed: dict[str, PackedWeight], /) -> str | None: ...

    def write(self, folder: Path, config: dict[str, Any], weights: Iterable[tuple[str, Tensor | PackedWeight]], ignore: list[str], /) -> None: ...

    def read(self, folder: Path, files: list[Path], config: dict[str, Any], /) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]: ...


NATIVE: dict[str, Format] = {"compressed-tensors": compressed_tensors, table.METHOD: table, sparse.METHOD: sparse}  # by quant_method
FORMATS: dict[str, Format] = {**NATIVE, gptq.METHOD: gptq.V1, awq.METHOD: awq, hqq.METHOD: hqq, "mlx": mlx}


KEYS = ("quantization_config", "compression_config", "quantization")  # of config.json that say how a folder is packed


def described(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a folder with its quant_method, wherever its writer put it; empty for a dense folder. ModelError if damaged."""
    found = next((config[key] for key in KEYS if config.get(key)), None)
    if not found:
        files, names = sorted(folder.glob("*.safetensors")), list[str]()
        with contextlib.suppress(ModelError):  # of files that are no whole ones, whoever reads them says so
            names = list(shards.read_headers(folder, files))
        found = gptq.unlabelled(folder, files) if any(name.endswith(".qweight") for name in names) else None
    if not isinstance(found or {}, dict):
        raise ModelError(f"{folder}/config.json is damaged: quantization_config is no mapping")
    return {"quant_method": "mlx"} | found if found and mlx.describes(found) else found or {}


def of(config: dict[str, Any], where: Path | str) -> Format:
    """The format that a packed folder of this config is in; ModelError if it is none of these."""
    quantization = config.get("quantization_config") or {}
    method = str(quantization.get("quant_method"))
    if method not in FORMATS:
        raise ModelError(f"{where} is quantised as {method}; compressor reads folders of {' and '.join(FORMATS)}, and dense ones")
    return gptq.same(quantization) if method == gptq.METHOD else FORMATS[method]


def home(config: dict[str, Any], packed: dict[str, PackedWeight]) -> Format | None:
    """The format of somebody else that a folder of this config is in, if it has a place for these weights; else None, as for ours."""
    method = str((config.get("quantization_config") or {}).get("quant_method"))
    form = None if method in NATIVE or method not in FORMATS else of(config, "")
    return form if form is not None and form.fits(packed) is None else None


def same(config: dict[str, Any], packed: dict[str, PackedWeight]) -> Format | None:
    """`home`, if it holds these weights exactly."""
    form = home(config, packed)
    return form if form is not None and all(nearest(form, weight) is weight for weight in packed.values()) else None


def stored(form: Any, packed: dict[str, PackedWeight]) -> dict[str, PackedWeight]:
    """The same weights in the terms in which somebody else's format stores them; ours takes them as they are."""
    return packed if form in NATIVE.values() or form is mlx else {name: form.held(weight) for name, weight in packed.items()}


def nearest(form: Any, weight: PackedWeight) -> PackedWeight:
    """What somebody else's format makes of a weight that fits, as it will be read again; the same object where not a bit of the model changes.

    MLX stores the product of scale and zero, which is rounded: zeros become what the rounded ones say, and stay so when they are stored again.
    GPTQ's mirrored groups are mirrored back, as a reader of ours does.
    """
    if form is mlx:
        scale, bias = mlx.scales_of(weight)
        zero, now = mlx.zeros_of(scale, bias, weight.bits), weight.zero
        alike = zero is now if zero is None or now is None else zero.dtype == now.dtype and torch.equal(zero, now)
        return weight if alike else replace(weight, values=Affine(scale, zero))
    held: PackedWeight = form.held(weight)
    return weight if torch.equal(dense.dequantize(held), dense.dequantize(weight)) else conversions.positive(held)


def pick(packed: dict[str, PackedWeight], sparse_too: bool = False) -> Format:
    """Ours that can hold these weights, the sparse one only if asked for or zeros are floats; CompressorError with every reason if none can."""
    reasons, sparse_too = [], sparse_too or any(weight.float_zeros for weight in packed.values())
    for choice in NATIVE.values():
        if (choice is sparse) != sparse_too:
            continue
        why = choice.fits(packed)
        if why is None:
            return choice
        reasons.append(f"{choice.NAME}: {why}")
    raise CompressorError(f"no format can hold the model; {'; '.join(reasons)}")
