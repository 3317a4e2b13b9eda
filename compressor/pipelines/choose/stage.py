"""The stage of a run that packs by a target instead of one width for all: measure every unit's options, choose, pack, see what was reached.

For a target of loss the packed model is measured, and the model packed again from the dense one, until the loss is near the target and within it
(choice.py). A model that this run has pruned cannot be loaded anew: its first packing stands, and a note says so if it lost more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.errors import RecipeError
from compressor.pipelines import checkpoint, compress, data, estimate, load, pruning, rotating, write
from compressor.pipelines.choose import sensitivity
from compressor.pipelines.choose.choice import PARTS, Choice, overhead, vocabulary, ways
from compressor.pipelines.job import digest
from compressor.pipelines.journal import Journal
from compressor.pipelines.measure import divergence
from compressor.pipelines.methods import check_methods
from compressor.pipelines.packers import trains, untrained
from compressor.recipe import KEPT, Choose, Quant, Recipe
from compressor.rotate import merge

UNITS = 4 / 7  # units a linear, where q, k, v and gate, up read the same input

if TYPE_CHECKING:
    from compressor.pipelines.run import Run


def check(recipe: Recipe) -> None:
    """RecipeError, before any work, for a target that this recipe cannot have, or a candidate that its tuner or its pruning could not go on with."""
    if not recipe.choose.active:
        return
    if recipe.quant.packer in ("none", KEPT):
        raise RecipeError("a target says how to pack, and nothing is packed: add --quant, for example 3bit, or leave the target out")
    if recipe.choose.max_loss is not None and recipe.choose.measure != "kl":
        raise RecipeError("choose.max_loss is counted in nats, which measure=error does not know: leave choose.measure at kl")
    for way in ways(recipe.quant, recipe.choose).values():
        check_methods(recipe.with_(quant=way, choose=Choose()))
        if recipe.prune.method != "none" and pruning.sparse(recipe.prune):
            compress.check_keep_zeros(way)


def kinds(recipe: Recipe) -> tuple[Quant, ...]:
    """The options that some linear may be packed by, candidates of a choice among them."""
    return (*recipe.quant.kinds(), *(ways(recipe.quant, recipe.choose).values() if recipe.choose.active else ()))


def check_size(recipe: Recipe, model: nn.Module, fixed: int, folder: torch.dtype) -> None:
    """RecipeError, before anything is measured, for a target below what the smallest of the candidates come to; model: a shell will do."""
    plans = [compress.plan(model, way).packed() for way in ways(recipe.quant, recipe.choose).values()]
    bits = [[estimate.stored_bits(recipe, [target], folder) for target in plan] for plan in plans]  # [candidates, linears]
    least, weights = sum(map(min, zip(*bits, strict=True))), sum(t.shape[0] * t.shape[1] for t in plans[0])
    asked, size = recipe.choose.target_bits, recipe.choose.target_size
    if asked is not None and least > asked * weights:
        raise RecipeError(f"target_bits={asked:g} is below the {least / weights:.3f} bits a weight that the smallest candidates take: ask for more")
    if size is not None and fixed + least / 8 > size:
        raise RecipeError(f"target_size={size:,} bytes is below the {fixed + -(-least // 8):,} that the smallest candidates come to: ask for more")


def cost(recipe: Recipe, estimated: Callable[[Recipe], dict[str, Any]], forward: float) -> dict[str, Any]:
    """What a run will cost whose widths are still to be chosen: sizes are those of the target; of a target of loss, of the largest candidate.

    estimated: costs of a recipe without a choice; forward: seconds that the windows of the sample take through the model.
    """
    plain, options = recipe.with_(choose=Choose()), ways(recipe.quant, recipe.choose).values()
    each = [estimated(plain.with_(quant=way)) for way in options]
    measured = [estimated(plain.with_(quant=untrained(way))) if trains(way) else row for way, row in zip(options, each, strict=True)]
    found = sorted(each, key=lambda row: row["bits_per_weight"])
    asked, size = recipe.choose.target_bits, recipe.choose.target_size
    fits = [row for row in found if row["bits_per_weight"] <= (asked or math.inf) and row["folder_bytes"] <= (size or math.inf)]
    if not fits:
        least = f"{found[0]['bits_per_weight']:.3f} bits per weight, {found[0]['folder_bytes']:,} bytes"
        raise RecipeError(f"the target is below the smallest of the candidates ({least}): ask for more")
    seconds = sum(row["seconds"]["compress"] for row in measured)
    if recipe.choose.measure == "kl":
        seconds += forward * len(found) * found[0]["packed_layers"] * UNITS
    best = fits[-1] | {"seconds": fits[-1]["seconds"] | {"choose": round(seconds, 1)}}
    best["notes"] = [*best["notes"], "which linear gets how many bits is found in the run; sizes are those allowed, and will be a little less"]
    return best | _between(best, found[len(fits)], asked, size) if len(fits) < len(found) else best


def _between(low: dict[str, Any], high: dict[str, Any], bits: float | None, size: int | None) -> dict[str, Any]:
    """Sizes at the target, from those of the candidates below and above it: bytes grow in proportion to bits."""
    key, target = ("bits_per_weight", bits) if bits is not None else ("folder_bytes", size)
    if target is None or high[key] <= low[key]:
        return {}
    share = (target - low[key]) / (high[key] - low[key])
    folder = low["folder_bytes"] + share * (high["folder_bytes"] - low["folder_bytes"])
    told = {"bits_per_weight": low["bits_per_weight"] + share * (high["bits_per_weight"] - low["bits_per_weight"]), "folder_bytes": round(folder)}
    return told | {"ratio": low["ratio"] * low["folder_bytes"] / folder}


def pack(run: Run, loaded: load.Loaded, ids: torch.Tensor, journal: Journal) -> load.Loaded:
    """Choose, pack and measure; the packed model, which is another than the one given where it had to be loaded again."""
    probe, choice = _probed(run, loaded, ids, journal)
    settled = journal.get("chosen", run.key_packed)
    while True:
        quant = choice.quant() if settled is None else choice.settle(settled)
        run.show.say(f"chosen: {_counts(quant)}; predicted {_told(choice.predicted(), choice)}")
        key = digest(run.key_compress, sorted(quant.layers.items()))
        run.pack(loaded, ids, key, journal, quant)
        run.measured("packed", digest(run.key_packed, key), loaded, journal)
        before = run.report.pruned or run.report.dense
        rise = math.log(run.report.packed["domain"]["perplexity"] / before["domain"]["perplexity"])
        if settled is not None or run.recipe.choose.max_loss is None or run.prunes or not choice.learn(rise):
            break
        run.show.say(f"perplexity grew by {math.expm1(rise):.2%}; packing again")
        loaded = run.read()
        rotating.rotate(run, loaded, journal)
    journal.put("chosen", run.key_packed, choice.state())
    run.key_tune, run.key_tuned = digest(run.key_tune, key), digest(run.key_tuned, key)  # checkpoints belong to this mix
    run.report.choice = choice.facts() | {"reached": {"perplexity_rise": math.expm1(rise)}}
    if probe is not None:
        near = probe.compare(loaded.model)
        run.report.choice["sample"] = {key: near[key] for key in ("windows", "tokens")}
        run.report.choice["reached"]["loss"] = near["mean"]
    wanted = run.recipe.choose.max_loss
    if wanted is not None and math.expm1(rise) > wanted:
        run.report.notes.append(f"packing raised the perplexity by {math.expm1(rise):.2%}, more than the {wanted:.2%} that were asked for")
        run.show.say(run.report.notes[-1])
    return loaded


def _probed(run: Run, loaded: load.Loaded, ids: torch.Tensor, journal: Journal) -> tuple[divergence.Sample | None, Choice]:
    """The dense model's logits on a sample, for kl, and the choice with all its units measured."""
    recipe, probe = run.recipe, None
    if recipe.choose.measure == "kl":
        text = data.calibration(run.calib, loaded.tokenizer, run.seqlen, 1 << 60, recipe.seed)  # all windows
        count = sensitivity.windows(recipe.choose, run.seqlen, vocabulary(loaded.model))
        probe = divergence.Sample(loaded.model, sensitivity.sample(text, ids, count))
    candidates, todo = ways(recipe.quant, recipe.choose), compress.plan(loaded.model, recipe.quant)
    names, dtype = [t.name for t in todo.packed()], load.scale_dtype(recipe.quant.scale_dtype, loaded.dtype)
    work = journal.subfolder("damage", digest(run.key_damage, sorted(candidates)))
    damage = None if probe is None else partial(sensitivity.kl, loaded.model, probe)
    with run.stage("choose"), run.show.task("choose", len(names) * len(candidates)) as advance:
        units = sensitivity.measure(loaded.model, todo, candidates, dtype, ids, damage, work, advance, run.sparse)
    return probe, Choice(recipe.choose, recipe.quant, units, fixed_bytes(recipe, loaded, len(candidates)), len(candidates))


