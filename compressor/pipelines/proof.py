"""That an exported folder holds what it should: read back by our reader, and run by the software that people use for it.

Where a format stores our codes and values, every weight must come back bit for bit. Where it stores what it makes of them (MLX's biases, GGUF's
types), each must come back as the numbers that were measured, to the rounding of a float32 product. The logits of a window of tokens through a
consumer, where one is installed, must then equal ours within the limit that integrations/consumers.py states; a difference beyond it is an error, a
consumer that refuses the folder a line in its card.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.export import dense
from compressor.integrations import consumers
from compressor.linear import PackedLinear, packed_linears, swap
from compressor.pipelines import load
from compressor.pipelines.show import Show
from compressor.pipelines.writers import Writer

TOKENS = 64  # of the window whose logits are compared
ROUNDING = 4e-7  # of the largest weight of a layer: two float32 products in another order


def read_back(writer: Writer, folder: Path, kept: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> None:
    """Compares what our reader finds with the dense tensors `kept` and with the linears of the model; CompressorError for a difference."""
    others, packed = writer.back(folder)
    left = {*layers, *kept}
    for key, found in chain(others.items(), packed):
        name = key.removesuffix(".weight") if key.removesuffix(".weight") in layers else key
        if name not in left:
            raise CompressorError(f"{folder} was written, but {key} in it belongs to nothing")
        left.remove(name)
        if name in kept:
            good = torch.equal(found.cpu().float(), kept[name].cpu().float())
        else:
            layer = layers[name]
            stored = isinstance(layer, PackedLinear) and not layer.packed().float_zeros  # as codes and values, of which nothing is computed
            good = _same(found, _weight(layer), 0.0 if stored else ROUNDING)
        if not good:
            raise CompressorError(f"{folder} was written, but {name} reads back with other values")
    if left:
        raise CompressorError(f"{folder} was written, but {min(left)} is not in it")


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

    A consumer that forms weights in 16 bits is compared with the model whose weights are rounded so. A dense folder is compared with itself as we
    load it, because rounding moved its weights.
    """
    asked, told = list(readers), list[str]()
    readers = [reader for reader in asked if consumers.installed(reader)]
    need = 8 * sum(n * k for n, k in (weight.shape for weight in load.packed_weights(loaded.model).values()))
    if readers and need > (room := _room()):
        return [f"Not run through {' or '.join(readers)}: its dense weights would take {need / 1e9:.1f} GB of memory, and {room / 1e9:.1f} are free."]
    if not readers:
        return [f"Not run through other software, as none is installed: {consumers.needs(asked[0])}."] if asked else []
    model = load.load(str(folder), str(loaded.device)).model if readers == ["dense"] else loaded.model
    vocabulary, window = int(loaded.config["vocab_size"]), load.context(loaded.config)
    ids = torch.randint(vocabulary, (1, min(TOKENS, window)), generator=torch.Generator().manual_seed(0))
    for reader in readers:
        if why := consumers.blind(reader, loaded.config):
            told.append(f"Not run through {reader}, which ignores {why}.")
            continue
        with rounded(model) if consumers.rounds(reader, folder) else contextlib.nullcontext():
            expected = model(ids.to(loaded.device)).logits[0].float().cpu()
        with show.task(f"check with {reader}", 1) as advance:
            check = consumers.check(reader, folder, ids, expected)
            advance(1, "")
        if check is None:
            continue
        told.append(_private(check.line(), folder) + (" (beside the same folder as we load it)" if reader == "dense" else ""))
        show.say(told[-1])
        if check.error is not None and not check.good:
            raise CompressorError(f"the export was written, but {told[-1]}; nothing was kept")
    return told


def _private(line: str, folder: Path) -> str:
    """A line for a card, without places of this machine that errors of others name."""
    for place in (folder, folder.resolve(), folder.resolve().parent, Path.home(), Path(tempfile.gettempdir())):
        if len(place.parts) > 1:
            line = line.replace(str(place), "…")
    return line


@contextlib.contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """The packed linears as dense ones, whose weights are rounded to the 16 bits of the scales; float32 scales are left alone."""
    layers = packed_linears(model)
    try:
        for name, layer in layers.items():
            if layer.learned.element_size() == 2:
                dense_layer = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, bias=False, device=layer.words.device)
                dense_layer.weight, dense_layer.bias = nn.Parameter(_weight(layer).to(layer.learned.dtype).float()), layer.bias
                swap(model, name, dense_layer)
        yield
    finally:
        for name, layer in layers.items():
            swap(model, name, layer)


def _room() -> int:
    """Bytes of memory that are free, or can be."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        found = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        return 1024 * int(found.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def lines(record: dict[str, Any]) -> list[str]:
    """What a card says of the proof."""
    how = "bit for bit" if record.get("exact") else "as it was measured"
    return [f"Read back after writing: every weight {how}.", *(str(line) for line in record.get("proof", []))]
