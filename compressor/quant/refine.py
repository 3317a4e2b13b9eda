"""Coordinate descent on codes and scales after GPTQ's sweep: each step is the exact minimiser of tr(E H ET), E = W - packed, in one coordinate.

A code moves to the nearest grid value of w + (E H)[j] / H[j, j] without its own column (QuantEase, Behdin et al., 2023, arXiv
2309.01885); a scale to its least-squares value given all else, rounded to the dtype it is stored in, and only if that is nearer the
optimum than what it was. So the error under the damped H never rises. Zeros stay, and codes of pruned weights are coordinates that do not move.

Price: about (2 rounds + 1) n k**2 multiplications, as matrix products over blocks of 128 columns, and about
five float32 copies of the panel of rows.
Limits: a local minimum; what is minimised is the damped error on the calibration inputs.
"""

import torch
from torch import Tensor

from compressor.hessian import descend
from compressor.packed import Affine
from compressor.quant import grid

REACH = 2.0  # a scale stays within this factor of where it started: strongly correlated inputs would else pull some to zero or below


def refine(
    w: Tensor, codes: Tensor, values: Affine, hessian: Tensor, bits: int, rounds: int, keep: Tensor | None = None, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """w float32 [n, k], codes uint8 [n, k], hessian [k, k] with a positive diagonal -> better codes uint8 [n, k], scale [n, G] in its dtype, and the
    error e H eT of each row with them, float32 [n].

    Codes stay where `keep`, bool [n, k], is false. start: scales [n, G] that REACH counts from; None: those of `values`. Rows do not depend on each
    other, so callers may split them.
    """
    scale = values.scale.T.contiguous().to(torch.float32, copy=True)  # [G, n]; inside, columns are rows, so that each is contiguous
    zero = torch.full_like(scale, grid.midpoint(bits)) if values.zero is None else values.zero.float().T.contiguous()
    groups, n = scale.shape
    steps = codes.T.contiguous().float().view(groups, -1, n) - zero.unsqueeze(1)  # [G, group, n]
    pull = hessian @ (w.T - (steps * scale.unsqueeze(1)).view(-1, n))  # [k, n], H ET
    middle = scale if start is None else start.T.float()
    low, high = middle / REACH, middle * REACH
    kept = None if keep is None else keep.to(w.device).T.contiguous()  # [k, n]
    for _ in range(rounds):
        move_scales(steps, scale, low, high, pull, hessian, values.scale.dtype)
        move_codes(steps, scale, zero, pull, hessian, bits, kept)
    error = ((w.T - (steps * scale.unsqueeze(1)).view(-1, n)) * pull).sum(0)
    return (steps + zero.unsqueeze(1)).view(-1, n).T.to(torch.uint8), scale.T.to(values.scale.dtype), error


def move_scales(steps: Tensor, scale: Tensor, low: Tensor, high: Tensor, pull: Tensor, hessian: Tensor, dtype: torch.dtype) -> None:
    """In place: scale += (d . pull) / (d . H d) for the steps d of one group after the other, kept between low and high."""
    group = steps.shape[1]
    for g, d in enumerate(steps):  # [group, n]
        columns = slice(g * group, (g + 1) * group)
        curve = ((hessian[columns, columns] @ d) * d).sum(0)
        best = scale[g] + torch.where(curve > 0, (pull[columns] * d).sum(0) / curve, 0)
        stored = grid.storable(best.clamp(low[g], high[g]), dtype)
        moved = torch.where((stored - best).abs() < (scale[g] - best).abs(), stored - scale[g], 0)
        pull.addmm_(hessian[:, columns], d * moved, alpha=-1)
        scale[g] += moved


def move_codes(steps: Tensor, scale: Tensor, zero: Tensor, pull: Tensor, hessian: Tensor, bits: int, kept: Tensor | None) -> None:
    """In place: every column to the codes that are best given all others, but where `kept` [k, n] is false."""
    group, flat = steps.shape[1], steps.view(pull.shape)  # [k, n]

    def move(j: int, gain: Tensor) -> Tensor:
        s, z = scale[j // group], zero[j // group]
        step = grid.encode(flat[j] * s + gain, s, z, bits) - z
        if kept is not None:
            step = torch.where(kept[j], step, flat[j])
        moved = (step - flat[j]) * s
        flat[j] = step
        return moved

    descend(pull, hessian, move)
