"""Random recipes from the valid grid, and random tiny models for them: what bench/soak.py runs.

VALUES says for every key of the recipe what may be drawn; a key that recipe.py has and neither VALUES nor FIXED knows is an error, so that a new key
is soaked, too. The methods are those of the product's own registries. A recipe is drawn section by section: first the method, then keys that
the method heeds, each changed with probability CHANGED; with probability STRAY one key of any section gets any of its values. What does not
fit together is left to the product's own checks, which say so in a sentence before any work.
"""

import json
import random
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from pydoc_data import topics
from typing import Any, get_type_hints

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForSequenceClassification, BertTokenizerFast
from transformers.utils.logging import disable_progress_bar

from compressor.integrations.peft import KINDS
from compressor.pipelines import checkpoint, encoder_prune, pruning, write
from compressor.pipelines.packers import PACKERS
from compressor.pipelines.tuners import OWN, TUNERS
from compressor.prune.obert import SCORES
from compressor.quant.starts import STARTS
from compressor.recipe import KEPT, OPTIMIZERS, Prune, Recipe
from compressor.tune.kgrid import GRIDS

CHANGED, STRAY = 0.3, 0.06
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox")
ENCODER, TINY = "bert", "tiny"
WORDS = ("good", "fine", "lovely", "bad", "dull", "awful", "the", "film", "story", "was", "and", "actor", "plot", "of", "a", ".")
FIXED = {"model", "device", "data.data", "data.outside", "data.calib", "eval.tasks"}  # given by the soak itself, not drawn
LAYERS = ({}, {"re:(down_proj|dense_4h_to_h|output.dense)$": "w4g32"}, {"re:mlp|intermediate": "2bit:rtn"}, {"re:nothing": "3bit"})
VALUES: dict[str, tuple[Any, ...]] = {
    "seed": (0, 1, 42, 2**31 - 1), "save": ("folder", "folder", "folder", "task"),
    "memory": ("auto", "whole", "blocks"), "data.activations": ("auto", "memory", "disk", "recompute"),
    "quant.bits": (2, 3, 4, 8), "quant.packer": (*PACKERS, "none"), "quant.group": (-1, 16, 32, 64, 128), "quant.symmetric": (True, False),
    "quant.scale_dtype": ("auto", "float16", "bfloat16", "float32"), "quant.shrink": (True, False), "quant.damp": (1e-3, 0.01, 0.1, 1.0),
    "quant.act_order": (True, False), "quant.sweeps": (1, 2, 3), "quant.gpr": (None, 1, 2, 4),
    "quant.start": ("kmeans", "uniform"), "quant.exponent": (0.0, 1.0, 2.0, 4.0),
    "quant.feedback": (True, False), "quant.refit": (True, False), "quant.ignore": ((), ("v_proj",), (r"layers\.0\.", "query")),
    "quant.layers": LAYERS, "quant.passes": (1, 2), "quant.windows": (1, 2, 3), "quant.rate": (1e-3, 0.02, 0.5), "quant.value_rate": (1e-3, 0.1),
    "quant.rotate": ("none", "none", "heads", "hadamard", "learned"), "quant.end_to_end": (0, 0, 1, 2),
    "prune.method": pruning.METHODS, "prune.ratio": (0.2, 0.34, 0.5, 0.7),
    "prune.pattern": (None, "structured", "unstructured", "4block", "2:4"), "prune.unit": ("auto", "group", "query"),
    "prune.estimate": ("projected", "paper"), "prune.parts": (None, "all", "gate"), "prune.multiple": (8, 16, 32), "prune.uniform": (True, False),
    "prune.one_shot": (True, False), "prune.steps": (6, 9), "prune.epochs": (1.0,), "prune.lr": (None, 1e-3), "prune.batch": (1, 2),
    "prune.accumulate": (1, 2), "prune.gradient_checkpointing": (True, False), "prune.rank": (1, 4), "prune.alpha": (1.0, 16.0),
    "prune.start": ("inputs", "random"), "prune.every": (1, 3), "prune.begin": (None, 0.1), "prune.end": (None, 0.8), "prune.initial": (None, 0.1),
    "prune.prunes": (1, 2), "prune.gradients": (4, 8), "prune.recompute": (1, 2), "prune.damp": (1e-7, 1e-3), "prune.block": (None, 8, 16),
    "prune.joint": (True, False), "prune.gradient_batch": (2, 4), "prune.distill": (0.0, 0.5, 1.0), "prune.temperature": (1.0, 2.0),
    "finetune.when": ("auto", "always", "never"),
    "finetune.steps": (2, 4), "finetune.epochs": (1.0,), "finetune.lr": (1e-4,), "finetune.batch": (2, 4),
    "choose.target_bits": (3.0, 3.6, 5.0), "choose.equal": (True,), "choose.target_size": (200_000, 900_000), "choose.max_loss": (0.05, 1.0),
    "choose.candidates": (("w2g32", "w4g32"), ("w3g32", "w4g64", "w8g32"), ("2bit", "4bit")), "choose.measure": ("kl", "error"),
    "choose.windows": (1, 2),
    "data.nsamples": (2, 5), "data.seqlen": (32, 48, 64), "data.train_on_prompt": (True, False),
    "tune.method": tuple(TUNERS), "tune.parametrization": ("relative", "absolute"), "tune.epochs": (0.5,), "tune.steps": (2, 3),
    "tune.lr": (None, 1e-3),
    "tune.batch": (1, 2), "tune.accumulate": (1, 2), "tune.schedule": ("cosine", "linear", "constant"), "tune.warmup": (0.0, 0.5),
    "tune.weight_decay": (0.0, 0.1), "tune.clip": (0.0, 1.0), "tune.checkpoint_every": (1, 50), "tune.eval_every": (0, 1),
    "tune.gradient_checkpointing": (True, False), "tune.rank": (1, 2, 8), "tune.alpha": (1.0, 16.0), "tune.dropout": (0.0, 0.1),
    "tune.targets": (None, "q_proj", "q_proj,down_proj", "query,value"), "tune.start": ("zero", *STARTS), "tune.adapter": ("keep", "absorb"),
    "tune.optimizer": ("adamw", "adamw", *OPTIMIZERS), "tune.offload": ("none", "none", "cpu"), "tune.shard": (False, False, False, True),
    "tune.distill": (0.0, 0.0, 0.5, 1.0), "tune.distill_top": (1, 8, 64),
    "tune.grid": ("none", *GRIDS), "tune.absorb_limit": (0.02, 100.0),
    "eval.window": (None, 32, 64), "eval.max_tokens": (100, 257), "eval.task_limit": (0, 2),
}  # fmt: skip
SHORT = {
    "prune.steps",
    "prune.batch",
    "prune.gradients",
    "prune.multiple",
    "prune.rank",
    "prune.prunes",
    "prune.gradient_batch",
}  # drawn where heeded


