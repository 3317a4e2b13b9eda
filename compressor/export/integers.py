"""Integer zeros in the place of tuned ones, for formats that hold no others.

A group of an affine weight holds w = s (q - z). With an integer z' and the same codes the best scale in the sense of least squares, and what is
then left of the error, are

    s' = s * sum((q - z)(q - z')) / sum((q - z')^2)        s^2 sum((q - z)^2) - s'^2 sum((q - z')^2)

Every z' from 0 to 2**bits - 1 is tried, from the sums of q and of q^2 of the group. Price: 2**bits small products a group. Limit: what a group has in
common with itself, its mean, moves by up to half a step and is no noise; docs/methods.md says what that costs. Source: ours.
"""

from dataclasses import replace

import torch

from compressor.errors import ModelError
from compressor.packed import Affine, PackedWeight


def with_integers(weight: PackedWeight, refit: bool = True) -> PackedWeight:
    """The weight with the same codes, zeros uint8 [n, G] and scales [n, G] in their dtype; a weight without float zeros as it is.

    refit: scales follow; else they stay, and zeros go to the nearest integer. ModelError for tables.
    """
    if not isinstance(weight.values, Affine):
        raise ModelError("a table has no zeros to round")
    if weight.zero is None or not weight.float_zeros:
        return weight
    top, scale, zero = (1 << weight.bits) - 1, weight.learned, weight.zero.double()
    if not refit:
        return replace(weight, values=Affine(scale, zero.round().clamp_(0, top).to(torch.uint8)))
    codes = weight.codes().view(*zero.shape, weight.group)
    first, second = codes.sum(-1, dtype=torch.float64), codes.int().square_().sum(-1, dtype=torch.float64)
    best, factor, chosen = torch.full_like(zero, -1.0), torch.ones_like(zero), torch.zeros_like(zero, dtype=torch.uint8)
    for candidate in range(top + 1):
        both = second - (zero + candidate) * first + weight.group * zero * candidate  # sum((q - z)(q - z'))
        own = second - 2 * candidate * first + weight.group * candidate**2  # sum((q - z')^2); 0 where all weights would be zero
        explained = both.clamp(min=0).square() / own.clamp(min=1)
        better = (explained > best) & (own > 0)
        best = torch.where(better, explained, best)
        factor = torch.where(better, both.clamp(min=0) / own.clamp(min=1), factor)
        chosen.masked_fill_(better, candidate)
    limits = torch.finfo(scale.dtype)
    fitted = (scale.double().abs() * factor).clamp(min=limits.tiny, max=limits.max).copysign_(scale.double()).to(scale.dtype)
    return replace(weight, values=Affine(fitted, chosen))
