"""`AutoModelForCausalLM.from_pretrained(folder)` for `table` folders: packed layers from the file to the forward, never a dense weight.

The hooks of transformers.quantizers.HfQuantizer that are used:

    _process_model_before_weight_loading   reads the headers of the folder's files, checks every packed tensor against config.json and the model, and
                                           puts a StoredLinear with tensors of the stored names, shapes and dtypes in the place of each packed linear;
                                           transformers then fills it as it fills any module, and casts nothing: the dtypes agree already
    _process_model_after_weight_loading    turns the stored tensors into codes in the kernels' layout and a table
    get_state_dict_and_metadata            for save_pretrained: the stored tensors again, and a quantization_config of the layers as they are now

`dtype=` decides about everything that is not packed; the tables keep the dtype they were learned in. compressor's hook registers this module
(hook.py), so `import compressor` must come somewhere before from_pretrained: transformers ignores quantization methods that it does not know.
`device_map=` needs accelerate, as everywhere in transformers. Limits: no tensor parallelism, and buffers must not be offloaded.
"""

# transformers is not typed for mypy: its classes are Any here, and two of them are bases
# mypy: allow-subclassing-any

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.quantizers import auto  # its registries are looked up in it at each call: a reload makes new ones
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressor import linear
from compressor.errors import ModelError
from compressor.export import shards, table
from compressor.packed import PackedWeight, Table


def register() -> None:
    """Make transformers know the quantization method `compressor`; calling it again changes nothing."""
    if table.METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(table.METHOD)(CompressorConfig)
    if table.METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(table.METHOD)(CompressorQuantizer)


class CompressorConfig(QuantizationConfigMixin):
    """The `quantization_config` of a table folder, kept as it was read (see export/table.py)."""

    def __init__(self, **values: Any):
        self.quant_method = table.METHOD
        self.__dict__.update(values)


class StoredLinear(linear.PackedLinear):
    """What becomes a PackedLinear: it holds buffers `weight_packed`, `weight_table`, `weight_shape` until they are loaded and `unpack` is called.

    It changes its class, as torch's lazy modules do, and stays the same object, because device maps put hooks on it meanwhile.
    """

    def __init__(self, layer: nn.Linear, parts: dict[str, Tensor], bits: int, segment: int):
        """parts: tensors on the meta device with the names, shapes and dtypes of the folder; the bias stays the layer's own parameter."""
        stored = parts["weight_table"]
        super().__init__(PackedWeight(parts["weight_packed"], Table(stored), bits, segment, (layer.out_features, layer.in_features)))
        self.bias = layer.bias
        self.stored_dtype = stored.dtype
        self.register_buffer("words", None)
        self.register_buffer("learned", None)
        for part in table.PARTS:
            self.register_buffer(part, parts[part])

    def unpack(self, where: str) -> None:
        """Stored tensors -> words int32 (tile64x256) and table [n, S, 2**bits] in its stored dtype, on the device they are on."""
        parts: dict[str, Tensor] = {part: getattr(self, part) for part in table.PARTS}
        if any(tensor.is_meta for tensor in parts.values()):
            raise ModelError(f"{where} cannot be offloaded: load the model with a device_map that keeps buffers on CPUs or GPUs")
        weight = table.decode(parts, self.bits, self.group, where)
        if weight.shape != (self.out_features, self.in_features):
            raise ModelError(f"{where} has shape {weight.shape}, the model wants {(self.out_features, self.in_features)}")
        for part in table.PARTS:
            delattr(self, part)
        self.words = weight.words
        self.learned = weight.learned.to(self.stored_dtype)  # differs only where a model class keeps its layers in float32, which is exact
        del self.stored_dtype
        object.__setattr__(self, "__class__", linear.PackedLinear)


class CompressorQuantizer(HfQuantizer):
    """Loads and saves table folders; it does not quantise, `compressor run` does."""

    quantization_config: CompressorConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ModelError("transformers loads folders that compressor has packed, and packs none: use `compressor run`")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        where = str(model.config.name_or_path or "the folder")
        if not checkpoint_files or not all(str(path).endswith(".safetensors") for path in checkpoint_files):
            raise ModelError(f"{where} has no safetensors files, and packed weights are read from nothing else")
        schemes = table.schemes_of(self.quantization_config.to_dict(), where)
        headers = shards.read_headers(where, [Path(path) for path in checkpoint_files])
        table.check_modules(schemes, {name.rpartition(".")[0] for name in headers if name.rpartition(".")[2] in table.PARTS}, where)
        for stored, (bits, segment) in schemes.items():
            name, layer = _linear_at(model, stored, where)
            parts = {part: headers[f"{stored}.{part}"] for part in table.PARTS if f"{stored}.{part}" in headers}
            table.check(parts, bits, segment, (layer.out_features, layer.in_features), f"{where}: {stored}")
            if (f"{stored}.bias" in headers) != (layer.bias is not None):
                raise ModelError(f"{where}: {stored} {'lacks its' if layer.bias is not None else 'has a foreign'} bias")
            linear.swap(model, name, StoredLinear(layer, parts, bits, segment))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        where = str(model.config.name_or_path or "the folder")
        for name, layer in linear.packed_linears(model).items():
            if isinstance(layer, StoredLinear):
                layer.unpack(f"{where}: {name}")
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """(what save_pretrained writes, no metadata). peft adapters are saved alone: (None, no metadata) then.

        All packed weights lie in CPU memory once more meanwhile. Raises ModelError for layers that are no sketches.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        layers = linear.packed_linears(model)
        packed = {name: layer.packed() for name, layer in layers.items()}
        why = table.fits(packed)
        if why:
            raise ModelError(f"the model cannot be saved as a {table.NAME} folder: {why}")
        prefixes = tuple(f"{name}." for name in layers)
        own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes) or name.endswith(".bias")}
        for name, weight in packed.items():
            own |= table.tensors_of(name, weight)
        schemes = {name: (weight.bits, weight.group) for name, weight in packed.items()}
        values = table.quantization_config(schemes, sorted(linear.linears(model)))
        self.quantization_config = model.config.quantization_config = CompressorConfig(**values)
        return own, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through packed layers to whatever is trained around them."""
        return True


def _linear_at(model: Any, stored: str, where: str) -> tuple[str, nn.Linear]:
    """(name in the model, linear) of a module of the folder, which may be of a model with a head where this one has none, or the reverse."""
    prefix = f"{model.base_model_prefix}."
    for name in (stored, stored.removeprefix(prefix), prefix + stored):
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear):
            return name, layer
    raise ModelError(f"{where}: the packed weight {stored} belongs to no linear layer of this architecture")
