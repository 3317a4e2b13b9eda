"""`AutoModel….from_pretrained(folder)` for `table` and `sparse` folders: packed layers from the file to the forward, never a dense weight.

The hooks of transformers.quantizers.HfQuantizer that are used:

    _process_model_before_weight_loading   reads the headers of the folder's files, checks every packed tensor against config.json and the model, and
                                           puts a Stored… layer with tensors of the stored names, shapes and dtypes in the place of each such linear;
                                           transformers then fills it as it fills any module, and casts nothing: the dtypes agree already
    _process_model_after_weight_loading    turns the stored tensors into codes in the kernels' layout and a table or scales; sparse dense weights
                                           become ordinary nn.Linear layers, with their zeros, in the dtype that the model has
    get_state_dict_and_metadata            for save_pretrained: the stored tensors again, and a quantization_config of the layers as they are now

`dtype=` decides about everything that is not packed; tables, scales and zeros keep their own dtype. compressor's hook registers this module
(hook.py), so `import compressor` must come somewhere before from_pretrained: transformers ignores quantization methods that it does not know.
`device_map=` needs accelerate, as everywhere in transformers. Limits: no tensor parallelism, and buffers must not be offloaded, nor may layers with
sparse dense weights; an automatic device map counts those at their size on disk.
"""

# transformers is not typed for mypy: its classes are Any here, and two of them are bases
# mypy: allow-subclassing-any

from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.quantizers import auto  # its registries are looked up in it at each call: a reload makes new ones
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compressor import linear
from compressor.errors import ModelError
from compressor.export import bitmask, shards, sparse, table
from compressor.integrations import experts
from compressor.packed import Affine, PackedWeight, Table


def register() -> None:
    """Make transformers know the quantization methods `compressor` and `compressor_sparse`; calling it again changes nothing."""
    for method, config, quantizer in ((table.METHOD, CompressorConfig, CompressorQuantizer), (sparse.METHOD, SparseConfig, SparseQuantizer)):
        if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
            auto.register_quantization_config(method)(config)
        if method not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantizer(method)(quantizer)


class CompressorConfig(QuantizationConfigMixin):
    """The `quantization_config` of a table folder, kept as it was read (see export/table.py)."""

    def __init__(self, **values: Any):
        self.quant_method = table.METHOD
        self.__dict__.update(values)


class SparseConfig(QuantizationConfigMixin):
    """The `quantization_config` of a sparse folder, kept as it was read (see export/sparse.py)."""

    def __init__(self, **values: Any):
        self.quant_method = sparse.METHOD
        self.__dict__.update(values)


class StoredTable(linear.PackedLinear):
    """What becomes a PackedLinear with a table: it holds buffers `weight_packed`, `weight_table`, `weight_shape` until all are loaded and `unpack`
    is called.

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


class StoredAffine(linear.PackedLinear):
    """What becomes a PackedLinear with scales: it holds a sparse folder's tensors as buffers until they are loaded and `unpack` is called."""

    def __init__(self, layer: nn.Linear, parts: dict[str, Tensor], scheme: bitmask.Scheme):
        """parts: tensors on the meta device with the names, shapes and dtypes of the folder; the bias stays the layer's own parameter."""
        shape = (layer.out_features, layer.in_features)
        super().__init__(PackedWeight(parts["weight_codes"], Affine(parts["weight_scale"]), scheme.bits, scheme.group, shape))
        self.bias, self.scheme, self.stored_dtype = layer.bias, scheme, parts["weight_scale"].dtype
        self.register_buffer("words", None)
        self.register_buffer("learned", None)
        for part in scheme.parts:
            self.register_buffer(part, parts[part])

    def unpack(self, where: str) -> None:
        """Stored tensors -> words int32 (tile64x256), scale [n, G] and zero [n, G] or None, on the device they are on."""
        weight = _decoded(self, self.scheme, where)
        assert isinstance(weight, PackedWeight)
        self.words, self.zero = weight.words, weight.zero  # float zeros are in the dtype that the folder names
        self.learned = weight.learned.to(self.stored_dtype)
        del self.stored_dtype, self.scheme
        object.__setattr__(self, "__class__", linear.PackedLinear)


class StoredDense(nn.Module):
    """What becomes an nn.Linear with zeros: it holds a sparse folder's tensors as buffers until they are loaded and `unpack` is called."""

    forward = nn.Linear.forward  # what a device map's hook wraps

    def __init__(self, layer: nn.Linear, parts: dict[str, Tensor], scheme: bitmask.Scheme):
        """parts: tensors on the meta device with the names, shapes and dtypes of the folder; the bias stays the layer's own parameter."""
        super().__init__()
        self.in_features, self.out_features, self.dtype, self.scheme = layer.in_features, layer.out_features, layer.weight.dtype, scheme
        self.register_parameter("bias", layer.bias)
        for part in scheme.parts:
            self.register_buffer(part, parts[part])

    def unpack(self, where: str) -> None:
        """Stored tensors -> weight [n, k], a parameter in the dtype of the model, on the device they are on."""
        if getattr(getattr(self, "_hf_hook", None), "offload", False):
            raise ModelError(f"{where} cannot be offloaded: load the model with a device_map that keeps sparse layers on CPUs or GPUs")
        weight = _decoded(self, self.scheme, where)
        assert isinstance(weight, Tensor)
        self.register_parameter("weight", nn.Parameter(weight.to(self.dtype)))
        del self.dtype, self.scheme
        object.__setattr__(self, "__class__", nn.Linear)


