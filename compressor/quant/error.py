"""How far a packed weight is from the dense one, as one number per layer for the report."""

import math

import torch
from torch import Tensor

from compressor.kernels import layout, reference
from compressor.packed import PackedWeight
from compressor.quant.grid import panels
from compressor.stats import LayerStats


def relative_error(w: Tensor, packed: PackedWeight, stats: LayerStats | None) -> float:
    """sqrt(tr(E H ET) / tr(W H WT)) with E = W - packed and H the mean of x xT; without a Hessian, the norm of E over the norm of W.

    w float32 [n, k]. With a Hessian this is the relative root-mean-square error of the layer's outputs on the calibration inputs: the square
    *root* of the error ratio. 0 for a perfect copy, also of zeros; inf when something stands where only zeros were.
    """
    hessian = None if stats is None or stats.hessian is None else stats.hessian.to(w.device, torch.float32)
    wrong, whole = 0.0, 0.0
    for rows in panels(w.shape[0], w.shape[1], multiple=layout.ROWS):
        wrong += _energy(w[rows] - _dense(packed, rows), hessian)
        whole += _energy(w[rows], hessian)
    if wrong <= 0.0:
        return 0.0
    return math.sqrt(wrong / whole) if whole > 0 else math.inf


def _dense(packed: PackedWeight, rows: slice) -> Tensor:
    """The rows [start, stop) of the dense weight, float32; start is a multiple of a tile's rows."""
    words = packed.words[rows.start // layout.ROWS : -(-rows.stop // layout.ROWS)]
    scale, zero = packed.values.scale[rows], None if packed.values.zero is None else packed.values.zero[rows]
    return reference.dequantize(words, scale, zero, packed.bits, packed.group, rows.stop - rows.start, packed.shape[1], torch.float32)


def _energy(e: Tensor, hessian: Tensor | None) -> float:
    """tr(e H eT), or the squared norm of e [n, k]."""
    seen = e if hessian is None else e @ hessian
    return float((seen * e).sum(dtype=torch.float64))
