"""From a name to a model in memory: short names, folder checks, dense and packed loading.

A name is `tiny` (embedded), a folder, a short name of `ALIASES`, or a hub id. Folders are checked before anything is loaded: a missing or
truncated file, a model that is no causal LM, or weights that a checkpoint leaves at random each end in one sentence.
On a CPU everything computes in float32 (16-bit matmuls are tens of times slower there); on a GPU in the dtype of the folder.
"""

import base64
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linear, memory, strict
from compressor.errors import CompressorError, ModelError, RecipeError, UserError
from compressor.export import conversions, shards
from compressor.integrations import attach, experts, peft
from compressor.packed import PackedWeight
from compressor.pipelines import formats, promises
from compressor.pipelines.checkpoint import any_config, read_config, resolve, stored_dtype, weight_files
from compressor.prune import slicing
from compressor.stored import keep_stored, stored_names

TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")  # heads of encoders
SHAPES = ("num_hidden_layers", "n_layer", "num_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
FLOAT16_SAFE = ("llama", "mistral", "gpt_neox", "phi", "phi3")  # families served in float16 without overflow; see docs/format.md


@dataclass
class Loaded:
    """A model with what is needed to compress, tune, measure and write it."""

    model: nn.Module
    tokenizer: Any
    folder: Path
    name: str
    config: dict[str, Any]
    dtype: torch.dtype  # of everything that is not packed, once written
    rows: list[dict[str, Any]] = field(default_factory=list)  # one per packed layer
    unpacked: list[dict[str, Any]] = field(default_factory=list)  # linears left dense, each with its reason
    adapter: Any = None  # peft's model around this one, whose adapters are part of it meanwhile

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def follow_config(self) -> None:
        """Bring the configuration that will be written to what that of the model, which was pruned, says now."""
        model: Any = self.model
        now: dict[str, Any] = model.config.to_dict()
        shapes = {key: now[key] for key in (*SHAPES, slicing.WIDTHS) if now.get(key) is not None}
        layers = model.config.num_hidden_layers  # whatever the family calls it in its file
        lists = {key: value for key, value in now.items() if isinstance(value, list) and len(value) == layers and key != "architectures"}
        self.config = {k: v for k, v in self.config.items() if k != "quantization_config"} | shapes | lists


def pick_device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {asked!r} is unknown; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {asked!r} was asked for, but this PyTorch sees {torch.cuda.device_count() or 'no'} GPU; use --device cpu")
    return device


def folder_dtype(stored: torch.dtype, config: dict[str, Any]) -> torch.dtype:
    """The dtype of everything that is not packed in an output folder: float16 for a bfloat16 model of a family known to be safe in it, so
    that servers keep float16 scales exactly; otherwise the model's own."""
    return torch.float16 if stored == torch.bfloat16 and config.get("model_type") in FLOAT16_SAFE else stored


def scale_dtype(asked: str, folder: torch.dtype) -> torch.dtype:
    """auto: float16, or bfloat16 where the folder is bfloat16 (loaders cast scales to the model's dtype)."""
    if asked != "auto":
        return getattr(torch, asked)
    return torch.bfloat16 if folder == torch.bfloat16 else torch.float16


def _fits(model: nn.Module, dtype: torch.dtype) -> bool:
    return all(float(p.abs().max()) <= torch.finfo(dtype).max for p in (q.detach() for q in model.parameters()) if p.numel())


def load(name: str, device: str = "auto") -> Loaded:
    """A dense folder as an ordinary transformers model, a packed folder with PackedLinear layers."""
    folder = resolve(name)
    config = read_config(folder)
    weight_files(folder)
    where = pick_device(device)
    stored = stored_dtype(folder)
    if config.get("quantization_config") or config.get(slicing.WIDTHS):
        return load_packed(folder, config, where, name)
    from transformers import AutoModelForCausalLM

    promises.alone(folder)
    promises.check(folder)
    dtype = torch.float32 if where.type == "cpu" else stored
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # configurations of strangers raise what they like
        raise ModelError(f"transformers cannot load {folder}: {first_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{folder} lacks weights, they would be random: {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}")
    dtype = folder_dtype(stored, config)
    if not _fits(model, dtype):
        dtype = stored  # beyond float16, or not finite: the run says which
    compute = torch.float32 if where.type == "cpu" else dtype
    model = experts.unfuse(cast(model, compute).to(where).eval())
    return Loaded(model, load_tokenizer(folder), folder, name, config, dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What the model stores in `dtype`, in place. What it computes for itself, such as rotary frequencies, stays exact; so do packed values, and
    what stays in 16 bits on purpose (compressor/stored.py)."""
    stored = model.state_dict(keep_vars=True)
    packed = {f"{name}.{key}" for name, layer in linear.packed_linears(model).items() for key, _ in layer.named_buffers()}
    kept = packed | stored_names(model)
    for name, tensor in stored.items():
        if tensor.is_floating_point() and name not in kept:
            tensor.data = tensor.data.to(dtype)
    return model


def load_packed(folder: Path, config: dict[str, Any], device: torch.device, name: str) -> Loaded:
    """A folder of a format that `formats` knows with its linears packed, never dense; or a dense one whose blocks differ in width, which transformers
    cannot build."""
    tensors, packed = read_packed(folder, config)
    model = experts.unfuse(empty_model(folder), tensors, prove=False)
    tensors = belonging(model, tensors)
    if device.type == "cpu":
        keep_stored(model, {key: t.dtype for key, t in tensors.items()})
    for module_name, weight in packed.items():
        layer = _linear_at(model, module_name, folder)
        bias = tensors.pop(f"{module_name}.bias", None)
        if (bias is None) != (layer.bias is None):
            raise ModelError(f"{folder}: {module_name} {'lacks its' if bias is None else 'has a foreign'} bias")
        if weight.shape != (layer.out_features, layer.in_features):
            raise ModelError(f"{folder}: {module_name} has shape {weight.shape}, the model wants {(layer.out_features, layer.in_features)}")
        linear.swap(model, module_name, linear.PackedLinear(conversions.positive(weight), bias))
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float16)
    _fill(model, tensors, folder)
    compute = torch.float32 if device.type == "cpu" else dtype
    memory.trim()  # what decoding left between the weights
    loaded = Loaded(cast(model, compute).to(device).eval(), load_tokenizer(folder), folder, name, config, dtype)
    if (folder / peft.FOLDER).is_dir():
        loaded.adapter = attach.load(loaded.model, folder / peft.FOLDER)
    return loaded


def read_packed(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, PackedWeight]]:
    """(dense tensors by name, packed weights by module name), read as the format that config.json names."""
    quantization = config.get("quantization_config")
    if not quantization:
        return shards.read_weights(folder, weight_files(folder), ())[0], {}
    return formats.of(config, folder).read(folder, weight_files(folder), quantization)


def auto_class(config: dict[str, Any]) -> Any:
    """The class of transformers that loads the first architecture of a config: a classifier or span finder, else a causal language model."""
    import transformers

    first = str(next(iter(config["architectures"]), ""))
    name = next((f"AutoModel{task}" for task in TASKS if first.endswith(task)), "AutoModelForCausalLM")
    return getattr(transformers, name)


def empty_model(folder: Path) -> Any:
    """The architecture with uninitialised weights: pages that are never touched cost no memory."""
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    promises.check(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with no_init_weights():
            model = auto_class(any_config(folder)).from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # configurations of strangers raise what they like
        raise ModelError(f"transformers cannot build the model of {folder}: {first_line(error)}") from None
    slicing.resize(model)
    return model


def _linear_at(model: nn.Module, name: str, folder: Path) -> nn.Linear:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"{folder}: the packed weight {name} belongs to no linear layer of this architecture")
    return layer


def belonging(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what older software left in folders: rotary frequencies, and biases of zeros of linears that have none (AutoGPTQ)."""
    none = {f"{name}.bias" for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer.bias is None}
    return {k: t for k, t in tensors.items() if not k.endswith("rotary_emb.inv_freq") and (k not in none or bool(t.any()))}


def _fill(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put the dense tensors in and forget them, copied only where dtypes differ; every parameter must be given, tied ones once."""
    given = list(tensors)
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with torch.no_grad():
        for name in given:
            tensor = tensors.pop(name)
            if name not in wanted or wanted[name].shape != tensor.shape:
                raise ModelError(f"{folder}: tensor {name} of shape {tuple(tensor.shape)} does not belong to this architecture")
            if (tensor.dtype, tensor.device) == (wanted[name].dtype, wanted[name].device):
                wanted[name].data = tensor  # no copy, of an embedding hundreds of MB
            else:
                wanted[name].copy_(tensor)
    model.tie_weights()
    packed = {f"{n}.bias" for n in linear.packed_linears(model)}
    filled = {p.data_ptr() for n, p in wanted.items() if n in given}
    lacking = [n for n, p in model.named_parameters() if n not in packed and p.data_ptr() not in filled]
    if lacking:
        raise ModelError(f"{folder} lacks weights: {', '.join(lacking[:3])}{' …' if len(lacking) > 3 else ''}")


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with unbroken(f"the tokenizer of {folder} cannot be loaded"):
        _check_maps(folder / "tokenizer.json")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _check_maps(path: Path) -> None:
    """ValueError for a precompiled map of characters that is longer than its own text: the tokenizers library makes room for what it says it is."""
    for found in re.finditer(rb'"precompiled_charsmap"\s*:\s*"([^"]*)', strict.read_bytes(path, strict.TOKENIZER) if path.exists() else b""):
        begin = base64.b64decode(found[1][:8])
        if found[1] and (len(begin) < 4 or int.from_bytes(begin[:4], "little") > len(found[1])):
            raise ValueError("its precompiled_charsmap is damaged")


@contextlib.contextmanager
def unbroken(what: str) -> Iterator[None]:
    """ModelError, beginning with `what`, for whatever tokenizers of strangers raise inside; Rust's panics are no Exceptions."""
    try:
        yield
    except CompressorError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(f"{what}: {first_line(error)}") from None
        raise


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    return {name: layer.packed() for name, layer in linear.packed_linears(model).items()}


def context(config: dict[str, Any], asked: int | None = None, name: str = "window") -> int:
    """Tokens of a window: what was asked for, if the model was made for as many, or by default at most 2048."""
    most = int(config.get("max_position_embeddings") or config.get("n_positions") or 1 << 30)
    if asked is not None and asked > most:
        raise RecipeError(f"{name}={asked} is more than the {most} tokens that the model was made for")
    return min(2048, most) if asked is None else asked


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 3 if lines[0].endswith(":") else 1])[:300]
