"""Which format a folder is in, wherever its config says so, which one a tuned model goes back to, and what that makes of its weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compressor.errors import CompressorError, ModelError
from compressor.export import awq, compressed_tensors, conversions, gptq, hqq, mlx, sparse, table
from compressor.packed import Affine, PackedWeight
from compressor.pipelines import formats

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def weight(
    bits: int = 4, zeros: str = "integers", dtype: torch.dtype = torch.float16, seed: int = 0, group: int = 32, n: int = 32, k: int = 64
) -> PackedWeight:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=random)
    scale = (torch.rand(n, k // group, generator=random) + 0.1).to(dtype)
    integers = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8, generator=random)
    floats = (torch.rand(scale.shape, generator=random) * (1 << bits)).to(dtype)
    return PackedWeight.pack(codes, Affine(scale, {"integers": integers, "floats": floats, "none": None}[zeros]), bits, group)


def ordered(made: PackedWeight) -> PackedWeight:
    return PackedWeight.pack(made.codes(), made.values, made.bits, made.group, torch.arange(made.shape[1]).flip(0).view(-1, 2).T.flatten())


def same_tensors(one: PackedWeight, other: PackedWeight) -> bool:
    mine, others = one.tensors(), other.tensors()
    return mine.keys() == others.keys() and all(torch.equal(t, others[key]) and t.dtype == others[key].dtype for key, t in mine.items())


def config(method: str | None, **more: Any) -> dict[str, Any]:
    return {} if method is None else {"quantization_config": {"quant_method": method} | more}


# --- described -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given_config", "found"), [
    ({"quantization_config": GPTQ}, GPTQ),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, {"quant_method": "compressed-tensors"}),
    ({"quantization": {"bits": 4, "group_size": 64}}, {"quant_method": "mlx", "bits": 4, "group_size": 64}),
    ({"quantization_config": {"bits": 4, "group_size": 64}}, {"quant_method": "mlx", "bits": 4, "group_size": 64}),
    ({"quantization_config": {}, "quantization": {"bits": 2, "group_size": 64}}, {"quant_method": "mlx", "bits": 2, "group_size": 64}),
    ({"quantization_config": None}, {}), ({}, {}), ({"quantization_config": {"bits": 4}}, {"bits": 4}),
    ({"quantization_config": GPTQ, "quantization": {"bits": 2, "group_size": 64}}, GPTQ),
])  # fmt: skip
def test_the_config_is_found_wherever_it_lies(tmp_path: Path, given_config: dict[str, Any], found: dict[str, Any]) -> None:
    before = json.dumps(given_config)
    assert formats.described(tmp_path, given_config) == found
    assert json.dumps(given_config) == before, "the config of the caller was changed"


@pytest.mark.parametrize("key", formats.KEYS)
@pytest.mark.parametrize("value", ["gptq", [GPTQ], 4])
def test_a_config_that_is_none(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelError, match="config.json is damaged: quantization_config is no mapping"):
        formats.described(tmp_path, {key: value})


def test_a_folder_without_a_word_is_known_by_its_tensors(tmp_path: Path) -> None:
    assert formats.described(tmp_path, {}) == {}
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert formats.described(tmp_path, {}) == {}
    save_file(gptq.V2.tensors_of("a", weight()), tmp_path / "model.safetensors")
    assert formats.described(tmp_path, {}) == {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "sym": False}
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "sym": true}')
    assert formats.described(tmp_path, {}) == {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    assert formats.described(tmp_path, {"quantization_config": {"quant_method": "awq"}}) == {"quant_method": "awq"}
    for text, words in (("{", "damaged"), ("[]", "no mapping")):
        (tmp_path / "quantize_config.json").write_text(text)
        with pytest.raises(ModelError, match=words):
            formats.described(tmp_path, {})


def test_what_is_no_file_of_weights_says_nothing_here(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert formats.described(tmp_path, {}) == {}
    (tmp_path / "other.safetensors").mkdir()
    assert formats.described(tmp_path, {}) == {}


# --- of, home, same ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given_config", "form"), [
    (config("gptq"), gptq.V1), (config("gptq", checkpoint_format="gptq"), gptq.V1), (config("gptq", checkpoint_format="gptq_v2"), gptq.V2),
    (config("gptq", format="GPTQ_V2"), gptq.V2), (config("awq"), awq), (config("hqq"), hqq), (config("mlx"), mlx),
    (config("compressed-tensors"), compressed_tensors), (config("compressor"), table), (config("compressor_sparse"), sparse),
])  # fmt: skip
def test_the_format_of_a_folder(given_config: dict[str, Any], form: Any) -> None:
    assert formats.of(given_config, "a folder") is form
    theirs = None if form in formats.NATIVE.values() else form
    assert formats.home(given_config, {"a": weight(zeros="none")}) is theirs
    assert formats.same(given_config, {"a": weight(zeros="none")}) is theirs


@pytest.mark.parametrize("given_config", [{}, config("bitsandbytes"), {"quantization_config": {"bits": 4}}, {"quantization_config": None}])
def test_of_no_format(given_config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="^here is quantised as (bitsandbytes|None); compressor reads folders of compressed-tensors and "):
        formats.of(given_config, "here")
    assert formats.home(given_config, {"a": weight()}) is None and formats.same(given_config, {"a": weight()}) is None


FITS: list[tuple[str, PackedWeight, bool, bool]] = [  # method, weight, whether there is a place for it, whether it is held exactly
    ("gptq", weight(), True, True), ("gptq", weight(8), True, True), ("gptq", ordered(weight()), True, True),
    ("gptq", weight(dtype=torch.float32), True, False), ("gptq", weight(zeros="floats"), False, False),
    ("gptq", conversions.as_tables(weight()), False, False), ("gptq", weight(3, n=40), False, False),
    ("awq", weight(), True, True), ("awq", weight(3), False, False), ("awq", ordered(weight()), False, False),
    ("awq", weight(dtype=torch.bfloat16), True, True), ("awq", weight(dtype=torch.float32), True, False),
    ("hqq", weight(8), True, True), ("hqq", weight(zeros="floats"), True, True), ("hqq", weight(zeros="floats", dtype=torch.bfloat16), True, True),
    ("hqq", conversions.as_tables(weight()), False, False), ("hqq", ordered(weight()), False, False),
    ("mlx", weight(zeros="none"), True, True), ("mlx", weight(), True, False), ("mlx", weight(zeros="floats"), True, False),
    ("mlx", weight(group=16), False, False), ("mlx", ordered(weight()), False, False), ("mlx", conversions.as_tables(weight()), False, False),
]  # fmt: skip


@pytest.mark.parametrize(("method", "made", "fits", "exact"), FITS)
def test_where_a_tuned_model_goes_back_to(method: str, made: PackedWeight, fits: bool, exact: bool) -> None:
    packed = {"a": made}
    form = formats.home(config(method), packed)
    assert (form is not None) == fits == (formats.of(config(method), "").fits(packed) is None)
    assert (formats.same(config(method), packed) is not None) == exact
    if form is not None:
        settled = formats.nearest(form, made)
        assert (settled is made) == exact
        assert formats.same(config(method), {"a": settled}) is form, "what a format makes of a weight is not what it holds"
        assert not bool((settled.learned < 0).any()), "a scale that cannot be tuned"
        assert torch.allclose(settled.dequantize(), made.dequantize(), rtol=0, atol=0.01)


def test_one_weight_that_does_not_fit_is_enough() -> None:
    packed = {"a": weight(zeros="none"), "b": weight(zeros="none", dtype=torch.float32)}
    assert formats.home(config("gptq"), packed) is gptq.V1 and formats.same(config("gptq"), packed) is None
    packed["b"] = weight(zeros="floats")
    assert formats.home(config("gptq"), packed) is None


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(["gptq", "awq", "hqq", "mlx"]), bits=st.sampled_from([2, 3, 4, 8]), zeros=st.sampled_from(["integers", "floats", "none"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), seed=st.integers(0, 1 << 30), version=st.sampled_from(["gptq", "gptq_v2"]),
)  # fmt: skip
def test_what_was_settled_reads_back_tensor_by_tensor(
    tmp_path_factory: pytest.TempPathFactory, method: str, bits: int, zeros: str, dtype: torch.dtype, seed: int, version: str
) -> None:
    """Once a weight is what a format makes of it, a folder holds it: the same numbers in memory and on disk, however often it is written."""
    made, folder, given_config = weight(bits, zeros, dtype, seed), tmp_path_factory.mktemp("f"), config(method, checkpoint_format=version)
    form: Any = formats.home(given_config, {"a": made})
    if form is None:
        assert method == "awq" and bits != 4 or zeros == "floats" and method in ("awq", "gptq")
        return
    settled = formats.nearest(form, made)
    assert formats.nearest(form, settled) is settled
    kept = formats.stored(form, {"a": settled})
    form.write(folder, {"model_type": "x"}, iter(kept.items()), [])
    found = formats.described(folder, json.loads((folder / "config.json").read_text()))
    again = formats.of({"quantization_config": found}, folder).read(folder, [folder / "model.safetensors"], found)[1]["a"]
    assert same_tensors(again, kept["a"]) and not bool((settled.learned < 0).any()) and torch.equal(again.dequantize(), settled.dequantize())
    assert torch.allclose(settled.dequantize(), made.dequantize(), rtol=0, atol=0.01 * float(made.dequantize().abs().max()))


# --- ours ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("made", "sparse_too", "form"), [
    (weight(), False, compressed_tensors), (weight(8), False, compressed_tensors), (weight(), True, sparse), (weight(zeros="floats"), False, sparse),
    (conversions.as_tables(weight()), False, table),
])  # fmt: skip
def test_the_one_of_ours_that_holds_a_model(made: PackedWeight, sparse_too: bool, form: Any) -> None:
    assert formats.pick({"a": made}, sparse_too) is form
    stored = formats.stored(form, {"a": made})
    assert stored["a"] is made


@pytest.mark.parametrize(("packed", "sparse_too", "words"), [
    ({"a": ordered(weight())}, False, ["compressed-tensors pack-quantized: ", "act-order", "compressor table: "]),
    ({"a": weight(8)}, True, ["compressor sparse: a has 8 bits"]), ({"a": conversions.as_tables(weight())}, True, ["compressor sparse: 1 of its 1"]),
    ({"a": weight(8, "floats")}, False, ["compressor sparse: a has 8 bits"]), ({}, False, ["no layer is packed"]),
    ({"a": weight(), "b": conversions.as_tables(weight())}, False, ["1 of its 2 packed layers hold tables"]),
])  # fmt: skip
def test_none_of_ours_and_why(packed: dict[str, PackedWeight], sparse_too: bool, words: list[str]) -> None:
    with pytest.raises(CompressorError) as error:
        formats.pick(packed, sparse_too)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_stored_is_what_a_format_writes() -> None:
    """Zeros of 0 in the terms of GPTQ's first version, scales in float16; the caller's weights stay."""
    zero = replace(weight(), values=Affine(weight().learned, torch.zeros(32, 2, dtype=torch.uint8)))
    held = formats.stored(gptq.V1, {"a": zero})["a"]
    assert bool((held.zero != 0).all()) if held.zero is not None else False
    assert torch.equal(held.dequantize(), zero.dequantize()) and not bool(zero.zero.any() if zero.zero is not None else True)
    assert formats.stored(gptq.V2, {"a": zero})["a"] is zero
    assert formats.stored(awq, {"a": weight(dtype=torch.float32)})["a"].learned.dtype == torch.float16
