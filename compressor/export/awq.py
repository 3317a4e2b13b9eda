"""AWQ folders (`quant_method: awq`, version gemm), as AutoAWQ wrote them and transformers, vLLM and SGLang read them: 4 bits, also asymmetric.

Per packed linear of k inputs and n outputs: `qweight` int32 [k, n/8], `qzeros` int32 [G, n/8], `scales` float16 [G, n]. A word holds eight neighbours
along n, in its nibbles from the low end those of offset 0, 2, 4, 6, 1, 3, 5, 7. Zeros are stored as they are; symmetric weights get 8 everywhere, and
are known by that when read. Exact up to the float16 of scales.

Limits: 4 bits, one group size for the whole model, of those that GPTQModel 7, and by it transformers, has (vLLM has no 16), columns in order. The
other layouts that go by the name (gemv, gemv_fast, marlin, exllama's own,
llm-awq) are refused; AutoAWQ is retired and hardly anything in them is published.
Source: AutoAWQ's packing_utils, vLLM's awq.py.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.export import foreign, shards
from compressor.export.gptq import for_old_readers
from compressor.export.shards import SHARD_BYTES
from compressor.packed import Affine, PackedWeight

NAME = "AWQ (gemm)"
METHOD = "awq"
PARTS = ("qweight", "qzeros", "scales")
BITS = 4
GROUPS = (16, 32, 64, 128)  # or whole rows
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds neighbour ORDER[i]


def fits(packed: Mapping[str, PackedWeight]) -> str | None:
    """Why this model cannot be written in this format, or None: affine weights of 4 bits with integer zeros and one group size can."""
    why = foreign.affine_reason(packed, (BITS,))
    if why:
        return why
    for name, weight in packed.items():
        if weight.columns is not None:
            return f"the columns of {name} are in another order (act-order), which the format does not know"
        if weight.shape[0] % 8:
            return f"{name} has {weight.shape[0]} outputs, and the format's words want a multiple of 8"
        if why := foreign.group_reason(name, weight, GROUPS) or foreign.half_reason(name, weight.learned):
            return why
    if _group({(weight.group, weight.shape[1]) for weight in packed.values()}) is None:
        sizes = sorted({weight.group for weight in packed.values()})
        return f"its layers have groups of {', '.join(map(str, sizes))} columns, and the format knows one size for all"
    return None


def _group(sizes: Iterable[tuple[int, int]]) -> int | None:
    """The group_size of layers with these (group, inputs): -1 where all are whole rows, None where one number does not do."""
    found = list(sizes)
    if all(group == width for group, width in found):
        return -1
    return found[0][0] if len({group for group, _ in found}) == 1 else None


def held(weight: PackedWeight) -> PackedWeight:
    """What the folder will store: scales in float16."""
    return foreign.with_half_scales(foreign.plain(weight))


def tensors_of(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The format's tensors of one packed linear, in CPU memory."""
    zeros = foreign.zeros_of(weight).T.contiguous()  # [G, n]
    values = (_interleave(weight.codes().T.contiguous()), _interleave(zeros), weight.learned.detach().T.half())
    return {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in zip(PARTS, values, strict=True)}


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
    sizes: set[tuple[int, int]] = set()

    def encode(name: str, weight: PackedWeight) -> dict[str, Tensor]:
        sizes.add((weight.group, weight.shape[1]))
        return tensors_of(name, weight)

    shards.write_weights(folder, weights, encode, shard_bytes)
    quantization = {
        "quant_method": METHOD, "version": "gemm", "bits": BITS, "group_size": _group(sizes), "zero_point": True,
        "modules_to_not_convert": sorted(ignore) or None,
    }  # fmt: skip
    shards.write_json(folder / "config.json", for_old_readers(config) | {"quantization_config": quantization})


def read(folder: Path, files: list[Path], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """(dense tensors by name, packed weights by module name) of an AWQ folder; `config` is its quantization_config.

    Scales keep their dtype. ModelError for what is damaged, of another layout, or not of 4 bits.
    """
    form = str(config.get("version") or config.get("format") or "gemm").lower()
    if form != "gemm" or str(config.get("backend") or "").lower() == "llm-awq":
        form = form if form != "gemm" else "llm-awq"
        raise ModelError(f"{folder} is an AWQ folder in the layout {form}, and compressor reads gemm: convert it, or start from the dense model")
    bits = config.get("bits", config.get("w_bit", BITS))
    if bits != BITS:
        raise ModelError(f"{folder} is an AWQ folder of {bits} bits, and compressor reads {BITS}")
    dense, parts = shards.read_weights(folder, files, PARTS)
    return dense, {name: _decode(parts.pop(name), f"{folder}: {name}") for name in list(parts)}


def _decode(parts: Mapping[str, Tensor], where: str) -> PackedWeight:
    words, stored, scales = foreign.parts_of(parts, PARTS, where)
    foreign.check_words(words, "qweight", where)
    foreign.check_words(stored, "qzeros", where)
    foreign.check_scales(scales, "scales", where)
    (k, across), (groups, n) = words.shape, scales.shape
    if n != 8 * across or stored.shape != (groups, across) or not k or k % groups:
        shapes = f"qweight {tuple(words.shape)}, qzeros {tuple(stored.shape)} and scales {tuple(scales.shape)}"
        raise ModelError(f"{where} is damaged: {shapes} do not fit each other in the layout gemm")
    codes, zeros = _straighten(words).T.contiguous(), _straighten(stored).T.contiguous()  # [n, k], [n, G]
    return PackedWeight.pack(codes, Affine(scales.T.contiguous(), foreign.symmetric(zeros, BITS)), BITS)


def _interleave(codes: Tensor) -> Tensor:
    """uint8 [a, n] -> int32 [a, n/8]."""
    return foreign.pack_fields(codes.view(len(codes), -1, 8)[..., list(ORDER)].flatten(1), BITS)


def _straighten(words: Tensor) -> Tensor:
    """int32 [a, n/8] -> uint8 [a, n]."""
    back = torch.argsort(torch.tensor(ORDER)).tolist()
    return foreign.unpack_fields(words, BITS).view(len(words), -1, 8)[..., back].flatten(1)
