"""PEQA: fine-tune the scales of a packed model; codes, zeros and everything else stay as they are.

    weight = s * (code - zero)        dL/ds[i, g] = sum over the columns j of group g of (dy^T x)[i, j] * (code - zero)[i, j]

Source: "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer Quantization", arXiv 2305.14152. There the
scale itself is trained (`absolute`). Scales of one model differ more than tenfold between rows, so one learning rate suits few of them;
the default here is `relative`, s = s0 * (1 + delta), where the rate acts on delta and means the same at every row and bit width.

Three things are ours. The forward sees each scale as it will be stored (see snapped). No scale falls below a tenth of its start in size, so no step
can flip the sign of a group or drive it to zero; negative scales, as other packers leave them, stay negative. And no scale exceeds the largest number
of its stored dtype. At either limit only the gradient that leads back is kept.

Price, on top of the stored scale: 32 bytes a scale and a rounding pass (see snapped). Limit: a scale stored in bfloat16 moves in steps of 0.4 to
0.8 percent, larger than most useful changes; store float16 or float32 when tuning.
"""

import torch
from torch import Tensor

from compressor.tune.snapped import Snap, Snapped, ValueTuner

FLOOR = 0.1  # of the starting scale


class ScaleTuning(Snapped):
    """Returns the scale [n, G] to use now; start [n, G] in the stored dtype; the parameter is `delta` or `scale`, float32 [n, G]."""

    def __init__(self, start: Tensor, relative: bool = True):
        super().__init__(start, relative, "scale")

    def forward(self) -> Tensor:
        return Snap.apply(self.get_parameter(self.leaf), self.start, self.start if self.relative else None, _limited)


class Peqa(ValueTuner):
    """Trains the scale of every packed linear; negative ones, as other packers leave them, stay negative.

    Default learning rates: of the relative change as measured (docs/log.md); of the scale itself that of the paper for Alpaca, 7B and 13B.
    """

    table, what, heeds = False, "scale", ("grid",)
    rates = {"relative": 5e-3, "absolute": 2e-5}

    def snapped(self, start: Tensor) -> ScaleTuning:
        return ScaleTuning(start, self.relative)


def _limited(master: Tensor, start: Tensor, unit: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The unlimited scale and its lower and upper limits, float32 [n, G]; unit is the start (relative) or None (absolute)."""
    wide, limits = start.float(), torch.finfo(start.dtype)
    size = wide.abs()
    # Below the smallest normal number a tenth of the start may round to zero: such a scale keeps its start as the floor.
    floor = torch.maximum(FLOOR * size, size.clamp(max=limits.tiny))
    low, high = torch.where(wide < 0, -limits.max, floor), torch.where(wide < 0, -floor, limits.max)
    return master if unit is None else (1 + master).mul_(wide), low, high
