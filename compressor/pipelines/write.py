"""The output folder: weights in the format that holds them, what servers need beside them, and the proof that nothing changed on the way."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import linear
from compressor.errors import CompressorError
from compressor.packed import PackedWeight
from compressor.pipelines.load import COMPANIONS, FORMATS, Format, Loaded, read_packed


def round_to_folder(loaded: Loaded, packed: set[str]) -> None:
    """Round every parameter that stays dense to the dtype it will be stored in, so that nothing changes when the folder is written.

    `packed`: names of the linears that will be packed; their weights are packed from what the source holds, not from a rounded copy.
    """
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.removesuffix(".weight") not in packed:
                parameter.copy_(parameter.to(loaded.dtype))


def dense_tensors(loaded: Loaded) -> dict[str, Tensor]:
    """Everything of the model that is not packed, tied tensors once."""
    packed = tuple(f"{name}." for name in linear.packed_linears(loaded.model))
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in loaded.model.state_dict().items():
        leaf = name.rpartition(".")[2]
        if (name.startswith(packed) and leaf != "bias") or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        out[name] = tensor
    return out


def write_folder(loaded: Loaded, folder: Path) -> dict[str, Any]:
    """Write the packed model as a folder of the format that holds it and prove it by reading it back; returns facts for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = {name: layer.packed() for name, layer in linear.packed_linears(loaded.model).items()}
    native = pick_format(packed)
    dense = dense_tensors(loaded)

    def stream() -> Iterator[tuple[str, Tensor | PackedWeight]]:
        yield from ((name, t.to(loaded.dtype) if t.is_floating_point() else t) for name, t in dense.items())
        yield from packed.items()

    config = {k: v for k, v in loaded.config.items() if k not in ("torch_dtype", "quantization_config")}
    config["dtype"] = str(loaded.dtype).removeprefix("torch.")
    native.write(folder, config, stream(), sorted(linear.linears(loaded.model)))
    copy_companions(loaded.folder, folder)
    prove(folder, dense, packed)
    return {"format": native.NAME, "verified": True, "layers": len(packed)}


def pick_format(packed: dict[str, PackedWeight]) -> Format:
    """The format that can hold these weights; CompressorError with every format's reason if none can."""
    reasons = []
    for choice in FORMATS.values():
        why = choice.fits(packed)
        if why is None:
            return choice
        reasons.append(f"{choice.NAME}: {why}")
    raise CompressorError(f"no format can hold the model; {'; '.join(reasons)}")


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer files and what else a server needs beside config and weights."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def prove(folder: Path, dense: dict[str, Tensor], packed: dict[str, PackedWeight]) -> None:
    """Read the folder back and compare with the model in memory, number for number; raises CompressorError naming the first difference.

    Equal codes, tables, scales and zeros make equal weights bit for bit; dense tensors must not have changed in the conversion to the folder's dtype.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    again_dense, again = read_packed(folder, config)
    if set(again) != set(packed) or set(again_dense) != set(dense):
        raise CompressorError(f"{folder} was written, but reading it back gives other tensor names")
    for name, weight in packed.items():
        mine, back = weight.tensors(), again[name].tensors()
        same = mine.keys() == back.keys() and all(torch.equal(mine[k].cpu(), back[k]) and mine[k].dtype == back[k].dtype for k in mine)
        if not same or (weight.bits, weight.group) != (again[name].bits, again[name].group):
            raise CompressorError(f"{folder} was written, but {name} reads back with other weights")
    for name, tensor in dense.items():
        if not torch.equal(tensor.cpu(), again_dense[name].to(tensor.dtype)):
            raise CompressorError(f"{folder} was written, but {name} reads back with other values")


def bits_per_weight(packed: dict[str, PackedWeight]) -> float:
    """Stored bits of all packed linears (codes and values) over their number of weights."""
    weights = sum(w.shape[0] * w.shape[1] for w in packed.values())
    return sum(w.stored_bits() for w in packed.values()) / weights
