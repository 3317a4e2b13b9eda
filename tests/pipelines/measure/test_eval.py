"""`compressor eval`: its document and tables, what it keeps, what it refuses."""

import io
import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import compressor.pipelines.measure as room
from compressor.errors import DataError, RecipeError
from compressor.linear import linears
from compressor.pipelines import checkpoint, cli, cli_eval, compress, data, evaluate, load, tools, write
from compressor.pipelines.measure import cache, compare, divergence, tables
from compressor.pipelines.report import fixed
from compressor.recipe import Quant
from tests.pipelines.commands import call
from tests.pipelines.conftest import make_tokenizer
from tests.pipelines.encoders import make_encoder, sentences, write_tsv

TEXT = "The ship left the harbour at dawn. Question: when? Answer: at dawn, as ships do.\n" * 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    """dense, packed at 4 and 2 bits, two texts, a raw WikiText, and a model of another tokenizer."""
    place = tmp_path_factory.mktemp("eval")
    model.save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    for bits in (4, 2):
        loaded = load.load(str(place / "dense"), "cpu")
        write.round_to_folder(loaded, set(linears(loaded.model)))
        compress.compress(loaded.model, Quant(packer="rtn", bits=bits, group=32), torch.float16, None)
        (place / f"w{bits}").mkdir()
        write.write_folder(loaded, place / f"w{bits}")
    shutil.copytree(place / "dense", place / "foreign")
    words = json.loads((place / "foreign" / "tokenizer.json").read_text())
    words["model"]["merges"] = []
    (place / "foreign" / "tokenizer.json").write_text(json.dumps(words))
    torch.manual_seed(1)
    config = LlamaConfig(**{**model.config.to_dict(), "vocab_size": 330, "max_position_embeddings": 4096})
    LlamaForCausalLM(config).save_pretrained(place / "wide")
    make_tokenizer().save_pretrained(place / "wide")
    (place / "a.txt").write_text(TEXT)
    (place / "b.jsonl").write_text("".join(json.dumps({"text": f"{i}: the harbour at dawn, {i * i} ships"}) + "\n" for i in range(40)))
    (place / "empty.txt").write_text("")
    (place / "one.txt").write_text("T")
    (place / "wiki.test.raw").write_text(" \n = Ships = \n \n" + " The ship left the harbour at dawn . \n" * 400)
    return place


@pytest.fixture(autouse=True)
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cli.console, "width", 200)  # words of a table stay in one piece


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `compressor eval` with some arguments; (document, stderr)."""

    def run(*args: str) -> tuple[dict[str, Any], str]:
        code, out, err = call(monkeypatch, capsys, "eval", *args, "--device", "cpu")
        assert code == 0, err
        return json.loads(out.strip().splitlines()[-1]), err

    return run


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and from then on loading a model fails the test."""

    def refuse(name: str, device: str = "auto") -> None:
        raise AssertionError(f"{name} was loaded")

    return lambda: monkeypatch.setattr(load, "load", refuse)


def test_one_model_and_one_text_keep_the_contract(measure: Any, place: Path) -> None:
    found, err = measure("w4", "--data", "a.txt", "--window", "32")
    loaded = load.load("w4", "cpu")
    wanted = evaluate.measure(loaded.model, loaded.tokenizer, {"text": data.load_text("a.txt")}, 32)
    assert {key: found[key] for key in ("perplexity", "tokens", "window", "stride")} == {
        key: wanted["text"][key] for key in ("perplexity", "tokens", "window", "stride")
    }
    assert found["data_sha256"] == data.load_text("a.txt").sha256 and found["data"] == "a.txt" and found["model"] == "w4"
    assert found["bits_per_weight"] == 4.5 and found["folder_bytes"] == checkpoint.model_bytes(place / "w4") and found["tokens_per_second"] > 0
    assert found["ratio"] == tools.dense_bytes(loaded) / found["folder_bytes"] and found["cached"] is False
    assert found["protocol"] | {"name": "a.txt", "bos": "one text with the tokenizer's own special tokens", "fixed": None} == found["protocol"]
    assert "Windows of 32 tokens, stride 32" in err and found["data_sha256"][:16] in err and f"{found['tokens']} tokens predicted" in err


