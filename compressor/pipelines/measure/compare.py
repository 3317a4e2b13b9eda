"""`compressor eval`: several models on several texts and tasks, each beside a reference, nothing measured twice.

Every number is a measurement of its own with a key of its own in the cache (cache.py): perplexity of a model on a text, divergence from the
reference, the reference's floor on a text, sizes, a task. A model is loaded when the first of its measurements is missing and let go before the next
one is; the reference is loaded when a divergence or a floor is, and stays. So a call of which all is known reads files and loads nothing.

All models of a call are cut alike: without --window, into windows of what the smallest of them was made for, at most 2048. Perplexity counts
tokens: of models whose tokenizers differ it does not compare, which the document says ("tokens_differ"); a divergence between such is refused.

Limits: encoders are measured on their own examples, one after the other, without cache and reference (encoder_run.py).
"""

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import DataError, ModelError, NumericError, RecipeError
from compressor.pipelines import encoder_load, encoder_run, evaluate, load, tools
from compressor.pipelines.measure import cache, divergence, protocols
from compressor.pipelines.measure.protocols import Text
from compressor.pipelines.output import read_report
from compressor.pipelines.show import Show

SIZES = ("bits_per_weight", "folder_bytes", "ratio")


@dataclass(frozen=True)
class Asked:
    """One call: models, data and protocols as named by the user, the rule for `data`, the reference, tasks, and where earlier measurements lie."""

    models: tuple[str, ...]
    data: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    window: int | None = None
    stride: int | None = None
    max_tokens: int = 0
    reference: str | None = None
    tasks: tuple[str, ...] = ()
    limit: int = 0
    shots: int = 0
    seed: int = 42
    device: str = "auto"
    cache: Path | None = None  # None keeps nothing


