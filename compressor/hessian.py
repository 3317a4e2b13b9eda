"""The second moment H of a layer's inputs at work: dead inputs, order of columns, inverse factor, and the two walks over columns of all packers.

U is one Cholesky factor of H with rows and columns reversed and one triangular inverse, instead of the textbook's Cholesky, inverse and second
Cholesky (Frantar et al., 2022, arXiv 2210.17323, section 4, step 3): half the work, and nothing has to stay positive definite after rounding in
float32. Memory beside the caller's H: three k x k float32 matrices while U is made (9.9 GB for the widest layer of a 70B model).
"""

from collections.abc import Callable

import torch
from torch import Tensor

DAMP_LIMIT = 1.0
BLOCK = 128  # columns whose effect on the others is put off and then applied at once


def living(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """H [k, k], in place, with the mean of the living diagonal for inputs that were always zero, and which those are, bool [k].

    The paper's code puts 1 there, which swells the damping when inputs are small.
    """
    dead = hessian.diagonal() == 0
    living = hessian.diagonal()[~dead]
    hessian.diagonal().masked_fill_(dead, float(living.mean()) if living.numel() else 1.0)
    return hessian, dead


def unread(dead: Tensor) -> str:
    """A note on inputs that were always zero, dead bool [k]: what their weights do elsewhere, the packed ones do not."""
    count = int(dead.sum())
    return f"{count} of {dead.numel()} inputs were always zero in the calibration text" if count else ""


def damped(hessian: Tensor, extra: Tensor) -> Tensor:
    """H + extra I, in place."""
    hessian.diagonal().add_(extra)
    return hessian


def rounding_order(hessian: Tensor, act_order: bool) -> Tensor:
    """int64 [k]: the column to round at each step; equal diagonals keep their order."""
    if act_order:
        return hessian.diagonal().argsort(descending=True, stable=True)
    return torch.arange(hessian.shape[0], device=hessian.device)


def factorise(hessian: Tensor, order: Tensor, damp: float) -> tuple[Tensor | None, float, str]:
    """Upper U [k, k] with UT U = (H[order, order] + damp mean(diag H) I)^-1, the damp that worked, and a note when it is not the one given.

    Damp is raised tenfold, up to DAMP_LIMIT, while the matrix is not positive definite or U not finite; after that U is None.
    """
    backward = order.flip(0)
    mean, asked = hessian.diagonal().mean(), damp
    while True:
        upper = _inverse_factor(damped(hessian[backward.unsqueeze(1), backward], damp * mean))
        if upper is not None:
            return upper, damp, "" if damp == asked else f"damp raised from {asked:g} to {damp:g}, for H was not positive definite"
        if damp * 10 > DAMP_LIMIT:
            return None, damp, f"H is not positive definite or not finite, even with damp {damp:g}"
        damp *= 10


def _inverse_factor(backward: Tensor) -> Tensor | None:
    """Upper U with UT U the inverse of the matrix whose rows and columns come reversed, or None."""
    lower, failed = torch.linalg.cholesky_ex(backward)
    del backward
    if bool(failed):
        return None
    reverse = lower.flip(0, 1)
    del lower
    upper = torch.eye(len(reverse), device=reverse.device)
    torch.linalg.solve_triangular(reverse, upper, upper=True, out=upper)
    del reverse
    return upper if bool(torch.isfinite(upper).all()) else None


def sweep(w: Tensor, factor: Tensor, order: Tensor, choose: Callable[[int, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Codes uint8 [k, n] of w [k, n], a column of the weight after the other; what a column loses, the columns behind it make up for.

    factor upper [k, k] in the order of rounding, order [k]; `choose(j, rest [n])` gives codes and their values for column j, each [n].
    """
    rest, columns = w[order], order.tolist()  # [k, n] in the order of rounding, each less the errors before it
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        block, local = rest[start:stop], factor[start:stop, start:stop]  # block turns into errors row by row
        for i, j in enumerate(columns[start:stop]):
            code, value = choose(j, block[i])
            codes[j] = code.to(torch.uint8)
            block[i] -= value
            block[i] /= local[i, i]
            block[i + 1 :].addr_(local[i, i + 1 :], block[i], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, block, alpha=-1)
    return codes


def descend(pull: Tensor, hessian: Tensor, move: Callable[[int, Tensor], Tensor]) -> None:
    """Moves the columns one after the other to what is best given all others; pull = H (w - packed) [k, n] follows in place.

    `move(j, gain [n])` changes column j, whose best value is its own plus the gain, and returns by how much, [n].
    """
    diagonal = hessian.diagonal().tolist()
    for start in range(0, len(diagonal), BLOCK):
        stop = min(start + BLOCK, len(diagonal))
        block, moved = pull[start:stop].clone(), torch.empty_like(pull[start:stop])
        for i, j in enumerate(range(start, stop)):
            moved[i] = move(j, block[i] / diagonal[j])
            block.addr_(hessian[start:stop, j], moved[i], alpha=-1)
        pull.addmm_(hessian[:, start:stop], moved, alpha=-1)
