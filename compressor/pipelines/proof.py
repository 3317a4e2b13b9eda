"""That an exported folder holds what it should: read back by our reader, and run by the software that people use for it.

Where a format stores our codes and values, every weight must come back bit for bit. Where it stores what it makes of them (MLX's biases, GGUF's
types), each must come back as the numbers that were measured, to the rounding of a float32 product. The logits of a window of tokens through a
consumer, where one is installed, must then equal ours within the limit that integrations/consumers.py states; a difference beyond it is an error, a
consumer that refuses the folder a line in its card.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.export import dense
from compressor.integrations import consumers
from compressor.linear import PackedLinear
from compressor.pipelines import load
from compressor.pipelines.show import Show
from compressor.pipelines.writers import Writer

TOKENS = 64  # of the window whose logits are compared
ROUNDING = 4e-7  # of the largest weight of a layer: two float32 products in another order
HALF = 1e-3  # of the largest element: dense tensors that GGUF stores in 16 bits of another kind


def read_back(writer: Writer, folder: Path, kept: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> None:
    """Compares what our reader finds with the dense tensors `kept` and with the linears of the model; CompressorError for a difference."""
    others, packed = writer.back(folder)
    left = set(layers)
    for name, found in packed:
        if name not in left:
            continue
        left.remove(name)
        layer, wanted = layers[name], _weight(layers[name])
        exact = isinstance(layer, PackedLinear) and not layer.packed().float_zeros
        if not _same(found, wanted, 0.0 if exact else ROUNDING):
            raise CompressorError(f"{folder} was written, but {name} reads back with other weights")
    if left:
        raise CompressorError(f"{folder} was written, but {min(left)} is not in it")
    for name, wanted in kept.items():
        if name not in others:
            raise CompressorError(f"{folder} was written, but {name} is not in it")
        if not _same(others[name], wanted, 0.0 if others[name].dtype == wanted.dtype else HALF):
            raise CompressorError(f"{folder} was written, but {name} reads back with other values")


def _weight(layer: nn.Module) -> Tensor:
    """The weight of a linear, float32 [n, k]."""
    return dense.dequantize(layer.packed()) if isinstance(layer, PackedLinear) else layer.get_parameter("weight").detach().float()


def _same(found: Tensor, wanted: Tensor, share: float) -> bool:
    """Whether two tensors are equal, to a share of the largest element."""
    if found.shape != wanted.shape:
        return False
    if not share:
        return torch.equal(found.cpu(), wanted.cpu())
    found, wanted = found.cpu().float(), wanted.cpu().float()
    return not found.numel() or float((found - wanted).abs().max()) <= share * float(wanted.abs().max())


@torch.no_grad()
def seen_by(readers: Iterable[str], folder: Path, loaded: load.Loaded, show: Show) -> list[str]:
    """One line for every one of these consumers that is installed, of logits beside those of the model; CompressorError if one is too far off.

    A dense folder is compared with itself as we load it, because rounding moved its weights.
    """
    readers = [reader for reader in readers if consumers.installed(reader)]
    if not readers:
        return []
    model = load.load(str(folder), str(loaded.device)).model if readers == ["dense"] else loaded.model
    vocabulary, window = int(loaded.config["vocab_size"]), load.context(loaded.config)
    ids = torch.randint(vocabulary, (1, min(TOKENS, window)), generator=torch.Generator().manual_seed(0))
    expected = model(ids.to(loaded.device)).logits[0].float().cpu()
    told = []
    for reader in readers:
        with show.task(f"check with {reader}", 1) as advance:
            check = consumers.check(reader, folder, ids, expected)
            advance(1, "")
        if check is None:
            continue
        told.append(check.line())
        show.say(told[-1])
        if check.error is not None and not check.good:
            raise CompressorError(f"{folder.name} was written, but {check.line()}; nothing was kept")
    return told


def lines(record: dict[str, Any]) -> list[str]:
    """What a card says of the proof."""
    how = "bit for bit" if record.get("exact") else "as it was measured"
    return [f"Read back after writing: every weight {how}.", *(str(line) for line in record.get("proof", []))]
