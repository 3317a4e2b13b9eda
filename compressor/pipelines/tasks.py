"""Task files of loaded models: written, swapped in, taken out of a folder, made a folder of again (export/task.py, docs/tasks.md).

A swap copies values into the tensors that the layers already hold, so codes, addresses and whatever was compiled on them stay; only the first zeros
in floats, and an adapter of another shape, come in new tensors (integrations/attach.py). Every file is judged for the base's own values
(pipelines/bases.py), which come back before a task of another kind goes in, so one model in memory serves tasks of every kind in turn. Limit: the
layers change one after the other; a forward pass meanwhile sees some of both.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from safetensors import SafetensorError
from torch import Tensor, nn

from compressor import strict
from compressor.errors import ModelError, OutputError, RecipeError
from compressor.export import merge, task
from compressor.integrations import attach, peft
from compressor.linear import PackedLinear
from compressor.packed import PackedWeight, zeros_as_floats
from compressor.pipelines import bases, checkpoint, load
from compressor.pipelines.bases import MOVED, base_digest, marks
from compressor.pipelines.digests import RECORD
from compressor.pipelines.job import source_name
from compressor.pipelines.journal import claimed, unclaim
from compressor.pipelines.output import TASK_FILE, check_writable, read_report
from compressor.pipelines.pages.parts import clean
from compressor.pipelines.report import plain
from compressor.recipe import Recipe

TUNERS = ("peqa", "table", "qalora", *peft.KINDS)  # those that move what a task file holds
TOLD = """A task file: what a tuning moved of {model}, without the model. With compressor {version}:

    compressor apply BASE {file} -o FOLDER

writes the tuned model. BASE is the packed folder that the recipe beside this file gives without `tune` and `save`{others}.

The license and the terms of use of the base model apply.
"""
OTHERS = {  # bases that a file of a kind fits beside the untuned one
    "scale": ", or any of which a tuning moved the scales alone",
    "table": ", or any of which a tuning moved the tables",
    "zero": ", or any of which a tuning moved the zeros alone; where scales were tuned it is another base",
    task.ADAPTER: ", with another adapter beside it or with none; where scales, tables or zeros were tuned it is another base",
}


def line(text: object) -> str:
    """A name, which may be a stranger's, for one line of a terminal or of a file that people read."""
    return clean(" ".join(str(text).split()))


def cell(text: object) -> Text:
    """The same for a table: brackets in it are no markup."""
    return Text(line(text))


def file_of(path: Path) -> Path:
    """The task file that a path means: itself, or that in the folder of a run with `--save task`."""
    return path / TASK_FILE if (path / TASK_FILE).is_file() and not (path / "config.json").exists() else path


def held(packed: Mapping[str, PackedWeight], kind: str) -> dict[str, Tensor]:
    """What a task of this kind of these weights holds, by module; zeros as floats, whatever they are. Nothing for adapters, which are no weights."""
    if kind == task.ADAPTER:
        return {}
    if kind == "zero":
        return {name: zeros_as_floats(weight.learned, weight.zero, weight.bits) for name, weight in packed.items()}
    return {name: weight.learned for name, weight in packed.items()}


def check(recipe: Recipe) -> None:
    """RecipeError for a run that is to keep a task file alone and moves what none holds."""
    if recipe.save != "task":
        return
    tune = recipe.tune
    if tune.method not in TUNERS:
        raise RecipeError(f"save=task keeps scales, tables, zeros or an adapter, and tuner {tune.method} moves more than that: leave --save out")
    if tune.method == "qalora" and tune.targets is not None:
        raise RecipeError(f"save=task keeps the zeros of all layers, and targets={tune.targets} tunes those of some: leave --targets or --save out")
    if tune.adapter == "absorb":
        raise RecipeError("adapter=absorb changes codes, which no task file holds: leave --adapter or --save out")
    if tune.start != "zero":
        raise RecipeError(f"start={tune.start} changes codes, so the base of the task would be no untuned folder: leave --start or --save out")


def about(folder: Path, name: str) -> dict[str, Any]:
    """What a task file says beside its values: the model's name, and what tuned it with perplexities, from the folder's report, or, where `apply`
    wrote it, from the tasks that it holds."""
    report, held = read_report(folder), applied(folder)
    section = lambda key: value if isinstance(value := report.get(key), dict) else {}
    out: dict[str, Any] = {"model": str(section("model").get("name") or source_name(name))}
    if held:
        first = {key: held[0].get(key) for key in ("recipe", "metrics") if isinstance(held[0].get(key), dict)}
        parts = [{key: each[key] for key in ("file", "recipe", "metrics") if key in each} for each in held]
        total = {"recipe": {"merge": {"method": "sum", "weights": [1.0] * len(held)}, "tasks": parts}}
        told: dict[str, Any] = plain({"model": str(held[0].get("model") or out["model"])} | (first if len(held) == 1 else total), "apply", [])
        return told
    recipe = task.finite(section("recipe").get("tune"))
    if not section("tuned") or recipe.get("method") == "none":
        return out
    found = {key: value.get("perplexity") for key, value in section("tuned").items() if key in ("domain", "outside") and isinstance(value, dict)}
    return out | {"recipe": recipe, "metrics": task.finite(found)}


