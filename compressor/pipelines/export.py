"""Folders for servers that know no tables, and folders of a base with tasks: a tuned model in other clothes, with its loss measured and stated.

Dense folders are rounded, affine folders are written again exactly, and tables are *projected*: a table holds any 2**bits values and an even grid
does not, so every layer is packed anew by round-to-nearest on its dequantised weight, and perplexity is measured before and after. Tuned zeros are
projected too, as compressed-tensors holds integers: codes stay and zeros are rounded (export/integers.py), unless other grids are asked for. Price: a
projected model has lost part of what its tables or zeros had won. Limit: blind to the inputs; no calibration text is used.
"""

import contextlib
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
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
from compressor.export import compressed_tensors, dense, integers, merge, shards, sparse, table, task
from compressor.integrations import attach, peft
from compressor.packed import PackedWeight
from compressor.packing import relative_error
from compressor.pipelines import adapters, data, evaluate, load, tasks, write
from compressor.pipelines.job import source_name
from compressor.pipelines.journal import open_work
from compressor.pipelines.output import check_output, check_room, disk_full, publish
from compressor.pipelines.report import plain
from compressor.pipelines.show import Show
from compressor.pipelines.tasks import load_source, outside
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

    def keeps(self, layer: linear.PackedLinear) -> bool:
        """Whether a projection leaves the codes of a layer: those on a grid, where no other grid is asked for."""
        return not layer.table and self.bits is None and self.group is None and self.symmetric is None

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
    loaded = load_source(source, target.device, adapters=target.to != PACKED)
    outside(place, loaded)
    folded = [] if loaded.adapter is None else [(f"{name}.weight", weight) for name, weight in adapters.fold(loaded).items()]
    held = load.packed_weights(loaded.model)
    projects = target.to == PACKED and (any(weight.float_zeros for weight in held.values()) or task.kind_of(held, source) == "table")
    record = opening(source, loaded, target.to)
    if target.to == PACKED and not projects:
        target.refuse(f"{source} holds scales, which are written as they are")
    if projects:
        record |= {"exact": False} | measured_projection(loaded, target, show)
    packed = load.packed_weights(loaded.model)
    need = load.model_bytes(loaded.folder) + sum(2 * w.shape[0] * w.shape[1] for w in packed.values() if target.to != PACKED)
    with published(place, need) as folder:
        if target.to == PACKED:
            kept = {"exact": True, "layers": [_scheme(name, weight) | {"error": 0.0} for name, weight in packed.items()]}
            record = kept | record | write_packed(loaded, packed, folder)
        else:
            record |= write_dense(loaded, packed, folded, folder, dense.DTYPES[target.to], show)
        record = finish(record, loaded, folder, output)
    return {k: v for k, v in record.items() if k not in ("layers", "others")}, losses(record)


def measured_projection(loaded: load.Loaded, target: Target, show: Show) -> dict[str, Any]:
    """Projects the model in place, measured before and after: rows per layer and perplexity, for the record. UserError if the loss is too large."""
    corpus, window = data.load_text("python" if target.data is None else target.data), load.context(loaded.config, target.window)
    layers = linear.packed_linears(loaded.model)
    chosen = {name: _group(name, layer, target) for name, layer in layers.items()}  # before anything slow
    old, new = ("tables", "even grids") if any(layer.table for layer in layers.values()) else ("tuned zeros", "integer zeros")

    def measure(label: str) -> dict[str, Any]:
        with show.task(label, 1) as advance:
            found = evaluate.measure(loaded.model, loaded.tokenizer, {"text": corpus}, window, target.max_tokens or 0)
            advance(1, "")
        return found

    before = measure(f"evaluate {old}")
    with show.task("project", len(chosen)) as advance:
        rows = []
        for name, (group, note) in chosen.items():
            rows.append(project(loaded, name, target, group) | {"note": note})
            advance(1, f"{name} error {rows[-1]['error']:.4f}")
    after = measure(f"evaluate {new}")
    first, last = before["text"]["perplexity"], after["text"]["perplexity"]
    growth = last / first - 1
    show.say(f"perplexity {first:.3f} with {old}, {last:.3f} with {new}: {growth:+.2%}")
    if target.max_loss is not None and growth > target.max_loss:
        grown = f"perplexity would grow from {first:.3f} to {last:.3f}, by {growth:.2%}, and --max-loss allows {target.max_loss:.2%}"
        raise UserError(f"{grown}; nothing was written: try more --bits, a smaller --group or --asym")
    return {"layers": rows, "perplexity": {"before": first, "after": last, "growth": growth, "protocol": after["protocol"]["text"]}}


