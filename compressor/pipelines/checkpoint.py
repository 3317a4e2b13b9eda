"""A model folder as files: its name resolved, its files checked to be whole, their sizes, dtypes and digest. Nothing is loaded.

A name is `tiny` (embedded), a folder, a short name of `ALIASES`, or a hub id. A missing or truncated file, a damaged index, or a folder that holds no
causal language model each end in one sentence.
"""

import hashlib
import math
import os
import re
import struct
from pathlib import Path
from typing import Any

import torch

from compressor import strict
from compressor.errors import ModelError
from compressor.export import shards
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
KINDS = (".safetensors", ".json", ".model", ".txt", ".jinja", ".gguf")  # ends of names of files that are read
SIZES = re.compile(r"_(size|dim|layers?|heads?|experts|rank|labels|positions|embeddings|groups|inner|ctx|embd|model|ff)$")
COUNTS, MANY = re.compile(r"_(layers?|experts|labels|heads?)$"), 1 << 16  # of which no model has so many
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
    check_places(folder)
    try:
        config = strict.read(folder / "config.json")
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/config.json is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/config.json is damaged: it holds no mapping")
    for key in ("vocab_size", "hidden_size", "max_position_embeddings"):
        if key in config and (type(config[key]) is not int or config[key] < 1):
            raise ModelError(f"{folder}/config.json is damaged: {key} is {str(config[key])[:40]!r}")
    _check_sizes(config, folder)
    kinds, packed = config.get("architectures") or [], formats.described(folder, config)
    return config | {"architectures": kinds if isinstance(kinds, list) else [kinds]} | ({"quantization_config": packed} if packed else {})


def check_places(folder: Path) -> None:
    """ModelError for a file of the folder that is none, such as a pipe, or a link to what lies elsewhere, which a stranger's folder would have read
    and copied into what is written. Links of the hub's cache, from snapshots/REVISION to the blobs beside, are files.
    """
    roots = [os.path.realpath(folder)]
    revisions = Path(roots[0]).parent
    roots += [str(revisions.parent / "blobs")] if revisions.name == "snapshots" else []
    for path in [path for place in (folder, folder / "adapter") if place.is_dir() for path in place.iterdir() if path.suffix in KINDS]:
        if path.is_symlink() and not (path.exists() and os.path.realpath(path).startswith(tuple(root + os.sep for root in roots))):
            raise ModelError(f"{path} is a link that leads out of its folder, or nowhere: put the file itself there")
        if not (path.is_file() or path.is_dir() or path.is_symlink()):
            raise ModelError(f"{path} is no regular file: take it out of the folder")


def _check_sizes(config: dict[str, Any], folder: Path) -> None:
    """ModelError for a size or a count, at any depth of a config.json, that no model has, before anybody makes room for it."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, folder)
        size = isinstance(value, int | float) and SIZES.search(str(key)) is not None
        if size and not abs(value) < (MANY if COUNTS.search(str(key)) else 1 << 31):
            raise ModelError(f"{folder}/config.json is damaged: {key[:60]} is {value}, which no model has")


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
        names = sorted(set(strict.read(index, 4 * strict.LARGEST)["weight_map"].values()))
        strange = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is damaged: it maps no tensor names to files") from None
    if strange:
        raise ModelError(f"{index} names {strange[0][:200]!r}, which is no safetensors file of this folder")
    return names


def _check_whole(path: Path) -> None:
    try:
        entries, begin = header(path)
        end = _filled(entries)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing although the index names it") from None
    except IsADirectoryError:
        raise ModelError(f"{path} is a folder, where a file of weights should be") from None
    except (OSError, struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        why = f" ({error})" if type(error) is ValueError else ""
        raise ModelError(f"{path} is damaged or truncated: its header cannot be read{why}") from None
    size = path.stat().st_size
    if begin + end != size:
        raise ModelError(f"{path} is truncated or damaged: {size} bytes where its header promises {begin + end}")


def _filled(entries: dict[str, Any]) -> int:
    """Bytes of the tensors of a header; ValueError unless they follow each other without a gap, each as large as its shape."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if not all(type(size) is int and 0 <= size < 1 << 48 for size in (*entry["shape"], begin, end)) or begin != at or end < begin:
            raise ValueError(f"{name[:60]!r} does not begin where the tensor before it ends, or has no shape")
        width = math.prod(entry["shape"]) * shards.DTYPES[entry["dtype"]].itemsize if entry["dtype"] in shards.DTYPES else end - begin
        if width != end - begin:
            raise ValueError(f"{name[:60]!r} has {end - begin} bytes, and its shape wants others")
        at = end
    return at


def header(path: Path) -> tuple[dict[str, Any], int]:
    """Tensor entries of a safetensors file, and where its data begins."""
    if not path.is_file() and path.exists() and not path.is_dir():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > min(path.stat().st_size - 8, 2 * strict.LARGEST):
            raise ValueError("its length is not that of a header")
        entries = strict.parse(file.read(length))
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