@dataclass
class Side:
    """A model of the call, in memory from the first `loaded` to `drop`."""

    name: str
    folder: Path
    config: dict[str, Any]
    device: str
    held: load.Loaded | None = None
    cuts: dict[str, tuple[Tensor, Tensor, dict[str, int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, device: str) -> "Side":
        folder = load.resolve(name)
        return cls(name, folder, load.read_config(folder), device)

    @cached_property
    def digest(self) -> str:
        return cache.model_digest(self.folder)

    @property
    def loaded(self) -> load.Loaded:
        if self.held is None:
            self.held = load.load(self.name, self.device)
        return self.held

    def drop(self) -> None:
        if self.held is not None:
            self.held = None
            gc.collect()
            if load.pick_device(self.device).type == "cuda":
                torch.cuda.empty_cache()

    def cut(self, text: Text) -> tuple[Tensor, Tensor, dict[str, int]]:
        """(rows, targets, what was lost) of a text by this model's tokenizer: int64 [count, window] each."""
        key = cache.digest(text_key(text))
        if key not in self.cuts:
            ids, labels, lost = evaluate.tokens_of(text.corpus, self.loaded.tokenizer, text.window)
            self.cuts[key] = (*evaluate.cut(ids, labels, text.window, text.max_tokens, text.stride), lost)
        return self.cuts[key]


def text_key(text: Text) -> dict[str, Any]:
    """What a measurement depends on of a text; its name and that of its protocol are not among it."""
    numbers = {"window": text.window, "stride": text.stride, "max_tokens": text.max_tokens}
    return {"text": text.corpus.sha256, "documents": len(text.corpus.documents)} | numbers


def evaluate_all(asked: Asked, show: Show) -> dict[str, Any]:
    """The document of `compressor eval` (docs/evaluation.md). Raises UserError for what cannot be measured, before anything is."""
    protocols.check(asked.window, asked.stride, asked.max_tokens)
    kinds = [encoder_load.is_encoder(load.any_config(load.resolve(name))) for name in asked.models]
    if any(kinds):
        return _encoders(asked, all(kinds), show)
    if asked.tasks:
        from compressor.pipelines.measure import tasks

        tasks.check(asked.tasks)
    if asked.limit < 0 or asked.shots < 0:
        raise RecipeError(f"limit={asked.limit} and shots={asked.shots} must be 0 or more")
    sides = [Side.of(name, asked.device) for name in asked.models]
    reference = None if asked.reference is None else Side.of(find_reference(asked.reference, sides), asked.device)
    everyone = [*sides, *([reference] if reference else [])]
    texts = _texts(asked, everyone)
    if reference:
        _same_vocabulary(sides, reference)
    return Job(asked, texts, reference, show).go(sides)


def _encoders(asked: Asked, all_are: bool, show: Show) -> dict[str, Any]:
    if not all_are:
        raise RecipeError("encoders are measured on labelled examples and language models on texts: give one kind in a call")
    for flag, given in (("protocol", asked.protocols), ("reference", asked.reference), ("tasks", asked.tasks), ("stride", asked.stride)):
        if given:
            raise RecipeError(f"--{flag} means nothing to an encoder, which is measured on labelled examples: leave it out")
    if len(asked.data) != 1:
        raise RecipeError("an encoder is measured on labelled examples: give them with --data")
    found = [encoder_run.evaluate_encoder(name, asked.data[0], asked.device, show, asked.window) for name in asked.models]
    return found[0] if len(found) == 1 else {"models": found}


def find_reference(name: str, sides: list[Side]) -> str:
    """The name of the reference; "auto": what the reports of the folders name, if it lies here."""
    if name != "auto":
        return name
    told = {str(source): side for side in sides if (source := (read_report(side.folder).get("model") or {}).get("source"))}
    if len(told) != 1:
        what = f"the reports name {', '.join(told)}" if told else "no folder has a report.json that names one"
        raise RecipeError(f"--reference auto finds no single dense model: {what}; give --reference FOLDER")
    (source, side), *_ = told.items()
    if source == "tiny":
        return source
    wanted = read_report(side.folder)["model"].get("dense_bytes")
    for place in (side.folder.parent / source, Path(source)):
        if (place / "config.json").is_file() and load.model_bytes(place) == wanted:
            return str(place)
    if source.count("/") == 1:
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(source, allow_patterns=load.FILES, local_files_only=True)
        except (OSError, ValueError):  # LocalEntryNotFoundError is both; a name that is none is a ValueError
            pass
    raise RecipeError(f"{side.name} was made from {source}, which is neither beside it nor fetched already; give --reference FOLDER")


def _same_vocabulary(sides: list[Side], reference: Side) -> None:
    for side in sides:
        one, other = (each.config.get("vocab_size") for each in (side, reference))
        if one != other:
            raise ModelError(f"{side.name} knows {one} tokens and the reference {reference.name} {other}: a divergence needs one vocabulary")


def _texts(asked: Asked, sides: list[Side]) -> list[Text]:
    """What to measure on, read; every window checked against every model first."""
    fixed = [*(source for source in asked.data if protocols.is_protocol(source)), *asked.protocols]
    own = [source for source in asked.data if not protocols.is_protocol(source)]
    if not fixed and not own and (asked.reference or not asked.tasks):
        own = ["python"]
    if not own and (flag := next((f for f in ("window", "stride") if getattr(asked, f) is not None), None)):
        raise RecipeError(f"--{flag} says how to cut a text of --data, and there is none; a protocol has its own")
    for source in fixed:
        _check_window(source.partition("=")[0], sides)
    window = min(load.context(side.config, asked.window) for side in sides) if own else 0
    protocols.check(window or None, asked.stride, asked.max_tokens)
    texts = [protocols.plain(source, window, asked.stride, asked.max_tokens) for source in own]
    return texts + [protocols.read(source, asked.max_tokens) for source in fixed]


def _check_window(name: str, sides: list[Side]) -> None:
    """RecipeError if a protocol is unknown, or its windows are longer than what a model was made for."""
    wanted = protocols.fixed(name).window
    for side in sides:
        try:
            load.context(side.config, wanted)
        except RecipeError:
            raise RecipeError(
                f"{name} has windows of {wanted} tokens, more than {side.name} was made for: give a text with --data and --window"
            ) from None


@dataclass
class Job:
    """The measurements of one call."""

    asked: Asked
    texts: list[Text]
    reference: Side | None
    show: Show

    def __post_init__(self) -> None:
        self.cache = cache.Cache(self.asked.cache, self.show)
        device = load.pick_device(self.asked.device)
        self.base = cache.base_key(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")

    def go(self, sides: list[Side]) -> dict[str, Any]:
        floors = [self._floor(self.reference, text) for text in self.texts] if self.reference else []
        models = []
        for side in sides:
            models.append(self._model(side))
            side.drop()
        one = len(models) == 1
        floors_known = all(each["floor"]["cached"] for each in floors)
        document: dict[str, Any] = models[0] if one else {"models": models}
        document["cached"] = floors_known and all(model["cached"] for model in models)
        if any(len({model["texts"][i]["tokens_sha256"] for model in models}) > 1 for i in range(len(self.texts))):
            document["tokens_differ"] = True
        if self.reference:
            document["reference"] = {"model": self.reference.name, "texts": floors}
        return _flat(document) if one and len(self.texts) <= 1 else document

    def _model(self, side: Side) -> dict[str, Any]:
        texts = [self._text(side, text) for text in self.texts]
        tasks = {name: self._task(side, name) for name in self.asked.tasks}
        sizes = self._sizes(side)
        out: dict[str, Any] = {"model": side.name} | {key: sizes[key] for key in SIZES} | {"texts": texts} | ({"tasks": tasks} if tasks else {})
        parts = [sizes, *texts, *tasks.values(), *(text["divergence"] for text in texts if "divergence" in text)]
        return out | {"cached": all(part["cached"] for part in parts)}

    def _get(self, kind: str, side: Side, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is known under a key, or what `make` finds out now."""
        compute = torch.float32 if self.base["device"] == "cpu" else load.folder_dtype(load.stored_dtype(side.folder), side.config)
        full = self.base | {"kind": kind, "model": side.digest, "compute": str(compute)} | key
        return self.cache.get(full) or self.cache.put(full, make())

    def _sizes(self, side: Side) -> dict[str, Any]:
        return self._get("sizes", side, {"sizes": cache.size_digest(side.folder)}, lambda: tools.sizes_of(side.loaded))

    def _task(self, side: Side, name: str) -> dict[str, Any]:
        from compressor.pipelines.measure import tasks

        asked = self.asked
        key = {"task": tasks.digest([name], asked.shots), "limit": asked.limit, "shots": asked.shots, "seed": asked.seed}

        def make() -> dict[str, Any]:
            with self.show.task(f"{name}: {side.name}", 1) as advance:
                found = tasks.measure(
                    side.loaded, [name], asked.limit, asked.shots, asked.seed, lambda _, done, total: advance(0, f"{done} of {total} requests")
                )
                advance(1, "")
            return found[name]

        return self._get("task", side, key, make)

    def _text(self, side: Side, text: Text) -> dict[str, Any]:
        found = self._get("perplexity", side, text_key(text), lambda: self._perplexity(side, text))
        keys = ("perplexity", "loss", "tokens", "window", "stride", "tokens_per_second", "tokens_sha256", "cached", "measured")
        told = found["protocol"] | {"name": text.label} | text.about()
        out = {"data": text.corpus.name, "data_sha256": text.corpus.sha256} | {key: found[key] for key in keys} | {"protocol": told}
        reference = self.reference
        if reference is None or reference.digest == side.digest:
            return out
        key = text_key(text) | {"reference": reference.digest}
        return out | {"divergence": self._get("divergence", side, key, lambda: self._divergence(side, reference, text))}

    def _perplexity(self, side: Side, text: Text) -> dict[str, Any]:
        with _naming(text):
            rows, targets, lost = side.cut(text)
            with _bar(self.show, f"perplexity of {side.name}", len(rows)) as progress:
                found = evaluate.perplexity(side.loaded.model, rows, text.window, 0, None, progress, targets)
            found["stride"] = min(text.stride, rows.shape[1])
        cut = hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()[:16]
        told = evaluate.protocol(text.corpus, side.loaded.tokenizer, found, text.max_tokens) | lost
        return found | {"tokens_sha256": cut, "protocol": told}

    def _divergence(self, side: Side, reference: Side, text: Text) -> dict[str, Any]:
        with _naming(text):
            rows, targets, _ = side.cut(text)
            if not all(torch.equal(one, other) for one, other in zip(side.cut(text)[:2], reference.cut(text)[:2], strict=True)):
                raise DataError(f"{side.name} and {reference.name} cut it into different tokens: a divergence needs one tokenizer")
            dense, model = reference.loaded.model, side.loaded.model
            with _bar(self.show, f"divergence of {side.name}", len(rows)) as progress, evaluate.evaluating(dense), evaluate.evaluating(model):
                forwards = divergence.forward_of(dense), divergence.forward_of(model)
                return divergence.compare(*forwards, rows, targets, side.loaded.device, progress)

    def _floor(self, reference: Side, text: Text) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            with _naming(text):
                rows, targets, _ = reference.cut(text)
                model, stored = reference.loaded.model, load.stored_dtype(reference.folder)
                with _bar(self.show, f"noise floor of {reference.name}", 2 * len(rows)) as progress, evaluate.evaluating(model):
                    return divergence.floor(model, stored, rows, targets, progress)

        found = self._get("floor", reference, text_key(text), make)
        return {"data": text.corpus.name, "perplexity": found["order"]["reference_perplexity"], "floor": found}


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    """The document of one model on one text or none: the text's keys beside the model's, the floor beside the reference's name."""
    texts, reference = document["texts"], document.get("reference")
    out = {key: value for key, value in document.items() if key not in ("texts", "reference")}
    out = {"model": out["model"]} | (texts[0] if texts else {}) | out
    return out if reference is None else out | {"reference": {"model": reference["model"]} | reference["texts"][0]}


@contextmanager
def _naming(text: Text) -> Iterator[None]:
    """Errors name the text that they are about."""
    try:
        yield
    except (DataError, NumericError) as error:
        raise type(error)(f"{text.corpus.name}: {error}") from None


@contextmanager
def _bar(show: Show, label: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of windows; what it yields takes (windows done, windows in all), of one pass after the other."""
    with show.task(label, total) as advance:
        before = 0

        def progress(done: int, _total: int) -> None:
            nonlocal before
            advance(done - before if done > before else done, "")
            before = done

        yield progress
