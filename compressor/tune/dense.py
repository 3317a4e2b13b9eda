"""The control: train every dense linear of the decoder blocks, to see what tuning only the scales gives up.

Masters are float32; the forward sees each weight in the dtype it is stored in, as it will be after `detach`. Price: 28 bytes a weight
(see loop), and its copy in the stored dtype from the forward to the backward pass. For comparisons on the same tokens, not a method of compression.
"""

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.linear import find_blocks, linears, swap
from compressor.recipe import Tune


class MasterLinear(nn.Linear):
    """A linear whose parameter is a float32 master [n, k] of a weight stored in another dtype."""

    weight: nn.Parameter
    stored: torch.dtype

    @classmethod
    def of(cls, layer: nn.Linear) -> "MasterLinear":
        out = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta").train(layer.training)
        out.weight = nn.Parameter(layer.weight.detach().to(torch.float32, copy=True))
        out.bias, out.stored = layer.bias, layer.weight.dtype
        return out

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(self.stored), self.bias)

    def plain(self) -> nn.Linear:
        """The layer as it is stored."""
        out = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta").train(self.training)
        out.weight = nn.Parameter(self.weight.detach().to(self.stored), requires_grad=False)
        out.bias = self.bias
        return out


class Dense:
    """Trains all dense linears of the decoder blocks in full."""

    def __init__(self, options: Tune):
        del options

    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Freeze the model and return the float32 masters [n, k] by their name in it; ModelError if the blocks hold no dense linear."""
        prefix, blocks = find_blocks(model)
        found = linears(blocks)
        if not found:
            raise ModelError(f"the decoder blocks of {type(model).__name__} hold no dense linear layers to train in full")
        model.requires_grad_(False)
        out = {}
        for name, layer in found.items():
            master = MasterLinear.of(layer)
            swap(blocks, name, master)
            out[f"{prefix}.{name}.weight"] = master.weight
        return out

    def detach(self, model: nn.Module) -> None:
        """Put plain nn.Linear layers back, with the trained weights in their stored dtype."""
        for name, layer in linears(model).items():
            if isinstance(layer, MasterLinear):
                swap(model, name, layer.plain())
