"""The learned sketch: per row segment a table of 2**bits values, and a code per weight, chosen on the inputs that the layer sees.

    1. Tables: weighted k-means of each row segment (kmeans.py). Column j weighs U[j, j]**-p, p = 4 by default, U the upper Cholesky factor of the
       damped inverse of H = mean(x xT) with columns in the order of rounding.
    2. Codes: column after column, by descending diagonal of H, takes the nearest entry of its segment's table, and its error, as in GPTQ, is made
       up for by the columns behind it.
    3. Tables given the codes, codes given the tables, in turn, each a descent on the output error (refit.py).

Source: LeanQuant (Zhang and Shrivastava, 2024, arXiv 2407.10032) for 1 and 2 with one table a row; SketchTune (Zhang et al., 2024, arXiv
2410.06364) for segments. The refit of 3 is ours; with `refit` off it ends at 2, with `start` "uniform" step 1 is an even spacing, with
`feedback` off step 2 takes the nearest entry of the original weight.

A row whose output error the refit did not lower keeps what the sweep gave, so the refit never costs. Price: GPTQ's, the k-means, and ROUNDS + 1
refits of some ten products with H each. Limits: a layer without calibration tokens, or whose H stays indefinite, gets plain k-means of its weights,
and its report row says so.
"""

from typing import Any

import torch
from torch import Tensor

from compressor.hessian import damped, factorise, living, rounding_order
from compressor.packed import PackedWeight, Table
from compressor.packing import panels, require_finite
from compressor.recipe import Quant
from compressor.sketch import kmeans, refit
from compressor.stats import LayerStats

BLOCK = 128
PANEL = 1 << 24  # weights swept at a time
ROUNDS = 2  # of codes and tables after the first refit


def pack(w: Tensor, stats: LayerStats | None, options: Quant, group: int, dtype: torch.dtype) -> tuple[PackedWeight, dict[str, Any]]:
    """w float32 [n, k], segments of `group` columns -> packed weight with tables in `dtype`, and its report row {"damp", "note"}.

    Inputs that were always zero get the entry nearest to zero. Raises NumericError when w is not finite.
    """
    require_finite(w)
    if stats is None or stats.hessian is None:
        return _unseen(w, options, group, dtype, "no calibration tokens reached this layer")
    raw = stats.hessian.to(w.device, torch.float32)
    hessian, dead = living(raw.clone())
    order = rounding_order(hessian, options.act_order)
    factor, damp, note = factorise(hessian, order, options.damp)
    if factor is None:
        return _unseen(w, options, group, dtype, note)
    w = w.masked_fill(dead, 0)
    hessian = damped(hessian, damp * hessian.diagonal().mean())
    weight = torch.empty_like(factor.diagonal())
    weight[order] = torch.softmax(-options.exponent * factor.diagonal().double().log(), 0).float()  # U[j, j]**-exponent, without overflow
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    table = torch.empty(w.shape[0], -(-w.shape[1] // group), 1 << options.bits, dtype=dtype, device=w.device)
    for rows in panels(w.shape[0], w.shape[1], PANEL):
        start = start_tables(w[rows], weight, options, group).permute(1, 2, 0).contiguous()
        entries = start.to(dtype).float()
        found = _sweep(w[rows], entries, factor, order, group) if options.feedback else _nearest(w[rows].T, entries, group)
        if options.refit:
            entries, found = _refitted(w[rows].T.contiguous(), entries, found, hessian, raw, group, dtype)
        table[rows], codes[rows] = entries.permute(2, 0, 1).to(dtype), found.T
    return PackedWeight.pack(codes, Table(table), options.bits, group), {"damp": damp, "note": note}


def start_tables(w: Tensor, weight: Tensor, options: Quant, group: int) -> Tensor:
    """Ascending tables [n, S, 2**bits] of w [n, k], before any code is chosen; weight [k] or [n, k]."""
    count = 1 << options.bits
    out = []
    for start in range(0, w.shape[1], group):
        part, importance = w[:, start : start + group], weight[..., start : start + group]
        sizes = panels(*part.shape)
        fitted = [kmeans.fit(part[rows], importance if importance.dim() == 1 else importance[rows], count) for rows in sizes]
        out.append(kmeans.uniform(part, count) if options.start == "uniform" else torch.cat(fitted))
    return torch.stack(out, 1)


def blind(w: Tensor, weight: Tensor, options: Quant, group: int, dtype: torch.dtype) -> PackedWeight:
    """k-means of every segment of w [n, k] and the nearest entry for each weight, without a thought of the outputs; weight [k] or [n, k]."""
    n, k = w.shape
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    table = start_tables(w, weight, options, group).to(dtype)
    for rows in panels(n, k):
        codes[rows] = _nearest(w[rows].T, table[rows].float().permute(1, 2, 0), group).T
    return PackedWeight.pack(codes, Table(table), options.bits, group)


def _unseen(w: Tensor, options: Quant, group: int, dtype: torch.dtype, why: str) -> tuple[PackedWeight, dict[str, Any]]:
    return blind(w, torch.ones(w.shape[1], device=w.device), options, group, dtype), {"packer": "kmeans", "note": f"{why}; plain k-means"}


def _nearest(w: Tensor, table: Tensor, group: int) -> Tensor:
    """Codes uint8 [k, n] of w [k, n] among ascending tables [S, K, n]."""
    borders = refit.borders_of(table)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for j in range(len(w)):
        codes[j] = refit.nearest(w[j], borders[j // group])[0]
    return codes


def _sweep(w: Tensor, table: Tensor, factor: Tensor, order: Tensor, group: int) -> Tensor:
    """Codes uint8 [k, n] of w [n, k] with ascending tables [S, K, n]; what a column loses, the columns behind it make up for."""
    rest = w.T[order].contiguous()  # [k, n], the columns in the order of rounding, each less the errors before it
    borders, columns = refit.borders_of(table), order.tolist()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        block, local = rest[start:stop], factor[start:stop, start:stop]  # block turns into errors row by row
        for i, j in enumerate(columns[start:stop]):
            code = refit.nearest(block[i], borders[j // group])
            codes[j] = code[0]
            block[i] -= table[j // group].gather(0, code)[0]
            block[i] /= local[i, i]
            block[i + 1 :].addr_(local[i, i + 1 :], block[i], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, block, alpha=-1)
    return codes


def _refitted(w: Tensor, table: Tensor, codes: Tensor, hessian: Tensor, raw: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Better tables [S, K, n], as stored in `dtype`, and codes [k, n] for w [k, n]; rows that the raw H finds worse stay as they were."""
    new, found = table, codes.clone()
    pull = hessian @ (w - refit.spread(table, codes, group))
    for last in [False] * ROUNDS + [True]:
        new = refit.refit_tables(new, found, pull, hessian, group)
        new, found = refit.sort_tables(new, found, group)
        if not last:
            refit.move_codes(new, found, pull, hessian, group)
    new = new.to(dtype).float()
    better = _error(w, new, found, raw, group) < _error(w, table, codes, raw, group)
    return torch.where(better, new, table), torch.where(better, found, codes)


def _error(w: Tensor, table: Tensor, codes: Tensor, raw: Tensor, group: int) -> Tensor:
    """e H eT of each row, [n]."""
    e = w - refit.spread(table, codes, group)
    return ((raw @ e) * e).sum(0)
