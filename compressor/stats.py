"""What a packer learns about the inputs of one linear layer, summed while calibration text streams through it.

Only the sums that were asked for are kept. The second moment is a running *mean* of x xT, so that its size does not grow with the number of
tokens and float32 is enough for hundreds of thousands of them; GPTQ's factor 2 (Frantar et al., 2022, section 3) is left out, for it cancels in
every use. Price: width**2 floats per layer. Limits: no weighting of tokens; a non-finite input is noticed by `check`, not by `add`.
"""

import torch
from torch import Tensor

from compressor import world
from compressor.errors import NumericError

SUMS = ("hessian",)
UNSEEN = "no calibration tokens reached this layer"


class LayerStats:
    """Streaming sums over the inputs of a layer of `width` in features; `needs` names the sums to keep (see SUMS).

    `tokens` counts the vectors seen; `hessian` is mean(x xT), [width, width] in `dtype` on the data's device, None before the first token or
    when not asked for. `fisher` [n, width], the squared gradients of one layer's weight, and `keep`, bool [n, width], false where a weight was
    pruned and must stay exactly zero, are no sums over inputs: the caller puts them here for the layer that is packed next. Raises ValueError for
    a sum that nobody knows. `why` says, where there is no `hessian`, what packers without one tell the report.
    """

    def __init__(self, width: int, needs: tuple[str, ...] = ("hessian",), dtype: torch.dtype = torch.float32):
        unknown = sorted(set(needs) - set(SUMS))
        if unknown:
            raise ValueError(f"layer statistics {unknown} are unknown; choose from {SUMS}")
        self.width, self.needs, self.dtype = width, needs, dtype
        self.tokens = 0
        self.hessian: Tensor | None = None
        self.fisher: Tensor | None = None
        self.keep: Tensor | None = None
        self.why = UNSEEN

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x [..., width], any float dtype; an empty x changes nothing. Raises ValueError when the last dimension is not `width`."""
        if x.shape[-1] != self.width:
            raise ValueError(f"inputs have {x.shape[-1]} features, the layer has {self.width}")
        rows = x.reshape(-1, self.width)
        count = rows.shape[0]
        if count == 0:
            return
        total = self.tokens + count
        if "hessian" in self.needs:
            rows = rows.to(self.dtype)
            if self.hessian is None:
                self.hessian = torch.zeros(self.width, self.width, dtype=self.dtype, device=x.device)
            self.hessian.addmm_(rows.T, rows, beta=self.tokens / total, alpha=1 / total)
        self.tokens = total

    def require(self, least: int) -> None:
        """Forget the sums if fewer tokens than `least` were seen: packers then do without data, and say why."""
        if 0 < self.tokens < least:
            self.hessian, self.why = None, f"only {self.tokens} calibration tokens reached this layer, fewer than {least}"

    @torch.no_grad()
    def reduce(self, device: torch.device) -> None:
        """Make these sums, on `device`, those over the inputs of all processes; one process has them already. All must call it."""
        if world.size() == 1:
            return
        tokens = sum(world.gather(self.tokens))
        if "hessian" in self.needs and tokens:
            if self.hessian is None:
                self.hessian = torch.zeros(self.width, self.width, dtype=self.dtype, device=device)
            self.hessian.mul_(self.tokens / tokens)
            world.add([self.hessian])
        self.tokens = tokens

    def check(self, name: str) -> None:
        """Raises NumericError naming the layer if any input so far was NaN or infinite, or too large to square (both reach the diagonal)."""
        if self.hessian is not None and not bool(torch.isfinite(self.hessian.diagonal()).all()):
            raise NumericError(f"the calibration inputs of {name} hold NaN, infinite or overflowing values; check the model's dtype and the text")
