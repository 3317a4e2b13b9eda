"""The learned sketch: per row segment a table of 2**bits values, and a code per weight, chosen on the inputs that the layer sees.

    1. Tables: weighted k-means of each row segment (kmeans.py). Column j weighs U[j, j]**-p, p = 2 by default, U the upper Cholesky factor of the
       damped inverse of H = mean(x xT) with columns in the order of rounding.
       LeanQuant's p is 4; 2, the weight of the loss in optimal brain surgery, came out level or better (docs/log.md).
    2. Codes: column after column, by descending diagonal of H, takes the nearest entry of its segment's table, and its error, as in GPTQ, is made
       up for by the columns behind it.
    3. Tables given the codes by least squares, codes given the tables by a new sweep, SWEEPS times in turn; from each row's best pair on, codes and
       tables move together, every move a descent on the error under the damped H (refit.py).

Source: LeanQuant (Zhang and Shrivastava, 2024, arXiv 2407.10032) for 1 and 2 with one table a row, which is where it ends, as `refit` off does
here; SketchTune (Zhang et al., 2024, arXiv 2410.06364) for segments: how its sketches are made is not published. With `start` "uniform" step 1 is
an even spacing; with `feedback` off codes are the nearest entries of the original weights, and no sweep follows.

A row whose output error on the calibration inputs step 3 did not lower, with tables as they will be stored, keeps what step 2 gave. Price: the
k-means (kmeans.py), SWEEPS + 1 sweeps, and SWEEPS + ROUNDS refits of some 2**b products with H each; memory, beside some panels of rows, five
k x k float32 matrices while U is made. Limits: a layer without calibration tokens, or whose H stays indefinite, gets plain k-means of its
weights, and its report row says so.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.hessian import damped, factorise, living, rounding_order, sweep, unread
from compressor.packed import PackedWeight, Table
from compressor.packing import check_range, joined, panels, require_finite
from compressor.recipe import Quant
from compressor.sketch import kmeans, refit
from compressor.stats import UNSEEN, LayerStats

PANEL = 1 << 24  # weights swept at a time
SWEEPS = 5  # refits that a new sweep, or at last the descent, follows; measured in docs/log.md
ROUNDS = 2  # of the descent


def pack(w: Tensor, stats: LayerStats | None, options: Quant, group: int, dtype: torch.dtype) -> tuple[PackedWeight, dict[str, Any]]:
    """w float32 [n, k], segments of `group` columns -> packed weight with tables in `dtype`, and its report row.

    The row is {"damp", "note"}, or {"packer": "kmeans", "note"} where there is no usable H. Inputs that were always zero get weights near zero.
    Raises NumericError when w is not finite, or beyond what `dtype` holds (packing.check_range).
    """
    require_finite(w)
    if stats is None or stats.hessian is None:
        return _unseen(w, options, group, dtype, UNSEEN if stats is None else stats.why)
    raw = stats.hessian.to(w.device, torch.float32)
    hessian, dead = living(raw.clone())
    if bool(dead.all()):
        return _unseen(w, options, group, dtype, "all its calibration inputs were zero")
    order = rounding_order(hessian, options.act_order)
    factor, damp, note = factorise(hessian, order, options.damp)
    if factor is None:
        return _unseen(w, options, group, dtype, note)
    note = joined(note, unread(dead), check(w.masked_fill(dead, 0), group, dtype))
    moments = _Moments(raw, damped(hessian, damp * hessian.diagonal().mean()), factor, order, group)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    table = torch.empty(w.shape[0], -(-w.shape[1] // group), 1 << options.bits, dtype=dtype, device=w.device)
    for rows in panels(w.shape[0], w.shape[1], PANEL):
        part = w[rows].masked_fill(dead, 0)
        start = start_tables(part, moments.sensitivity(options.exponent), options, group)
        table[rows], codes[rows] = _pack_panel(part, storable(start, dtype), moments, options)
    return PackedWeight.pack(codes, Table(table), options.bits, group), {"damp": damp, "note": note}


def start_tables(w: Tensor, weight: Tensor, options: Quant, group: int) -> Tensor:
    """Ascending tables [n, S, 2**bits] of w [n, k], before any code is chosen; weight [k] or [n, k]."""
    count = 1 << options.bits
    out = []
    for part, importance in zip(w.split(group, 1), weight.split(group, -1), strict=True):
        if options.start == "uniform":
            out.append(kmeans.uniform(part, count))
        else:
            fitted = [kmeans.fit(part[rows], importance if importance.dim() == 1 else importance[rows], count) for rows in panels(*part.shape)]
            out.append(torch.cat(fitted))
    return torch.stack(out, 1)


def blind(w: Tensor, weight: Tensor, options: Quant, group: int, dtype: torch.dtype) -> PackedWeight:
    """k-means of every segment of w [n, k] and the nearest entry for each weight, without a thought of the outputs; weight [k] or [n, k]."""
    n, k = w.shape
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    table = storable(start_tables(w, weight, options, group), dtype)
    for rows in panels(n, k):
        codes[rows] = refit.nearest_codes(w[rows].T, table[rows].float().permute(1, 2, 0), group).T
    return PackedWeight.pack(codes, Table(table), options.bits, group)


def check(w: Tensor, group: int, dtype: torch.dtype) -> str:
    """What `packing.check_range` says of w float32 [n, k] and table entries, which may be below the normal numbers of `dtype`."""
    limits = torch.finfo(dtype)
    return check_range(w, group, 1, dtype, limits.tiny * limits.eps)


def storable(table: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest finite entries in `dtype`."""
    limit = torch.finfo(dtype).max
    return table.clamp(-limit, limit).to(dtype)


