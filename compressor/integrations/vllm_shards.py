"""From the tensors of a packed folder to what one layer of vLLM computes with; knows nothing of vLLM itself.

A folder stores q_proj, k_proj and v_proj; vLLM has one qkv_proj, of which every process of a tensor-parallel group holds some rows, and of o_proj
some columns. A module is decoded by the reader of its format as soon as its last tensor has come, cut to the share of this process, and joined with
its neighbours where both are stored alike, so that the layer needs one kernel call for them; parts that differ (mixed precision, layers left dense)
stay weights of their own.

Choice: codes are cut, not streams, so one function serves all formats, and only groups, never words, restrict a share. Price: the tensors of the one
module that is loading lie in memory beside its packed weight. Limits: columns in another order (act-order) cannot be shared out by columns.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.export import bitmask, compressed_tensors, foreign, gptq, sparse, table
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight, Table

Weight = PackedWeight | Tensor
Shard = int | str | tuple[int, ...] | None  # as vLLM names the pieces of a fused layer
COMPRESSED = "compressed-tensors"
PARTS = {table.METHOD: table.PARTS, sparse.METHOD: bitmask.PARTS, COMPRESSED: compressed_tensors.PARTS, gptq.METHOD: gptq.PARTS}
QKV = {"q": 0, "k": 1, "v": 2}


def widths(config: Mapping[str, Any]) -> set[int] | None:
    """The bits of a GPTQ or compressed-tensors folder whose weights, and nothing else, are packed in a way that we read; None for any other."""
    if config.get("quant_method") == gptq.METHOD:
        words, dynamic = str(config.get("pack_dtype") or "int32").removeprefix("torch."), config.get("dynamic")
        rules = [rule for rule in dynamic.values() if isinstance(rule, dict)] if isinstance(dynamic, dict) else []
        named = [config.get("bits"), *(rule["bits"] for rule in rules if "bits" in rule)]
        plain = words == "int32" and gptq.label(config) in gptq.LABELS.values() and not config.get("is_marlin_format") and not config.get("lm_head")
        return _stored(named) if plain else None
    try:
        return {group.bits for group in compressed_tensors.groups_of(config, "the folder")}
    except ModelError:
        return None


def _stored(named: list[Any]) -> set[int] | None:
    """The widths that a config of strangers names, if we store all of them."""
    found = {bits for bits in named if type(bits) is int and bits in layout.STORED}
    return found if all(type(bits) is int and bits in found for bits in named) else None


class Folder:
    """Which modules of a folder are packed, and how. It is plain data: vLLM sends it from process to process.

    `modules` {name of a module, as vLLM calls it: (its name in the folder, the dtypes of its tensors by leaf)} is known after `look`.
    """

    def __init__(self, config: Mapping[str, Any]):
        """config: its quantization_config. ModelError if that is damaged, or of a folder that we do not read."""
        self.method, self.where = str(config.get("quant_method")), "the folder"
        self.modules: dict[str, tuple[str, dict[str, torch.dtype]]] = {}
        self.schemes: dict[str, Any] = {}
        self.config, self.widths, self.groups = dict(config), set[int](), list[compressed_tensors.Group]()
        if self.method == table.METHOD:
            self.schemes = dict(table.schemes_of(config, self.where))
        elif self.method == sparse.METHOD:
            self.schemes = dict(sparse.schemes_of(config, self.where))
        elif self.method == COMPRESSED:
            self.groups = compressed_tensors.groups_of(config, self.where)
        else:
            found = widths(config)
            if found is None:
                kinds = f"{table.METHOD}, {sparse.METHOD}, pack-quantized {COMPRESSED} and {gptq.METHOD}"
                known = ", ".join(map(str, layout.STORED))
                raise ModelError(f"the folder is quantised as {self.method}/{config.get('format')}; compressor serves {kinds} of {known} bits")
            self.widths = found

    @property
    def parts(self) -> tuple[str, ...]:
        """The last parts of the names of its packed tensors."""
        return PARTS[self.method]

    def look(self, where: str, stored: Mapping[str, torch.dtype]) -> None:
        """Take the names and dtypes of all tensors of the folder at `where`; ModelError if they are not those that config.json lists."""
        self.where = where
        held: dict[str, dict[str, torch.dtype]] = defaultdict(dict)
        for name, dtype in stored.items():
            module, _, leaf = name.rpartition(".")
            if leaf in self.parts:
                held[module][leaf] = dtype
        if self.method == sparse.METHOD:
            sparse.check_modules(self.schemes, stored, where)
        elif self.method == table.METHOD:
            table.check_modules(self.schemes, held, where)
        if not held:
            raise ModelError(f"{where} shows no packed weight in the headers of its safetensors files: is it complete, and reachable?")
        self.modules = {module: (module, leaves) for module, leaves in held.items()}

    def decode(self, name: str, parts: dict[str, Tensor]) -> Weight:
        """The weight [n, k] of the module that the folder calls `name`, on the device of its tensors; ModelError if it is damaged."""
        where = f"{self.where}: {name}"
        if self.method == table.METHOD:
            bits, segment = self.schemes[name]
            return table.decode(parts, bits, segment, where)
        if self.method == sparse.METHOD:
            return bitmask.decode(parts, self.schemes[name], where)
        if self.method == gptq.METHOD:
            return self._gptq(parts, where)
        return compressed_tensors.decode(parts, where, name, self.groups)

    def _gptq(self, parts: dict[str, Tensor], where: str) -> PackedWeight:
        """By its label. One layer cannot overrule that, as all of them do for the reader of folders: where it speaks against it, a warning."""
        version, makers = 2 if gptq.label(self.config) == gptq.LABELS[2] else 1, gptq.makers(self.config)
        layer = gptq.decode(parts, where, self.widths, gptq.sizes(self.config), bool(self.config.get("desc_act")), "gptqmodel" in makers)
        if "compressor" not in makers and gptq.evident([layer], self.config) == 3 - version:
            doubt = f"{self.where} is labelled {gptq.LABELS[version]}, and zeros in it look like those of the other; it is served by its label"
            warnings.warn(f"{doubt}: if outputs are wrong, `compressor export` reads all layers and writes the folder anew", stacklevel=2)
        zero = foreign.symmetric(layer.zeros[version - 1], layer.weight.bits)
        return replace(layer.weight, values=Affine(layer.weight.learned, zero))


class Pieces:
    """What comes from the files for one layer, and what of it this process computes with."""

    def __init__(self, folder: Folder, names: Sequence[str], sizes: Sequence[int], columns: int, rank: int = 0, ranks: int = 1):
        """names: the modules, as vLLM calls them, that make up the layer, one for all its outputs or one for each; sizes: rows of each output and
        columns that this process, `rank` of `ranks`, holds."""
        self.folder, self.names, self.sizes, self.columns, self.rank, self.ranks = folder, list(names), list(sizes), columns, rank, ranks
        self.waiting: dict[tuple[int, ...], dict[str, Tensor]] = defaultdict(dict)
        self.done: dict[tuple[int, ...], Weight] = {}

    def add(self, leaf: str, tensor: Tensor, shard: Shard, device: torch.device) -> None:
        """One tensor of the file, for the outputs `shard`; copied, because loaders use their buffers again."""
        slots = self._slots(shard)
        name = self._name(slots)
        stored, leaves = self.folder.modules.get(name, (name, {"weight": tensor.dtype}))
        if leaf not in leaves:
            raise ModelError(f"{self.folder.where} holds {stored}.{leaf}, and the headers of its files promised {' and '.join(sorted(leaves))}")
        parts = self.waiting[slots]
        parts[leaf] = tensor.to(device, copy=True)
        if leaves.keys() <= parts.keys():
            weight = parts["weight"] if name not in self.folder.modules else self.folder.decode(stored, parts)
            self.done[slots] = self._share(weight, slots, f"{self.folder.where}: {stored}")
            del self.waiting[slots]

    def take(self) -> list[Weight]:
        """The weights whose outputs, one after the other, are those of the layer; ModelError if something did not come. They are then gone."""
        slots = sorted(self.done)
        if [slot for several in slots for slot in several] != list(range(len(self.sizes))):
            absent = next((n for i, n in enumerate(self.names) if not any(i in several for several in slots)), self.names[0])
            raise ModelError(f"{self.folder.where} lacks tensors of {absent}, so it cannot be served")
        weights = joined([self.done[several] for several in slots])
        self.done.clear()
        return weights

    def _slots(self, shard: Shard) -> tuple[int, ...]:
        if shard is None:
            return tuple(range(len(self.sizes)))
        return shard if isinstance(shard, tuple) else (QKV[shard] if isinstance(shard, str) else shard,)

    def _name(self, slots: tuple[int, ...]) -> str:
        if len(self.names) == 1:
            return self.names[0]
        if len(self.names) != len(self.sizes) or len(slots) != 1:
            raise ModelError(f"{' and '.join(self.names)} make {len(self.sizes)} outputs in a way that is not served packed: export with --to bf16")
        return self.names[slots[0]]

    def _share(self, weight: Weight, slots: tuple[int, ...], where: str) -> Weight:
        n, k = weight.shape
        return cut(weight, self._rows(n, slots, where), self._columns(k, where), where)

    def _rows(self, n: int, slots: tuple[int, ...], where: str) -> Tensor | None:
        """The rows of this process of a weight with n, int64; None: all. Where there are fewer heads than processes, some hold the same ones."""
        sizes = [self.sizes[slot] for slot in slots]
        if sum(sizes) == n:
            return None
        if len(sizes) == 1 and n % sizes[0] == 0:
            start = self.rank * (n // sizes[0]) // self.ranks * sizes[0]
            return torch.arange(start, start + sizes[0])
        if sum(sizes) * self.ranks != n:
            raise ModelError(f"{where} has {n} rows, and the model wants {sum(sizes)} for each of {self.ranks} processes")
        starts = accumulate([0, *sizes[:-1]])
        return torch.cat([torch.arange(size) + self.ranks * start + self.rank * size for start, size in zip(starts, sizes, strict=True)])

    def _columns(self, k: int, where: str) -> slice | None:
        if k == self.columns:
            return None
        if k != self.columns * self.ranks:
            raise ModelError(f"{where} has {k} columns, and the model wants {self.columns} for each of {self.ranks} processes")
        return slice(self.rank * self.columns, (self.rank + 1) * self.columns)


def cut(weight: Weight, rows: Tensor | None, columns: slice | None, where: str) -> Weight:
    """The rows (int64; None: all) and columns (None: all) of a weight [n, k]; ModelError where columns would cut a group or follow act-order."""
    if rows is None and columns is None:
        return weight
    n, k = weight.shape
    span = columns or slice(0, k)
    if isinstance(weight, Tensor):
        return (weight if rows is None else weight[rows.to(weight.device)])[:, span].contiguous()
    width, group = span.stop - span.start, weight.group
    if columns is not None and weight.columns is not None:
        raise ModelError(f"{where} has its columns in another order (act-order), so tensor parallelism cannot share them out: use one process")
    if group < k and (span.start % group or (width % group and span.stop < k)):
        raise ModelError(f"{where} has groups of {group} columns, which shares of {width} columns would cut: use fewer tensor-parallel processes")
    groups = slice(span.start // group, -(-span.stop // group))
    of = lambda t: (t if rows is None else t[rows.to(t.device)])[:, groups].contiguous()
    codes = weight.codes()
    codes = (codes if rows is None else codes[rows.to(codes.device)])[:, span]
    zero = weight.zero
    values = Table(of(weight.learned)) if isinstance(weight.values, Table) else Affine(of(weight.learned), None if zero is None else of(zero))
    return PackedWeight.pack(codes, values, weight.bits, min(group, width), weight.columns)


def joined(weights: Sequence[Weight]) -> list[Weight]:
    """Neighbours that are stored alike as one weight, rows under rows."""
    runs: list[list[Weight]] = []
    for weight in weights:
        if runs and _alike(runs[-1][0], weight):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return [_stacked(run) if len(run) > 1 else run[0] for run in runs]


def _alike(a: Weight, b: Weight) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype
    same = [_kind(a) == _kind(b), (a.columns is None) == (b.columns is None)]
    return all(same) and (a.columns is None or b.columns is None or torch.equal(a.columns, b.columns))


def _kind(weight: PackedWeight) -> tuple[Any, ...]:
    zero = None if weight.zero is None else weight.zero.dtype
    return type(weight.values), weight.bits, weight.group, weight.shape[1], weight.learned.dtype, zero


def _stacked(run: Sequence[Weight]) -> Weight:
    packed = [weight for weight in run if isinstance(weight, PackedWeight)]
    if not packed:
        return torch.cat([weight for weight in run if isinstance(weight, Tensor)])
    first, learned = packed[0], torch.cat([weight.learned for weight in packed])
    zeros = [weight.zero for weight in packed if weight.zero is not None]
    values = Table(learned) if isinstance(first.values, Table) else Affine(learned, torch.cat(zeros) if zeros else None)
    return PackedWeight.pack(torch.cat([weight.codes() for weight in packed]), values, first.bits, first.group, first.columns)