def _group(name: str, layer: linear.PackedLinear, target: Target) -> tuple[int, str]:
    return (layer.group, "") if target.keeps(layer) else resolve_group(layer.in_features, target.quant(layer.bits), name)


def project(loaded: load.Loaded, name: str, target: Target, group: int) -> dict[str, Any]:
    """Replaces one packed layer by its projection onto even grids; returns its row, whose error is the norm of the change over that of the weight."""
    layer = loaded.model.get_submodule(name)
    assert isinstance(layer, linear.PackedLinear)
    held = layer.packed()
    exact = dense.dequantize(held)
    if target.keeps(layer):
        weight = integers.with_integers(held)
    else:
        weight, _ = rtn.pack(exact, None, target.quant(held.bits), group, load.scale_dtype("auto", loaded.dtype))
    linear.swap(loaded.model, name, linear.PackedLinear(weight, layer.bias).train(layer.training))
    was = {"table_bits": held.bits, "segment": held.group} if layer.table else {}
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


def write_dense(
    loaded: load.Loaded, packed: dict[str, PackedWeight], folded: list[tuple[str, Tensor]], folder: Path, dtype: torch.dtype, show: Show
) -> dict[str, Any]:
    """Everything in `dtype`, layer by layer, proven; facts and the losses of rounding for the record. folded: weights that took up an adapter."""
    with show.task("dequantise", 2 * len(packed)) as advance:

        def stream() -> Iterator[tuple[str, Tensor | PackedWeight]]:
            yield from stored_dense(loaded)
            yield from folded
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


def apply(base: str, paths: Sequence[Path], output: Path) -> dict[str, Any]:
    """`compressor apply`: the packed folder `base` with the values of a task file, its adapter, or the sum of several, as a new folder.

    Several add up with weight 1 each: base + the sum of (task - base), which is task arithmetic's addition and, of one task, the task itself. There
    the values of `base` count, so it must be the untuned folder; other weights and methods are for `merge-tasks`.
    """
    place = new_place(output)
    heads = [task.read_header(path) for path in paths]
    beside = any(head.kind == task.ADAPTER for head in heads)
    if beside and len(heads) > 1:
        raise ModelError("an adapter adds up with no other task: apply one file, or join adapters with peft's add_weighted_adapter")
    loaded = load_source(base, "cpu", adapters=beside)
    outside(place, loaded)
    found = tasks.read(loaded, paths)
    if beside:
        attach.exchange(loaded, found[0].config, found[0].values, str(paths[0]))
        peft.strip(loaded.model)
        loaded.adapter = None
    elif len(found) > 1:
        start = tasks.held(load.packed_weights(loaded.model), found[0].kind)
        tasks.put(loaded, merge.merge(start, [each.values for each in found], found[0].kind, merge.Options())[0], found[0].kind)
    else:
        tasks.put(loaded, found[0].values, found[0].kind)
    packed = load.packed_weights(loaded.model)
    told = [{"file": tasks.short(path)} | replace(each, config={}).header() for path, each in zip(paths, found, strict=True)]
    record = opening(base, loaded, "apply") | {"tasks": told, "layers": [_scheme(name, weight) for name, weight in packed.items()]}
    with published(place, load.model_bytes(loaded.folder) + sum(path.stat().st_size for path in paths)) as folder:
        record |= write_packed(loaded, packed, folder)
        if beside:
            record["adapter_bytes"] = attach.write(folder / peft.FOLDER, found[0].config, found[0].values)
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
