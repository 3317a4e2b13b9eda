"""HQQ folders (`quant_method: hqq`), as transformers and hqq save them in safetensors: affine weights whose zeros are floats.

Per packed linear, beside a bias: `W_q`, the codes; `scale` and `zero` [n*G, 1], floats; and what describes them, each a tensor of its own: nbits,
group_size, shape, axis, packing, compute_dtype and some that only inform. A number is a scalar, a name is its characters in uint8. With axis 1 a row
of the matrix of codes [n*G, group] is a group. It is cut into p equal parts of rows, and a word holds one code of each part, the first part highest:
`8bit_u8` p = 1, `4bit_u8` 2, `2bit_u8` 4, `3bit_32` 10 in int32, filled up with rows of zeros. `view_as_float` stores the same bytes as floats.

weight = scale * (code - zero), which the library forms in compute_dtype and we in float32. Zeros that are integers from 0 to 2**bits - 1 throughout a
layer become integers, others stay floats of their dtype, so that tuned zeros fit, too: it is the one format of others that holds them.

Limits: axis 0, whose groups run down columns, and groups across rows are refused, and so are 1, 5 and 6 bits. hqq has one dtype for a layer, so
zeros are stored in that of its scales. transformers knows one scheme for each name in a block, and none by the block's number; its version 5.23 loads
no HQQ folder at all, the library's own neither: it warns and leaves every linear at random. hqq's own HQQLinear reads these tensors.
Source: hqq/core/quantize.py and bitpack.py, hqq 0.2.8.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.export import foreign, shards
from compressor.export.gptq import for_old_readers
from compressor.export.shards import SHARD_BYTES
from compressor.packed import Affine, PackedWeight, Table, zeros_as_floats

NAME = "HQQ"
METHOD = "hqq"
PACKINGS = {2: ("2bit_u8", 4), 3: ("3bit_32", 10), 4: ("4bit_u8", 2), 8: ("8bit_u8", 1)}  # name, codes a word
NEEDED = ("W_q", "scale", "zero", "shape", "nbits", "axis", "packing")
PARTS = (
    *NEEDED, "group_size", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict",
    "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip


def fits(packed: Mapping[str, PackedWeight]) -> str | None:
    """Why this model cannot be written in this format, or None: affine weights can, with integer or tuned zeros."""
    if not packed:
        return "no layer is packed"
    schemes: dict[str, tuple[int, int]] = {}
    for name, weight in packed.items():
        if isinstance(weight.values, Table):
            return f"{name} holds tables, which the format does not know"
        if weight.columns is not None:
            return f"the columns of {name} are in another order (act-order), which the format does not know"
        rows, (packing, parts) = weight.learned.numel(), PACKINGS[weight.bits]
        if weight.bits != 3 and rows % parts:
            return f"{name} has {rows} groups, and the packing {packing} wants a multiple of {parts}"
        for what, values in (("scales", weight.learned), ("zeros", weight.zero)):
            if values is not None and not bool(torch.isfinite(values).all()):
                return f"the {what} of {name} are not finite"
        if not bool(torch.isfinite(_zeros(weight)).all()):
            return f"the zeros of {name} are beyond the range of its scales' dtype, in which the format holds them"
        scheme = (weight.bits, -1 if weight.group == weight.shape[1] else weight.group)
        if schemes.setdefault(_tag(name), scheme) != scheme:
            return f"{name} has another number of bits or group size than its namesakes in other blocks, which the format does not know"
    return None


def _tag(name: str) -> str:
    """What transformers calls a linear, whichever block it is in: model.layers.3.mlp.up_proj -> mlp.up_proj."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric())


def _zeros(weight: PackedWeight) -> Tensor:
    """The zeros [n, G] as floats of the scales' dtype."""
    return zeros_as_floats(weight.learned, weight.zero, weight.bits).to(weight.learned.dtype)


def held(weight: PackedWeight) -> PackedWeight:
    """What the folder will store: zeros in the dtype of the scales, as integers where they are some."""
    return replace(weight, values=Affine(weight.learned, _as_integers(_zeros(weight), weight.bits)))


def _as_integers(zero: Tensor, bits: int) -> Tensor | None:
    """Zeros that are codes throughout as uint8, None if all are the midpoint; else as they are."""
    whole = bool(((zero == zero.round()) & (zero >= 0) & (zero < 1 << bits)).all())
    return foreign.symmetric(zero.to(torch.uint8), bits) if whole else zero