def test_models_texts_and_a_reference(measure: Any, no_loading: Any, tmp_path: Path) -> None:
    args = ["dense", "w4", "w2", "--data", "a.txt", "--data", "b.jsonl", "--window", "32", "--reference", "dense"]
    found, err = measure(*args, "--markdown", str(tmp_path / "card.md"))
    dense, w4, w2 = found["models"]
    for i in (0, 1):
        near, far = (each["texts"][i]["divergence"] for each in (w4, w2))
        floor = found["reference"]["texts"][i]["floor"]
        assert 0 <= floor["order"]["mean"] < 1e-9 < 1e-7 < floor["rounding"]["mean"] < near["mean"] < far["mean"]
        assert far["top1"] < near["top1"] < 1
        assert near["loss_change"] == pytest.approx(math.log(w4["texts"][i]["perplexity"] / dense["texts"][i]["perplexity"]), abs=1e-6)
        assert found["reference"]["texts"][i]["perplexity"] == pytest.approx(dense["texts"][i]["perplexity"], rel=1e-6)
        assert "divergence" not in dense["texts"][i] and near["loss_change_stderr"] > 0
    assert [each["data"] for each in w4["texts"]] == ["a.txt", "b.jsonl"] == [each["data"] for each in found["reference"]["texts"]]
    assert w4["texts"][1]["protocol"]["bos"] == "<s> before each document" and found["cached"] is False and "tokens_differ" not in found
    assert all(words in err for words in ("floor: order", "floor: rounding", "KL mean", "a.txt", "b.jsonl"))
    card = (tmp_path / "card.md").read_text()
    assert card.count("| w4 | 4.500 |") == 2 and "| floor: rounding | – |" in card and "KL(reference" in card
    tables = [[line for line in part.splitlines() if line.startswith("|")] for part in card.split("**a.txt**")[1].split("**b.jsonl**")]
    assert all(len({line.replace("\\|", "").count("|") for line in table}) == 1 and len(table) == 8 for table in tables)
    no_loading()
    again, _ = measure(*args)
    assert again["cached"] is True and again["models"][1]["texts"][0]["divergence"]["cached"] is True
    assert again["models"][1]["texts"][0]["tokens_per_second"] == w4["texts"][0]["tokens_per_second"]
    lone, err = measure("w2", "--data", "b.jsonl", "--window", "32", "--reference", "dense")
    assert lone["divergence"]["mean"] == w2["texts"][1]["divergence"]["mean"] and lone["reference"]["floor"]["cached"] is True
    assert "From the cache" in err


