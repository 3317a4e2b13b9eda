"""Linear layers of vLLM on packed weights: the kernels that we train with, behind vLLM's quantization interface (read in, and run with, 0.32).

    CompressorConfig         a QuantizationConfig: claims a folder by its quantization_config, and gives each linear its method. Table and sparse
                             folders are always ours; a compressed-tensors or GPTQ folder is where vLLM has nothing for one of its schemes on this
                             kind of machine (2 and 3 bits, on GPUs odd groups and 8 bits with zeros, on CPUs all but 4 bits), or
                             everywhere with `--quantization compressor`
    CompressorLinearMethod   a LinearMethod: empty parameters that take the stored tensors by name, whatever their shapes (vllm_shards.py), and after
                             loading one PackedLinear for each run of outputs that are stored alike

Values keep the dtype they are stored in; activations may be float16, bfloat16 or float32. Limits: linear layers only. Packed experts of a
mixture, embeddings and heads are refused in one sentence, and weights cannot be exchanged in a running server.
"""

# vLLM is not typed for mypy: its classes are Any here, and two of them are bases
# mypy: allow-subclassing-any

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from compressor.errors import ModelError
from compressor.export import compressed_tensors, gptq, sparse, table
from compressor.export.shards import DTYPES
from compressor.integrations.vllm_shards import Folder, Pieces, widths
from compressor.linear import PackedLinear
from compressor.packed import PackedWeight

METHOD = table.METHOD  # what `--quantization` is given
KERNELS = {(4, True): (-1, 32, 64, 128, 256), (4, False): (-1, 32, 64, 128, 256), (8, True): (-1, 32, 64, 128)}  # vLLM's groups by bits, symmetric
CAPABILITY = 80  # NVIDIA's, times ten: the Triton kernels' least


def register() -> None:
    """Add the method `compressor`; vLLM itself replaces a registration of the same name."""
    register_quantization_config(METHOD)(CompressorConfig)


class CompressorConfig(QuantizationConfig):
    """What vLLM asks about a folder that we serve."""

    def __init__(self, folder: Folder):
        super().__init__()
        self.folder = folder

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CompressorConfig":
        return cls(Folder(config))

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None) -> str | None:
        """Our name if the folder is for us, given what the user wrote behind `--quantization`; else None, and vLLM goes on asking."""
        if user_quant not in (None, METHOD):
            return None
        if hf_quant_cfg.get("quant_method") in (table.METHOD, sparse.METHOD):
            return METHOD
        bits = widths(hf_quant_cfg)
        return METHOD if bits and (user_quant or not runs(hf_quant_cfg, bits)) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called once with the folder or hub id: read which modules are packed from the headers of its files."""
        headers = get_safetensors_params_metadata(model_name, revision=revision)
        self.folder.look(model_name, {name: DTYPES.get(about.get("dtype"), torch.complex128) for name, about in headers.items()})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """The names of modules as this architecture of vLLM has them."""
        self.folder.modules = hf_to_vllm_mapper.apply_dict(self.folder.modules)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Nothing is renamed, and nothing dropped: vLLM's own would drop `g_idx`, the order of columns."""
        return WeightsMapper()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of the layer that vLLM calls `prefix`; None leaves what is no linear as it is. ModelError for what we cannot serve packed."""
        packed = self.folder.modules
        if isinstance(layer, LinearBase):
            names = self._names(prefix)
            return CompressorLinearMethod(self.folder, names) if any(name in packed for name in names) else UnquantizedLinearMethod()
        if prefix and (prefix in packed or any(name.startswith(f"{prefix}.") for name in packed)):
            kind = type(layer).__name__
            raise ModelError(f"{self.folder.where} has packed weights in {prefix}, a {kind}, and only linear layers are served packed")
        return None

    def _names(self, prefix: str) -> list[str]:
        """The modules of the folder that the linear at `prefix` is made of."""
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf)
        if prefix in self.folder.modules or not parts:
            return [prefix]
        return [f"{parent}.{part}" if parent else part for part in parts]


def runs(config: dict[str, Any], bits: set[int]) -> bool:
    """Whether vLLM 0.32 itself runs a folder of these widths on this kind of machine, as its configurations and its kernels' can_implement say."""
    if config.get("quant_method") == gptq.METHOD:  # auto_gptq.py; groups apart, which its kernels refuse with a reason
        return bits <= ({4} if current_platform.is_cpu() else {4, 8}) and config.get("sym", True) and not config.get("desc_act")
    if current_platform.is_cpu():
        return bits <= {4}
    from vllm.utils.import_utils import has_humming

    if current_platform.is_cuda() and has_humming():
        return bits <= {2, 3, 4, 8}
    return all(group.size in KERNELS.get((group.bits, group.symmetric), ()) for group in compressed_tensors.groups_of(config, "the folder"))


class CompressorLinearMethod(LinearMethodBase):
    """How one linear of vLLM is loaded and computed."""

    def __init__(self, folder: Folder, names: list[str]):
        """names: the modules of the folder, in the order of the layer's outputs."""
        self.folder, self.names = folder, names

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int, output_size: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        """Empty parameters with the names of the stored tensors, whose loaders collect whatever comes."""
        rank, ranks = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        layer.pieces = Pieces(self.folder, self.names, output_partition_sizes, input_size_per_partition, rank, ranks)
        dtypes: dict[str, torch.dtype] = {}
        for name in self.names:
            dtypes |= self.folder.modules.get(name, (name, {"weight": params_dtype}))[1]
        for leaf, dtype in dtypes.items():
            empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            layer.register_parameter(leaf, empty)
            set_weight_attrs(empty, {"weight_loader": partial(_load, layer.pieces, leaf)})
        layer.dense_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """The packed weights, in the kernels' layout, in the place of what was loaded."""
        layer.packed = nn.ModuleList([_linear(weight, layer.dense_dtype) for weight in layer.pieces.take()])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., k] -> [..., n], in its dtype."""
        outs = [part(x) for part in layer.packed]
        y = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return y if bias is None else y + bias


def _load(pieces: Pieces, leaf: str, param: nn.Parameter, loaded_weight: Tensor, shard: Any = None) -> None:
    """vLLM's weight_loader: the parameter it is for says the device, the shard which outputs of a fused layer."""
    pieces.add(leaf, loaded_weight, shard, param.device)


def _linear(weight: PackedWeight | Tensor, dtype: torch.dtype) -> nn.Module:
    """A layer without bias on a weight [n, k]; a dense one in `dtype`, the model's."""
    if isinstance(weight, PackedWeight):
        return PackedLinear(weight)
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    out.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return out
