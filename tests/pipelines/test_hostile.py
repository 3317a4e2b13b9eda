"""Files made to hurt: every one ends in the sentence that stands here, at once and with nothing of them run. Found by bench/fuzz.py, kept small."""

import gzip
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from compressor.errors import CompressorError, DataError, ModelError, RecipeError
from compressor.export import compressed_tensors, shards
from compressor.pipelines import checkpoint, cli, data, encoder_data, estimate, limits, load, sources
from compressor.pipelines.blockwise import opening
from compressor.pipelines.journal import Journal, kept
from compressor.pipelines.measure import protocols, task_files

QUICK = settings(deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of `tiny` that may be spoilt."""
    return Path(shutil.copytree(checkpoint.TINY, tmp_path / "tiny"))


def config(folder: Path, **keys: Any) -> Path:
    told = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nests deeper"),
        ('{"vocab_size": ' + "1" * 5000 + "}", "5000 digits"),
        ('{"vocab_size": 2048, "vocab_size": 9}', "twice"),
        ('{"vocab_size": true}', "vocab_size is 'True'"),
        ('{"hidden_size": 9007199254740992}', "hidden_size is 9007199254740992, which no model has"),
        ('{"text_config": {"num_labels": 100000000}}', "num_labels is 100000000"),
        ('{"head_dim": NaN}', "head_dim is nan"),
    ],
)
def test_config(folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        checkpoint.any_config(folder)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_hidden_layers": 10**4}, "promises 10000 blocks"),
        ({"num_hidden_layers": 10**9}, "which no model has"),
        ({"vocab_size": 1 << 30}, "promises [0-9,]+ numbers"),
        ({"intermediate_size": 1 << 30}, "promises [0-9,]+ numbers"),
        ({"hidden_size": 1 << 30}, "promises [0-9,]+ numbers"),
        ({"rope_parameters": [1]}, "transformers cannot build"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
    ],
)
@pytest.mark.parametrize("build", [estimate.shell, load.empty_model, lambda folder: load.load(str(folder), "cpu")])
def test_promises_of_a_config(folder: Path, keys: dict[str, Any], words: str, build: Callable[[Path], Any]) -> None:
    with pytest.raises(ModelError, match=words):
        build(config(folder, **keys))


def file_of(header: str, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header.encode() + body


ENTRY = '{"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (file_of("[" * 50_000), "nests deeper"),
        (file_of(f'{{"a": {ENTRY}, "a": {ENTRY}}}', bytes(4)), "twice"),
        (file_of(f'{{"a": {ENTRY}, "b": {ENTRY}}}', bytes(4)), "does not begin where"),
        (file_of('{"a": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]}}', bytes(8)), "does not begin where"),
        (file_of('{"a": {"dtype": "F16", "shape": [2], "data_offsets": [1e-320, 4]}}', bytes(4)), "does not begin where"),
        (file_of('{"a": {"dtype": "F16", "shape": [-2, -1], "data_offsets": [0, 4]}}', bytes(4)), "has no shape"),
        (file_of('{"a": {"dtype": "F16", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}}'), "has no shape"),
        (file_of('{"a": {"dtype": "F16", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}'), "wants others"),
        (file_of('{"a": {"dtype": "F16", "shape": [3], "data_offsets": [0, 4]}}', bytes(4)), "wants others"),
        (file_of("{}", length=1 << 63), "not that of a header"),
        (b"\x01", "header cannot be read"),
    ],
)
def test_headers(folder: Path, content: bytes, words: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        checkpoint.weight_files(folder)


def test_a_shape_beyond_63_bits_is_a_sentence_where_headers_alone_are_read(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(file_of('{"a": {"dtype": "F16", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}}'))
    with pytest.raises(ModelError, match="cannot be read"):
        shards.read_headers(folder, [folder / "model.safetensors"])


@QUICK
@given(content=st.binary(max_size=80), header=st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_any_header_ends_in_files_or_in_a_sentence(folder: Path, content: bytes, header: dict[str, Any]) -> None:
    for each in (content, file_of(json.dumps(header), content)):
        (folder / "model.safetensors").write_bytes(each)
        try:
            checkpoint.weight_files(folder)
        except ModelError as error:
            assert len(str(error)) < 500


@QUICK
@given(
    keys=st.dictionaries(st.sampled_from(["vocab_size", "num_hidden_layers", "quantization_config", "architectures", "head_dim"]), JSON, max_size=3)
)
def test_any_config_ends_in_a_mapping_or_in_a_sentence(folder: Path, keys: dict[str, Any]) -> None:
    shutil.copy(checkpoint.TINY / "config.json", folder)
    try:
        assert isinstance(checkpoint.any_config(config(folder, **keys)), dict)
    except ModelError as error:
        assert len(str(error)) < 500


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "jetmoe", "granitemoe"])
def test_experts_of_next_to_nothing(folder: Path, kind: str) -> None:
    one = dict.fromkeys(
        ("intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok"), 1
    )
    many = dict.fromkeys(("num_experts", "num_local_experts"), 30_000)  # of 3 numbers or so, and half a millisecond
    (folder / "config.json").write_text(
        json.dumps({"model_type": kind, "architectures": ["XForCausalLM"], "vocab_size": 16, "hidden_size": 2, "num_hidden_layers": 4} | one | many)
    )
    begin = time.process_time()
    for read in (estimate.shell, lambda path: load.load(str(path), "cpu"), lambda path: opening.load_blocks(str(path), "cpu")):
        with pytest.raises(ModelError, match=r"promises [\d,]+,000 experts, and the weight files hold"):
            read(folder)
    assert time.process_time() - begin < 20


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("aim", ["outside", "itself", "pipe"])
def test_links_and_pipes(folder: Path, name: str, aim: str) -> None:
    (folder / name).rename(folder.parent / "outside")
    if aim == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(folder.parent / "outside" if aim == "outside" else folder / name)
    with pytest.raises(ModelError, match="no regular file" if aim == "pipe" else "link that leads out of its folder"):
        load.load(str(folder), "cpu")


def test_links_of_the_cache_of_the_hub_and_to_a_folder_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "rev"
    shutil.copytree(checkpoint.TINY, tmp_path / "models--a--b" / "blobs")
    snapshot.mkdir(parents=True)
    for path in checkpoint.TINY.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    (tmp_path / "link").symlink_to(snapshot)
    for name in (snapshot, tmp_path / "link"):
        assert checkpoint.read_config(name)["vocab_size"] and checkpoint.weight_files(name)


def test_a_link_to_a_snapshot_keeps_its_blobs(tmp_path: Path) -> None:
    (tmp_path / "x" / "snapshots" / "rev").mkdir(parents=True)
    shutil.copytree(checkpoint.TINY, tmp_path / "elsewhere")
    folder = tmp_path / "x" / "snapshots" / "rev"
    for path in checkpoint.TINY.iterdir():
        (folder / path.name).symlink_to(tmp_path / "elsewhere" / path.name)
    with pytest.raises(ModelError, match="leads out of its folder"):
        checkpoint.any_config(folder)


def test_an_index_names_safetensors_alone(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / checkpoint.INDEX).write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    with pytest.raises(ModelError, match="no safetensors file of this folder"):
        checkpoint.weight_files(folder)


def test_nothing_of_a_stranger_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bait:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "ran"), "w")

    (folder / "modeling_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    auto = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_x.Model") | {"AutoTokenizer": ["modeling_x.Model", "modeling_x.Model"]}
    config(folder, auto_map=auto)
    told = json.loads((folder / "tokenizer_config.json").read_text()) | {"auto_map": auto, "tokenizer_class": "Model"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    torch.save(Bait(), folder / "pytorch_model.bin")
    for kind in ("llama", "x"):
        try:
            load.load(str(config(folder, model_type=kind)), "cpu")
        except ModelError:
            continue
    (folder / "model.safetensors").rename(folder / "gptq_model.safetensors")  # a name of ours alone: transformers would turn to the pickle
    with pytest.raises(ModelError, match="transformers cannot load"):
        load.load(str(config(folder, model_type="llama")), "cpu")
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_has_another_one_loaded_in_its_place(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else", "peft_type": "LORA"}')
    with pytest.raises(ModelError, match="load the model that it names instead"):
        load.load(str(folder), "cpu")


BOMB = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [1]\n" + BOMB, "more than 10000 values"),
        ("quant: &q [*q]\n", "nests deeper"),
        ("seed: 0x" + "f" * 5000, "more than 40 digits"),
        ("a: " + "[" * 5000, "no valid YAML"),
        ("a: [" + "0," * 20_000 + "]", "more than 10000 values"),
        ("a: " + "x" * (1 << 19), "larger than"),
        ("a: !!python/object/apply:os.system ['touch ran']", "no valid YAML"),
    ],
)
def test_yaml(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=words):
        cli.read_yaml(tmp_path / "r.yaml", "recipe")


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_a_recipe_of_numbers_that_are_none(tmp_path: Path, value: str) -> None:
    (tmp_path / "r.yaml").write_text(f"tune: {{dropout: {value}}}")
    with pytest.raises(RecipeError, match=r"tune.dropout=\w+ must be finite"):
        cli.read_recipe(tmp_path / "r.yaml")


def test_patterns_that_take_for_ever(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text('quant: {ignore: ["(a+)+$"]}')
    with pytest.raises(RecipeError, match="could take for ever"):
        cli.read_recipe(tmp_path / "r.yaml")
    groups = [compressed_tensors.Group(bits, 32, True, (r"re:(\w+\.?)+!",)) for bits in (2, 3)]
    with pytest.raises(ModelError, match="which several widths fit"):  # the pattern is not tried
        compressed_tensors._bits(1, 10, "model.layers.0.self_attn.q_proj." + "a" * 40, groups, "x")


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000, '{"text": NaN', "\ud800"])
def test_rows(tmp_path: Path, line: str) -> None:
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(line.encode("utf-8", "surrogatepass"))
        for read in (sources.load, encoder_data.load, lambda name: task_files.read(Path(name))):
            with pytest.raises(DataError):
                read(str(tmp_path / name))


@QUICK
@given(rows=st.lists(JSON, max_size=12))
def test_any_rows_end_in_documents_or_in_a_sentence(tmp_path: Path, rows: list[Any]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for read in (sources.load, encoder_data.load, lambda name: task_files.read(Path(name))):
        try:
            read(str(tmp_path / "a.jsonl"))
        except CompressorError as error:
            assert 0 < len(str(error)) <= 500


def test_data_that_grow(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.json.gz", "wb") as file:
        file.write(b"\n" * (64 << 20))
    with pytest.raises(DataError, match="grows to more than"):
        protocols._rows(tmp_path / "a.json.gz")
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    one = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10_000, pyarrow.int32()), pyarrow.array(["x" * 1_000_000]))
    parquet.write_table(pyarrow.table({"text": one}), tmp_path / "a.parquet")  # ten gigabytes in some kilobytes
    with pytest.raises(DataError, match="grows to more than"):
        sources.load(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/stdin", "a\0b.txt", "x" * 400 + ".txt", "pipe.jsonl"])
def test_data_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    with pytest.raises(DataError):
        sources.load(name)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"


@pytest.mark.parametrize("template", [LOOP, GROW, "{{ 'a' * 10 ** 10 }}", "{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}", "{{"])
def test_templates_of_chats(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    tokenizer = load.load_tokenizer(checkpoint.TINY)
    tokenizer.chat_template = template
    chat = sources.Corpus.of("chat", [data.Document("x", "y", (("user", "hello"), ("assistant", "ships")))])
    with pytest.raises(DataError, match="chat template"):
        list(data.encode(chat, tokenizer))


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "A"}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(?:x+x+)+y"}, "behavior": "Isolated", "invert": False}),
        ("model", {"type": "x"}),
    ],
)
def test_tokenizers(folder: Path, key: str, part: dict[str, Any]) -> None:
    told = json.loads((folder / "tokenizer.json").read_text()) | {key: part}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match="tokenizer"):
        data.token_stream(sources.Corpus.of("text", [data.Document("x" * 60)]), load.load_tokenizer(folder))


@pytest.mark.parametrize("text", ['{"pack": 1}', '{"pack": {"fingerprint": "f"}}', '{"pack": []}', "[" * 100_000, "1" * 5000])
def test_a_journal_that_is_damaged_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "journal.json").write_text(text)
    assert Journal(tmp_path).get("pack", "f") is None


def test_kept_facts_that_are_damaged_are_none(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"facts": "[" * 100_000})
    assert kept(tmp_path / "a.safetensors") is None


def test_tensors_of_kinds_that_nobody_computes_in(folder: Path) -> None:
    tensors = {"a": torch.zeros(4, dtype=torch.float8_e4m3fn), "b": torch.zeros(2, dtype=torch.complex64)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError):
        load.load(str(folder), "cpu")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(save(tensors))
    from compressor.integrations import attach

    with pytest.raises(ModelError):
        attach.load(torch.nn.Linear(2, 2), folder / "adapter")
