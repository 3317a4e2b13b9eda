"""Folders in the formats of others, and folders of a base with tasks: a tuned model in other clothes, with its loss measured and stated.

Dense folders are rounded, with an adapter folded in layer by layer; packed formats (pipelines/writers.py) get what they can hold, the rest is
projected, absorbed or rounded (pipelines/projection.py), and perplexity is measured before and after wherever a weight changes. Every folder is read
back by our reader and compared with what was to be written, and by the software that people use for it, where that is installed (pipelines/proof.py).
"""

import contextlib
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor

from compressor import __version__, disk, linear
from compressor.errors import ModelError, OutputError
from compressor.export import compressed_tensors, dense, merge, shards, table, task
from compressor.integrations import attach, experts, peft
from compressor.packed import PackedWeight
from compressor.pipelines import adapters, card_serving, checkpoint, data, digests, formats, load, proof, tasks, write, writers
from compressor.pipelines.digests import RECORD
from compressor.pipelines.job import source_name
from compressor.pipelines.journal import WRITTEN, clear, open_work, remove
from compressor.pipelines.output import check_output, check_room, place_of, publish
from compressor.pipelines.projection import Target, fitted, settled
from compressor.pipelines.report import plain
from compressor.pipelines.show import Show
from compressor.pipelines.tasks import load_source, outside
from compressor.stopping import held

TABLES = """
The folder holds learned tables. transformers loads it, packed, once this line has run; without it the weights would be random:

```python
import compressor
```
"""
LICENSE = "\nThe license and the terms of use of the base model apply.\n"
PARTS = (*compressed_tensors.PARTS, *table.PARTS)
EXPORTED = "exported"  # stands for the key of a run
STREAMED = ("compressed-tensors", table.METHOD)


def export(source: str, output: Path, target: Target, show: Show | None = None) -> tuple[dict[str, Any], Table]:
    """Write the packed folder `source` as `target` says; returns the document for scripts and the layers' losses for people.

    The folder `output` must be new or empty, and appears only when it is whole and proven. Raises the errors of its parts; UserError for a loss
    above `max_loss`.
    """
    target.check()
    writer, show, place = writers.of(target.to), show or Show(), new_place(output)
    if target.data is not None:
        data.load_text(target.data)  # a text that is not there is known at once, and not only when it is needed
    loaded = load_source(source, target.device, adapters=True)
    outside(place, loaded)
    shapes = [weight.shape for weight in load.packed_weights(loaded.model).values()]
    need = checkpoint.model_bytes(loaded.folder) + (sum(n * k * writers.DTYPES[target.to].itemsize for n, k in shapes) if writer is None else 0)
    record, wrappers = opening(source, loaded, target.to), {}
    origin = made_from(record)
    with published(place, need, origin) as folder:  # before anything slow, so that nobody else is at it, and there is room
        if writer is not None:
            record |= fitted(loaded, source, target, writer, show)
        elif loaded.adapter is not None:
            kind = adapters.kind(loaded)
            record |= {"adapter": {"kind": kind, "note": f"the adapter ({kind}) is folded into the weights beside which it was trained"}}
            wrappers = adapters.take_off(loaded)
        packed = load.packed_weights(loaded.model)
        if writer is not None:
            record = settled(loaded, target, writer, record, show)
        if writer is not None:
            record |= write_as(writer, loaded, packed, folder, _biases(loaded) if "adapter" in record else None)
            types = {row["name"].removesuffix(".weight"): f"{row['type']} {row['note']}".strip() for row in record.get("types", [])}
            noted = [row | {"note": "; ".join(filter(None, (row["note"], types.get(row["name"]))))} for row in record["layers"]]
            record |= {"layers": [_scheme(row["name"], packed[row["name"]]) | row for row in noted]}
        else:
            record |= write_dense(loaded, packed, wrappers, folder, writers.DTYPES[target.to], show)
        if not any(folder.glob("*.gguf")):  # which has its tokenizer inside
            write.copy_companions(loaded.folder, folder)
        record |= {"proof": proof.seen_by(writer.readers if writer else ("dense",), folder, loaded, show) if target.consumers else []}
        record = finish(record, loaded, folder, output)
    return {k: v for k, v in record.items() if k not in ("layers", "others", "types")} | sealed(place), losses(record)


