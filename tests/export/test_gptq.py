"""GPTQ folders: every cell reads back bit for bit, both versions and the wrong labels are told apart, damaged and foreign files give one sentence."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compressor.errors import ModelError
from compressor.export import foreign, gptq
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight, Table

BITS = (2, 3, 4, 8)


def weight(n: int = 64, k: int = 96, bits: int = 4, group: int = 32, symmetric: bool = False, ordered: bool = False, seed: int = 0) -> PackedWeight:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=random)
    zero = None if symmetric else torch.randint(0, 1 << bits, (n, k // group), dtype=torch.uint8, generator=random)
    scale = (torch.rand(n, k // group, generator=random) + 0.1).half()
    columns = torch.randperm(k, generator=random) if ordered else None
    return PackedWeight.pack(codes, Affine(scale, zero), bits, group, columns)


def grid(n: int, k: int, bits: int, group: int) -> PackedWeight:
    """A weight as quantisers make them: normal numbers, rounded to the nearest."""
    torch.manual_seed(0)
    dense = (torch.randn(n, k) * 0.02).view(n, k // group, group)
    low, high = dense.amin(-1), dense.amax(-1)
    scale = ((high - low) / ((1 << bits) - 1)).half()
    zero = (-low / scale.float()).round()
    codes = (dense / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)
    return PackedWeight.pack(codes.clamp(0, (1 << bits) - 1).to(torch.uint8).view(n, k), Affine(scale, zero.to(torch.uint8)), bits)


def write(folder: Path, weights: dict[str, PackedWeight], form: gptq.Gptq = gptq.V1, ignore: list[str] | None = None, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    stream: list[tuple[str, torch.Tensor | PackedWeight]] = [("norm.weight", torch.arange(12.0).view(3, 4)), ("a.bias", torch.ones(64))]
    form.write(folder, {"model_type": "x", **config}, iter([*stream, *weights.items()]), ignore or ["lm_head"])


def read(folder: Path, **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, PackedWeight]]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
    return gptq.read(folder, sorted(folder.glob("*.safetensors")), {key: value for key, value in config.items() if value is not ...})


def foreign_maker(folder: Path, form: gptq.Gptq, weights: dict[str, PackedWeight], maker: str = "auto-gptq:0.7.1", **changes: Any) -> dict[str, Any]:
    """A folder of `form` that says it is of another program; its quantization_config with `changes`."""
    write(folder, weights, form)
    return {"meta": {"quantizer": [maker]}} | changes


def assert_same(one: PackedWeight, two: PackedWeight) -> None:
    mine, other = one.tensors(), two.tensors()
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, other[key]) and tensor.dtype == other[key].dtype, key
    assert (one.bits, one.group, one.shape) == (two.bits, two.group, two.shape)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS), symmetric=st.booleans(), group=st.sampled_from([16, 32, 96]), second=st.booleans(), ordered=st.booleans(),
    rows=st.sampled_from([32, 64, 96]), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_every_cell_reads_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, bits: int, symmetric: bool, group: int, second: bool, ordered: bool, rows: int, seed: int
) -> None:
    form = gptq.V2 if second else gptq.V1
    before = weight(rows, 96, bits, group, symmetric, ordered, seed)
    assert form.fits({"a": before}) is None
    held = form.held(before)
    assert torch.equal(held.dequantize(), before.dequantize())
    folder = tmp_path_factory.mktemp("gptq")
    write(folder, {"a": held}, form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense, packed = read(folder)
    assert_same(packed["a"], held)
    assert set(dense) == {"norm.weight", "a.bias"}


@pytest.mark.parametrize("bits", BITS)
def test_v1_is_right_in_readers_that_only_add_one(bits: int) -> None:
    """Also at the ends: no stored field is 2**bits - 1, so adding one to whole words carries nowhere."""
    top = (1 << bits) - 1
    codes = torch.randint(0, top, (32, 96), dtype=torch.uint8)
    codes[:, 40] = top  # the second group has no room above
    zero = torch.tensor([[0, 0, top]], dtype=torch.uint8).expand(32, 3).contiguous()
    before = PackedWeight.pack(codes, Affine(torch.full((32, 3), 0.5).half(), zero), bits)
    held = gptq.V1.held(before)
    assert torch.equal(held.dequantize(), before.dequantize())
    assert held.zero is not None
    assert held.zero[0].tolist() == [1, top, top] and held.learned[0].tolist() == [0.5, -0.5, 0.5]
    stored = gptq.V1.tensors_of("a", held)["a.qzeros"]
    ones = sum(1 << shift for shift in range(0, 32, bits)) if bits != 3 else None
    if ones:
        raised = layout.unpack_stream(stored.to(torch.int64) + ones, bits, 32)
        assert torch.equal(raised.T, held.zero)
    fields = layout.unpack_stream(stored, bits, 32)
    assert int(fields.max()) < top and torch.equal(fields.T + 1, held.zero)
    assert gptq.V2.held(before) is before
    assert torch.equal(layout.unpack_stream(gptq.V2.tensors_of("a", before)["a.qzeros"], bits, 32).T, zero)


def test_the_bytes_of_one_small_layer() -> None:
    """Against the format's rule itself: field i of a word at bit i*bits, down k for codes, along n for zeros; at 3 bits the stream."""
    packed = weight(32, 32, 3, 16, ordered=True)
    tensors = gptq.V2.tensors_of("a", packed)
    codes, zero = packed.in_order(packed.codes()), packed.zero
    assert zero is not None and packed.columns is not None
    for tensor, numbers in ((tensors["a.qweight"][:, 5], codes[5]), (tensors["a.qzeros"][1], zero[:, 1])):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(tensor))
        assert [(stream >> (3 * i)) & 7 for i in range(32)] == numbers.tolist()
    assert torch.equal(tensors["a.g_idx"][packed.columns], (torch.arange(32) // 16).to(torch.int32))


def test_scales_are_rounded_to_float16_and_what_it_cannot_hold_is_a_reason() -> None:
    before = weight()
    odd = before.with_learned(torch.rand(64, 3) + 0.1)
    held = gptq.V1.held(odd)
    assert held.learned.dtype == torch.float16 and not torch.equal(held.dequantize(), odd.dequantize())
    assert gptq.V2.held(gptq.V2.held(before)) is gptq.V2.held(before)
    for value, words in ((1e6, "beyond the range"), (1e-12, "makes them 0"), (float("nan"), "not finite")):
        why = gptq.V1.fits({"b": before, "a": before.with_learned(torch.full((64, 3), value))})
        assert why is not None and words in why and "a" in why


def test_reasons_that_a_model_does_not_fit() -> None:
    table = PackedWeight.pack(torch.zeros(32, 32, dtype=torch.uint8), Table(torch.zeros(32, 1, 16)), 4, 32)
    tuned = PackedWeight.pack(torch.zeros(32, 32, dtype=torch.uint8), Affine(torch.ones(32, 1), torch.zeros(32, 1)), 4)
    for packed, words in (
        ({}, "no layer"), ({"a": table}, "tables"), ({"a": tuned}, "tuned zeros"), ({"a": weight(60, 96, 4)}, "60 outputs"),
        ({"b": weight(), "a": weight(48, 96, 3)}, "a has 48 outputs"), ({"a": weight(64, 24, 2, 24)}, "24 inputs"),
        ({"b": weight(), "a": weight(group=48)}, "a has groups of 48 columns"), ({"a": weight(64, 4096, group=2048)}, "groups of 2048"),
    ):  # fmt: skip
        why = gptq.V1.fits(packed)
        assert why is not None and words in why
    with pytest.raises(ModelError, match="neither tables nor tuned zeros"):
        gptq.V1.tensors_of("a", tuned)
    assert gptq.V1.fits({"a": weight(8, 48, group=48), "b": weight(40, 1024, group=512)}) is None  # whole rows, and no multiples of 32


def test_no_layers_tell_no_version() -> None:
    assert gptq.evident([], {}) is None and gptq.evident([], {"sym": True}) is None


@pytest.mark.parametrize(("k", "groups", "ordered"), [(160, 3, True), (160, 3, False), (96, 2, True), (96, 2, False)])
@pytest.mark.parametrize("where", [{"group_size": 64}, {"group_size": 128, "dynamic": {"+:a": {"group_size": 64}}}])
def test_a_shorter_last_group_is_not_supported(tmp_path: Path, k: int, groups: int, ordered: bool, where: dict[str, Any]) -> None:
    write(tmp_path, {"a": gptq.V1.held(weight(64, k))})
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {
        "a.scales": torch.ones(groups, 64).half(),
        "a.qzeros": torch.zeros(groups, 8, dtype=torch.int32),
        "a.g_idx": (torch.arange(k) // 64).int(),
    }
    save_file({key: tensor for key, tensor in tensors.items() if ordered or key != "a.g_idx"}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"{k} inputs in groups of 64, the last of them shorter, which compressor does not support"):
        read(tmp_path, **where)


def test_columns_in_any_order_inside_a_group_become_one_order() -> None:
    packed = weight(ordered=True)
    held = gptq.V2.held(packed)
    assert torch.equal(held.dequantize(), packed.dequantize()) and torch.equal(held.g_idx(), packed.g_idx())
    assert held.columns is not None and packed.columns is not None and not torch.equal(held.columns, packed.columns)
    inside = PackedWeight.pack(packed.codes(), packed.values, 4, 32, torch.cat([torch.randperm(32) + start for start in (0, 32, 64)]))
    assert gptq.V2.held(inside).columns is None


def test_config_of_one_scheme_and_of_several(tmp_path: Path) -> None:
    one = {f"m.layers.{i}.mlp.{leaf}": weight(symmetric=True, group=96) for i in range(2) for leaf in ("up", "down")}
    write(tmp_path / "one", one, dtype="float16", rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0})
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    found = config["quantization_config"]
    assert (found["bits"], found["group_size"], found["sym"], found["desc_act"], found["checkpoint_format"]) == (4, -1, True, False, "gptq")
    assert "dynamic" not in found and "modules_in_block_to_quantize" not in found and "backend" not in found
    assert json.loads((tmp_path / "one" / "quantize_config.json").read_text()) == found
    assert (config["torch_dtype"], config["rope_theta"], config["rope_scaling"]) == ("float16", 5e5, {"rope_type": "llama3", "factor": 8.0})
    one = {name: weight(symmetric=True, group=96) for name in [*one, *(f"m.layers.{i}.mlp.other" for i in range(2))]}
    mixed = one | {"m.layers.0.mlp.up": weight(bits=8), "m.layers.1.mlp.up": weight(bits=8, ordered=True)}
    write(tmp_path / "mixed", mixed, gptq.V2, ["lm_head", "m.layers.0.mlp.gate", "m.layers.1.mlp.gate"])
    found = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    eight = {"bits": 8, "group_size": 32}
    assert found["dynamic"] == {
        r"-:^m\.layers\.0\.mlp\.gate$": {}, r"-:^m\.layers\.1\.mlp\.gate$": {},
        r"+:^m\.layers\.0\.mlp\.up$": eight, r"+:^m\.layers\.1\.mlp\.up$": eight,
    }  # fmt: skip
    assert found["modules_in_block_to_quantize"] == [["mlp.down", "mlp.other", "mlp.up"]]
    assert (found["sym"], found["desc_act"], found["checkpoint_format"]) == (False, True, "gptq_v2")
    assert {name: packed.bits for name, packed in read(tmp_path / "mixed")[1].items()} == {name: packed.bits for name, packed in mixed.items()}
    assert gptq.same(found) is gptq.V2 and gptq.same({}) is gptq.V1


def test_a_row_as_long_as_the_groups_of_others_is_no_other_scheme(tmp_path: Path) -> None:
    write(tmp_path, {"a": weight(group=32), "b": weight(k=32, group=32)})
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert found["group_size"] == 32 and "dynamic" not in found
    assert [packed.group for packed in read(tmp_path)[1].values()] == [32, 32]


def test_blocks_that_differ_have_no_common_list(tmp_path: Path) -> None:
    write(tmp_path, {"m.layers.0.up": weight(), "m.layers.0.down": weight(), "m.layers.1.up": weight()}, ignore=["m.layers.1.down"])
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert found["dynamic"] == {r"-:^m\.layers\.1\.down$": {}} and "modules_in_block_to_quantize" not in found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("label", ["gptq", ...])
def test_symmetric_v2_values_under_a_v1_label_and_the_reverse(tmp_path: Path, bits: int, label: Any) -> None:
    packed = {"a": weight(bits=bits, symmetric=True), "b": weight(bits=bits, symmetric=True, seed=1)}
    changes = foreign_maker(tmp_path, gptq.V2, packed, checkpoint_format=label, sym=True if label == "gptq" else ...)
    with pytest.warns(UserWarning, match="labelled gptq, but its zeros are stored as gptq_v2"):
        again = read(tmp_path, **changes)[1]
    assert_same(again["a"], packed["a"])
    changes = foreign_maker(tmp_path, gptq.V1, packed, checkpoint_format="gptq_v2")
    with pytest.warns(UserWarning, match="labelled gptq_v2, but its zeros are stored as gptq stores"):
        again = read(tmp_path, **changes)[1]
    assert_same(again["b"], packed["b"])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_asymmetric_values_under_the_wrong_label(tmp_path: Path, bits: int) -> None:
    packed = {name: gptq.V1.held(grid(256, 256, bits, 32)) for name in "ab"}
    for form, label in ((gptq.V2, "gptq"), (gptq.V1, "gptq_v2")):
        changes = foreign_maker(tmp_path, form, packed, checkpoint_format=label)
        with pytest.warns(UserWarning, match="are read so"):
            assert_same(read(tmp_path, **changes)[1]["a"], packed["a"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(read(tmp_path, **foreign_maker(tmp_path, form, packed))[1]["b"], packed["b"])


def test_weak_evidence_leaves_the_label(tmp_path: Path) -> None:
    """Few weights, 8 bits, zeros of any kind: the label counts, and no warning comes."""
    for packed in ({"a": grid(64, 96, 4, 32)}, {"a": grid(256, 256, 8, 32)}, {"a": weight(256, 256, 4, 32)}):
        changes = foreign_maker(tmp_path, gptq.V2, packed, checkpoint_format="gptq")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = read(tmp_path, **changes)[1]["a"]
        before = packed["a"].zero
        assert before is not None and again.zero is not None
        assert torch.equal(again.zero.int(), (before.int() + 1) % (1 << again.bits))


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_of_0_that_others_wrote(tmp_path: Path, bits: int) -> None:
    """auto-gptq masks every field; GPTQModel subtracts from whole words, so that a zero of 0 borrows from its neighbour."""
    packed = weight(64, 96, bits, 32)
    assert packed.zero is not None
    zero = packed.zero.clone()
    zero[::7] = 0
    packed = PackedWeight.pack(packed.codes(), Affine(packed.learned, zero), bits)
    changes = foreign_maker(tmp_path, gptq.V1, {"a": packed})
    assert_same(read(tmp_path, **changes)[1]["a"], packed)
    tensors = load_file(tmp_path / "model.safetensors")
    if bits != 3:
        words = gptq.V2.tensors_of("a", packed)["a.qzeros"].to(torch.int64) - sum(1 << shift for shift in range(0, 32, bits))
        tensors["a.qzeros"] = ((words + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)
        save_file(tensors, tmp_path / "model.safetensors")
    for meta in (["gptqmodel:7.6.0"], "gptqmodel:0.9.9-dev0"):
        assert_same(read(tmp_path, meta={"quantizer": meta})[1]["a"], packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path, {"a": gptq.V1.held(weight())})
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["a.scales"] = tensors["a.scales"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    assert read(tmp_path)[1]["a"].learned.dtype == dtype


def test_g_idx_absent_empty_or_all_zeros_means_in_order(tmp_path: Path) -> None:
    held = gptq.V1.held(weight())
    write(tmp_path, {"a": held})
    whole = load_file(tmp_path / "model.safetensors")
    for index in (None, torch.zeros(0, dtype=torch.int32), torch.zeros(96, dtype=torch.int32)):
        tensors = {key: tensor for key, tensor in whole.items() if key != "a.g_idx"} | ({} if index is None else {"a.g_idx": index})
        save_file(tensors, tmp_path / "model.safetensors")
        assert_same(read(tmp_path)[1]["a"], held)


def test_efficientqat_folders(tmp_path: Path) -> None:
    """No quantization_config, true zeros, at 3 bits ten codes a word; auto-gptq's own have theirs in quantize_config.json."""
    for bits in (2, 3, 4):
        packed = weight(64, 96, bits, 32)
        tensors = gptq.V2.tensors_of("a", packed)
        if bits == 3:
            pad = lambda codes: foreign.pack_fields(torch.nn.functional.pad(codes, (0, -codes.shape[1] % 10)), 3)
            assert packed.zero is not None
            tensors |= {"a.qweight": pad(packed.codes()).T.contiguous(), "a.qzeros": pad(packed.zero.T.contiguous())}
        save_file(tensors, tmp_path / "model.safetensors")
        files = [tmp_path / "model.safetensors"]
        config = gptq.unlabelled(tmp_path, files)
        assert config is not None
        assert_same(gptq.read(tmp_path, files, config)[1]["a"], packed)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "sym": false}')
    assert gptq.unlabelled(tmp_path, files) == {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    for text, words in (("{", "damaged"), ("[]", "no mapping")):
        (tmp_path / "quantize_config.json").write_text(text)
        with pytest.raises(ModelError, match=words):
            gptq.unlabelled(tmp_path, files)
    save_file({"a.weight": torch.ones(2)}, files[0])
    assert gptq.unlabelled(tmp_path, files) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint_format": "gptq_p"}, "in the form gptq_p, which is not read"), ({"checkpoint_format": "bitblas"}, "form bitblas"),
        ({"is_marlin_format": True}, "form marlin"), ({"pack_dtype": "int16"}, "int16 words"), ({"bits": 5}, "weights of 5 bits"),
        ({"bits": [4]}, "of .4. bits"), ({"bits": "4"}, "of 4 bits"), ({"bits": 4.0}, "of 4.0 bits"),
        ({"dynamic": {"a": {"bits": 6}}}, "6"), ({"bits": 8}, "no words of 8 bits"),
    ],
)  # fmt: skip
def test_other_forms_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write(tmp_path, {"a": gptq.V1.held(weight())})
    with pytest.raises(ModelError, match=words):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("qweight", torch.zeros(12, 64), "qweight is float32"), ("qweight", torch.zeros(12, dtype=torch.int32), "two dimensions"),
        ("qweight", torch.zeros(11, 64, dtype=torch.int32), "no words of 4 bits"), ("qweight", torch.zeros(12, 8, dtype=torch.int32), "no words"),
        ("qzeros", torch.zeros(3, 64).half(), "qzeros is float16"), ("qzeros", torch.zeros(2, 8, dtype=torch.int32), "do not fit"),
        ("qzeros", torch.zeros(3, 9, dtype=torch.int32), "no words of 4 bits"), ("scales", torch.zeros(3, 64, dtype=torch.int32), "must be floats"),
        ("scales", torch.full((3, 64), float("inf")).half(), "not finite"), ("scales", torch.ones(3, 60).half(), "no words"),
        ("scales", torch.ones(0, 64).half(), "must be floats"), ("g_idx", torch.zeros(96), "g_idx is float32"),
        ("g_idx", torch.arange(96).int(), "from 0 to 2"),
        ("g_idx", torch.full((96,), -1).int(), "from 0 to 2"), ("g_idx", torch.arange(96).int() // 96 + 1, "its g_idx is an index that"),
        ("g_idx", torch.full((96,), (1 << 31) - 1).int(), "from 0 to 2"), ("g_idx", torch.zeros(95).int(), "no words"),
        ("qzeros", None, "qzeros missing"),
        ("qweight", None, "qweight missing"), ("scales", None, "scales missing"),
    ],
)  # fmt: skip
def test_damage_is_one_sentence(tmp_path: Path, part: str, value: torch.Tensor | None, words: str) -> None:
    write(tmp_path, {"a": gptq.V1.held(weight())})
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"a.{part}": value} if value is not None else {}
    if value is None:
        del tensors[f"a.{part}"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=words) as error:
        read(tmp_path)
    assert "\n" not in str(error.value) and "a" in str(error.value)
