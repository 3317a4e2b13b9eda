"""Encoders with the head of a task: loaded as they are, or given a fresh head for what the data asks.

A folder of *ForSequenceClassification, *ForTokenClassification or *ForQuestionAnswering keeps its head and the names of its classes; where it has
only LABEL_0 and the like, the data's names take their place, so that the written folder means the same to data that lack some of them. A bare
encoder (BertModel, *ForMaskedLM, *ForPreTraining) gets a head of the task, drawn from the seed, and the run says so. Nothing else may be random: a
folder that lacks weights of the body is an error; the pooler between body and head counts as head where the folder has none, as after masked-
language training.
Limits: one label a text (no regression, no several labels at once); architectures that transformers has with all three heads.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compressor.errors import DataError, ModelError, RecipeError
from compressor.pipelines import checkpoint, load, promises
from compressor.pipelines.encoder_data import Task
from compressor.prune import slicing

ENCODERS = ("bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra")  # model types
HEAD = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification", "question": "ForQuestionAnswering"}
BARE = ("Model", "ForMaskedLM", "ForPreTraining")
NAMELESS = re.compile(r"LABEL_\d+")  # what transformers calls a class that was given no name
LEAST = 16  # tokens of a question with a piece of its context


@dataclass
class Encoder:
    """A loaded encoder: what run and evaluation need beside the model."""

    loaded: load.Loaded
    kind: str  # sequence | token | question
    classes: dict[str, int]  # the data's names of labels -> the model's classes
    fresh: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def names(self) -> dict[int, str]:
        """The data's name of each class, or the model's where the data has none."""
        return {} if self.kind == "question" else own_names(self.loaded.config) | {i: name for name, i in self.classes.items()}


def architecture(config: dict[str, Any]) -> str:
    """The first name under architectures, empty if there is none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def own_names(config: dict[str, Any]) -> dict[int, str]:
    """The model's names of its classes. ModelError for an id2label that is no object of numbers and names."""
    given = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
    try:
        return {int(i): str(label) for i, label in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise ModelError(f"id2label in config.json is {str(given)[:60]}, not names by the numbers of their classes: correct it") from None


def is_encoder(config: dict[str, Any]) -> bool:
    """Whether a config.json is of an encoder that is pruned and tuned on labelled examples."""
    first = architecture(config)
    return config.get("model_type") in ENCODERS and first.endswith((*HEAD.values(), *BARE)) and not first.endswith("LMHeadModel")


def task_of(config: dict[str, Any]) -> str | None:
    """sequence, token or question for a model with such a head, None for a bare encoder; ModelError for a head that is no classifier."""
    name = architecture(config)
    kind = next((kind for kind, suffix in HEAD.items() if name.endswith(suffix)), None)
    problem, count = config.get("problem_type"), len(own_names(config))
    if kind in ("sequence", "token") and (problem in ("regression", "multi_label_classification") or config.get("num_labels") == 1 or count == 1):
        raise ModelError(
            f"{name} predicts {'several labels' if problem == 'multi_label_classification' else 'a number'}: only one class a text is supported"
        )
    return kind


def load_encoder(name: str, device: str, task: Task, seed: int) -> Encoder:
    """The encoder for a task. ModelError for a folder that lacks weights, DataError for data of another task than the model's."""
    folder = checkpoint.resolve(name)
    config = checkpoint.any_config(folder)
    if not is_encoder(config):
        raise ModelError(f"{folder} holds {architecture(config) or 'no named architecture'}, no encoder of {', '.join(ENCODERS)}")
    kind = task_of(config)
    if kind is not None and kind != task.kind:
        raise DataError(f"{task.name} holds examples for {HEAD[task.kind]}, and the model is {config['architectures'][0]}: give data of its task")
    if config.get("quantization_config") or config.get(slicing.WIDTHS):
        loaded = load.load_packed(folder, config, load.pick_device(device), name)
        return Encoder(loaded, task.kind, classes_of(config, task))
    return _dense(name, config, device, task, seed, fresh=kind is None)


def _dense(name: str, config: dict[str, Any], device: str, task: Task, seed: int, fresh: bool) -> Encoder:
    """A dense folder in float32, whatever it is stored in: all of it may be trained."""
    folder, where = checkpoint.resolve(name), load.pick_device(device)
    wanted = config | _head(config, task) if fresh else config
    promises.alone(folder)
    promises.check(folder, wanted)
    labels = {key: wanted[key] for key in ("id2label", "label2id") if fresh and key in wanted}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, info = load.auto_class(wanted).from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **labels
            )
    except Exception as error:  # configurations of strangers raise what they like
        raise ModelError(f"transformers cannot load {folder}: {load.first_line(error)}") from None
    random = sorted(info["missing_keys"])
    body = [key for key in random if not fresh or (key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in f".{key}")]
    if body:
        raise ModelError(f"{folder} lacks weights, they would be random: {', '.join(body[:3])}{' …' if len(body) > 3 else ''}")
    loaded = load.Loaded(model.to(where).eval(), load.load_tokenizer(folder), folder, name, wanted, checkpoint.stored_dtype(folder))
    classes = classes_of(wanted, task)
    _name_classes(loaded, classes)
    note = f"{config['architectures'][0]} has no head for this task: a fresh one was drawn from seed {seed} ({', '.join(random)})"
    return Encoder(loaded, task.kind, classes, fresh, [note] if fresh else [])


