"""What a config.json promises beside what the weight files hold, compared before transformers makes room for it.

A damaged or hostile config.json may ask for a billion layers. Blocks are counted against tensors; then the architecture is built without memory (meta
device), and must not have more numbers than the bytes of the files can hold: PER_BYTE at the 2 bits of the smallest grid, SPARSE where one bit of a
mask stands for 16 weights. Buffers that no file holds, such as masks of attention, may take SPARE numbers. Experts, which become modules of their own
(half a millisecond each), are counted besides: a million of a number each would fit into SPARE. Price: the architecture is built once more, in some
tenths of a second for the largest.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.errors import ModelError
from compressor.export import shards, sparse
from compressor.integrations import experts
from compressor.pipelines import checkpoint
from compressor.prune import slicing

PER_BYTE, SPARSE, SPARE = 4, 128, 1 << 26
EXPERT = 512  # bytes of files that one has at least; the smallest of real models have hundreds of thousands
BLOCKS, MOST = re.compile(r"num_hidden_layers|n_layers?|(num_)?((en|de)coder_)?layers"), 1000  # names of counts of blocks; more than any model has
REDIRECT = "adapter_config.json"  # beside config.json: transformers would load the base that it names instead


def check(folder: Path, wanted: dict[str, Any] | None = None) -> nn.Module:
    """The architecture without memory; ModelError for a folder whose config.json promises far more than its weight files hold.

    wanted: a configuration in place of config.json, such as one with a head that the folder lacks.
    """
    config = wanted or checkpoint.any_config(folder)
    headers = shards.read_headers(folder, checkpoint.weight_files(folder))
    blocks = max(_blocks(config), default=0)
    if blocks > min(len(headers), MOST):
        raise ModelError(f"{folder}/config.json is damaged: it promises {blocks} blocks, and the weight files hold {len(headers)} tensors")
    model = shell(folder, config)
    promised = sum(t.numel() for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    stored = sum(t.numel() * t.element_size() for t in headers.values())
    method = (config.get("quantization_config") or {}).get("quant_method")
    if promised > (SPARSE if method == sparse.METHOD else PER_BYTE) * stored + SPARE:
        raise ModelError(f"{folder}/config.json is damaged: it promises {promised:,} numbers, and the weight files hold {stored:,} bytes")
    if (found := _experts(model)) * EXPERT > stored:
        raise ModelError(f"{folder}/config.json is damaged: it promises {found:,} experts, and the weight files hold {stored:,} bytes")
    return model


def _experts(model: nn.Module) -> int:
    """Experts of all blocks, which transformers holds in parameters of three dimensions."""
    return sum(max(p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3) for module in experts.fused(model).values())


def alone(folder: Path) -> None:
    """ModelError for a dense folder that has transformers load another one in its place."""
    if (folder / REDIRECT).exists():
        raise ModelError(f"{folder} holds {REDIRECT}, which has transformers load the model that it names instead: take it out, or give that model")


def _blocks(config: dict[str, Any]) -> list[int]:
    """Every number of blocks in a config.json, those of parts of the model too."""
    inner = [count for value in config.values() if isinstance(value, dict) for count in _blocks(value)]
    return inner + [value for key, value in config.items() if BLOCKS.fullmatch(str(key)) and type(value) is int]


def shell(folder: Path, config: dict[str, Any], within: contextlib.AbstractContextManager[Any] | None = None, **told: Any) -> nn.Module:
    """The architecture without memory, with blocks as narrow as pruning left them; ModelError where transformers cannot build it.

    within: what leaves tensors out (None: the meta device); told: further arguments of transformers' `from_config`.
    """
    from transformers import AutoConfig

    from compressor.pipelines import load

    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(found, "quantization_config"):
            del found.quantization_config
        with torch.device("meta") if within is None else within:
            model = load.auto_class(config).from_config(found, trust_remote_code=False, **told)
    except Exception as error:  # configurations of strangers raise what they like
        raise ModelError(f"transformers cannot build the model of {folder}: {load.first_line(error)}") from None
    slicing.resize(model)
    built: nn.Module = model
    return built