def applied(folder: Path) -> list[dict[str, Any]]:
    """The headers of the tasks that `apply` put into a folder; none for other folders."""
    try:
        record = strict.read(folder / RECORD)
    except (OSError, ValueError):
        return []
    found = record.get("tasks") if isinstance(record, dict) and record.get("to") == "apply" else None
    return found if isinstance(found, list) and all(isinstance(each, dict) for each in found) else []


def notes(loaded: load.Loaded) -> list[str]:
    """What must be known of a base that changes are counted from."""
    if not applied(loaded.folder) and "recipe" not in about(loaded.folder, loaded.name):
        return []
    return [f"{loaded.name} was itself tuned, so changes are counted from its tuned values: name the untuned folder to count from that"]


def new_file(path: Path, loaded: load.Loaded | None = None) -> None:
    """OutputError unless a file may be written there: nothing stands there, and it is outside the folder of the model."""
    if os.path.lexists(path) or not path.name:
        unclaim(path)
        raise OutputError(f"{path} already exists; choose another file with -o")
    check_writable(path)
    if loaded is not None:
        outside(path, loaded)


def outside(place: Path, loaded: load.Loaded) -> None:
    """OutputError for an output inside the model's own folder, which would then hold what is not of it."""
    if loaded.folder.resolve() in place.resolve().parents:
        raise OutputError(f"{place} lies inside the model's own folder {loaded.folder}; choose another place with -o")


