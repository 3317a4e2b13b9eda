"""What servers make of folders: a verdict with a reason for every rule, commands that hold any name, and a text that agrees with it."""

import ast
import io
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from compressor.errors import ModelError, RecipeError
from compressor.export import compressed_tensors
from compressor.pipelines import card_serving, servers
from compressor.pipelines.folder_facts import Facts, Scheme
from tests.pipelines.folders import LAYERS, facts, gguf, packed, weight


def verdict(server: str, found: Facts) -> str:
    return servers.judge(server, found, Path("x")).verdict


@pytest.mark.parametrize(
    ("server", "found", "wanted", "why"),
    [
        ("vllm", facts("compressed-tensors", 4), "yes", ""),
        ("vllm", facts("compressed-tensors", 4, symmetric=False), "yes", ""),
        ("vllm", facts("compressed-tensors", 3), "with conditions", "Humming"),
        ("vllm", facts("compressed-tensors", 3, act_order=True), "no", "no act-order"),
        ("vllm", facts("compressed-tensors", 4, 16), "with conditions", "groups of 32, 64 and 128"),
        ("vllm", facts("gptq", 4, version="gptq"), "yes", ""),
        ("vllm", facts("gptq", 4, symmetric=False), "with conditions", "only where weights are symmetric; compressor's plug-in"),
        ("vllm", facts("gptq", 4, act_order=True), "with conditions", "no act-order in groups; compressor's plug-in"),
        ("vllm", facts("gptq", 8), "yes", "CPUs need compressor's plug-in"),
        ("vllm", facts("gptq", 4, -1, act_order=True), "yes", ""),
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
        ("sglang", facts("gptq", 4), "yes", ""),
        ("sglang", facts("gptq", 3), "no", "4 and 8 bits"),
        ("sglang", facts("compressed-tensors", 2), "no", "4 and 8 bits"),
        ("gptqmodel", facts("gptq", 3), "yes", ""),
        ("gptqmodel", facts("gptq", 3, symmetric=False, version="gptq"), "no", "through transformers"),
        ("gptqmodel", facts("gptq", 3, symmetric=False, version="gptq", maker="gptqmodel:7.6"), "yes", ""),
        ("gptqmodel", facts("gptq", 3, symmetric=False, version="gptq_v2"), "yes", ""),
        ("auto-gptq", facts("gptq", 3, version="gptq"), "yes", ""),
        ("auto-gptq", facts("gptq", 3, version="gptq_v2"), "no", "misreads"),
        ("mlx", facts("mlx", 3, 64, None), "yes", ""),
        *((server, Facts("hqq", "LlamaForCausalLM"), "no", "it reads no hqq folders: compressor export") for server in servers.SERVERS),
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
    held = facts("compressed-tensors", adapter="lora", rank=20)
    assert "--enable-lora --max-lora-rank 32 --lora-modules tuned=x/adapter" in str(servers.judge("vllm", held, Path("x")).command)
    assert "fold it in" in servers.judge("transformers", held, Path("x")).reasons[-1]
    other = servers.judge("vllm", facts("compressed-tensors", adapter="ia3"), Path("x"))
    assert "of the kind ia3, is left out" in other.reasons[-1] and "lora" not in str(other.command)
    strange = Facts(**{**vars(held), "architecture": "MambaForCausalLM", "adapter": ""})
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


NAUGHTY = 'it\'s $(touch pwn) "`x`" \\ {y}'


@pytest.mark.parametrize("name", ["plain", "a b", "it's $(touch pwn)", '"', NAUGHTY])
@pytest.mark.parametrize("found", [facts("table"), facts("compressed-tensors", symmetric=False), facts("gptq"), Facts("gguf", "llama")])
def test_names_of_folders_are_text_in_every_command(name: str, found: Facts) -> None:
    place = Path("top", name, "x.gguf") if found.format == "gguf" else Path("top", name)
    commands = [servers.judge(server, found, place).command for server in servers.SERVERS]
    coded = 0
    for words in (shlex.split(command) for command in commands if command):
        if words[:2] != ["python", "-c"]:
            assert str(place) in words
            continue
        coded += 1
        assert len(words) == 3
        assert {str(place), str(place.parent)} & set(texts_of(words[2]))
    assert coded


def texts_of(code: str) -> list[str]:
    """The texts in Python code."""
    tree = compile(code, "command", "exec", ast.PyCF_ONLY_AST)
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_reasons_and_cards_are_about_the_folder(tmp_path: Path) -> None:
    table_advice, gguf_advice = servers.judge("vllm", facts("table", 3), Path("x")), servers.judge("vllm", Facts("gguf", "llama"), Path("x"))
    assert "Marlin" not in table_advice.cards + gguf_advice.cards
    assert "Marlin" in servers.judge("vllm", facts("gptq"), Path("x")).cards
    assert servers.judge("vllm", facts("gptq"), Path("x")).reasons == servers.judge("gptqmodel", facts("gptq"), Path("x")).reasons == ()
    plain, rounded = (servers.judge("llama.cpp", Facts("gguf", "llama", types=(kind, "F32")), Path("x")).reasons for kind in ("F16", "Q4_0"))
    assert (plain, rounded) == ((), ("it rounds activations to 8 bits",))
    gguf(tmp_path / "it's.gguf")
    card = card_serving.section(tmp_path)
    assert "llama-server -m 'FOLDER/it'\"'\"'s.gguf'" in card
    assert "Marlin" not in card
    assert str(tmp_path) not in card


def test_names_with_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "[red]x [" / "b]"
    folder.mkdir(parents=True)
    _, shown = servers.advise(packed(folder, compressed_tensors.write, {name: weight(4) for name in LAYERS}), "vllm")
    console = Console(width=1000, record=True, file=io.StringIO())
    console.print(shown)
    assert f"vllm serve '{folder}'" in console.export_text()


def test_the_documentation_holds_the_same_text() -> None:
    assert f"\n{servers.section()}\n" in Path(__file__).parents[2].joinpath("docs", "serving.md").read_text("utf-8")