def test_another_byte_is_another_model(measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("w4", tmp_path / "mine")
    args = (str(tmp_path / "mine"), "--data", "a.txt", "--window", "32", "--cache", str(tmp_path / "kept"))
    first, _ = measure(*args)
    assert measure(*args)[0]["cached"] is True and not (tmp_path / "cache").exists()
    shutil.copytree("w2", tmp_path / "mine", dirs_exist_ok=True)
    second, _ = measure(*args)
    assert second["cached"] is False and second["perplexity"] != first["perplexity"]
    for entry in (tmp_path / "kept").iterdir():
        entry.write_text(entry.read_text()[:-30])
    third, _ = measure(*args)
    assert third["cached"] is False and third["perplexity"] == second["perplexity"]
    monkeypatch.setattr(cache, "__version__", "other")
    assert measure(*args)[0]["cached"] is False
    before = sorted(path.read_text() for path in (tmp_path / "kept").iterdir())
    assert measure(*args[:-2], "--no-cache")[0]["cached"] is False
    assert before == sorted(path.read_text() for path in (tmp_path / "kept").iterdir()) and not (tmp_path / "cache").exists()


def test_protocols_and_strides(measure: Any) -> None:
    found, err = measure(
        "wide", "--protocol", "wikitext2-2048=wiki.test.raw", "--data", "a.txt", "--window", "64", "--stride", "16", "--max-tokens", "4096"
    )
    own, wiki = found["texts"]
    assert (own["window"], own["stride"], own["tokens"]) == (64, 16, 63 + 16 * ((min(4096, tokens_of("a.txt")) - 64) // 16))
    assert (wiki["window"], wiki["stride"], wiki["tokens"]) == (2048, 2048, 2 * 2047)
    assert wiki["protocol"]["fixed"] == "wikitext2-2048" and wiki["protocol"]["own_data"] is True
    assert wiki["protocol"]["name"] == "wikitext2-2048, first 4096 tokens on wiki.test.raw"
    told = " ".join(err.split())
    assert "whether it is that of the protocol was not checked" in told and "stride 16" in told


def tokens_of(name: str) -> int:
    return len(evaluate.stream(data.load_text(name), load.load_tokenizer(Path("wide"))))


def test_the_smallest_model_decides_the_window(measure: Any) -> None:
    found, err = measure("dense", "wide", "--data", "a.txt", "--max-tokens", "512")
    assert [model["window"] for model in found["models"]] == [128, 128] and "tokens_differ" not in found
    found, err = measure("dense", "foreign", "--data", "a.txt", "--max-tokens", "512")
    assert found["tokens_differ"] is True and "do not compare" in err


def test_auto_finds_the_dense_model(measure: Any, place: Path, tmp_path: Path) -> None:
    shutil.copytree("w4", tmp_path / "packed")
    shutil.copytree("dense", tmp_path / "base")
    report = {"compressor": "1", "keys": "x", "model": {"source": "base", "dense_bytes": checkpoint.model_bytes(place / "dense")}}
    (tmp_path / "packed" / "report.json").write_text(json.dumps(report))
    found, _ = measure(str(tmp_path / "packed"), "--reference", "auto", "--data", "a.txt", "--window", "32")
    assert found["reference"]["model"] == str(tmp_path / "base") and found["divergence"]["mean"] > 0
    sides = [compare.Side.of(str(tmp_path / "packed"), "cpu")]
    report["model"]["dense_bytes"] = 7
    (tmp_path / "packed" / "report.json").write_text(json.dumps(report))
    with pytest.raises(RecipeError, match="was made from base, which is neither beside it nor fetched already"):
        compare.find_reference("auto", sides)
    report["model"]["source"] = "tiny"
    (tmp_path / "packed" / "report.json").write_text(json.dumps(report))
    assert compare.find_reference("auto", sides) == "tiny" and compare.find_reference("x", sides) == "x"
    with pytest.raises(RecipeError, match="no folder has a report.json"):
        compare.find_reference("auto", [compare.Side.of("w4", "cpu")])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """measure.tasks, without lm-eval; what was asked of it."""
    asked: list[tuple[Any, ...]] = []
    module = ModuleType("compressor.pipelines.measure.tasks")

    def check(names: Any) -> None:
        if "nosuch" in names:
            raise RecipeError("there is no task 'nosuch'")

    def run(loaded: Any, names: Any, limit: int = 0, shots: int = 0, seed: int = 42, progress: Any = None) -> dict[str, Any]:
        asked.append((loaded.name, tuple(names), limit, shots, seed))
        progress(names[0], 1, 2)
        return {name: {"metric": "accuracy", "value": 0.5, "stderr": 0.05, "examples": 100, "shots": shots, "engine": "none 1"} for name in names}

    def reach(names: Any, shots: int) -> None:
        if "far" in names:
            raise DataError("the hub does not answer")

    def digest(names: Any, shots: int) -> str:
        if shots > 2:
            raise RecipeError("there are only 2 examples")
        return f"{shots}-" + "-".join(names)

    vars(module).update(check=check, measure=run, digest=digest, reach=reach)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(room, "tasks", module, raising=False)
    return asked


def test_tasks(measure: Any, stand_in: list[tuple[Any, ...]], no_loading: Any) -> None:
    args = ["w4", "w2", "--tasks", "a.json, b.json", "--limit", "9", "--shots", "2", "--seed", "3"]
    found, err = measure(*args)
    assert stand_in == [(model, (task,), 9, 2, 3) for model in ("w4", "w2") for task in ("a.json", "b.json")]
    assert "texts" not in found["models"][0] and "perplexity" not in found["models"][0] and found["models"][1]["tasks"]["b.json"]["value"] == 0.5
    assert "0.500 ± 0.050" in err and "a.json: accuracy, 100 examples, 2 shots" in err and "none 1" in err
    lone, err = measure("w4", "--tasks", "a.json", "--limit", "9", "--shots", "2", "--seed", "3", "--data", "b.jsonl", "--window", "32")
    assert lone["tasks"]["a.json"]["cached"] is True and lone["perplexity"] > 1 and lone["cached"] is False and len(stand_in) == 4
    measure("w4", "--tasks", "a.json", "--limit", "8")
    assert len(stand_in) == 5
    no_loading()
    again, _ = measure("w4", "--tasks", "a.json", "--limit", "8")
    assert again["cached"] is True and again["tasks"]["a.json"]["value"] == 0.5 and "perplexity" not in again


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["dense", "--protocol", "wikitext2-1024"], "protocol 'wikitext2-1024' is unknown"),
        (["dense", "--protocol", "wikitext2-2048=wiki.test.raw"], "windows of 2048 tokens, more than dense was made for"),
        (["wide", "dense", "--data", "c4=a.txt"], "windows of 2048 tokens, more than dense was made for"),
        (["dense", "--data", "a.txt", "--window", "129"], "window=129 is more than the 128 tokens"),
        (["wide", "--data", "a.txt", "--window", "1024", "--reference", "dense"], "window=1024 is more than the 128 tokens"),
        (["dense", "--window", "1"], "window=1 must be at least 2"),
        (["dense", "--data", "a.txt", "--window", "16", "--stride", "17"], "stride=17 must be from 1 to the window's 16"),
        (["dense", "--data", "a.txt", "--stride", "200"], "stride=200 must be from 1 to the window's 128"),
        (["dense", "--data", "a.txt", "--stride", "0"], "stride=0 must be"),
        (["wide", "--protocol", "c4=a.txt", "--window", "64"], "--window says how to cut a text of --data"),
        (["wide", "--protocol", "c4=a.txt", "--stride", "64"], "--stride says how to cut a text of --data"),
        (["dense", "--data", "empty.txt"], "empty.txt holds no text"),
        (["dense", "--data", "one.txt"], "one.txt: a text of 1 token leaves nothing to predict"),
        (["dense", "--data", "nowhere.txt"], "there is no file or folder"),
        (["dense", "--max-tokens", "1"], "max_tokens=1"),
        (["dense", "./nowhere"], "there is no model folder ./nowhere"),
        (["dense", "--reference", "./nowhere"], "there is no model folder ./nowhere"),
        (["dense", "--reference", "auto"], "finds no single dense model"),
        (["dense", "--reference", "wide"], "dense knows 320 tokens and the reference wide 330"),
        (["dense", "--reference", "foreign", "--data", "a.txt"], "into different tokens: a divergence needs one tokenizer"),
        (["dense", "--tasks", "nosuch"], "there is no task 'nosuch'"),
        (["dense", "--tasks", "x", "--limit", "-1"], "limit=-1"),
        (["dense", "--tasks", "a.json,far"], "the hub does not answer"),
        (["dense", "--tasks", "a.json", "--shots", "3"], "there are only 2 examples"),
        (["dense", "--tasks", ","], "--tasks ',' names no task"),
        (["dense", "--limit", "0"], "--limit says how tasks are asked, and there are none"),
        (["dense", "--shots", "2"], "--shots says how tasks are asked"),
        (["dense", "--seed", "42"], "--seed says how tasks are asked"),
        (["dense", "--data", "a.txt", "--data", "one.txt"], "one.txt: a text of 1 token leaves nothing to predict"),
        (["dense", "--markdown", "nowhere/t.md"], "there is no folder 'nowhere'; make it first"),
        (["dense", "--markdown", "dense"], "is a folder; give the name of a file"),
        (["dense", "--cache", "x", "--no-cache"], "leave one out"),
        (["bert", "dense", "--data", "rows.tsv"], "give one kind in a call"),
        (["bert"], "give them with --data"),
        (["bert", "--data", "rows.tsv", "--data", "rows.tsv"], "give them with --data"),
        (["bert", "--data", "rows.tsv", "--reference", "bert"], "--reference means nothing to an encoder"),
        (["bert", "--data", "rows.tsv", "--protocol", "c4"], "--protocol means nothing to an encoder"),
    ],
)
def test_refusals(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stand_in: Any, args: list[str], words: str
) -> None:
    if "bert" in args and not (place / "bert").exists():
        make_encoder(place / "bert", "BertForSequenceClassification", num_labels=2)
        write_tsv(place / "rows.tsv", sentences(8))

    def measured(*_: Any, **options: Any) -> None:
        raise AssertionError("something was measured first")

    for name in ("perplexity", "compare", "floor"):
        monkeypatch.setattr(evaluate if name == "perplexity" else divergence, name, measured)
    code, out, err = call(monkeypatch, capsys, "eval", *args, "--device", "cpu")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and not out and len(errors) == 1 and words in errors[0], err


