"""Plain torch versions of every kernel: the truth that the others are tested against, and the path on machines without a GPU.

A weight of n rows and k columns is `weight[i, j] = scale[i, j // group] * (code[i, j] - zero[i, j // group])`; `zero` None stands for the
symmetric midpoint 2**(bits-1). Work goes in panels of 256 rows, so that no dense copy of the whole weight ever exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.kernels import layout

PANEL = 256


def steps(words: Tensor, zero: Tensor | None, bits: int, group: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """code - zero of all rows, [n, k/group, group] in `dtype`."""
    codes = layout.unpack_tiles(words, bits, n, k).to(dtype).view(n, k // group, group)
    return codes - (float(1 << (bits - 1)) if zero is None else zero.to(dtype).unsqueeze(-1))


def dequantize(words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [n, k] in `dtype`; the product is formed in float32 (float64 if asked for) and rounded once."""
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    weight = steps(words, zero, bits, group, n, k, inner) * scale.to(inner).unsqueeze(-1)
    return weight.view(n, k).to(dtype)


def _panels(words: Tensor, n: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, n, PANEL):
        stop = min(start + PANEL, n)
        yield slice(start, stop), words[start // layout.ROWS : -(-stop // layout.ROWS)]


def forward(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, n: int) -> Tensor:
    """y = x @ weight.T; x [m, k] -> y [m, n] in x's dtype."""
    y = x.new_empty(x.shape[0], n)
    for rows, part in _panels(words, n):
        weight = dequantize(part, scale[rows], _rows(zero, rows), bits, group, rows.stop - rows.start, x.shape[1], x.dtype)
        y[:, rows] = x @ weight.T
    return y


def grad_input(dy: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, k: int) -> Tensor:
    """dx = dy @ weight; dy [m, n] -> dx [m, k] in dy's dtype."""
    dx = dy.new_zeros(dy.shape[0], k)
    for rows, part in _panels(words, dy.shape[1]):
        weight = dequantize(part, scale[rows], _rows(zero, rows), bits, group, rows.stop - rows.start, k, dy.dtype)
        dx.addmm_(dy[:, rows], weight)
    return dx


def grad_scale(x: Tensor, dy: Tensor, words: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    """dscale[i, g] = sum over the group's columns j of (dy.T @ x)[i, j] * (code - zero)[i, j]; float32 (float64) [n, k/group]."""
    n, k = dy.shape[1], x.shape[1]
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(n, k // group, dtype=inner, device=x.device)
    wide_x, wide_dy = x.to(inner), dy.to(inner)
    for rows, part in _panels(words, n):
        count = rows.stop - rows.start
        grad = (wide_dy[:, rows].T @ wide_x).view(count, k // group, group)
        out[rows] = (grad * steps(part, _rows(zero, rows), bits, group, count, k, inner)).sum(-1)
    return out


def _rows(zero: Tensor | None, rows: slice) -> Tensor | None:
    return None if zero is None else zero[rows]
