"""Tables by least squares under the layer's second moment H, given the codes; and codes given the tables.

With P the one-hot matrix of a row's codes (k x S 2**b), t its tables and w its weights, the error (w - P t)T H (w - P t) is least where
(PT H P) t = PT H w: one small system a row. The products H P are 2**b times the work of a product with H, the price of a refit; the systems are
solved in float64.

A code moves to the entry nearest to w + (E H)[j] / H[j, j] without its own column (coordinate descent, as in quant/refine.py; Behdin et al.,
2023, arXiv 2309.01885), which never raises the error either. LeanQuant (Zhang and Shrivastava, 2024) stops after the sweep.

Everything is transposed, so that a column of the weight is contiguous: codes [k, n], tables [S, 2**b, n].
"""

import torch
from torch import Tensor

from compressor.hessian import descend
from compressor.packing import panels

SYSTEMS = 1 << 23  # numbers of H P at a time


def spread(table: Tensor, codes: Tensor, group: int) -> Tensor:
    """The weights P t, [k, n]: table [S, K, n], codes uint8 [k, n] -> float32."""
    out = torch.empty(codes.shape, dtype=table.dtype, device=table.device)
    for s, entries in enumerate(table):
        part = slice(s * group, (s + 1) * group)
        out[part] = entries.gather(0, codes[part].long())
    return out


def refit_tables(table: Tensor, codes: Tensor, pull: Tensor, hessian: Tensor, group: int) -> Tensor:
    """The tables of least error for codes [k, n]: table [S, K, n] -> [S, K, n], not sorted; pull = H (w - P t) [k, n] follows in place.

    Entries that no code uses stay as they are.
    """
    out = torch.empty_like(table)
    for columns in panels(codes.shape[1], len(codes) * table[..., 0].numel(), SYSTEMS):
        out[..., columns] = _solved(table[..., columns], codes[:, columns], pull[:, columns], hessian, group)
    return out


def _solved(table: Tensor, codes: Tensor, pull: Tensor, hessian: Tensor, group: int) -> Tensor:
    segments, count, n = table.shape
    parts = [slice(s * group, (s + 1) * group) for s in range(segments)]
    hot = torch.nn.functional.one_hot(codes.long(), count).to(hessian.dtype)  # P [k, n, K]
    heavy = torch.stack([(hessian[:, p] @ hot[p].flatten(1)).view(len(codes), n, count) for p in parts], 2)  # H P [k, n, S, K]
    gram = torch.stack([torch.einsum("jna,jnsb->nasb", hot[p], heavy[p]) for p in parts], 1)  # PT H P [n, S, K, S, K]
    right = torch.stack([torch.einsum("jna,jn->na", hot[p], pull[p]) for p in parts], 1)  # PT H (w - P t) [n, S, K]
    system = gram.view(n, segments * count, -1).double()
    unused = system.diagonal(dim1=1, dim2=2) <= 0
    system.diagonal(dim1=1, dim2=2).masked_fill_(unused, 1.0)
    factor, failed = torch.linalg.cholesky_ex(system)
    step = torch.cholesky_solve(right.view(n, -1, 1).double(), factor)
    step = torch.where((failed == 0).view(n, 1, 1), step, 0.0).to(table.dtype).view(n, segments, count)
    pull -= torch.einsum("jnsb,nsb->jn", heavy, step)
    return table + step.permute(1, 2, 0)


def sort_tables(table: Tensor, codes: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The same weights with ascending tables: table [S, K, n], codes uint8 [k, n] -> both."""
    table, order = table.sort(dim=1)
    places = order.argsort(dim=1).to(torch.uint8)
    return table, spread(places, codes, group)


def nearest(w: Tensor, borders: Tensor) -> Tensor:
    """Code int64 [1, n] of w [n] given the borders between ascending entries [K - 1, n]."""
    return (w > borders).sum(0, keepdim=True)


def borders_of(table: Tensor) -> Tensor:
    """Midpoints of ascending tables [S, K, n], [S, K - 1, n]."""
    return (table[:, 1:] + table[:, :-1]) / 2


def nearest_codes(w: Tensor, table: Tensor, group: int) -> Tensor:
    """Codes uint8 [k, n] of w [k, n] among ascending tables [S, K, n]."""
    borders = borders_of(table)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for j in range(len(w)):
        codes[j] = nearest(w[j], borders[j // group])[0]
    return codes


def move_codes(table: Tensor, codes: Tensor, pull: Tensor, hessian: Tensor, group: int) -> None:
    """In place, codes and pull: every column to the codes that are best given all others; tables ascending."""
    borders = borders_of(table)

    def move(j: int, gain: Tensor) -> Tensor:
        entries = table[j // group]
        now = entries.gather(0, codes[j : j + 1].long())[0]
        code = nearest(now + gain, borders[j // group])
        codes[j] = code[0].to(torch.uint8)
        return entries.gather(0, code)[0] - now

    descend(pull, hessian, move)