def _name_classes(loaded: load.Loaded, classes: dict[str, int]) -> None:
    """Give a head without names of its own those of the data."""
    own = own_names(loaded.config)
    config: Any = loaded.model.config
    if not classes or not all(NAMELESS.fullmatch(label) for label in own.values()):
        return
    names = own | {i: name for name, i in classes.items()}
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    loaded.config |= {"id2label": dict(names), "label2id": dict(config.label2id)}


def _head(config: dict[str, Any], task: Task) -> dict[str, Any]:
    """What config.json says with a head for the task: BertModel, BertForMaskedLM -> BertForSequenceClassification, and the names of the classes."""
    name = re.sub(rf"({'|'.join(BARE)})$", "", str(config["architectures"][0])) + HEAD[task.kind]
    if not task.labels:
        return {"architectures": [name]}
    return {"architectures": [name], "id2label": dict(enumerate(task.labels)), "label2id": {label: i for i, label in enumerate(task.labels)}}


def classes_of(config: dict[str, Any], task: Task) -> dict[str, int]:
    """The model's class of each name of the data: by name, or as a number, or, where the model has no names of its own, in order.

    DataError for data whose names are none of the model's, or two of which would be one class.
    """
    if task.kind == "question":
        return {}
    found = _aligned(own_names(config), task)
    if len(set(found.values())) < len(found):
        twice = [label for label in found if list(found.values()).count(found[label]) > 1]
        raise DataError(f"{task.name} has the labels {twice[0]!r} and {twice[1]!r}, which are one class of the model: write them alike")
    return found


def _aligned(own: dict[int, str], task: Task) -> dict[str, int]:
    for told in (str, str.lower):  # letter by letter, then whatever their case
        by_name = {told(label): i for i, label in own.items()}
        if len(by_name) == len(own) and all(told(label) in by_name for label in task.labels):
            return {label: by_name[told(label)] for label in task.labels}
    numbers = all(label.isdecimal() for label in own.values())  # which say themselves what they mean
    if not numbers and all(label.isdecimal() and int(label) in own for label in task.labels):
        return {label: int(label) for label in task.labels}
    if all(NAMELESS.fullmatch(label) for label in own.values()) and len(own) == len(task.labels):
        return dict(zip(task.labels, own, strict=True))
    raise DataError(
        f"{task.name} has the labels {', '.join(task.labels[:4])} and the model {', '.join(list(own.values())[:4])}: give data of its task"
    )


def max_length(config: dict[str, Any], kind: str, asked: int | None) -> int:
    """Tokens of a row: what was asked for, else 128, or 384 for questions, and never more than the model was made for."""
    offset = 2 if config.get("model_type") in ("roberta", "xlm-roberta", "camembert") else 0  # positions before the first token's
    positions = config.get("max_position_embeddings")
    most = {"max_position_embeddings": int(positions) - offset} if positions else {}
    length = load.context(most, asked, "seqlen") if asked is not None else min(load.context(most), 384 if kind == "question" else 128)
    if kind == "question" and length < LEAST:
        raise RecipeError(f"seqlen={length} has no room for a question and a piece of its context: give at least {LEAST}")
    return length
