"""What servers make of folders: facts from headers alone, a verdict with a reason for every rule, and a text that agrees with it."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compressor.errors import ModelError, RecipeError
from compressor.export import compressed_tensors, mlx, table
from compressor.packed import Affine, PackedWeight, Table
from compressor.pipelines import folder_facts, servers
from compressor.pipelines.folder_facts import Facts, Scheme

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
LAYERS = [f"model.layers.0.{name}" for name in NAMES]
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def weight(bits: int, group: int = 64, symmetric: bool = True, k: int = 128) -> PackedWeight:
    codes = torch.zeros(64, k, dtype=torch.uint8)
    if group == 0:
        return PackedWeight.pack(codes, Table(torch.zeros(64, 1, 1 << bits).half()), bits, k)
    scale = torch.ones(64, k // group).half()
    return PackedWeight.pack(codes, Affine(scale, None if symmetric else torch.ones(scale.shape, dtype=torch.uint8)), bits)


def packed(folder: Path, write: Callable[..., Any], schemes: Mapping[str, PackedWeight], **more: Any) -> Path:
    tensors = {"model.embed_tokens.weight": torch.zeros(9, 128), "lm_head.weight": torch.zeros(9, 128)}
    write(folder, CONFIG | more, [*tensors.items(), *schemes.items()], ["lm_head"])
    return folder


def gptq(folder: Path, bits: int, symmetric: bool, width: int = 128, n: int = 64, **more: Any) -> Path:
    tensors = {}
    for name in LAYERS:
        tensors[f"{name}.qweight"] = torch.zeros(width * bits // 32, n, dtype=torch.int32)
        tensors[f"{name}.scales"] = torch.ones(2, n).half()
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": width // 2, "sym": symmetric, "desc_act": False} | more
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    return folder


def gguf(path: Path, pairs: bytes = b"", count: int = 0, kinds: tuple[int, ...] = (2, 2, 0)) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    names = (
        text("general.architecture") + struct.pack("<I", 8) + text("llama") + text("x.words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc")
    )
    names += text("x.numbers") + struct.pack("<IIQ", 9, 5, 3) + bytes(12) + text("x.scale") + struct.pack("<If", 6, 0.5) + pairs
    infos = b"".join(text(f"t{i}") + struct.pack("<IQQIQ", 2, 256, 64, kind, 0) for i, kind in enumerate(kinds))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(kinds), 4 + count) + names + infos + bytes(64))
    return path


def verdict(server: str, found: Facts) -> str:
    return servers.judge(server, found, Path("x")).verdict


def facts(form: str, bits: int = 4, group: int = 128, symmetric: bool | None = True, **more: Any) -> Facts:
    return Facts(form, "LlamaForCausalLM", dict.fromkeys(LAYERS, Scheme(bits, group, symmetric)), dict.fromkeys(LAYERS, (256, 256)), **more)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_facts_of_compressed_tensors(tmp_path: Path, bits: int, symmetric: bool) -> None:
    schemes = {name: weight(bits, 64, symmetric) for name in LAYERS} | {LAYERS[3]: weight(bits, 128, symmetric)}
    found = folder_facts.facts(packed(tmp_path, compressed_tensors.write, schemes))
    assert (found.format, found.architecture, found.act_order, found.adapter) == ("compressed-tensors", "LlamaForCausalLM", False, False)
    assert found.schemes[LAYERS[0]] == Scheme(bits, 64, symmetric)
    assert found.schemes[LAYERS[3]] == Scheme(bits, -1, symmetric)
    assert set(found.shapes.values()) == {(64, 128)}
    assert {"lm_head", "model.embed_tokens"} <= found.dense


def test_facts_of_mixed_bits_an_adapter_and_mlx(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    schemes = {name: weight(4) for name in LAYERS} | {LAYERS[1]: weight(2)}
    (tmp_path / "a" / "adapter").mkdir()
    found = folder_facts.facts(packed(tmp_path / "a", compressed_tensors.write, schemes))
    assert found.bits == {2, 4}
    assert found.mixed
    assert found.split() in LAYERS[:3]
    assert found.adapter
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


@pytest.mark.parametrize(
    ("server", "found", "wanted", "why"),
    [
        ("vllm", facts("compressed-tensors", 4), "yes", "Marlin"),
        ("vllm", facts("compressed-tensors", 4, symmetric=False), "yes", "Marlin"),
        ("vllm", facts("compressed-tensors", 3), "with conditions", "Humming"),
        ("vllm", facts("compressed-tensors", 3, act_order=True), "no", "no act-order"),
        ("vllm", facts("compressed-tensors", 4, 16), "with conditions", "groups of 32, 64 and 128"),
        ("vllm", facts("gptq", 4, version="gptq"), "yes", "Marlin"),
        ("vllm", facts("gptq", 4, symmetric=False), "with conditions", "only where weights are symmetric; compressor's plug-in"),
        ("vllm", facts("gptq", 4, act_order=True), "with conditions", "no act-order in groups; compressor's plug-in"),
        ("vllm", facts("gptq", 8), "yes", "CPUs need compressor's plug-in"),
        ("vllm", facts("gptq", 4, -1, act_order=True), "yes", "Marlin"),
        ("vllm", facts("gptq", 2), "with conditions", "4 and 8 bits; compressor's plug-in"),
        ("vllm", facts("table", 3, 0, None), "with conditions", "pip install --no-deps compressor"),
        ("vllm", facts("mlx", 4), "no", "--to compressed-tensors"),
        ("llama.cpp", facts("compressed-tensors"), "no", "--to gguf"),
        ("transformers", facts("compressed-tensors", 4), "yes", "compressed-tensors"),
        ("transformers", facts("compressed-tensors", 3), "with conditions", "0.18"),
        ("transformers", facts("compressed-tensors", 4, symmetric=False), "with conditions", "dequantize=True"),
        ("transformers", facts("gptq", 3), "with conditions", "gptqmodel"),
        ("transformers", facts("table", 3, 0, None), "with conditions", "import compressor"),
        ("transformers", facts("mlx"), "no", "--to compressed-tensors"),
        ("sglang", facts("gptq", 4), "yes", "Marlin"),
        ("sglang", facts("gptq", 3), "no", "4 and 8 bits"),
        ("sglang", facts("compressed-tensors", 2), "no", "4 and 8 bits"),
        ("gptqmodel", facts("gptq", 3), "yes", "2, 3, 4 and 8"),
        ("gptqmodel", facts("gptq", 3, symmetric=False, version="gptq"), "no", "through transformers"),
        ("gptqmodel", facts("gptq", 3, symmetric=False, version="gptq", maker="gptqmodel:7.6"), "yes", "2, 3, 4 and 8"),
        ("gptqmodel", facts("gptq", 3, symmetric=False, version="gptq_v2"), "yes", "2, 3, 4 and 8"),
        ("auto-gptq", facts("gptq", 3, version="gptq"), "yes", "2, 3, 4 and 8"),
        ("auto-gptq", facts("gptq", 3, version="gptq_v2"), "no", "misreads"),
        ("mlx", facts("mlx", 3, 64, None), "yes", ""),
        ("mlx", facts("gptq"), "no", "--to mlx"),
    ],
)
def test_every_rule_speaks(server: str, found: Facts, wanted: str, why: str) -> None:
    advice = servers.judge(server, found, Path("out dir"))
    assert advice.verdict == wanted, advice
    assert why in "; ".join(advice.reasons)
    assert (advice.command is None) == (wanted == "no")


def test_layers_that_servers_fuse_must_be_alike() -> None:
    mixed = facts("compressed-tensors")
    unlike = Facts(**{**vars(mixed), "schemes": {**mixed.schemes, LAYERS[1]: Scheme(8, 128, True)}})
    assert (verdict("vllm", unlike), verdict("sglang", unlike), verdict("transformers", unlike)) == ("with conditions", "no", "yes")
    assert "--quantization compressor" in str(servers.judge("vllm", unlike, Path("x")).command)
    apart = Facts(**{**vars(mixed), "schemes": {**mixed.schemes, LAYERS[3]: Scheme(8, 128, True)}})
    assert verdict("vllm", apart) == "yes"
    dense = {name: scheme for name, scheme in mixed.schemes.items() if name != LAYERS[2]}
    assert verdict("vllm", Facts(**{**vars(mixed), "schemes": dense, "dense": frozenset({LAYERS[2]})})) == "with conditions"
    awq = facts("awq", symmetric=False)
    assert verdict("vllm", Facts(**{**vars(awq), "schemes": {**awq.schemes, LAYERS[1]: Scheme(8, 128, False)}})) == "no"
    assert verdict("transformers", Facts(**{**vars(unlike), "schemes": {**mixed.schemes, LAYERS[1]: Scheme(8, 128, False)}})) == "no"


def test_adapters_architectures_and_uneven_blocks() -> None:
    held = facts("compressed-tensors", adapter=True)
    assert "--enable-lora --lora-modules tuned=x/adapter" in str(servers.judge("vllm", held, Path("x")).command)
    assert "fold it in" in servers.judge("transformers", held, Path("x")).reasons[-1]
    strange = Facts(**{**vars(held), "architecture": "MambaForCausalLM", "adapter": False})
    assert verdict("vllm", strange) == "with conditions"
    assert all(verdict(name, facts("compressed-tensors", uneven=True)) == "no" for name in servers.SERVERS)


def test_odd_shapes_are_named() -> None:
    narrow = Facts(**{**vars(facts("gptq", version="gptq")), "shapes": {LAYERS[0]: (64, 172)}})
    assert verdict("auto-gptq", narrow) == "no"
    assert "multiple of 64" in "; ".join(servers.judge("vllm", narrow, Path("x")).reasons)


def test_advice_for_one_and_for_all(tmp_path: Path) -> None:
    folder = packed(tmp_path, compressed_tensors.write, {name: weight(3) for name in LAYERS})
    document, shown = servers.advise(folder)
    assert list(document["loads"]) == list(servers.SERVERS)
    assert document["grids"] == [{"bits": 3, "group": 64, "symmetric": True}]
    assert shown.row_count == len(servers.SERVERS)
    assert json.loads(json.dumps(document)) == document
    assert servers.advise(folder, "sglang")[0]["loads"] == {"sglang": "no"}
    with pytest.raises(RecipeError, match="server 'tgi' is unknown; choose vllm"):
        servers.advise(folder, "tgi")
    with pytest.raises(ModelError, match="no config.json"):
        servers.advise(tmp_path.parent)


def test_paths_with_spaces_are_quoted() -> None:
    assert servers.judge("vllm", facts("compressed-tensors"), Path("my model")).command == "vllm serve 'my model'"


def test_the_text_says_what_the_rules_say() -> None:
    text = servers.section()
    for name in servers.SERVERS:
        assert f"### {name}\n" in text
    assert "| gptq | asymmetric 2, 3, 4, 8 bits | with conditions | by itself it takes GPTQ only where weights are symmetric; " in text
    assert "llama-server -m FOLDER/model-auto.gguf" in text
    reasons = {rule.why for rule in servers.RULES if rule.why and rule.seen == "run"} - {""}
    assert sum(why in text for why in reasons) > len(reasons) // 2
