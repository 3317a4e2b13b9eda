"""What an export needs that compressed-tensors cannot hold: tables and tuned zeros projected onto grids, adapters absorbed, each measured.

A table holds any 2**bits values and an even grid does not, so its layer is packed anew by round-to-nearest on its dequantised weight. Tuned zeros:
codes stay and zeros are rounded (export/integers.py), unless other grids are asked for. An adapter is absorbed (pipelines/adapters.py) with GPTQ, on
the training part of a text, and measured on its held-out part. Limits: a projection is blind to the inputs, it uses no calibration text; an adapter
beside tables or tuned zeros is refused.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from compressor import linear
from compressor.errors import DataError, ModelError, RecipeError, UserError
from compressor.export import dense, integers, sparse, task
from compressor.packing import relative_error
from compressor.pipelines import adapters, data, evaluate, load
from compressor.pipelines.output import read_report
from compressor.pipelines.show import Show
from compressor.quant import resolve_group, rtn
from compressor.recipe import Quant, Recipe

PACKED = "compressed-tensors"
DTYPES = dense.DTYPES | {"float32": torch.float32}  # by the name that users write
TARGETS = (PACKED, *DTYPES)
GRID, MEASURING = ("bits", "group", "symmetric"), ("data", "window", "max_tokens", "max_loss")  # fields of Target


@dataclass(frozen=True)
class Target:
    """What to write. bits, group, symmetric concern projections, max_loss and the text also absorbed adapters; None means the default of each."""

    to: str
    bits: int | None = None  # the layer's own
    group: int | None = None  # 128
    symmetric: bool | None = None  # symmetric
    data: str | None = None  # python; of an adapter the text that it was trained on
    window: int | None = None
    max_tokens: int | None = None  # the whole text
    max_loss: float | None = None  # relative growth of perplexity above which nothing is written
    device: str = "auto"

    def check(self) -> None:
        """RecipeError for values that cannot work."""
        if self.to not in TARGETS:
            raise RecipeError(f"--to {self.to!r} is unknown; choose {', '.join(TARGETS)}")
        if self.max_loss is not None and not 0 <= self.max_loss < math.inf:
            raise RecipeError(f"max-loss={self.max_loss} is a share by which perplexity may grow: 0 or more, for example 0.05")
        if self.to != PACKED:
            self.refuse(f"--to {self.to} has none")
        Recipe().with_(quant=self.quant(3), eval__window=self.window, eval__max_tokens=self.max_tokens or 0)

    def refuse(self, why: str, names: tuple[str, ...] = GRID + MEASURING) -> None:
        """RecipeError if any of these fields is given, for which there is no use."""
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            flag = "sym or --asym" if given[0] == "symmetric" else given[0].replace("_", "-")
            use = "the projection of tables" if given[0] in GRID else "the projection of tables and adapters that are absorbed"
            raise RecipeError(f"--{flag} is for {use}, and {why}: leave it out")

    def keeps(self, layer: linear.PackedLinear) -> bool:
        """Whether a projection leaves the codes of a layer: those on a grid, where no other grid is asked for."""
        return not layer.table and self.bits is None and self.group is None and self.symmetric is None

    def quant(self, bits: int) -> Quant:
        """Options of round-to-nearest for a layer of `bits` bits."""
        chosen = Quant(packer="rtn", bits=bits if self.bits is None else self.bits)
        chosen = chosen if self.group is None else replace(chosen, group=self.group)
        return chosen if self.symmetric is None else replace(chosen, symmetric=self.symmetric)


def fitted(loaded: load.Loaded, source: str, target: Target, show: Show) -> dict[str, Any]:
    """Makes the model one that compressed-tensors can hold, in place; what was done, for the record: nothing where it is one already.

    RecipeError for options of what is not done, ModelError for tables or tuned zeros beside an adapter, UserError if the loss is too large.
    """
    held = load.packed_weights(loaded.model)
    zeros = any(weight.float_zeros for weight in held.values())
    projects = zeros or task.kind_of(held, source) == "table"
    if loaded.adapter is not None:
        if projects:
            raise ModelError(
                f"{source} holds {'tuned zeros' if zeros else 'tables'} with an adapter beside them: export --to bf16, which folds it in"
            )
        target.refuse(f"{source} holds scales, whose grids an absorbed adapter keeps", GRID)
        return measured_absorbing(loaded, target, show)
    if projects:
        return {"exact": False} | measured_projection(loaded, target, show)
    target.refuse(f"{source} holds scales, which are written as they are")
    return {}


def measured_projection(loaded: load.Loaded, target: Target, show: Show) -> dict[str, Any]:
    """Projects the model in place, measured before and after: rows per layer and perplexity, for the record. UserError if the loss is too large."""
    corpus, window = data.load_text("python" if target.data is None else target.data), load.context(loaded.config, target.window)
    layers = linear.packed_linears(loaded.model)
    chosen = {name: _group(name, layer, target) for name, layer in layers.items()}  # before anything slow
    old, new = ("tables", "even grids") if any(layer.table for layer in layers.values()) else ("tuned zeros", "integer zeros")

    def measure(label: str) -> dict[str, Any]:
        with show.task(label, 1) as advance:
            found = evaluate.measure(loaded.model, loaded.tokenizer, {"text": corpus}, window, target.max_tokens or 0)
            advance(1, "")
        return found

    before = measure(f"evaluate {old}")
    with show.task("project", len(chosen)) as advance:
        rows = []
        for name, (group, note) in chosen.items():
            rows.append(project(loaded, name, target, group) | {"note": note})
            advance(1, f"{name} error {rows[-1]['error']:.4f}")
    after = measure(f"evaluate {new}")
    first, last = before["text"]["perplexity"], after["text"]["perplexity"]
    growth = last / first - 1
    show.say(f"perplexity {first:.3f} with {old}, {last:.3f} with {new}: {growth:+.2%}")
    if target.max_loss is not None and growth > target.max_loss:
        grown = f"perplexity would grow from {first:.3f} to {last:.3f}, by {growth:.2%}, and --max-loss allows {target.max_loss:.2%}"
        raise UserError(f"{grown}; nothing was written: try more --bits, a smaller --group or --asym")
    return {"layers": rows, "perplexity": {"before": first, "after": last, "growth": growth, "protocol": after["protocol"]["text"]}}


def _group(name: str, layer: linear.PackedLinear, target: Target) -> tuple[int, str]:
    return (layer.group, "") if target.keeps(layer) else resolve_group(layer.in_features, target.quant(layer.bits), name)


def project(loaded: load.Loaded, name: str, target: Target, group: int) -> dict[str, Any]:
    """Replaces one packed layer by its projection onto even grids; returns its row, whose error is the norm of the change over that of the weight."""
    layer = loaded.model.get_submodule(name)
    assert isinstance(layer, linear.PackedLinear)
    held = layer.packed()
    exact = dense.dequantize(held)
    if target.keeps(layer):
        weight = integers.with_integers(held)
    else:
        weight, _ = rtn.pack(exact, None, target.quant(held.bits), group, load.scale_dtype("auto", loaded.dtype))
    linear.swap(loaded.model, name, linear.PackedLinear(weight, layer.bias).train(layer.training))
    was = {"table_bits": held.bits, "segment": held.group} if layer.table else {}
    return {"name": name} | was | {"error": relative_error(exact, weight, None)}


def measured_absorbing(loaded: load.Loaded, target: Target, show: Show) -> dict[str, Any]:
    """Absorbs the adapter in place, measured before and after, for the record. UserError if the loss is too large; the adapter is then back."""
    kind, recipe, rows = adapters.kind(loaded), own_recipe(loaded), {}
    texts, window = _learnt(recipe, target), load.context(loaded.config, target.window)
    recipe = recipe or Recipe()
    seqlen = load.context(loaded.config, recipe.data.seqlen if target.window is None else target.window)
    try:
        ids = data.calibration(texts.train, loaded.tokenizer, seqlen, recipe.data.nsamples, recipe.seed)
    except DataError as error:
        raise DataError(f"an adapter is absorbed on calibration windows, and {error} (--window)") from None
    found: dict[str, Any] = {}

    def perplexity() -> float:
        found.update(evaluate.measure(loaded.model, loaded.tokenizer, {"text": texts.test}, window, target.max_tokens or 0))
        return float(found["text"]["perplexity"])

    limit = math.inf if target.max_loss is None else target.max_loss
    zeros = loaded.config["quantization_config"].get("quant_method") == sparse.METHOD
    with show.task("absorb", len(load.packed_weights(loaded.model))) as advance:

        def on_layer(row: dict[str, Any]) -> None:
            rows[row["name"]] = {"error": row["error"], "way": row["way"], "dropped": row["dropped"], "note": f"absorbed by {row['way']}"}
            advance(1, f"{row['name']} {row['way']}")

        facts = adapters.take_up(loaded, replace(recipe.quant, packer="gptq"), ids, ids, perplexity, limit, zeros, on_layer)
    if not facts["absorbed"]:
        grown = f"from {facts['before']:.3f} to {facts['after']:.3f}, by {facts['rise']:.2%}, and --max-loss allows {limit:.2%}"
        raise UserError(f"absorbing the adapter, perplexity would grow {grown}; nothing was written: --to bf16 folds it in without this loss")
    show.say(adapters.sentence(facts))
    told = {"kind": kind, "ways": facts["ways"], "max_logit_change": facts["max_logit_change"], "note": adapters.sentence(facts)}
    told |= {"calibration": {"name": texts.train.name, "windows": len(ids), "seqlen": seqlen}}
    measured = {"before": facts["before"], "after": facts["after"], "growth": facts["rise"], "protocol": found["protocol"]["text"]}
    unchanged = {"error": 0.0, "note": ""}
    layers = [{"name": name} | rows.get(name, unchanged) for name in linear.packed_linears(loaded.model)]
    return {"exact": False, "layers": layers, "perplexity": measured, "adapter": told}


def _learnt(recipe: Recipe | None, target: Target) -> data.Splits:
    """The text that an adapter was trained on, or the given one: on another it would be absorbed, and judged, for what it never learnt."""
    if target.data is not None:
        return data.load(target.data)
    if recipe is None or recipe.tune.method == "none":
        raise RecipeError("no report says what text the adapter was trained on: name it with --data")
    name = "python" if recipe.data.data is None else recipe.data.data
    try:
        return data.load(name)
    except DataError as error:
        raise DataError(f"the adapter was trained on {name}, and {error}: name that text with --data") from None


def own_recipe(loaded: load.Loaded) -> Recipe | None:
    """The recipe that made the folder, from its report; None where it has none that can be read."""
    told = read_report(loaded.folder).get("recipe")
    try:
        return Recipe.from_dict(told) if isinstance(told, dict) else None
    except RecipeError:
        return None