def tensors_of(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The format's tensors of one packed linear, in CPU memory."""
    codes, scale = weight.codes().view(-1, weight.group), weight.learned.detach()  # [n*G, group]
    kind, packing = str(scale.dtype), PACKINGS[weight.bits][0]
    values: dict[str, Any] = {
        "W_q": _pack(codes, weight.bits), "scale": scale.reshape(-1, 1), "zero": _zeros(weight).detach().reshape(-1, 1), "nbits": weight.bits,
        "group_size": weight.group, "shape": torch.tensor(weight.shape, dtype=torch.int64), "axis": 1, "packing": packing, "compute_dtype": kind,
        "unpack_view_dtype": "torch.int32" if weight.bits == 3 else "torch.uint8", "view_as_float": False, "quant_scale": False, "quant_zero": False,
        "offload_meta": False, "encoded_state_dict": True, "stores_quant_config": True, "channel_wise": True, "optimize": True, "round_zero": False,
    }  # fmt: skip
    return {f"{name}.{part}": _tensor(value).cpu().contiguous() for part, value in values.items()}


def _tensor(value: Tensor | str | bool | int) -> Tensor:
    """How the library keeps a number or a name in safetensors."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    return torch.tensor(int(value), dtype=torch.uint8 if isinstance(value, bool) else torch.int32)


def write(
    folder: Path,
    config: Mapping[str, Any],
    weights: Iterable[tuple[str, Tensor | PackedWeight]],
    ignore: list[str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """config.json and the weights in shards of at most `shard_bytes`; `ignore` lists the nn.Linear modules that stay dense.

    `weights` yields dotted tensor names with tensors and dotted module names with packed weights, as `held` gives them; it is consumed as a stream.
    """
    schemes: dict[str, Any] = {}

    def encode(name: str, weight: PackedWeight) -> dict[str, Tensor]:
        grid = {"nbits": weight.bits, "group_size": weight.group, "axis": 1, "channel_wise": True, "optimize": True, "round_zero": False}
        schemes[_tag(name)] = {
            "weight_quant_params": grid | {"view_as_float": False}, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False,
        }  # fmt: skip
        return tensors_of(name, weight)

    shards.write_weights(folder, weights, encode, shard_bytes)
    quantization = {"quant_method": METHOD, "quant_config": schemes, "skip_modules": sorted({_tag(name) for name in ignore} - set(schemes))}
    shards.write_json(folder / "config.json", for_old_readers(config) | {"quantization_config": quantization})


def read(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """(dense tensors by name, packed weights by module name) of an HQQ folder; the tensors say all that counts, `config` nothing.

    Scales and zeros keep their dtype. ModelError for what is damaged or of a form that is not read.
    """
    dense, parts = shards.read_weights(folder, files, PARTS)
    for name in [name for name in parts if "W_q" not in parts.names(name)]:
        dense |= {f"{name}.{part}": tensor for part, tensor in parts.pop(name).items()}
    if not parts:
        raise ModelError(f"{folder} says that it is quantised with hqq, but holds no W_q: save it again with hqq's own save_to_safetensors")
    return dense, {name: _decode(parts.pop(name), f"{folder}: {name}") for name in list(parts)}


def _decode(parts: Mapping[str, Tensor], where: str) -> PackedWeight:
    foreign.parts_of(parts, NEEDED, where)
    bits, (n, k), packing = _number(parts, "nbits", where), _shape(parts["shape"], where), _name(parts["packing"])
    if bits not in PACKINGS or packing != PACKINGS[bits][0]:
        raise ModelError(f"{where} has {bits} bits packed as {packing[:20]!r}; compressor reads 2, 3, 4 and 8 bits of hqq in their own packing")
    if _number(parts, "axis", where) != 1:
        raise ModelError(f"{where} has groups down its columns (axis 0), which compressor does not run: quantise it with axis=1")
    if any(flag in parts and _number(parts, flag, where) for flag in ("quant_scale", "quant_zero")):
        raise ModelError(f"{where} has scales or zeros that are quantised themselves, which compressor does not read: quantise it without")
    scale, zero = parts["scale"], parts["zero"]
    foreign.check_scales(scale, "scale", where)
    foreign.check_scales(zero, "zero", where)
    rows = scale.shape[0]
    if scale.shape[1] != 1 or zero.shape != scale.shape or (n * k) % rows:
        raise ModelError(f"{where} is damaged: scale {tuple(scale.shape)} and zero {tuple(zero.shape)} do not fit a weight of shape {(n, k)}")
    group = n * k // rows
    if k % group:
        raise ModelError(f"{where} has groups of {group} that run across rows of {k}, which compressor does not run")
    codes = _unpack(parts["W_q"], bits, rows, group, where).view(n, k)
    return PackedWeight.pack(codes, Affine(scale.reshape(n, -1), _as_integers(zero.reshape(n, -1), bits)), bits)


def _number(parts: Mapping[str, Tensor], part: str, where: str) -> int:
    tensor = parts[part]
    if tensor.numel() != 1 or not float(tensor).is_integer():
        raise ModelError(f"{where} is damaged: {part} is {foreign.described(tensor)}, and must be one whole number")
    return int(tensor)


def _shape(tensor: Tensor, where: str) -> tuple[int, int]:
    if tensor.numel() != 2 or tensor.is_floating_point() or int(tensor.min()) < 1:
        raise ModelError(f"{where} is damaged: its shape must be two positive numbers")
    n, k = tensor.flatten().tolist()
    return n, k


def _name(tensor: Tensor) -> str:
    """The characters of a name; of anything else something that is no name."""
    return bytes(tensor.flatten().tolist()).decode("latin-1") if tensor.dtype == torch.uint8 else foreign.described(tensor)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, group] -> the words [ceil(rows/p), group], uint8, int32 at 3 bits."""
    count = PACKINGS[bits][1]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % count)).view(count, -1, codes.shape[1])
    words = torch.zeros_like(padded[0], dtype=torch.int32 if bits == 3 else torch.uint8)
    for part in padded:
        words = (words << bits if count > 1 else words) | part
    return words


def _unpack(words: Tensor, bits: int, rows: int, group: int, where: str) -> Tensor:
    """Inverse of _pack, from whatever dtype the bytes are stored as."""
    count, wanted = PACKINGS[bits][1], torch.int32 if bits == 3 else torch.uint8
    seen = words.contiguous().view(wanted) if words.dim() == 2 and (words.is_floating_point() or words.dtype == wanted) else words
    if seen.dtype != wanted or seen.shape != (-(-rows // count), group):
        raise ModelError(f"{where} is damaged: W_q is {foreign.described(words)}, which is no packing of {rows} groups of {group} in {bits} bits")
    shifts = torch.arange(count - 1, -1, -1, device=words.device) * bits
    return ((seen.unsqueeze(0).to(torch.int32) >> shifts.view(-1, 1, 1)) & ((1 << bits) - 1)).to(torch.uint8).flatten(0, 1)[:rows].contiguous()
