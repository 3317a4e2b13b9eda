"""QA-LoRA: a low-rank change of the weight that is constant within a group, and therefore a change of the zeros alone.

    y = x Wq^T + gamma (p A^T) B^T      p[., g] = sum of x over the columns of group g      gamma = alpha / rank
    weight = s * (code - zero')         zero' = zero - gamma (B A) / s                       A [r, G], B [n, r]

Source: Xu et al., 2023, arXiv 2309.14717. Both lines are the same function, so there is no path beside the weight, in training as in use: the
forward runs the packed kernels with the zeros that A and B give now, and the gradient of A and B comes from that of the zeros, of which the
kernels need only the group sums of x. Pooling is the sum, as in the paper; the authors' code takes the mean, which is a gamma smaller by the
group size, and would make the rate depend on it.

The choices are ours. The forward sees each zero as it will be stored, with a straight-through gradient (see snapped), so what was trained is what
is served. Zeros are stored in float16, which counts up to 16 in steps of 1/128 or less whatever the size of the weights, in float32 where scales
are. `relative` (the default) multiplies row i of B by the mean scale of the row: the change counts in steps of the grid, and a rate means the same
at every row; `absolute` is the paper's. A starts Kaiming-uniform, B at zero. A rank above G adds nothing to B A, so A has min(rank, G) rows. Zeros
of symmetric weights start at the midpoint.

Price: r (n + G) parameters a layer, 28 bytes each; 6 bytes a group for start and unit, 4 more while it is in use; x kept for the backward pass. A
float zero costs 16 bits a group on disk: 3 bits in groups of 128 become 3.25 bits a weight with the scale, which was all of 3.125 for a symmetric
one. Limits: no format of others holds float zeros (docs/methods.md says what rounding them loses); pruned weights do not stay zero; no dropout, as
there is no input of a path to drop.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, NumericError, RecipeError
from compressor.linear import PackedLinear, packed_linears, same_dtype, targeted
from compressor.packed import zeros_as_floats
from compressor.recipe import Tune
from compressor.tune.snapped import Snap


class ZeroTuning(nn.Module):
    """Returns the zeros [n, G] to use now, float32, each exactly representable in start's dtype; before the first step they equal `start`.

    start [n, G] in the stored dtype; scale [n, G]; the parameters are `a` [min(rank, G), G] and `b` [n, min(rank, G)], float32. `generator`
    draws a.
    """

    start: Tensor
    unit: Tensor  # float32 [n, G]: what one of B A moves a zero by

    def __init__(self, start: Tensor, scale: Tensor, rank: int, alpha: float, relative: bool, generator: torch.Generator):
        super().__init__()
        (n, groups), wide = start.shape, scale.detach().float()
        size = wide.mean(1, keepdim=True) if relative else wide.new_ones(n, 1)
        unit = -(alpha / rank) * size / wide
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("unit", unit.masked_fill_(~torch.isfinite(unit), 0.0), persistent=False)  # of a scale of zero, whose zero does nothing
        rows, bound = min(rank, groups), 1 / math.sqrt(groups)  # Kaiming uniform with slope sqrt(5)
        self.a = nn.Parameter(torch.empty(rows, groups).uniform_(-bound, bound, generator=generator).to(start.device))
        self.b = nn.Parameter(torch.zeros(n, rows, device=start.device))

    def forward(self) -> Tensor:
        with torch.autocast(self.start.device.type, enabled=False):
            return Snap.apply(self.b @ self.a, self.start, self.unit, _limited)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves devices like any module, but no cast of the model changes the dtype of the start, the parameters or their gradients."""
        return super()._apply(same_dtype(fn), recurse)


class QaLora:
    """Trains the zeros of packed linears by a low-rank product; options: rank, alpha, targets, and the parametrisation.

    Default learning rates: of the relative change measured (docs/log.md); of the weights themselves that of the paper for LLaMA-7B and 13B.
    RecipeError for a dropout.
    """

    table: ClassVar[bool] = False
    heeds: ClassVar[tuple[str, ...]] = ("rank", "alpha", "targets")  # of the options that only some tuners know
    rates: ClassVar[dict[str, float]] = {"relative": 5e-3, "absolute": 2e-5}

    def __init__(self, options: Tune):
        if options.dropout:
            raise RecipeError(f"dropout={options.dropout} drops inputs of a path, and qalora has none beside the packed weight: leave it out")
        if min(options.rank, options.alpha) <= 0:
            raise RecipeError(f"rank={options.rank} and alpha={options.alpha} must be positive")
        self.rank, self.alpha, self.relative = options.rank, options.alpha, options.parametrization == "relative"
        self.targets = options.targets

    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Freeze the model, give each layer float zeros equal to its own and their tuning; returns the parameters by their name in the model.

        The draw of A depends on the order of the layers alone. ModelError if there is no packed linear, or one holds tables or is tuned already;
        NumericError if a scale or zero is not finite; RecipeError for a target that names none.
        """
        layers = self._chosen(model)
        for name, layer in layers.items():
            _check(name, layer)
        model.requires_grad_(False)
        generator, out = torch.Generator().manual_seed(0), dict[str, nn.Parameter]()
        for name, layer in layers.items():
            layer.zero = start = float_zeros(layer)
            layer.tuned_zero = tuning = ZeroTuning(start, layer.learned, self.rank, self.alpha, self.relative, generator)
            out |= {f"{name}.tuned_zero.a": tuning.a, f"{name}.tuned_zero.b": tuning.b}
        return out

    @torch.no_grad()
    def detach(self, model: nn.Module) -> None:
        """Store the tuned zeros, in floats, and remove the tuning; the outputs stay the same bit for bit.

        NumericError if a tuned zero is not finite; then nothing is changed.
        """
        tuned = {name: layer for name, layer in packed_linears(model).items() if layer.tuned_zero is not None}
        values = {name: layer.packed().zero for name, layer in tuned.items()}
        for name, value in values.items():
            if value is None or not bool(torch.isfinite(value).all()):
                raise NumericError(f"the tuned zeros of {name} are not finite: tune again with a smaller learning rate")
        for name, layer in tuned.items():
            layer.zero, layer.tuned_zero = values[name], None

    def _chosen(self, model: nn.Module) -> dict[str, PackedLinear]:
        layers = packed_linears(model)
        if not layers:
            raise ModelError(f"{type(model).__name__} has no packed linear layers: compress it before tuning its zeros")
        return {name: layers[name] for name in targeted(layers, self.targets)}


def float_zeros(layer: PackedLinear) -> Tensor:
    """The zeros of an affine layer [n, G] as floats of the dtype they will be stored in."""
    return zeros_as_floats(layer.learned, layer.zero, layer.bits)


def _check(name: str, layer: PackedLinear) -> None:
    if layer.table:
        raise ModelError(f"{name} holds tables, which have no zeros to train: tune the model with --tune table")
    if layer.tuned is not None or layer.tuned_zero is not None:
        raise ModelError(f"{name} is being tuned already: detach the first tuner before attaching another")
    if not all(bool(torch.isfinite(values).all()) for values in (layer.learned, layer.zero) if values is not None):
        raise NumericError(f"the scales or zeros of {name} are not finite: compress the model again")


def _limited(master: Tensor, start: Tensor, unit: Tensor | None) -> tuple[Tensor, float, float]:
    """The unlimited zeros, float32 [n, G], and the ends of the finite range of the stored dtype."""
    assert unit is not None
    top = torch.finfo(start.dtype).max
    return torch.addcmul(start.float(), unit, master), -top, top