def _decoded(layer: Any, scheme: bitmask.Scheme, where: str) -> Tensor | PackedWeight:
    """The weight that a Stored… layer's buffers hold, which are then gone."""
    parts: dict[str, Tensor] = {part: getattr(layer, part) for part in scheme.parts}
    if scheme.zeros:  # differs only where a model class keeps its layers in float32, which is exact
        parts["weight_zero"] = parts["weight_zero"].to(bitmask.ZEROS[scheme.zeros])
    if any(tensor.is_meta for tensor in parts.values()):
        raise ModelError(f"{where} cannot be offloaded: load the model with a device_map that keeps buffers on CPUs or GPUs")
    weight = bitmask.decode(parts, scheme, where)
    if tuple(weight.shape) != (layer.out_features, layer.in_features):
        raise ModelError(f"{where} has shape {tuple(weight.shape)}, the model wants {(layer.out_features, layer.in_features)}")
    for part in parts:
        delattr(layer, part)
    return weight


class CompressorQuantizer(HfQuantizer):
    """Loads and saves table folders; it does not quantise, `compressor run` does."""

    quantization_config: CompressorConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ModelError("transformers loads folders that compressor has packed, and packs none: use `compressor run`")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        where, headers = _headers(model, checkpoint_files)
        experts.unfuse(model, headers, prove=False)
        schemes = table.schemes_of(self.quantization_config.to_dict(), where)
        table.check_modules(schemes, {name.rpartition(".")[0] for name in headers if name.rpartition(".")[2] in table.PARTS}, where)
        for stored, (bits, segment) in schemes.items():
            name, layer = _linear_at(model, stored, where)
            parts = {part: headers[f"{stored}.{part}"] for part in table.PARTS if f"{stored}.{part}" in headers}
            table.check(parts, bits, segment, (layer.out_features, layer.in_features), f"{where}: {stored}")
            _check_bias(layer, stored, headers, where)
            linear.swap(model, name, StoredTable(layer, parts, bits, segment))

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """None where experts were taken apart: the names of the folder are those of the model then."""
        apart = any(isinstance(module, experts.Experts) for module in model.modules())
        return [] if apart else super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        where = str(model.config.name_or_path or "the folder")
        for name, layer in list(model.named_modules()):
            if isinstance(layer, StoredTable | StoredAffine | StoredDense):
                layer.unpack(f"{where}: {name}")
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """(what save_pretrained writes, no metadata). peft adapters are saved alone: (None, no metadata) then.

        All packed weights lie in CPU memory once more meanwhile. Raises ModelError for layers that are no sketches.
        """
        parts = _saved_parts(model, table)
        if parts is None:
            return None, {}
        own, packed = parts
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


class SparseQuantizer(CompressorQuantizer):
    """Loads and saves sparse folders; it neither prunes nor quantises."""

    quantization_config: SparseConfig

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        where, headers = _headers(model, checkpoint_files)
        experts.unfuse(model, headers, prove=False)
        schemes = sparse.schemes_of(self.quantization_config.to_dict(), where)
        sparse.check_modules(schemes, headers, where)
        for stored, scheme in schemes.items():
            name, layer = _linear_at(model, stored, where)
            parts = {part: headers[f"{stored}.{part}"] for part in sparse.PARTS if f"{stored}.{part}" in headers}
            bitmask.check(parts, scheme, (layer.out_features, layer.in_features), f"{where}: {stored}")
            _check_bias(layer, stored, headers, where)
            linear.swap(model, name, StoredAffine(layer, parts, scheme) if scheme.bits else StoredDense(layer, parts, scheme))

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """(what save_pretrained writes, no metadata): each linear in its smallest form, tied ones as they are. ModelError for sketches."""
        parts = _saved_parts(model, sparse)
        if parts is None:
            return None, {}
        own, packed = parts
        places = [tensor.data_ptr() for tensor in own.values()]
        names = sorted(linear.linears(model))
        alone = [name for name in names if places.count(own[f"{name}.weight"].data_ptr()) == 1]
        schemes: sparse.Schemes = {}
        state = dict(sparse.entries(chain(own.items(), packed.items()), alone, schemes))
        self.quantization_config = model.config.quantization_config = SparseConfig(**sparse.quantization_config(schemes, names))
        return state, {}


def _headers(model: Any, checkpoint_files: list[str] | None) -> tuple[str, dict[str, Tensor]]:
    """(what to call the folder, its tensors on the meta device)."""
    where = str(model.config.name_or_path or "the folder")
    if not checkpoint_files or not all(str(path).endswith(".safetensors") for path in checkpoint_files):
        raise ModelError(f"{where} has no safetensors files, and packed weights are read from nothing else")
    return where, shards.read_headers(where, [Path(path) for path in checkpoint_files])


def _check_bias(layer: nn.Linear, stored: str, headers: dict[str, Tensor], where: str) -> None:
    if (f"{stored}.bias" in headers) != (layer.bias is not None):
        raise ModelError(f"{where}: {stored} {'lacks its' if layer.bias is not None else 'has a foreign'} bias")


def _saved_parts(model: Any, form: ModuleType) -> tuple[dict[str, Tensor], dict[str, PackedWeight]] | None:
    """(the tensors that are of no packed weight, packed weights by module name); None where peft saves its adapters alone.

    ModelError for a model that the format, a module of export/, cannot hold.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return None
    packed = {name: layer.packed() for name, layer in linear.packed_linears(model).items()}
    prefixes = tuple(f"{name}." for name in packed)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes) or name.endswith(".bias")}
    if why := form.fits(packed):
        raise ModelError(f"the model cannot be saved as a {form.NAME} folder: {why}")
    return own, packed


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
