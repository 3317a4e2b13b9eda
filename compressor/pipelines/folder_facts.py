"""What decides where a folder will load: its format, grids and shapes, from config.json and the headers of its files; no weight is read.

Groups are those that config.json names, as servers see them: a layer no wider than the group is like the others. A grid that does not fit the
shapes is damage. Formats that compressor does not read (`KNOWN`) are named and no more. GGUF files are read up to the end of their tensor list,
without the gguf package. What a header does not say, such as zeros that are all alike, is not known here.
"""

import json
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from compressor import strict
from compressor.errors import ModelError
from compressor.export import awq, gptq, hqq, mlx, shards, sparse, table
from compressor.integrations import experts, peft
from compressor.kernels import layout
from compressor.linear import expert_of
from compressor.pipelines import checkpoint
from compressor.prune import slicing

GGUF_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    15: "Q8_K", 30: "BF16",
}  # fmt: skip
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's plain kinds of values; 8 is a string, 9 a list
UINT32, STRING, LIST = 4, 8, 9
ALIGNMENT, ALIGNED = "general.alignment", 32  # the key that says of how many bytes the places of tensors are multiples; what holds without it
MLX_BITS = (2, 3, 4, 5, 6, 8)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one layer each in vLLM and SGLang


@dataclass(frozen=True)
class Scheme:
    """How some modules are packed. group: as config.json names it, -1 for whole rows, 0 where none is known; symmetric: None if that is not said."""

    bits: int
    group: int
    symmetric: bool | None


@dataclass(frozen=True)
class Facts:
    """format: compressed-tensors, gptq, awq, mlx, hqq, table, sparse, gguf, dense, or the name of another. modules: their schemes by name; shapes:
    (n, k) by name; version: of GPTQ's checkpoints, maker: what it says made it; dense: modules that are not
    packed; types: of GGUF tensors."""

    format: str
    architecture: str
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    act_order: bool = False
    adapter: str = ""  # the kind of an adapter beside the weights, as peft calls it; servers take "lora"
    rank: int = 0  # of it
    uneven: bool = False  # blocks of different widths
    version: str = ""
    maker: str = ""
    dense: frozenset[str] = frozenset()
    types: tuple[str, ...] = ()
    merged: bool = False  # experts packed one by one, of a family whose checkpoints hold all in one tensor

    @property
    def kinds(self) -> set[Scheme]:
        return set(self.schemes.values())

    @property
    def bits(self) -> set[int]:
        return {scheme.bits for scheme in self.kinds}

    @property
    def groups(self) -> set[int]:
        return {scheme.group for scheme in self.kinds}

    @property
    def symmetric(self) -> bool:
        return all(scheme.symmetric for scheme in self.kinds)

    @property
    def experts(self) -> dict[str, set[Scheme]]:
        """The schemes of the experts of a mixture by block."""
        out: dict[str, set[Scheme]] = {}
        for name, scheme in self.schemes.items():
            if expert := expert_of(name):
                out.setdefault(expert[0], set()).add(scheme)
        return out

    @property
    def mixed(self) -> bool:
        return len(self.kinds) > 1

    def split(self) -> str | None:
        """The first layer that servers fuse with its neighbours and that is packed in another way than they are."""
        for name, scheme in self.schemes.items():
            parent, _, leaf = name.rpartition(".")
            for family in FUSED:
                beside = [f"{parent}.{part}" for part in family] if leaf in family else []
                if any(self.schemes.get(other, scheme) != scheme or other in self.dense for other in beside):
                    return name
        return None


def facts(folder: Path) -> Facts:
    """The facts of a model folder, or of a .gguf file or a folder of one; ModelError for what is missing or damaged."""
    files = [folder] if folder.suffix == ".gguf" else sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if files and not (folder / "config.json").exists():
        return gguf_facts(files[0])
    config = checkpoint.any_config(folder)
    quantization = config.get("quantization_config") or {}
    architecture = str(next(iter(config["architectures"]), "")) or str(config.get("model_type", ""))
    kind = format_of(quantization)
    headers = shards.read_headers(folder, checkpoint.weight_files(folder))
    schemes, shapes = READERS[kind](quantization, headers, folder) if kind in READERS else ({}, {})
    if kind in READERS and not schemes and kind != "sparse":
        raise ModelError(f"{folder} holds no packed layers, although its config.json says {kind}")
    ordered = bool(quantization.get("desc_act")) or any(key.endswith(".weight_g_idx") for key in headers)
    plain = frozenset(key.removesuffix(".weight") for key, tensor in headers.items() if key.endswith(".weight") and tensor.dim() == 2) - set(schemes)
    version, made = (gptq.label(quantization), ", ".join(gptq.makers(quantization))) if kind == "gptq" else ("", "")
    adapter, rank = _adapter(folder / peft.FOLDER)
    merged = any(map(expert_of, schemes)) and not experts.separate(str(config.get("model_type")))
    return Facts(
        kind, architecture, schemes, shapes, ordered, adapter, rank, bool(config.get(slicing.WIDTHS)), version, made, plain, merged=merged
    )  # fmt: skip