def test_several_models_with_one_text_look_like_one(measure: Any) -> None:
    args = ("--data", "a.txt", "--window", "32", "--reference", "dense")
    one, _ = measure("w4", *args)
    both, _ = measure("w4", "w2", *args)
    assert set(both["models"][0]) == set(one) - {"reference"} and both["models"][0]["perplexity"] == one["perplexity"]
    assert both["reference"]["floor"]["order"] == one["reference"]["floor"]["order"] and set(both) == {"models", "cached", "reference"}


def test_a_terminal_of_80_columns_breaks_no_number(measure: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli.console, "width", 80)
    place = tmp_path / "a-model-of-a-long-name-w2"
    shutil.copytree("w2", place)
    found, err = measure("dense", str(place), "--data", "a.txt", "--window", "32", "--reference", "dense")
    lines = err.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    heads = [line.split() for line in lines if line.startswith("model ")]
    assert heads[0] == ["model", "bits/weight", "size", "ratio", "perplexity"]
    assert heads[1] == ["model", "Δ", "loss", "KL", "mean", "median", "p90", "p99", "max", "top-1"] and len(heads) == 2
    told = found["models"][1]
    for cell in (*tables._differences(told["divergence"]), *tables._differences(found["reference"]["floor"]["order"])):
        assert any(cell in line for line in lines), cell
    assert fixed(told["perplexity"]) in err


