"""The pruning stage of a run on a causal language model: train low-rank paths, remove units on the way, cut them out at the end.

`plan` says before any work which widths the model will get; `prune` does it. What is left is an ordinary dense model, also when the base was packed:
its low-rank paths are folded in, and the stages that follow pack it anew.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, RecipeError
from compressor.linear import block_weights, find_blocks, linears, packed_linears
from compressor.pipelines import checkpoint, estimate, journal, load, surgery
from compressor.pipelines.methods import check_heeded
from compressor.prune import lowrank, obert, slicing
from compressor.prune.depth import DepthPruner, kept_blocks
from compressor.prune.importance import IMPORTANCES, PaperGradients
from compressor.prune.loraprune import STEPS_BEFORE, UnitPruner
from compressor.prune.obert import SCORES
from compressor.prune.schedule import Ramp, shares
from compressor.prune.unit_masks import UnitMasks
from compressor.prune.units import Family, families, shape
from compressor.prune.widths import Widths, check_near, choose, multiple_of, prunable, shape_notes
from compressor.recipe import Prune, Tune
from compressor.tune.batches import Batches, CausalLM
from compressor.tune.loop import OnStep, train
from compressor.tune.state import TrainLog

LR = 0.64  # of the low-rank paths, over the hidden size: 5e-3 at 128, as measured (docs/log.md), and near the paper's 1e-4 at 4096
BEGIN, END = 0.05, 0.3  # the ramp, as shares of the steps: on small budgets healing pays more than going slowly
PACKED_BASE = "the base was packed; what is left of it is dense, and larger than it was unless it is packed again"
PARTS = {"loraprune": "gate"}  # what a unit is scored by, where it is not all its linears
METHODS = (*IMPORTANCES, "depth", "obert")


@dataclass(frozen=True)
class Plan:
    """What a model will look like: widths, or a number of blocks; `ratio` is the share of prunable parameters that goes."""

    method: str
    asked: float
    ratio: float
    prunable: int
    blocks: int
    widths: Widths | None = None

    def facts(self) -> dict[str, Any]:
        """For report and dry run."""
        shape = {} if self.widths is None else {"unit": self.widths.unit, "heads": self.widths.heads, "ffn": self.widths.ffn}
        return {"method": self.method, "asked": self.asked, "ratio": self.ratio, "prunable": self.prunable, "blocks": self.blocks} | shape


def plan(model: nn.Module, options: Prune) -> Plan:
    """The shape that the options ask for; works on a model without weights. RecipeError and ModelError with the reason if it cannot be."""
    if options.method not in METHODS:
        raise RecipeError(f"pruning method {options.method!r} is unknown for a causal language model; choose {', '.join(METHODS)}")
    if sparse(options) and options.method not in SCORES:
        raise RecipeError(f"{options.method} removes whole units, not the pattern {options.pattern}: use obert, or leave the pattern out")
    check_heeded(options, heeded(options))
    count = len(find_blocks(model)[1])
    if sparse(options):
        weights = block_weights(model)
        obert.check(weights, obert.Settings.of(options), options.ratio)
        total = sum(w.numel() for w in weights.values())
        return Plan(options.method, options.ratio, options.ratio, total, count)
    if options.method != "obert" and options.steps is not None and options.steps < 2:
        raise RecipeError(f"prune.steps={options.steps} leaves nothing to score units by: give at least a few steps")
    if options.method == "depth":
        total = sum(math.prod(shape(layer)) for layer in _all_linears(find_blocks(model)[1]))
        kept = kept_blocks(count, options.ratio)
        return Plan(options.method, options.ratio, 1 - kept / count, total, kept)
    total = prunable(model)
    if not options.uniform and options.unit == "query":
        raise RecipeError("query heads go by as many from every group and block: leave out --unit query, or --per-layer")
    unit = options.unit if options.uniform else "group"
    widths = choose(model, options.ratio, unit, multiple(model, options), lambda queries, keys: heads_fit(model, queries, keys))
    check_near(widths, options.ratio, "choose another ratio, or a smaller --multiple")
    return Plan(options.method, options.ratio, widths.ratio, total, count, widths)


def _all_linears(blocks: nn.Module) -> list[nn.Module]:
    return [*linears(blocks).values(), *packed_linears(blocks).values()]


def multiple(model: nn.Module, options: Prune) -> int:
    """What the FFN's width is to be a multiple of."""
    return options.multiple or multiple_of(families(model)[1].count)


