"""Tuners: what of a packed model is trained, and how the trained numbers get back into it.

A tuner freezes the model, attaches its trainable float32 parameters, and after training writes them back in the form they are stored in. The
one loop that trains them all is `compressor.tune.loop.train`. The parameters dict of a tuner is all of its state: `values` and `load_values`
copy it to and from a flat dict of tensors, which is how one task's tuning is kept and another's is put in its place.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from compressor import recipe
from compressor.errors import ModelError
from compressor.tune.dense import Dense
from compressor.tune.peqa import Peqa


class Tuner(Protocol):
    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Freeze the model and return the trainable float32 parameters by their name in it."""

    def detach(self, model: nn.Module) -> None:
        """Write the trained values back as they are stored; the outputs of the model do not change."""


TUNERS: dict[str, Callable[[recipe.Tune], Tuner]] = {"peqa": Peqa, "full": Dense}


def values(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The tuned values as a flat dict of float32 tensors on the CPU, ready for safetensors."""
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in parameters.items()}


@torch.no_grad()
def load_values(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `values`, in place; ModelError if names or shapes differ, and then nothing is changed."""
    if missing := parameters.keys() ^ tensors.keys():
        raise ModelError(f"tuned values do not fit this model: {min(missing)} is only on one side ({len(missing)} such names)")
    for name, p in parameters.items():
        if p.shape != tensors[name].shape:
            raise ModelError(f"tuned values do not fit this model: {name} is {tuple(p.shape)}, the saved one {tuple(tensors[name].shape)}")
    for name, p in parameters.items():
        p.copy_(tensors[name])
