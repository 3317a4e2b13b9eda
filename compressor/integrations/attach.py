"""Adapters of peft as data: a configuration and tensors that somebody gave, judged, put beside a model, and exchanged.

An exchange that fails leaves the first adapter bit for bit. Configurations come from strangers: only kinds that wrap linears are let in, and of their
keys only those that say how paths beside linears compute: none that makes peft import a module by its name, copy or repeat layers, or take tensors of
the base for the adapter's. Names are no patterns, and no rank goes beyond the layers.
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
from compressor.integrations.experts import own_names
from compressor.linear import PackedLinear

SAME = (
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
)  # fmt: skip
LORA = (
    "r", "lora_alpha", "lora_dropout", "init_lora_weights", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "megatron_core", "qalora_group_size",  # which peft writes always; alone they mean nothing
)  # fmt: skip
LOHA = ("r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights", "rank_pattern", "alpha_pattern")
ADALORA = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
TYPES = {  # what peft calls the kinds of `adapters.KINDS`, with the keys of each that may say something
    "LORA": (*SAME, *LORA),
    "ADALORA": (*SAME, *LORA, *ADALORA),
    "LOHA": (*SAME, *LOHA),
    "LOKR": (*SAME, *LOHA, "decompose_both", "decompose_factor", "rank_dropout_scale"),
    "IA3": (*SAME, "feedforward_modules", "init_ia3_weights"),
    "MISS": (*SAME, "r", "miss_dropout", "mini_r", "init_weights"),
}
NOTHING: tuple[Any, ...] = (None, False, "none", "", [], {})  # what any other key may hold
STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "bat", "mini")  # of paths; others write into the weight or need data
NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern", "layers_to_transform")
RANKS = ("r", "init_r", "target_r", "rank", "decompose_factor")
INNER = ("base_layer", "original_module")  # what peft's wrappers call that which they wrap
BASE = "base_model_name_or_path"  # informs only
ALONG, HEADS = "modules_to_save", ("classifier", "score", "qa_outputs")  # what peft trains along for tasks of encoders
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
    if not isinstance(kind, str) or kind not in TYPES:
        raise ModelError(f"{where} holds an adapter of the kind {str(kind)[:40]!r}, and what goes beside packed weights here is {', '.join(TYPES)}")
    try:
        json.dumps(config, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise ModelError(f"{where}: the adapter's configuration holds what is no JSON, such as a number that is not finite") from None
    if given := next((key for key, value in config.items() if key not in TYPES[kind] and value not in NOTHING), None):
        raise ModelError(f"{where}: the adapter's configuration sets {given[:40]}, which adapters of packed linears do not have")
    library = (config.get("auto_mapping") or {}).get("parent_library", "transformers") if isinstance(config.get("auto_mapping") or {}, dict) else None
    if not isinstance(library, str) or library.split(".")[0] != "transformers":
        raise ModelError(f"{where}: the adapter's configuration names a library of its own, and code of others is not run")
    starts = [value for key, value in config.items() if key.startswith("init_") and not key.endswith("_r")]
    if strange := next((value for value in starts if not any(value is s or (isinstance(s, str) and value == s) for s in STARTS)), None):
        raise ModelError(f"{where}: the adapter's configuration starts its paths by {str(strange)[:40]!r}, which would change the base")
    _check_names(config, where)
    if not tensors or not all(t.is_floating_point() and t.dtype.itemsize > 1 for t in tensors.values()):
        raise ModelError(f"{where}: an adapter's tensors are float16, bfloat16 or float32, and there is at least one")
    if inside := next((name for name in tensors if {*name.split(".")} & {*INNER}), None):
        raise ModelError(f"{where}: {inside[:200]} would be a tensor of the base, and an adapter holds its own alone")
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
        most = max((max(layer.in_features, layer.out_features) for layer in base_layers(model).values()), default=0)
    if any(rank > most for rank in ranks):
        raise ModelError(f"{where}: the adapter's configuration wants rank {max(ranks)}, and no tensor of it is that large")


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all that a model has without its adapter, under its name there: wrappers of peft are looked through, and stay."""
    return _walk("", model, set())


