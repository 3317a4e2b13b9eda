"""Plain torch versions of every kernel: the truth that the others are tested against, and the path where no faster one fits.

A weight of n rows and k columns is packed codes (see layout.py) and `values` of one of two kinds:

    affine  values = scale [n, k/group]: weight[i, j] = scale[i, j//group] * (code[i, j] - zero[i, j//group]); zero integer or float [n, k/group],
            or None for the symmetric midpoint 2**(bits-1). Words in the order `pair`.
    table   values [n, S, 2**bits], S = ceil(k/group): weight[i, j] = values[i, j//group, code[i, j]]; the last segment may be shorter. zero is
            None. Words in the order `prmt`.

Work goes in panels of 256 rows, so that no dense copy of the whole weight ever exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.kernels import layout

PANEL = 256


def order(values: Tensor) -> str:
    """The order of nibbles that goes with these values."""
    return "prmt" if values.dim() == 3 else "pair"


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def steps(words: Tensor, zero: Tensor | None, bits: int, group: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """code - zero of all rows of an affine weight, [n, k/group, group] in `dtype`."""
    codes = layout.unpack_tiles(words, bits, n, k).to(dtype).view(n, k // group, group)
    return codes - (float(1 << (bits - 1)) if zero is None else zero.to(dtype).unsqueeze(-1))


def flat_codes(words: Tensor, bits: int, group: int, n: int, k: int) -> Tensor:
    """For tables: segment * 2**bits + code, the column of each weight in the flat table [n, S * 2**bits]; int64 [n, k]."""
    codes = layout.unpack_tiles(words, bits, n, k, "prmt").long()
    return codes + (torch.arange(k, device=words.device) // group << bits)


def dequantize(words: Tensor, values: Tensor, zero: Tensor | None, bits: int, group: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [n, k] in `dtype`; an affine product is formed in float32 (float64 if asked for) and rounded once."""
    inner = wide(dtype)
    if values.dim() == 3:
        return values.reshape(n, -1).to(inner).gather(1, flat_codes(words, bits, group, n, k)).to(dtype)
    weight = steps(words, zero, bits, group, n, k, inner) * values.to(inner).unsqueeze(-1)
    return weight.view(n, k).to(dtype)


def _panels(words: Tensor, n: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, n, PANEL):
        stop = min(start + PANEL, n)
        yield slice(start, stop), words[start // layout.ROWS : -(-stop // layout.ROWS)]


def forward(x: Tensor, words: Tensor, values: Tensor, zero: Tensor | None, bits: int, group: int, n: int) -> Tensor:
    """y = x @ weight.T; x [m, k] -> y [m, n] in x's dtype."""
    y = x.new_empty(x.shape[0], n)
    for rows, part in _panels(words, n):
        weight = dequantize(part, values[rows], _rows(zero, rows), bits, group, rows.stop - rows.start, x.shape[1], x.dtype)
        y[:, rows] = x @ weight.T
    return y


def grad_input(dy: Tensor, words: Tensor, values: Tensor, zero: Tensor | None, bits: int, group: int, k: int) -> Tensor:
    """dx = dy @ weight; dy [m, n] -> dx [m, k] in dy's dtype."""
    dx = dy.new_zeros(dy.shape[0], k, dtype=wide(dy.dtype))
    for rows, part in _panels(words, dy.shape[1]):
        weight = dequantize(part, values[rows], _rows(zero, rows), bits, group, rows.stop - rows.start, k, dy.dtype)
        dx += dy[:, rows] @ weight
    return dx.to(dy.dtype)


def grad_scale(x: Tensor, dy: Tensor, words: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    """dscale[i, g] = sum over the group's columns j of (dy.T @ x)[i, j] * (code - zero)[i, j]; float32 (float64) [n, k/group]."""
    n, k, inner = dy.shape[1], x.shape[1], wide(x.dtype)
    out = torch.empty(n, k // group, dtype=inner, device=x.device)
    wide_x, wide_dy = x.to(inner), dy.to(inner)
    for rows, part in _panels(words, n):
        count = rows.stop - rows.start
        grad = (wide_dy[:, rows].T @ wide_x).view(count, k // group, group)
        out[rows] = (grad * steps(part, _rows(zero, rows), bits, group, count, k, inner)).sum(-1)
    return out


def grad_table(x: Tensor, dy: Tensor, words: Tensor, bits: int, group: int) -> Tensor:
    """dtable[i, s, c] = sum over the segment's columns j with code[i, j] = c of (dy.T @ x)[i, j]; float32 (float64) [n, S, 2**bits]."""
    n, k, inner = dy.shape[1], x.shape[1], wide(x.dtype)
    out = torch.zeros(n, -(-k // group) << bits, dtype=inner, device=x.device)
    wide_x, wide_dy = x.to(inner), dy.to(inner)
    for rows, part in _panels(words, n):
        grad = wide_dy[:, rows].T @ wide_x
        out[rows].scatter_add_(1, flat_codes(part, bits, group, rows.stop - rows.start, k), grad)
    return out.view(n, -1, 1 << bits)


def group_sums(x: Tensor, group: int) -> Tensor:
    """Sums of x over the columns of each group, float32 (float64) [m, k/group]."""
    return x.unflatten(-1, (-1, group)).sum(-1, dtype=wide(x.dtype))


def grad_zero(x: Tensor, dy: Tensor, scale: Tensor, group: int) -> Tensor:
    """dzero[i, g] = -scale[i, g] * (dy.T @ group sums of x)[i, g]; float32 (float64) [n, k/group]."""
    sums = group_sums(x, group)
    return -scale.to(sums.dtype) * (dy.to(sums.dtype).T @ sums)


def _rows(zero: Tensor | None, rows: slice) -> Tensor | None:
    return None if zero is None else zero[rows]
