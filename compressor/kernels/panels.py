"""Matrix products with a packed weight for many rows: write a panel of the dense weight, multiply with the vendor's library, next panel.

Every panel goes into the same scratch buffer. Forward cuts the weight along its rows, the gradient of x along its columns, so each panel gives its
own slice of the result and nothing is accumulated. Hence deterministic wherever the library's product is: no atomics, no sums across panels.

Price: each weight is written and read once more, about 6% of the product's time at 4096 rows (computed, H200), and up to 64 MB. Limits: below a few
hundred rows the fused kernels should be faster (not timed yet). Source: the panels of exllamav2; ours are small enough to stay in the L2 cache of a
large GPU.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from compressor.kernels import layout

SCRATCH = 64 << 20  # bytes, at most (never less than one tile)
Write = Callable[[slice, slice, Tensor], None]  # rows, columns, out: fills out with that part of the dense weight


def forward(x: Tensor, n: int, write: Write, panel: int) -> Tensor:
    """y = x @ weight.T in panels of up to `panel` rows; x [m, k] -> y [m, n]."""
    m, k = x.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    size = _size(panel, k * x.element_size(), layout.ROWS)
    scratch = torch.empty(min(size, n), k, dtype=x.dtype, device=x.device)
    for rows in _slices(n, size):
        part = scratch[: rows.stop - rows.start]
        write(rows, slice(0, k), part)
        torch.mm(x, part.T, out=y[:, rows])
    return y


def grad_input(dy: Tensor, k: int, write: Write, panel: int) -> Tensor:
    """dx = dy @ weight in panels of up to `panel` columns; dy [m, n] -> dx [m, k]."""
    m, n = dy.shape
    dx = torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    size = _size(panel, n * dy.element_size(), layout.COLS)
    scratch = torch.empty(n * min(size, k), dtype=dy.dtype, device=dy.device)
    for columns in _slices(k, size):
        part = scratch[: n * (columns.stop - columns.start)].view(n, -1)
        write(slice(0, n), columns, part)
        torch.mm(dy, part, out=dx[:, columns])
    return dx


def _size(panel: int, each: int, unit: int) -> int:
    """Rows (columns) of a panel, `each` bytes a row: a multiple of `unit` within `panel` and the scratch."""
    return max(unit, min(panel, SCRATCH // max(each, 1)) // unit * unit)


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