def keys() -> list[str]:
    """Every key of the recipe, those of a section as section.key."""
    out = []
    for name, kind in get_type_hints(Recipe).items():
        out += [f"{name}.{f.name}" for f in fields(kind)] if is_dataclass(kind) else [name]
    return out


def unknown() -> list[str]:
    """Keys of the recipe that nothing is drawn for."""
    return [key for key in keys() if key not in VALUES and key not in FIXED]


def draw(rng: random.Random, kind: str, model: Path | str, place: Path, kept: bool = False) -> dict[str, Any]:
    """A recipe as a mapping for a model of this kind; kept: it is packed already, and is to be tuned."""
    encoder = kind == ENCODER
    text = rng.choice(("labels.tsv",) if encoder else ("notes.txt", "notes.txt", "rows.jsonl"))
    out: dict[str, Any] = {
        "model": str(model),
        "device": rng.choice(("auto", "cpu")),
        "seed": rng.choice(VALUES["seed"]),
        "data": {"data": str(place / text)},
    }
    prunes = not kept and rng.random() < 0.35
    packs = not kept and (not prunes or rng.random() < 0.6)
    tunes = kept or (packs and rng.random() < 0.6)
    if prunes:
        out["prune"] = _pruning(rng, encoder)
    out["quant"] = {"packer": KEPT if kept else "none"} if not packs else _packing(rng)
    if packs and not encoder and rng.random() < 0.12:
        target = rng.choice(("target_bits", "target_bits", "target_size", "max_loss", "equal"))
        out["choose"] = {target: _any(rng, f"choose.{target}"), "candidates": list(_any(rng, "choose.candidates")), "windows": 1}
        out["choose"] |= _changed(rng, "choose", {"measure"})
    if tunes:
        out["tune"] = _tuning(rng, bool(packs and PACKERS[out["quant"]["packer"]].table))
        if not encoder and rng.random() < 0.15:
            out["save"] = "task"
    out["data"] |= {"nsamples": _any(rng, "data.nsamples"), "seqlen": _any(rng, "data.seqlen")}
    if encoder:
        out["data"].pop("nsamples") if not packs else None
        out["finetune"] = {"when": rng.choice(("auto", "always")), "steps": _any(rng, "finetune.steps"), "batch": 4}
    else:
        out["data"]["outside"] = str(place / "notes.txt")
        out["eval"] = {"max_tokens": _any(rng, "eval.max_tokens")} | _changed(rng, "eval", {"window"})
        if not prunes and "choose" not in out and rng.random() < 0.3:
            out["memory"] = _any(rng, "memory")
            out["data"] |= _changed(rng, "data", {"activations"})
        if rng.random() < 0.08:
            out["eval"] |= {"tasks": [str(place / "questions.jsonl")], "task_limit": 2}
    if rng.random() < STRAY:
        key = rng.choice([key for key in VALUES if "." in key])
        section, _, leaf = key.partition(".")
        out[section] = out.get(section, {}) | {leaf: _any(rng, key)}
    return json.loads(json.dumps(out))


def _any(rng: random.Random, key: str) -> Any:
    return rng.choice(VALUES[key])


