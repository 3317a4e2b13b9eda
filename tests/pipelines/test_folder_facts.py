"""What headers say of a folder, in every format; damage and formats of others, each in one sentence."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compressor.errors import ModelError
from compressor.export import compressed_tensors, hqq, mlx, sparse, table
from compressor.export import gptq as gptq_format
from compressor.pipelines import card_serving, digests, folder_facts, servers
from compressor.pipelines.folder_facts import Scheme
from tests.pipelines.folders import CONFIG, LAYERS, changed, gguf, gptq, packed, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_facts_of_compressed_tensors(tmp_path: Path, bits: int, symmetric: bool) -> None:
    schemes = {name: weight(bits, 64, symmetric) for name in LAYERS} | {LAYERS[3]: weight(bits, 128, symmetric)}
    found = folder_facts.facts(packed(tmp_path, compressed_tensors.write, schemes))
    assert (found.format, found.architecture, found.act_order, found.adapter) == ("compressed-tensors", "LlamaForCausalLM", False, "")
    assert found.schemes[LAYERS[0]] == Scheme(bits, 64, symmetric)
    assert found.schemes[LAYERS[3]] == Scheme(bits, 128, symmetric)
    assert set(found.shapes.values()) == {(64, 128)}
    assert {"lm_head", "model.embed_tokens"} <= found.dense


def test_facts_of_mixed_bits_an_adapter_and_mlx(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    schemes = {name: weight(4) for name in LAYERS} | {LAYERS[1]: weight(2)}
    (tmp_path / "a" / "adapter").mkdir()
    (tmp_path / "a" / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true, "r": 8}')
    found = folder_facts.facts(packed(tmp_path / "a", compressed_tensors.write, schemes))
    assert found.bits == {2, 4}
    assert found.mixed
    assert found.split() in LAYERS[:3]
    assert (found.adapter, found.rank) == ("dora", 8)
    again = folder_facts.facts(packed(tmp_path / "b", mlx.write, schemes))
    assert again.format == "mlx"
    assert again.schemes[LAYERS[1]] == Scheme(2, 64, None)
    assert again.shapes[LAYERS[0]] == (64, 128)


def test_facts_of_tables_and_dense_folders(tmp_path: Path) -> None:
    found = folder_facts.facts(packed(tmp_path, table.write, {name: weight(3, 0) for name in LAYERS}))
    assert (found.format, found.bits) == ("table", {3})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert folder_facts.facts(tmp_path).format == "dense"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_facts_of_gptq(tmp_path: Path, bits: int) -> None:
    found = folder_facts.facts(gptq(tmp_path, bits, False, checkpoint_format="gptq_v2", desc_act=True, meta={"quantizer": ["gptqmodel:7.6"]}))
    assert found.kinds == {Scheme(bits, 64, False)}
    assert (found.version, found.act_order, set(found.shapes.values())) == ("gptq_v2", True, {(64, 128)})


def test_facts_of_gguf_files_without_the_library(tmp_path: Path) -> None:
    found = folder_facts.facts(gguf(tmp_path / "model.gguf"))
    assert found == folder_facts.facts(tmp_path)
    assert (found.format, found.architecture, found.types) == ("gguf", "llama", ("Q4_0", "F32"))
    assert servers.judge("llama.cpp", found, tmp_path).command == f"llama-server -m {tmp_path}/model.gguf -c 4096 --port 8080"


def test_words_of_no_scheme_give_one_sentence(tmp_path: Path) -> None:
    folder = packed(tmp_path, compressed_tensors.write, {LAYERS[0]: weight(3)})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="of no scheme that config.json lists"):
        folder_facts.facts(folder)


@pytest.mark.parametrize("aligned", [None, 8, 64, 4096])
def test_tensors_of_gguf_files_begin_where_the_header_says(tmp_path: Path, aligned: int | None) -> None:
    gguf_library = pytest.importorskip("gguf")
    writer = gguf_library.GGUFWriter(tmp_path / "x.gguf", "llama")
    if aligned is not None:
        writer.add_custom_alignment(aligned)
    values = {name: np.full(size, size, np.float32) for name, size in (("a", 5), ("b", 70), ("c", 3))}
    for name, value in values.items():
        writer.add_tensor(name, value)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    content = (tmp_path / "x.gguf").read_bytes()
    assert {span.name: content[span.begin : span.begin + 4 * len(values[span.name])] for span in digests.layout(tmp_path / "x.gguf")} == {
        name: value.tobytes() for name, value in values.items()
    }


@pytest.mark.parametrize("pair", [struct.pack("<II", 4, 0), struct.pack("<II", 4, 48), struct.pack("<If", 6, 32.0)])
def test_an_alignment_that_cannot_be_is_damage(tmp_path: Path, pair: bytes) -> None:
    key = b"general.alignment"
    with pytest.raises(ModelError, match=r"general.alignment is no power of two"):
        folder_facts.facts(gguf(tmp_path / "model.gguf", struct.pack("<Q", len(key)) + key + pair, 1))


@pytest.mark.parametrize("cut", range(4, 200, 7))
def test_cut_gguf_files_give_one_sentence(tmp_path: Path, cut: int) -> None:
    whole = gguf(tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[:cut])
    with pytest.raises(ModelError, match="damaged or truncated"):
        folder_facts.facts(tmp_path / "model.gguf")


@pytest.mark.parametrize("damage", [b"NONE", b"GGUF" + b"\xff" * 60, b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60)])
def test_damaged_gguf_files_give_one_sentence(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(damage)
    with pytest.raises(ModelError, match=r"no GGUF file|damaged or truncated"):
        folder_facts.facts(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "config",
    [{"quantization_config": {"quant_method": "gptq", "bits": "four"}}, {"quantization_config": {"quant_method": "gptq", "bits": 0}}],
)
def test_damaged_configurations_give_one_sentence(tmp_path: Path, config: dict[str, Any]) -> None:
    gptq(tmp_path, 4, True)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
    with pytest.raises(ModelError, match=r"config.json is damaged"):
        servers.advise(tmp_path)


@pytest.mark.parametrize("write", [gptq_format.V1.write, compressed_tensors.write])
def test_layers_as_wide_as_a_group_are_like_the_others(tmp_path: Path, write: Callable[..., Any]) -> None:
    schemes = {name: weight(4, 128, False) for name in LAYERS} | {LAYERS[3]: weight(4, 128, False, 384)}
    folder = packed(tmp_path, write, schemes)
    found = folder_facts.facts(folder)
    assert not found.mixed
    assert found.shapes[LAYERS[3]] == (64, 384)
    document = servers.advise(folder, "transformers")[0]
    assert document["grids"] == [{"bits": 4, "group": 128, "symmetric": False}]
    assert document["loads"] == {"transformers": "with conditions"}


def test_several_schemes_of_gptq_are_mixed(tmp_path: Path) -> None:
    found = folder_facts.facts(packed(tmp_path, gptq_format.V1.write, {name: weight(4) for name in LAYERS} | {LAYERS[3]: weight(2, 32)}))
    assert found.mixed
    assert (found.schemes[LAYERS[0]], found.schemes[LAYERS[3]]) == (Scheme(4, 64, True), Scheme(2, 32, True))


def test_bits_and_groups_that_no_config_names_follow_from_the_shapes(tmp_path: Path) -> None:
    folder = gptq(tmp_path, 3, False)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert folder_facts.facts(folder).kinds == {Scheme(3, 64, False)}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_facts_of_hqq_folders(tmp_path: Path, bits: int) -> None:
    folder = packed(tmp_path, hqq.write, {name: weight(bits, 64, False) for name in LAYERS})
    found = folder_facts.facts(folder)
    assert (found.format, found.kinds) == ("hqq", {Scheme(bits, 0, None)})
    assert folder_facts.describe(found) == f"LlamaForCausalLM as hqq: {bits} bits"
    assert set(servers.advise(folder)[0]["loads"].values()) == {"no"}


def test_facts_of_sparse_folders(tmp_path: Path) -> None:
    found = folder_facts.facts(packed(tmp_path, sparse.write, {name: weight(3) for name in LAYERS}))
    assert (found.format, found.kinds) == ("sparse", {Scheme(3, 64, None)})


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8"},
        {"quant_method": ["x"]},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "compressed-tensors", "format": ["x"]},
        {"quant_method": "gptq_marlin", "bits": 4},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
    ],
)
def test_of_formats_that_we_do_not_read_nothing_is_said(tmp_path: Path, quantization: dict[str, Any]) -> None:
    save_file({"x.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    document, _ = servers.advise(tmp_path)
    assert set(document["loads"].values()) == {"unknown"}
    assert {(*row["reasons"], row["command"]) for row in document["servers"]} == {(servers.STRANGE, None)}
    assert "16 or 32 bits" not in folder_facts.describe(folder_facts.facts(tmp_path))
    assert card_serving.section(tmp_path) == ""


@pytest.mark.parametrize("quantization", [None, {"quant_method": "fp8"}, {"quant_method": "hqq"}, {"quant_method": "gptq", "bits": 4}])
def test_folders_without_safetensors_give_one_sentence(tmp_path: Path, quantization: dict[str, Any] | None) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    with pytest.raises(ModelError, match="only pickled weights"):
        servers.advise(tmp_path)
    assert card_serving.section(tmp_path) == ""


@pytest.mark.parametrize(
    ("write", "change"),
    [
        (compressed_tensors.write, lambda q: q.update(config_groups=[1])),
        (compressed_tensors.write, lambda q: q.update(config_groups="x")),
        (compressed_tensors.write, lambda q: q["config_groups"].update(group_0=[])),
        (compressed_tensors.write, lambda q: q["config_groups"].update(group_0=7)),
        (compressed_tensors.write, lambda q: q["config_groups"]["group_0"].update(weights="int4")),
        (compressed_tensors.write, lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=[4])),
        (compressed_tensors.write, lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=5)),
        (compressed_tensors.write, lambda q: q["config_groups"]["group_0"]["weights"].update(group_size={})),
        (compressed_tensors.write, lambda q: q["config_groups"]["group_0"]["weights"].update(group_size="64")),
        (compressed_tensors.write, lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=-64)),
        (table.write, lambda q: q.update(groups=5)),
        (table.write, lambda q: q["groups"][0].update(segment="x")),
        (table.write, lambda q: q["groups"][0].update(modules=[["q_proj"]])),
        (table.write, lambda q: q["groups"][0].update(modules={"q_proj": 1})),
        (sparse.write, lambda q: q["groups"][0].update(group="x")),
        (sparse.write, lambda q: q.update(groups={})),
        (gptq_format.V1.write, lambda q: q.update(dynamic=[1])),
        (gptq_format.V1.write, lambda q: q.update(bits=5)),
        (gptq_format.V1.write, lambda q: q.update(bits=8)),
        (gptq_format.V1.write, lambda q: q.update(bits=True)),
        (gptq_format.V1.write, lambda q: q.update(group_size=7)),
        (gptq_format.V1.write, lambda q: q.update(group_size=0)),
        (gptq_format.V1.write, lambda q: q.update(group_size=100000)),
        (gptq_format.V1.write, lambda q: q.update(group_size=[128])),
        (gptq_format.V1.write, lambda q: q.update(meta=5, dynamic={"x": {"bits": "4"}})),
        (mlx.write, lambda q: q.update(bits=7)),
        (mlx.write, lambda q: q.update(group_size=7)),
        (mlx.write, lambda q: q.update(group_size=128)),
    ],
)
def test_damage_in_the_configs_of_others_gives_one_sentence(tmp_path: Path, write: Callable[..., Any], change: Callable[[Any], object]) -> None:
    schemes = {name: weight(3, 0) if write is table.write else weight(4) for name in LAYERS}
    folder = changed(packed(tmp_path, write, schemes), change)
    with pytest.raises(ModelError, match="damaged"):
        servers.advise(folder)
    assert card_serving.section(folder) == ""


@pytest.mark.parametrize("width", [100000, 7])
def test_groups_that_do_not_divide_whole_rows_give_one_sentence(tmp_path: Path, width: int) -> None:
    folder = packed(tmp_path, gptq_format.V1.write, {name: weight(4, 128) for name in LAYERS})
    changed(folder, lambda q: q.update(group_size=width))
    with pytest.raises(ModelError, match="of no scheme that config.json lists"):
        folder_facts.facts(folder)


def test_folders_that_say_packed_and_hold_nothing_packed_give_one_sentence(tmp_path: Path) -> None:
    save_file({"x.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match="holds no packed layers"):
        folder_facts.facts(tmp_path)


def test_ten_codes_of_three_bits_a_word_and_act_order(tmp_path: Path) -> None:
    tensors = {"a.qweight": torch.zeros(13, 64), "a.qzeros": torch.zeros(2, 7), "a.scales": torch.ones(2, 64), "a.g_idx": torch.zeros(128)}
    save_file({name: tensor.int() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": 3, "group_size": 64, "sym": True, "desc_act": True}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    found = folder_facts.facts(tmp_path)
    assert (found.schemes, found.shapes, found.act_order) == ({"a": Scheme(3, 64, True)}, {"a": (64, 128)}, True)