def test_many_tasks_stand_in_several_tables() -> None:
    score = {"value": 0.0, "stderr": 0.0, "low": 0.0, "high": 0.037, "metric": "accuracy", "examples": 100, "shots": 0, "engine": "none 1"}
    names = [f"somewhere/a long folder/task-{i}.json" for i in range(7)]
    document = {"model": "m", "bits_per_weight": 3.0, "folder_bytes": 10**9, "ratio": 4.0, "tasks": dict.fromkeys(names, score), "cached": False}
    text = io.StringIO()
    Console(file=text, width=80).print(tables.shown(document))
    assert text.getvalue().count("0.000 [0.000, 0.037]") == 7 and "95 % (Wilson)" in text.getvalue()


def test_a_floor_that_lacks_a_line_is_measured_again(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    args = ("w4", "--data", "a.txt", "--window", "32", "--max-tokens", "256", "--reference", "dense")
    with monkeypatch.context() as patch:
        patch.setattr(divergence, "recomputed", full)
        lacking, err = measure(*args)
    assert "does not fit" in lacking["reference"]["floor"]["rounding"]["missing"] and "does not fit" in " ".join(err.split())
    found, _ = measure(*args)
    assert found["reference"]["floor"]["rounding"]["mean"] > 0 and found["divergence"]["cached"] is True
    assert measure(*args)[0]["cached"] is True


def test_the_document_is_out_before_the_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> None:
        raise DataError("the disk is full")

    monkeypatch.setattr(tables, "markdown", fail)
    code, out, err = call(monkeypatch, capsys, "eval", "w4", "--data", "a.txt", "--window", "32", "--markdown", "t.md", "--device", "cpu")
    assert code == 2 and json.loads(out)["perplexity"] > 1 and "the disk is full" in err


def test_encoders_one_or_several(measure: Any, place: Path) -> None:
    if not (place / "bert").exists():
        make_encoder(place / "bert", "BertForSequenceClassification", num_labels=2)
        write_tsv(place / "rows.tsv", sentences(8))
    one, err = measure("bert", "--data", "rows.tsv")
    both, _ = measure("bert", "bert", "--data", "rows.tsv")
    assert one["examples"] == 8 and 0 <= one["accuracy"] <= 1 and "accuracy" in err
    assert [model | {"seconds": one["seconds"]} for model in both["models"]] == [one, one]


def test_where_measurements_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cli_eval.cache_folder() == Path("/somewhere/compressor/eval")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert cli_eval.cache_folder() == Path("/home/me/.cache/compressor/eval")
