"""The recipe of a run: everything that decides its result, in one frozen, checked, serialisable value.

Flags and YAML files build the same Recipe; the same dict lands in every output folder as recipe.yaml. `digest(upto)` fingerprints the part
that a stage depends on, so that a changed learning rate does not repeat the compression before it.
"""

import difflib
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, get_type_hints

from compressor import strict
from compressor.errors import RecipeError
from compressor.specs import means, parse_quant, parse_share, parse_size

STAGES = ("prune", "compress", "tune")
ROTATIONS = ("none", "heads", "hadamard", "learned")
KEPT = "kept"  # the packer of a model that is packed already, and tuned as it is


@dataclass(frozen=True)
class Quant:
    """How linears are packed. group -1 means one scale per row; scale_dtype, of scales and tables, follows the rule in docs/format.md if auto."""

    bits: int = 3
    packer: str = "gptq"
    group: int = 128
    symmetric: bool = True
    scale_dtype: str = "auto"  # auto | float16 | bfloat16 | float32
    shrink: bool = True  # search the clipping range that minimises the weight error (PEQA's initialisation)
    damp: float = 0.01  # GPTQ: share of the mean diagonal of H added to it; raised automatically when H is not positive definite
    act_order: bool = True  # GPTQ: columns by descending diagonal of H, with groups kept static
    sweeps: int = 1  # GPTQ: sweeps over the columns, each with the scales that the one before was refined to; 1: only the published one, refined
    gpr: int | None = None  # groups, or tables, per row; None: what `group` says, and one table a row
    start: str = "kmeans"  # sketches, before codes are chosen: kmeans | uniform, evenly spaced from the least to the largest weight
    exponent: float = 2.0  # sketches: k-means weighs column j by U[j, j]**-exponent, U the Cholesky factor of the inverse of H; 0: all alike
    feedback: bool = True  # sketches: codes by a sweep with error feedback; else each weight takes its nearest entry
    refit: bool = True  # sketches: tables by least squares under H given the codes, and codes given the tables
    passes: int = 2  # block, round: times that each block is trained on the calibration windows
    windows: int = 2  # block, round: windows an update
    rate: float = 0.02  # block, round: of an update of codes, in steps of the grid
    value_rate: float = 0.02  # block, round: of an update of scales, as a share of them, and of zeros, in steps
    rotate: str = "none"  # a change of basis merged into the weights before they are packed: heads, of values | hadamard, of all | learned
    end_to_end: int = 0  # passes over the calibration windows in which all scales, or tables, learn what the model before predicts; 0: none
    ignore: tuple[str, ...] = ()  # regular expressions of module names to leave dense
    layers: dict[str, str] = field(default_factory=dict)  # linears packed otherwise: name, or re:PATTERN -> w4g64, 2bit:rtn, 3bit:asym …; first wins

    def of(self, name: str) -> "Quant":
        """The options of the linear of this name: what `layers` says of it, on top of the others."""
        spec = next((spec for key, spec in self.layers.items() if means(key, name)), None)
        return self.but(spec) if spec is not None else self if not self.layers else replace(self, layers={})

    def but(self, spec: str) -> "Quant":
        """These options for all linears, with what a spec such as w4g64 says instead."""
        says = parse_quant(spec)
        return replace(self, **{"layers": {}, "gpr": None if "group" in says else self.gpr, **says})

    def kinds(self) -> "tuple[Quant, ...]":
        """The options that some linear may be packed by."""
        return (replace(self, layers={}), *(self.but(spec) for spec in dict.fromkeys(self.layers.values())))


