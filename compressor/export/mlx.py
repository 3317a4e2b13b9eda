"""The MLX folder: affine groups as mlx and mlx_lm read them, on Apple silicon and on CPUs.

Per packed linear: `weight` uint32 [n, k*bits/32], the dense bit stream of the codes along k, as in the compressed-tensors folder; `scales` and
`biases` [n, G], weight = scales * code + biases, so biases = -scale * zero. mlx knows groups of 32, 64 and 128 columns; longer ones are written as
several with the same scale, which is exact. Zeros may be floats. Price: a bias has the dtype of its scale, and in 16 bits the product of a scale and
a zero that is no power of two is rounded (`held` shows what a reader then sees); float32 scales and biases are exact for 16-bit scales, cost twice
as much, and make mlx compute in float32. Symmetric weights are exact always: their zero is a power of two. The scheme lies in config.json under
`quantization`, and again under `quantization_config`, where the hub looks for it. Limits: no tables, no act-order. Source: mlx_lm.utils.load_model
(0.32), mlx.core.quantize.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.export import shards
from compressor.export.shards import SHARD_BYTES
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight, Table

NAME = "MLX affine"
PARTS = ("weight", "scales", "biases")
GROUPS = (128, 64, 32)
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Scheme = tuple[int, int]  # bits, group


def fits(packed: Mapping[str, PackedWeight], dtype: torch.dtype | None = None) -> str | None:
    """Why this model cannot be written in this format, or None; dtype: of scales and biases, None: that of the scales."""
    tables = sum(isinstance(weight.values, Table) for weight in packed.values())
    if tables:
        return f"{tables} of its {len(packed)} packed layers hold tables, which the format does not know"
    for name, weight in packed.items():
        if weight.columns is not None:
            return f"{name} has groups of columns that do not lie side by side (act-order), which the format does not know"
        if not _width(weight.group):
            return f"{name} has groups of {weight.group} columns, and the format's are of 32, 64 or 128, or several of them"
        if (stored := dtype or weight.learned.dtype) not in DTYPES:
            return f"the scales of {name} are {_plain(stored)}, and the format knows float16, bfloat16 and float32"
        if not all(bool(torch.isfinite(part).all()) for part in scales_of(weight, dtype)):
            return f"the scales or biases of {name} are not finite in {_plain(stored)}"
    return None if packed else "no layer is packed"


def scales_of(weight: PackedWeight, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(scales, biases) [n, G] as they are stored, for the weight's own groups."""
    scale = weight.learned.detach()
    zero = torch.tensor(float(1 << (weight.bits - 1))) if weight.zero is None else weight.zero.detach()
    bias = -(scale.double() * zero.to(scale.device).double())
    return scale.to(dtype or scale.dtype), bias.to(dtype or scale.dtype)


def held(weight: PackedWeight, dtype: torch.dtype | None = None) -> PackedWeight | Tensor:
    """The weight itself where a reader computes exactly its numbers, else those that it sees, scale * code + bias, float32 [n, k].

    `write` takes the weight either way: rounding biases needs no other codes.
    """
    n, k = weight.shape
    scale, bias = (part.float().unsqueeze(-1) for part in scales_of(weight, dtype))  # [n, G, 1]
    seen = (weight.codes().view(n, -1, weight.group) * scale + bias).view(n, k)
    return weight if torch.equal(seen, weight.dequantize()) else seen


