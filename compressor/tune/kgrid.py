"""Scales on the grid of GGUF's K types: PEQA whose result llama.cpp's blocks hold exactly.

A block of Q4_K, Q3_K or Q2_K has one float16 d for 256 columns, and a scale is d times an integer c, at most 63, 31 or 15. Scales that were tuned
freely must be rounded to that, which costs again what was trained. Here the forward sees the rounded scale,

    s = d * c        c in 1 … limit, d with so few significant bits that d * c is exact in the dtype of the scales; c = 0 where s is 0 from the start

and the gradient passes the rounding unchanged (straight through), as it passes that of the dtype (see snapped). So the same scales are exact in a
compressed-tensors or GPTQ folder and in a GGUF file: export loses nothing. Symmetric weights only: their zeros need no grid of their own, since
dmin = 2**(bits - 1) d and minimum = c give them back.

Choice: d is the best of the largest scale / t for t in the upper half of 1 … limit, rounded; the largest c lies there too, so that no scale moves in
steps above 2 / limit of the largest. A snapped scale snaps to itself. Scales stored in float32 lie on the grid of float16, which GPTQ's files hold
too. Price: some limit / 2 passes over the scales each forward, and what snapping costs, which tests/tune/test_kgrid.py bounds. Limit: bfloat16 has 8
bits, which leaves d 2, 3 or 4 of them: use float16. Layers whose rows or groups do not go into blocks of 256 are tuned as ever.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compressor.errors import ModelError, RecipeError
from compressor.linear import PackedLinear, packed_linears
from compressor.recipe import Tune
from compressor.tune.peqa import Peqa, ScaleTuning

BLOCK = 256
GRIDS = {"q4_k": (63, 32, 4), "q3_k": (31, 16, 3), "q2_k": (15, 16, 2)}  # largest integer, columns of a sub-block, bits of a code
LEAST, MOST = 2.0**-24, 512.0  # of d: float16's smallest number, and what leaves room for d * c and Q4_K's 8 d


def takes(group: int, k: int, kind: str) -> bool:
    """Whether scales of groups of `group` of k columns can lie on this grid."""
    sub = GRIDS[kind][1]
    return k % BLOCK == 0 and group % sub == 0 and (BLOCK % group == 0 or group % BLOCK == 0)


def snap(scale: Tensor, group: int, k: int, kind: str) -> Tensor:
    """The nearest scales found on the grid, in the dtype of `scale` [n, k / group]; what lies on it stays as it is, bit for bit.

    Scales of 0 stay 0, others become positive: they must be, and within `span`. RecipeError for a grid, a group or rows that do not go.
    """
    if kind not in GRIDS:
        raise RecipeError(f"tune.grid={kind!r} is unknown: choose none, {', '.join(GRIDS)}")
    if not takes(group, k, kind):
        raise RecipeError(f"groups of {group} of {k} columns have no place on the grid of {kind}, whose blocks have {BLOCK} columns")
    limit = _limit(group, kind)
    blocks = scale.float().view(scale.shape[0], -1, max(1, BLOCK // group))  # [n, B, scales of a block]
    digits = _digits(scale.dtype, limit)
    largest = blocks.amax(-1)
    best, error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for t in range(limit // 2 + 1, limit + 1):
        d = _rounded(largest / t, digits)
        wrong = (d.unsqueeze(-1) * _counts(blocks, d, limit)).sub_(blocks).square_().sum(-1)
        best, error = torch.where(wrong < error, d, best), torch.minimum(wrong, error)
    return (best.unsqueeze(-1) * _counts(blocks, best, limit)).view(scale.shape).to(scale.dtype)


def span(group: int, kind: str) -> tuple[float, float]:
    """The least and the largest scale above 0 that the grid holds."""
    return LEAST, MOST * _limit(group, kind)


def _limit(group: int, kind: str) -> int:
    return GRIDS[kind][0] if group < BLOCK else 1  # one scale is its own d


def _digits(dtype: torch.dtype, limit: int) -> int:
    """Significant bits of d, so that its product with an integer up to `limit` has at most float16's eleven, or bfloat16's eight."""
    return (8 if dtype == torch.bfloat16 else 11) - (limit.bit_length() if limit > 1 else 0)


def _rounded(x: Tensor, digits: int) -> Tensor:
    """float32 with that many significant bits, within what float16 holds as d; 0 stays 0."""
    _, exponent = torch.frexp(x)
    quantum = torch.ldexp(torch.ones_like(x), (exponent - digits).clamp(min=-24))  # a multiple of float16's smallest number
    return torch.where(x > 0, ((x / quantum).round() * quantum).clamp(LEAST, MOST), 0.0)


def _counts(blocks: Tensor, d: Tensor, limit: int) -> Tensor:
    d = d.unsqueeze(-1)
    return torch.where(blocks > 0, (blocks / torch.where(d > 0, d, 1.0)).round_().clamp_(1, limit), 0.0)


class OnGrid(torch.autograd.Function):
    """scale float32 [n, G] -> the scales on the grid, exactly representable in `dtype`; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, dtype: torch.dtype, group: int, k: int, kind: str) -> Tensor:
        return snap(scale.to(dtype), group, k, kind).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad, None, None, None, None


class GridTuning(ScaleTuning):
    """Returns the scale [n, G] to use now, on the grid; start [n, G] lies on it, and where it is 0 the scale stays 0 and learns nothing."""

    def __init__(self, start: Tensor, relative: bool, group: int, k: int, kind: str):
        super().__init__(start, relative)
        self.place = (group, k, kind)

    def forward(self) -> Tensor:
        return OnGrid.apply(torch.where(self.start > 0, super().forward(), 0.0), self.start.dtype, *self.place)


class GridPeqa(Peqa):
    """Peqa on the grid of one K type; attaching snaps the scales, which is all that it costs before the first step."""

    def __init__(self, options: Tune, kind: str):
        super().__init__(options)
        if kind not in GRIDS:
            raise RecipeError(f"tune.grid={kind!r} is unknown: choose none, {', '.join(GRIDS)}")
        self.kind = kind

    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """As of any tuner; ModelError also where no layer can lie on the grid. The scales of the layers that can are snapped first."""
        layers = packed_linears(model).values()
        placed = [layer for layer in layers if takes(layer.group, layer.in_features, self.kind)]
        if layers and not placed:
            raise ModelError(
                f"no packed layer has rows and groups for blocks of {BLOCK} columns: tune without a grid, or pack in groups that divide {BLOCK}"
            )
        out = super().attach(model)
        for layer in placed:
            place = (layer.group, layer.in_features, self.kind)
            layer.learned = snap(layer.learned, *place)
            layer.tuned = GridTuning(layer.learned, self.relative, *place)
        for name in out:
            out[name] = model.get_parameter(name)
        return out

    def check(self, name: str, layer: PackedLinear) -> None:
        """As for PEQA; ModelError for weights that this type does not hold: more bits, zeros of their own, or scales beyond its range."""
        super().check(name, layer)
        if not takes(layer.group, layer.in_features, self.kind):
            return
        bits, (least, most) = GRIDS[self.kind][2], span(layer.group, self.kind)
        if layer.zero is not None or layer.columns is not None or layer.bits > bits:
            raise ModelError(
                f"{name} is no symmetric weight of at most {bits} bits in order, which {self.kind} holds exactly: pack it so, or without a grid"
            )
        scale = layer.learned.float()
        if bool(((scale != 0) & ((scale < least) | (scale > most))).any()):
            raise ModelError(f"{name} has scales beyond {least:.2g} … {most:g}, the range of the grid of {self.kind}: tune it without a grid")
