"""What decides where a folder will load: its format, grids and shapes, from config.json and the headers of its files; no weight is read.

GGUF files are read up to the end of their tensor list, without the gguf package. What a header does not say, such as zeros that are all alike, is
not known here.
"""

import json
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from compressor.errors import ModelError
from compressor.export import shards
from compressor.integrations import peft
from compressor.pipelines import load
from compressor.prune import slicing

GGUF_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    15: "Q8_K", 30: "BF16",
}  # fmt: skip
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's plain kinds of values; 8 is a string, 9 a list
STRING, LIST = 8, 9
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one layer each in vLLM and SGLang


@dataclass(frozen=True)
class Scheme:
    """How some modules are packed. group: -1 for whole rows, 0 where there is none, as in a table; symmetric: None where it says nothing."""

    bits: int
    group: int
    symmetric: bool | None


@dataclass(frozen=True)
class Facts:
    """format: compressed-tensors, gptq, awq, mlx, table, sparse, gguf, dense, or the quant_method of others. modules: their schemes by name; shapes:
    (n, k) by name; version: of GPTQ's checkpoints, maker: what it says made it; dense: modules that are not
    packed; types: of GGUF tensors."""

    format: str
    architecture: str
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    act_order: bool = False
    adapter: bool = False
    uneven: bool = False  # blocks of different widths
    version: str = ""
    maker: str = ""
    dense: frozenset[str] = frozenset()
    types: tuple[str, ...] = ()

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
    config = load.any_config(folder)
    quantization = config.get("quantization_config") or config.get("quantization") or {}
    architecture = str(next(iter(config["architectures"]), "")) or str(config.get("model_type", ""))
    kind = format_of(config, quantization)
    headers = shards.read_headers(folder, load.weight_files(folder))
    schemes, shapes = READERS.get(kind, _none)(quantization, headers)
    ordered = bool(quantization.get("desc_act")) or any(key.endswith(".weight_g_idx") for key in headers)
    plain = frozenset(key.removesuffix(".weight") for key, tensor in headers.items() if key.endswith(".weight") and tensor.dim() == 2) - set(schemes)
    made = (quantization.get("meta") or {}).get("quantizer", "") if isinstance(quantization.get("meta"), dict) else ""
    return Facts(
        kind, architecture, schemes, shapes, ordered, (folder / peft.FOLDER).is_dir(), bool(config.get(slicing.WIDTHS)),
        str(quantization.get("checkpoint_format") or "gptq") if kind == "gptq" else "", str(made), plain,
    )  # fmt: skip


def format_of(config: Mapping[str, Any], quantization: Any) -> str:
    """The format of a folder by its quantization_config."""
    if not quantization:
        return "dense"
    if not isinstance(quantization, dict):
        raise ModelError("config.json is damaged: quantization_config is no mapping")
    method = str(quantization.get("quant_method") or ("mlx" if isinstance(config.get("quantization"), dict) else "unknown"))
    own = {"compressor": "table", "compressor_sparse": "sparse"}
    form = quantization.get("format", "pack-quantized")
    return own.get(method, method if method != "compressed-tensors" or form == "pack-quantized" else f"compressed-tensors {form}")


Found = tuple[dict[str, Scheme], dict[str, tuple[int, int]]]
Headers = Mapping[str, Tensor]


def _none(quantization: Mapping[str, Any], headers: Headers) -> Found:
    return {}, {}


def _modules(headers: Headers, leaf: str) -> Iterable[str]:
    return (key.removesuffix(f".{leaf}") for key in headers if key.endswith(f".{leaf}"))


def _number(quantization: Mapping[str, Any], key: str, usual: int) -> int:
    found = quantization.get(key, usual)
    if type(found) is not int:
        raise ModelError(f"config.json is damaged: {key} of its quantization_config is {found!r}")
    return found


def _whole(group: int, k: int) -> int:
    return -1 if group < 0 or group >= k else group


