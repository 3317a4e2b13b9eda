"""What an export does to a model that its format cannot hold as it is: projected, absorbed, widened or rounded, and what that costs, measured.

A table holds any 2**bits values and an even grid does not, so its layer is packed anew by round-to-nearest on its dequantised weight. Tuned zeros:
codes stay and zeros are rounded (export/integers.py), unless other grids are asked for. An adapter is absorbed (pipelines/adapters.py) with GPTQ, on
the training part of a text, and measured on its held-out part. What a format then still rounds (scales in float16, products of scales and zeros, the
two-level grids of K-quants) is put in the place of each weight and measured too. Limits: a projection is blind to the inputs, it uses no calibration
text; an adapter beside tables or tuned zeros is refused; weights that a format holds as no packed weight of ours are dense while they are measured.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from compressor import linear
from compressor.errors import DataError, ModelError, RecipeError, UserError
from compressor.export import conversions, dense, integers, sparse
from compressor.packed import PackedWeight
from compressor.packing import naming, relative_error
from compressor.pipelines import adapters, data, evaluate, load, writers
from compressor.pipelines.output import read_report
from compressor.pipelines.show import Show
from compressor.pipelines.sources import Corpus
from compressor.quant import resolve_group, rtn
from compressor.recipe import Quant, Recipe

ENOUGH = 1 << 14  # tokens that a rounding is measured on, unless --max-tokens says otherwise: the same before and after
LARGE = 0.05  # growth of perplexity that deserves a warning
NOTHING = 0.9  # relative error of a layer of which a format keeps nothing
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
    consumers: bool = True  # run the folder through the software that is installed for it
    device: str = "auto"

    def check(self) -> None:
        """RecipeError for values that cannot work."""
        writer = writers.of(self.to)
        if self.max_loss is not None and not 0 <= self.max_loss < math.inf:
            raise RecipeError(f"max-loss={self.max_loss} is a share by which perplexity may grow: 0 or more, for example 0.05")
        if writer is None:
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
        return not layer.table and layer.columns is None and self.bits is None and self.group is None and self.symmetric is None

    def quant(self, bits: int) -> Quant:
        """Options of round-to-nearest for a layer of `bits` bits."""
        chosen = Quant(packer="rtn", bits=bits if self.bits is None else self.bits)
        chosen = chosen if self.group is None else replace(chosen, group=self.group)
        return chosen if self.symmetric is None else replace(chosen, symmetric=self.symmetric)


def fitted(loaded: load.Loaded, source: str, target: Target, writer: writers.Writer, show: Show) -> dict[str, Any]:
    """Makes the model one that the format of `writer` can hold, in place; what was done, for the record: nothing where it is one already.

    RecipeError for options of what is not done, ModelError for what cannot be done, UserError if the loss is too large.
    """
    held = load.packed_weights(loaded.model)
    lacking = writers.lacks(writer, held)
    if loaded.adapter is not None:
        if lacking:
            kind = next(kind for kind in (writers.TABLES, writers.FLOATS, writers.COLUMNS) if kind in lacking)
            raise ModelError(f"{source} holds {kind} with an adapter beside them: export --to bf16, which folds it in")
        target.refuse(f"{source} holds scales, whose grids an absorbed adapter keeps", GRID)
        if any(bool((weight.learned < 0).any()) for weight in held.values()):
            raise ModelError(f"{source} has negative scales, beside which no adapter is absorbed: export --to bf16, which folds it in")
        done = measured_absorbing(loaded, target, show)
    elif lacking:
        done = {"exact": False} | measured_projection(loaded, target, show, writer.bits)
    else:
        fixed = [key for key in GRID if key != "bits"]
        target.refuse(f"{source} holds no tables, and its grids are written as they are", tuple(fixed))
        done = {}
    bits = writer.bits if target.bits is None else target.bits
    if bits is not None:
        _widen(loaded, bits, source)
    if why := writer.fits(loaded.config, load.packed_weights(loaded.model)):
        raise ModelError(f"{source} cannot be written as {writer.NAME}: {why}")
    return done


def _widen(loaded: load.Loaded, bits: int, source: str) -> None:
    """Every packed layer in fields of `bits` bits; RecipeError where it has more, or tables."""
    for name, layer in linear.packed_linears(loaded.model).items():
        try:
            weight = conversions.widened(layer.packed(), bits)
        except ModelError as error:
            raise RecipeError(f"{source}: {name}: {error}") from None
        linear.swap(loaded.model, name, linear.PackedLinear(weight, layer.bias).train(layer.training))


def settled(loaded: load.Loaded, target: Target, writer: writers.Writer, done: dict[str, Any], show: Show) -> dict[str, Any]:
    """Puts what the format holds in the place of every weight, measured before and after if any changes; the record so far, `done`, with that.

    UserError if the loss is too large, ModelError for a layer of which nothing is left. What is to be written are the weights from before.
    """
    layers, changed = linear.packed_linears(loaded.model), dict[str, nn.Module]()
    rows = {row["name"]: row for row in done.get("layers", [])}
    with show.task(f"fit to {writer.NAME}", len(layers)) as advance:
        for name, layer in layers.items():
            weight = layer.packed()
            with naming(name):
                held = writer.held(weight)
            error = writers.loss(weight, held)
            if error > NOTHING:
                raise ModelError(f"{name}: its weights are below what {writer.NAME} resolves, and nothing is left of them: choose another --to")
            if error:
                changed[name] = _as_layer(held, layer)
            rows[name] = {"name": name, "error": error, "note": ""} | rows.get(name, {}) | ({"rounding": error} if error else {})
            advance(1, f"{name} error {error:.4f}")
    out = done | {"layers": list(rows.values())}
    if not changed:
        return {"exact": True} | out
    corpus, window = data.load_text("python" if target.data is None else target.data), load.context(loaded.config, target.window)
    measured = done.get("perplexity")  # of a projection on the same text, or of an adapter that was absorbed, on its own
    target = target if target.max_tokens is not None or measured else replace(target, max_tokens=ENOUGH)
    before = _perplexity(loaded, corpus, window, target, "evaluate as it is", show)
    for name, module in changed.items():
        linear.swap(loaded.model, name, module)
    after = _perplexity(loaded, corpus, window, target, f"evaluate as {writer.NAME}", show)
    first, last = before["text"]["perplexity"], after["text"]["perplexity"]
    show.say(f"perplexity {first:.3f} as it is, {last:.3f} as {writer.NAME}: {last / first - 1:+.2%}")
    if measured and "adapter" in done:
        _check_loss(first, last, target, "try another --to", show)
        return out | {"exact": False, "rounding": {"before": first, "after": last, "growth": last / first - 1}}
    first = measured["before"] if measured else first
    _check_loss(first, last, target, "try another --to", show)
    return out | {"exact": False, "perplexity": {"before": first, "after": last, "growth": last / first - 1, "protocol": after["protocol"]["text"]}}


def _as_layer(held: PackedWeight | Tensor, layer: linear.PackedLinear) -> nn.Module:
    """A linear of what a format holds."""
    if isinstance(held, PackedWeight):
        return linear.PackedLinear(held, layer.bias).train(layer.training)
    dense = nn.utils.skip_init(HeldLinear, layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight, dense.bias = nn.Parameter(held.to(layer.words.device), requires_grad=False), layer.bias
    return dense.train(layer.training)


class HeldLinear(nn.Linear):
    """A linear whose weight is float32 whatever the model computes in."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias if self.bias is None else self.bias.to(input.dtype))


