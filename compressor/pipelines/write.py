"""The output folder: weights in the native format, what servers need beside them, and the proof that nothing changed on the way."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import linear
from compressor.errors import CompressorError
from compressor.export import compressed_tensors
from compressor.packed import PackedWeight
from compressor.pipelines.load import Loaded, folder_dtype, weight_files

COMPANIONS = (
    "tokenizer*", "*.model", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json",
)  # fmt: skip
OWN_FILES = ("README.md", "recipe.yaml", "report.json", "report.html")  # about the model, not of it: not counted in its size


def round_to_folder(loaded: Loaded) -> None:
    """Round every dense parameter to the dtype it will be stored in, so that nothing changes when the folder is written."""
    stored = str(loaded.config.get("dtype") or loaded.config.get("torch_dtype") or "float32")
    dtype = folder_dtype(loaded.config)
    if str(dtype) == f"torch.{stored}":
        return
    block_linears = {f"{n}.weight" for n in linear.linears(loaded.model)}  # packed from what the source holds, not from a rounded copy
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name not in block_linears:
                parameter.copy_(parameter.to(dtype))


def dense_tensors(loaded: Loaded) -> dict[str, Tensor]:
    """Everything of the model that is not packed, tied tensors once, in the folder's dtype."""
    dtype = folder_dtype(loaded.config)
    packed = tuple(f"{name}." for name in linear.packed_linears(loaded.model))
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in loaded.model.state_dict().items():
        leaf = name.rpartition(".")[2]
        if (name.startswith(packed) and leaf != "bias") or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        out[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return out


def write_folder(loaded: Loaded, folder: Path) -> dict[str, Any]:
    """Write the packed model as a compressed-tensors folder and prove it by reading it back; returns facts for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = {name: layer.packed() for name, layer in linear.packed_linears(loaded.model).items()}
    why = compressed_tensors.fits(packed)
    if why:
        raise CompressorError(f"the model cannot be written as compressed-tensors: {why}")
    dense = dense_tensors(loaded)

    def stream() -> Iterator[tuple[str, Tensor | PackedWeight]]:
        yield from dense.items()
        yield from packed.items()

    config = {k: v for k, v in loaded.config.items() if k not in ("torch_dtype", "quantization_config")}
    config["dtype"] = str(folder_dtype(loaded.config)).removeprefix("torch.")
    compressed_tensors.write(folder, config, stream(), ignore=sorted(linear.linears(loaded.model)))
    for pattern in COMPANIONS:
        for path in loaded.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    prove(folder, dense, packed)
    return {"format": "compressed-tensors pack-quantized", "verified": True, "layers": len(packed)}


def prove(folder: Path, dense: dict[str, Tensor], packed: dict[str, PackedWeight]) -> None:
    """Read the folder back and compare with what is in memory, bit for bit; raises CompressorError naming the first difference."""
    import json

    config = json.loads((folder / "config.json").read_text("utf-8"))
    again_dense, again = compressed_tensors.read(folder, weight_files(folder), config["quantization_config"])
    if set(again) != set(packed) or set(again_dense) != set(dense):
        raise CompressorError(f"{folder} was written, but reading it back gives other tensor names")
    for name, weight in packed.items():
        if not torch.equal(weight.dequantize().cpu(), again[name].dequantize()) or weight.bits != again[name].bits:
            raise CompressorError(f"{folder} was written, but {name} reads back with other weights")
    for name, tensor in dense.items():
        if not torch.equal(tensor.cpu(), again_dense[name]):
            raise CompressorError(f"{folder} was written, but {name} reads back with other values")


def model_bytes(folder: Path) -> int:
    """Bytes of a model folder as a server needs it: every file but our own reports."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.is_file() and p.name not in OWN_FILES)


def bits_per_weight(packed: dict[str, PackedWeight]) -> float:
    """Stored bits of all packed linears (codes, scales, zeros) over their number of weights."""
    weights = sum(w.shape[0] * w.shape[1] for w in packed.values())
    return sum(w.stored_bits() for w in packed.values()) / weights
