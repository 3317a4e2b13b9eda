"""Adapters of peft as data: a configuration and tensors that somebody gave, judged, put beside a model, and exchanged.

An exchange that fails leaves the first adapter bit for bit. Configurations come from strangers: only kinds that wrap linears are let in, no key that
makes peft import a module by its name, copy or repeat layers, or match names by patterns, and no rank beyond the layers.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.integrations import peft as adapters
from compressor.linear import packed_linears

TYPES = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "MISS")  # what peft calls the kinds of `adapters.KINDS`
STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "bat", "mini")  # of paths; others write into the weight or need data
NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern", "layers_to_transform")
RANKS = ("r", "init_r", "target_r", "rank", "decompose_factor")
ABSENT = ("megatron_config", "layer_replication", "modules_to_save", "trainable_token_indices", "target_parameters", "arrow_config", "kasa_config")
BASE = "base_model_name_or_path"  # informs only
Config = dict[str, Any]


def plain(model: Any) -> Config:
    """The configuration of an attached adapter as JSON values, with the last part of the base's name where that is a path of this computer."""
    config = model.peft_config[adapters.NAME].to_dict() | {"inference_mode": True}
    base = str(config.get(BASE) or "")
    if base.startswith(("/", ".", "~")) or base.count("/") > 1 or "\\" in base:
        config[BASE] = re.split(r"[/\\]", base.rstrip("/\\"))[-1]
    sets = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    found: Config = json.loads(json.dumps(sets, default=str))
    return found


def check(config: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """ModelError, in one sentence, for a configuration or tensors that no adapter of packed linears has; nothing is built for it."""
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in TYPES:
        raise ModelError(f"{where} holds an adapter of the kind {str(kind)[:40]!r}, and task files hold {', '.join(TYPES)}")
    try:
        json.dumps(config, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise ModelError(f"{where}: the adapter's configuration holds what is no JSON, such as a number that is not finite") from None
    if given := next((key for key in ABSENT if config.get(key)), None):
        raise ModelError(f"{where}: the adapter's configuration sets {given}, which adapters of packed linears do not have")
    library = (config.get("auto_mapping") or {}).get("parent_library", "transformers") if isinstance(config.get("auto_mapping") or {}, dict) else None
    if not isinstance(library, str) or library.split(".")[0] != "transformers":
        raise ModelError(f"{where}: the adapter's configuration names a library of its own, and code of others is not run")
    starts = [value for key, value in config.items() if key.startswith("init_") and not key.endswith("_r")]
    if strange := next((value for value in starts if not any(value is s or (isinstance(s, str) and value == s) for s in STARTS)), None):
        raise ModelError(f"{where}: the adapter's configuration starts its paths by {str(strange)[:40]!r}, which would change the base")
    _check_names(config, where)
    if not tensors or not all(t.is_floating_point() and t.dtype.itemsize > 1 for t in tensors.values()):
        raise ModelError(f"{where}: an adapter's tensors are float16, bfloat16 or float32, and there is at least one")
    for name, tensor in tensors.items():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{where}: {name[:200]} holds values that are not finite")


def _check_names(config: Config, where: str) -> None:
    """ModelError for names of modules that are patterns, and for ranks that are no positive numbers."""
    lists = [config[key] for key in NAMES if config.get(key) is not None]
    maps = [config[key] for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    words = [word for entry in lists for word in (entry if isinstance(entry, list) else [entry])]
    words += [word for each in maps if isinstance(each, dict) for word in each]
    named = isinstance(config.get("target_modules"), list) and all(isinstance(m, dict) for m in maps)
    if not named or not all(type(word) is int or (isinstance(word, str) and re.fullmatch(r"[\w.]{1,300}", word)) for word in words):
        raise ModelError(f"{where}: the adapter's configuration must list the names of its modules, without patterns")
    ranks = [config[key] for key in RANKS if config.get(key) is not None] + list((config.get("rank_pattern") or {}).values())
    if not all(type(rank) is int and (rank > 0 or rank == -1) for rank in ranks):  # -1: LoKr's own choice of a factor
        raise ModelError(f"{where}: the ranks of the adapter's configuration must be whole numbers above 0")


def _check_size(model: nn.Module, config: Config, tensors: Mapping[str, Tensor], where: str) -> None:
    """ModelError for a rank that the tensors cannot have, before peft makes room for it."""
    key = {"ADALORA": "init_r", "IA3": ""}.get(config["peft_type"], "r")
    ranks = [config[key]] if config.get(key) is not None else []
    ranks += (config.get("rank_pattern") or {}).values()
    most = max((min(t.shape) for t in tensors.values() if t.dim() > 1), default=0)
    if config["peft_type"] == "LOKR":  # whose factors are small, and whole where a rank is above theirs
        most = max((max(layer.in_features, layer.out_features) for layer in packed_linears(model).values()), default=0)
    if any(rank > most for rank in ranks):
        raise ModelError(f"{where}: the adapter's configuration wants rank {max(ranks)}, and no tensor of it is that large")


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything that wrappers of peft hold beside the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for inner, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if not inner.startswith("base_layer."):
                    yield f"{name}.{inner}", tensor


def exchange(loaded: Any, config: Config, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put this adapter beside the model, in place of the one that is there, if one is; ModelError, with nothing changed, if it does not fit.

    An adapter of the same configuration and shapes as the attached one is copied into its tensors, which keep their addresses.
    """
    check(config, tensors, where)
    if loaded.adapter is not None and {**plain(loaded.adapter), BASE: config.get(BASE)} == config and _copied(loaded.adapter, tensors):
        loaded.adapter.peft_config[adapters.NAME].base_model_name_or_path = config.get(BASE)
        return
    made = loaded.adapter
    wrappers = {} if made is None else adapters.strip(loaded.model)
    loaded.adapter = None
    try:
        _check_size(loaded.model, config, tensors, where)
        loaded.adapter = adapters.beside(loaded.model, lambda library: library.PeftConfig.from_peft_type(**config), tensors, where)
    except ModelError:
        adapters.strip(loaded.model)  # what was attached of it
        adapters.put_back(loaded.model, wrappers, made)
        loaded.adapter = made
        raise


def _copied(made: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Copy the tensors into those of the attached adapter; False, with nothing changed, if names or shapes are others."""
    import peft

    held = peft.get_peft_model_state_dict(made, save_embedding_layers=False)
    if held.keys() != tensors.keys() or any(held[key].shape != tensor.shape for key, tensor in tensors.items()):
        return False
    if made.peft_config[adapters.NAME].peft_type == "ADALORA":  # its ranks may be fewer than its configuration says
        return False
    peft.set_peft_model_state_dict(made, dict(tensors))
    return True


def write(folder: Path, config: Config, tensors: Mapping[str, Tensor]) -> int:
    """An adapter's folder as `adapters.save` writes it, proven by reading it back; returns its bytes."""
    adapters.write(folder, config, tensors)
    again, held = adapters.read(folder)
    if again != config or held.keys() != tensors.keys() or any(not torch.equal(held[key], tensor) for key, tensor in tensors.items()):
        raise ModelError(f"{folder} was written, but reads back with other values")
    return sum((folder / name).stat().st_size for name in (adapters.CONFIG, adapters.WEIGHTS))
