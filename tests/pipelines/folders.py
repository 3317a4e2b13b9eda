"""Small folders in every format, for tests of what headers say and of what servers make of it."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compressor.packed import Affine, PackedWeight, Table
from compressor.pipelines.folder_facts import Facts, Scheme

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
LAYERS = [f"model.layers.0.{name}" for name in NAMES]
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def weight(bits: int, group: int = 64, symmetric: bool = True, k: int = 128) -> PackedWeight:
    codes = torch.zeros(64, k, dtype=torch.uint8)
    if group == 0:
        return PackedWeight.pack(codes, Table(torch.zeros(64, 1, 1 << bits).half()), bits, k)
    scale = torch.ones(64, k // group).half()
    return PackedWeight.pack(codes, Affine(scale, None if symmetric else torch.ones(scale.shape, dtype=torch.uint8)), bits)


def packed(folder: Path, write: Callable[..., Any], schemes: Mapping[str, PackedWeight], **more: Any) -> Path:
    tensors = {"model.embed_tokens.weight": torch.zeros(9, 128), "lm_head.weight": torch.zeros(9, 128)}
    write(folder, CONFIG | more, [*tensors.items(), *schemes.items()], ["lm_head"])
    return folder


def gptq(folder: Path, bits: int, symmetric: bool, width: int = 128, n: int = 64, **more: Any) -> Path:
    tensors = {}
    for name in LAYERS:
        tensors[f"{name}.qweight"] = torch.zeros(width * bits // 32, n, dtype=torch.int32)
        tensors[f"{name}.qzeros"] = torch.zeros(2, n * bits // 32, dtype=torch.int32)
        tensors[f"{name}.scales"] = torch.ones(2, n).half()
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": width // 2, "sym": symmetric, "desc_act": False} | more
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    return folder


def gguf(path: Path, pairs: bytes = b"", count: int = 0, kinds: tuple[int, ...] = (2, 2, 0)) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    names = (
        text("general.architecture") + struct.pack("<I", 8) + text("llama") + text("x.words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc")
    )
    names += text("x.numbers") + struct.pack("<IIQ", 9, 5, 3) + bytes(12) + text("x.scale") + struct.pack("<If", 6, 0.5) + pairs
    infos = b"".join(text(f"t{i}") + struct.pack("<IQQIQ", 2, 256, 64, kind, 0) for i, kind in enumerate(kinds))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(kinds), 4 + count) + names + infos + bytes(64))
    return path


def facts(form: str, bits: int = 4, group: int = 128, symmetric: bool | None = True, **more: Any) -> Facts:
    return Facts(form, "LlamaForCausalLM", dict.fromkeys(LAYERS, Scheme(bits, group, symmetric)), dict.fromkeys(LAYERS, (256, 256)), **more)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The folder with its quantization_config changed in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder
