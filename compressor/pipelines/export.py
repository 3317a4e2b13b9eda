"""Folders for servers that know no tables, and task files: a tuned model in other clothes, with its loss measured and stated.

Dense folders are rounded, affine folders are written again exactly, and tables are *projected*: a table holds any 2**bits values and an even grid
does not, so every layer is packed anew by round-to-nearest on its dequantised weight, and perplexity is measured before and after. Price: a projected
model has lost part of what its tables had won. Limit: blind to the inputs; no calibration text is used.
"""

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor

from compressor import __version__, linear
from compressor.errors import ModelError, OutputError, RecipeError, UserError
from compressor.export import compressed_tensors, dense, shards, sparse, table, task
from compressor.packed import PackedWeight
from compressor.packing import relative_error
from compressor.pipelines import data, evaluate, load, write
from compressor.pipelines.job import source_name
from compressor.pipelines.journal import open_work
from compressor.pipelines.output import check_output, check_room, disk_full, publish, read_report
from compressor.pipelines.report import plain
from compressor.pipelines.show import Show
from compressor.quant import resolve_group, rtn
from compressor.recipe import Quant, Recipe

PACKED = "compressed-tensors"
TARGETS = (PACKED, *dense.DTYPES)
RECORD = "export.json"
TABLES = """
The folder holds learned tables. transformers loads it, packed, once this line has run; without it the weights would be random:

```python
import compressor
```
"""
LICENSE = "\nThe license and the terms of use of the base model apply.\n"
PARTS = (*compressed_tensors.PARTS, *table.PARTS)


@dataclass(frozen=True)
class Target:
    """What to write. bits, group, symmetric, max_loss and the text concern projections only; None means the default of each."""

    to: str
    bits: int | None = None  # the layer's own
    group: int | None = None  # 128
    symmetric: bool | None = None  # symmetric
    data: str | None = None  # python
    window: int | None = None
    max_tokens: int | None = None  # the whole text
    max_loss: float | None = None  # relative growth of perplexity above which nothing is written
    device: str = "auto"

    def check(self) -> None:
        """RecipeError for values that cannot work."""
        if self.to not in TARGETS:
            raise RecipeError(f"--to {self.to!r} is unknown; choose {', '.join(TARGETS)}")
        if self.max_loss is not None and not 0 <= self.max_loss < math.inf:
            raise RecipeError(f"max-loss={self.max_loss} is a share by which perplexity may grow: 0 or more, for example 0.05")
        if self.to != PACKED:
            self.refuse(f"--to {self.to} has none")
        Recipe().with_(quant=self.quant(3), eval__window=self.window, eval__max_tokens=self.max_tokens or 0)

    def refuse(self, why: str) -> None:
        """RecipeError if anything is asked for that only a projection heeds."""
        names = ("bits", "group", "symmetric", "data", "window", "max_tokens", "max_loss")
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            flag = "sym or --asym" if given[0] == "symmetric" else given[0].replace("_", "-")
            raise RecipeError(f"--{flag} is for the projection of tables, and {why}: leave it out")

    def quant(self, bits: int) -> Quant:
        """Options of round-to-nearest for a layer of `bits` bits."""
        chosen = Quant(packer="rtn", bits=bits if self.bits is None else self.bits)
        chosen = chosen if self.group is None else replace(chosen, group=self.group)
        return chosen if self.symmetric is None else replace(chosen, symmetric=self.symmetric)


def export(source: str, output: Path, target: Target, show: Show | None = None) -> tuple[dict[str, Any], Table]:
    """Write the packed folder `source` as `target` says; returns the document for scripts and the layers' losses for people.

    The folder `output` must be new or empty, and appears only when it is whole and proven. Raises the errors of its parts; UserError for a loss
    above `max_loss`.
    """
    target.check()
    show, place = show or Show(), new_place(output)
    loaded = load_source(source, target.device)
    outside(place, loaded)
    tables = target.to == PACKED and task.kind_of(load.packed_weights(loaded.model), source) == "table"
    record = opening(source, loaded, target.to)
    if target.to == PACKED and not tables:
        target.refuse(f"{source} holds scales, which are written as they are")
    if tables:
        record |= {"exact": False} | measured_projection(loaded, target, show)
    packed = load.packed_weights(loaded.model)
    need = load.model_bytes(loaded.folder) + sum(2 * w.shape[0] * w.shape[1] for w in packed.values() if target.to != PACKED)
    with published(place, need) as folder:
        if target.to == PACKED:
            kept = {"exact": True, "layers": [_scheme(name, weight) | {"error": 0.0} for name, weight in packed.items()]}
            record = kept | record | write_packed(loaded, packed, folder)
        else:
            record |= write_dense(loaded, packed, folder, dense.DTYPES[target.to], show)
        record = finish(record, loaded, folder, output)
    return {k: v for k, v in record.items() if k not in ("layers", "others")}, losses(record)


