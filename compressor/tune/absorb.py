"""A path that trained beside a packed weight goes into it: W' = Q + D with D = gamma B A is packed, and the path is gone.

    values   codes stay; scales (affine) or tables take their least-squares values for W' under H = mean(x xT) of the layer's inputs
    move     from there on codes and values by coordinate descent, each step the best in one coordinate (quant/refine.py, sketch/refit.py)
    pack     anew by the recipe's packer, as if W' were a dense weight that was never packed (pipelines/absorb.py)

The first two start from what is there, and a row whose error they do not lower keeps its codes and values: D = 0 changes nothing. D that is a
constant times the weight within each group is taken up exactly, to the rounding of the stored values. Zeros, integer or tuned, stay.

Source: values alone adapt in PEQA (arXiv 2305.14152) and SketchTune (arXiv 2410.06364); here they do so by least squares, in closed form without H,
for scales under H by coordinate descent within bounds (QuantEase, Behdin et al., 2023, arXiv 2309.01885). Price: `values` 3 n k**2 multiplications
for scales, 2**bits n k**2 for tables, `move` about seven n k**2 more; a dense copy or four of a panel of rows. Limits: a change smaller than half a
step of the grid that is not a change of scale moves few codes on its own, so how much of D survives is an error like that of packing; which way
loses least is measured by layer (docs/log.md).
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from compressor.hessian import damped, living
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight, Table
from compressor.packing import dense_rows, panels
from compressor.quant import grid
from compressor.quant.refine import move_scales, refine
from compressor.sketch import refit
from compressor.sketch.learned import storable

FLOOR = 0.1  # of a scale: none falls below, as none does in tuning
ROUNDS = 3
DAMP = 0.01  # share of the mean diagonal of H that descents and tables see added to it; judged is without
PANEL = 1 << 24
Fit = Callable[[PackedWeight, Tensor, Tensor | None], PackedWeight]


def _in_stored_order(fit: Fit) -> Fit:
    """The same for weights whose columns are stored in another order than the layer's: target and H follow them."""

    @functools.wraps(fit)
    def fitted(packed: PackedWeight, target: Tensor, hessian: Tensor | None) -> PackedWeight:
        at = packed.columns
        if at is None:
            return fit(packed, target, hessian)
        return replace(fit(replace(packed, columns=None), target[:, at], None if hessian is None else hessian[at][:, at]), columns=at)

    return fitted


@_in_stored_order
@torch.no_grad()
def refit_values(packed: PackedWeight, target: Tensor, hessian: Tensor | None) -> PackedWeight:
    """The same codes with values that are nearest to target float32 [n, k] under H [k, k]; None: in the plain norm."""
    fit = _tables if isinstance(packed.values, Table) else _scales
    learned = torch.empty_like(packed.learned)
    for rows in _parts(packed):
        learned[rows] = fit(_cut(packed, rows), target[rows], hessian)
    return better(packed, packed.with_learned(learned), target, hessian)


@_in_stored_order
@torch.no_grad()
def move(packed: PackedWeight, target: Tensor, hessian: Tensor | None) -> PackedWeight:
    """Codes and values that are nearer to target float32 [n, k] under H than those of `refit_values`; codes of tuned zeros stay."""
    packed = refit_values(packed, target, hessian)
    if packed.float_zeros:
        return packed
    h = _damped(torch.eye(target.shape[1], device=target.device) if hessian is None else hessian.float())
    walk = _walk_tables if isinstance(packed.values, Table) else _walk_scales
    found = [walk(_cut(packed, rows), target[rows], h) for rows in _parts(packed)]
    codes, learned = torch.cat([codes for codes, _ in found]), torch.cat([values for _, values in found])
    values = Affine(learned, packed.zero) if isinstance(packed.values, Affine) else Table(learned)
    return better(packed, PackedWeight.pack(codes, values, packed.bits, packed.group), target, hessian)


def better(old: PackedWeight, new: PackedWeight, target: Tensor, hessian: Tensor | None) -> PackedWeight:
    """Of each row the weight, old or new, both of one shape and with the same zeros, that is nearer to target under H; a tie keeps the old."""
    wins = torch.cat([_energy(target[r] - dense_rows(new, r), hessian) < _energy(target[r] - dense_rows(old, r), hessian) for r in _parts(old)])
    if bool(wins.all()):
        return new
    learned = torch.where(wins.view(-1, *[1] * (old.learned.dim() - 1)), new.learned, old.learned)
    if new.words is old.words:
        return old.with_learned(learned)
    codes = torch.where(wins.unsqueeze(1), new.codes(), old.codes())
    return PackedWeight.pack(codes, old.with_learned(learned).values, old.bits, old.group)


