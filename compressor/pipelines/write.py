"""The output folder: weights in the format that holds them, what servers need beside them, and the proof that nothing changed on the way."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linear
from compressor.errors import CompressorError
from compressor.export import dense as dense_format
from compressor.export import shards
from compressor.export import sparse as sparse_format
from compressor.integrations import attach, experts, peft
from compressor.packed import PackedWeight
from compressor.pipelines import formats
from compressor.pipelines.blockwise.blocks import Blocks
from compressor.pipelines.checkpoint import COMPANIONS, any_config, model_bytes, weight_files
from compressor.pipelines.load import Loaded, read_packed


def round_to_folder(loaded: Loaded, packed: set[str]) -> None:
    """Round every parameter that stays dense to the dtype it will be stored in, so that nothing changes when the folder is written.

    `packed`: names of the linears that will be packed; their weights are packed from what the source holds, not from a rounded copy.
    """
    if blocks := Blocks.of(loaded.model):
        blocks.round(loaded.dtype, packed)
        return
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


def config_of(loaded: Loaded) -> dict[str, Any]:
    """config.json of the folder, but for what its format adds."""
    kept = {k: v for k, v in loaded.config.items() if k not in ("torch_dtype", *formats.KEYS)}
    return kept | {"dtype": str(loaded.dtype).removeprefix("torch.")}


def write_folder(loaded: Loaded, folder: Path, sparse: bool = False) -> dict[str, Any]:
    """Write the model, without its adapter if it has one, as a folder of the format that holds it, proven by reading it back; facts for the report.

    `sparse`: as masks and what they keep, which a model without packed layers may be written as too.
    """
    with peft.set_aside(loaded):
        return _write_base(loaded, folder, sparse)


def _write_base(loaded: Loaded, folder: Path, sparse: bool) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    packed = {name: layer.packed() for name, layer in linear.packed_linears(loaded.model).items()}
    dense = dense_tensors(loaded)
    if not packed and not sparse:
        return _write_dense(loaded, dense, folder)
    native = formats.same(loaded.config, packed) or formats.pick(packed, sparse)
    packed = formats.stored(native, packed)

    def stream() -> Iterator[tuple[str, Tensor | PackedWeight]]:
        for name, value in by_block(loaded.model, {**dense, **packed}):
            yield name, value.to(loaded.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    native.write(folder, config_of(loaded), stream(), sorted([*linear.linears(loaded.model), *experts.routers(loaded.model)]))
    copy_companions(loaded.folder, folder)
    prove(folder, dense, packed)
    sparse = native is sparse_format
    counted = bits_per_weight(block_weights(loaded), sparse) if sparse else folder_bits(folder, packed)
    return {"format": native.NAME, "verified": True, "layers": len(packed), "bits_per_weight": counted}


def alike(one: PackedWeight, other: PackedWeight) -> bool:
    """Whether two packed weights are the same, number for number; the second in main memory."""
    mine, back = one.tensors(), other.tensors()
    same = mine.keys() == back.keys() and all(torch.equal(mine[k].cpu(), back[k]) and mine[k].dtype == back[k].dtype for k in mine)
    return same and (one.bits, one.group) == (other.bits, other.group)


def by_block(model: nn.Module, weights: dict[str, Tensor | PackedWeight]) -> Iterator[tuple[str, Tensor | PackedWeight]]:
    """The weights in the order of a folder: what lies outside the blocks, then block by block, of each what is dense before what is packed."""
    prefix = linear.find_blocks(model)[0] + "."
    places = {name: int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else -1 for name in weights}
    yield from sorted(weights.items(), key=lambda item: (places[item[0]], isinstance(item[1], PackedWeight)))


def write_adapter(loaded: Loaded, folder: Path, base: str) -> int:
    """Write the adapter beside the model, if there is one, as folder/adapter; returns its bytes.

    base: what its configuration calls the packed model. The adapter is proven by reading it back.
    """
    if loaded.adapter is None:
        return 0
    return attach.write(folder / peft.FOLDER, attach.plain(loaded.adapter) | {attach.BASE: base}, peft.state(loaded.adapter))


def _write_dense(loaded: Loaded, tensors: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """A pruned model that was not packed: an ordinary folder, proven bit for bit."""
    config = {k: v for k, v in loaded.config.items() if k not in ("torch_dtype", "quantization_config")}
    dense_format.write(folder, config, tensors.items(), loaded.dtype)
    copy_companions(loaded.folder, folder)
    dense_format.prove(folder, weight_files(folder), tensors.items(), loaded.dtype)
    return {"format": dense_format.NAME, "verified": True, "layers": 0, "bits_per_weight": float(torch.finfo(loaded.dtype).bits)}


def is_sparse(loaded: Loaded) -> bool:
    """Whether the folder that it came from stores single weights that were pruned; the sparse format holds tuned zeros, too."""
    method = (loaded.config.get("quantization_config") or {}).get("quant_method")
    packed = [layer.packed() for layer in linear.packed_linears(loaded.model).values()]
    return method == sparse_format.METHOD and not any(weight.float_zeros for weight in packed)


def tensor_bytes(loaded: Loaded) -> int:
    """Bytes of all tensors of a dense model as its folder would store them, and of the files beside them."""
    beside = model_bytes(loaded.folder) - sum(path.stat().st_size for path in weight_files(loaded.folder))
    return beside + sum(t.numel() * loaded.dtype.itemsize for t in dense_tensors(loaded).values())


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
    again_dense, again = read_packed(folder, any_config(folder))
    if set(again) != set(packed) or set(again_dense) != set(dense):
        raise CompressorError(f"{folder} was written, but reading it back gives other tensor names")
    for name, weight in packed.items():
        if not alike(weight, again[name]):
            raise CompressorError(f"{folder} was written, but {name} reads back with other weights")
    for name, tensor in dense.items():
        if not torch.equal(tensor.cpu(), again_dense[name].to(tensor.dtype)):
            raise CompressorError(f"{folder} was written, but {name} reads back with other values")


def block_weights(loaded: Loaded) -> dict[str, Tensor | PackedWeight]:
    """The weights of all linears of the model's blocks, dense ones in the dtype of the folder: what bits per weight are counted over."""
    prefix, blocks = linear.find_blocks(loaded.model)
    weights: dict[str, Tensor | PackedWeight] = {f"{prefix}.{name}": layer.packed() for name, layer in linear.packed_linears(blocks).items()}
    return weights | {f"{prefix}.{name}": layer.weight.detach().to(loaded.dtype) for name, layer in linear.linears(blocks).items()}


def folder_bits(folder: Path, packed: Mapping[str, PackedWeight]) -> float:
    """Bits a weight of the packed linears of a folder: of ours by `bits_per_weight`, of another format by the bytes of all that it stores of them."""
    if (any_config(folder).get("quantization_config") or {}).get("quant_method") in formats.NATIVE:
        return bits_per_weight(packed)
    stored = shards.read_headers(folder, weight_files(folder)).items()
    parts = [t for key, t in stored if key.rpartition(".")[0] in packed and not key.endswith(".bias")]
    return sum(8 * t.numel() * t.element_size() for t in parts) / sum(n * k for n, k in (weight.shape for weight in packed.values()))


def bits_per_weight(weights: Mapping[str, Tensor | PackedWeight], sparse: bool = False) -> float:
    """Stored bits of these linears (codes and values) over their number of weights; `sparse`: as a sparse folder stores them, masks included."""
    total = 0
    for weight in weights.values():
        if sparse:
            total += sparse_format.stored_bits(weight)
        else:
            total += weight.stored_bits() if isinstance(weight, PackedWeight) else 8 * weight.numel() * weight.element_size()
    return total / sum(weight.shape[0] * weight.shape[1] for weight in weights.values())
