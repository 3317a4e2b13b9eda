"""`compressor diff A B`: whether two packed folders or task files are of one base, and how far their values are apart.

Bases are compared by digest, which for folders means every code and dense tensor and what the kind of task does not move; where two folders' digests
differ, the tensors that differ are named. The kind is that of a task file; of two folders it is adapter if one has an adapter, else zero if one holds
tuned zeros. Values are compared layer by layer: the norm of the change over the norm of A's values, and the largest change as a share of A's scale or
of the root mean square of A's table, the unit in which tuners and merges count (export/merge.py), or in steps of the grid for zeros, where integer
zeros, or none, count as the floats that tuning starts from. Adapters are compared tensor by tensor, as shares of the root mean square of A's tensor;
equal changes of a weight may come from unlike tensors. A tensor that one adapter alone has is listed with its side and no numbers.

Price: both models in CPU memory, packed, and the digest of each. Limits: a task file holds no codes, so of two unlike bases of which one is known by
its task file alone nothing more can be said; nor whether two files of unlike kinds, whose digests leave out unlike things, have one base.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from compressor.export import merge, task
from compressor.integrations import peft
from compressor.packed import PackedWeight
from compressor.pipelines import bases, load, tasks


@dataclass(frozen=True)
class Side:
    """A folder, or a task file, which has no model: `loaded` is None. `kind` is what a task file of it holds; `adapter`: peft's tensors by name."""

    name: str
    kind: str
    base: str = ""
    of: str = ""  # scale, table or zero: what `values` are
    values: dict[str, Tensor] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)
    loaded: load.Loaded | None = None
    packed: dict[str, PackedWeight] | None = None
    dense: dict[str, Tensor] | None = None


def side(source: str) -> Side:
    """Read one side; ModelError for what is neither a packed folder nor a task file. Of a folder base and values are not known yet."""
    path = tasks.file_of(Path(source))
    if path.is_file() or (path.suffix == ".safetensors" and not path.exists()):
        found = task.read_alone(path)
        beside = found.kind == task.ADAPTER
        return Side(source, found.kind, found.base, "" if beside else found.kind, {} if beside else found.values, found.values if beside else {})
    loaded = tasks.load_source(source, "cpu", adapters=True)
    tensors = {} if loaded.adapter is None else peft.state(loaded.adapter)
    if loaded.adapter is not None:
        peft.strip(loaded.model)
        loaded.adapter = None
    packed = load.packed_weights(loaded.model)
    kind = task.ADAPTER if tensors else "zero" if any(weight.float_zeros for weight in packed.values()) else task.kind_of(packed, source)
    return Side(source, kind, adapter=tensors, loaded=loaded, packed=packed, dense=bases.dense_tensors(loaded.model))


def compared(one: Side, other: Side) -> tuple[str, Side, Side]:
    """The kind of task that both are compared for, and both with base and values of it; task files as they stand."""
    files = [each.kind for each in (one, other) if each.loaded is None]
    kinds = files or [one.kind, other.kind]
    kind = next((k for k in (task.ADAPTER, "zero", *kinds) if k in kinds), kinds[0])

    def known(each: Side) -> Side:
        if each.loaded is None or each.packed is None:
            return each
        own = "table" if any(w.learned.dim() == 3 for w in each.packed.values()) else "scale"
        base = kind if kind == task.ADAPTER or (kind == "zero" and own == "scale") else own  # of other kinds than the file's it is another base
        of = own if kind == task.ADAPTER else base
        values = {} if kind == task.ADAPTER and files else tasks.held(each.packed, of)  # a file has none, and the digests know
        return replace(each, base=bases.base_digest(each.loaded, base), of=of if values else "", values=values)

    return kind, known(one), known(other)


def diff(a: str, b: str) -> tuple[dict[str, Any], Table]:
    """The document for scripts, and for people one row a layer, the most moved first."""
    kind, one, other = compared(side(a), side(b))
    untold = one.loaded is None and other.loaded is None and one.kind != other.kind
    same = None if untold else one.base == other.base
    document: dict[str, Any] = {"a": a, "b": b, "kinds": [one.kind, other.kind], "bases": [one.base, other.base], "same_base": same}
    document["differences"] = [] if same is not False else differences(one, other, kind)
    rows = (layers(one.values, other.values, one.of) if one.of == other.of else []) + layers(one.adapter, other.adapter, task.ADAPTER)
    rows += [{"name": name, "in": "A" if name in one.adapter else "B"} for name in sorted(one.adapter.keys() ^ other.adapter.keys())]
    moved = [row for row in rows if row.get("largest", 1)]
    whole = len(rows) == len(one.values) + len(one.adapter) == len(other.values) + len(other.adapter)
    document |= {"same_values": same is True and not moved and whole, "moved": len(moved), "layers": rows}
    return document, _table(document)


