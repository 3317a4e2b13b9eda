"""The MLX folder: what is written reads back bit for bit where that is claimed, what cannot be held is named, what is damaged gives one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compressor.errors import ModelError
from compressor.export import mlx
from compressor.packed import Affine, PackedWeight, Table


def weight(n: int, k: int, bits: int, group: int, zeros: str = "none", dtype: torch.dtype = torch.float16, seed: int = 0) -> PackedWeight:
    make = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=make)
    scale = (0.01 + torch.rand(n, k // group, generator=make)).to(dtype)
    zero = None
    if zeros == "integers":
        zero = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8, generator=make)
        zero[0, 0] = 0  # never the midpoint everywhere
    if zeros == "floats":
        zero = torch.randn(scale.shape, generator=make) * 2 + 0.3
    return PackedWeight.pack(codes, Affine(scale, zero), bits, group)


def write(folder: Path, weights: dict[str, PackedWeight], **options: Any) -> None:
    folder.mkdir(exist_ok=True)
    stream = [("norm.weight", torch.arange(12.0).view(3, 4)), *weights.items()]
    mlx.write(folder, {"model_type": "x"}, iter(stream), ["lm_head"], **options)


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, PackedWeight]]:
    return mlx.read(folder, sorted(folder.glob("*.safetensors")), json.loads((folder / "config.json").read_text())["quantization"])


def same(a: PackedWeight, b: PackedWeight) -> bool:
    mine, back = a.tensors(), b.tensors()
    equal = mine.keys() == back.keys() and all(torch.equal(mine[key], back[key]) and mine[key].dtype == back[key].dtype for key in mine)
    return equal and (a.bits, a.group, a.shape) == (b.bits, b.group, b.shape)


cells = {
    "n": st.integers(1, 70), "groups": st.integers(1, 5), "bits": st.sampled_from([2, 3, 4, 8]), "group": st.sampled_from([32, 64, 128]),
    "dtype": st.sampled_from(mlx.DTYPES), "seed": st.integers(0, 1000),
}  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(**cells)
def test_symmetric_round_trip(tmp_path_factory, n: int, groups: int, bits: int, group: int, dtype: torch.dtype, seed: int) -> None:
    packed, folder = weight(n, groups * group, bits, group, dtype=dtype, seed=seed), tmp_path_factory.mktemp("mlx")
    assert mlx.fits({"a": packed}) is None
    if dtype != torch.float32:  # there scale * code + bias and scale * (code - zero) may differ in the last bit
        assert mlx.held(packed) is packed
    write(folder, {"a": packed})
    dense, again = read(folder)
    assert torch.equal(dense["norm.weight"], torch.arange(12.0).view(3, 4))
    assert list(again) == ["a"]
    assert same(again["a"], packed)


@settings(max_examples=40, deadline=None)
@given(**cells)
def test_asymmetric_round_trip_with_float32_biases(tmp_path_factory, n: int, groups: int, bits: int, group: int, dtype, seed: int) -> None:
    packed, folder = weight(n, groups * group, bits, group, "integers", dtype, seed), tmp_path_factory.mktemp("mlx")
    write(folder, {"a": packed}, dtype=torch.float32)
    again = read(folder)[1]["a"]
    assert same(again, replace(packed, values=Affine(packed.learned.float(), packed.zero)))
    if dtype != torch.float32:
        assert mlx.held(packed, torch.float32) is packed


@settings(max_examples=40, deadline=None)
@given(zeros=st.sampled_from(["integers", "floats"]), **cells)
def test_rounded_biases_are_what_held_says_and_stay(
    tmp_path_factory, zeros: str, n: int, groups: int, bits: int, group: int, dtype, seed: int
) -> None:
    packed, folder = weight(n, groups * group, bits, group, zeros, dtype, seed), tmp_path_factory.mktemp("mlx")
    write(folder, {"a": packed})
    stored, again = load_file(folder / "model.safetensors"), read(folder)[1]["a"]
    scale, bias = (stored[f"a.{part}"].float().repeat_interleave(group, 1) for part in ("scales", "biases"))
    seen = packed.codes() * scale + bias  # what mlx computes
    held = mlx.held(packed)
    assert torch.equal(seen, held.dequantize() if isinstance(held, PackedWeight) else held)
    largest = float(seen.abs().max()) + float(bias.abs().max())
    assert float((again.dequantize() - seen).abs().max()) <= 1e-6 * largest
    write(folder, {"a": again})
    if dtype != torch.float32:
        assert all(torch.equal(tensor, stored[name]) for name, tensor in load_file(folder / "model.safetensors").items())


@pytest.mark.parametrize(("k", "group", "stored"), [(256, 256, 128), (192, 192, 64), (352, 352, 32), (512, 256, 128), (384, 384, 128), (96, 96, 32)])
def test_longer_groups_are_repeated_and_exact(tmp_path: Path, k: int, group: int, stored: int) -> None:
    packed = weight(40, k, 3, group)
    write(tmp_path, {"a": packed})
    again = read(tmp_path)[1]["a"]
    assert again.group == stored
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_layers_that_differ_and_dense_ones_are_named(tmp_path: Path) -> None:
    weights = {f"layers.{i}.up": weight(8, 256, bits, group) for i, (bits, group) in enumerate([(3, 64), (3, 64), (4, 128), (2, 256)])}
    write(tmp_path, weights, shard_bytes=600)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == config["quantization"] == {
        "bits": 3, "group_size": 64, "mode": "affine", "lm_head": False,
        "layers.2.up": {"bits": 4, "group_size": 128, "mode": "affine"}, "layers.3.up": {"bits": 2, "group_size": 128, "mode": "affine"},
    }  # fmt: skip
    assert mlx.describes(config["quantization"])
    assert not mlx.describes({"quant_method": "gptq", "bits": 3, "group_size": 64})
    again = read(tmp_path)[1]
    assert all(torch.equal(again[name].dequantize(), packed.dequantize()) for name, packed in weights.items())


def test_bytes_are_a_stream_of_unsigned_words(tmp_path: Path) -> None:
    packed = weight(2, 32, 3, 32, "integers")
    write(tmp_path, {"a": packed})
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["a.weight"].dtype == torch.uint32
    words = [int(word) for word in stored["a.weight"][1].view(torch.int32).to(torch.int64) & 0xFFFFFFFF]
    whole = sum(word << (32 * i) for i, word in enumerate(words))
    assert [whole >> 3 * i & 7 for i in range(32)] == packed.codes()[1].tolist()


@pytest.mark.parametrize(
    ("packed", "why"),
    [
        (weight(4, 64, 3, 16), "groups of 16 columns"),
        (weight(4, 100, 3, 100), "groups of 100 columns"),
        (PackedWeight.pack(torch.zeros(4, 64, dtype=torch.uint8), Table(torch.zeros(4, 1, 8)), 3, 64), "1 of its 1 packed layers hold tables"),
        (PackedWeight.pack(torch.zeros(4, 64, dtype=torch.uint8), Affine(torch.ones(4, 2)), 3, 32, torch.arange(63, -1, -1)), "act-order"),
        (weight(4, 64, 3, 32, dtype=torch.float64), "are float64"),
        (weight(4, 64, 8, 32).with_learned(torch.full((4, 2), 600.0).half()), "not finite in float16"),
    ],
)
def test_what_does_not_fit_is_named(packed: PackedWeight, why: str) -> None:
    assert why in str(mlx.fits({"a": packed}))


def test_no_layers_do_not_fit_and_float32_makes_room() -> None:
    assert mlx.fits({}) == "no layer is packed"
    assert mlx.fits({"a": weight(4, 64, 8, 32).with_learned(torch.full((4, 2), 600.0).half())}, torch.float32) is None


def test_quantised_embeddings_become_dense(tmp_path: Path) -> None:
    table = weight(40, 64, 4, 64, "integers")
    write(tmp_path, {"model.embed_tokens": table, "a": weight(8, 64, 4, 64)})
    dense, packed = read(tmp_path)
    assert list(packed) == ["a"]
    assert dense["model.embed_tokens.weight"].dtype == torch.float16
    held = mlx.held(table)
    assert isinstance(held, torch.Tensor)
    assert float((dense["model.embed_tokens.weight"] - held).abs().max()) < 1e-2


@pytest.mark.parametrize("leaf", ["embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"])
def test_only_token_embeddings_become_dense(tmp_path: Path, leaf: str) -> None:
    """Linears whose names hold the same letters stay packed."""
    linears = ["a.embed_proj", "a.embedding_projection", "a.member"]
    write(tmp_path, {name: weight(8, 64, 4, 64) for name in [*linears, f"model.{leaf}"]})
    dense, packed = read(tmp_path)
    assert list(packed) == linears and f"model.{leaf}.weight" in dense


@pytest.mark.parametrize(("scale", "bias", "zero"), [(0.0, 0.0, 4), (0.5, -1.0, 2), (-0.5, 3.5, 7), (-0.5, -1.0, -2.0), (0.25, -0.6, 2.4)])
def test_zeros_of_foreign_biases(scale: float, bias: float, zero: float) -> None:
    found = mlx.zeros_of(torch.tensor([[scale, 1.0]]), torch.tensor([[bias, -1.0]]), 3)
    assert found is not None
    assert found.dtype == (torch.uint8 if isinstance(zero, int) else torch.float32)
    assert found[0].tolist() == pytest.approx([zero, 1])


def damaged(folder: Path, change, config=None) -> None:
    write(folder, {"a": weight(8, 128, 3, 64, "integers")})
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    document = json.loads((folder / "config.json").read_text())
    document["quantization"] |= config or {}
    (folder / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("a.scales"), "scales missing"),
        (lambda t: t.pop("a.biases"), "biases missing"),
        (lambda t: t.pop("a.weight"), "weight missing"),
        (lambda t: [t.pop("a.scales"), t.pop("a.biases")], "scales and biases missing"),
        (lambda t: t.update({"a.weight": t["a.weight"].view(torch.int32)}), "int32, float16 and float16"),
        (lambda t: t.update({"a.biases": t["a.biases"].float()}), "uint32, float16 and float32"),
        (lambda t: t.update({"a.weight": t["a.weight"][None].contiguous()}), "two dimensions"),
        (lambda t: t.update({"a.weight": t["a.weight"][:, :11].contiguous()}), "do not fit 3 bits"),
        (lambda t: t.update({"a.weight": t["a.weight"][:7].contiguous()}), "do not fit 3 bits"),
        (lambda t: t.update({"a.scales": torch.ones(8, 4).half()}), "do not fit 3 bits"),
        (lambda t: t.update({"a.biases": torch.ones(8, 1).half()}), "do not fit 3 bits"),
        (lambda t: t["a.scales"].view(-1)[3].fill_(float("nan")), "not finite"),
        (lambda t: t["a.biases"].view(-1)[3].fill_(float("inf")), "not finite"),
        (lambda t: (t["a.scales"].view(-1)[3].fill_(0), t["a.biases"].view(-1)[3].fill_(1)), "no zero point can hold"),
    ],
)
def test_damaged_tensors_give_one_sentence(tmp_path: Path, change, words: str) -> None:
    damaged(tmp_path, change)
    with pytest.raises(ModelError, match=words):
        read(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"mode": "mxfp4"}, "mode 'mxfp4'"),
        ({"bits": 6}, "weights of 6 bits; compressor reads 2, 3, 4, 8"),
        ({"bits": "3"}, "are no numbers"),
        ({"group_size": None}, "are no numbers"),
        ({"group_size": 16}, "no groups of 16"),
        ({"group_size": 32}, "do not fit 3 bits and groups of 32"),
        ({"a": {"bits": 4, "group_size": 64}}, "do not fit 4 bits"),
        ({"a": {}}, "are no numbers"),
        ({"a": False}, "says that it is not quantised"),
        ({"b": {"bits": 3, "group_size": 64}}, "lacks the packed weight of b"),
        ({"b": True}, "lacks the packed weight of b"),
    ],
)
def test_damaged_configurations_give_one_sentence(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    damaged(tmp_path, lambda tensors: None, config)
    with pytest.raises(ModelError, match=words):
        read(tmp_path)
