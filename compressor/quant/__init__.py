"""Quantizers: packers that put a weight on an even grid per group. Adding one is a file with a `pack` function and a line in PACKERS."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.packed import PackedWeight
from compressor.quant import gptq, rtn
from compressor.quant.error import relative_error
from compressor.quant.groups import resolve_group
from compressor.recipe import Quant
from compressor.stats import LayerStats

Pack = Callable[[Tensor, LayerStats | None, Quant, int, torch.dtype], tuple[PackedWeight, dict[str, Any]]]


@dataclass(frozen=True)
class Packer:
    """`packer(w [n, k] float32, stats, options, group, scale_dtype)` -> packed weight, report row; `needs` are the sums its stats must hold."""

    pack: Pack
    needs: tuple[str, ...] = ()

    def __call__(
        self, w: Tensor, stats: LayerStats | None, options: Quant, group: int, scale_dtype: torch.dtype
    ) -> tuple[PackedWeight, dict[str, Any]]:
        return self.pack(w, stats, options, group, scale_dtype)


PACKERS: dict[str, Packer] = {
    "rtn": Packer(rtn.pack),
    "gptq": Packer(gptq.pack, needs=("hessian",)),
}

__all__ = ["PACKERS", "Packer", "relative_error", "resolve_group"]