def _compressed(quantization: Mapping[str, Any], headers: Headers) -> Found:
    """Of compressed-tensors: bits follow from the words, groups from the scales, and zero points say whether it is symmetric."""
    schemes, shapes = {}, {}
    groups = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values() if isinstance(group, dict)]
    options = [
        (g["num_bits"], _number({"group_size": g.get("group_size") or -1}, "group_size", -1)) for g in groups if g.get("num_bits") in range(1, 9)
    ]
    for name in _modules(headers, "weight_packed"):
        words, scale = headers[f"{name}.weight_packed"], headers.get(f"{name}.weight_scale")
        if scale is None or words.dim() != 2 or scale.dim() != 2:
            raise ModelError(f"{name} is incomplete or damaged: weight_packed and weight_scale must be there with two dimensions")
        for bits, group in options:
            k = scale.shape[1] * group if group > 0 else words.shape[1] * 32 // bits
            if (group > 0 or scale.shape[1] == 1) and words.shape[1] in (-(-k * bits // 32), -(-k // (32 // bits))):
                schemes[name] = Scheme(bits, _whole(group, k), f"{name}.weight_zero_point" not in headers)
                shapes[name] = (words.shape[0], k)
                break
        else:
            raise ModelError(f"{name} is damaged: {words.shape[1]} words and {scale.shape[1]} groups a row are of no scheme that config.json lists")
    return schemes, shapes


def _gptq(quantization: Mapping[str, Any], headers: Headers) -> Found:
    schemes, shapes = {}, {}
    for name in _modules(headers, "qweight"):
        words, scale = headers[f"{name}.qweight"], headers.get(f"{name}.scales")
        if scale is None or words.dim() != 2 or scale.dim() != 2:
            raise ModelError(f"{name} is incomplete or damaged: qweight and scales must be there with two dimensions")
        n, group, bits = scale.shape[1], _number(quantization, "group_size", -1), _number(quantization, "bits", 4)
        if not 0 < bits <= 8:
            raise ModelError(f"config.json is damaged: weights of {bits} bits")
        if quantization.get("quant_method") == "awq":
            k, symmetric = words.shape[0], not quantization.get("zero_point", True)
        else:
            k, symmetric = words.shape[0] * 32 // bits, bool(quantization.get("sym", True))
            if group > 0 and scale.shape[0] > 1 and k != scale.shape[0] * group:  # `dynamic` gives this layer other bits
                k = scale.shape[0] * group
                bits = words.shape[0] * 32 // k
        schemes[name], shapes[name] = Scheme(bits, _whole(group, k), symmetric), (n, k)
    return schemes, shapes


def _mlx(quantization: Mapping[str, Any], headers: Headers) -> Found:
    schemes, shapes = {}, {}
    for name in _modules(headers, "scales"):
        own = quantization.get(name)
        entry = own if isinstance(own, dict) else quantization
        bits, group, words = entry.get("bits"), entry.get("group_size"), headers.get(f"{name}.weight")
        if not isinstance(bits, int) or not isinstance(group, int) or not 0 < bits <= 8 or words is None or words.dim() < 2:
            raise ModelError(f"{name} is incomplete or damaged: MLX's bits and group_size, and its weight, must be there")
        schemes[name], shapes[name] = Scheme(bits, group, None), (words.shape[-2], words.shape[-1] * 32 // bits)
    return schemes, shapes


def _ours(quantization: Mapping[str, Any], headers: Headers) -> Found:
    schemes: dict[str, Scheme] = {}
    for group in quantization.get("groups") or []:
        if isinstance(group, dict) and isinstance(group.get("bits"), int):
            width = group.get("segment") or group.get("group") or 0
            schemes |= dict.fromkeys(group.get("modules") or [], Scheme(group["bits"], int(width), None))
    return schemes, {}


READERS = {"compressed-tensors": _compressed, "gptq": _gptq, "awq": _gptq, "mlx": _mlx, "table": _ours, "sparse": _ours}


def gguf_facts(path: Path) -> Facts:
    """The architecture and the types of tensors of a GGUF file; ModelError if it is none, or damaged."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is no GGUF file")
            _, tensors, pairs = struct.unpack("<IQQ", file.read(20))
            if max(tensors, pairs) > 1 << 20:
                raise ValueError("too many entries")
            values = dict(_pair(file) for _ in range(pairs))
            types: dict[str, int] = defaultdict(int)
            for _ in range(tensors):
                _text(file)
                (dims,) = struct.unpack("<I", file.read(4))
                *_, kind, _ = struct.unpack(f"<{dims}QIQ", file.read(8 * dims + 12))
                types[GGUF_TYPES.get(kind, f"type {kind}")] += 1
    except (struct.error, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise ModelError(f"{path} is damaged or truncated: {error}") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    return Facts("gguf", str(values.get("general.architecture", "")), types=tuple(sorted(types, key=lambda name: -types[name])))


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
    """A text as such; numbers and lists are passed over."""
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
    file.seek(SIZES[kind], 1)
    return None


def describe(found: Facts) -> str:
    """One line for people."""
    if found.format == "gguf":
        return f"{found.architecture} as GGUF, {', '.join(found.types)}"
    grids = "; ".join(sorted({_grid(scheme) for scheme in found.kinds})) or "16 or 32 bits"
    name = found.version or found.format
    return f"{found.architecture} as {name}: {grids}{', act-order' * found.act_order}{', an adapter beside it' * found.adapter}"


def _grid(scheme: Scheme) -> str:
    width = {-1: ", whole rows", 0: ""}.get(scheme.group, f", groups of {scheme.group}")
    return f"{scheme.bits} bits{width}{'' if scheme.symmetric is None else ', symmetric' if scheme.symmetric else ', asymmetric'}"


def document(found: Facts) -> dict[str, Any]:
    """The facts for scripts."""
    grids: list[dict[str, Any]] = [
        {"bits": s.bits, "group": s.group, "symmetric": s.symmetric}
        for s in sorted(found.kinds, key=lambda s: json.dumps([s.bits, s.group, s.symmetric]))
    ]
    keys = {"format": found.format, "architecture": found.architecture, "grids": grids, "act_order": found.act_order, "adapter": found.adapter}
    return keys | ({"types": list(found.types)} if found.types else {}) | ({"version": found.version} if found.version else {})
