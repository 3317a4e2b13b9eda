"""GPTQ: columns are rounded one after the other, and what is not yet rounded makes up for each column's error.

Frantar et al., 2022 (arXiv 2210.17323): with H = mean(x xT) and U the upper Cholesky factor of its damped inverse, the error of column j divided by
U[j, j] and multiplied by U[j, j+1:] is taken off the columns behind it, in blocks of 128 (section 4, steps 2 and 3). Columns go by descending
diagonal of H; grids are *static*, chosen from the original weights, so codes lie in their own order and servers need no index of groups.
The result is then refined (quant/refine.py), and swept and refined again over the scales that this gave, `quant.sweeps` times in all, each row
keeping its best: the paper does neither. What matters is not how the first grids were chosen but that codes are chosen anew once scales have moved.

Pruned weights (`stats.keep` false) are exactly zero in the result: each takes the code of zero when its column comes, and what the columns before
it had added to it is its error, which the columns behind it make up for, as in SparseGPT's joint step (Frantar and Alistarh, 2023, arXiv 2301.00774,
section 3.5), with the mask given. Grids need no care: every candidate holds zero exactly, so pruned weights do not weigh in the search for one.

Price: about k**3 for the factor, and, for each sweep, n k**2 / 2 and what refine.py says; memory, beside the caller's H and some panels of rows:
what hessian.py says while U is made, and two k x k float32 matrices afterwards. Limits: a layer that saw no tokens, or
only zeros, or whose H stays indefinite up to DAMP_LIMIT, is rounded to nearest, and its report row says so.
"""

from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.hessian import damped, factorise, living, rounding_order, sweep, unread
from compressor.packed import Affine, PackedWeight
from compressor.packing import joined, panels, require_finite
from compressor.quant import grid, rtn
from compressor.quant.refine import refine
from compressor.recipe import Quant
from compressor.stats import UNSEEN, LayerStats

PANEL = 1 << 26  # weights swept at a time: large, for every column of a panel costs a few kernel launches
ROUNDS = 3  # of refinement; measured in docs/log.md


def pack(w: Tensor, stats: LayerStats | None, options: Quant, group: int, scale_dtype: torch.dtype) -> tuple[PackedWeight, dict[str, Any]]:
    """w float32 [n, k], `group` a divisor of k -> packed weight and its report row.

    The row is {"damp", "note"}, or {"packer": "rtn", "note"} when rounded to nearest. Inputs that were always zero get zero weights, and a note
    counts them; if all were, it is rounded to nearest. Raises NumericError when w is not finite or beyond what `scale_dtype` holds, ModelError when
    `stats.keep` is of another shape.
    """
    require_finite(w)
    keep = None if stats is None else stats.keep
    if keep is not None:
        w = _masked(w, keep)
    if stats is None or stats.hessian is None:
        return _rounded(w, options, group, scale_dtype, UNSEEN if stats is None else stats.why)
    hessian, dead = living(stats.hessian.to(w.device, torch.float32, copy=True))
    if bool(dead.all()):
        return _rounded(w, options, group, scale_dtype, "all its calibration inputs were zero")
    order = rounding_order(hessian, options.act_order)
    factor, damp, note = factorise(hessian, order, options.damp)
    if factor is None:
        return _rounded(w, options, group, scale_dtype, note)
    w = w.masked_fill(dead, 0)
    note = joined(note, unread(dead), grid.check(w, options.bits, group, scale_dtype))
    values = grid.choose(w, options.bits, group, options.symmetric, options.shrink, scale_dtype)
    hessian = damped(hessian, damp * hessian.diagonal().mean())
    codes, scale = torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(values.scale)
    for rows in panels(w.shape[0], w.shape[1], PANEL):
        part = Affine(values.scale[rows], _rows(values.zero, rows))
        codes[rows], scale[rows] = _best(w[rows], part, hessian, factor, order, options, _rows(keep, rows))
    return PackedWeight.pack(codes, Affine(scale, values.zero), options.bits), {"damp": damp, "note": note}


def _rounded(w: Tensor, options: Quant, group: int, scale_dtype: torch.dtype, why: str) -> tuple[PackedWeight, dict[str, Any]]:
    packed, row = rtn.pack(w, None, options, group, scale_dtype)
    return packed, row | {"packer": "rtn", "note": joined(f"{why}; rounded to nearest", row["note"])}


def _masked(w: Tensor, keep: Tensor) -> Tensor:
    if keep.shape != w.shape or keep.dtype != torch.bool:
        raise ModelError(f"a mask of {keep.dtype} and shape {tuple(keep.shape)} is none for a weight of shape {tuple(w.shape)}")
    return w.masked_fill(~keep.to(w.device), 0)


def _rows(part: Tensor | None, rows: slice) -> Tensor | None:
    return None if part is None else part[rows]


def _best(
    w: Tensor, values: Affine, hessian: Tensor, factor: Tensor, order: Tensor, options: Quant, keep: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes uint8 [n, k] and scale [n, G] of w [n, k]: of each row those of least error under the damped H, of `options.sweeps` sweeps in turn."""

    def once(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        now = Affine(scale, values.zero)
        swept = _sweep(w, factor, order, now, options.bits, keep)
        return refine(w, swept, now, hessian, options.bits, ROUNDS, keep, values.scale)

    codes, scale, least = once(values.scale)
    last = scale
    for _ in range(options.sweeps - 1):
        found, last, error = once(last)
        better = (error < least).unsqueeze(1)
        codes, scale, least = torch.where(better, found, codes), torch.where(better, last, scale), torch.minimum(error, least)
    return codes, scale


def _sweep(w: Tensor, factor: Tensor, order: Tensor, values: Affine, bits: int, keep: Tensor | None) -> Tensor:
    """Codes uint8 [n, k] of w [n, k], the zero's where `keep` [n, k] is false; inside, everything is transposed so that a column is contiguous."""
    group = w.shape[1] // values.scale.shape[1]
    kept = None if keep is None else keep.to(w.device).T.contiguous()  # [k, n]
    scale = values.scale.float().T.contiguous()  # [G, n]
    zero = torch.full_like(scale, grid.midpoint(bits)) if values.zero is None else values.zero.float().T.contiguous()

    def choose(j: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        s, z = scale[j // group], zero[j // group]
        code = grid.encode(rest, s, z, bits)
        if kept is not None:
            code = torch.where(kept[j], code, z)
        return code, s * (code - z)

    return sweep(w.T, factor, order, choose).T
