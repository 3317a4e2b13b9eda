"""HQQ folders: every cell reads back bit for bit, the library and we write the same bytes, other forms and damage give one sentence."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compressor.errors import ModelError
from compressor.export import hqq
from compressor.packed import Affine, PackedWeight, Table

BITS = (2, 3, 4, 8)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def weight(
    n: int = 32, k: int = 96, bits: int = 4, group: int = 32, zeros: str = "floats", dtype: torch.dtype = torch.float16, seed: int = 0
) -> PackedWeight:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=random)
    integers = torch.randint(0, 1 << bits, (n, k // group), dtype=torch.uint8, generator=random)
    floats = (torch.randn(n, k // group, generator=random) * 3 + (1 << (bits - 1)) + 0.1).to(dtype)
    floats[0, 0] = 0.5  # in bfloat16 at 8 bits the others are whole, and whole ones throughout become integers
    zero = {"floats": floats, "integers": integers, "none": None}[zeros]
    return PackedWeight.pack(codes, Affine((torch.rand(n, k // group, generator=random) + 0.1).to(dtype), zero), bits)


def write(folder: Path, weights: dict[str, PackedWeight]) -> None:
    stream: list[tuple[str, torch.Tensor | PackedWeight]] = [("norm.scale", torch.ones(3)), ("a.bias", torch.ones(32))]
    hqq.write(folder, {"model_type": "x"}, iter([*stream, *weights.items()]), ["lm_head", "model.layers.1.a"])


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, PackedWeight]]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return hqq.read(folder, sorted(folder.glob("*.safetensors")), config)


def assert_same(one: PackedWeight, two: PackedWeight) -> None:
    mine, other = one.tensors(), two.tensors()
    assert mine.keys() == other.keys() and (one.bits, one.group, one.shape) == (two.bits, two.group, two.shape)
    for key, tensor in mine.items():
        assert torch.equal(tensor, other[key]) and tensor.dtype == other[key].dtype, key


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS), group=st.sampled_from([16, 32, 96]), zeros=st.sampled_from(["floats", "integers", "none"]),
    dtype=st.sampled_from(DTYPES), rows=st.sampled_from([4, 32, 36]), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_every_cell_reads_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, bits: int, group: int, zeros: str, dtype: torch.dtype, rows: int, seed: int
) -> None:
    before, folder = weight(rows, 96, bits, group, zeros, dtype, seed), tmp_path_factory.mktemp("hqq")
    assert hqq.fits({"a": before}) is None
    assert_same(hqq.held(before), before)
    write(folder, {"a": before})
    dense, packed = read(folder)
    assert_same(packed["a"], before)
    assert set(dense) == {"norm.scale", "a.bias"}


@pytest.mark.parametrize("bits", BITS)
def test_the_bytes_of_one_layer(bits: int) -> None:
    """Row r of part p (of equal parts of rows, the first highest) lies in word r."""
    packed = weight(8, 32, bits, 16)
    tensors, codes = hqq.tensors_of("a", packed), packed.codes().view(16, 16)
    name, parts = hqq.PACKINGS[bits]
    words = tensors["a.W_q"]
    assert bytes(tensors["a.packing"].tolist()).decode() == name and len(words) == -(-16 // parts)
    for row in range(16):
        part, word = divmod(row, len(words))
        fields = [(int(value) >> (bits * (parts - 1 - part))) & ((1 << bits) - 1) for value in words[word]]
        assert fields == codes[row].tolist()
    assert tensors["a.scale"].shape == tensors["a.zero"].shape == (16, 1) and tensors["a.shape"].tolist() == [8, 32]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("as_float", [False, True])
def test_the_library_writes_the_same_and_reads_ours(tmp_path: Path, bits: int, as_float: bool) -> None:
    core = pytest.importorskip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=bits, group_size=32, axis=1, view_as_float=as_float)
    theirs = core.HQQLinear(torch.nn.Linear(96, 32), config, compute_dtype=torch.float32, device="cpu")
    save_file({f"a.{key}": tensor.contiguous() for key, tensor in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    dense, packed = hqq.read(tmp_path, [tmp_path / "model.safetensors"], {})
    assert set(dense) == {"a.bias"} and torch.equal(packed["a"].dequantize(), theirs.dequantize())
    again = core.HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
    again.load_state_dict({key.removeprefix("a."): tensor for key, tensor in hqq.tensors_of("a", packed["a"]).items()})
    assert torch.equal(again.dequantize(), theirs.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3])
def test_bytes_that_are_stored_as_floats(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    before = weight(bits=bits, dtype=dtype)
    write(tmp_path, {"a": before})
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"a.W_q": tensors["a.W_q"].view(dtype), "a.view_as_float": torch.tensor(1, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(read(tmp_path)[1]["a"], before)


def test_zeros_follow_the_dtype_of_scales_and_become_integers_where_they_are_some() -> None:
    scale = torch.ones(2, 2, dtype=torch.bfloat16)
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    make = lambda zero: hqq.held(PackedWeight.pack(codes, Affine(scale, zero), 4)).zero
    rounded = make(torch.full((2, 2), 7.003))
    assert rounded is not None and rounded.dtype == torch.uint8 and bool((rounded == 7).all())
    assert make(torch.full((2, 2), 8.0)) is None
    for value in (7.5, -1.0, 16.0):
        kept = make(torch.full((2, 2), value))
        assert kept is not None and kept.dtype == torch.bfloat16 and float(kept[0, 0]) == value


def test_config_names_schemes_by_what_blocks_share(tmp_path: Path) -> None:
    write(tmp_path, {f"model.layers.{i}.mlp.up": weight(bits=3) for i in range(2)})
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert found["quant_method"] == "hqq" and found["skip_modules"] == ["a", "lm_head"] and list(found["quant_config"]) == ["mlp.up"]
    assert found["quant_config"]["mlp.up"]["weight_quant_params"]["nbits"] == 3


def test_reasons_that_a_model_does_not_fit() -> None:
    table = PackedWeight.pack(torch.zeros(32, 32, dtype=torch.uint8), Table(torch.zeros(32, 1, 16)), 4, 32)
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    ordered = PackedWeight.pack(codes, Affine(torch.ones(32, 2).half()), 4, 16, torch.arange(31, -1, -1))
    far = PackedWeight.pack(codes, Affine(torch.ones(32, 2).half(), torch.full((32, 2), 1e6)), 4)
    endless = PackedWeight.pack(codes, Affine(torch.ones(32, 2).half(), torch.full((32, 2), float("nan"))), 4)
    for packed, words in (
        ({"a": weight().with_learned(torch.full((32, 3), float("nan")))}, "scales of a are not finite"),
        ({"a": endless}, "zeros of a are not finite"),
        ({}, "no layer"), ({"a": table}, "a holds tables"), ({"a": ordered}, "act-order"), ({"a": far}, "zeros of a are beyond"),
        ({"a": weight(3, 96, 4)}, "a has 9 groups"), ({"layers.0.a": weight(), "layers.1.a": weight(bits=3)}, "layers.1.a has another"),
    ):  # fmt: skip
        why = hqq.fits(packed)
        assert why is not None and words in why


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("axis", torch.tensor(0), "axis 0"), ("nbits", torch.tensor(1), "1 bits"), ("nbits", torch.tensor(3), "3 bits packed as '4bit_u8'"),
        ("nbits", torch.tensor(3.5), "one whole number"), ("nbits", torch.tensor(float("nan")), "one whole number"),
        ("nbits", torch.tensor([4, 4]), "one whole number"), ("packing", torch.zeros(3), "packed as 'float32"),
        ("shape", torch.tensor([32, 96, 1]), "two positive"), ("shape", torch.tensor([32, -96]), "two positive"),
        ("shape", torch.tensor([96, 64]), "W_q is uint8"), ("shape", torch.tensor([64, 48]), "run across rows"),
        ("shape", torch.tensor([31, 31]), "do not fit"), ("quant_scale", torch.tensor(1), "quantised themselves"),
        ("W_q", torch.zeros(48, 31, dtype=torch.uint8), "no packing of 96 groups"), ("W_q", torch.zeros(48, 32, dtype=torch.int64), "W_q is int64"),
        ("scale", torch.ones(32, 3).half(), "do not fit"), ("scale", torch.full((96, 1), float("nan")), "not finite"),
        ("zero", torch.full((96, 1), float("inf")), "not finite"),
        ("zero", None, "zero missing"), ("packing", None, "packing missing"), ("W_q", None, "holds no W_q"),
    ],
)  # fmt: skip
def test_other_forms_and_damage_are_one_sentence(tmp_path: Path, part: str, value: torch.Tensor | None, words: str) -> None:
    write(tmp_path, {"a": weight()})
    tensors = {key: tensor for key, tensor in load_file(tmp_path / "model.safetensors").items() if key != f"a.{part}"}
    save_file(tensors | ({} if value is None else {f"a.{part}": value}), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=words) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
