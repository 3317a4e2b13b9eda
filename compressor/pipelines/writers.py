"""What `export --to` can write: one writer a format, each of which says what it holds of a model exactly, what only nearly, and what not at all.

A packed format takes weights on even grids with integer zeros; `takes` names what it holds beyond that. What it stores of one weight is `held`, the
same object where nothing changes, and the loss of a model is measured on what is held, before anything is written. `verdict` sums that up, and
docs/serving.md shows it for every kind of weight.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from compressor.errors import ModelError, RecipeError
from compressor.export import awq, compressed_tensors, conversions, dense, gptq, mlx, table
from compressor.export.gguf_types import KINDS
from compressor.packed import PackedWeight
from compressor.pipelines import checkpoint
from compressor.pipelines.formats import FORMATS

TABLES, FLOATS, COLUMNS = "tables", "tuned zeros", "another order of columns"
Weights = Iterable[tuple[str, Tensor | PackedWeight]]


class Form(Protocol):
    """What a module of export/ offers that an export writes."""

    @property
    def NAME(self) -> str: ...

    def fits(self, packed: dict[str, PackedWeight], /) -> str | None: ...

    def held(self, weight: PackedWeight, /) -> PackedWeight | Tensor: ...

    def write(self, folder: Path, config: dict[str, Any], weights: Weights, ignore: list[str], /) -> None: ...

    def read(self, folder: Path, files: list[Path], config: dict[str, Any], /) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]: ...


class Writer(Protocol):
    """One format of `--to`. readers: names of integrations/consumers.py; bits: the one width that it knows, if it is one."""

    @property
    def NAME(self) -> str: ...

    @property
    def readers(self) -> tuple[str, ...]: ...

    @property
    def takes(self) -> frozenset[str]: ...

    @property
    def bits(self) -> int | None: ...

    def fits(self, config: dict[str, Any], packed: dict[str, PackedWeight]) -> str | None: ...

    def held(self, weight: PackedWeight) -> PackedWeight | Tensor: ...

    def stored(self, weight: PackedWeight) -> PackedWeight: ...

    def write(self, folder: Path, source: Path, config: dict[str, Any], weights: Weights, ignore: list[str]) -> list[dict[str, Any]]: ...

    def back(self, folder: Path) -> tuple[dict[str, Tensor], Iterator[tuple[str, Tensor]]]: ...


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder in a packed format of export/."""

    form: Form
    readers: tuple[str, ...]
    takes: frozenset[str] = frozenset()
    bits: int | None = None  # the one width that it knows; narrower codes are written in wider fields

    @property
    def NAME(self) -> str:
        return self.form.NAME

    def fits(self, config: dict[str, Any], packed: dict[str, PackedWeight]) -> str | None:
        """Why the format cannot hold the model, or None."""
        return self.form.fits(packed)

    def held(self, weight: PackedWeight) -> PackedWeight | Tensor:
        """What it stores of a weight that fits: the same object, a nearby one, or the float32 [n, k] that a reader will see."""
        return self.form.held(weight)

    def stored(self, weight: PackedWeight) -> PackedWeight:
        """What `write` is given of a weight: in the format's terms where these are a packed weight, else as it is."""
        held = self.form.held(weight)
        return held if isinstance(held, PackedWeight) else weight

    def write(self, folder: Path, source: Path, config: dict[str, Any], weights: Weights, ignore: list[str]) -> list[dict[str, Any]]:
        """The folder's config and weights; notes by layer: none."""
        self.form.write(folder, config, weights, ignore)
        return []

    def back(self, folder: Path) -> tuple[dict[str, Tensor], Iterator[tuple[str, Tensor]]]:
        """(dense tensors, the packed linears dequantised one by one to float32), as our reader finds them in the folder."""
        config = checkpoint.any_config(folder)
        others, packed = FORMATS[str(config["quantization_config"]["quant_method"])].read(
            folder, checkpoint.weight_files(folder), config["quantization_config"]
        )
        return others, ((name, dense.dequantize(weight)) for name, weight in packed.items())


class AsTables:
    """Our table format, for scales too: each group's values written out, rounded to the dtype of the scale."""

    NAME, write, read = table.NAME, staticmethod(table.write), staticmethod(table.read)

    @staticmethod
    def fits(packed: dict[str, PackedWeight]) -> str | None:
        """Why tables cannot hold the model, or None."""
        try:
            return table.fits({name: conversions.as_tables(weight) for name, weight in packed.items()})
        except ModelError as error:
            return str(error)

    @staticmethod
    def held(weight: PackedWeight) -> PackedWeight:
        """The weight as a table."""
        return conversions.as_tables(weight)