def _adapter(folder: Path) -> tuple[str, int]:
    """(kind, rank) of the adapter in a folder; nothing where there is none, unknown where its configuration cannot be read."""
    if not folder.is_dir():
        return "", 0
    try:
        config = strict.read(folder / peft.CONFIG)
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        return "unknown", 0
    rank, kind = config.get("r"), str(config.get("peft_type", "unknown")).lower()
    return "dora" if kind == "lora" and config.get("use_dora") else kind, rank if isinstance(rank, int) else 0


def format_of(quantization: Mapping[str, Any]) -> str:
    """The format of a folder by its quantization_config, with what sets it apart where compressor does not read it."""
    if not quantization:
        return "dense"
    method = str(quantization.get("quant_method") or "unnamed")
    own = {table.METHOD: "table", sparse.METHOD: "sparse"}
    if method == "compressed-tensors" and (form := quantization.get("format", "pack-quantized")) != "pack-quantized":
        return f"{method} {form}"
    if method == gptq.METHOD and (form := gptq.label(quantization)) not in gptq.LABELS.values():
        return f"{method} {form}"
    if method == awq.METHOD and (form := str(quantization.get("version") or quantization.get("format") or "gemm").lower()) != "gemm":
        return f"{method} {form}"
    return own.get(method, method)


Found = tuple[dict[str, Scheme], dict[str, tuple[int, int]]]
Headers = Mapping[str, Tensor]


def _modules(headers: Headers, leaf: str) -> Iterable[str]:
    return (key.removesuffix(f".{leaf}") for key in headers if key.endswith(f".{leaf}"))


def _parts(headers: Headers, name: str, parts: tuple[str, ...], where: Path) -> list[Tensor]:
    """The tensors of a packed linear, each with two dimensions and not empty."""
    found = [headers.get(f"{name}.{part}") for part in parts]
    whole = [tensor for tensor in found if tensor is not None and tensor.dim() == 2 and tensor.numel()]
    if len(whole) < len(parts):
        raise ModelError(f"{where}: {name} is incomplete or damaged: {' and '.join(parts)} must be there with two dimensions")
    return whole


def _mapping(value: Any, what: str, where: Path) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise ModelError(f"{where}/config.json is damaged: {what} is no mapping")
    return value or {}


def _width(value: Any, where: Path) -> int:
    if type(value) is not int or value not in layout.STORED:
        raise ModelError(f"{where}/config.json is damaged: weights of {str(value)[:20]} bits; compressor knows 2, 3, 4 and 8")
    return value


def _group(value: Any, where: Path) -> int:
    if type(value) is not int or (value < 1 and value != -1):
        raise ModelError(f"{where}/config.json is damaged: a group size of {str(value)[:20]} is no number of columns, nor -1")
    return value