def stored_dense(loaded: load.Loaded) -> Iterable[tuple[str, Tensor]]:
    """The tensors of the source that are not packed, as it stores them; those of formats with dense weights of their own all at once."""
    if loaded.config["quantization_config"].get("quant_method") in STREAMED:
        return dense.unpacked(loaded.folder, checkpoint.weight_files(loaded.folder), PARTS)
    return load.belonging(loaded.model, load.read_packed(loaded.folder, loaded.config)[0]).items()


def write_packed(loaded: load.Loaded, packed: dict[str, PackedWeight], folder: Path) -> dict[str, Any]:
    """The weights in the format of the source or one of ours, what is dense as it is stored in the source, proven; returns facts for the record."""
    kept = dict(stored_dense(loaded))
    native = formats.same(loaded.config, packed) or formats.pick(packed)
    packed = formats.stored(native, packed)
    weights: Iterable[tuple[str, Tensor | PackedWeight]] = chain(kept.items(), packed.items())
    native.write(folder, _config(loaded), weights, sorted([*linear.linears(loaded.model), *experts.routers(loaded.model)]))
    write.prove(folder, kept, packed)
    return {"format": native.NAME, "bits_per_weight": write.folder_bits(folder, packed), "verified": True}


def write_as(
    writer: writers.Writer, loaded: load.Loaded, packed: dict[str, PackedWeight], folder: Path, moved: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """The weights as the writer holds them, what is dense as it is stored in the source, proven; returns facts for the record.

    packed: the weights before the format rounded them; the model holds them after. moved: tensors that take the place of dense ones of the source,
    whose dtypes they get.
    """
    kept = {key: tensor if moved is None or key not in moved else moved[key].to("cpu", tensor.dtype) for key, tensor in stored_dense(loaded)}
    ignore = sorted(name for name in linear.linears(loaded.model) if name not in packed)
    terms = ((name, writer.stored(weight)) for name, weight in packed.items())
    notes = writer.write(folder, loaded.folder, _config(loaded), chain(kept.items(), terms), ignore)
    proof.read_back(writer, folder, kept, {name: loaded.model.get_submodule(name) for name in packed})
    stored = load.packed_weights(loaded.model)
    if notes:
        bits = writers.bits_of(notes, packed) if packed else float(torch.finfo(loaded.dtype).bits)  # a sparse folder may have nothing packed
        return {"format": writer.NAME, "verified": True, "bits_per_weight": bits, "types": notes}
    return {"format": writer.NAME, "verified": True, "bits_per_weight": write.folder_bits(folder, packed | stored)}


def _biases(loaded: load.Loaded) -> dict[str, Tensor]:
    """The biases of the packed linears by their tensors' names."""
    return {f"{name}.bias": layer.bias.detach() for name, layer in linear.packed_linears(loaded.model).items() if layer.bias is not None}


def write_dense(
    loaded: load.Loaded, packed: dict[str, PackedWeight], wrappers: Mapping[str, Any], folder: Path, dtype: torch.dtype, show: Show
) -> dict[str, Any]:
    """Everything in `dtype`, layer by layer, proven; facts and the losses of rounding for the record.

    wrappers: those of an adapter, by the name of the packed linear; each is folded in its turn, and only one layer is dense at a time.
    """
    biases = {f"{name}.bias" for name in wrappers}
    with show.task("dequantise", 2 * len(packed)) as advance:

        def stream() -> Iterator[tuple[str, Tensor | PackedWeight]]:
            yield from ((key, tensor) for key, tensor in stored_dense(loaded) if key not in biases)
            for name, weight in packed.items():
                if name in wrappers:
                    yield from ((f"{name}.{key}", tensor.detach()) for key, tensor in adapters.fold(wrappers[name]).named_parameters())
                else:
                    yield name, weight
                advance(1, name)

        rows = dense.write(folder, _config(loaded), stream(), dtype)
        dense.prove(folder, checkpoint.weight_files(folder), stream(), dtype)
    lost = {row["name"].removesuffix(".weight"): _loss(row) for row in rows}
    layers = [_scheme(name, weight) | lost.pop(name, {"largest": 0.0, "mean": 0.0}) for name, weight in packed.items()]
    others = [{"name": row["name"]} | _loss(row) for row in rows if row["name"].removesuffix(".weight") in lost]
    return {"format": dense.NAME, "exact": not any(row["largest"] for row in rows), "layers": layers, "others": others, "verified": True}


def finish(record: dict[str, Any], loaded: load.Loaded, folder: Path, output: Path) -> dict[str, Any]:
    """Puts tokenizer files and the record of what was done beside the weights; returns the record with its place.

    `error` in it sums up the layers: the largest, and the mean over weights of mean errors or of layers' relative errors.
    """
    held = " and ".join(f"`{tasks.line(each['file'])}`" for each in record.get("tasks", []))
    became = f"with {held}" if held else f"as {record['to']}"
    note = f"{tasks.line(record['source'])} {became}, made by compressor {__version__}; what was done is in `{RECORD}`.\n"
    note += f"\n{told[0].upper()}{told[1:]}.\n" if (told := record.get("adapter", {}).get("note")) else ""
    note += cost(record)
    note += f"\n{card_serving.section(folder)}\n## Proof\n\n" + "".join(f"- {tasks.line(line)}\n" for line in proof.lines(record))
    (folder / "README.md").write_text(note + (TABLES if record.get("format") == table.NAME else "") + LICENSE, "utf-8")
    found = [(row.get("largest", row.get("error")), row.get("mean", row.get("error")), math.prod(row["shape"])) for row in record["layers"]]
    if found and found[0][0] is not None:
        average = sum(mean * size for _, mean, size in found) / sum(size for _, _, size in found)
        record |= {"error": {"largest": max(largest for largest, _, _ in found), "mean": average}}
    record = plain(record | {"folder_bytes": _bytes(folder)}, "export", [])
    shards.write_json(folder / RECORD, record)
    return {"output": str(output)} | record


def cost(record: dict[str, Any]) -> str:
    """What a card says of what was lost; nothing where nothing was measured."""
    lines = []
    for key, words in (("perplexity", ""), ("rounding", "what the format rounds, alone: ")):
        if found := record.get(key):
            on = f", on {found['protocol']['name']}" if "protocol" in found else ""
            lines.append(f"- {words}perplexity {found['before']:.3f} before, {found['after']:.3f} after ({found['growth']:+.1%}){on}")
    largest = max((row["error"] for row in record["layers"] if row.get("error")), default=0.0)
    lines += [f"- largest relative error of a layer's weights: {largest:.2g}"] if largest else []
    types = Counter(row["note"].partition(" ")[0] for row in record["layers"]) if record.get("types") else {}
    lines += [f"- types of the packed layers: {', '.join(f'{count} x {kind}' for kind, count in types.items())}"] if types else []
    return "\n## What it cost\n\n" + "".join(f"{tasks.line(line)}\n" for line in lines) if lines else ""


def _bytes(folder: Path) -> int:
    """Bytes of what a server needs."""
    return sum(path.stat().st_size for path in folder.glob("*.gguf")) or checkpoint.model_bytes(folder)


def losses(record: dict[str, Any]) -> Table:
    """One row a layer, for people."""
    rounded = record["to"] in writers.DTYPES
    heads = ("largest error", "mean error") if rounded else ("grid", "group", "error", "note")
    shown = Table("layer", "bits", *heads, title=f"{record['source']} as {record['to']}: relative error of every packed layer")
    for row in record["layers"]:
        if rounded:
            cells = [f"{row['largest']:.2e}", f"{row['mean']:.2e}"]
        else:
            grid = {None: "table", True: "sym", False: "asym"}[row.get("symmetric")]
            cells = [grid, str(row["group"]), f"{row['error']:.4f}", row.get("note", "")]
        shown.add_row(row["name"], str(row["bits"]), *cells)
    return shown


def new_place(output: Path) -> Path:
    """Where a new folder really goes, whatever links lead there; OutputError unless nothing stands there, or an empty folder."""
    place = place_of(output)
    clear(_work(place), EXPORTED)
    if place != Path.cwd() and not place.is_mount() and place.is_dir() and any(place.iterdir()):
        raise OutputError(f"{output} already holds files; choose another folder with -o")
    check_output(place, overwrite=False)
    return place


def _work(place: Path) -> Path:
    return place.with_name(place.name + ".exporting")


@contextlib.contextmanager
def published(place: Path, need: int, source: Mapping[str, str] | None) -> Iterator[Path]:
    """An empty folder that gets digests and the name `place` when the block ends well, and disappears when it does not; `need` bytes must be free.

    source: name and sha256 of the model that it is made from.
    """
    check_room(place, need)
    work = _work(place)
    with open_work(work) as journal:
        try:
            shutil.rmtree(work / "folder", ignore_errors=True)
            (work / "folder").mkdir()
            yield work / "folder"
            journal.put(WRITTEN, EXPORTED, True)
            publish(work / "folder", place, work, source, overwrite=False)
        except (OSError, SafetensorError) as error:
            if disk.full(error):
                raise OutputError(f"the disk is full: {place} could not be written; free some space or choose another folder with -o") from None
            raise
        finally:
            with held():
                remove(work)


def apply(base: str, paths: Sequence[Path], output: Path, show: Show | None = None) -> dict[str, Any]:
    """`compressor apply`: the packed folder `base` with the values of a task file, its adapter, or the sum of several, as a new folder.

    Several add up with weight 1 each: base + the sum of (task - base), which is task arithmetic's addition and, of one task, the task itself. There
    the values of `base` count, so it must be the untuned folder; other weights and methods are for `merge-tasks`.
    """
    place, paths = new_place(output), [tasks.file_of(path) for path in paths]
    heads = [task.read_header(path) for path in paths]
    beside = any(head.kind == task.ADAPTER for head in heads)
    if beside and len(heads) > 1:
        raise ModelError("an adapter adds up with no other task: apply one file, or join adapters with peft's add_weighted_adapter")
    paths = tasks.distinct(paths)
    loaded = load_source(base, "cpu", adapters=beside)
    outside(place, loaded)
    notes = tasks.notes(loaded) if len(paths) > 1 else []
    for note in notes:
        (show or Show()).say(tasks.line(note))
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
    with published(place, checkpoint.model_bytes(loaded.folder) + sum(path.stat().st_size for path in paths), made_from(record)) as folder:
        record |= write_packed(loaded, packed, folder)
        if beside:
            record["adapter_bytes"] = attach.write(folder / peft.FOLDER, found[0].config, found[0].values)
        write.copy_companions(loaded.folder, folder)
        record = finish(record, loaded, folder, output)
    return record | {"layers": len(packed), "notes": notes} | sealed(place)


def opening(source: str, loaded: load.Loaded, to: str) -> dict[str, Any]:
    """The head of a record: what became what."""
    return {"compressor": __version__, "source": source_name(source), "source_fingerprint": checkpoint.digest(loaded.folder), "to": to}


def made_from(record: Mapping[str, Any]) -> dict[str, str]:
    """Name and sha256 of the source of a record."""
    return {"name": record["source"], "sha256": record["source_fingerprint"]}


def sealed(place: Path) -> dict[str, str]:
    """The root digest of a folder that was written, for the document."""
    return {"digest": found["root"]} if (found := digests.recorded(place)) else {}


def _scheme(name: str, weight: PackedWeight) -> dict[str, Any]:
    grid = {} if weight.learned.dim() == 3 else {"symmetric": weight.zero is None}
    return {"name": name, "shape": list(weight.shape), "bits": weight.bits, "group": weight.group} | grid


def _config(loaded: load.Loaded) -> dict[str, Any]:
    """The model's configuration without what packing added to it."""
    config = {key: value for key, value in loaded.config.items() if key not in ("torch_dtype", *formats.KEYS)}
    stored = loaded.config.get("dtype") or loaded.config.get("torch_dtype") or str(loaded.dtype)
    return config | {"dtype": str(stored).removeprefix("torch.")}


def _loss(row: dict[str, Any]) -> dict[str, float]:
    return {key: row[key] for key in ("largest", "mean")}