def _perplexity(loaded: load.Loaded, corpus: Corpus, window: int, target: Target, label: str, show: Show) -> dict[str, Any]:
    with show.task(label, 1) as advance:
        found = evaluate.measure(loaded.model, loaded.tokenizer, {"text": corpus}, window, target.max_tokens or 0)
        advance(1, "")
    return found


def _check_loss(first: float, last: float, target: Target, hint: str, show: Show) -> None:
    """UserError where perplexity grows by more than the target allows; a warning where it allows anything and the growth is large."""
    growth = last / first - 1
    if target.max_loss is not None and growth > target.max_loss:
        grown = f"perplexity would grow from {first:.3f} to {last:.3f}, by {growth:.2%}, and --max-loss allows {target.max_loss:.2%}"
        raise UserError(f"{grown}; nothing was written: {hint}")
    if growth > LARGE:
        show.say(f"! perplexity grows by {growth:.1%}: {hint}, or let --max-loss refuse it")


def measured_projection(loaded: load.Loaded, target: Target, show: Show, bits: int | None = None) -> dict[str, Any]:
    """Projects the model in place, measured before and after: rows per layer and perplexity, for the record. UserError if the loss is too large.

    bits: of what is packed anew, unless the target names some; None: as many as it had.
    """
    corpus, window = data.load_text("python" if target.data is None else target.data), load.context(loaded.config, target.window)
    layers = linear.packed_linears(loaded.model)
    chosen = {name: _group(name, layer, target, bits) for name, layer in layers.items()}  # before anything slow
    old, new = ("tables", "even grids") if any(layer.table for layer in layers.values()) else ("tuned zeros", "integer zeros")
    if any(layer.columns is not None for layer in layers.values()):
        old, new = "columns in the order of groups", "groups of neighbours"
    before = _perplexity(loaded, corpus, window, target, f"evaluate {old}", show)
    with show.task("project", len(chosen)) as advance:
        rows = []
        for name, (group, note) in chosen.items():
            rows.append(project(loaded, name, target, group, bits) | {"note": note})
            advance(1, f"{name} error {rows[-1]['error']:.4f}")
    after = _perplexity(loaded, corpus, window, target, f"evaluate {new}", show)
    first, last = before["text"]["perplexity"], after["text"]["perplexity"]
    show.say(f"perplexity {first:.3f} with {old}, {last:.3f} with {new}: {last / first - 1:+.2%}")
    _check_loss(first, last, target, "try more --bits, a smaller --group or --asym", show)
    return {"layers": rows, "perplexity": {"before": first, "after": last, "growth": last / first - 1, "protocol": after["protocol"]["text"]}}


def _group(name: str, layer: linear.PackedLinear, target: Target, bits: int | None) -> tuple[int, str]:
    return (layer.group, "") if target.keeps(layer) else resolve_group(layer.in_features, target.quant(bits or layer.bits), name)


def project(loaded: load.Loaded, name: str, target: Target, group: int, bits: int | None = None) -> dict[str, Any]:
    """Replaces one packed layer by its projection onto even grids; returns its row, whose error is the norm of the change over that of the weight."""
    layer = loaded.model.get_submodule(name)
    assert isinstance(layer, linear.PackedLinear)
    held = layer.packed()
    exact = dense.dequantize(held)
    if target.keeps(layer):
        weight = integers.with_integers(held)
    else:
        with naming(name):
            weight, _ = rtn.pack(exact, None, target.quant(bits or held.bits), group, load.scale_dtype("auto", loaded.dtype))
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