@dataclass(frozen=True)
class Prune:
    """What is removed before linears are packed, and the training that goes with it; None: the method's own."""

    method: str = "none"  # loraprune | taylor | wanda | magnitude | depth | obert
    ratio: float = 0.0  # share of the prunable parameters (linears of the blocks) that goes
    pattern: str | None = None  # structured | unstructured | 4block | N:M
    unit: str = "auto"  # heads: group, a key and value head with its query heads; query, a query head in every group; auto, what fits the ratio
    estimate: str = "projected"  # LoRAPrune's gradient of W: projected, what the paths' gradients show of it; paper, the change of B A in a step
    parts: str | None = None  # a unit is scored by all its linears, as published, or by its gate, the last of them (LoRAPrune)
    multiple: int | None = None  # FFN channels are kept in multiples of this; None: 128, or 64 where there are fewer than 4096
    uniform: bool = True  # one width for all blocks, as config.json can say it; else each block gets its own, which only we load
    one_shot: bool = False  # all at once before training starts, instead of gradually
    steps: int | None = None  # training steps while and after pruning; overrides epochs; 0: none
    epochs: float = 2.0
    lr: float | None = None
    batch: int = 8
    accumulate: int = 1
    gradient_checkpointing: bool = False
    rank: int = 16  # of the LoRA paths that train and score
    alpha: float = 16.0  # their product is scaled by alpha / rank
    start: str = "inputs"  # of the paths: inputs, in the directions where these are strongest; random, as in the paper
    every: int = 10  # LoRAPrune: steps between prunes
    begin: float | None = None  # the ramp's first and last step, as shares of the steps; after the last nothing more goes and the model heals
    end: float | None = None
    initial: float | None = None  # oBERT: ratio of the first prune
    prunes: int = 7  # oBERT: prunes of the ramp, the learning rate starts again at each
    gradients: int = 256  # oBERT: mini-batch gradients of an inverse Fisher estimate
    recompute: int = 1  # oBERT: estimates a prune, each for a part of what it removes
    damp: float = 1e-7  # oBERT: added to the diagonal of the Fisher
    block: int | None = None  # oBERT: weights a block of the inverse Fisher
    joint: bool = True  # oBERT: what stays moves as is best for all that goes together; false: by the sum of lone moves, as published
    gradient_batch: int = 16  # encoders: examples of a mini-batch gradient
    distill: float = 1.0  # encoders: share of the dense model's answers in the loss while pruning and tuning
    temperature: float = 2.0  # encoders: of these answers


@dataclass(frozen=True)
class Finetune:
    """Encoders: training of the whole dense model on its task, before anything else; it is then reference and teacher."""

    when: str = "auto"  # auto, where the head is fresh | always | never
    steps: int | None = None  # overrides epochs
    epochs: float = 3.0
    lr: float = 5e-5
    batch: int = 32


@dataclass(frozen=True)
class Choose:
    """Packing every linear its own way, for a size or a loss; at most one of the first four is given, and without one `quant` holds for all."""

    target_bits: float | None = None  # bits a weight of the packed linears, at most
    target_size: int | None = None  # bytes of the folder, at most
    equal: bool = False  # at most the bits that `quant` alone comes to; a run puts their number in target_bits
    max_loss: float | None = None  # share by which packing may raise the perplexity of the domain; as few bytes as that takes
    candidates: tuple[str, ...] = ()  # ways to pack a linear, such as w3g64, on top of `quant`; none: 2, 3, 4 and 8 bits, groups of 32 to 128
    measure: str = "kl"  # of the damage: kl, of the logits when one group of linears is packed | error, of the linears' outputs, which runs no model
    windows: int = 8  # calibration windows that kl is measured on

    @property
    def active(self) -> bool:
        return self.equal or (self.target_bits, self.target_size, self.max_loss) != (None, None, None)


@dataclass(frozen=True)
class Data:
    """Texts: a local file, a hub dataset id, or a builtin name (see pipelines/data.py). None means the builtin python texts."""

    data: str | None = None  # tuning domain; its held-out part is the domain perplexity
    outside: str | None = None  # text from outside the domain, never tuned on
    calib: str | None = None  # calibration text of data-driven packers; None means the training part of the domain
    nsamples: int = 128  # calibration windows
    seqlen: int | None = None  # tokens a calibration or training window; None means min(2048, what the model was made for)
    activations: str = "auto"  # of calibration and evaluation, by blocks: memory | disk | recompute, anew for every block | auto: disk if many
    train_on_prompt: bool = False  # instruction data: whether the loss counts prompt tokens too


