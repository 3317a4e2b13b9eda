"""Codes, scales and minima of GGUF's blocks: a packed weight's own where the type holds them, else the nearest found.

Own: where d and integers c exist with d * c = s for all scales s of a block, c within the type's range, and with dmin * minimum = s * z likewise, the
codes stay as they are and nothing is lost. d is the greatest common divisor of the scales, so no search can miss it.

Nearest: scales and minima of a block are brought to multiples of one d and one dmin, each the best of a few dozen candidates (scales, not weights,
are compared, so they cost little); codes are rounded anew; each sub-block then tries the neighbouring scales and minima (3 percent less error for a
dense weight in Q4_K, 9 to 13 for asymmetric ones, nothing for symmetric ones, which skip it); d and dmin follow by least squares. Every step is kept
only where it lowers the squared error. A dense weight first gets scales and minima of its own.

Price: some 40 passes over a layer that cannot be held exactly. Limit: all weights of a block count alike (no importance matrix).
"""

from dataclasses import replace

import torch
from torch import Tensor

from compressor.export.gguf_types import Grid, Kind
from compressor.packed import PackedWeight, Table

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72)  # of the widest range: outliers may be cut


def own(weight: PackedWeight, kind: Kind, whole: bool = False) -> tuple[Grid, Tensor] | None:
    """The weight's own codes in this type, and which blocks bool [n, B] are exact by d; None where the type holds no such codes.

    Of the types with one scale a block all blocks count as exact: their d, and Q4_1's m, are rounded to float16, which the caller may check.
    whole: None too where d does not do for every block, which shows before the codes are unpacked.
    """
    n, k = weight.shape
    middle = 1 << (weight.bits - 1)
    narrow = weight.bits <= kind.top.bit_length() if kind.minimum else weight.zero is not None or middle <= kind.offset
    if isinstance(weight.values, Table) or weight.columns is not None or weight.group % kind.sub or not narrow:
        return None
    shape, times = (n, k // kind.block, kind.block // kind.sub), weight.group // kind.sub
    scale = weight.learned.float().repeat_interleave(times, 1).view(shape)
    zero = torch.full_like(scale, middle) if weight.zero is None else weight.zero.float().repeat_interleave(times, 1).view(shape)
    if kind.name != "q4_1" and not bool((zero == zero.round()).all()):
        return None
    ones = torch.ones(shape, dtype=torch.int16)
    grid = Grid(kind.offset, torch.empty(0), scale[..., 0].half(), ones)
    grid = replace(grid, dmin=(scale * zero)[..., 0].half(), least=ones) if kind.minimum else grid
    grid, fine = (grid, torch.ones(shape[:2], dtype=torch.bool)) if kind.limit == 1 else _two_levels(grid, scale, zero, kind)
    if whole and not bool(fine.all()):
        return None
    codes = weight.codes().to(torch.int16).view(*shape, kind.sub)
    if not kind.minimum:
        codes = codes - zero.to(torch.int16).unsqueeze(-1) + kind.offset
        if bool((codes < 0).any()) or bool((codes > kind.top).any()):
            return None
    return replace(grid, codes=codes.to(torch.uint8)), fine


def _two_levels(grid: Grid, scale: Tensor, zero: Tensor, kind: Kind) -> tuple[Grid, Tensor]:
    d, count = _halved(*divisor(scale), kind.limit)
    fine = (d.half().double() == d) & (count.abs().amax(-1) <= kind.limit)
    count = count.clamp(kind.lowest, kind.limit)
    grid = replace(grid, d=d.half(), scale=count.to(torch.int16))
    if not kind.minimum:
        return grid, fine
    product = count * zero.long()  # the minima, in units of d
    common = _gcd(product)
    dmin, least = _halved(d * common, product // common.clamp(min=1).unsqueeze(-1), kind.limit)
    fine &= (dmin.half().double() == dmin) & (least.amax(-1) <= kind.limit) & (product.amin(-1) >= 0) & (count.amin(-1) >= 0)
    return replace(grid, dmin=dmin.half(), least=least.clamp(0, kind.limit).to(torch.int16)), fine


def _halved(d: Tensor, count: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The same products with a d that float16 holds, wherever d / t is one and count * t within the limit for some t."""
    for t in range(2, limit + 1):
        part = (d / t).half().double()
        fits = (d.half().double() != d) & (part * t == d) & (count.abs().amax(-1) * t <= limit)
        d, count = torch.where(fits, part, d), torch.where(fits.unsqueeze(-1), count * t, count)
    return d, count


def divisor(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest d with scale = d * count, count integer: float64 [..], int64 [.., J]. Where scales differ too much, counts are beyond any type."""
    mantissa, exponent = torch.frexp(scale.double())
    whole = (mantissa * (1 << 24)).long()  # float32 has 24 bits
    used = torch.where(whole == 0, 1 << 20, exponent.long())
    least = used.amin(-1, keepdim=True)
    whole = torch.where(whole == 0, 0, whole << (used - least).clamp(max=30))  # a scale 2**30 times another is beyond all types, whatever d
    common = _gcd(whole).clamp(min=1)
    count = whole // common.unsqueeze(-1)
    exponents = torch.where(least.squeeze(-1) == 1 << 20, 0, least.squeeze(-1)) - 24
    return torch.where((whole != 0).any(-1), torch.ldexp(common.double(), exponents), 0.0), count


def _gcd(numbers: Tensor) -> Tensor:
    out = numbers[..., 0].abs()
    for j in range(1, numbers.shape[-1]):
        out = torch.gcd(out, numbers[..., j].abs())
    return out


def nearest(weight: PackedWeight | None, dense: Tensor, kind: Kind) -> Grid:
    """The nearest blocks found for dense float32 [n, k]; `weight` is the same weight packed, whose scales are then started from where they can be."""
    n, k = dense.shape
    parts = dense.view(n, k // kind.block, kind.block // kind.sub, kind.sub)
    start = None if weight is None else _packed_start(weight, parts, kind)
    scale, low = start if start is not None else dense_start(parts, kind)
    if kind.limit == 1:
        d = scale[..., 0].half()
        grid = Grid(kind.offset, torch.empty(0), d, torch.ones(scale.shape, dtype=torch.int16))
        grid = grid if low is None else replace(grid, dmin=low[..., 0].half(), least=grid.scale)
        return _coded(grid, parts, kind)
    d, count = multiples(scale, kind.limit, kind.lowest)
    grid = Grid(kind.offset, torch.empty(0), d, count)
    if low is not None:
        dmin, least = multiples(low, kind.limit, 0)
        grid = replace(grid, dmin=dmin, least=least)
    grid = _coded(grid, parts, kind)
    if weight is None or start is None or weight.zero is not None:  # scales of symmetric weights are as near as they can be
        grid = _neighbours(grid, parts, kind)
    return _refined(grid, parts, kind)


def _packed_start(weight: PackedWeight, parts: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None] | None:
    """Scales and minima [n, B, J] of an affine weight for the types that hold its codes; None for any other."""
    if isinstance(weight.values, Table) or weight.columns is not None or weight.group % kind.sub:
        return None
    times = weight.group // kind.sub
    scale = weight.learned.float().repeat_interleave(times, 1).view(parts.shape[:3])
    middle = float(1 << (weight.bits - 1))
    if not kind.minimum:
        held = weight.zero is None and middle <= kind.offset
        return (scale, None) if held else None
    zero = scale.new_full(scale.shape, middle) if weight.zero is None else weight.zero.float().repeat_interleave(times, 1).view(scale.shape)
    if weight.bits > kind.top.bit_length() or bool((zero < 0).any()) or bool((scale < 0).any()):
        return None
    return scale, scale * zero


def multiples(numbers: Tensor, limit: int, lowest: int) -> tuple[Tensor, Tensor]:
    """d float16 [n, B] and integers in lowest..limit [n, B, J] with d * integer near the numbers [n, B, J]: the best of d = largest / t."""
    largest = numbers.abs().amax(-1)
    best = torch.where(torch.isfinite((largest / limit).half()), 0.0, torch.inf)  # beyond float16 there is no d, and no error below infinity
    error = torch.full_like(largest, torch.inf)
    for t in range(limit // 2 + 1, limit + 1):
        d = (largest / t).half().float()
        wrong = (numbers - d.unsqueeze(-1) * _counts(numbers, d, limit, lowest)).square_().sum(-1)
        best, error = torch.where(wrong < error, d, best), torch.minimum(wrong, error)
    return best.half(), _counts(numbers, best, limit, lowest).to(torch.int16)


def _counts(numbers: Tensor, d: Tensor, limit: int, lowest: int) -> Tensor:
    inverse = torch.where(d > 0, 1 / d, 0).unsqueeze(-1)
    return (numbers * inverse).round_().clamp_(lowest, limit)


def _coded(grid: Grid, parts: Tensor, kind: Kind) -> Grid:
    """The grid with the nearest codes."""
    step, lows = grid.steps().unsqueeze(-1), grid.lows()
    shifted = parts if lows is None else parts + lows.unsqueeze(-1)
    codes = (shifted * torch.where(step != 0, 1 / step, 0)).round_().add_(kind.offset).clamp_(0, kind.top)
    return replace(grid, codes=codes.to(torch.uint8))


def _errors(grid: Grid, parts: Tensor) -> Tensor:
    """Squared errors of the sub-blocks, [n, B, J]."""
    return (grid.values().view_as(parts) - parts).square_().sum(-1)


def _refined(grid: Grid, parts: Tensor, kind: Kind) -> Grid:
    """The grid, with the d and dmin of least squares in the blocks that gain from them."""
    better = _coded(_squares(grid, parts), parts, kind)
    keep = _errors(better, parts).sum(-1) < _errors(grid, parts).sum(-1)
    return chosen(keep, better, grid)


def chosen(keep: Tensor, these: Grid, others: Grid) -> Grid:
    """The blocks of `these` where keep bool [n, B] (or [n, B, J] of grids that share d and dmin), and those of `others`."""
    whole = keep if keep.dim() == 2 else keep[..., 0]
    fine = keep.unsqueeze(-1).expand_as(these.scale) if keep.dim() == 2 else keep

    def pick(one: Tensor | None, other: Tensor | None, mask: Tensor) -> Tensor | None:
        return None if one is None or other is None else torch.where(mask, one, other)

    return Grid(
        these.offset,
        torch.where(fine.unsqueeze(-1), these.codes, others.codes),
        torch.where(whole, these.d, others.d),
        torch.where(fine, these.scale, others.scale),
        pick(these.dmin, others.dmin, whole),
        pick(these.least, others.least, fine),
    )


def _neighbours(grid: Grid, parts: Tensor, kind: Kind) -> Grid:
    """Each sub-block with the scale and the minimum, at most one step away, that suit it best."""
    best, error = grid, _errors(grid, parts)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1) if grid.least is not None else (0,):
            if i == j == 0:
                continue
            tried = replace(grid, scale=(grid.scale + i).clamp(kind.lowest, kind.limit))
            tried = tried if grid.least is None else replace(tried, least=(grid.least + j).clamp(0, kind.limit))
            tried = _coded(tried, parts, kind)
            wrong = _errors(tried, parts)
            best, error = chosen(wrong < error, tried, best), torch.minimum(wrong, error)
    return best


def _squares(grid: Grid, parts: Tensor) -> Grid:
    """d and dmin by least squares for the codes, scales and minima as they are."""
    x = (grid.scale.float().unsqueeze(-1) * (grid.codes.float() - grid.offset)).flatten(2)  # the factor of d
    w, xx, xw = parts.flatten(2), x.square().sum(-1), (x * parts.flatten(2)).sum(-1)
    if grid.least is None or grid.dmin is None:
        return replace(grid, d=torch.where(xx > 0, xw / xx, grid.d.float()).half())
    y = -grid.least.float().unsqueeze(-1).expand_as(parts).flatten(2)  # the factor of dmin
    yy, yw, xy = y.square().sum(-1), (y * w).sum(-1), (x * y).sum(-1)
    det = xx * yy - xy.square()
    fine = det > 1e-6 * xx * yy
    d = torch.where(fine, (xw * yy - yw * xy) / det, grid.d.float())
    dmin = torch.where(fine, (yw * xx - xw * xy) / det, grid.dmin.float())
    fine &= (d > 0) & (dmin >= 0)
    return replace(grid, d=torch.where(fine, d, grid.d.float()).half(), dmin=torch.where(fine, dmin, grid.dmin.float()).half())


def dense_start(parts: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """Scales [n, B, J], and minima where the type has them, of dense sub-blocks [n, B, J, sub]: of a few ranges and their least squares the best."""
    if kind.minimum:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale, least = (high - low) / kind.top, -low
    else:
        far = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale, least = (far.abs() / 127 if kind.offset == 128 else -far / kind.offset), None
        scale = scale if kind.lowest < 0 or kind.limit == 1 else scale.abs()
    best = (scale, least)
    error = torch.full_like(scale, torch.inf)
    for shrink in SHRINKS if kind.offset < 128 else (1.0,):
        tried = (scale * shrink, None if least is None else least * shrink)
        for _ in range(2):
            wrong, following = _tried(parts, tried, kind)
            better = wrong < error
            best = (torch.where(better, tried[0], best[0]), None if tried[1] is None or best[1] is None else torch.where(better, tried[1], best[1]))
            error, tried = torch.minimum(wrong, error), following
    return best


def _tried(parts: Tensor, start: tuple[Tensor, Tensor | None], kind: Kind) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """The squared errors [n, B, J] that these scales and minima leave, and those that fit the codes they lead to by least squares."""
    scale, least = start
    shifted = parts if least is None else parts + least.unsqueeze(-1)
    q = (shifted * torch.where(scale != 0, 1 / scale, 0).unsqueeze(-1)).round_().clamp_(-kind.offset, kind.top - kind.offset)
    wrong = (scale.unsqueeze(-1) * q - shifted).square_().sum(-1)
    qq, qw = q.square().sum(-1), (q * parts).sum(-1)
    if least is None:
        return wrong, (torch.where(qq > 0, qw / qq, scale), None)
    count, total, weights = parts.shape[-1], q.sum(-1), parts.sum(-1)
    det = count * qq - total.square()
    fitted = torch.where(det > 0, (count * qw - total * weights) / det, scale)
    low = (fitted * total - weights) / count
    through = torch.where(qq > 0, qw / qq, scale)  # the minimum must not be negative
    fitted = torch.where(low < 0, through, fitted).clamp(min=0)
    return wrong, (fitted, low.clamp(min=0))
