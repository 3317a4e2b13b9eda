"""GPTQ folders, as auto-gptq and GPTQModel write them and transformers, vLLM and others read them.

Per packed linear of k inputs and n outputs: `qweight` int32 [k*bits/32, n], the dense bit stream of codes down k; `scales` float16 [G, n];
`qzeros` int32 [G, n*bits/32], the dense stream of zeros along n; `g_idx` int32 [k], the group of every column, so that act-order is held, too.
All of it at 2, 3, 4 and 8 bits.

The first version of the format (`checkpoint_format: gptq`, or no such key) stores zero - 1, and readers add the 1 again: some to every field, modulo
2**bits, others to the whole word, where a field of 2**bits - 1, a true zero of 0, carries into its neighbour. So V1 never writes a zero of 0: `held`
gives such a group other numbers for the same weights, which cost nothing. If no code of it is 2**bits - 1, codes and zero move up by one; else it is
mirrored, -s ((M - q) - M) = s q with M = 2**bits - 1, under a negative scale. The second version (`gptq_v2`) stores zeros as they are; auto-gptq does
not know it and misreads it silently, so it is only for who asks.

Reading. Some folders hold zeros of one version under the label of the other. Symmetric ones tell by their constant. For the others of less than 8
bits the mean of code - zero counts: the weights of a linear average to nearly nothing, so a wrong version is off by one whole step; only a clear sign
against the label, in nearly all layers, overrules it, with a warning. Of 8 bits a step is as small as such a mean may be, and the label stands.
GPTQModel subtracts from whole words (2, 4 and 8 bits), so its files are read by adding to them. EfficientQAT's own folders have no
quantization_config (`unlabelled`), true zeros, and at 3 bits ten codes a word; what its authors publish as -GPTQ is ordinary gptq_v2, what as
-BitBLAS is refused.

Limits: scales are float16; k and n must fill whole words; only GPTQModel itself and vLLM know layers of different bits (`dynamic`). auto-gptq's own
loader knows no linears that stay dense inside blocks and misreads them silently; through transformers it is told of them, where blocks are alike.
GPTQModel.load refuses asymmetric V1 folders of other makers; transformers with GPTQModel does not. No `backend` is written: it would hold GPUs back.
Source: the readers named; specs of others were checked by running them (bench/interop).
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import __version__, strict
from compressor.errors import ModelError
from compressor.export import foreign, shards
from compressor.export.shards import SHARD_BYTES
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight, by_groups

METHOD = "gptq"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
LABELS = {1: "gptq", 2: "gptq_v2"}
GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # GPTQModel's, or whole rows
ENOUGH = 1 << 16  # weights, below which their mean tells nothing
BLOCK = re.compile(r"^(.*?\.\d+)\.(.+)$")  # model.layers.3 . mlp.up_proj


@dataclass(frozen=True)
class Kind:
    """What config.json says of one packed linear; `whole`: its group is a whole row."""

    bits: int
    group: int
    whole: bool
    symmetric: bool
    ordered: bool


@dataclass(frozen=True)
class Gptq:
    """One version of the format: 1 stores zero - 1, 2 the zero."""

    version: int

    @property
    def NAME(self) -> str:
        return f"GPTQ ({LABELS[self.version]})"

    def fits(self, packed: Mapping[str, PackedWeight]) -> str | None:
        """Why this model cannot be written in this format, or None: affine weights with integer zeros that fill whole words can.

        Groups must be those that GPTQModel has. It takes any width of a layer; kernels of auto-gptq and others want multiples of 32.
        """
        why = foreign.affine_reason(packed, layout.STORED)
        if why:
            return why
        for name, weight in packed.items():
            step = 32 // gcd(32, weight.bits)
            for width, what in zip(weight.shape, ("outputs", "inputs"), strict=True):
                if width % step:
                    return f"{name} has {width} {what}, and the format's words of {weight.bits} bits want a multiple of {step}"
            if why := foreign.group_reason(name, weight, GROUPS) or foreign.half_reason(name, weight.learned):
                return why
        return None

    def held(self, weight: PackedWeight) -> PackedWeight:
        """What the folder will store: scales in float16, columns in order inside their groups, for version 1 no zero of 0; only the first rounds."""
        weight = foreign.with_half_scales(foreign.plain(weight))
        return weight if self.version == 2 else without_zero(weight)

    def tensors_of(self, name: str, weight: PackedWeight) -> dict[str, Tensor]:
        """The format's tensors of one packed linear, in CPU memory."""
        zeros = foreign.zeros_of(weight).T.contiguous()  # [G, n]
        stored = zeros if self.version == 2 else (zeros - 1) & ((1 << weight.bits) - 1)
        values = (
            layout.pack_stream(weight.in_order(weight.codes()), weight.bits).T, layout.pack_stream(stored, weight.bits),
            weight.learned.detach().T.half(), weight.g_idx(),
        )  # fmt: skip
        return {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in zip(PARTS, values, strict=True)}

    def write(
        self,
        folder: Path,
        config: Mapping[str, Any],
        weights: Iterable[tuple[str, Tensor | PackedWeight]],
        ignore: list[str],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """config.json, quantize_config.json for readers that look there, and the weights in shards of at most `shard_bytes`.

        `weights` yields dotted tensor names with tensors and dotted module names with packed weights, as `held` gives them; it is consumed as a
        stream. `ignore` lists the nn.Linear modules that stay dense.
        """
        kinds: dict[str, Kind] = {}

        def encode(name: str, weight: PackedWeight) -> dict[str, Tensor]:
            kinds[name] = Kind(weight.bits, weight.group, weight.group == weight.shape[1], weight.zero is None, weight.columns is not None)
            return self.tensors_of(name, weight)

        shards.write_weights(folder, weights, encode, shard_bytes)
        quantization = self.quantization_config(kinds, ignore)
        shards.write_json(folder / "config.json", for_old_readers(config) | {"quantization_config": quantization})
        shards.write_json(folder / "quantize_config.json", quantization)

    def quantization_config(self, kinds: Mapping[str, Kind], ignore: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json: the scheme of most layers, and in `dynamic` the layers that have another or none."""
        parts = {kind.group for kind in kinds.values() if not kind.whole}
        schemes = {name: (kind.bits, -1 if kind.whole and kind.group not in parts else kind.group) for name, kind in kinds.items()}
        (bits, group), _ = Counter(schemes.values()).most_common(1)[0]
        dense = [name for name in ignore if _in_blocks(name, kinds)]
        other = {name: scheme for name, scheme in schemes.items() if scheme != (bits, group)}
        dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in dense}
        dynamic |= {f"+:^{re.escape(name)}$": {"bits": scheme[0], "group_size": scheme[1]} for name, scheme in other.items()}
        modules = _same_in_all_blocks(kinds) if dense else None
        return {
            "quant_method": METHOD, "bits": bits, "group_size": group, "sym": all(kind.symmetric for kind in kinds.values()),
            "desc_act": any(kind.ordered for kind in kinds.values()), "checkpoint_format": LABELS[self.version], "pack_dtype": "int32",
            "lm_head": "lm_head" in kinds, "meta": {"quantizer": [f"compressor:{__version__}"]},
        } | ({"dynamic": dynamic} if dynamic else {}) | ({"modules_in_block_to_quantize": [modules]} if modules else {})  # fmt: skip

    def read(self, folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
        """A folder of either version, as its config says: `read` below."""
        return read(folder, files, config)


V1, V2 = Gptq(1), Gptq(2)


def same(config: Mapping[str, Any]) -> Gptq:
    """The writer of the version that a quantization_config names, so that a folder is written back as it was."""
    return V2 if label(config) == LABELS[2] else V1


def without_zero(weight: PackedWeight) -> PackedWeight:
    """The same weight, number for number, with no zero of 0: its groups move up by one code where there is room, else they are mirrored."""
    if weight.zero is None or not bool((weight.zero == 0).any()):
        return weight
    top, low, scale = (1 << weight.bits) - 1, weight.zero == 0, weight.learned  # low: bool [n, G]
    codes = weight.codes().view(*low.shape, weight.group)
    full = low & (codes.amax(-1) == top)
    raised = codes + (low & ~full).unsqueeze(-1)
    codes = torch.where(full.unsqueeze(-1), top - codes, raised).view(weight.shape)
    zero = torch.where(full, top, weight.zero + low)
    values = Affine(torch.where(full, -scale, scale), zero.to(torch.uint8))
    return PackedWeight.pack(codes, values, weight.bits, weight.group, weight.columns)


def for_old_readers(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what transformers before 5 calls dtype and rope_parameters, too."""
    rope = config.get("rope_parameters")
    out = dict(config) | ({"torch_dtype": config["dtype"]} if "dtype" in config else {})
    if isinstance(rope, dict) and "rope_theta" in rope:
        out["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            out["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return out


def _in_blocks(name: str, kinds: Iterable[str]) -> bool:
    """Whether a linear lies in a block beside packed ones, where readers expect it packed."""
    block = BLOCK.match(name)
    prefixes = {found[1].rpartition(".")[0] for other in kinds if (found := BLOCK.match(other))}
    return block is not None and block[1].rpartition(".")[0] in prefixes


def _same_in_all_blocks(kinds: Iterable[str]) -> list[str] | None:
    """The names of packed linears inside a block, if every block has the same."""
    blocks: dict[str, set[str]] = {}
    for name in kinds:
        if found := BLOCK.match(name):
            blocks.setdefault(found[1], set()).add(found[2])
    sets = list(blocks.values())
    return sorted(sets[0]) if sets and all(each == sets[0] for each in sets) else None


def unlabelled(folder: Path, files: Iterable[Path]) -> dict[str, Any] | None:
    """The quantization_config of a folder with GPTQ's tensors whose config.json has none, or None where it holds no such tensors.

    quantize_config.json if there is one (auto-gptq's own folders), else EfficientQAT's own form: true zeros, asymmetric, bits by the shapes.
    """
    if not any(name.endswith(".qweight") for name in shards.read_headers(folder, files)):
        return None
    path = folder / "quantize_config.json"
    if not path.exists():
        return {"quant_method": METHOD, "checkpoint_format": LABELS[2], "sym": False}
    try:
        config = strict.read(path)
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is damaged: it holds no mapping")
    return {"quant_method": METHOD} | config


def label(config: Mapping[str, Any]) -> str:
    """The version that a folder says its zeros are of, one of LABELS for those that are read."""
    return str(config.get("checkpoint_format") or config.get("format") or LABELS[1]).lower()


def makers(config: Mapping[str, Any]) -> list[str]:
    """The programs that a folder says it comes from, without their versions."""
    meta = config.get("meta")
    named = meta.get("quantizer") if isinstance(meta, dict) else None
    return [str(each).partition(":")[0].lower() for each in (named if isinstance(named, list) else [named])]


def _named(config: Mapping[str, Any], key: str) -> list[Any]:
    """What a configuration says under `key`, for all layers and for some."""
    dynamic = config.get("dynamic")
    some = [each.get(key) for each in dynamic.values() if isinstance(each, dict)] if isinstance(dynamic, dict) else []
    return [value for value in (config.get(key), *some) if value is not None]


def sizes(config: Mapping[str, Any]) -> set[int]:
    """The group sizes that a configuration names, for all layers and for some."""
    return {size for size in _named(config, "group_size") if type(size) is int}


def _widths(config: Mapping[str, Any], folder: Path) -> set[int]:
    """The bits that a configuration names, for all layers and for some; all that there are if it names none."""
    found = _named(config, "bits")
    for bits in found:
        if type(bits) is not int or bits not in layout.STORED:
            raise ModelError(f"{folder} holds GPTQ weights of {str(bits)[:20]} bits; compressor reads {', '.join(map(str, layout.STORED))}")
    return set(found or layout.STORED)


@dataclass(frozen=True)
class Layer:
    """A linear as read: `zeros` uint8 [n, G] as either version has them, `means` of code - zero with them."""

    weight: PackedWeight
    zeros: tuple[Tensor, Tensor]
    means: tuple[float, float]


def read(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """(dense tensors by name, packed weights by module name) of a GPTQ folder; `config` is its quantization_config.

    Scales keep the dtype they have; a weight whose zeros all are 2**(bits-1) is symmetric. ModelError for what is damaged or of another form.
    """
    form, words = label(config), str(config.get("pack_dtype") or "int32").removeprefix("torch.")
    if form not in LABELS.values() or config.get("is_marlin_format"):
        form = form if form not in LABELS.values() else "marlin"
        raise ModelError(f"{folder} is a GPTQ folder in the form {form}, which is not read: save it as checkpoint_format gptq or gptq_v2")
    if words != "int32":
        raise ModelError(f"{folder} is a GPTQ folder of {words} words, which is not read: save it with pack_dtype int32")
    dense, parts = shards.read_weights(folder, files, PARTS)
    widths, groups, made_by = _widths(config, folder), sizes(config), makers(config)
    layers = {
        name: decode(parts.pop(name), f"{folder}: {name}", widths, groups, bool(config.get("desc_act")), "gptqmodel" in made_by)
        for name in list(parts)
    }
    version = 2 if form == LABELS[2] else 1
    if "compressor" not in made_by and evident(layers.values(), config) == 3 - version:
        warnings.warn(f"{folder} is labelled {form}, but its zeros are stored as {LABELS[3 - version]} stores them, and are read so", stacklevel=2)
        version = 3 - version
    out = {}
    for name, layer in layers.items():
        zero = foreign.symmetric(layer.zeros[version - 1], layer.weight.bits)
        out[name] = replace(layer.weight, values=Affine(layer.weight.learned, zero))
    return dense, out


def evident(layers: Iterable[Layer], config: Mapping[str, Any]) -> int | None:
    """The version that the stored zeros speak for, or None where they tell nothing."""
    layers = list(layers)
    for version in (1, 2) if layers else ():
        if config.get("sym") is not False and all(foreign.symmetric(layer.zeros[version - 1], layer.weight.bits) is None for layer in layers):
            return version
    telling = [(layer.means, layer.weight.shape[0] * layer.weight.shape[1]) for layer in layers if layer.weight.bits < 8]
    count = sum(size for _, size in telling)
    if count < ENOUGH:
        return None
    for right, wrong in ((0, 1), (1, 0)):
        near, far = (abs(sum(means[each] * size for means, size in telling) / count) for each in (right, wrong))
        agree = sum(size for means, size in telling if abs(means[right]) < abs(means[wrong]))
        if near < 0.25 and far > 0.75 and agree >= 0.9 * count:
            return right + 1
    return None


def decode(parts: Mapping[str, Tensor], where: str, widths: set[int], named: set[int], desc_act: bool, whole_words: bool) -> Layer:
    """One linear. widths, named: the bits and group sizes that the configuration names; whole_words: its
    zeros minus one were made by subtracting from whole words."""
    words, stored, scales = foreign.parts_of(parts, PARTS[:3], where)
    foreign.check_words(words, "qweight", where)
    foreign.check_words(stored, "qzeros", where)
    foreign.check_scales(scales, "scales", where)
    groups, n = scales.shape
    index = parts.get("g_idx")
    index = index if index is not None and index.numel() else None
    bits, padded = _bits(words, stored, n, None if index is None else index.numel(), widths, where)
    k = index.numel() if index is not None else words.shape[0] * 32 // bits
    foreign.check_groups(k, groups, named, where)
    if stored.shape[0] != groups or not k or k % groups:
        raise ModelError(f"{where} is damaged: qzeros {tuple(stored.shape)} and scales {tuple(scales.shape)} do not fit {k} inputs and {n} outputs")
    columns = None if index is None else _columns(index, groups, desc_act, where)
    codes, zeros = _unpack(words.T.contiguous(), bits, k, padded), _unpack(stored, bits, n, padded)  # [n, k], [G, n]
    if whole_words and bits != 3:
        raised = layout.unpack_stream(stored.to(torch.int64) + sum(1 << shift for shift in range(0, 32, bits)), bits, n)
    else:
        raised = (zeros + 1) & ((1 << bits) - 1)
    codes = codes if columns is None else codes[:, columns]
    mean = float(codes.mean(dtype=torch.float64))
    both = (raised.T.contiguous(), zeros.T.contiguous())
    weight = PackedWeight.pack(codes, Affine(scales.T.contiguous()), bits, k // groups, columns)
    return Layer(weight, both, (mean - float(both[0].double().mean()), mean - float(both[1].double().mean())))


def _bits(words: Tensor, stored: Tensor, n: int, k: int | None, widths: set[int], where: str) -> tuple[int, bool]:
    """Bits by the shapes, and whether ten codes of 3 bits fill a word; k None: not known."""
    rows, across = words.shape[0], stored.shape[1]
    if words.shape[1] == n:
        for bits in sorted(widths):
            whole = rows * 32 % bits == 0 if k is None else k * bits == 32 * rows
            if n * bits == 32 * across and whole:
                return bits, False
        if 3 in widths and k is not None and (rows, across) == (-(-k // 10), -(-n // 10)):
            return 3, True
    raise ModelError(
        f"{where} is damaged: qweight {tuple(words.shape)} and qzeros {tuple(stored.shape)} are no words of {' or '.join(map(str, sorted(widths)))} "
        f"bits for {n} outputs{'' if k is None else f' and {k} inputs'}"
    )


def _unpack(words: Tensor, bits: int, count: int, padded: bool) -> Tensor:
    return foreign.unpack_fields(words, bits)[:, :count].contiguous() if padded else layout.unpack_stream(words, bits, count)


def _columns(index: Tensor, groups: int, desc_act: bool, where: str) -> Tensor | None:
    """The columns in the order of their groups; an index of zeros only is how old writers say that they are in order."""
    if index.dtype not in (torch.int32, torch.int64) or int(index.min()) < 0 or int(index.max()) >= groups:
        raise ModelError(f"{where} is damaged: g_idx is {foreign.described(index)}, and must be whole numbers from 0 to {groups - 1}")
    if not desc_act and not bool(index.any()):
        return None
    try:
        return by_groups(index, groups)
    except ModelError as error:
        raise ModelError(f"{where} is damaged: its g_idx is {error}") from None
