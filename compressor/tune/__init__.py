"""Tuners: what of a packed model is trained, and how the trained numbers get back into it.

A tuner freezes the model, attaches its trainable float32 parameters, and after training writes them back in the form they are stored in. The
one loop that trains them all is `compressor.tune.loop.train`. The parameters dict of a tuner is all of its state. `TUNERS` are those offered
to users; `compressor.tune.dense.Dense` is a control for benchmarks.
"""

from collections.abc import Callable
from typing import Protocol

from torch import nn

from compressor import recipe
from compressor.tune.peqa import Peqa


class Tuner(Protocol):
    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Freeze the model and return the trainable float32 parameters by their name in it."""

    def detach(self, model: nn.Module) -> None:
        """Write the trained values back as they are stored; the outputs of the model do not change."""


TUNERS: dict[str, Callable[[recipe.Tune], Tuner]] = {"peqa": Peqa}
