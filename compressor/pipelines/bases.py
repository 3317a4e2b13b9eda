"""Which base a model in memory is: its digest, and what is its own while a task stands in its place (export/task.py, docs/tasks.md).

A swap must take milliseconds, and the digest that tells bases apart reads the whole base: so it is formed once a model and remembered together with
the identity of every tensor under it, which PyTorch's counters of in-place changes belong to. Changed, replaced or moved tensors mean a new digest.
The base's own scales, tables and zeros are copied before a task first stands in their place, and count in digests from then on. An adapter is looked
through, never taken off, so a model can serve meanwhile. Price: a copy of the values, a few megabytes a gigabyte of codes. Limit: writes through
`.data` are counted nowhere; after such a write into codes, zeros or dense tensors, load the model anew.
"""

import json
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.export import task
from compressor.integrations import attach
from compressor.linear import PackedLinear
from compressor.packed import Affine, PackedWeight, Table
from compressor.pipelines import load

PARTS = ("words", "learned", "zero", "bias")  # tensors of a packed layer
MOVED = {"scale": ("learned",), "table": ("learned",), "zero": ("zero",), task.ADAPTER: ()}  # those that a task of a kind holds; the rest is base
VALUES = ("learned", "zero")  # all that a tuning may move in a packed layer
KEPT = 2  # digests of a kind that are remembered: of what is in the model, and of its own

Values = Mapping[str, Mapping[str, Tensor | None]]  # by part and layer


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


def marks(model: nn.Module, values: bool, moved: tuple[str, ...] = ("learned",), own: Values | None = None) -> Marks:
    """Of the `moved` parts of packed layers, or of everything else that is no adapter's; None if a tensor keeps no count of its changes, as
    inference tensors do not. `own` stand for the values in the model."""
    return _marked(_tensors(model, values, moved, own or {}))


def value_marks(loaded: load.Loaded) -> Marks:
    """Of everything that a tuning may have moved: scales or tables, zeros, and what adapters hold."""
    beside = [] if loaded.adapter is None else [(name, tensor, tuple(tensor.shape)) for name, tensor in attach.stored(loaded.model)]
    return _marked([*_tensors(loaded.model, True, VALUES, {}), *beside])


def _marked(tensors: Iterable[tuple[str, Tensor, tuple[Any, ...]]]) -> Marks:
    out = []
    for name, tensor, facts in tensors:
        if tensor.is_inference():
            return None
        out.append(Mark(name, weakref.ref(tensor), tensor.data_ptr(), tensor._version, tensor.dtype, facts))
    return out


def _tensors(model: nn.Module, values: bool, moved: tuple[str, ...], own: Values) -> Iterator[tuple[str, Tensor, tuple[Any, ...]]]:
    """(name, tensor, what else decides its meaning) of the parts of packed layers that were moved, or of everything else that is stored."""
    for name, module in attach.base_modules(model):
        if isinstance(module, PackedLinear):
            scheme = (module.bits, module.group, module.out_features, module.in_features)
            for part in PARTS:
                tensor = own[part][name] if part in own else getattr(module, part)
                if (part in moved) == values and tensor is not None:
                    yield f"{name}.{part}", tensor, scheme
        elif not values:
            stored = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            yield from ((f"{name}.{leaf}", tensor, tuple(tensor.shape)) for leaf, tensor in stored)


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything of a model that is neither packed nor an adapter's, tied tensors once."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in attach.base_modules(model):
        stored = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, tensor in stored:
            kept = leaf == "bias" if isinstance(module, PackedLinear) else leaf not in module._non_persistent_buffers_set
            if kept and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                out[f"{name}.{leaf}" if name else leaf] = tensor
    return out


@dataclass
class Own:
    """What of a model's values is its own: copies of every part that a task ever stood in the place of, and which of them one stands in now."""

    layers: dict[str, "weakref.ref[PackedLinear]"]
    values: dict[str, dict[str, Tensor | None]] = field(default_factory=dict)
    moved: tuple[str, ...] = ()
    now: Marks = None  # of the values as the last swap left them


_owned: "weakref.WeakKeyDictionary[nn.Module, Own]" = weakref.WeakKeyDictionary()


def own(model: nn.Module) -> Own:
    """What is the model's own. While no task stands in it that is what it holds; other layers than before are another base."""
    layers, known = attach.base_layers(model), _owned.get(model)
    alike = known is not None and known.layers.keys() == layers.keys() and all(known.layers[name]() is layer for name, layer in layers.items())
    if known is not None and alike and (known.moved or same(known.now, marks(model, True, VALUES))):
        return known
    _owned[model] = Own({name: weakref.ref(layer) for name, layer in layers.items()})
    return _owned[model]


def weights(model: nn.Module, own: Values | None = None) -> dict[str, PackedWeight]:
    """The packed weights of a model by name, without its adapter; `own` stand for the values in it."""
    out = {}
    for name, layer in attach.base_layers(model).items():
        held, given = layer.packed(), own or {}
        learned = given["learned"][name] if "learned" in given else held.learned
        zero = given["zero"][name] if "zero" in given else held.zero
        assert learned is not None
        values = Table(learned) if layer.table else Affine(learned, zero)
        out[name] = replace(held, values=values)
    return out


_digests: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], list[tuple[Marks, str]]]]" = weakref.WeakKeyDictionary()


def base_digest(loaded: load.Loaded, kind: str | None = None, own: Values | None = None) -> str:
    """The digest of the model's base for tasks of a kind, by default that of its values; an attached adapter is no part of any.

    It is alike for a model in memory and the folder it is saved as. `own` stand for the values in the model.
    """
    packed = weights(loaded.model, own)
    kind = kind or task.kind_of(packed, loaded.name)
    config = task.computing(loaded.config)
    known = _digests.setdefault(loaded.model, {}).setdefault((kind, json.dumps(config, sort_keys=True)), [])
    now = marks(loaded.model, False, MOVED[kind], own)
    for then, digest in known:
        if same(then, now):
            return digest
    found = task.digest(dense_tensors(loaded.model), packed, kind, config)
    known[:] = [*known, (now, found)][-KEPT:]
    return found
