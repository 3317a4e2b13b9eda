"""The native folder: our reader, the compressed-tensors library and transformers agree on every weight; damaged files give one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import ModelError
from compressor.export import compressed_tensors as ct
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight


def weight(n: int, k: int, bits: int, group: int, symmetric: bool) -> PackedWeight:
    torch.manual_seed(n + k + bits)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    zero = None if symmetric else torch.randint(0, 1 << bits, (n, k // group), dtype=torch.uint8)
    return PackedWeight.pack(codes, Affine((torch.rand(n, k // group) + 0.1).half(), zero), bits)


def write(folder: Path, weights: dict[str, PackedWeight], **options: int) -> None:
    folder.mkdir(exist_ok=True)
    dense = torch.arange(12.0).view(3, 4)
    ct.write(folder, {"model_type": "x"}, iter([("norm.weight", dense), *weights.items()]), ["lm_head"], **options)


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, PackedWeight]]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return ct.read(folder, sorted(folder.glob("*.safetensors")), config)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_trip_in_one_file_and_in_shards(tmp_path: Path, bits: int, symmetric: bool) -> None:
    weights = {f"layers.{i}.q_proj": weight(72, 352, bits, 32, symmetric) for i in range(3)}
    for name, options in (("one", {}), ("many", {"shard_bytes": 10_000})):
        write(tmp_path / name, weights, **options)
        dense, again = read(tmp_path / name)
        assert torch.equal(dense["norm.weight"], torch.arange(12.0).view(3, 4))
        assert list(again) == list(weights)
        for key, packed in weights.items():
            assert torch.equal(again[key].dequantize(), packed.dequantize())
            assert (again[key].bits, again[key].group, again[key].zero is None) == (bits, 32, symmetric)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in (tmp_path / "many").glob("*.safetensors")}
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_library_unpacks_the_same_weights(bits: int, symmetric: bool) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    packed = weight(64, 96, bits, 32, symmetric)
    tensors = ct.tensors_of("a", packed)
    codes = helpers.unpack_from_int32(tensors["a.weight_packed"], bits, torch.Size(packed.shape))
    assert torch.equal(codes.to(torch.int16) + (1 << (bits - 1)), packed.codes().to(torch.int16))
    if packed.zero is not None:
        zero = helpers.unpack_from_int32(tensors["a.weight_zero_point"], bits, torch.Size((64, 3)), packed_dim=0)
        assert torch.equal(zero.to(torch.int16) + (1 << (bits - 1)), packed.zero.to(torch.int16))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_act_order_of_older_writers_is_read_and_not_written(tmp_path: Path, bits: int) -> None:
    plain, columns = weight(64, 96, bits, 32, symmetric=True), torch.randperm(96).view(3, 32).sort(1).values.flatten()
    packed = PackedWeight.pack(plain.codes(), plain.values, bits, columns=columns)
    assert "act-order" in str(ct.fits({"a": packed}))
    write(tmp_path, {"a": PackedWeight.pack(packed.in_order(packed.codes()), plain.values, bits)})
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"a.weight_g_idx": packed.g_idx()}, tmp_path / "model.safetensors")
    again = read(tmp_path)[1]["a"]
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert again.columns is not None
    assert torch.equal(again.columns, columns)


def test_reads_the_padded_3_bit_stream_of_old_writers(tmp_path: Path) -> None:
    packed = weight(8, 128, 3, 32, symmetric=True)
    write(tmp_path, {"a": packed})
    tensors = load_file(tmp_path / "model.safetensors")
    codes = torch.nn.functional.pad(packed.codes().to(torch.int32), (0, 2)).view(8, 13, 10)
    tensors["a.weight_packed"] = (codes << torch.arange(0, 30, 3, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(read(tmp_path)[1]["a"].codes(), packed.codes())


def test_rows_of_one_group_are_no_scheme_of_their_own(tmp_path: Path) -> None:
    """Readers take one strategy; whole rows are one only where all are."""
    for name, widths, groups in (
        ("mixed", (128, 384), {("group", 128)}),
        ("rows", (128, 384), {("channel", None)}),
        ("same", (128, 128), {("channel", None)}),
    ):
        weights = {f"l.{k}.{i}": weight(8, k, 3, k if name == "rows" else 128, symmetric=True) for i, k in enumerate(widths)}
        write(tmp_path / name, weights)
        found = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["config_groups"].values()
        assert {(group["weights"]["strategy"], group["weights"]["group_size"]) for group in found} == groups


def test_mixed_schemes_name_their_modules() -> None:
    config = ct.quantization_config(ct.Schemes(list, {(3, 128, True): ["l.0.q", "l.0.k"], (4, 64, True): ["l.0.v", "l.1.q"]}), ["lm_head"])
    groups = config["config_groups"].values()
    targets = {t: g["weights"]["num_bits"] for g in groups for t in g["targets"]}
    assert targets == {r"re:.*\.k$": 3, r"re:^l\.0\.q$": 3, r"re:.*\.v$": 4, r"re:^l\.1\.q$": 4}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("a.weight_scale"), "incomplete"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([8, 127])}), "damaged"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([-8, 128])}), "damaged"),
        (lambda t: t.update({"a.weight_packed": torch.zeros(8, 99, dtype=torch.int32)}), "no stream of 3 bits"),
        (lambda t: t.update({"a.weight_g_idx": torch.zeros(128, dtype=torch.int32)}), "weight_g_idx is an index that"),
        (lambda t: t.update({"a.weight_g_idx": torch.full((128,), (1 << 31) - 1, dtype=torch.int32)}), "weight_g_idx is an index that"),
        (lambda t: t.update({"a.weight_g_idx": torch.full((128,), (1 << 62), dtype=torch.int64)}), "weight_g_idx is an index that"),
        (lambda t: t.update({"a.weight_g_idx": (torch.arange(64) // 16).int()}), r"weight_g_idx is int32 \(64,\)"),
        (lambda t: t.update({"a.weight_g_idx": (torch.arange(256) // 64).int()}), r"weight_g_idx is int32 \(256,\)"),
        (lambda t: t.update({"a.weight_g_idx": torch.full((128,), -1.0)}), "weight_g_idx is float32"),
        (lambda t: t.update({"a.weight_g_idx": torch.zeros(0, dtype=torch.int32)}), r"weight_g_idx is int32 \(0,\)"),
        (lambda t: t.update({"a.weight_zero_point": torch.zeros(3, 3, dtype=torch.int32)}), "zero points"),
        (lambda t: t.update({"a.weight_zero_point": torch.zeros(1, 4)}), "weight_zero_point is float32"),
        (lambda t: t["a.weight_scale"].view(-1)[3].fill_(float("nan")), "weight_scale holds numbers that are not finite"),
        (lambda t: t.update({"a.weight_scale": torch.ones(8, 4, dtype=torch.int32)}), "weight_scale is int32"),
        (lambda t: t.update({"a.weight_scale": torch.ones(8, 4).to(torch.float8_e4m3fn)}), "weight_scale is float8"),
        (lambda t: t.update({"a.weight_scale": torch.ones(8, 4, dtype=torch.float64)}), "weight_scale is float64"),
        (lambda t: t.update({"a.weight_scale": torch.ones(8, 0)}), "weight_scale is float32"),
        (lambda t: t.update({"a.weight_scale": torch.ones(8)}), "two dimensions"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([8.0, float("nan")])}), "weight_shape is float32"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([8, 128, 1])}), "weight_shape is int64"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([8, 1 << 62])}), "no stream of 3 bits"),
        (lambda t: t.update({"a.weight_packed": t["a.weight_packed"].long()}), "weight_packed is int64"),
    ],
)
def test_damaged_tensors_give_one_sentence(tmp_path: Path, damage, words: str) -> None:
    write(tmp_path, {"a": weight(8, 128, 3, 32, symmetric=True)})
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=words) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config_groups": [1]}, "must be a mapping of mappings"), ({"config_groups": None}, "must be a mapping"), ({"config_groups": {}}, "mapping"),
        ({"config_groups": {"a": 3}}, "must be a mapping of mappings"), ({"weights": "x"}, "weights in config_groups"),
        ({"weights": None}, "weights in"),
        ({"num_bits": 4.0}, "weights of 4.0 bits"), ({"num_bits": [4]}, "weights of .4. bits"), ({"num_bits": None}, "weights of None bits"),
        ({"num_bits": True}, "weights of True bits"), ({"type": "float"}, "of the type float; compressor reads int"),
        ({"type": [1]}, "of the type .1."),
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "rotates activations while it runs"),
        ({"transform_config": "x"}, "transform_config"), ({"output_activations": {"num_bits": 8}}, "quantises activations"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_configurations_give_one_sentence(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    write(tmp_path, {"a": weight(8, 128, 4, 32, symmetric=True)})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    for place in (group["weights"], group, config):
        place.update({key: value for key, value in change.items() if key in place or (key == "transform_config" and place is config)})
    with pytest.raises(ModelError, match=words) as error:
        ct.read(tmp_path, [tmp_path / "model.safetensors"], config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("empty", [None, {}, {"config_groups": {}}])
def test_a_transform_config_without_transforms_is_none(tmp_path: Path, empty: Any) -> None:
    write(tmp_path, {"a": weight(8, 128, 4, 32, symmetric=True)})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert list(ct.read(tmp_path, [tmp_path / "model.safetensors"], config | {"transform_config": empty})[1]) == ["a"]


@pytest.mark.parametrize("bits", [2, 3])
def test_targets_tell_the_bits_where_the_words_fit_several(tmp_path: Path, bits: int) -> None:
    """Eight columns fill one word at 2 and at 3 bits."""
    weights = {"b.q": weight(8, 8, bits, 8, symmetric=True), "b.k": weight(8, 128, 5 - bits, 8, symmetric=True)}
    write(tmp_path, weights)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    files = [tmp_path / "model.safetensors"]
    groups = {group["weights"]["num_bits"]: group for group in config["config_groups"].values()}
    for own, other in (([r"re:.*\.q$"], [r"re:.*\.k$"]), (["b.q"], ["Linear"]), (["Linear"], ["b.k"]), (["re:("], ["b.k"])):
        groups[bits]["targets"], groups[5 - bits]["targets"] = own, other
        if own == ["re:("]:
            with pytest.raises(ModelError, match="several widths fit"):
                ct.read(tmp_path, files, config)
        else:
            again = ct.read(tmp_path, files, config)[1]
            assert all(torch.equal(again[name].dequantize(), packed.dequantize()) for name, packed in weights.items())


@pytest.mark.parametrize(("k", "scales"), [(160, 3), (96, 2)])
def test_a_shorter_last_group_is_not_supported(tmp_path: Path, k: int, scales: int) -> None:
    """Also where the number of groups happens to divide the row: 96 columns in groups of 64 are no groups of 48."""
    write(tmp_path, {"a": weight(8, k, 4, 32, symmetric=True)})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"]["group_size"] = 64
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"a.weight_scale": torch.ones(8, scales).half()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"{k} inputs in groups of 64, the last of them shorter, which compressor does not support"):
        ct.read(tmp_path, [tmp_path / "model.safetensors"], config)


def test_scales_that_no_reader_takes_are_a_reason() -> None:
    good = weight(8, 128, 4, 32, symmetric=True)
    for bad in (torch.full((8, 4), float("nan")), torch.full((8, 4), float("inf")).half(), torch.ones(8, 4, dtype=torch.float64)):
        assert "scales of b are not finite" in str(ct.fits({"a": good, "b": good.with_learned(bad)}))
    assert ct.fits({"a": good}) is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_narrow_layers_keep_their_bits(tmp_path: Path, bits: int) -> None:
    """Sixteen columns fill two words at 3 and at 4 bits: the configuration decides."""
    packed = weight(8, 16, bits, 16, symmetric=True)
    write(tmp_path, {"a": packed})
    assert torch.equal(read(tmp_path)[1]["a"].codes(), packed.codes())


def test_quantised_activations_and_other_widths_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a": weight(8, 128, 3, 32, symmetric=True)})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    for change, words in (({"input_activations": {"num_bits": 8}}, "activations"), ({"weights": {"num_bits": 8}}, "8 bits")):
        with pytest.raises(ModelError, match=words):
            ct.read(tmp_path, [tmp_path / "model.safetensors"], config | {"config_groups": {"group_0": group | change}})


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gptq"):
        ct.read(tmp_path, [], {"quant_method": "gptq"})


def test_stream_is_what_the_docstring_says() -> None:
    codes = torch.randint(0, 8, (3, 70), dtype=torch.uint8)
    words = layout.pack_stream(codes, 3)
    for row, line in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum(code << (3 * i) for i, code in enumerate(row))
        assert [w & 0xFFFFFFFF for w in line] == [(number >> (32 * i)) & 0xFFFFFFFF for i in range(len(line))]