@dataclass(frozen=True)
class Tune:
    """The training loop. One optimiser step sees batch * accumulate windows."""

    method: str = "none"
    parametrization: str = "relative"  # relative: lr is on the change, a share of the scale or of its table's size; absolute: on the value (papers)
    epochs: float = 3.0
    steps: int | None = None  # overrides epochs
    lr: float | None = None  # None: the tuner's own for the parametrisation; runs put it here, see tune.resolved
    batch: int = 8
    accumulate: int = 1
    schedule: str = "cosine"  # cosine | linear | constant
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm; 0 turns clipping off
    checkpoint_every: int = 50  # steps
    eval_every: int = 50  # steps; 0 evaluates only at the end
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"  # adamw | adamw8bit, moments of 8 bits | paged-adamw | paged-adamw8bit, moments that move to the host: of bitsandbytes
    offload: str = "none"  # none | cpu: packed words wait in host memory and visit the GPU block by block
    shard: bool = False  # of several processes each keeps a part of embeddings and head (FSDP2)
    rank: int = 8  # adapters: of the low-rank path
    alpha: float = 16.0  # adapters: the product is scaled by alpha / rank
    dropout: float = 0.0  # adapters: of their inputs
    targets: str | None = None  # adapters: names of the linears that get one, by comma; None: all packed ones
    start: str = "zero"  # LoRA: zero, the product is 0 at first | residual | loftq | principal | eva: found while packing (docs/methods.md)
    adapter: str = "keep"  # keep, beside the packed base | absorb, by packing anew with it
    grid: str = "none"  # PEQA: scales stay on the two-level grid of a type of GGUF, q4_k | q3_k | q2_k, so that its export is exact
    distill: float = 0.0  # share of the dense model's predictions in the loss, beside the text
    distill_top: int = 64  # likeliest tokens of each prediction that are kept
    absorb_limit: float = 0.02  # absorbing may raise the perplexity of the domain by this share; beyond it the adapter stays


OPTIMIZERS = ("adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit")
AFTER = ("adapter", "absorb_limit")  # keys of Tune for what is done once it is trained


@dataclass(frozen=True)
class Eval:
    """Perplexity protocol: windows that do not overlap, every token of a window but its first is predicted."""

    window: int | None = None  # tokens; None means seqlen
    max_tokens: int = 65536  # stop after this many tokens of each text; 0 means the whole text
    tasks: tuple[str, ...] = ()  # files of questions, or tasks that lm-evaluation-harness knows by name, to measure accuracy on
    task_limit: int = 0  # questions of each; 0: all


@dataclass(frozen=True)
class Recipe:
    model: str = "tiny"
    seed: int = 42
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    memory: str = "auto"  # whole, the model in one piece | blocks, one block at a time in memory | auto: in one piece where it fits
    save: str = "folder"  # folder | task: only what the tuning moved, a file that goes with the folder of the same recipe untuned
    finetune: Finetune = field(default_factory=Finetune)
    prune: Prune = field(default_factory=Prune)
    quant: Quant = field(default_factory=Quant)
    choose: Choose = field(default_factory=Choose)
    data: Data = field(default_factory=Data)
    tune: Tune = field(default_factory=Tune)
    eval: Eval = field(default_factory=Eval)

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for YAML and JSON; `Recipe.from_dict` is the inverse."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        return _build(cls, values, "")

    def with_(self, **changes: Any) -> "Recipe":
        """A copy with changed keys, checked as a whole; keys of a section are written section__key."""
        top: dict[str, Any] = {}
        for key, value in changes.items():
            section, _, leaf = key.rpartition("__")
            top |= {section: replace(top.get(section, getattr(self, section)), **{leaf: value})} if section else {leaf: value}
        return replace(self, **top)

    def digest(self, upto: str = "tune") -> str:
        """Hex fingerprint of the keys that decide the result of stage `upto`, one of STAGES; texts and models are known by their content."""
        values = self.to_dict()
        data = values["data"]
        keys: dict[str, Any] = {"seed": self.seed, "seqlen": data["seqlen"]}
        if self.prune.method != "none":
            keys |= {"prune": values["prune"], "train_on_prompt": data["train_on_prompt"]}
        if STAGES.index(upto) >= STAGES.index("compress"):
            keys |= {"quant": values["quant"], "nsamples": data["nsamples"]}
            if upto == "compress":  # what is trained end to end is packed before
                keys["quant"].pop("end_to_end")
            keys |= {"choose": values["choose"]} if self.choose.active else {}
        if STAGES.index(upto) >= STAGES.index("tune"):
            idle = ("checkpoint_every", "eval_every", "offload", "shard", *AFTER)
            tune = {k: v for k, v in values["tune"].items() if k not in idle}
            keys |= {"tune": tune, "train_on_prompt": data["train_on_prompt"]}
        return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]


