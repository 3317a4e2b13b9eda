"""A model folder as files: its name resolved, its files checked to be whole, their sizes, dtypes and digest. Nothing is loaded.

A name is `tiny` (embedded), a folder, a short name of `ALIASES`, or a hub id. A missing or truncated file, a damaged index, or a folder that holds no
causal language model each end in one sentence.
"""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch

from compressor.errors import ModelError
from compressor.pipelines import formats

TINY = Path(__file__).resolve().parent.parent / "models" / "tiny"
INDEX = "model.safetensors.index.json"
ALIASES = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-2-2b": "google/gemma-2-2b",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "pythia-410m": "EleutherAI/pythia-410m",
}
FILES = ["model*.safetensors", "gptq_model*.safetensors", "adapter/*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
COMPANIONS = (
    "tokenizer*", "*.model", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json",
)  # fmt: skip


def resolve(name: str) -> Path:
    """The local folder of a model, downloaded if it is a hub id."""
    if name == "tiny":
        return TINY
    if len(name) < 1024 and name and Path(name).is_dir():
        return Path(name)
    if len(name) >= 1024 or name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name):
        raise ModelError(f"there is no model folder {name[:200]}; give a folder, a hub id such as org/name, or one of: tiny, {', '.join(ALIASES)}")
    repo = ALIASES.get(name.lower(), name)
    if "/" not in repo:
        raise ModelError(f"unknown model {name!r}; give a folder, a hub id such as org/name, or one of: tiny, {', '.join(ALIASES)}")
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=FILES))
    except Exception as error:  # the hub client has a dozen error families; every one of them means the same to the user
        if constants.HF_HUB_OFFLINE:
            raise ModelError(f"{repo} is no folder here and not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it; unset that") from None
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"{repo} is no folder here and could not be fetched from the hub: {reason}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked to be of a causal language model."""
    config = any_config(folder)
    if not any(str(k).endswith(("ForCausalLM", "LMHeadModel")) for k in config["architectures"]):
        raise ModelError(f"{folder} holds {', '.join(map(str, config['architectures'])) or 'no named architecture'}, not a causal language model")
    return config


def any_config(folder: Path) -> dict[str, Any]:
    """config.json of whatever model, with `architectures` as a list."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder}/config.json is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/config.json is damaged: it holds no mapping")
    for key in ("vocab_size", "hidden_size", "max_position_embeddings"):
        if key in config and (not isinstance(config[key], int) or config[key] < 1):
            raise ModelError(f"{folder}/config.json is damaged: {key} is {config[key]!r}")
    kinds, packed = config.get("architectures") or [], formats.described(folder, config)
    return config | {"architectures": kinds if isinstance(kinds, list) else [kinds]} | ({"quantization_config": packed} if packed else {})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, each checked to be whole."""
    names = ["model.safetensors"] if (folder / "model.safetensors").exists() else _indexed(folder / INDEX)
    names = names or [path.name for path in folder.glob("gptq_model*.safetensors")][:1]  # AutoGPTQ's own name
    if not names:
        old = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = "only pickled weights, which are not read; convert them to safetensors" if old else "no safetensors files"
        raise ModelError(f"{folder} has {hint}")
    for name in names:
        _check_whole(folder / name)
    return [folder / name for name in names]


def _indexed(index: Path) -> list[str]:
    """File names of a sharded checkpoint's index; names that lead out of the folder are refused."""
    if not index.exists():
        return []
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        strange = [n for n in names if Path(n).name != n or n in ("", ".", "..")]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is damaged: it maps no tensor names to files") from None
    if strange:
        raise ModelError(f"{index} names {strange[0]!r}, which is no file of this folder")
    return names


def _check_whole(path: Path) -> None:
    try:
        entries, begin = header(path)
        end = max((v["data_offsets"][1] for v in entries.values()), default=0)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing although the index names it") from None
    except IsADirectoryError:
        raise ModelError(f"{path} is a folder, where a file of weights should be") from None
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ModelError(f"{path} is damaged or truncated: its header cannot be read") from None
    size = path.stat().st_size
    if begin + end != size:
        raise ModelError(f"{path} is truncated or damaged: {size} bytes where its header promises {begin + end}")


def header(path: Path) -> tuple[dict[str, Any], int]:
    """Tensor entries of a safetensors file, and where its data begins."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > min(path.stat().st_size - 8, 100_000_000):
            raise ValueError(length)
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def fingerprint(folder: Path) -> str:
    """The first 16 digits of `digest`, which tell models apart; against somebody who makes two that agree there it takes all 64."""
    return digest(folder)[:16]


def digest(folder: Path) -> str:
    """sha256, in hex, of every byte that decides what a model computes: config, weights, tokenizer (about a second a gigabyte)."""
    found = hashlib.sha256()
    for path in model_files(folder):
        with path.open("rb") as file:
            found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return found.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The files a server needs: config, weights with their index, tokenizer and its companions; what else lies there is not the model."""
    weights = weight_files(folder)
    found = ["quantize_config.json", *([] if weights[0].name == "model.safetensors" else [INDEX])]
    index = [folder / name for name in found if (folder / name).exists()]
    beside = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return [folder / "config.json", *index, *weights, *sorted(beside)]


def model_bytes(folder: Path) -> int:
    """Bytes of `model_files`."""
    return sum(path.stat().st_size for path in model_files(folder))


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating-point dtype that most bytes of the weights have, from the headers (config.json may say otherwise or nothing)."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    counts = dict.fromkeys(names, 0)
    for path in weight_files(folder):
        for value in header(path)[0].values():
            if value["dtype"] in counts:
                counts[value["dtype"]] += value["data_offsets"][1] - value["data_offsets"][0]
    return names[max(counts, key=lambda name: counts[name])]