def _energy(e: Tensor, hessian: Tensor | None) -> Tensor:
    """e H eT of each row, float64 [n]."""
    seen = e if hessian is None else e @ hessian.float()
    return (seen * e).sum(1, dtype=torch.float64)


def _parts(packed: PackedWeight) -> list[slice]:
    return panels(packed.shape[0], packed.shape[1], PANEL, layout.ROWS)


def _cut(packed: PackedWeight, rows: slice) -> PackedWeight:
    """The rows [start, stop) as a weight; start is a multiple of a tile's rows."""
    words = packed.words[rows.start // layout.ROWS : -(-rows.stop // layout.ROWS)]
    zero = None if packed.zero is None else packed.zero[rows]
    values = Affine(packed.learned[rows], zero) if isinstance(packed.values, Affine) else Table(packed.learned[rows])
    return replace(packed, words=words, values=values, shape=(rows.stop - rows.start, packed.shape[1]))


def _damped(hessian: Tensor) -> Tensor:
    hessian, _ = living(hessian.clone())
    return damped(hessian, DAMP * hessian.diagonal().mean())


def _scales(packed: PackedWeight, target: Tensor, hessian: Tensor | None) -> Tensor:
    """Scales [n, G] in their dtype: without H each group's own best, from which descent under H goes on."""
    old = packed.learned.float().T.contiguous()  # [G, n]; inside, columns are rows
    groups, n = old.shape
    zero = torch.full_like(old, grid.midpoint(packed.bits)) if packed.zero is None else packed.zero.float().T
    steps = packed.codes().T.float().view(groups, -1, n) - zero.unsqueeze(1)  # [G, group, n]
    size = steps.square().sum(1)
    scale = torch.where(size > 0, (steps * target.T.view(steps.shape)).sum(1) / size, old)
    low, high, dtype = old * FLOOR, torch.full_like(old, torch.finfo(packed.learned.dtype).max), packed.learned.dtype
    scale = grid.storable(scale.clamp(low, high), dtype)
    if hessian is not None:
        pull = hessian.float() @ (target.T - (steps * scale.unsqueeze(1)).view(-1, n))  # [k, n]
        for _ in range(ROUNDS):
            move_scales(steps, scale, low, high, pull, hessian.float(), dtype)
    return scale.T.to(dtype)


def _tables(packed: PackedWeight, target: Tensor, hessian: Tensor | None) -> Tensor:
    """Tables [n, S, K] in their dtype; entries without a code stay."""
    table, codes, dtype = packed.learned.float().permute(1, 2, 0).contiguous(), packed.codes().T.contiguous(), packed.learned.dtype
    if hessian is None:
        for s, part in enumerate(target.T.split(packed.group)):  # [columns, n]
            at = codes[s * packed.group : (s + 1) * packed.group].long()
            table[s].scatter_reduce_(0, at, part.contiguous(), "mean", include_self=False)
    else:
        h = _damped(hessian.float())
        table = refit.refit_tables(table, codes, h @ (target.T - refit.spread(table, codes, packed.group)), h, packed.group)
    return storable(table.permute(2, 0, 1), dtype)


def _walk_scales(packed: PackedWeight, target: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    values = packed.values
    assert isinstance(values, Affine)
    return refine(target, packed.codes(), values, hessian, packed.bits, ROUNDS)[:2]


def _walk_tables(packed: PackedWeight, target: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    w, table = target.T.contiguous(), packed.learned.float().permute(1, 2, 0).contiguous()
    table, codes = refit.sort_tables(table, packed.codes().T.contiguous(), packed.group)
    pull = hessian @ (w - refit.spread(table, codes, packed.group))
    for _ in range(ROUNDS):
        refit.move_codes(table, codes, pull, hessian, packed.group)
        table = refit.refit_tables(table, codes, pull, hessian, packed.group)
        table, codes = refit.sort_tables(table, codes, packed.group)
    return codes.T, storable(table.permute(2, 0, 1), packed.learned.dtype)
