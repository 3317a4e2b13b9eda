"""GPTQ: columns are rounded one after the other, and what is not yet rounded makes up for each column's error.

Frantar et al., 2022 (arXiv 2210.17323): with H = mean(x xT) and U the upper Cholesky factor of its damped inverse, the error of column j divided by
U[j, j] and multiplied by U[j, j+1:] is taken off the columns behind it, in blocks of 128 (section 4, steps 2 and 3). Columns go by descending
diagonal of H; grids are *static*, chosen from the original weights, so codes lie in their own order and servers need no index of groups.
The result is then refined (quant/refine.py), which the paper does not do.

U is one Cholesky factor of H with rows and columns reversed and one triangular inverse, instead of the textbook's Cholesky, inverse and second
Cholesky: half the work, and nothing has to stay positive definite after rounding in float32.

Price: about k**3 for the factor, n k**2 / 2 for the sweep, and what refine.py says; memory, beside the caller's H and some panels of rows:
three k x k float32 matrices while U is made (3 * 4 * 28672**2 bytes, 9.9 GB, for the widest layer of a 70B model), two during the sweep, one
during refinement. Limits: a layer that saw no tokens, or whose H stays
indefinite up to DAMP_LIMIT, is rounded to nearest, and its report row says so.
"""

from typing import Any

import torch
from torch import Tensor

from compressor.packed import Affine, PackedWeight
from compressor.quant import grid, rtn
from compressor.quant.refine import refine
from compressor.recipe import Quant
from compressor.stats import LayerStats

BLOCK = 128
DAMP_LIMIT = 1.0
PANEL = 1 << 26  # weights swept at a time: large, for every column of a panel costs a few kernel launches
ROUNDS = 3  # of refinement; measured in docs/log.md


def pack(w: Tensor, stats: LayerStats | None, options: Quant, group: int, scale_dtype: torch.dtype) -> tuple[PackedWeight, dict[str, Any]]:
    """w float32 [n, k], `group` a divisor of k -> packed weight and its report row.

    The row is {"damp", "note"}, or {"packer": "rtn", "note"} when rounded to nearest. Inputs that were always zero get zero weights. Raises
    NumericError when w is not finite.
    """
    grid.require_finite(w)
    if stats is None or stats.hessian is None:
        return _rounded(w, options, group, scale_dtype, "no calibration tokens reached this layer")
    hessian, dead = _living(stats.hessian.to(w.device, torch.float32, copy=True))
    order = _order(hessian, options.act_order)
    factor, damp, note = factorise(hessian, order, options.damp)
    if factor is None:
        return _rounded(w, options, group, scale_dtype, note)
    w = w.masked_fill(dead, 0)
    values = grid.choose(w, options.bits, group, options.symmetric, options.shrink, scale_dtype)
    codes, scale = torch.empty(w.shape, dtype=torch.uint8, device=w.device), values.scale.clone()
    parts = [(rows, Affine(values.scale[rows], _rows(values.zero, rows))) for rows in grid.panels(w.shape[0], w.shape[1], PANEL)]
    for rows, part in parts:
        codes[rows] = _sweep(w[rows], factor, order, part, options.bits, group)
    del factor
    hessian = _damped(hessian, damp * hessian.diagonal().mean())
    for rows, part in parts:
        codes[rows], scale[rows] = refine(w[rows], codes[rows], part, hessian, options.bits, ROUNDS)
    return PackedWeight.pack(codes, Affine(scale, values.zero), options.bits), {"damp": damp, "note": note}


def _rounded(w: Tensor, options: Quant, group: int, scale_dtype: torch.dtype, why: str) -> tuple[PackedWeight, dict[str, Any]]:
    packed, row = rtn.pack(w, None, options, group, scale_dtype)
    return packed, row | {"packer": "rtn", "note": f"{why}; rounded to nearest"}


def _rows(zero: Tensor | None, rows: slice) -> Tensor | None:
    return None if zero is None else zero[rows]


def _living(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """H [k, k], in place, with the mean of the living diagonal for inputs that were always zero, and which those are, bool [k].

    The paper's code puts 1 there, which swells the damping when inputs are small.
    """
    dead = hessian.diagonal() == 0
    living = hessian.diagonal()[~dead]
    hessian.diagonal().masked_fill_(dead, float(living.mean()) if living.numel() else 1.0)
    return hessian, dead


def _damped(hessian: Tensor, extra: Tensor) -> Tensor:
    """H + extra I, in place."""
    hessian.diagonal().add_(extra)
    return hessian


def _order(hessian: Tensor, act_order: bool) -> Tensor:
    """int64 [k]: the column to round at each step; equal diagonals keep their order."""
    if act_order:
        return hessian.diagonal().argsort(descending=True, stable=True)
    return torch.arange(hessian.shape[0], device=hessian.device)


def factorise(hessian: Tensor, order: Tensor, damp: float) -> tuple[Tensor | None, float, str]:
    """Upper U [k, k] with UT U = (H[order, order] + damp mean(diag H) I)^-1, the damp that worked, and a note when it is not the one given.

    Damp is raised tenfold, up to DAMP_LIMIT, while the matrix is not positive definite or U not finite; after that U is None.
    """
    backward = order.flip(0)
    mean, asked = hessian.diagonal().mean(), damp
    while True:
        upper = _inverse_factor(_damped(hessian[backward.unsqueeze(1), backward], damp * mean))
        if upper is not None:
            return upper, damp, "" if damp == asked else f"damp raised from {asked:g} to {damp:g}, for H was not positive definite"
        if damp * 10 > DAMP_LIMIT:
            return None, damp, f"H is not positive definite or not finite, even with damp {damp:g}"
        damp *= 10


def _inverse_factor(backward: Tensor) -> Tensor | None:
    """Upper U with UT U the inverse of the matrix whose rows and columns come reversed, or None; holds no more than two matrices at a time."""
    lower, failed = torch.linalg.cholesky_ex(backward)
    del backward
    if bool(failed):
        return None
    reverse = lower.flip(0, 1)
    del lower
    upper = torch.eye(len(reverse), device=reverse.device)
    torch.linalg.solve_triangular(reverse, upper, upper=True, out=upper)
    del reverse
    return upper if bool(torch.isfinite(upper).all()) else None


def _sweep(w: Tensor, factor: Tensor, order: Tensor, values: Affine, bits: int, group: int) -> Tensor:
    """Codes uint8 [n, k] of w [n, k]; inside, everything is transposed so that a column is contiguous."""
    rest = w.T[order].contiguous()  # [k, n], the columns in the order of rounding, each less the errors before it
    scale = values.scale.float().T.contiguous()  # [G, n]
    zero = torch.full_like(scale, grid.midpoint(bits)) if values.zero is None else values.zero.float().T.contiguous()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=w.device)
    at = (order // group).tolist()
    for start in range(0, len(at), BLOCK):
        stop = min(start + BLOCK, len(at))
        block, local = rest[start:stop], factor[start:stop, start:stop]  # block turns into errors row by row
        for i, g in enumerate(at[start:stop]):
            code = grid.encode(block[i], scale[g], zero[g], bits)
            codes[start + i] = code.to(torch.uint8)
            block[i] -= scale[g] * (code - zero[g])
            block[i] /= local[i, i]
            block[i + 1 :].addr_(local[i, i + 1 :], block[i], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, block, alpha=-1)
    out = torch.empty_like(codes)
    out[order] = codes
    return out.T
