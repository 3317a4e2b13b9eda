"""`compressor eval`: several models on several texts and tasks, each beside a reference, nothing measured twice.

Every number is a measurement of its own with a key of its own in the cache (cache.py): perplexity of a model on a text, divergence from the
reference, the reference's floor on a text, sizes, a task. A model is loaded when the first of its measurements is missing and let go before the next
one is; the reference is loaded when a divergence or a floor is, and stays. So a call of which all is known reads files and loads nothing.

All models of a call are cut alike: without --window, into windows of what the smallest of them was made for, at most 2048. Perplexity counts
tokens: of models whose tokenizers differ it does not compare, which the document says ("tokens_differ"); a divergence between such is refused.

Whatever can be told without loading a model is told before anything is measured: files, tasks and their examples, hub tasks that do not answer,
windows, texts with nothing to predict, tokenizers that differ. A model that does not fit or does not predict shows only when its turn comes.

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
from compressor.pipelines import checkpoint, encoder_load, encoder_run, evaluate, load, tools
from compressor.pipelines.measure import cache, divergence, protocols
from compressor.pipelines.measure.protocols import Text
from compressor.pipelines.output import read_report
from compressor.pipelines.show import Show

SIZES = ("bits_per_weight", "folder_bytes", "ratio")
Cut = tuple[Tensor, Tensor, dict[str, int]]  # windows and targets int64 [count, window] each, and what was lost


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

    @classmethod
    def of(cls, name: str, device: str) -> "Side":
        folder = checkpoint.resolve(name)
        return cls(name, folder, checkpoint.read_config(folder), device)

    @cached_property
    def digest(self) -> str:
        return cache.model_digest(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        return load.load_tokenizer(self.folder)

    @cached_property
    def tokens_by(self) -> str:
        """Digest of what decides how a text becomes tokens: folders of one tokenizer share their windows."""
        paths = sorted({path for pattern in checkpoint.COMPANIONS for path in self.folder.glob(pattern) if path.is_file()})
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        return cache.digest({"type": self.config.get("model_type"), "files": files})

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


def text_key(text: Text) -> dict[str, Any]:
    """What a measurement depends on of a text; its name and that of its protocol are not among it."""
    numbers = {"window": text.window, "stride": text.stride, "max_tokens": text.max_tokens}
    return {"text": text.corpus.sha256, "documents": len(text.corpus.documents)} | numbers


def evaluate_all(asked: Asked, show: Show) -> dict[str, Any]:
    """The document of `compressor eval` (docs/evaluation.md). Raises UserError for what cannot be measured: before anything is, where that can be
    told without loading a model."""
    protocols.check(asked.window, asked.stride, asked.max_tokens)
    kinds = [encoder_load.is_encoder(checkpoint.any_config(checkpoint.resolve(name))) for name in asked.models]
    if any(kinds):
        return _encoders(asked, all(kinds), show)
    if asked.limit < 0 or asked.shots < 0:
        raise RecipeError(f"limit={asked.limit} and shots={asked.shots} must be 0 or more")
    if asked.tasks:
        from compressor.pipelines.measure import tasks

        tasks.check(asked.tasks)
        tasks.digest(asked.tasks, asked.shots)
    sides = [Side.of(name, asked.device) for name in asked.models]
    reference = None if asked.reference is None else Side.of(find_reference(asked.reference, sides), asked.device)
    everyone = [*sides, *([reference] if reference else [])]
    texts = _texts(asked, everyone)
    if reference:
        _same_vocabulary(sides, reference)
    job = Job(asked, texts, reference, show)
    job.check(sides)
    return job.go(sides)


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
        if (place / "config.json").is_file() and checkpoint.model_bytes(place) == wanted:
            return str(place)
    if source.count("/") == 1:
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(source, allow_patterns=checkpoint.FILES, local_files_only=True)
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
    cuts: dict[tuple[str, str], Cut] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache = cache.Cache(self.asked.cache, self.show)
        device = load.pick_device(self.asked.device)
        self.base = cache.base_key(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")

    def check(self, sides: list[Side]) -> None:
        """Raises for tasks whose data cannot be had, texts with nothing to predict, tokenizers that differ; not for what is known already."""
        unknown = [name for name in self.asked.tasks if any(self._known("task", side, self._task_key(name)) is None for side in sides)]
        if unknown:
            from compressor.pipelines.measure import tasks

            tasks.reach(unknown, self.asked.shots)
        for text in self.texts:
            if self.reference and self._known("floor", self.reference, text_key(text)) is None:
                self._cut(self.reference, text)
            for side in sides:
                if self._known("perplexity", side, text_key(text)) is None:
                    self._cut(side, text)
                if self._apart(side) and self._known("divergence", side, self._divergence_key(text)) is None:
                    self._same_tokens(side, text)

    def _cut(self, side: Side, text: Text) -> Cut:
        """Windows of a text by a model's tokenizer."""
        key = side.tokens_by, cache.digest(text_key(text))
        if key not in self.cuts:
            with _naming(text):
                ids, labels, lost = evaluate.tokens_of(text.corpus, side.tokenizer, text.window)
                self.cuts[key] = (*evaluate.cut(ids, labels, text.window, text.max_tokens, text.stride), lost)
        return self.cuts[key]

    def _same_tokens(self, side: Side, text: Text) -> None:
        reference = self.reference
        if reference and not all(torch.equal(*pair) for pair in zip(self._cut(side, text)[:2], self._cut(reference, text)[:2], strict=True)):
            names = f"{side.name} and {reference.name}"
            raise DataError(f"{text.corpus.name}: {names} cut it into different tokens: a divergence needs one tokenizer")

    def go(self, sides: list[Side]) -> dict[str, Any]:
        floors = [self._floor(self.reference, text) for text in self.texts] if self.reference else []
        models = []
        for side in sides:
            models.append(self._model(side))
            side.drop()
        known = all(each["floor"]["cached"] for each in floors) and all(model["cached"] for model in models)
        unlike = any(len({model["texts"][i]["tokens_sha256"] for model in models}) > 1 for i in range(len(self.texts)))
        models = [_flat(model) for model in models]
        document: dict[str, Any] = models[0] if len(models) == 1 else {"models": models}
        document |= {"cached": known} | ({"tokens_differ": True} if unlike else {})
        return document | ({"reference": _flat({"model": self.reference.name, "texts": floors})} if self.reference else {})

    def _model(self, side: Side) -> dict[str, Any]:
        texts = [self._text(side, text) for text in self.texts]
        tasks = {name: self._task(side, name) for name in self.asked.tasks}
        sizes = self._sizes(side)
        out: dict[str, Any] = {"model": side.name} | {key: sizes[key] for key in SIZES} | {"texts": texts} | ({"tasks": tasks} if tasks else {})
        parts = [sizes, *texts, *tasks.values(), *(text["divergence"] for text in texts if "divergence" in text)]
        return out | {"cached": all(part["cached"] for part in parts)}

    def _key(self, kind: str, side: Side, key: dict[str, Any]) -> dict[str, Any]:
        compute = torch.float32 if self.base["device"] == "cpu" else load.folder_dtype(checkpoint.stored_dtype(side.folder), side.config)
        return self.base | {"kind": kind, "model": side.digest, "compute": str(compute)} | key

    def _known(self, kind: str, side: Side, key: dict[str, Any]) -> dict[str, Any] | None:
        return self.cache.get(self._key(kind, side, key))

    def _get(self, kind: str, side: Side, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is known under a key, or what `make` finds out now; a floor that lacks a line is not kept, because another time there may be room."""
        known = self._known(kind, side, key)
        if known is None:
            found = make()
            known = self.cache.put(self._key(kind, side, key), found, keep="missing" not in found.get("rounding", ()))
        return known

    def _sizes(self, side: Side) -> dict[str, Any]:
        return self._get("sizes", side, {"sizes": cache.size_digest(side.folder)}, lambda: tools.sizes_of(side.loaded))

    def _task_key(self, name: str) -> dict[str, Any]:
        from compressor.pipelines.measure import tasks

        asked = self.asked
        return {"task": tasks.digest([name], asked.shots), "limit": asked.limit, "shots": asked.shots, "seed": asked.seed}

    def _task(self, side: Side, name: str) -> dict[str, Any]:
        from compressor.pipelines.measure import tasks

        asked = self.asked

        def make() -> dict[str, Any]:
            with self.show.task(f"{name}: {side.name}", 1) as advance:
                found = tasks.measure(
                    side.loaded, [name], asked.limit, asked.shots, asked.seed, lambda _, done, total: advance(0, f"{done} of {total} requests")
                )
                advance(1, "")
            return found[name]

        return self._get("task", side, self._task_key(name), make)

    def _text(self, side: Side, text: Text) -> dict[str, Any]:
        found = self._get("perplexity", side, text_key(text), lambda: self._perplexity(side, text))
        keys = ("perplexity", "loss", "tokens", "window", "stride", "tokens_per_second", "tokens_sha256", "cached", "measured")
        told = found["protocol"] | {"name": text.label} | text.about()
        out = {"data": text.corpus.name, "data_sha256": text.corpus.sha256} | {key: found[key] for key in keys} | {"protocol": told}
        reference = self.reference
        if reference is None or not self._apart(side):
            return out
        return out | {"divergence": self._get("divergence", side, self._divergence_key(text), lambda: self._divergence(side, reference, text))}

    def _apart(self, side: Side) -> bool:
        """Whether there is a reference, and this is another model."""
        return self.reference is not None and self.reference.digest != side.digest

    def _divergence_key(self, text: Text) -> dict[str, Any]:
        return text_key(text) | {"reference": self.reference.digest if self.reference else None}

    def _perplexity(self, side: Side, text: Text) -> dict[str, Any]:
        rows, targets, lost = self._cut(side, text)
        with _naming(text):
            with _bar(self.show, f"perplexity of {side.name}", len(rows)) as progress:
                found = evaluate.perplexity(side.loaded.model, rows, text.window, 0, None, progress, targets)
            found["stride"] = min(text.stride, rows.shape[1])
        cut = hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()[:16]
        told = evaluate.protocol(text.corpus, side.tokenizer, found, text.max_tokens) | lost
        return found | {"tokens_sha256": cut, "protocol": told}

    def _divergence(self, side: Side, reference: Side, text: Text) -> dict[str, Any]:
        rows, targets, _ = self._cut(side, text)
        with _naming(text):
            dense, model = reference.loaded.model, side.loaded.model
            with _bar(self.show, f"divergence of {side.name}", len(rows)) as progress, evaluate.evaluating(dense), evaluate.evaluating(model):
                forwards = divergence.forward_of(dense), divergence.forward_of(model)
                return divergence.compare(*forwards, rows, targets, side.loaded.device, progress)

    def _floor(self, reference: Side, text: Text) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            rows, targets, _ = self._cut(reference, text)
            with _naming(text):
                model, stored = reference.loaded.model, checkpoint.stored_dtype(reference.folder)
                with _bar(self.show, f"noise floor of {reference.name}", 2 * len(rows)) as progress, evaluate.evaluating(model):
                    return divergence.floor(model, stored, rows, targets, progress)

        found = self._get("floor", reference, text_key(text), make)
        return {"data": text.corpus.name, "perplexity": found["order"]["reference_perplexity"], "floor": found}


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    """What was found for a model or the reference; of one text or none the text's keys stand beside the model's."""
    texts = document["texts"]
    if len(texts) > 1:
        return document
    return {"model": document["model"]} | (texts[0] if texts else {}) | {key: value for key, value in document.items() if key != "texts"}


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