WORDS = {"choose.target_size": parse_size, "choose.max_loss": parse_share}  # keys that a file may say as flags do


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise RecipeError(f"recipe{where and ' section ' + where} must be a mapping of keys to values, not {type(values).__name__}")
    known = get_type_hints(cls)
    out = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise RecipeError(f"unknown recipe key {f'{where}.{key}' if where else key!r}{hint}")
        kind = known[key]
        if isinstance(kind, type) and is_dataclass(kind):
            out[key] = _build(kind, value, key)
        else:
            out[key] = _convert(value, kind, f"{where}.{key}" if where else key)
    return cls(**out)


def _convert(value: Any, kind: Any, where: str) -> Any:
    if isinstance(value, str) and where in WORDS:
        return WORDS[where](value)
    if kind in (float, float | None) and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except (ValueError, OverflowError):
            pass
    if kind == tuple[str, ...] and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if kind == dict[str, str] and isinstance(value, dict) and all(isinstance(v, str) for v in (*value, *value.values())):
        return dict(value)
    strings = {tuple[str, ...]: "a list of strings", dict[str, str]: "a mapping of strings to strings"}
    if kind in strings:
        raise RecipeError(f"recipe key {where} must be {strings[kind]}, not {value!r}")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        name = getattr(kind, "__name__", str(kind))
        raise RecipeError(f"recipe key {where} must be {name}, not {value!r}")
    return value


def _pruning_rules(p: Prune) -> list[tuple[bool, str]]:
    none = p.method == "none"
    return [
        (none or 0 < p.ratio < 1, f"prune.ratio={p.ratio} is a share of the parameters, above 0 and below 1"),
        (p.pattern in (None, "structured", "unstructured", "4block") or re.fullmatch(r"[1-9]\d*:[1-9]\d*", p.pattern) is not None,
         f"prune.pattern={p.pattern!r}: choose structured, unstructured, 4block or N:M such as 2:4"),
        (p.unit in ("auto", "group", "query"), f"prune.unit={p.unit!r}: choose auto, group or query"),
        (p.start in ("inputs", "random"), f"prune.start={p.start!r}: choose inputs or random"),
        (p.estimate in ("projected", "paper"), f"prune.estimate={p.estimate!r}: choose projected or paper"),
        (p.parts in (None, "all", "gate"), f"prune.parts={p.parts!r}: choose all or gate"),
        (p.multiple is None or p.multiple > 0, f"prune.multiple={p.multiple} must be positive"),
        (p.steps is None or p.steps >= 0, f"prune.steps={p.steps} must not be negative"),
        (0 < p.epochs < math.inf, f"prune.epochs={p.epochs} must be positive and finite"),
        (p.lr is None or 0 < p.lr < math.inf, f"prune.lr={p.lr} must be positive"),
        (min(p.batch, p.accumulate, p.rank, p.every, p.prunes) > 0, "prune: batch, accumulate, rank, every and prunes must be positive"),
        (0 < p.alpha < math.inf, f"prune.alpha={p.alpha} must be positive"),
        (0 <= (p.begin or 0) <= (1 if p.end is None else p.end) <= 1, f"prune.begin={p.begin} and end={p.end} are shares, in this order"),
        (p.initial is None or 0 <= p.initial <= p.ratio, f"prune.initial={p.initial} must be between 0 and the ratio, {p.ratio}"),
        (p.gradients > 0 and p.recompute > 0, f"prune.gradients={p.gradients} and recompute={p.recompute} must be positive"),
        (0 < p.damp < math.inf, f"prune.damp={p.damp} must be positive"),
        (p.block is None or p.block > 0, f"prune.block={p.block} must be positive"),
        (p.gradient_batch > 0, f"prune.gradient_batch={p.gradient_batch} must be positive"),
        (0 <= p.distill <= 1 and 0 < p.temperature < math.inf, "prune.distill is a share from 0 to 1, and prune.temperature positive"),
    ]  # fmt: skip


