"""Codes that can be trained: a linear that rounds in its forward pass, and whose gradient passes the rounding straight through.

    weight = s * (clamp(round(p), 0, 2**bits - 1) - z)        p = w / s0 + z at the start, s = s0 * exp(r)

The position p [n, k] of each weight on its grid is trained in units of steps, r [n, G] from 0, and zeros in units of steps: rates are shares of a
step, so one rate serves layers and models of any size. The codes depend on p alone, not, as where w itself is trained, on the scale too: a scale
that moves does not flip codes. `of` starts at the codes of a packed weight: p is where the dense weight lies, but inside the cell of its code.
Positions outside the grid are brought back after each step (`settle`), or they would no longer hear from the loss.

`reach`, if given, keeps p within so many steps of where the dense weight lies: 0.5 leaves the choice between the two neighbours (AdaRound, Nagel et
al., 2020, arXiv 2004.10568), as in learning by signed gradients (Cheng et al., 2023, arXiv 2309.05516).
Source: Chen et al., "EfficientQAT", 2024 (arXiv 2407.11062), section 3.2, for training weights, scales and zeros of a block together.
Price: p and its gradient in float32 [n, k], and on the way back 8 to 12 bytes a weight of what rounding it took.
"""

import torch
from torch import Tensor, nn

from compressor.packed import Affine, PackedWeight
from compressor.quant import grid

EDGE = 0.25  # of a cell: how far from its code a start may lie; at its very edge the first step would undo what GPTQ chose
RIM = 0.49  # of a cell: how far beyond the outermost codes positions may go


class RoundedLinear(nn.Module):
    """A linear [n, k] in place of one that is packed: parameters `position` [n, k], `stretch` [n, G] and, if asymmetric, `zero` [n, G], float32."""

    position: nn.Parameter
    stretch: nn.Parameter
    zero: nn.Parameter | Tensor

    def __init__(self, layer: nn.Linear, packed: PackedWeight, reach: float | None = None, keep: Tensor | None = None):
        """layer: the dense one, whose bias is shared; packed: affine, its codes are the start; keep: bool [n, k], false where weights stay zero."""
        n, k = packed.shape
        super().__init__()
        self.bias, self.bits, self.group, self.reach, self.keep = layer.bias, packed.bits, packed.group, reach, keep
        self.dtype, self.symmetric = packed.learned.dtype, packed.zero is None
        self.start = packed.learned.float()  # [n, G]
        zero = torch.full_like(self.start, grid.midpoint(self.bits)) if packed.zero is None else packed.zero.float()
        self.zero = zero if self.symmetric else nn.Parameter(zero)
        codes = packed.codes().float().view(n, -1, self.group)
        where = (layer.weight.detach().float().view(n, -1, self.group) / self.start.unsqueeze(-1)).add_(zero.unsqueeze(-1))
        self.middle = where.view(n, k).clone() if reach is not None else None
        self.position = nn.Parameter(torch.clamp(where, codes - EDGE, codes + EDGE).view(n, k))
        self.stretch = nn.Parameter(torch.zeros_like(self.start))

    def rounded(self) -> Tensor:
        """The weight [n, k] that the packed one will have, but for the rounding of scales and zeros."""
        n, k = self.position.shape
        top = (1 << self.bits) - 1
        code = straight(self.position.view(n, -1, self.group)).clamp(0, top)
        zero = self.zero if self.symmetric else straight(self.zero).clamp(0, top)
        out = ((code - zero.unsqueeze(-1)) * self.scale().unsqueeze(-1)).view(n, k)
        return out if self.keep is None else out.masked_fill(~self.keep, 0)

    @property
    def weight(self) -> Tensor:
        """What blocks that look at their linears' weights see."""
        return self.rounded()

    def scale(self) -> Tensor:
        """float32 [n, G]."""
        return self.start * self.stretch.exp()

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.rounded().to(input.dtype), self.bias)

    @torch.no_grad()
    def settle(self) -> None:
        """After a step: positions and zeros back onto the grid."""
        top = (1 << self.bits) - 1
        if self.middle is not None and self.reach is not None:
            self.position.clamp_(self.middle - self.reach, self.middle + self.reach)
        self.position.clamp_(-RIM, top + RIM)
        if not self.symmetric:
            self.zero.clamp_(0, top)

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """The codes, scales in the dtype they are stored in, and whole zeros."""
        top = (1 << self.bits) - 1
        scale = grid.storable(self.scale(), self.dtype).to(self.dtype)
        zero = self.zero.round().clamp(0, top)
        codes = self.position.round().clamp(0, top)
        if self.keep is not None:
            codes = torch.where(self.keep, codes, zero.repeat_interleave(self.group, 1))
        values = Affine(scale, None if self.symmetric else zero.to(torch.uint8))
        return PackedWeight.pack(codes.to(torch.uint8), values, self.bits)


def straight(x: Tensor) -> Tensor:
    """round(x), with the gradient of x."""
    return x + (x.round() - x).detach()