def load_source(name: str, device: str) -> load.Loaded:
    """A packed folder as a model; ModelError for a dense one, before anything is loaded."""
    if not load.read_config(load.resolve(name)).get("quantization_config"):
        raise ModelError(f"{name} is dense; give a packed folder, such as `compressor run` writes")
    return load.load(name, device)


def measured_projection(loaded: load.Loaded, target: Target, show: Show) -> dict[str, Any]:
    """Projects the model in place, measured before and after: rows per layer and perplexity, for the record. UserError if the loss is too large."""
    corpus, window = data.load_text("python" if target.data is None else target.data), load.context(loaded.config, target.window)
    chosen = {name: _group(name, layer, target) for name, layer in linear.packed_linears(loaded.model).items()}  # before anything slow

    def measure(label: str) -> dict[str, Any]:
        with show.task(label, 1) as advance:
            found = evaluate.measure(loaded.model, loaded.tokenizer, {"text": corpus}, window, target.max_tokens or 0)
            advance(1, "")
        return found

    before = measure("evaluate tables")
    with show.task("project", len(chosen)) as advance:
        rows = []
        for name, (group, note) in chosen.items():
            rows.append(project(loaded, name, target, group) | {"note": note})
            advance(1, f"{name} error {rows[-1]['error']:.4f}")
    after = measure("evaluate grids")
    first, last = before["text"]["perplexity"], after["text"]["perplexity"]
    growth = last / first - 1
    show.say(f"perplexity {first:.3f} with tables, {last:.3f} on even grids: {growth:+.2%}")
    if target.max_loss is not None and growth > target.max_loss:
        grown = f"perplexity would grow from {first:.3f} to {last:.3f}, by {growth:.2%}, and --max-loss allows {target.max_loss:.2%}"
        raise UserError(f"{grown}; nothing was written: try more --bits, a smaller --group or --asym")
    return {"layers": rows, "perplexity": {"before": first, "after": last, "growth": growth, "protocol": after["protocol"]["text"]}}


def _group(name: str, layer: linear.PackedLinear, target: Target) -> tuple[int, str]:
    return resolve_group(layer.in_features, target.quant(layer.bits), name)


def project(loaded: load.Loaded, name: str, target: Target, group: int) -> dict[str, Any]:
    """Replaces one packed layer by its projection onto even grids; returns its row, whose error is the norm of the change over that of the weight."""
    layer = loaded.model.get_submodule(name)
    assert isinstance(layer, linear.PackedLinear)
    sketch = layer.packed()
    exact = dense.dequantize(sketch)
    weight, _ = rtn.pack(exact, None, target.quant(sketch.bits), group, load.scale_dtype("auto", loaded.dtype))
    linear.swap(loaded.model, name, linear.PackedLinear(weight, layer.bias).train(layer.training))
    was = {"table_bits": sketch.bits, "segment": sketch.group}
    return _scheme(name, weight) | was | {"error": relative_error(exact, weight, None)}


def stored_dense(loaded: load.Loaded) -> Iterable[tuple[str, Tensor]]:
    """The tensors of the source that are not packed, as it stores them; those of a sparse folder all at once, with their zeros."""
    if loaded.config["quantization_config"].get("quant_method") == sparse.METHOD:
        return load.read_packed(loaded.folder, loaded.config)[0].items()
    return dense.unpacked(loaded.folder, load.weight_files(loaded.folder), PARTS)


def write_packed(loaded: load.Loaded, packed: dict[str, PackedWeight], folder: Path) -> dict[str, Any]:
    """The weights in the format that holds them, what is dense as it is stored in the source, proven; returns facts for the record."""
    kept = dict(stored_dense(loaded))
    native = write.pick_format(packed)
    weights: Iterable[tuple[str, Tensor | PackedWeight]] = chain(kept.items(), packed.items())
    native.write(folder, _config(loaded), weights, sorted(linear.linears(loaded.model)))
    write.prove(folder, kept, packed)
    return {"format": native.NAME, "bits_per_weight": write.bits_per_weight(packed), "verified": True}