def _choosing_rules(c: Choose) -> list[tuple[bool, str]]:
    asked = [c.target_bits, c.target_size, c.max_loss]
    return [
        (sum(value is not None for value in asked) + c.equal < 2, "choose: give one of target_bits, target_size, equal and max_loss"),
        (all(value is None or 0 < value < math.inf for value in asked), "choose: target_bits, target_size and max_loss must be positive"),
        (c.measure in ("kl", "error"), f"choose.measure={c.measure!r}: choose kl or error"),
        (c.windows > 0, f"choose.windows={c.windows} must be positive"),
        (c.active or c == Choose(), "choose: nothing is chosen: give --target-bits, --target-size, --max-loss or --mix"),
    ]


def _training_rules(q: Quant, t: Tune) -> list[tuple[bool, str]]:
    return [
        (q.sweeps > 0, f"quant.sweeps={q.sweeps} must be positive"),
        (q.end_to_end >= 0, f"quant.end_to_end={q.end_to_end} must not be negative"),
        (q.passes > 0 and q.windows > 0, f"quant.passes={q.passes} and quant.windows={q.windows} must be positive"),
        (0 < q.rate < math.inf and 0 < q.value_rate < math.inf, f"quant.rate={q.rate} and quant.value_rate={q.value_rate} must be positive"),
        (q.rotate in ROTATIONS, f"quant.rotate={q.rotate!r}: choose {', '.join(ROTATIONS)}"),
        (0 <= t.distill <= 1 and t.distill_top > 0, f"tune.distill={t.distill} is a share from 0 to 1, and tune.distill_top positive"),
    ]


