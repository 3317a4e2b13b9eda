"""`tiny`, packed: folders of tables and of scales, made without calibration, and values that moved as a tuning moves them."""

from pathlib import Path
from typing import Any

import torch

from compressor.linear import linears, packed_linears, swap, to_packed
from compressor.packed import PackedWeight, Table
from compressor.pipelines import compress, load, write
from compressor.quant import rtn
from compressor.recipe import Quant


def table_folder(folder: Path, noise: float) -> Path:
    """`tiny` at 3 bits with one table a row: the values of a symmetric grid of the whole row, moved at random by `noise` of a step."""
    loaded = load.load("tiny", "cpu")
    write.round_to_folder(loaded, set(linears(loaded.model)) - {"lm_head"})
    torch.manual_seed(0)
    for name, layer in linears(loaded.model.model).items():
        grid, _ = rtn.pack(layer.weight.detach().float(), None, Quant(), layer.in_features, torch.float16)
        steps = torch.arange(8.0) - 4 + noise * torch.randn(layer.out_features, 1, 8)
        values = Table((grid.learned.float().unsqueeze(-1) * steps).half())
        swap(loaded.model.model, name, to_packed(layer, PackedWeight.pack(grid.codes(), values, 3, layer.in_features)))
    write.write_folder(loaded, folder)
    return folder


def scale_folder(folder: Path) -> Path:
    """`tiny` at 3 bits with asymmetric scales by round-to-nearest."""
    loaded = load.load("tiny", "cpu")
    write.round_to_folder(loaded, set(linears(loaded.model)) - {"lm_head"})
    compress.compress(loaded.model, Quant(packer="rtn", bits=3, symmetric=False), torch.float16, None)
    write.write_folder(loaded, folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(66).view(2, 33)).logits


def moved(model: Any, seed: int = 1) -> Any:
    """Changes every learned value, as a tuning does."""
    torch.manual_seed(seed)
    for layer in packed_linears(model).values():
        layer.learned = (layer.learned.float() * (1 + 0.05 * torch.randn(layer.learned.shape))).to(layer.learned.dtype)
    return model
