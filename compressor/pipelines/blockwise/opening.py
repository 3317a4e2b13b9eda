"""From a folder to a model of which one block at a time is in memory, and whether that is wanted and possible.

`memory` of a recipe: whole, the model in one piece; blocks, one block at a time; auto, in one piece if the estimate fits
into the memory that is free, else by blocks where the run can do that. Packing looks at one block after the other either way, with the same result.
"""

from pathlib import Path
from typing import Any

import torch

from compressor import world
from compressor.errors import ModelError, RecipeError
from compressor.export import shards
from compressor.integrations import experts
from compressor.pipelines import checkpoint, load, promises
from compressor.pipelines.blockwise.blocks import FAMILIES, Blocks, place
from compressor.pipelines.blockwise.source import Source
from compressor.pipelines.packers import PACKERS, trains
from compressor.prune import slicing
from compressor.recipe import Recipe
from compressor.stored import keep_stored, stored_names

SHARE = 0.9  # of the free memory that a model in one piece may take


def why_not(recipe: Recipe, config: dict[str, Any], source: Path) -> str | None:
    """Why a run on the folder `source` cannot go block by block, in words; None if it can."""
    if config.get("model_type") not in FAMILIES:
        return f"models of type {config.get('model_type')} are not known to run block by block"
    if world.size() > 1:
        return "several processes each hold the model in one piece"
    if config.get(slicing.WIDTHS):
        return "its blocks differ in width"
    if any(tensor.dim() == 3 for tensor in shards.read_headers(source, checkpoint.weight_files(source)).values()):
        return "its files hold the experts of a block in one tensor"
    if recipe.prune.method != "none":
        return "pruning trains the whole model"
    if recipe.choose.active:
        return "the choice of widths measures the whole model"
    if any(PACKERS[kind.packer].fisher for kind in recipe.quant.kinds() if kind.packer in PACKERS):
        return f"packer {recipe.quant.packer} takes gradients of the whole model"
    if recipe.quant.rotate == "learned":
        return "rotations are learned on all blocks at once"
    if trains(recipe.quant) and recipe.data.activations == "recompute":
        return "hidden states of the dense model cannot be recomputed once it is packed"
    if recipe.tune.start != "zero" and recipe.data.activations == "recompute":
        return "paths that start beside packed weights cannot be recomputed"
    return None


def wanted(recipe: Recipe, config: dict[str, Any], source: Path, whole: int, device: torch.device) -> bool:
    """Whether a run goes block by block; whole: bytes that the model in one piece takes. RecipeError if it is asked for and cannot be."""
    reason = why_not(recipe, config, source)
    if recipe.memory == "blocks" and reason:
        raise RecipeError(f"memory=blocks cannot be: {reason}; leave --memory out")
    return recipe.memory == "blocks" or (recipe.memory == "auto" and reason is None and whole > SHARE * free_bytes(device))


def free_bytes(device: torch.device, root: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process can still take: of the GPU, or of the host as the kernel and the control groups say. A large number if none says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = 1 << 62
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return min([free, *(_left(group) for group in _groups(root))])


def _groups(root: Path) -> list[Path]:
    """The control groups that this process is in, from its own to the outermost; those of version one beside them."""
    own = next((line.rpartition(":")[2].strip("/") for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")), "")
    inner = root / own
    return [group for group in (inner, *inner.parents) if group == root or root in group.parents] + [root / "memory"]


def _left(group: Path) -> int:
    """Bytes that a control group has left, a large number if it has no limit; what it holds of files can be taken back and does not count."""
    for most, now, stat in (("memory.max", "memory.current", "file"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")):
        limit, used = (next(iter(_lines(group / name)), "") for name in (most, now))
        if limit.isdigit() and used.isdigit():
            files = next((int(line.split()[1]) for line in _lines(group / "memory.stat") if line.split()[0] == stat), 0)
            return int(limit) - max(int(used) - files, 0)
    return 1 << 62


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def load_blocks(name: str, device: str = "auto") -> tuple[load.Loaded, Blocks]:
    """A dense folder as a model whose blocks have no weights but when they are visited, and what manages them.

    Every tensor is looked at once: ModelError for one that is not finite or not there.
    """
    from accelerate import init_empty_weights

    folder, where = checkpoint.resolve(name), load.pick_device(device)
    config, stored = checkpoint.read_config(folder), checkpoint.stored_dtype(folder)
    promises.alone(folder)
    promises.check(folder)
    built = promises.shell(folder, config, init_empty_weights(include_buffers=False), dtype=torch.float32)  # buffers as the model computes them
    model: Any = experts.unfuse(built)  # names are those of the files from here on
    model.tie_weights()
    model.requires_grad_(False)
    source = Source(folder, str(getattr(model, "base_model_prefix", "")))
    names = [key for key, _ in model.named_parameters()]
    if lacking := [key for key in names if source.key(key) is None]:
        raise ModelError(f"{folder} lacks weights, they would be random: {', '.join(lacking[:3])}{' …' if len(lacking) > 3 else ''}")
    dtype = load.folder_dtype(stored, config)
    if _largest(source, names) > torch.finfo(dtype).max:
        dtype = stored
    compute = torch.float32 if where.type == "cpu" else dtype
    if where.type == "cpu":
        keep_stored(model, {key: source.headers[found].dtype for key in names if (found := source.key(key)) is not None})
    blocks = Blocks(model, source, where, compute)
    kept, outside = stored_names(model), [key for key in names if not key.startswith(f"{blocks.prefix}.")]
    for key, tensor in source.read(outside):
        place(model, key, (tensor if key in kept else tensor.to(compute)).to(where))
    model.tie_weights()
    for key, buffer in list(model.named_buffers()):
        if buffer.device != where:
            module, _, leaf = key.rpartition(".")
            setattr(model.get_submodule(module), leaf, buffer.to(where))
    return load.Loaded(model.eval(), load.load_tokenizer(folder), folder, name, config, dtype), blocks


def _largest(source: Source, names: list[str]) -> float:
    """The largest magnitude of all weights; ModelError names a tensor with NaN or infinity."""
    most = 0.0
    for name, value in source.largest(names):
        if value == float("inf"):
            raise ModelError(f"{name} holds NaN or infinite weights; the checkpoint is damaged, fetch it again")
        most = max(most, value)
    return most