def fixed_bytes(recipe: Recipe, loaded: load.Loaded, schemes: int) -> int:
    """Bytes of the folder, adapter included, beside what the packed linears store, if they are packed in so many ways."""
    todo = compress.plan(loaded.model, recipe.quant).packed()
    names = [t.name for t in todo]
    dense = [name for name in write.dense_tensors(loaded) if name.removesuffix(".weight") not in set(names)]
    rest = write.tensor_bytes(loaded) - sum(t.shape[0] * t.shape[1] for t in todo) * loaded.dtype.itemsize
    total = recipe.choose.target_size or checkpoint.model_bytes(loaded.folder)
    parts = PARTS + any(not way.symmetric for way in ways(recipe.quant, recipe.choose).values())  # zeros
    rest += merge.added(loaded.model, recipe.quant.rotate) * loaded.dtype.itemsize
    return rest + overhead(names, dense, total, schemes, parts) + estimate.added(recipe.tune, todo).bytes


def _counts(quant: Quant) -> str:
    """Linears by way: 12 w3g128, 4 w2g64."""
    specs = list(quant.layers.values())
    return ", ".join(f"{specs.count(spec)} linears {spec}" for spec in sorted(set(specs)))


def _told(point: dict[str, Any], choice: Choice) -> str:
    loss = f", KL {point['loss']:.4f} nats a token" if choice.options.measure == "kl" else ""
    slow = "" if choice.answer is None or math.isfinite(choice.answer.gap) else " (the solver found nothing in its time: the smallest options stand)"
    return f"{point['bits_per_weight']:.3f} bits per weight, {point['folder_bytes'] / 1e6:,.2f} MB{loss}{slow}"