def write_dense(loaded: load.Loaded, packed: dict[str, PackedWeight], folder: Path, dtype: torch.dtype, show: Show) -> dict[str, Any]:
    """Everything in `dtype`, layer by layer, proven; returns facts and the losses of rounding for the record."""
    with show.task("dequantise", 2 * len(packed)) as advance:

        def stream() -> Iterator[tuple[str, Tensor | PackedWeight]]:
            yield from stored_dense(loaded)
            for name, weight in packed.items():
                yield name, weight
                advance(1, name)

        rows = dense.write(folder, _config(loaded), stream(), dtype)
        dense.prove(folder, load.weight_files(folder), stream(), dtype)
    layers = [_scheme(row["name"], packed[row["name"]]) | _loss(row) for row in rows if row["packed"]]
    others = [{"name": row["name"]} | _loss(row) for row in rows if not row["packed"]]
    return {"format": dense.NAME, "exact": not any(row["largest"] for row in rows), "layers": layers, "others": others, "verified": True}


def finish(record: dict[str, Any], loaded: load.Loaded, folder: Path, output: Path) -> dict[str, Any]:
    """Puts tokenizer files and the record of what was done beside the weights; returns the record with its place.

    `error` in it sums up the layers: the largest, and the mean over weights of mean errors or of layers' relative errors.
    """
    write.copy_companions(loaded.folder, folder)
    note = f"{record['source']} as {record['to']}, made by compressor {__version__}; what was done is in `{RECORD}`.\n"
    (folder / "README.md").write_text(note + (TABLES if record.get("format") == table.NAME else "") + LICENSE, "utf-8")
    found = [(row.get("largest", row.get("error")), row.get("mean", row.get("error")), math.prod(row["shape"])) for row in record["layers"]]
    if found and found[0][0] is not None:
        average = sum(mean * size for _, mean, size in found) / sum(size for _, _, size in found)
        record |= {"error": {"largest": max(largest for largest, _, _ in found), "mean": average}}
    record = plain(record | {"folder_bytes": load.model_bytes(folder)}, "export", [])
    shards.write_json(folder / RECORD, record)
    return {"output": str(output)} | record


def losses(record: dict[str, Any]) -> Table:
    """One row a layer, for people."""
    rounded = record["to"] in dense.DTYPES
    heads = ("largest error", "mean error") if rounded else ("grid", "group", "error", "note")
    shown = Table("layer", "bits", *heads, title=f"{record['source']} as {record['to']}: relative error of every packed layer")
    for row in record["layers"]:
        if rounded:
            cells = [f"{row['largest']:.2e}", f"{row['mean']:.2e}"]
        else:
            cells = ["sym" if row["symmetric"] else "asym", str(row["group"]), f"{row['error']:.4f}", row.get("note", "")]
        shown.add_row(row["name"], str(row["bits"]), *cells)
    return shown


def new_place(output: Path) -> Path:
    """Where a new folder really goes, whatever links lead there; OutputError unless nothing stands there, or an empty folder."""
    place = output.resolve()
    if place.name and place != Path.cwd() and not place.is_mount() and place.is_dir() and any(place.iterdir()):
        raise OutputError(f"{output} already holds files; choose another folder with -o")
    check_output(place, overwrite=False)
    return place


def outside(place: Path, loaded: load.Loaded) -> None:
    """OutputError for an output inside the model's own folder, which would then hold what is not of it."""
    if loaded.folder.resolve() in place.resolve().parents:
        raise OutputError(f"{place} lies inside the model's own folder {loaded.folder}; choose another place with -o")


@contextlib.contextmanager
def published(place: Path, need: int) -> Iterator[Path]:
    """An empty folder that gets the name `place` when the block ends well, and disappears when it does not; `need` bytes must be free."""
    check_room(place, need)
    work = place.with_name(place.name + ".exporting")
    with open_work(work):
        try:
            shutil.rmtree(work / "folder", ignore_errors=True)
            (work / "folder").mkdir()
            yield work / "folder"
            publish(work / "folder", place, work)
        except (OSError, SafetensorError) as error:
            if disk_full(error):
                raise OutputError(f"the disk is full: {place} could not be written; free some space or choose another folder with -o") from None
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


def about(loaded: load.Loaded) -> dict[str, Any]:
    """What a task file says beside its values: the model's name, and from the folder's report the tune section and the tuned perplexities."""
    report = read_report(loaded.folder)
    section = lambda key: value if isinstance(value := report.get(key), dict) else {}
    out: dict[str, Any] = {"model": str(section("model").get("name") or source_name(loaded.name))}
    recipe = task.finite(section("recipe").get("tune"))
    if not section("tuned") or recipe.get("method") == "none":
        return out
    found = {key: value.get("perplexity") for key, value in section("tuned").items() if key in ("domain", "outside") and isinstance(value, dict)}
    return out | {"recipe": recipe, "metrics": task.finite(found)}