def _walk(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if hasattr(type(module), "adapter_layer_names"):  # of wrappers alone
        yield from _walk(name, next(inner for key, inner in module.named_children() if key in INNER), seen)
    elif module not in seen:
        seen.add(module)
        yield name, module
        for key, child in module.named_children():
            yield from _walk(f"{name}.{key}" if name else key, child, seen)


def wrapped(model: nn.Module) -> bool:
    """Whether an adapter of peft is beside any layer."""
    return any(hasattr(type(module), "adapter_layer_names") for module in model.modules())


def base_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """`packed_linears` of a model without its adapter, which stays."""
    return {name: module for name, module in base_modules(model) if isinstance(module, PackedLinear)}


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything that wrappers of peft hold beside the base."""
    base = {id(tensor) for _, module in base_modules(model) for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    yield from ((name, t) for name, t in (*model.named_parameters(), *model.named_buffers()) if id(t) not in base)


def load(model: nn.Module, folder: Path) -> Any:
    """Put the adapter of a folder beside a model, in place; returns peft's model around it. ModelError if it is damaged, hostile or another model's.

    A head that trained along, as peft has it for encoders, may be in it.
    """
    config, tensors = adapters.read(folder)
    along = config.get(ALONG)
    heads = isinstance(along, list) and all(isinstance(name, str) and name in HEADS for name in along)
    check({key: value for key, value in config.items() if not (heads and key == ALONG)}, tensors, str(folder))
    _check_size(model, config, tensors, str(folder))
    return adapters.beside(model, lambda library: library.PeftConfig.from_peft_type(**config), tensors, str(folder))


def exchange(loaded: Any, config: Config, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put this adapter beside the model, in place of the one that is there, if one is; with any error, such as ModelError if it does not fit, nothing
    has changed. What of the base asks for gradients goes on to.

    An adapter of the same configuration and shapes as the attached one is copied into its tensors, which keep their addresses.
    """
    check(config, tensors, where)
    if loaded.adapter is not None and {**plain(loaded.adapter), BASE: config.get(BASE)} == config and _copied(loaded.adapter, tensors):
        loaded.adapter.peft_config[adapters.NAME].base_model_name_or_path = config.get(BASE)
        return
    _check_size(loaded.model, config, tensors, where)
    base = [module for _, module in base_modules(loaded.model)]
    training = [(module, module.training) for module in base]
    asking = [(p, p.requires_grad) for module in base for p in module.parameters(recurse=False)]
    made, wrappers = loaded.adapter, {} if loaded.adapter is None else adapters.strip(loaded.model)
    loaded.adapter = None
    try:
        loaded.adapter = adapters.beside(loaded.model, lambda library: library.PeftConfig.from_peft_type(**config), tensors, where)
    except BaseException:
        adapters.strip(loaded.model)  # what was attached of it
        adapters.put_back(loaded.model, wrappers, made)
        loaded.adapter = made
        for module, was in training:
            module.training = was
        raise
    finally:
        for parameter, was in asking:
            if parameter.requires_grad != was:
                parameter.requires_grad_(was)


def _copied(made: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Copy the tensors into those of the attached adapter; False, with nothing changed, if names or shapes are others."""
    import peft

    held = peft.get_peft_model_state_dict(made, save_embedding_layers=False)
    if held.keys() != tensors.keys() or any(held[key].shape != tensor.shape for key, tensor in tensors.items()):
        return False
    if made.peft_config[adapters.NAME].peft_type == "ADALORA":  # its ranks may be fewer than its configuration says
        return False
    before = {key: tensor.clone() for key, tensor in held.items()}
    with own_names(made):
        try:
            peft.set_peft_model_state_dict(made, dict(tensors))
        except BaseException:
            peft.set_peft_model_state_dict(made, before)
            raise
    return True


def write(folder: Path, config: Config, tensors: Mapping[str, Tensor]) -> int:
    """An adapter's folder as `adapters.save` writes it, proven by reading it back; returns its bytes."""
    adapters.write(folder, config, tensors)
    again, held = adapters.read(folder)
    if again != config or held.keys() != tensors.keys() or any(not torch.equal(held[key], tensor) for key, tensor in tensors.items()):
        raise ModelError(f"{folder} was written, but reads back with other values")
    return sum((folder / name).stat().st_size for name in (adapters.CONFIG, adapters.WEIGHTS))
