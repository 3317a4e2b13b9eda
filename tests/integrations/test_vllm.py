"""Our layers behind vLLM's own interface: its parallel linears, filled by their weight loaders, give what PackedLinear gives; and whose a folder is.

Run where vLLM is installed; what needs none of it is in test_vllm_shards.py. The whole engine is in bench/interop/read_vllm.py.
"""

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.export import sparse, table
from compressor.integrations import vllm as door
from compressor.linear import PackedLinear
from compressor.packed import PackedWeight
from tests.integrations.test_vllm_shards import affine, sketch, stored

NEEDED = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
Packed = dict[str, PackedWeight | Tensor]
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def test_without_vllm_registering_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressor.integrations.vllm_layers", None)
    with pytest.warns(RuntimeWarning, match="vLLM cannot serve folders of compressor"):
        door.register()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets which process of how many vLLM's layers take themselves for; one of one by default."""
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    def set_ranks(rank: int, count: int) -> None:
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: count)

    set_ranks(0, 1)
    with set_current_vllm_config(VllmConfig()):
        yield set_ranks


def config_of(packed: Packed) -> tuple[Any, dict[str, Tensor]]:
    """Our QuantizationConfig for a folder with these modules, as vLLM makes it, and the folder's tensors."""
    from compressor.integrations.vllm_layers import CompressorConfig

    values, tensors = stored(packed)
    config = CompressorConfig.from_config(values)
    config.packed_modules_mapping = MAPPING
    config.folder.look("here", {name: tensor.dtype for name, tensor in tensors.items()})
    return config, tensors


def load(layer: nn.Module, tensors: dict[str, Tensor], shards: dict[str, Any]) -> nn.Module:
    """Fill a layer as the models of vLLM do: by the parameter's own weight_loader, with the shard it is for; then process it."""
    params: dict[str, Any] = dict(layer.named_parameters())
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if module in shards:
            given = () if shards[module] is None else (shards[module],)
            params[leaf].weight_loader(params[leaf], tensor, *given)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def outputs(packed: Packed, x: Tensor) -> Tensor:
    """What our own layers give for x [.., k], one after the other."""
    parts = [PackedLinear(w)(x) if isinstance(w, PackedWeight) else nn.functional.linear(x, w.to(x.dtype)) for w in packed.values()]
    return torch.cat(parts, -1)


MAKERS: list[Any] = [
    lambda n, k, seed: affine(n, k, 3, seed=seed), lambda n, k, seed: affine(n, k, 2, zeros="codes", seed=seed),
    lambda n, k, seed: affine(n, k, 4, k, seed=seed), lambda n, k, seed: affine(n, k, 8, zeros="codes", seed=seed),
    lambda n, k, seed: affine(n, k, 3, zeros="floats", seed=seed), lambda n, k, seed: sketch(n, k, 3, seed=seed),
    lambda n, k, seed: sketch(n, k, 2, 48, torch.bfloat16, seed=seed),
]  # fmt: skip


@NEEDED
@pytest.mark.parametrize("make", MAKERS)
def test_the_linears_of_vllm_give_what_ours_give(make: Any, ranks: Any) -> None:
    from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    q, k, v, o, gate, up = (make(n, width, seed) for seed, (n, width) in enumerate([(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64)]))
    packed = {f"a.{leaf}_proj": w for leaf, w in zip(("q", "k", "v", "o", "gate", "up"), (q, k, v, o, gate, up), strict=True)}
    config, tensors = config_of(packed)
    layers: list[tuple[Any, dict[str, Any]]] = [
        (QKVParallelLinear(64, 16, 4, 2, bias=False, quant_config=config, prefix="a.qkv_proj"), {"a.q_proj": "q", "a.k_proj": "k", "a.v_proj": "v"}),
        (MergedColumnParallelLinear(64, [96, 96], bias=False, quant_config=config, prefix="a.gate_up_proj"), {"a.gate_proj": 0, "a.up_proj": 1}),
        (RowParallelLinear(64, 64, bias=False, quant_config=config, prefix="a.o_proj"), {"a.o_proj": None}),
        (ColumnParallelLinear(64, 96, bias=False, quant_config=config, prefix="a.up_proj"), {"a.up_proj": None}),
    ]
    for layer, shards in layers:
        load(layer, tensors, shards)
        assert not any(p.numel() for p in layer.parameters()) and len(layer.packed) == 1  # alike, so one call for all
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
            y, _ = layer(x)
            torch.testing.assert_close(y, outputs({name: packed[name] for name in shards}, x), rtol=0, atol=1e-5)


@NEEDED
def test_a_fused_layer_of_unlike_and_dense_parts_and_a_bias(ranks: Any) -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    packed: Packed = {"a.q_proj": affine(64, 64, 2), "a.k_proj": torch.randn(32, 64), "a.v_proj": affine(32, 64, 4, 64, "codes")}
    config, tensors = config_of(packed)
    layer = QKVParallelLinear(64, 16, 4, 2, bias=True, quant_config=config, prefix="a.qkv_proj")
    load(layer, tensors, {"a.v_proj": "v", "a.q_proj": "q", "a.k_proj": "k"})
    bias = torch.randn(128)
    layer.bias.data.copy_(bias)
    x = torch.randn(3, 64)
    assert [type(part).__name__ for part in layer.packed] == ["PackedLinear", "Linear", "PackedLinear"]
    torch.testing.assert_close(layer(x)[0], outputs(packed, x) + bias, rtol=0, atol=1e-5)


