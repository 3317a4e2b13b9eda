"""What packers share: their interface, rows in panels that bound the memory, and the error of a packed weight as one number for the report."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import NumericError
from compressor.kernels import layout, reference
from compressor.packed import PackedWeight
from compressor.recipe import Quant
from compressor.stats import LayerStats

PANEL = 1 << 22  # weights at a time

Pack = Callable[[Tensor, LayerStats | None, Quant, int, torch.dtype], tuple[PackedWeight, dict[str, Any]]]


@dataclass(frozen=True)
class Packer:
    """`packer(w [n, k] float32, stats, options, group, dtype)` -> packed weight with values stored in `dtype`, report row.

    `needs` are the sums its stats must hold; `resolve(k, options, name)` says which group size a layer of k in features gets, with a note for
    the report, and raises RecipeError where none fits; `reads` names the keys of Quant that it heeds, beside those of all packers (bits, packer,
    scale_dtype, ignore); `table` says that it makes sketches, `fisher` that it wants `stats.fisher`.
    """

    pack: Pack
    resolve: Callable[[int, Quant, str], tuple[int, str]]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    table: bool = False
    fisher: bool = False

    @property
    def heeds(self) -> set[str]:
        """All keys of Quant that say something to this packer."""
        return {"bits", "packer", "scale_dtype", "ignore", "layers", *self.reads}

    def __call__(self, w: Tensor, stats: LayerStats | None, options: Quant, group: int, dtype: torch.dtype) -> tuple[PackedWeight, dict[str, Any]]:
        return self.pack(w, stats, options, group, dtype)


def require_finite(w: Tensor) -> None:
    """Raises NumericError when w has NaN or infinite values; the caller knows, and adds, the layer's name."""
    bad = w.numel() - int(torch.isfinite(w).sum())
    if bad:
        raise NumericError(f"{bad} of {w.numel()} weights are NaN or infinite")


def panels(n: int, k: int, size: int | None = None, multiple: int = 1) -> list[slice]:
    """Row slices that cover n rows of k columns, each of at most `size` weights (PANEL if None), but at least of `multiple` rows.

    Each slice starts at a multiple of `multiple`.
    """
    rows = max(1, (PANEL if size is None else size) // max(k, 1) // multiple) * multiple
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def relative_error(w: Tensor, packed: PackedWeight, stats: LayerStats | None, path: tuple[Tensor, Tensor] | None = None) -> float:
    """sqrt(tr(E H ET) / tr(W H WT)) with E = W - packed and H the mean of x xT; without a Hessian, the norm of E over the norm of W.

    w float32 [n, k]. With a Hessian this is the relative root-mean-square error of the layer's outputs on the calibration inputs: the square
    *root* of the error ratio. 0 for a perfect copy, also of zeros; inf when something stands where only zeros were. With a path A [r, k],
    B [n, r] beside the packed weight E = W - packed - B A.
    """
    hessian = None if stats is None or stats.hessian is None else stats.hessian.to(w.device, torch.float32)
    wrong, whole = 0.0, 0.0
    for rows in panels(w.shape[0], w.shape[1], multiple=layout.ROWS):
        wrong += _energy(_difference(w, packed, rows, path), hessian)
        whole += _energy(w[rows], hessian)
    if wrong <= 0.0:
        return 0.0
    return math.sqrt(wrong / whole) if whole > 0 else math.inf


def dense_rows(packed: PackedWeight, rows: slice) -> Tensor:
    """The rows [start, stop) of the dense weight, float32; start is a multiple of a tile's rows."""
    words = packed.words[rows.start // layout.ROWS : -(-rows.stop // layout.ROWS)]
    learned, zero = packed.learned[rows], None if packed.zero is None else packed.zero[rows]
    stored = reference.dequantize(words, learned, zero, packed.bits, packed.group, rows.stop - rows.start, packed.shape[1], torch.float32)
    return packed.in_order(stored)


def _difference(w: Tensor, packed: PackedWeight, rows: slice, path: tuple[Tensor, Tensor] | None) -> Tensor:
    e = w[rows] - dense_rows(packed, rows)
    return e if path is None else torch.addmm(e, path[1][rows], path[0], alpha=-1)


def _energy(e: Tensor, hessian: Tensor | None) -> float:
    """tr(e H eT), or the squared norm of e [n, k]."""
    seen = e if hessian is None else e @ hessian
    return float((seen * e).sum(dtype=torch.float64))
