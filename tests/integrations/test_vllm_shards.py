"""What a layer of vLLM takes of a folder, without vLLM: streams to weights, shares of processes, fused layers of unlike parts, and damage."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from compressor.errors import ModelError
from compressor.export import bitmask, compressed_tensors, gptq, sparse, table
from compressor.integrations.vllm_shards import Folder, Pieces, cut, joined, widths
from compressor.packed import Affine, PackedWeight, Table

CPU = torch.device("cpu")


def affine(n: int, k: int, bits: int = 3, group: int = 32, zeros: str = "none", dtype: torch.dtype = torch.float16, seed: int = 0) -> PackedWeight:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=draw)
    scale = (0.1 * torch.rand(n, k // group, generator=draw) + 0.01).to(dtype)
    zero = torch.randint(0, 1 << bits, scale.shape, generator=draw)
    kinds = {"none": None, "codes": zero.to(torch.uint8), "floats": (zero + torch.rand(scale.shape, generator=draw)).half()}
    return PackedWeight.pack(codes, Affine(scale, kinds[zeros]), bits, group)


def sketch(n: int, k: int, bits: int = 3, segment: int = 32, dtype: torch.dtype = torch.float16, seed: int = 0) -> PackedWeight:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=draw)
    return PackedWeight.pack(codes, Table(torch.randn(n, -(-k // segment), 1 << bits, generator=draw).to(dtype)), bits, segment)


def stored(packed: dict[str, PackedWeight | Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """quantization_config and tensors of a folder that holds these modules, in the format that can."""
    weights = {name: weight for name, weight in packed.items() if isinstance(weight, PackedWeight)}
    dense = {f"{name}.weight": weight for name, weight in packed.items() if isinstance(weight, Tensor)}
    if any(isinstance(weight.values, Table) for weight in weights.values()):
        parts = {key: tensor for name, weight in weights.items() for key, tensor in table.tensors_of(name, weight).items()}
        return table.quantization_config({name: (weight.bits, weight.group) for name, weight in weights.items()}, []), parts | dense
    if any(weight.float_zeros for weight in weights.values()):
        schemes: dict[str, bitmask.Scheme] = {}
        parts = dict(sparse.entries(packed.items(), list(packed), schemes))
        return sparse.quantization_config(schemes, []), {(key if "." in key else f"{key}.weight"): tensor for key, tensor in parts.items()}
    parts = {key: tensor for name, weight in weights.items() for key, tensor in compressed_tensors.tensors_of(name, weight).items()}
    kinds: dict[tuple[int, int, bool], list[str]] = {(w.bits, w.group, w.zero is None): [] for w in weights.values()}
    return compressed_tensors.quantization_config(kinds, []), parts | dense


def folder_of(packed: dict[str, PackedWeight | Tensor]) -> tuple[Folder, dict[str, Tensor]]:
    config, tensors = stored(packed)
    folder = Folder(config)
    folder.look("here", {name: tensor.dtype for name, tensor in tensors.items()})
    return copy.deepcopy(folder), tensors  # vLLM sends its parts from process to process, by the same protocol


def fill(pieces: Pieces, tensors: dict[str, Tensor], names: list[str], shards: list[Any]) -> None:
    for name, shard in zip(names, shards, strict=True):
        for key, tensor in reversed(tensors.items()):
            module, _, leaf = key.rpartition(".")
            if module == name:
                pieces.add(leaf, tensor, shard, CPU)


def dense(weights: list[PackedWeight | Tensor]) -> Tensor:
    return torch.cat([w.dequantize() if isinstance(w, PackedWeight) else w for w in weights])


@pytest.mark.parametrize("make", [
    lambda: affine(24, 64), lambda: affine(24, 64, 2, zeros="codes"), lambda: affine(24, 64, 4, 64), lambda: affine(24, 64, 8, zeros="codes"),
    lambda: affine(24, 64, zeros="floats"), lambda: sketch(24, 64), lambda: sketch(24, 72, 2, 32, torch.bfloat16),
])  # fmt: skip
def test_a_module_of_every_format_comes_back_bit_for_bit(make: Any) -> None:
    weight = make()
    folder, tensors = folder_of({"a.proj": weight})
    pieces = Pieces(folder, ["a.proj"], [24], weight.shape[1])
    fill(pieces, tensors, ["a.proj"], [None])
    (back,) = pieces.take()
    assert isinstance(back, PackedWeight) and torch.equal(back.words, weight.words)
    assert back.learned.dtype == weight.learned.dtype and torch.equal(back.learned, weight.learned)
    assert (back.zero is None) == (weight.zero is None) and (weight.zero is None or torch.equal(back.zero, weight.zero))
    assert not pieces.waiting and not pieces.done  # nothing that was stored is kept


def gptq_folder(place: Path, weight: PackedWeight, form: gptq.Gptq, **config: Any) -> tuple[Folder, dict[str, Tensor]]:
    """What a folder with the module x holds; config: what its quantization_config says instead."""
    form.write(place, {}, [("x", form.held(weight))], [])
    tensors = load_file(place / "model.safetensors")
    folder = Folder(json.loads((place / "config.json").read_text("utf-8"))["quantization_config"] | config)
    folder.look("here", {name: tensor.dtype for name, tensor in tensors.items()})
    return folder, tensors


@pytest.mark.parametrize("form", [gptq.V1, gptq.V2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [False, True])
def test_gptq_folders_of_both_versions(form: gptq.Gptq, bits: int, ordered: bool, tmp_path: Path) -> None:
    plain = affine(64, 96, bits, zeros="codes")
    columns = torch.randperm(96, generator=torch.Generator().manual_seed(1)) if ordered else None
    weight = PackedWeight.pack(plain.codes(), plain.values, bits, columns=columns)
    folder, tensors = gptq_folder(tmp_path, weight, form)
    pieces = Pieces(folder, ["x"], [32], 96, 1, 2)
    fill(pieces, tensors, ["x"], [None])
    assert torch.equal(dense(pieces.take()), weight.dequantize()[32:])


def test_zeros_that_speak_against_the_label_of_gptq_are_a_warning(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    codes = (torch.randn(256, 512, generator=draw) * 1.5 + 4).round().clamp(0, 7).to(torch.uint8)
    weight = PackedWeight.pack(codes, Affine(torch.rand(256, 16).half(), torch.randint(3, 6, (256, 16), generator=draw).to(torch.uint8)), 3)
    folder, tensors = gptq_folder(tmp_path, weight, gptq.V1, checkpoint_format="gptq_v2", meta={"quantizer": ["other:1"]})
    pieces = Pieces(folder, ["x"], [256], 512)
    with pytest.warns(UserWarning, match="labelled gptq_v2, and zeros in it look like those of the other"):
        fill(pieces, tensors, ["x"], [None])
    (got,) = pieces.take()
    assert isinstance(got, PackedWeight) and got.zero is not None and weight.zero is not None
    assert torch.equal(got.zero, weight.zero - 1)  # by its label


def test_a_fused_layer_joins_what_is_alike_and_keeps_the_rest_apart() -> None:
    packed = {"q": affine(32, 64, seed=1), "k": affine(16, 64, seed=2), "v": affine(16, 64, 4, seed=3)}
    folder, tensors = folder_of(packed)
    pieces = Pieces(folder, ["q", "k", "v"], [32, 16, 16], 64)
    fill(pieces, tensors, ["v", "q", "k"], ["v", "q", "k"])
    parts = pieces.take()
    assert [tuple(part.shape) for part in parts] == [(48, 64), (16, 64)]
    assert torch.equal(dense(parts), dense(list(packed.values())))


def test_a_fused_layer_with_a_dense_part() -> None:
    packed = {"gate": torch.randn(16, 64), "up": affine(16, 64, zeros="codes")}
    folder, tensors = folder_of(packed)
    pieces = Pieces(folder, ["gate", "up"], [16, 16], 64)
    fill(pieces, tensors, ["gate", "up"], [0, 1])
    assert torch.equal(dense(pieces.take()), dense(list(packed.values())))


def test_a_layer_that_is_fused_in_the_folder_is_shared_out_part_by_part() -> None:
    whole = affine(32 + 16 + 16, 64)
    folder, tensors = folder_of({"qkv_proj": whole})
    q, k, v = whole.dequantize().split([32, 16, 16])
    for rank in range(2):
        pieces = Pieces(folder, ["qkv_proj"], [16, 8, 8], 64, rank, 2)
        fill(pieces, tensors, ["qkv_proj"], [None])
        assert torch.equal(dense(pieces.take()), torch.cat([part.chunk(2)[rank] for part in (q, k, v)]))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["affine", "floats", "table", "dense"]), bits=st.sampled_from([2, 3, 4]), ranks=st.sampled_from([1, 2, 4]),
    down=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_shares_of_all_processes_are_the_weight(kind: str, bits: int, ranks: int, down: bool, seed: int) -> None:
    n, k = 16, 128
    makers: dict[str, Any] = {
        "affine": lambda: affine(n, k, bits, 32, "codes", seed=seed), "floats": lambda: affine(n, k, bits, 32, "floats", seed=seed),
        "table": lambda: sketch(n, k, bits, 32, seed=seed), "dense": lambda: torch.randn(n, k, generator=torch.Generator().manual_seed(seed)),
    }  # fmt: skip
    weight = makers[kind]()
    folder, tensors = folder_of({"x": weight} if kind != "dense" else {"x": weight, "y": affine(n, k)})
    shares = []
    for rank in range(ranks):
        pieces = Pieces(folder, ["x"], [n // (ranks if down else 1)], k // (1 if down else ranks), rank, ranks)
        fill(pieces, tensors, ["x"], [None])
        shares.append(dense(pieces.take()))
    assert torch.equal(torch.cat(shares, 0 if down else 1), dense([weight]))


def test_heads_that_are_fewer_than_processes_are_held_several_times() -> None:
    weight = affine(16, 64)
    folder, tensors = folder_of({"k": weight})
    for rank in range(4):
        pieces = Pieces(folder, ["k"], [8], 64, rank, 4)
        fill(pieces, tensors, ["k"], [0])
        assert torch.equal(dense(pieces.take()), weight.dequantize()[8 * (rank // 2) :][:8])


def test_rows_with_one_scale_or_one_table_are_cut_anywhere() -> None:
    for weight in (affine(8, 96, group=96), sketch(8, 96, segment=96), sketch(8, 96, segment=128)):
        parts = [cut(weight, None, slice(48 * i, 48 * i + 48), "x") for i in range(2)]
        assert torch.equal(torch.cat([dense([part]) for part in parts], 1), weight.dequantize())


def test_act_order_is_served_whole_and_not_cut_by_columns() -> None:
    plain = affine(16, 64)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 32  # the group of every column
    weight = PackedWeight.pack(plain.codes()[:, by := index.argsort(stable=True)], plain.values, 3, columns=by)
    folder, tensors = folder_of({"x": plain, "y": plain})
    for name in ("x", "y"):
        folder.modules[name][1]["weight_g_idx"] = torch.int32
        tensors[f"{name}.weight_g_idx"] = index.int()
    pieces = Pieces(folder, ["x", "y"], [8, 8], 64, 1, 2)
    fill(pieces, tensors, ["x", "y"], [0, 1])
    (both,) = pieces.take()
    assert torch.equal(dense([both]), torch.cat([weight.dequantize()[8:]] * 2))
    with pytest.raises(ModelError, match="another order"):
        cut(weight, None, slice(0, 32), "x")


def test_shares_that_cut_groups_rows_or_columns_are_refused_in_one_sentence() -> None:
    folder, tensors = folder_of({"x": affine(16, 96, group=32)})
    cases = [([16], 48, 2, "groups of 32 columns"), ([16], 50, 2, "96 columns"), ([6], 96, 2, "16 rows"), ([5, 5], 96, 2, "16 rows")]
    for sizes, columns, ranks, message in cases:
        with pytest.raises(ModelError, match=message) as error:
            fill(Pieces(folder, ["x"], sizes, columns, 0, ranks), tensors, ["x"], [None])
        assert "\n" not in str(error.value)


def test_what_does_not_come_or_should_not_is_an_error() -> None:
    folder, tensors = folder_of({"q": affine(16, 64), "k": affine(16, 64)})
    pieces = Pieces(folder, ["q", "k"], [16, 16], 64)
    fill(pieces, tensors, ["q"], [0])
    with pytest.raises(ModelError, match="lacks tensors of k"):
        pieces.take()
    with pytest.raises(ModelError, match="q.weight_zero_point"):
        pieces.add("weight_zero_point", torch.zeros(1), 0, CPU)
    with pytest.raises(ModelError, match="2 outputs|3 outputs"):
        Pieces(folder, ["q", "k"], [8, 8, 16], 64).add("weight_shape", torch.zeros(2), (0, 1), CPU)
    damaged = tensors | {"k.weight_packed": tensors["k.weight_packed"][:, :3]}
    with pytest.raises(ModelError, match="here: k"):
        fill(pieces, damaged, ["k"], [1])


def test_a_folder_is_what_its_config_and_headers_say() -> None:
    config, tensors = stored({"x": sketch(8, 64)})
    with pytest.raises(ModelError, match="lacks the packed weight of x"):
        Folder(config).look("there", {"y.weight": torch.float16})
    with pytest.raises(ModelError, match="shows no packed weight"):
        Folder(stored({"x": affine(8, 64)})[0]).look("there", {})
    with pytest.raises(ModelError, match="quantised as fp8/None"):
        Folder({"quant_method": "fp8"})
    assert set(tensors) == {"x.weight_packed", "x.weight_table", "x.weight_shape"}


def test_widths_of_a_foreign_config() -> None:
    config = stored({"x": affine(8, 64, 2), "y": affine(8, 64, 4)})[0]
    assert widths(config) == {2, 4}
    group = config["config_groups"]["group_0"]
    others: list[dict[str, Any]] = [
        config | {"format": "naive-quantized"}, config | {"quant_method": "awq"}, config | {"config_groups": None},
        config | {"config_groups": {"a": group | {"input_activations": {"num_bits": 8}}}}, config | {"config_groups": {"a": {"weights": None}}},
        *(config | {"config_groups": {"a": {"weights": {"num_bits": bits, "type": kind}}}} for bits, kind in ((5, "int"), (8, "float"))),
        config | {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, config | {"config_groups": [group]},
        config | {"config_groups": {"a": {"weights": {"num_bits": [4], "type": "int"}}}},
    ]  # fmt: skip
    other = {"quant_method": "gptq", "bits": 3}
    assert widths(other) == {3} and widths(other | {"dynamic": {"+:up": {"bits": 8}, "-:lm_head": {}}}) == {3, 8}
    others += [
        other | more
        for more in ({"bits": 5}, {"bits": [3]}, {"bits": None}, {"lm_head": True}, {"checkpoint_format": "marlin"}, {"pack_dtype": "int16"})
    ]
    assert [widths(other) for other in others] == [None] * len(others)


def test_a_foreign_config_that_is_not_served_is_one_sentence() -> None:
    config = stored({"x": affine(8, 64, 4)})[0]
    for change, words in (({"transform_config": {"config_groups": {"R1": {}}}}, "rotates activations"), ({"config_groups": [1]}, "is damaged")):
        with pytest.raises(ModelError, match=words):
            Folder(config | change)


def test_modules_of_few_columns_have_the_bits_of_their_targets() -> None:
    weights: dict[str, PackedWeight | Tensor] = {"a.q": affine(16, 8, 3, 8), "a.k": affine(16, 8, 2, 8)}
    config, tensors = stored(weights)
    for group in config["config_groups"].values():
        group["targets"] = [r"re:.*\.q$"] if group["weights"]["num_bits"] == 3 else [r"re:.*\.k$"]
    folder = Folder(config)
    folder.look("here", {name: tensor.dtype for name, tensor in tensors.items()})
    for name, weight in weights.items():
        pieces = Pieces(folder, [name], [16], 8)
        fill(pieces, tensors, [name], [None])
        assert isinstance(weight, PackedWeight) and torch.equal(dense(pieces.take()), weight.dequantize())


def test_joined_keeps_dtypes_apart() -> None:
    parts = [affine(8, 64), affine(8, 64, dtype=torch.bfloat16), affine(8, 64, zeros="codes"), sketch(8, 64), sketch(8, 64, seed=1)]
    together = joined(parts)
    assert len(together) == 4 and torch.equal(dense(together), dense(list(parts)))
