"""Round to nearest: every weight takes the nearest value of its group's grid; no calibration data.

This is PEQA's starting point (Kim et al., 2023, arXiv 2305.14152): `quant/grid.py` chooses scale and zero per (row, group), and the codes
follow. Price: the grid search. Limits: blind to the inputs, so at 2 and 3 bits GPTQ is the better start.
"""

from typing import Any

import torch
from torch import Tensor

from compressor.packed import Affine, PackedWeight
from compressor.packing import panels, require_finite
from compressor.quant import grid
from compressor.recipe import Quant
from compressor.stats import LayerStats


def pack(w: Tensor, stats: LayerStats | None, options: Quant, group: int, scale_dtype: torch.dtype) -> tuple[PackedWeight, dict[str, Any]]:
    """w float32 [n, k], `group` a divisor of k -> packed weight and its report row {"note"}; `stats` is not used.

    Raises NumericError when w is not finite, or beyond what `scale_dtype` holds (packing.check_range).
    """
    require_finite(w)
    note = grid.check(w, options.bits, group, scale_dtype)
    values = grid.choose(w, options.bits, group, options.symmetric, options.shrink, scale_dtype)
    return PackedWeight.pack(nearest(w, values, options.bits, group), values, options.bits), {"note": note}


def nearest(w: Tensor, values: Affine, bits: int, group: int) -> Tensor:
    """Codes uint8 [n, k] of w float32 [n, k] on the grid of `values`."""
    n, k = w.shape
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    for rows in panels(n, k):
        zero: Tensor | float = grid.midpoint(bits) if values.zero is None else values.zero[rows].float().unsqueeze(-1)
        exact = grid.encode(w[rows].view(-1, k // group, group), values.scale[rows].float().unsqueeze(-1), zero, bits)
        codes[rows] = exact.view(-1, k).to(torch.uint8)
    return codes
