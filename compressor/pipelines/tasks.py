"""Task files of loaded models: written, swapped in, taken out of a folder, made a folder of again (export/task.py, docs/tasks.md).

A swap copies values into the tensors that the layers already hold, so codes, addresses and whatever was compiled on them stay; only the first zeros
in floats, and an adapter of another shape, come in new tensors (integrations/attach.py). It must take milliseconds, and the digest that tells bases
apart reads the whole base: so it is formed once a model and remembered together with the identity of every tensor under it, which PyTorch's counters
of in-place changes belong to. Changed, replaced or moved tensors mean a new digest. Limit: writes through `.data` are counted nowhere; after such a
write into codes, zeros or dense tensors, load the model anew.
"""

import os
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from compressor import linear
from compressor.errors import ModelError, OutputError, RecipeError
from compressor.export import merge, task
from compressor.integrations import attach, peft
from compressor.packed import PackedWeight, zeros_as_floats
from compressor.pipelines import load, write
from compressor.pipelines.job import source_name
from compressor.pipelines.output import TASK_FILE, read_report
from compressor.recipe import Recipe

TUNERS = ("peqa", "table", "qalora", *peft.KINDS)  # those that move what a task file holds
PARTS = ("words", "learned", "zero", "bias")  # tensors of a packed layer
MOVED = {"scale": ("learned",), "table": ("learned",), "zero": ("zero",), task.ADAPTER: ()}  # those that a task of a kind holds; the rest is base
VALUES = ("learned", "zero")  # all that a tuning may move in a packed layer
TOLD = """A task file: what a tuning moved of {model}, without the model. With compressor {version}:

    compressor apply BASE {file} -o FOLDER

writes the tuned model. BASE is the packed folder that the recipe beside this file gives without `tune` and `save`, or any that is tuned from it.

The license and the terms of use of the base model apply.
"""


@dataclass(frozen=True)
class Mark:
    """Which tensor stands under a name, and how often it was changed in place."""

    name: str
    tensor: "weakref.ref[Tensor]" = field(compare=False)  # references compare by what they refer to, and tensors do not
    address: int
    changes: int
    dtype: torch.dtype
    facts: tuple[Any, ...]


Marks = list[Mark] | None


def same(one: Marks, other: Marks) -> bool:
    """Whether the same tensors stood under the same names, unchanged, when both were taken."""
    if one is None or other is None or one != other:
        return False
    return all((tensor := a.tensor()) is not None and tensor is b.tensor() for a, b in zip(one, other, strict=True))


def marks(model: nn.Module, values: bool, moved: tuple[str, ...] = ("learned",)) -> Marks:
    """Of the `moved` parts of packed layers, or of everything else; None if a tensor keeps no count of its changes, as inference tensors do not."""
    return _marked(_tensors(model, values, moved))


def value_marks(loaded: load.Loaded) -> Marks:
    """Of everything that a tuning may have moved: scales or tables, zeros, and what adapters hold."""
    beside = [] if loaded.adapter is None else [(name, tensor, tuple(tensor.shape)) for name, tensor in attach.stored(loaded.model)]
    return _marked([*_tensors(loaded.model, True, VALUES), *beside])


def _marked(tensors: Iterable[tuple[str, Tensor, tuple[Any, ...]]]) -> Marks:
    out = []
    for name, tensor, facts in tensors:
        if tensor.is_inference():
            return None
        out.append(Mark(name, weakref.ref(tensor), tensor.data_ptr(), tensor._version, tensor.dtype, facts))
    return out


def _tensors(model: nn.Module, values: bool, moved: tuple[str, ...]) -> Iterator[tuple[str, Tensor, tuple[Any, ...]]]:
    """(name, tensor, what else decides its meaning) of the parts of packed layers that were moved, or of everything else that is stored."""
    packed = linear.packed_linears(model)
    for name, layer in packed.items():
        scheme = (layer.bits, layer.group, layer.out_features, layer.in_features)
        parts = {part: getattr(layer, part) for part in PARTS if (part in moved) == values}
        yield from ((f"{name}.{part}", tensor, scheme) for part, tensor in parts.items() if tensor is not None)
    if not values:
        inside = tuple(f"{name}." for name in packed)
        for stored in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
            yield from ((name, tensor, tuple(tensor.shape)) for name, tensor in stored if not name.startswith(inside))


_digests: "weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[torch.dtype, Marks, str]]]" = weakref.WeakKeyDictionary()