def differences(one: Side, other: Side, kind: str) -> list[dict[str, str]]:
    """What the bases do not share, by name: {"name", "what"}; nothing if a side is a task file."""
    if one.packed is None or other.packed is None or one.dense is None or other.dense is None or one.loaded is None or other.loaded is None:
        return []
    out = []
    for name in sorted({*one.packed, *other.packed}):
        if what := _packed_difference(one.packed.get(name), other.packed.get(name), kind):
            out.append({"name": name, "what": what})
    for name in sorted({*one.dense, *other.dense}):
        if what := _dense_difference(one.dense.get(name), other.dense.get(name)):
            out.append({"name": name, "what": what})
    a, b = task.computing(one.loaded.config), task.computing(other.loaded.config)
    return out + [{"name": "config.json", "what": key} for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def _packed_difference(a: PackedWeight | None, b: PackedWeight | None, kind: str) -> str:
    """What two layers do not share of what a task of this kind leaves alone; nothing said if they share all of it."""
    if a is None or b is None:
        return f"packed in {'B' if a is None else 'A'} only"
    schemes = [f"{w.shape[0]}x{w.shape[1]} {w.bits} bits groups of {w.group} {'tables' if w.learned.dim() == 3 else 'scales'}" for w in (a, b)]
    if schemes[0] != schemes[1]:
        return f"{schemes[0]}, and {schemes[1]}"
    if not torch.equal(a.codes(), b.codes()) or not torch.equal(a.g_idx(), b.g_idx()):
        return "codes"
    if kind in ("zero", task.ADAPTER) and not _equal(a.learned, b.learned):
        return "tables" if a.learned.dim() == 3 else "scales"
    if kind == "zero":
        return ""
    if a.zero is None or b.zero is None:
        return "" if a.zero is b.zero else f"zeros in {'B' if a.zero is None else 'A'} only"
    return "" if _equal(a.zero, b.zero) else "zeros"


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same numbers in the same dtype: a zero of 4 is none of 4.25, nor is it 4.0, which is stored in other bytes."""
    return a.dtype == b.dtype and torch.equal(a, b)


def _dense_difference(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None:
        return f"dense in {'B' if a is None else 'A'} only"
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return "" if a.dtype == b.dtype and torch.equal(a, b) else "numbers"


def layers(one: Mapping[str, Tensor], other: Mapping[str, Tensor], kind: str) -> list[dict[str, Any]]:
    """{"name", "norm", "largest"} of every tensor that both hold in one shape, the most moved first; of none that holds a NaN."""
    out = []
    for name, value in one.items():
        with_b = other.get(name)
        if with_b is None or with_b.shape != value.shape:
            continue
        size = value.double().norm().clamp(min=torch.finfo(torch.float64).tiny)
        largest = _changes(value, with_b, kind).abs().amax() if value.numel() else 0.0
        out.append({"name": name, "norm": float((with_b.double() - value.double()).norm() / size), "largest": float(largest)})
    return sorted(out, key=lambda row: -row["norm"])


def _changes(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """Changes in units of their kind, those of a tensor of an adapter as of one table."""
    return merge.changes(a.reshape(-1), b.reshape(-1), "table") if kind == task.ADAPTER else merge.changes(a, b, kind)


def _table(document: dict[str, Any]) -> Table:
    a, b = document["a"], document["b"]
    told = (
        "one base"
        if document["same_base"]
        else "files of two kinds, which cannot say whether they are of one base"
        if document["same_base"] is None
        else f"unlike bases, {len(document['differences'])} differences"
        if document["differences"]
        else "unlike bases"
    )
    shown = Table("layer", "change", "largest", title=tasks.cell(f"{a} and {b}: {told}, {document['moved']} layers moved"))
    for row in document["differences"]:
        shown.add_row(tasks.cell(row["name"]), tasks.cell(f"base: {row['what']}"), "")
    for row in document["layers"]:
        numbers = (f"in {row['in']} only", "") if "in" in row else (f"{row['norm']:.3e}", f"{row['largest']:.3e}")
        shown.add_row(tasks.cell(row["name"]), *numbers)
    return shown