def tensors_of(name: str, weight: PackedWeight, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The format's tensors of one packed linear, in CPU memory."""
    times = weight.group // _width(weight.group)
    scale, bias = (part.repeat_interleave(times, 1).contiguous() for part in scales_of(weight, dtype))
    words = layout.pack_stream(weight.codes(), weight.bits).view(torch.uint32)
    return {f"{name}.{part}": tensor.cpu() for part, tensor in zip(PARTS, (words, scale, bias), strict=True)}


def write(
    folder: Path,
    config: dict[str, Any],
    weights: Iterable[tuple[str, Tensor | PackedWeight]],
    ignore: list[str],
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """config.json with its quantization, and the weights in shards of at most `shard_bytes` (a larger tensor gets its own).

    `weights` yields dotted tensor names with tensors and dotted module names with packed weights; it is consumed as a stream. `ignore` lists the
    nn.Linear modules that stay dense. dtype: of scales and biases, None: that of each weight's scales. Every file is written to a temporary name.
    """
    schemes: dict[str, Scheme] = {}

    def encode(name: str, weight: PackedWeight) -> dict[str, Tensor]:
        schemes[name] = (weight.bits, _width(weight.group))
        return tensors_of(name, weight, dtype)

    shards.write_weights(folder, weights, encode, shard_bytes)
    quantization = quantization_of(schemes, ignore)
    shards.write_json(folder / "config.json", config | {"quantization": quantization, "quantization_config": quantization})


def quantization_of(schemes: Mapping[str, Scheme], ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization` of config.json: the commonest scheme for all, the modules of others by name, and `false` for dense ones."""
    (bits, group), _ = Counter(schemes.values()).most_common(1)[0]
    others = {name: {"bits": b, "group_size": g, "mode": "affine"} for name, (b, g) in schemes.items() if (b, g) != (bits, group)}
    return {"bits": bits, "group_size": group, "mode": "affine"} | dict.fromkeys(ignore, False) | others


def describes(config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of this format: it has bits and groups, and no quant_method."""
    return "quant_method" not in config and {"bits", "group_size"} <= set(config)


def read(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """(dense tensors by name, packed weights by module name) of an MLX folder; `config` is its `quantization`.

    Embeddings, which mlx_lm quantises too, become dense, in the dtype of their scales as mlx itself decodes them. ModelError for other modes,
    for widths that compressor does not know, and for damage.
    """
    default = _scheme(config, f"{folder}/config.json is damaged")
    dense, parts = shards.read_weights(folder, files, PARTS)
    named = {name: entry for name, entry in config.items() if isinstance(entry, (dict, bool))}
    packed: dict[str, PackedWeight] = {}
    for module in list(parts):
        own, where = parts.pop(module), f"{folder}: {module}"
        if set(own) == {"weight"}:
            if own["weight"].dtype == torch.uint32:
                raise ModelError(f"{where} is incomplete: scales and biases missing")
            dense[f"{module}.weight"] = own["weight"]
            continue
        if named.get(module) is False:
            raise ModelError(f"{where} is damaged: it has scales, and config.json says that it is not quantised")
        entry = named.get(module)
        weight = _decode(own, *(_scheme(entry, f"{folder}/config.json is damaged") if isinstance(entry, dict) else default), where)
        if _embedding(module):
            dense[f"{module}.weight"] = weight.dequantize(weight.learned.dtype)
        else:
            packed[module] = weight
    present = set(packed) | {name.rpartition(".")[0] for name in dense if _embedding(name.rpartition(".")[0])}
    if absent := sorted(name for name, entry in named.items() if entry and name not in present):
        raise ModelError(f"{folder} lacks the packed weight of {absent[0]}, which its config.json lists")
    return dense, packed


def _scheme(entry: Mapping[str, Any], damaged: str) -> Scheme:
    bits, group, mode = entry.get("bits"), entry.get("group_size"), entry.get("mode", "affine")
    if mode != "affine":
        raise ModelError(f"{damaged.removesuffix(' is damaged')} names MLX's mode {mode!r}; compressor reads affine")
    if type(bits) is not int or type(group) is not int:
        raise ModelError(f"{damaged}: its quantization has bits {bits!r} and group_size {group!r}, which are no numbers")
    if bits not in layout.STORED:
        raise ModelError(f"{damaged.removesuffix(' is damaged')} names weights of {bits} bits; compressor reads {', '.join(map(str, layout.STORED))}")
    if group not in GROUPS:
        raise ModelError(f"{damaged}: MLX has no groups of {group} columns")
    return bits, group


def _decode(parts: Mapping[str, Tensor], bits: int, group: int, where: str) -> PackedWeight:
    """The packed weight of one module's tensors; ModelError if anything is damaged."""
    if absent := [part for part in PARTS if part not in parts]:
        raise ModelError(f"{where} is incomplete: {' and '.join(absent)} missing")
    words, scale, bias = (parts[part] for part in PARTS)
    if words.dtype != torch.uint32 or scale.dtype not in DTYPES or bias.dtype != scale.dtype:
        found = f"{_plain(words.dtype)}, {_plain(scale.dtype)} and {_plain(bias.dtype)}"
        raise ModelError(f"{where} is damaged: codes, scales and biases are {found}, and must be uint32 and twice one of float16, bfloat16, float32")
    if words.dim() != 2:
        raise ModelError(f"{where} has codes of shape {tuple(words.shape)}; compressor reads linear layers with two dimensions")
    n, k = words.shape[0], words.shape[1] * 32 // bits
    shapes = f"codes {tuple(words.shape)}, scales {tuple(scale.shape)} and biases {tuple(bias.shape)}"
    if not words.numel() or k % group or k * bits != words.shape[1] * 32 or tuple(scale.shape) != (n, k // group) or bias.shape != scale.shape:
        raise ModelError(f"{where} is damaged: {shapes} do not fit {bits} bits and groups of {group}")
    if not bool(torch.isfinite(scale).all() & torch.isfinite(bias).all()):
        raise ModelError(f"{where} is damaged: its scales or biases are not finite")
    zero = zeros_of(scale, bias, bits)
    if zero is not None and not bool(torch.isfinite(zero).all()):
        raise ModelError(f"{where} has groups with a bias and a scale of 0 or next to it, which no zero point can hold; quantise the model again")
    return PackedWeight.pack(layout.unpack_stream(words.view(torch.int32), bits, k), Affine(scale, zero), bits, group)


def zeros_of(scale: Tensor, bias: Tensor, bits: int) -> Tensor | None:
    """The zeros [n, G] that give these biases: None where all are the midpoint, uint8 where integers give each bias exactly, else float32."""
    middle = 1 << (bits - 1)
    wide, offset = scale.double(), -bias.double()
    exact = torch.where((wide == 0) & (offset == 0), middle, offset / wide)
    whole = exact.round().clamp(0, (1 << bits) - 1)
    if not torch.equal((wide * whole).to(torch.float32), offset.to(torch.float32)):
        return exact.to(torch.float32)
    return None if bool((whole == middle).all()) else whole.to(torch.uint8)


def _width(group: int) -> int:
    """The longest group of MLX's that divides this one; 0: none does."""
    return next((width for width in GROUPS if group % width == 0), 0)


def _embedding(module: str) -> bool:
    """Whether the name of a module is that of token embeddings."""
    return module.rpartition(".")[2] in EMBEDDINGS


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
