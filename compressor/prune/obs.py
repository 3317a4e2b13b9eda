"""Optimal brain surgery on Fisher blocks: what removing entries of a weight costs, and how the others make up for it.

With F the curvature of the loss at the trained weights, removing the entries P and moving the rest optimally costs (OBS, Hassibi and Stork, 1993;
in blocks and with groups: oBERT, Kurtic et al., 2022, arXiv 2203.07259, equations 4 to 6)

    saliency   1/2 wT_P ([F^-1]_PP)^-1 w_P           for one entry: w_i^2 / (2 [F^-1]_ii)
    move       dw = -F^-1_{:,P} ([F^-1]_PP)^-1 w_P

Saliencies are those of one entry, or one group of q consecutive entries, alone. The move can be the sum of such lone moves, as in the paper's code,
which counts what entries of one block share as often as there are of them, or the joint one for all of P. The joint one is solved on F, as the
normal equations F_SS dw_S = F_SP w_P of the survivors S, all blocks at once with the pruned rows and columns replaced by those of I: no inverse,
no submatrix of varying size, and no loss of digits when F^-1 is ill-conditioned. It is the default; compressor.prune.obert has the comparison.

It also makes a sequence of small steps needless: eliminating the entries of P one after the other, in whatever order, each with the inverse of
what is left (F^-1 <- F^-1 - F^-1_:i F^-1_i: / F^-1_ii), ends at this same joint move. Only a *choice* made anew between the steps would differ.

Price: one Cholesky factorisation of each block in float64, of the order of B^2 flops a weight. Limits: the model of the loss is quadratic, and
blocks do not know of each other.
"""

import torch
from torch import Tensor

from compressor.prune.fisher import BlockFisher


def single_saliency(w: Tensor, inverse: Tensor) -> Tensor:
    """w_i^2 / (2 [F^-1]_ii): [c, B] of blocks w [c, B] with inverse [c, B, B]."""
    return w.square() / (2 * inverse.diagonal(dim1=1, dim2=2))


def group_saliency(w: Tensor, inverse: Tensor, q: int) -> Tensor:
    """1/2 wT_Q ([F^-1]_QQ)^-1 w_Q of groups of q consecutive entries: [c, B / q] of blocks w [c, B]; q divides B."""
    if q == 1:
        return single_saliency(w, inverse)
    return 0.5 * (_alone(w, inverse, q) * w).unflatten(1, (-1, q)).sum(2)


def _alone(w: Tensor, inverse: Tensor, q: int) -> Tensor:
    """([F^-1]_QQ)^-1 w_Q for each group Q, [c, B] like w."""
    if q == 1:
        return w / inverse.diagonal(dim1=1, dim2=2)
    groups = w.shape[1] // q
    own = inverse.unflatten(2, (groups, q)).unflatten(1, (groups, q)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [c, B / q, q, q]
    return torch.cholesky_solve(w.view(-1, groups, q, 1), torch.linalg.cholesky(own)).flatten(1)


def independent_step(w: Tensor, inverse: Tensor, keep: Tensor, q: int = 1) -> Tensor:
    """The sum of the lone moves of all groups of q entries that are not kept: dw [c, B], exactly -w where not kept."""
    push = _alone(w, inverse, q).masked_fill(keep, 0.0)
    return torch.where(keep, -(inverse @ push.unsqueeze(2)).squeeze(2), -w)


def joint_step(w: Tensor, matrix: Tensor, keep: Tensor) -> Tensor:
    """The best move of all entries that are kept, given that all others go: dw [c, B], exactly -w where not kept; matrix is F [c, B, B]."""
    pull = (matrix @ w.masked_fill(keep, 0.0).unsqueeze(2)).masked_fill_(~keep.unsqueeze(2), 0.0)
    rest = matrix * (keep.unsqueeze(1) & keep.unsqueeze(2))
    rest.diagonal(dim1=1, dim2=2).add_(~keep)
    moved = torch.cholesky_solve(pull, torch.linalg.cholesky(rest)).squeeze(2)
    return torch.where(keep, moved, -w)


def saliency(fisher: BlockFisher, weight: Tensor, q: int = 1) -> Tensor:
    """The saliency of each group of q consecutive entries of a weight, float32 [numel / q]; q divides B and numel."""
    out = torch.empty(fisher.blocks * (fisher.block // q), device=weight.device).view(fisher.blocks, -1)
    for rows in fisher.chunks():
        w = _blocks(weight, fisher, rows)
        if q == fisher.block:  # the inverse of the inverse
            out[rows] = 0.5 * (fisher.matrix(rows) @ w.unsqueeze(2)).squeeze(2).mul_(w).sum(1, keepdim=True)
        else:
            out[rows] = group_saliency(w, fisher.inverse(rows), q)
    return out.flatten()[: fisher.numel // q].clamp_(min=0.0)  # rounding may go below


@torch.no_grad()
def remove(fisher: BlockFisher, weight: Tensor, keep: Tensor, q: int = 1, joint: bool = True) -> None:
    """Zero the entries of a weight that are not kept and move the others to make up for it, in place.

    keep: bool, shaped as the weight. Entries that went earlier are zero already and pull nothing. q: the size of groups that go together, which
    matters for lone moves only.
    """
    flat = weight.detach().reshape(-1).clone()
    for rows in fisher.chunks():
        w, kept = _blocks(flat, fisher, rows), _blocks(keep, fisher, rows)
        step = joint_step(w, fisher.matrix(rows), kept) if joint else independent_step(w, fisher.inverse(rows), kept, q)
        part = flat[rows.start * fisher.block : rows.stop * fisher.block]
        part.copy_((w + step).flatten()[: len(part)])
    weight.copy_(flat.view(weight.shape).mul_(keep))


def _blocks(tensor: Tensor, fisher: BlockFisher, rows: slice) -> Tensor:
    """The entries of some blocks, [c, B], the tail padded with zeros; float64, or bool as it is."""
    part = tensor.detach().reshape(-1)[rows.start * fisher.block : rows.stop * fisher.block]
    part = part if part.dtype == torch.bool else part.double()
    missing = (rows.stop - rows.start) * fisher.block - len(part)
    return torch.nn.functional.pad(part, (0, missing)).view(-1, fisher.block)