@dataclass(frozen=True)
class Gguf:
    """One .gguf file for llama.cpp. type: of the packed layers, or auto."""

    type: str
    readers: tuple[str, ...] = ("gguf", "llama.cpp")
    takes: frozenset[str] = frozenset((TABLES, FLOATS, COLUMNS))
    bits: int | None = None

    @property
    def NAME(self) -> str:
        return f"GGUF {self.type}"

    def fits(self, config: dict[str, Any], packed: dict[str, PackedWeight]) -> str | None:
        """Why no GGUF file can hold the model, or None."""
        from compressor.integrations import gguf

        return gguf.fits(config, packed, self.type)

    def held(self, weight: PackedWeight) -> PackedWeight | Tensor:
        """What llama.cpp reads of a weight."""
        from compressor.integrations import gguf

        return gguf.held(weight, self.type)[0]

    def stored(self, weight: PackedWeight) -> PackedWeight:
        """The weight as it is, which is encoded once more while the file is written."""
        return weight

    def write(self, folder: Path, source: Path, config: dict[str, Any], weights: Weights, ignore: list[str]) -> list[dict[str, Any]]:
        """model-TYPE.gguf, other matrices in their own dtype; returns a row a layer with its type and, where it is not the one asked for, why."""
        from compressor.integrations import gguf

        return gguf.write(folder / f"model-{self.type}.gguf", config, weights, source, self.type, FLOAT_TYPES[config["dtype"]])

    def back(self, folder: Path) -> tuple[dict[str, Tensor], Iterator[tuple[str, Tensor]]]:
        """Everything one by one as float32 by the names of transformers' tensors, dense and packed alike."""
        from compressor.integrations import gguf

        path = folder / f"model-{self.type}.gguf"
        return {}, ((name, tensor) for name, tensor in gguf.tensors(path))


FOLDERS: dict[str, Writer] = {
    "compressed-tensors": Folder(compressed_tensors, ("compressed-tensors",)),
    "gptq": Folder(gptq.V1, ("gptq", "auto-gptq"), frozenset((COLUMNS,))),
    "gptq_v2": Folder(gptq.V2, ("gptq",), frozenset((COLUMNS,))),
    "awq": Folder(awq, ("awq",), bits=4),
    "mlx": Folder(mlx, ("mlx",), frozenset((FLOATS,))),
    "table": Folder(AsTables(), ("table",), frozenset((TABLES,))),
}
DTYPES = dense.DTYPES | {"float32": torch.float32}  # dense folders, by the name that users write
FLOAT_TYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
GGUF, TYPES = "gguf", ("auto", *KINDS, "f16", "bf16", "f32")


def of(to: str) -> Writer | None:
    """The writer of a packed format by the name that users write, such as gptq or gguf:q4_k; None for a dense one. RecipeError for a strange name."""
    name, _, kind = to.partition(":")
    if name == GGUF and (kind or "auto") in TYPES:
        return Gguf(kind or "auto")
    if to in FOLDERS:
        return FOLDERS[to]
    if to in DTYPES:
        return None
    choices = ", ".join([*FOLDERS, *(f"{GGUF}:{kind}" for kind in TYPES), *DTYPES])
    raise RecipeError(f"--to {to!r} is unknown; choose among {choices}")


@dataclass(frozen=True)
class Verdict:
    """Whether a format holds a model: exact, lossy with the largest relative error of a layer, or cannot and why."""

    kind: Literal["exact", "lossy", "cannot"]
    why: str = ""
    error: float = 0.0

    def __str__(self) -> str:
        return {"exact": "exact", "lossy": f"lossy, {self.error:.2g}", "cannot": f"no: {self.why}"}[self.kind]


def verdict(writer: Writer, config: dict[str, Any], packed: Mapping[str, PackedWeight]) -> Verdict:
    """What a format would make of these weights, as they are, or in wider fields where it knows only these."""
    if writer.bits is not None:
        packed = {name: _wider(weight, writer.bits) for name, weight in packed.items()}
    if why := lacks(writer, packed) or writer.fits(config, dict(packed)):
        return Verdict("cannot", why)
    error = max((loss(weight, writer.held(weight)) for weight in packed.values()), default=0.0)
    return Verdict("lossy" if error else "exact", error=error)


def _wider(weight: PackedWeight, bits: int) -> PackedWeight:
    """In fields of `bits` bits; as it is where it cannot be."""
    affine = weight.learned.dim() == 2 and weight.bits <= bits
    return conversions.widened(weight, bits) if affine else weight


def lacks(writer: Writer, packed: Mapping[str, PackedWeight]) -> str | None:
    """What of the weights a format has no place for, in words; None if it has one for all."""
    for name, weight in packed.items():
        kind = TABLES if weight.learned.dim() == 3 else FLOATS if weight.float_zeros else COLUMNS if weight.columns is not None else None
        if kind is not None and kind not in writer.takes:
            return f"{name} has {kind}, which the format does not know"
    return None


def loss(weight: PackedWeight, held: PackedWeight | Tensor) -> float:
    """The norm of the change over that of the weight; 0 where no weight changes."""
    if held is weight:
        return 0.0
    exact = dense.dequantize(weight)
    seen = dense.dequantize(held) if isinstance(held, PackedWeight) else held.to(exact.device)
    return 0.0 if torch.equal(exact, seen) else float((seen - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny))


def bits_of(rows: Iterable[Mapping[str, Any]], packed: Mapping[str, PackedWeight]) -> float:
    """Bits a weight of the packed linears in a GGUF file, from the types of its tensors."""
    types, floats = {row["name"].removesuffix(".weight"): row["type"] for row in rows}, {"f16": 16.0, "bf16": 16.0, "f32": 32.0}
    sizes = {name: n * k for name, (n, k) in ((name, weight.shape) for name, weight in packed.items())}
    bits = {name: floats.get(types[name]) or 8 * KINDS[types[name]].size / KINDS[types[name]].block for name in sizes}
    return sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