def _unseen(w: Tensor, options: Quant, group: int, dtype: torch.dtype, why: str) -> tuple[PackedWeight, dict[str, Any]]:
    note = joined(f"{why}; plain k-means", check(w, group, dtype))
    return blind(w, torch.ones(w.shape[1], device=w.device), options, group, dtype), {"packer": "kmeans", "note": note}


@dataclass(frozen=True)
class _Moments:
    """What step 2 and 3 know of the inputs: H [k, k] as seen and damped, U [k, k] in the order of rounding, that order [k], the segment length."""

    raw: Tensor
    hessian: Tensor
    factor: Tensor
    order: Tensor
    group: int

    def sensitivity(self, exponent: float) -> Tensor:
        """U[j, j]**-exponent per column, scaled to a sum of 1 without overflow; float32 [k]."""
        out = torch.empty_like(self.factor.diagonal())
        out[self.order] = torch.softmax(-exponent * self.factor.diagonal().double().log(), 0).float()
        return out

    def error(self, w: Tensor, table: Tensor, codes: Tensor) -> Tensor:
        """The output error of each row as seen, [n]; w [k, n]."""
        e = w - refit.spread(table, codes, self.group)
        return ((self.raw @ e).double() * e).sum(0)

    def sweep(self, w: Tensor, table: Tensor) -> Tensor:
        """Codes uint8 [k, n] of w [k, n] with ascending tables [S, K, n]; what a column loses, the columns behind it make up for."""
        borders = refit.borders_of(table)

        def choose(j: int, rest: Tensor) -> tuple[Tensor, Tensor]:
            code = refit.nearest(rest, borders[j // self.group])
            return code[0], table[j // self.group].gather(0, code)[0]

        return sweep(w, self.factor, self.order, choose)

    def pull(self, w: Tensor, table: Tensor, codes: Tensor) -> Tensor:
        """H (w - P t), damped, [k, n]."""
        return self.hessian @ (w - refit.spread(table, codes, self.group))

    def refit(self, table: Tensor, codes: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
        """Ascending tables of least error for the codes, and the codes in their order; `pull` follows in place."""
        return refit.sort_tables(refit.refit_tables(table, codes, pull, self.hessian, self.group), codes, self.group)


def _pack_panel(w: Tensor, start: Tensor, moments: _Moments, options: Quant) -> tuple[Tensor, Tensor]:
    """w [n, k], tables [n, S, K] in the stored dtype -> better tables, and codes uint8 [n, k]; inside, a column is contiguous."""
    w, table = w.T.contiguous(), start.permute(1, 2, 0).float().contiguous()
    codes = moments.sweep(w, table) if options.feedback else refit.nearest_codes(w, table, moments.group)
    if options.refit:
        new, found = _refined(w, table, codes, moments, SWEEPS if options.feedback else 1)
        new = storable(new, start.dtype).float()
        better = moments.error(w, new, found) < moments.error(w, table, codes)  # false for what is not finite
        table, codes = torch.where(better, new, table), torch.where(better, found, codes)
    return table.permute(2, 0, 1).to(start.dtype), codes.T


def _refined(w: Tensor, table: Tensor, codes: Tensor, moments: _Moments, sweeps: int) -> tuple[Tensor, Tensor]:
    """Better tables [S, K, n] and codes [k, n] for w [k, n] under the damped H: step 3."""
    best, least = (table, codes), torch.full((w.shape[1],), torch.inf, device=w.device)
    for left in reversed(range(sweeps)):
        pull = moments.pull(w, table, codes)
        table, codes = moments.refit(table, codes, pull)
        error = ((w - refit.spread(table, codes, moments.group)) * pull).sum(0)
        best = (torch.where(error < least, table, best[0]), torch.where(error < least, codes, best[1]))
        least = torch.minimum(error, least)
        codes = moments.sweep(w, table) if left else codes
    table, codes = best
    pull = moments.pull(w, table, codes)
    for _ in range(ROUNDS):
        refit.move_codes(table, codes, pull, moments.hessian, moments.group)
        table, codes = moments.refit(table, codes, pull)
    return table, codes
