"""AWQ folders: every cell reads back bit for bit, the bytes follow the interleaved order, other layouts and damage give one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compressor.errors import ModelError
from compressor.export import awq
from compressor.packed import Affine, PackedWeight, Table


def weight(n: int = 64, k: int = 96, group: int = 32, symmetric: bool = False, bits: int = 4, seed: int = 0) -> PackedWeight:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=random)
    zero = None if symmetric else torch.randint(0, 1 << bits, (n, k // group), dtype=torch.uint8, generator=random)
    return PackedWeight.pack(codes, Affine((torch.rand(n, k // group, generator=random) + 0.1).half(), zero), bits)


def write(folder: Path, weights: dict[str, PackedWeight], ignore: list[str] | None = None) -> None:
    stream: list[tuple[str, torch.Tensor | PackedWeight]] = [("norm.weight", torch.ones(3)), ("a.bias", torch.ones(64))]
    awq.write(folder, {"model_type": "x", "dtype": "float16"}, iter([*stream, *weights.items()]), ignore or [])


def read(folder: Path, **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, PackedWeight]]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
    return awq.read(folder, sorted(folder.glob("*.safetensors")), config)


@settings(max_examples=30, deadline=None)
@given(symmetric=st.booleans(), group=st.sampled_from([16, 32, 96]), rows=st.sampled_from([8, 64, 72]), seed=st.integers(0, 1 << 30))
def test_every_cell_reads_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, symmetric: bool, group: int, rows: int, seed: int) -> None:
    before, folder = weight(rows, 96, group, symmetric, seed=seed), tmp_path_factory.mktemp("awq")
    assert awq.fits({"a": before}) is None and awq.held(before) is before
    write(folder, {"a": before})
    dense, packed = read(folder)
    mine, again = before.tensors(), packed["a"].tensors()
    assert mine.keys() == again.keys() and all(torch.equal(mine[key], again[key]) and mine[key].dtype == again[key].dtype for key in mine)
    assert packed["a"].group == group and set(dense) == {"norm.weight", "a.bias"}


def test_the_bytes_of_one_layer() -> None:
    """Nibbles 0 to 7 of a word are neighbours 0, 2, 4, 6, 1, 3, 5, 7 along the outputs, of codes and of zeros as they are."""
    packed = weight(16, 32)
    tensors, zero = awq.tensors_of("a", packed), packed.zero
    assert zero is not None
    for words, numbers in ((tensors["a.qweight"], packed.codes().T), (tensors["a.qzeros"], zero.T)):
        for row in range(len(numbers)):
            for word in range(2):
                nibbles = [(int(words[row, word]) >> (4 * i)) & 15 for i in range(8)]
                assert nibbles == [int(numbers[row, 8 * word + i]) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert bool((awq.tensors_of("a", weight(symmetric=True))["a.qzeros"] == -(1 << 31) + 0x08888888).all())


def test_config_and_what_stays_dense(tmp_path: Path) -> None:
    write(tmp_path, {"a": weight(group=96), "b": weight(k=64, group=64)}, ["lm_head", "c"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert config["quantization_config"] == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": -1, "zero_point": True, "modules_to_not_convert": ["c", "lm_head"],
    }  # fmt: skip
    write(tmp_path, {"a": weight(group=32), "b": weight(k=32, group=32)})
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["quantization_config"]["group_size"], config["quantization_config"]["modules_to_not_convert"]) == (32, None)


def test_reasons_that_a_model_does_not_fit() -> None:
    table = PackedWeight.pack(torch.zeros(32, 32, dtype=torch.uint8), Table(torch.zeros(32, 1, 16)), 4, 32)
    tuned = PackedWeight.pack(torch.zeros(32, 32, dtype=torch.uint8), Affine(torch.ones(32, 1), torch.zeros(32, 1)), 4)
    ordered = PackedWeight.pack(torch.zeros(32, 32, dtype=torch.uint8), Affine(torch.ones(32, 2).half()), 4, 16, torch.arange(31, -1, -1))
    for packed, words in (
        ({}, "no layer"), ({"a": table}, "tables"), ({"a": tuned}, "tuned zeros"), ({"a": weight(bits=3)}, "a has 3 bits"),
        ({"a": ordered}, "act-order"), ({"a": weight(60)}, "60 outputs"), ({"a": weight(), "b": weight(group=16)}, "groups of 16, 32 columns"),
        ({"a": weight().with_learned(torch.full((64, 3), 1e6))}, "beyond the range"), ({"a": weight(group=48)}, "a has groups of 48 columns"),
        ({"a": weight(k=512, group=256)}, "groups of 256 columns"), ({"a": weight().with_learned(torch.full((64, 3), float("nan")))}, "not finite"),
    ):  # fmt: skip
        why = awq.fits(packed)
        assert why is not None and words in why


def test_scales_are_rounded_to_float16() -> None:
    before = weight().with_learned(torch.rand(64, 3) + 0.1)
    assert awq.held(before).learned.dtype == torch.float16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "gemv"}, "layout gemv"), ({"version": "gemv_fast"}, "layout gemv_fast"), ({"version": "marlin"}, "layout marlin"),
        ({"version": "exllama"}, "layout exllama"), ({"backend": "llm-awq"}, "layout llm-awq"), ({"bits": 3}, "of 3 bits"),
    ],
)  # fmt: skip
def test_other_layouts_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write(tmp_path, {"a": weight()})
    with pytest.raises(ModelError, match=words):
        read(tmp_path, **changes)
    assert read(tmp_path, version="GEMM")[1]


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("qweight", torch.zeros(96, 8), "qweight is float32"), ("qweight", torch.zeros(95, 8, dtype=torch.int32), "do not fit each other"),
        ("qweight", torch.zeros(12, 64, dtype=torch.int32), "do not fit"), ("qzeros", torch.zeros(3, 9, dtype=torch.int32), "do not fit"),
        ("qzeros", torch.zeros(3, dtype=torch.int32), "two dimensions"), ("scales", torch.zeros(64, 3).half(), "do not fit"),
        ("scales", torch.full((3, 64), float("nan")).half(), "not finite"), ("qzeros", None, "qzeros missing"), ("scales", None, "scales missing"),
    ],
)  # fmt: skip
def test_damage_is_one_sentence(tmp_path: Path, part: str, value: torch.Tensor | None, words: str) -> None:
    write(tmp_path, {"a": weight()})
    tensors = {key: tensor for key, tensor in load_file(tmp_path / "model.safetensors").items() if key != f"a.{part}"}
    save_file(tensors | ({} if value is None else {f"a.{part}": value}), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=words) as error:
        read(tmp_path)
    assert "\n" not in str(error.value) and ": a " in str(error.value)