def base_digest(loaded: load.Loaded, kind: str | None = None) -> str:
    """The digest of the model's base for tasks of a kind, by default that of its values; an attached adapter is no part of any.

    It is alike for a model in memory and the folder it is saved as: dense tensors count in the folder's dtype.
    """
    with peft.set_aside(loaded):
        packed = load.packed_weights(loaded.model)
        kind = kind or task.kind_of(packed, loaded.name)
        digests = _digests.setdefault(loaded.model, {})
        now, known = marks(loaded.model, False, MOVED[kind]), digests.get(kind)
        if known is not None and known[0] == loaded.dtype and same(known[1], now):
            return known[2]
        kept = write.dense_tensors(loaded)
        for name, tensor in kept.items():
            kept[name] = tensor.to(loaded.dtype) if tensor.is_floating_point() else tensor
        found = task.digest(kept, packed, kind)
    digests[kind] = (loaded.dtype, now, found)
    return found


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
    """What a task file says beside its values: the model's name, and from the folder's report the tune section and the tuned perplexities."""
    report = read_report(folder)
    section = lambda key: value if isinstance(value := report.get(key), dict) else {}
    out: dict[str, Any] = {"model": str(section("model").get("name") or source_name(name))}
    recipe = task.finite(section("recipe").get("tune"))
    if not section("tuned") or recipe.get("method") == "none":
        return out
    found = {key: value.get("perplexity") for key, value in section("tuned").items() if key in ("domain", "outside") and isinstance(value, dict)}
    return out | {"recipe": recipe, "metrics": task.finite(found)}


def new_file(path: Path, loaded: load.Loaded | None = None) -> None:
    """OutputError unless a file may be written there: nothing stands there, and it is outside the folder of the model."""
    if os.path.lexists(path) or not path.name:
        raise OutputError(f"{path} already exists; choose another file with -o")
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
    with peft.set_aside(loaded):
        packed = load.packed_weights(loaded.model)
    kind = kind or task.kind_of(packed, loaded.name)
    new_file(path, loaded)
    found = task.Task(kind, base_digest(loaded, kind), held(packed, kind) if values is None else values, config=config or {}, **told)
    if kind == task.ADAPTER:
        attach.check(found.config, found.values, loaded.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        task.write(path, found, packed)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written: {load.first_line(error)}") from None
    return {"output": str(path)} | found.header() | {"layers": len(packed), "bytes": path.stat().st_size}


def short(path: Path) -> str:
    """A file's name with the folder it was given in, as many are called task.safetensors; no more of the path goes into files that others read."""
    return "/".join(path.parts[-2:]).removeprefix("//")


def read(loaded: load.Loaded, paths: Sequence[Path]) -> list[task.Task]:
    """The tasks, of one kind, of files for this model; ModelError for anything but whole task files of its base."""
    heads = [task.read_header(path) for path in paths]  # what is no task file is known before the base is read
    kind = heads[0].kind
    if other := next((i for i, head in enumerate(heads) if head.kind != kind), None):
        raise ModelError(f"{paths[0]} holds {kind}s and {paths[other]} {heads[other].kind}s, and tasks of two kinds do not add up")
    _check_free(loaded, kind)
    with peft.set_aside(loaded):
        packed = load.packed_weights(loaded.model)
    task.check_fits(kind, packed, str(paths[0]))
    found = [task.read(path, packed, base_digest(loaded, kind)) for path in paths]
    for path, each in zip(paths, found, strict=True):
        if kind == task.ADAPTER:
            attach.check(each.config, each.values, str(path))
    return found


@torch.no_grad()
def put(loaded: load.Loaded, values: merge.Values, kind: str = "scale") -> None:
    """Copy checked scales or tables, or zeros, into the layers of a packed model: in place, but for zeros where none are floats yet."""
    _check_free(loaded, kind)
    part, layers = MOVED[kind][0], linear.packed_linears(loaded.model)
    for name, value in values.items():
        now = getattr(layers[name], part)
        if now is not None and now.dtype == value.dtype:
            now.copy_(value)
        else:
            setattr(layers[name], part, value.to(layers[name].words.device, copy=True))


def _check_free(loaded: load.Loaded, kind: str) -> None:
    if loaded.adapter is not None and kind != task.ADAPTER:
        raise ModelError(f"{loaded.name} has an adapter, and a task of {kind}s goes into a base without one: load the base alone")
    layers = linear.packed_linears(loaded.model).values()
    if any(layer.tuned is not None or layer.tuned_zero is not None for layer in layers):
        raise ModelError(f"{loaded.name} is being tuned; detach the tuner before a task is loaded")


def swap(loaded: load.Loaded, path: Path) -> task.Task:
    """Swap the values of a task file into a packed model, or its adapter beside it, in place of another; all of them or, with an error, none."""
    found = read(loaded, [path])[0]
    if found.kind == task.ADAPTER:
        attach.exchange(loaded, found.config, found.values, str(path))
    else:
        put(loaded, found.values, found.kind)
    return found


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
    _save_folder(loaded, folder, folder / TASK_FILE, told)
    for path in load.model_files(folder):
        path.unlink()
    if (folder / peft.FOLDER).is_dir():
        shutil.rmtree(folder / peft.FOLDER)
    (folder / "README.md").write_text(TOLD.format(model=told["model"], version=version, file=TASK_FILE), "utf-8")


def load_source(name: str, device: str, adapters: bool = False) -> load.Loaded:
    """A packed folder as a model; ModelError before anything is loaded for a dense one, and without `adapters` for one that has an adapter."""
    folder = load.resolve(name)
    if not load.read_config(folder).get("quantization_config"):
        raise ModelError(f"{name} is dense; give a packed folder, such as `compressor run` writes")
    if not adapters and (folder / peft.FOLDER).is_dir():
        raise ModelError(f"{name} has an adapter beside its packed weights, which would be lost: export --to bf16, or run with --adapter absorb")
    return load.load(name, device)