def save(
    loaded: load.Loaded, path: Path, told: dict[str, Any], values: dict[str, Tensor] | None = None, kind: str | None = None,
    config: attach.Config | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write values, by default those of the model, as a task file, which must not exist; returns its header, size and place. `told`: see `about`.

    An adapter that is attached is what the file holds. kind: of given values, by default that of the model's; config: of an adapter's.
    """
    if kind is None and loaded.adapter is not None:
        kind, values, config = task.ADAPTER, peft.state(loaded.adapter), attach.plain(loaded.adapter)
    packed = bases.weights(loaded.model)
    kind = kind or task.kind_of(packed, loaded.name)
    new_file(path, loaded)
    found = task.Task(kind, base_digest(loaded, kind), held(packed, kind) if values is None else values, config=config or {}, **told)
    if kind == task.ADAPTER:
        attach.check(found.config, found.values, loaded.name)
    try:
        with claimed(path):
            new_file(path)  # again: another process may have written it meanwhile
            task.write(path, found, packed)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written: {load.first_line(error)}") from None
    return {"output": str(path)} | found.header() | {"layers": len(packed), "bytes": path.stat().st_size}


def short(path: Path) -> str:
    """A file's name with the folder it was given in, as many are called task.safetensors; no more of the path goes into files that others read."""
    return "/".join(path.parts[-2:]).removeprefix("//")


def distinct(paths: Sequence[Path]) -> list[Path]:
    """The task files that paths mean; RecipeError where two mean one, which would count twice."""
    files = [file_of(path) for path in paths]
    places = [path.resolve() for path in files]
    if twice := next((path for i, path in enumerate(files) if places[i] in places[:i]), None):
        raise RecipeError(f"{twice} is named twice: name every task once, and give its weight with merge-tasks --weights")
    return files


def read(loaded: load.Loaded, paths: Sequence[Path]) -> list[task.Task]:
    """The tasks, of one kind, of files for this model; ModelError for anything but whole task files of its base. Nothing in it changes."""
    heads = [task.read_header(path) for path in paths]  # what is no task file is known before the base is read
    kind = heads[0].kind
    if other := next((i for i, head in enumerate(heads) if head.kind != kind), None):
        raise ModelError(f"{paths[0]} holds {kind}s and {paths[other]} {heads[other].kind}s, and tasks of two kinds do not add up")
    _check_free(loaded)
    own = bases.own(loaded.model).values
    packed = bases.weights(loaded.model, own)
    task.check_fits(kind, packed, str(paths[0]))
    found = [task.read(path, packed, base_digest(loaded, kind, own)) for path in paths]
    for path, each in zip(paths, found, strict=True):
        if kind == task.ADAPTER:
            attach.check(each.config, each.values, str(path))
    return found


def put(loaded: load.Loaded, values: merge.Values, kind: str = "scale") -> None:
    """Copy scales, tables or zeros, as `read` gives them, into the layers of a packed model: in place, but for zeros where none are floats yet."""
    _check_free(loaded)
    for name, layer in attach.base_layers(loaded.model).items():
        if name not in values or values[name].shape != layer.learned.shape or (kind != "zero" and values[name].dtype != layer.learned.dtype):
            raise ModelError(f"{loaded.name}: the {kind}s of {name} are missing, or of another shape or dtype")
    with _written(loaded.model, {MOVED[kind][0]: values}):
        pass


@contextmanager
def _written(model: nn.Module, parts: bases.Values) -> Iterator[None]:
    """Put values into the layers; with an error, here or in the block, all are what they were."""
    layers = attach.base_layers(model)
    undo: list[tuple[PackedLinear, str, Tensor | None, Tensor | None]] = []
    try:
        with torch.no_grad():
            for part, name, value in ((part, name, value) for part, values in parts.items() for name, value in values.items()):
                now: Tensor | None = getattr(layers[name], part)
                undo.append((layers[name], part, now, _copy(now)))
                if now is not None and value is not None and now.dtype == value.dtype:
                    now.copy_(value)
                else:
                    setattr(layers[name], part, None if value is None else value.to(layers[name].words.device, copy=True))
        yield
    except BaseException:
        with torch.no_grad():
            for layer, part, tensor, before in undo:
                setattr(layer, part, tensor)
                if tensor is not None and before is not None:
                    tensor.copy_(before)
        raise


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _check_free(loaded: load.Loaded) -> None:
    layers: list[PackedLinear] = list(attach.base_layers(loaded.model).values())
    if any(layer.tuned is not None or layer.tuned_zero is not None for layer in layers):
        raise ModelError(f"{loaded.name} is being tuned; detach the tuner before a task is loaded")
    if any(layer.learned.is_inference() for layer in layers) and not torch.is_inference_mode_enabled():
        raise ModelError(f"{loaded.name} was loaded under torch.inference_mode and can be changed only there: swap under it, or load without it")


def swap(loaded: load.Loaded, path: Path) -> task.Task:
    """Swap the values of a task file into a packed model, or its adapter beside it, in place of any other task; all of it or, with an error, none."""
    path = file_of(path)
    found = read(loaded, [path])[0]
    if found.kind == task.ADAPTER:
        _change(loaded, {}, partial(attach.exchange, loaded, found.config, found.values, str(path)))
    else:
        _change(loaded, {MOVED[found.kind][0]: found.values})
    return found


def swapped(loaded: load.Loaded) -> bool:
    """Whether a task stands in the place of the model's own values."""
    return bool(bases.own(loaded.model).moved)


def unload(loaded: load.Loaded) -> None:
    """Take an adapter off, and put the base's own values back where a task stands in their place; nothing to do is fine."""
    _check_free(loaded)
    _change(loaded, {})


def _change(loaded: load.Loaded, values: bases.Values, attached: Callable[[], None] | None = None) -> None:
    """Put values into the base, its own where another task stood, and attach an adapter or take it off; with an error all is what it was."""
    own, layers = bases.own(loaded.model), attach.base_layers(loaded.model)
    for part in values.keys() - own.values.keys():
        own.values[part] = {name: _copy(getattr(layer, part)) for name, layer in layers.items()}
    with _written(loaded.model, {part: own.values[part] for part in own.moved} | dict(values)):
        if attached is not None:
            attached()
        elif loaded.adapter is not None:
            peft.strip(loaded.model)
            loaded.adapter = None
    own.moved, own.now = tuple(values), marks(loaded.model, True, bases.VALUES)


def extract(source: str, path: Path) -> dict[str, Any]:
    """`compressor task`: the adapter of a packed folder, or without one its learned values, as a task file."""
    new_file(path)
    loaded = load_source(source, "cpu", adapters=True)
    return {"source": source_name(source)} | _save_folder(loaded, loaded.folder, path, about(loaded.folder, loaded.name))


def _save_folder(loaded: load.Loaded, folder: Path, path: Path, told: dict[str, Any]) -> dict[str, Any]:
    """The task file of a folder whose model is loaded; an adapter as its files hold it, number for number."""
    if loaded.adapter is None:
        return save(loaded, path, told)
    config, tensors = peft.read(folder / peft.FOLDER)
    return save(loaded, path, told, tensors, task.ADAPTER, config)


def leave_only(loaded: load.Loaded, folder: Path, version: str) -> None:
    """In a finished, proven folder of a run put a task file in place of the model: the file that `compressor task` would take out of it."""
    told = about(folder, folder.name)
    kind = _save_folder(loaded, folder, folder / TASK_FILE, told)["kind"]
    for path in checkpoint.model_files(folder):
        path.unlink()
    if (folder / peft.FOLDER).is_dir():
        shutil.rmtree(folder / peft.FOLDER)
    (folder / "README.md").write_text(TOLD.format(model=line(told["model"]), version=version, file=TASK_FILE, others=OTHERS[kind]), "utf-8")


def load_source(name: str, device: str, adapters: bool = False) -> load.Loaded:
    """A packed folder as a model; ModelError before anything is loaded for a dense one, and without `adapters` for one that has an adapter."""
    folder = checkpoint.resolve(name)
    if not checkpoint.read_config(folder).get("quantization_config"):
        raise ModelError(f"{name} is dense; give a packed folder, such as `compressor run` writes")
    if not adapters and (folder / peft.FOLDER).is_dir():
        raise ModelError(
            f"{name} has an adapter beside its packed weights, which would be lost: export --to compressed-tensors absorbs it, --to bf16 folds it in"
        )
    return load.load(name, device)
