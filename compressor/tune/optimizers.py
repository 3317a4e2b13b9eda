"""What moves the parameters of the training loop: AdamW of PyTorch, or one of a library that keeps its moments smaller or elsewhere.

The state of training (tune/state.py) holds the moments of any of them as plain tensors, so that good copy, checkpoint and exact resume are one code.
An optimizer of a library is made by a `Maker` from `compressor.integrations`, for this room knows no libraries; the loop is handed it by whoever
knows the recipe (compressor.pipelines.tuners). Bytes a parameter, of those beside its value and gradient, twice: live, and in the good copy:

    adamw              8     two float32 moments
    adamw8bit          2.03  two codes of 8 bits, and a float32 for every 256 of each (Dettmers et al., arXiv 2110.02861)
    paged-adamw        8     in memory that the driver moves between GPU and host when the GPU runs short
    paged-adamw8bit    2.03

AdamW: Loshchilov and Hutter, arXiv 1711.05101.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError

EIGHT_BIT = 2 * (1 + 4 / 256)  # bytes of two moments in blocks of 256 codes
LEAST = 4096  # numbers of a tensor from which 8-bit moments are kept; those of smaller ones are float32


class Optimizer(Protocol):
    """AdamW in some form; every gradient is there and finite when it is asked for a step."""

    def zero_grad(self, set_to_none: bool) -> None:
        """Zero the gradients, which stay allocated."""

    def step(self, lr: float) -> None:
        """Move the parameters along their gradients."""

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The live tensors that the next step of this parameter depends on, beside its value; there from the start, changed in place only."""


Maker = Callable[[Sequence[nn.Parameter], float], Optimizer]  # parameters, weight decay


class AdamW:
    """PyTorch's."""

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float):
        self.inner = torch.optim.AdamW(list(parameters), lr=0.0, weight_decay=weight_decay)
        for p in parameters:
            self.inner.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def zero_grad(self, set_to_none: bool) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, lr: float) -> None:
        self.inner.param_groups[0]["lr"] = lr
        self.inner.step()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return self.inner.state[parameter]


def own(name: str) -> Maker:
    """The maker that needs no other library. RecipeError for a name of one that does."""
    if name != "adamw":
        raise RecipeError(f"optimizer {name} is of another library: hand its maker to the training loop (compressor.pipelines.tuners.optimizer)")
    return AdamW


def moment_bytes(name: str) -> float:
    """Bytes a parameter of the moments, of tensors of LEAST numbers and more."""
    return EIGHT_BIT if name.endswith("8bit") else 8.0
