"""All tuners by name: those that move the values of packed weights, and adapters beside them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor

from compressor import tune
from compressor.errors import ModelError, RecipeError
from compressor.integrations import bitsandbytes
from compressor.integrations.peft import KINDS, Adapters, strip
from compressor.linear import packed_linears, targeted
from compressor.pipelines.load import Loaded
from compressor.quant.starts import STARTS, check
from compressor.recipe import Tune
from compressor.tune import Offered, Tuner, kgrid
from compressor.tune.optimizers import Maker, own

TUNERS: dict[str, Offered] = {**tune.TUNERS, **KINDS}
OWN = ("rank", "alpha", "dropout", "targets", "start", "adapter", "absorb_limit", "grid")  # keys of recipe.Tune that only some tuners heed
Starts = Mapping[str, tuple[Tensor, Tensor]]


def resolved(options: Tune) -> Tune:
    """The options with a learning rate: the given one, else the tuner's own; RecipeError for options that mean nothing to it."""
    if options.method not in KINDS:
        _check(options, getattr(tune.TUNERS.get(options.method), "heeds", ()))
        return tune.resolved(options)
    if options.parametrization != "relative":
        raise RecipeError(f"--absolute says how scales are trained, and {options.method} trains none: leave it out")
    _check(options, KINDS[options.method].heeds)
    if options.rank < 1 or not options.alpha > 0 or not 0 <= options.dropout < 1:
        given = f"{options.rank}, {options.alpha:g}, {options.dropout:g}"
        raise RecipeError(f"an adapter needs rank and alpha above 0 and a dropout from 0 to below 1, not {given}")
    if not math.isfinite(options.alpha) or not 0 <= options.absorb_limit < math.inf:
        raise RecipeError(f"alpha={options.alpha} and absorb_limit={options.absorb_limit} must be finite, and the limit 0 or more, for example 0.05")
    if options.adapter != "absorb" and options.absorb_limit != Tune().absorb_limit:
        raise RecipeError(f"absorb_limit={options.absorb_limit} says what absorbing may cost, and the adapter is kept: add --adapter absorb")
    if options.start not in ("zero", *STARTS) or options.adapter not in ("keep", "absorb"):
        raise RecipeError(f"start={options.start}, adapter={options.adapter}: choose zero, {', '.join(STARTS)}, and keep or absorb")
    return replace(options, lr=KINDS[options.method].rate if options.lr is None else options.lr)


def _check(options: Tune, heeds: tuple[str, ...]) -> None:
    usual = asdict(Tune())
    idle = [key for key in OWN if key not in heeds and getattr(options, key) != usual[key]]
    if idle:
        raise RecipeError(f"tune.{idle[0]}={getattr(options, idle[0])} means nothing to {options.method}: leave it out")


def check_layers(options: Tune, shapes: Mapping[str, tuple[int, ...]], sums: tuple[str, ...]) -> None:
    """RecipeError, before any work, for targets that are no packed linears, and for ranks and starts that these cannot have.

    shapes: [n, k] of what will be packed, by name; sums: the statistics that the packer collects.
    """
    chosen = {name: shapes[name] for name in targeted(shapes, options.targets)}
    if options.grid != "none" and not any(k % kgrid.BLOCK == 0 for _, k in chosen.values()):
        raise RecipeError(f"no linear has rows of a multiple of {kgrid.BLOCK}, which grid={options.grid} wants: leave --grid out")
    if options.start != "zero":
        check(options.start, options.rank, sums, chosen)
    if options.method in KINDS and options.method != "lokr" and "rank" in KINDS[options.method].keys:
        least = min((min(shape) for shape in chosen.values()), default=options.rank)
        if options.rank > least:
            raise RecipeError(f"rank={options.rank} is above the smaller side of a linear, {least}: use a rank up to that")


def optimizer(options: Tune, device: torch.device) -> Maker:
    """What makes the optimizer of these options on this device, and with that whether a run can be: asked before any work.

    MissingExtra for an optimizer whose library is not installed; RecipeError for one that the device does not have, and for an offload to where the
    model is already.
    """
    if options.offload != "none" and device.type == "cpu":
        raise RecipeError("offload=cpu keeps packed words in host memory while a GPU computes, and this run is on the CPU: leave --offload out")
    return own("adamw") if options.optimizer == "adamw" else bitsandbytes.maker(options.optimizer, device)


class Tuning:
    """A tuner at work on a loaded model: `parameters`, `pruner` and `optimizer` go to the training loop, `finish` ends it.

    starts: of adapters, found while packing; steps: how many the loop will take.
    """

    def __init__(self, loaded: Loaded, options: Tune, seed: int, steps: int, starts: Starts | None = None):
        self.loaded, self.pruner, self.optimizer = loaded, None, optimizer(options, loaded.device)
        if loaded.adapter is not None:
            raise ModelError(f"{loaded.name} has an adapter already: take it off with unload_task(), or absorb it by an export")
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in packed_linears(loaded.model).items()}
        if shapes:
            check_layers(replace(options, start="zero"), shapes, ())
        if options.start != "zero" and not starts:
            raise RecipeError(f"start={options.start} is found while a model is packed, by `compressor run`: leave it out here")
        if options.method in KINDS:
            self.adapters: Adapters | None = Adapters(KINDS[options.method], options, seed)
            self.tuner: Tuner = self.adapters
            self.parameters = self.adapters.attach(loaded.model, starts, steps)
            self.pruner = self.adapters.pruner
        else:
            self.adapters, self.tuner = None, TUNERS[options.method](options) if options.grid == "none" else kgrid.GridPeqa(options, options.grid)
            self.parameters = self.tuner.attach(loaded.model)

    def give_up(self) -> None:
        """After an error: values stay the last good ones, a half-trained adapter goes."""
        self.tuner.detach(self.loaded.model)
        if self.adapters is not None:
            strip(self.loaded.model)

    def finish(self) -> int:
        """Write the trained values back; adapters stay beside the model. Returns how many numbers were trained."""
        self.tuner.detach(self.loaded.model)
        if self.adapters is not None:
            self.loaded.adapter = self.adapters.model
        return sum(p.numel() for p in self.parameters.values())