def _changed(rng: random.Random, section: str, heeded: set[str]) -> dict[str, Any]:
    """Some of these keys with values of the grid, always those that keep a run short."""
    return {leaf: _any(rng, f"{section}.{leaf}") for leaf in sorted(heeded) if f"{section}.{leaf}" in SHORT or rng.random() < CHANGED}


def _packing(rng: random.Random) -> dict[str, Any]:
    packer = rng.choice(tuple(PACKERS))
    heeds = PACKERS[packer].heeds - {"packer", "bits", "layers", "ignore"}
    if "gpr" in heeds and "group" in heeds:
        heeds -= {rng.choice(("gpr", "group", "gpr"))}
    quant = {"packer": packer, "bits": rng.choice((2, 3, 4, 4, 8) if not PACKERS[packer].table else (2, 3, 4))} | _changed(rng, "quant", heeds)
    if rng.random() < 0.15:
        quant["layers"] = _any(rng, "quant.layers")
    return quant | ({"ignore": list(_any(rng, "quant.ignore"))} if rng.random() < 0.15 else {})


def _pruning(rng: random.Random, encoder: bool) -> dict[str, Any]:
    method = rng.choice(SCORES if encoder else pruning.METHODS)
    patterns = VALUES["prune.pattern"] if method in SCORES else (None, "structured")
    options = Prune(method=method, ratio=_any(rng, "prune.ratio"), pattern=rng.choice(patterns))
    options = replace(options, ratio=0.5) if options.pattern == "2:4" else options
    heeded = (encoder_prune if encoder else pruning).heeded(options) - {"epochs"}
    return {"method": method, "ratio": options.ratio, "pattern": options.pattern} | _changed(rng, "prune", heeded)


def _tuning(rng: random.Random, table: bool) -> dict[str, Any]:
    fitting = [name for name, kind in TUNERS.items() if kind.table in (None, table)]
    method = rng.choice([name for name in fitting if name not in KINDS] * 4 + fitting)
    shared = {key.partition(".")[2] for key in VALUES if key.startswith("tune.")} - {"method", "epochs", "steps", "batch", *OWN}
    shared -= {"parametrization"} if method in KINDS else set()
    own = set(getattr(TUNERS[method], "heeds", ())) - {"absorb_limit"}
    tune = {"method": method, "steps": _any(rng, "tune.steps"), "batch": _any(rng, "tune.batch")} | _changed(rng, "tune", shared | own)
    tune |= {"rank": 2} if "rank" in own and rng.random() < 0.7 else {}
    return tune | ({"absorb_limit": 100.0} if tune.get("adapter") == "absorb" else {})


def make(rng: random.Random, kind: str, folder: Path) -> Path:
    """A random model of this kind and of a random tiny shape as a folder; `tiny` is its own."""
    if kind == TINY:
        return checkpoint.TINY
    disable_progress_bar()
    torch.manual_seed(rng.randrange(1 << 30))
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    heads, width = rng.choice((2, 4)), rng.choice((64, 128))
    shape: dict[str, Any] = {
        "vocab_size": 2176, "hidden_size": width, "intermediate_size": rng.choice((96, 128, 192, 256)), "num_hidden_layers": rng.choice((1, 2, 3)),
        "num_attention_heads": heads, "max_position_embeddings": 128, "initializer_range": 0.1,
    }  # fmt: skip
    if kind == ENCODER:
        model = BertForSequenceClassification(BertConfig(**shape | {"vocab_size": len(WORDS) + 5}))
        model.to(dtype).save_pretrained(folder)
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        BertTokenizerFast(vocab={word: i for i, word in enumerate(names)}, model_max_length=64).save_pretrained(folder)
        return folder
    more = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": rng.random() < 0.5}
    more |= {} if kind == "gpt_neox" else {"num_key_value_heads": rng.choice((heads // 2, heads)), "head_dim": width // heads}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | more)).to(dtype).save_pretrained(folder)
    write.copy_companions(checkpoint.TINY, folder)
    return folder


def texts(place: Path) -> None:
    """The texts of all runs: prose, pairs, questions, and labelled sentences."""
    prose = "\n\n".join(topics.topics[name] for name in sorted(topics.topics)[:6])[:24_000]
    place.mkdir(parents=True, exist_ok=True)
    (place / "notes.txt").write_text(prose, "utf-8")
    rows = [{"prompt": f"After {i} comes", "completion": f" {i + 1}."} for i in range(200)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    asked = [{"question": f"What comes after {i}?", "choices": [str(i), str(i + 1)], "answer": 1} for i in range(4)]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), "utf-8")
    draw, lines = random.Random(0), ["sentence\tlabel"]
    for i in range(80):
        lines.append(" ".join([draw.choice(WORDS[6:]) for _ in range(4)] + [draw.choice(WORDS[:3] if i % 2 else WORDS[3:6])]) + f"\t{i % 2}")
    (place / "labels.tsv").write_text("\n".join(lines) + "\n", "utf-8")
