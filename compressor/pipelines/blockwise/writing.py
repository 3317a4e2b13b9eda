"""The output folder of a model of which one block at a time is in memory, written and proven by reading it back block by block."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import linear
from compressor.errors import CompressorError
from compressor.export import compressed_tensors, table
from compressor.integrations import experts
from compressor.packed import PackedWeight
from compressor.pipelines import checkpoint, write
from compressor.pipelines.blockwise.blocks import Blocks
from compressor.pipelines.load import Loaded


def write_folder(loaded: Loaded, blocks: Blocks, folder: Path) -> dict[str, Any]:
    """As `write.write_folder`, of a packed model."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = {name: layer.packed() for name, layer in linear.packed_linears(loaded.model).items()}  # shapes alone
    native = compressed_tensors if all(weight.learned.dim() == 2 for weight in packed.values()) else table

    def stream() -> Iterator[tuple[str, Tensor | PackedWeight]]:
        for weights in blocks.weights(loaded.dtype):
            own = {name: weight for name, weight in weights.items() if isinstance(weight, PackedWeight)}
            if why := native.fits(own) if own else None:
                raise CompressorError(f"no format can hold the model; {native.NAME}: {why}")
            yield from weights.items()

    native.write(folder, write.config_of(loaded), stream(), sorted([*linear.linears(loaded.model), *experts.routers(loaded.model)]))
    write.copy_companions(loaded.folder, folder)
    quantization = checkpoint.any_config(folder)["quantization_config"]
    dense, again = native.each(folder, checkpoint.weight_files(folder), quantization)
    _prove(folder, blocks, loaded.dtype, dense, again, len(packed))
    return {"format": native.NAME, "verified": True, "layers": len(packed), "bits_per_weight": write.bits_per_weight(packed)}


def _prove(
    folder: Path, blocks: Blocks, dtype: torch.dtype, dense: dict[str, Tensor], packed: Iterator[tuple[str, PackedWeight]], count: int
) -> None:
    """CompressorError names the first difference of what was read back from the weights of the blocks; dense tensors are taken out of `dense`."""
    counted, at, mine = 0, "", dict[str, Tensor | PackedWeight]()
    for name, weight in packed:  # in the order of the files: modules of a block stand together
        if (index := name.removeprefix(f"{blocks.prefix}.").partition(".")[0]) != at:
            at, mine = index, blocks.block_weights(int(index), dtype)
        first = mine.get(name)
        if not isinstance(first, PackedWeight) or not write.alike(first, weight):
            raise CompressorError(f"{folder} was written, but {name} reads back with other weights")
        counted += 1
    for weights in blocks.weights(dtype):
        for name, tensor in weights.items():
            if isinstance(tensor, Tensor) and (name not in dense or not torch.equal(tensor.cpu(), dense.pop(name))):
                raise CompressorError(f"{folder} was written, but {name} reads back with other values")
    if dense or counted != count:
        raise CompressorError(f"{folder} was written, but reading it back gives other tensor names")