def values(loaded: load.Loaded) -> str:
    """The digest of a model's scales or tables; of a dense model that of nothing."""
    found = hashlib.sha256()
    for name, layer in linear.packed_linears(loaded.model).items():
        found.update(name.encode() + layer.learned.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def base_digest(loaded: load.Loaded) -> str:
    """The digest of the model's base, alike for a model in memory and the folder it is saved as: dense tensors count in the folder's dtype."""
    kept = write.dense_tensors(loaded)
    for name, tensor in kept.items():
        kept[name] = tensor.to(loaded.dtype) if tensor.is_floating_point() else tensor
    return task.digest(kept, load.packed_weights(loaded.model))


def save_task(loaded: load.Loaded, path: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Write the learned values of a packed model as a task file, which must not exist; returns its header, size and place. `told`: see `about`."""
    packed = load.packed_weights(loaded.model)
    kind = task.kind_of(packed, loaded.name)
    if os.path.lexists(path) or not path.name:
        raise OutputError(f"{path} already exists; choose another file with -o")
    outside(path, loaded)
    found = task.Task(kind, base_digest(loaded), {name: weight.learned for name, weight in packed.items()}, **told)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        task.write(path, found, packed)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written: {load.first_line(error)}") from None
    return {"output": str(path)} | found.header() | {"layers": len(packed), "bytes": path.stat().st_size}


def load_task(loaded: load.Loaded, path: Path) -> task.Task:
    """Swap the values of a task file into a packed model, in place; all of them or, with an error, none."""
    layers = linear.packed_linears(loaded.model)
    if any(layer.tuned is not None for layer in layers.values()):
        raise ModelError(f"{loaded.name} is being tuned; detach the tuner before a task is loaded")
    task.read_header(path)  # what is no task file is known before the base is read
    found = task.read(path, load.packed_weights(loaded.model), base_digest(loaded))
    moved = {name: value.to(layers[name].learned.device) for name, value in found.values.items()}
    for name, value in moved.items():
        layers[name].learned = value
    return found


def extract(source: str, path: Path) -> dict[str, Any]:
    """`compressor task`: the learned values of a packed folder as a task file."""
    if os.path.lexists(path):
        raise OutputError(f"{path} already exists; choose another file with -o")
    loaded = load_source(source, "cpu")
    return {"source": source_name(source)} | save_task(loaded, path, about(loaded))


def apply(base: str, path: Path, output: Path) -> dict[str, Any]:
    """`compressor apply`: the packed folder `base` with the values of a task file, as a new folder."""
    place = new_place(output)
    task.read_header(path)
    loaded = load_source(base, "cpu")
    outside(place, loaded)
    header = load_task(loaded, path).header()
    packed = load.packed_weights(loaded.model)
    record = opening(base, loaded, "apply") | {"task": header, "file": path.name}
    record |= {"layers": [_scheme(name, weight) for name, weight in packed.items()]}
    with published(place, load.model_bytes(loaded.folder)) as folder:
        record |= write_packed(loaded, packed, folder)
        record = finish(record, loaded, folder, output)
    return record | {"layers": len(packed)}


def opening(source: str, loaded: load.Loaded, to: str) -> dict[str, Any]:
    """The head of a record: what became what."""
    return {"compressor": __version__, "source": source_name(source), "source_fingerprint": load.fingerprint(loaded.folder), "to": to}


def _scheme(name: str, weight: PackedWeight) -> dict[str, Any]:
    grid = {} if weight.learned.dim() == 3 else {"symmetric": weight.zero is None}
    return {"name": name, "shape": list(weight.shape), "bits": weight.bits, "group": weight.group} | grid


def _config(loaded: load.Loaded) -> dict[str, Any]:
    """The model's configuration without what packing added to it."""
    config = {key: value for key, value in loaded.config.items() if key not in ("torch_dtype", "quantization_config")}
    stored = loaded.config.get("dtype") or loaded.config.get("torch_dtype") or str(loaded.dtype)
    return config | {"dtype": str(stored).removeprefix("torch.")}


def _loss(row: dict[str, Any]) -> dict[str, float]:
    return {key: row[key] for key in ("largest", "mean")}