def _check(r: Recipe) -> None:
    q, d, t, e, f = r.quant, r.data, r.tune, r.eval, r.finetune
    rules = [
        *_pruning_rules(r.prune),
        *_choosing_rules(r.choose),
        (not (q.layers and r.choose.active), "quant.layers says how linears are packed, and so would the choice: leave one of them out"),
        (len(r.model) < 1024, f"model {r.model[:60]!r}… is no name: it has {len(r.model)} characters"),
        (f.when in ("auto", "always", "never"), f"finetune.when={f.when!r}: choose auto, always or never"),
        (f.steps is None or f.steps > 0, f"finetune.steps={f.steps} must be positive"),
        (0 < f.epochs < math.inf and 0 < f.lr < math.inf and f.batch > 0, "finetune.epochs, lr and batch must be positive"),
        (q.bits in (2, 3, 4, 8), f"bits={q.bits} is not supported; choose 2, 3 or 4, or 8 for scales"),
        (q.group == -1 or q.group > 0, f"group={q.group} is not a group size; give a positive number, or -1 for one scale per row"),
        (q.scale_dtype in ("auto", "float16", "bfloat16", "float32"), f"scale_dtype={q.scale_dtype!r}: choose auto, float16, bfloat16 or float32"),
        (q.gpr is None or q.gpr > 0, f"gpr={q.gpr} must be positive"),
        (q.start in ("kmeans", "uniform"), f"start={q.start!r}: choose kmeans or uniform"),
        (0 <= q.exponent < math.inf, f"exponent={q.exponent} must not be negative"),
        (0 < q.damp < math.inf, f"damp={q.damp} must be positive"),
        *_training_rules(q, t),
        (d.nsamples > 0, f"nsamples={d.nsamples} must be positive"),
        (d.seqlen is None or d.seqlen > 1, f"seqlen={d.seqlen} must be at least 2"),
        (t.parametrization in ("relative", "absolute"), f"parametrization={t.parametrization!r}: choose relative or absolute"),
        (t.schedule in ("cosine", "linear", "constant"), f"schedule={t.schedule!r}: choose cosine, linear or constant"),
        (r.memory in ("auto", "whole", "blocks"), f"memory={r.memory!r}: choose auto, whole or blocks"),
        (d.activations in ("auto", "memory", "disk", "recompute"), f"activations={d.activations!r}: choose auto, memory, disk or recompute"),
        (r.save in ("folder", "task"), f"save={r.save!r}: choose folder or task"),
        (r.save == "folder" or t.method != "none", "save=task keeps what a tuning moved, and nothing is tuned: add --tune, or leave --save out"),
        (0 <= r.seed < 1 << 31, f"seed={r.seed} must be from 0 to 2147483647"),
        (t.lr is None or 0 < t.lr < math.inf, f"lr={t.lr} must be positive"),
        (t.steps is None or t.steps > 0, f"steps={t.steps} must be positive"),
        (0 < t.epochs < math.inf, f"epochs={t.epochs} must be positive and finite"),
        (t.batch > 0 and t.accumulate > 0, f"batch={t.batch} and accumulate={t.accumulate} must be positive"),
        (0 <= t.warmup < 1, f"warmup={t.warmup} is a share of the steps, from 0 to below 1"),
        (0 <= t.clip < math.inf and 0 <= t.weight_decay < math.inf, "clip and weight_decay must not be negative"),
        (t.grid in ("none", "q4_k", "q3_k", "q2_k"), f"tune.grid={t.grid!r}: choose none, q4_k, q3_k or q2_k"),
        (t.optimizer in OPTIMIZERS, f"tune.optimizer={t.optimizer!r}: choose {', '.join(OPTIMIZERS)}"),
        (t.offload in ("none", "cpu"), f"tune.offload={t.offload!r}: choose none or cpu"),
        (t.offload == "none" or t.gradient_checkpointing,
         "tune.offload=cpu needs blocks that are computed anew going back, or all words would stay on the GPU: add --gradient-checkpointing"),
        (t.checkpoint_every > 0 and t.eval_every >= 0, "checkpoint_every must be positive and eval_every not negative"),
        (e.window is None or e.window > 1, f"window={e.window} must be at least 2"),
        (e.max_tokens >= 0, f"max_tokens={e.max_tokens} must not be negative"),
        (e.task_limit >= 0, f"task_limit={e.task_limit} must not be negative"),
    ]  # fmt: skip
    for fine, message in rules:
        if not fine:
            raise RecipeError(message)
    for section, values in asdict(r).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, float) and not math.isfinite(value):
                raise RecipeError(f"{section}.{key}={value} must be finite")
    for pattern in (*q.ignore, *(key[3:] for key in q.layers if key.startswith("re:"))):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise RecipeError(f"the pattern {pattern[:60]!r} is not a regular expression: {error}") from None
        if why := strict.tame(pattern):
            raise RecipeError(f"the pattern {pattern[:60]!r} could take for ever to match: {why}")
    for kind in (*q.kinds()[1:], *(q.but(spec) for spec in r.choose.candidates)):
        if kind.bits not in (2, 3, 4, 8) or (kind.group != -1 and kind.group < 1):
            raise RecipeError(f"w{kind.bits}g{kind.group} of quant.layers or choose.candidates cannot be: choose 2, 3, 4 or 8 bits and a group size")