def _compressed(quantization: Mapping[str, Any], headers: Headers, where: Path) -> Found:
    """Of compressed-tensors: bits follow from the words, groups from the scales, and zero points say whether it is symmetric."""
    schemes, shapes = {}, {}
    groups = _mapping(quantization.get("config_groups"), "config_groups", where).values()
    weights = [_mapping(_mapping(each, "a group of config_groups", where).get("weights"), "weights of a group", where) for each in groups]
    options = [(_width(each.get("num_bits"), where), _group(each.get("group_size") or -1, where)) for each in weights]
    for name in _modules(headers, "weight_packed"):
        words, scale = _parts(headers, name, ("weight_packed", "weight_scale"), where)
        for bits, group in options:
            k = scale.shape[1] * group if group > 0 else words.shape[1] * 32 // bits
            if (group > 0 or scale.shape[1] == 1) and words.shape[1] in (-(-k * bits // 32), -(-k // (32 // bits))):
                schemes[name] = Scheme(bits, group, f"{name}.weight_zero_point" not in headers)
                shapes[name] = (words.shape[0], k)
                break
        else:
            found = f"{words.shape[1]} words and {scale.shape[1]} groups a row"
            raise ModelError(f"{where}: {name} is damaged: {found} are of no scheme that config.json lists")
    return schemes, shapes


def _gptq(quantization: Mapping[str, Any], headers: Headers, where: Path) -> Found:
    """Of GPTQ and AWQ: bits follow from the words of the zeros; the group must be one that config.json names, for all layers or in `dynamic`."""
    schemes, shapes = {}, {}
    inputs = quantization.get("quant_method") == awq.METHOD  # words run along the outputs, a row for each input
    dynamic = [each for each in _mapping(quantization.get("dynamic"), "dynamic", where).values() if isinstance(each, dict)]
    named = {key: [e[key] for e in (quantization, *dynamic) if e.get(key) is not None] for key in ("bits", "w_bit", "group_size", "q_group_size")}
    widths = {_width(each, where) for each in named["bits"] + named["w_bit"]} or set(layout.STORED)
    groups = [_group(each, where) for each in named["group_size"] + named["q_group_size"]]
    symmetric = not quantization.get("zero_point", True) if inputs else bool(quantization.get("sym", True))
    for name in _modules(headers, "qweight"):
        words, zeros, scale = _parts(headers, name, ("qweight", "qzeros", "scales"), where)
        count, n = scale.shape
        index = headers.get(f"{name}.g_idx")
        stream = [bits for bits in widths if bits * n == 32 * zeros.shape[1]]
        bits = next(iter(stream), 3 if zeros.shape[1] == -(-n // 10) else 0)  # a stream, or ten codes of 3 bits a word
        k = words.shape[0] if inputs else index.numel() if index is not None and index.numel() else words.shape[0] * 32 // bits if bits else 0
        group = next((each for each in groups or [-1 if count == 1 else k // count] if (k if each == -1 else each) * count == k), None)
        if bits not in widths or zeros.shape[0] != count or group is None:
            found = f"{zeros.shape[1]} words of zeros for {n} outputs, and {count} groups of {k} inputs,"
            raise ModelError(f"{where}: {name} is damaged: {found} are of no scheme that config.json lists")
        schemes[name], shapes[name] = Scheme(bits, group, symmetric), (n, k)
    return schemes, shapes


def _mlx(quantization: Mapping[str, Any], headers: Headers, where: Path) -> Found:
    schemes, shapes = {}, {}
    for name in _modules(headers, "scales"):
        own, words, scale = quantization.get(name), headers.get(f"{name}.weight"), headers[f"{name}.scales"]
        entry = own if isinstance(own, dict) else quantization
        bits, group = entry.get("bits"), entry.get("group_size")
        if type(bits) is not int or type(group) is not int or bits not in MLX_BITS or group not in mlx.GROUPS:
            raise ModelError(f"{where}/config.json is damaged: MLX has no {str(bits)[:20]} bits in groups of {str(group)[:20]}")
        if words is None or words.dim() < 2 or scale.dim() < 2 or words.shape[-1] * 32 != scale.shape[-1] * group * bits:
            raise ModelError(f"{where}: {name} is incomplete or damaged: its weight and scales do not fit {bits} bits in groups of {group}")
        schemes[name], shapes[name] = Scheme(bits, group, None), (words.shape[-2], scale.shape[-1] * group)
    return schemes, shapes


def _hqq(quantization: Mapping[str, Any], headers: Headers, where: Path) -> Found:
    """Of HQQ the bits, by the number of words for each group; outputs and inputs are in tensors, which are not read."""
    schemes = {}
    for name in _modules(headers, "W_q"):
        words, scale = _parts(headers, name, ("W_q", "scale"), where)
        bits = (bits for bits, (_, codes) in hqq.PACKINGS.items() if words.shape[0] == -(-scale.shape[0] // codes))
        schemes[name] = Scheme(next(bits, 0), 0, None)
    return schemes, {}


def _table(quantization: Mapping[str, Any], headers: Headers, where: Path) -> Found:
    return {name: Scheme(bits, segment, None) for name, (bits, segment) in table.schemes_of(quantization, where).items()}, {}


def _sparse(quantization: Mapping[str, Any], headers: Headers, where: Path) -> Found:
    named = sparse.schemes_of(quantization, where)
    return {name: Scheme(scheme.bits, scheme.group, None) for name, scheme in named.items() if scheme.bits}, {}


READERS = {"compressed-tensors": _compressed, "gptq": _gptq, "awq": _gptq, "mlx": _mlx, "hqq": _hqq, "table": _table, "sparse": _sparse}
KNOWN = (*READERS, "dense", "gguf")


def gguf_facts(path: Path) -> Facts:
    """The architecture and the types of tensors of a GGUF file; ModelError if it is none, or damaged."""
    architecture, tensors, _ = gguf_header(path)
    types: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        types[tensor.type] += 1
    return Facts("gguf", architecture, types=tuple(sorted(types, key=lambda name: -types[name])))


@dataclass(frozen=True)
class GgufTensor:
    """dims: the innermost first, as the file has them; offset: from where the header ends, once that is aligned."""

    name: str
    dims: tuple[int, ...]
    type: str
    offset: int


def gguf_header(path: Path) -> tuple[str, list[GgufTensor], int]:
    """(architecture, tensors in the order of the list, where in the file their offsets count from); ModelError if it is no GGUF file, or damaged."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is no GGUF file")
            _, tensors, pairs = struct.unpack("<IQQ", file.read(20))
            if max(tensors, pairs) > 1 << 20:
                raise ValueError("too many entries")
            values = dict(_pair(file) for _ in range(pairs))
            found = []
            for _ in range(tensors):
                name = _text(file)
                (dims,) = struct.unpack("<I", file.read(4))
                *shape, kind, offset = struct.unpack(f"<{dims}QIQ", file.read(8 * dims + 12))
                found.append(GgufTensor(name, tuple(shape), GGUF_TYPES.get(kind, f"type {kind}"), offset))
            aligned = values.get(ALIGNMENT, ALIGNED)
            if not isinstance(aligned, int) or aligned.bit_count() != 1:
                raise ValueError(f"its {ALIGNMENT} is no power of two")
            start = -(-file.tell() // aligned) * aligned
    except (struct.error, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise ModelError(f"{path} is damaged or truncated: {error}") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    return str(values.get("general.architecture", "")), found, start


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 1 << 24:
        raise ValueError("a text of more than 16 MiB")
    found = file.read(length)
    if len(found) < length:
        raise ValueError("it ends inside a text")
    return found.decode("utf-8", "replace")


def _pair(file: BinaryIO) -> tuple[str, Any]:
    key = _text(file)
    (kind,) = struct.unpack("<I", file.read(4))
    return key, _value(file, kind)


def _value(file: BinaryIO, kind: int) -> Any:
    """A text, or a number of 32 bits without sign, as such; other numbers and lists are passed over."""
    if kind == STRING:
        return _text(file)
    if kind == LIST:
        inner, count = struct.unpack("<IQ", file.read(12))
        if inner in SIZES:
            file.seek(SIZES[inner] * count, 1)
        else:
            for _ in range(count):
                _value(file, inner)
        return None
    if kind == UINT32:
        return int(struct.unpack("<I", file.read(4))[0])
    file.seek(SIZES[kind], 1)
    return None


def describe(found: Facts) -> str:
    """One line for people."""
    if found.format == "gguf":
        return f"{found.architecture} as GGUF, {', '.join(found.types)}"
    empty = "16 or 32 bits" if found.format == "dense" else "no packed layers" if found.format in KNOWN else "a format that compressor does not know"
    grids = "; ".join(sorted({_grid(scheme) for scheme in found.kinds})) or empty
    name = found.version or found.format
    return f"{found.architecture} as {name}: {grids}{', act-order' * found.act_order}{', an adapter beside it' * bool(found.adapter)}"


def _grid(scheme: Scheme) -> str:
    width = {-1: ", whole rows", 0: ""}.get(scheme.group, f", groups of {scheme.group}")
    return f"{scheme.bits or 'unknown'} bits{width}{'' if scheme.symmetric is None else ', symmetric' if scheme.symmetric else ', asymmetric'}"


def document(found: Facts) -> dict[str, Any]:
    """The facts for scripts."""
    grids: list[dict[str, Any]] = [
        {"bits": s.bits, "group": s.group, "symmetric": s.symmetric}
        for s in sorted(found.kinds, key=lambda s: json.dumps([s.bits, s.group, s.symmetric]))
    ]
    keys = {"format": found.format, "architecture": found.architecture, "grids": grids, "act_order": found.act_order, "adapter": bool(found.adapter)}
    return keys | ({"types": list(found.types)} if found.types else {}) | ({"version": found.version} if found.version else {})
