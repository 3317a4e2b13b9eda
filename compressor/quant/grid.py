"""The grid of a group: the scale, and for asymmetric weights the zero, that its codes count in.

Round-to-nearest with a shrink search (PEQA's initialisation, Kim et al., 2023; the search is that of GPTQ's reference quantiser with
a squared error): the range of every (row, group) is scaled by p in 1.00, 0.99 .. 0.21 and the p with the least squared error stays. A candidate
is judged with its scale already rounded to the dtype it is stored in, so packing changes nothing afterwards. Symmetric grids have one more
negative than positive step and a positive scale, which servers want; each side of the range gets the steps it has.

Price: 80 passes over the weight, in panels of rows that bound the memory. Limits: both ends of a range shrink together.
"""

import torch
from torch import Tensor

from compressor.packed import Affine
from compressor.packing import check_range, panels

SHRINK = tuple(1 - i / 100 for i in range(80))


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest positive, normal, finite value of `dtype` to each scale, as float32; zero becomes the smallest normal."""
    limits = torch.finfo(dtype)
    return scale.clamp(limits.tiny, limits.max).to(dtype).float()


def midpoint(bits: int) -> int:
    return 1 << (bits - 1)


def encode(w: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    """Codes of w as floats of w's shape; scale and zero broadcast against w."""
    return (w / scale).round_().add_(zero).clamp_(0, (1 << bits) - 1)


def choose(w: Tensor, bits: int, group: int, symmetric: bool, shrink: bool, dtype: torch.dtype) -> Affine:
    """Scale [n, k/group] in `dtype` and zero (uint8, or None if symmetric) for w float32 [n, k]."""
    n, k = w.shape
    scale = torch.empty(n, k // group, dtype=dtype, device=w.device)
    zero = None if symmetric else torch.empty(n, k // group, dtype=torch.uint8, device=w.device)
    for rows in panels(n, k):
        found, at = _search(w[rows].view(-1, k // group, group), bits, symmetric, SHRINK if shrink else SHRINK[:1], dtype)
        scale[rows] = found.to(dtype)
        if zero is not None:
            zero[rows] = at.to(torch.uint8)
    return Affine(scale, zero)


def check(w: Tensor, bits: int, group: int, dtype: torch.dtype) -> str:
    """What `packing.check_range` says of w float32 [n, k] and the scales that its grids may want."""
    return check_range(w, group, midpoint(bits) - 1, dtype, torch.finfo(dtype).tiny)


def _search(w: Tensor, bits: int, symmetric: bool, shares: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w [n, G, group] -> the best scale and zero, float32 [n, G]."""
    low, high = w.amin(-1).clamp_(max=0), w.amax(-1).clamp_(min=0)
    best = torch.full_like(low, torch.inf)
    scale, zero = _candidate(low, high, bits, symmetric, dtype)
    for share in shares if len(shares) > 1 else ():
        s, z = _candidate(low * share, high * share, bits, symmetric, dtype)
        error = encode(w, s.unsqueeze(-1), z.unsqueeze(-1), bits).sub_(z.unsqueeze(-1)).mul_(s.unsqueeze(-1)).sub_(w).square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def _candidate(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid that covers low <= 0 <= high."""
    if symmetric:
        half = midpoint(bits)
        return storable(torch.maximum(-low / half, high / (half - 1)), dtype), torch.full_like(low, half)
    scale = storable((high - low) / ((1 << bits) - 1), dtype)
    return scale, (-low / scale).round_().clamp_(0, (1 << bits) - 1)