@NEEDED
def test_dense_layers_are_left_to_vllm_and_other_packed_layers_refused(ranks: Any) -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    config, _ = config_of({"a.o_proj": affine(32, 32), "lm_head": affine(32, 32), "b.experts.0.up_proj": affine(32, 32)})
    assert isinstance(ReplicatedLinear(32, 32, quant_config=config, prefix="a.gate").quant_method, UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Module(), "a.attn") is None
    for prefix in ("lm_head", "b.experts"):
        with pytest.raises(ModelError, match=f"packed weights in {prefix}, a Module, and only linear layers"):
            config.get_quant_method(nn.Module(), prefix)


@NEEDED
@pytest.mark.parametrize("make", MAKERS[:1] + MAKERS[4:6])
def test_shares_of_two_processes_add_up(make: Any, ranks: Any) -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

    packed: Packed = {"a.q_proj": make(64, 64, 0), "a.k_proj": make(16, 64, 1), "a.v_proj": make(16, 64, 2), "a.o_proj": make(64, 64, 3)}
    x, shards = torch.randn(3, 64), {"a.q_proj": "q", "a.k_proj": "k", "a.v_proj": "v"}
    rows, total = [], torch.zeros(3, 64)
    for rank in range(2):
        ranks(rank, 2)
        config, tensors = config_of(packed)
        qkv = load(QKVParallelLinear(64, 16, 4, 1, bias=False, quant_config=config, prefix="a.qkv_proj"), tensors, shards)
        rows.append(qkv(x)[0])
        o = RowParallelLinear(64, 64, bias=False, reduce_results=False, input_is_parallel=True, quant_config=config, prefix="a.o_proj")
        total += load(o, tensors, {"a.o_proj": None})(x[:, 32 * rank : 32 * rank + 32])[0]
    q, k, v = (outputs({name: packed[name]}, x) for name in shards)
    for rank, got in enumerate(rows):  # one key and value head, which both processes hold
        torch.testing.assert_close(got, torch.cat([q[:, 32 * rank : 32 * rank + 32], k, v], -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(total, outputs({"o": packed["a.o_proj"]}, x), rtol=0, atol=1e-4)


@NEEDED
def test_a_share_that_cuts_groups_is_one_sentence(ranks: Any) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    ranks(1, 2)
    config, tensors = config_of({"a.o_proj": affine(32, 96)})
    layer = RowParallelLinear(96, 32, bias=False, quant_config=config, prefix="a.o_proj")
    with pytest.raises(ModelError, match="groups of 32 columns, which shares of 48 columns would cut"):
        load(layer, tensors, {"a.o_proj": None})


@NEEDED
def test_whose_a_folder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from compressor.integrations import vllm_layers

    door.register()
    door.register()
    assert QUANTIZATION_METHODS.count("compressor") == 1
    claims = get_quantization_config("compressor").override_quantization_method
    ours = [stored({"x": weight})[0] for weight in (sketch(8, 64), affine(8, 64, zeros="floats"))]
    assert [values["quant_method"] for values in ours] == [table.METHOD, sparse.METHOD]
    assert [claims(values, None) for values in ours] == ["compressor"] * 2 and claims(ours[0], "gptq") is None
    foreign = {bits: stored({"x": affine(8, 64, bits)})[0] for bits in (2, 3, 4, 8)}
    for cpu, automatic in ((True, {2, 3, 8}), (False, {2, 3})):
        monkeypatch.setattr(vllm_layers, "current_platform", SimpleNamespace(is_cpu=lambda cpu=cpu: cpu, is_cuda=lambda: False))
        assert {bits for bits, values in foreign.items() if claims(values, None)} == automatic
        others = [{"quant_method": "gptq", "bits": bits} | more for bits in (2, 3, 4, 8) for more in ({}, {"sym": False}, {"desc_act": True})]
        assert [values for values in others if not claims(values, None)] == [{"quant_method": "gptq", "bits": b} for b in ((4,) if cpu else (4, 8))]
    schemes = [(4, 64, False), (4, 256, False), (8, 128, True), (8, 256, True), (8, 128, False), (4, 16, True), (4, 48, True)]
    kinds = [stored({"x": affine(8, 768, bits, group, "none" if symmetric else "codes")})[0] for bits, group, symmetric in schemes]
    assert [scheme for scheme, values in zip(schemes, kinds, strict=True) if claims(values, None)] == schemes[3:]
    assert all(claims(values, "compressor") == "compressor" for values in foreign.values())
    assert claims({"quant_method": "fp8"}, "compressor") is None and claims(foreign[3], "compressed-tensors") is None


@NEEDED
def test_a_folder_from_its_files(tmp_path: Any, ranks: Any) -> None:
    from safetensors.torch import save_file
    from vllm.model_executor.models.utils import WeightsMapper

    from compressor.integrations.vllm_layers import CompressorConfig

    values, tensors = stored({"model.a.o_proj": affine(32, 64)})
    config = CompressorConfig.from_config(values)
    with pytest.raises(ModelError, match="shows no packed weight"):
        config.maybe_update_config(str(tmp_path))
    save_file(tensors, tmp_path / "model.safetensors")
    config.maybe_update_config(str(tmp_path))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language."}))
    name, dtypes = config.folder.modules["language.a.o_proj"]
    assert name == "model.a.o_proj" and dtypes["weight_packed"] == torch.int32 and dtypes["weight_scale"] == torch.float16
