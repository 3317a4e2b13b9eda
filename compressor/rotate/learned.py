"""Rotations that are found instead of drawn: those under which rounding the weights to their grids loses least.

Minimised is the mean over all linears that are packed of |W' - round(W')|^2 / |W'|^2, W' the rotated weight and round() to the nearest point of the
grid of its (row, group), by Adam on R1 = Q1 C(A1) and the R2 = Q2 C(A2) of every block. Q are the randomised Hadamard matrices where it starts,
and C(A) = (I + S)^-1 (I - S), S = (A - A^T) / 2, is Cayley's orthogonal matrix (SpinQuant, arXiv 2405.16406, section 3, which minimises the loss of
the model instead). Rounding passes gradients straight through to the scales, which follow the largest weight of a group; with codes held fixed
instead, rotations run into grid points near by, and models come out worse than they were (docs/log.md). No data is looked at: weighing
by the Hessian of the inputs gained nothing.

A step sees NUMBERS weights at most: linears in random order; of a reader of the residual stream some rows, of a writer some groups of columns.
Price: STEPS times the products of a sample with R1, there and back, and of Cayley's solutions. Limit: even grids alone; the whole model in memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linear
from compressor.rotate import roles as role
from compressor.rotate.hadamard import Rotation
from compressor.rotate.merge import Merge
from compressor.rotate.roles import FIRST, NORMS, SECOND, WRITERS

STEPS, RATE = 150, 0.01
NUMBERS = 1 << 24  # weights a step
SHRINK = {2: 0.7, 3: 0.85, 4: 0.95}  # of the range of a group, near what the clipping search finds for weights without outliers


@dataclass(frozen=True)
class Grid:
    """How a linear will be packed."""

    bits: int
    group: int
    symmetric: bool


@dataclass
class Part:
    """A linear: its weight [n, k] with gains in it, who reads (True) or writes, and the heads of its rows or columns that R2 turns, from `start`."""

    weight: Tensor
    gain: Tensor | None
    grid: Grid
    reads: bool
    block: int
    heads: role.Heads | None = None


def error(w: Tensor, grid: Grid) -> Tensor:
    """w [n, k] less its nearest points on its grids, with gradients through scales and, straight, through rounding."""
    width = w.shape[1]
    x = nn.functional.pad(w, (0, -width % grid.group)).unflatten(1, (-1, grid.group))
    top, middle = (1 << grid.bits) - 1, 1 << (grid.bits - 1)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = torch.maximum(high / (top - middle), -low / middle) if grid.symmetric else (high - low) / top
    scale = (scale * SHRINK.get(grid.bits, 1.0)).clamp(min=1e-12)
    zero = middle if grid.symmetric else (-low / scale).detach().round().clamp(0, top)
    code = x / scale + zero
    code = (code + (code.round() - code).detach()).clamp(0, top)
    return (x - scale * (code - zero)).flatten(1)[:, :width]


def cayley(free: Tensor) -> Tensor:
    """An orthogonal matrix of any square one; the identity of zeros."""
    skew, one = (free - free.T) / 2, torch.eye(len(free), dtype=free.dtype, device=free.device)
    return torch.linalg.solve(one + skew, one - skew)


def learn(
    model: nn.Module, start: Merge, grids: Mapping[str, Grid], seed: int, tell: Callable[[int], None] | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    """(orthogonal matrices float64, "residual" and those of blocks by number, for `merged`; the error step by step).

    grids: of the linears that will be packed by dotted name. tell(step): is called after each.
    """
    assert start.residual is not None
    parts, device = list(_parts(model, start, grids)), next(model.parameters()).device
    sizes = {part.block: part.heads.size for part in parts if part.heads is not None}
    begin = {"residual": start.residual.matrix()} | {str(index): start.heads(index, size).matrix() for index, size in sizes.items()}
    begin = {key: matrix.to(device) for key, matrix in begin.items()}
    free = {key: torch.zeros(matrix.shape, device=device, requires_grad=True) for key, matrix in begin.items()}
    optimizer, order, found = torch.optim.Adam(list(free.values()), lr=RATE), torch.Generator().manual_seed(seed), list[float]()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        with torch.enable_grad():
            turned = {key: begin[key].float() @ cayley(each) for key, each in free.items()}
            losses, left = [], NUMBERS
            for at in torch.randperm(len(parts), generator=order).tolist():
                if left > 0:
                    loss, used = _loss(parts[at], turned["residual"], turned.get(str(parts[at].block)), left, order)
                    losses.append(loss)
                    left -= used
            total = torch.stack(losses).mean()
            optimizer.zero_grad()
            total.backward()
        optimizer.step()
        found.append(float(total.detach()))
        if tell is not None:
            tell(step + 1)
    with torch.no_grad():
        return {key: (begin[key] @ cayley(each.detach().double())).cpu() for key, each in free.items()}, found


def merged(start: Merge, matrices: Mapping[str, Tensor]) -> Merge:
    """The merge of matrices that `learn` found."""

    def rotation(matrix: Tensor) -> Rotation:
        return Rotation(torch.ones(len(matrix), dtype=torch.float64), (matrix,))

    def heads(index: int, size: int) -> Rotation:
        return rotation(matrices[str(index)]) if str(index) in matrices else start.heads(index, size)

    return replace(start, residual=rotation(matrices["residual"]), heads=heads)


def products(width: int, weights: int) -> float:
    """Floating-point operations of `learn`, of a residual stream of this width."""
    return STEPS * (6.0 * width * min(NUMBERS, weights) + 8.0 * width**3)


def _parts(model: nn.Module, start: Merge, grids: Mapping[str, Grid]) -> Iterator[Part]:
    prefix, blocks = linear.find_blocks(model)
    assert start.roles is not None
    for index, block in enumerate(blocks):
        found: Any = role.heads(block)
        gains = [role.gain(block.get_submodule(name), start.roles.offset).float() for name in NORMS]
        for names, gain in ((FIRST, gains[0]), (SECOND, gains[1]), (WRITERS, None)):
            for name in names:
                grid, layer = grids.get(f"{prefix}.{index}.{name}"), role.child(block, name)
                if layer is not None and grid is not None:
                    turned = found if name in (found.values, WRITERS[0]) else None
                    yield Part(layer.get_parameter("weight").detach(), gain, grid, gain is not None, index, turned)


def _loss(part: Part, whole: Tensor, heads: Tensor | None, most: int, order: torch.Generator) -> tuple[Tensor, int]:
    """(relative squared error of a sample of at most about so many weights, their number)."""
    n, k = part.weight.shape
    found = part.heads if heads is not None else None
    side, other = (n, k) if part.reads else (k, n)
    unit = (found.size if found else 1) if part.reads else max(part.grid.group, found.size if found else 1)
    if side % unit or (not part.reads and found and unit % min(part.grid.group, found.size)):
        unit = side
    count = max(1, min(side // unit, most // (unit * other)))
    chosen = torch.arange(side).view(-1, unit)[torch.randperm(side // unit, generator=order)[:count].sort().values].flatten()
    if part.reads:
        w = part.weight[chosen.to(part.weight.device)].float()
        w = (w if part.gain is None else w * part.gain) @ whole
        if found and heads is not None:
            values = (chosen >= found.start).to(w.device)
            w = torch.cat((w[~values], torch.einsum("hab,ac->hcb", w[values].unflatten(0, (-1, found.size)), heads).flatten(0, 1)))
    else:
        w = whole.T @ part.weight[:, chosen.to(part.weight.device)].float()
        if found and heads is not None:
            w = (w.unflatten(1, (-1, found.size)) @ heads).flatten(1)
    return error(w, part.grid).square().sum() / w.detach().square().sum().clamp(min=1e-30), w.numel()