def heads_fit(model: Any, queries: int, keys: int) -> bool:
    """Whether a model of this class, built from its configuration with so many heads, would have heads of the size they have now."""
    config, heads = model.config, families(model)[0]
    size = heads.parts[1].width  # rows of a key head
    attention = model.get_submodule(heads.gate.name.rpartition(".")[0])
    if any(p.numel() in (part.width * heads.count for part in heads.parts[:2]) and p.numel() > size for _n, p in own_parameters(attention)):
        return False  # a norm over all heads: without some of them it would not be the same
    layers = {"num_hidden_layers": 1} | ({"layer_types": config.layer_types[:1]} if getattr(config, "layer_types", None) else {})
    values = config.to_dict() | layers | {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": size}
    try:
        with torch.device("meta"):
            small = families(type(model)(type(config)(**values)))[0]
    except Exception:  # configurations check with errors of many kinds; each means that such a model cannot be loaded
        return False
    return (small.count, small.parts[0].width, small.parts[1].width) == (keys, queries // keys * size, size)


def own_parameters(attention: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters of an attention module that are of none of its linears."""
    inside = tuple(f"{name}." for name, m in attention.named_modules() if name and hasattr(m, "in_features"))
    return [(name, p) for name, p in attention.named_parameters() if not name.startswith(inside or ("-",))]


def heeded(options: Prune) -> set[str]:
    """The keys of Prune that say something to a method on causal language models."""
    if options.method == "obert" or sparse(options):
        own = {"damp", "block", "gradients", "recompute", "joint"} if options.method == "obert" else set()
        return own | {"one_shot"} | ({"unit", "multiple"} if options.pattern == "structured" else set())
    train = {"steps", "epochs", "lr", "batch", "accumulate", "gradient_checkpointing", "rank", "alpha", "start", "every", "begin", "end", "one_shot"}
    if options.method == "depth":
        return train
    return train | {"unit", "multiple", "uniform", "parts"} | ({"estimate"} if options.method == "loraprune" else set())


def rate(model: Any, options: Prune) -> float:
    """The learning rate of the low-rank paths."""
    return options.lr or LR / model.config.hidden_size


def training(options: Prune) -> Tune:
    """The options of the training loop that heals while pruning."""
    return Tune(
        method="prune", steps=options.steps or None, epochs=options.epochs, lr=options.lr, batch=options.batch, accumulate=options.accumulate,
        gradient_checkpointing=options.gradient_checkpointing, schedule="linear", warmup=0.03, eval_every=0,
    )  # fmt: skip


def steps(options: Prune, objective: CausalLM, seed: int) -> int:
    """Steps of the training loop; 1 for methods that have none."""
    if options.method == "obert" or sparse(options):
        return 1
    return Batches(objective, training(options), seed).steps


def tokens(options: Prune, objective: CausalLM, seed: int, model: nn.Module) -> int:
    """Tokens that pass through the model, forward and back, while it is pruned."""
    length = objective.ids.shape[1]
    if options.method == "obert" or sparse(options):
        passes = len(find_blocks(model)[1]) * (2 if sparse(options) else 1)
        return 0 if options.method != "obert" else passes * options.recompute * options.gradients * length
    return steps(options, objective, seed) * options.batch * options.accumulate * length


def sparse(options: Prune) -> bool:
    """Whether single weights go, and not whole units."""
    return options.pattern not in (None, "structured") or (options.method == "obert" and options.pattern is None)


def shell_after(source: Path, options: Prune) -> nn.Module:
    """The model as it will be, without weights (meta device). Errors as those of `plan`."""
    model = estimate.shell(source)
    todo = plan(model, options)
    if checkpoint.read_config(source).get("quantization_config"):
        check_packed(source.name, options)
    if todo.widths is not None:
        units = families(model, todo.widths.unit)
        slicing.cut(model, units, {f.key: _first(f, todo.widths.kept(f)) for f in units}, torch.float32)
    elif not sparse(options):
        slicing.drop_blocks(model, range(todo.blocks))
    return model


def check_packed(name: str, options: Prune) -> None:
    """ModelError for what cannot prune a packed model."""
    if sparse(options) or options.method in ("obert", "taylor"):
        raise ModelError(f"{name} is packed, and codes have no gradient: prune whole units of it by loraprune, wanda or magnitude, or by depth")


def _first(family: Family, kept: int) -> Tensor:
    """A mask that keeps so many units, as many of every run of `within`."""
    run = family.within or family.count
    return torch.arange(family.count) % run < kept * run // family.count


def prune(
    loaded: load.Loaded,
    options: Prune,
    objective: CausalLM,
    seed: int,
    folder: Path | None = None,
    fingerprint: str = "",
    on_step: OnStep | None = None,
) -> tuple[dict[str, Any], TrainLog]:
    """Prune the loaded model in place, healing it on the objective's windows; returns facts for the report and the log of the training.

    Errors as those of `plan` and of the training loop.
    """
    model, dtype = loaded.model, torch.float32 if loaded.device.type == "cpu" else loaded.dtype
    todo, options = plan(model, options), replace(options, lr=rate(model, options))
    packed = bool(packed_linears(model))
    if packed:
        check_packed(loaded.name, options)
    if options.method == "obert" or sparse(options):
        return _surgery(loaded, options, todo, objective, seed, folder)
    paths = lowrank.attach(model, options.rank, options.alpha, seed)
    if options.start == "inputs":
        lowrank.align(model, paths, objective.ids)
    total = steps(options, objective, seed)
    ramp = _ramp(options, total)
    pruner = _pruner(model, options, todo, paths, ramp, objective.ids)
    try:
        log = train(model, lowrank.parameters(paths), objective, training(options), seed, folder, fingerprint, None, on_step, pruner)
        pruner.prune(ramp.end)  # what a dropped last step undid
    finally:
        pruner.detach()
    pruner.finish(model, dtype)
    loaded.follow_config()
    extra = {"widths": loaded.config[slicing.WIDTHS]} if loaded.config.get(slicing.WIDTHS) else {}
    log.notes += [PACKED_BASE] * packed + shape_notes(model, todo.asked, todo.ratio)
    facts = todo.facts() | extra | {"packed_base": packed, "trainable": sum(p.numel() for p in lowrank.parameters(paths).values())}
    return facts | {"steps": total, "lr": options.lr, "last_prune": ramp.end, "tokens": sum(row["tokens"] for row in log.curve)}, log


def _surgery(loaded: load.Loaded, options: Prune, todo: Plan, objective: CausalLM, seed: int, folder: Path | None) -> tuple[dict[str, Any], TrainLog]:
    """oBERT, and magnitude by its patterns: all at once, without training."""
    again = folder is not None and journal.kept_facts(folder / surgery.DONE) is not None
    if todo.widths is None:
        facts, said = surgery.single_weights(loaded.model, options, objective, seed, folder)
    else:
        facts, said = {}, surgery.whole_units(loaded.model, options, todo.widths, objective, seed, folder)
        said = [*said, *shape_notes(loaded.model, todo.asked, todo.ratio)]
        loaded.follow_config()
    if options.method == "obert":
        facts |= {"gradients": options.gradients, "recompute": options.recompute, "damp": options.damp, "joint": options.joint}
    return todo.facts() | facts, TrainLog(0, notes=said, resumed_from=int(again))


def _ramp(options: Prune, total: int) -> Ramp:
    """Prunes from `begin` to `end`; in one shot all at once, when a few steps have been scored."""
    if total < 2:
        raise RecipeError("one step of pruning leaves nothing to score units by: give more steps, or more text")
    if options.one_shot:
        return Ramp(STEPS_BEFORE, min(STEPS_BEFORE, total - 1), 1)
    begin, end = shares(options, BEGIN, END)
    last = min(max(round(end * total), 1), total - 1)
    return Ramp(min(round(begin * total), last), last, options.every)


def _pruner(model: nn.Module, options: Prune, todo: Plan, paths: dict[str, lowrank.LowRank], ramp: Ramp, ids: Tensor) -> UnitPruner | DepthPruner:
    """The pruner of whole blocks, or of heads and FFN channels, with its masks on the model."""
    if todo.widths is None:
        return DepthPruner(model, todo.blocks, ids, replace(ramp, every=1) if options.one_shot else ramp)
    units, kept = families(model, todo.widths.unit), todo.widths.kept
    kind = PaperGradients if options.method == "loraprune" and options.estimate == "paper" else IMPORTANCES[options.method]
    gate, chunk = (options.parts or PARTS.get(options.method)) == "gate", {"ffn": multiple(model, options)}
    return UnitPruner(paths, units, UnitMasks(model, units), {f.key: kept(f) for f in units}, kind(paths), ramp, options.uniform, chunk, gate)
