"""Tuners: what of a packed model is trained, and how the trained numbers get back into it.

A tuner freezes the model, attaches its trainable float32 parameters, and after training writes them back in the form they are stored in. The
one loop that trains them all is `compressor.tune.loop.train`. The parameters dict of a tuner is all of its state. `TUNERS` are those offered
to users; `compressor.tune.dense.Dense` is a control for benchmarks.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from torch import nn

from compressor import recipe
from compressor.errors import RecipeError
from compressor.tune.peqa import Peqa
from compressor.tune.qalora import QaLora
from compressor.tune.table import TableTuner


class Tuner(Protocol):
    def attach(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Freeze the model and return the trainable float32 parameters by their name in it."""

    def detach(self, model: nn.Module) -> None:
        """Write the trained values back as they are stored; the outputs of the model do not change."""


class Offered(Protocol):
    """A class of tuners that users choose by name: `rates` is its default learning rate by parametrisation.

    table: whether it wants sketches, None if it takes both.
    """

    @property
    def rates(self) -> Mapping[str, float]: ...

    @property
    def table(self) -> bool | None: ...

    def __call__(self, options: recipe.Tune) -> Tuner: ...


TUNERS: dict[str, Offered] = {"peqa": Peqa, "table": TableTuner, "qalora": QaLora}


def resolved(options: recipe.Tune) -> recipe.Tune:
    """The options with a learning rate: the given one, else the default of the tuner in that parametrisation; method none stays as it is.

    RecipeError for a method without a default.
    """
    if options.lr is not None or options.method == "none":
        return options
    if options.method not in TUNERS:
        raise RecipeError(f"tuner {options.method!r} has no learning rate of its own: give one")
    return replace(options, lr=TUNERS[options.method].rates[options.parametrization])
