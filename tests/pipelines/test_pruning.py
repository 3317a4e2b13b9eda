"""The pruning stage: plans, training, folders that others load, whole runs with resume, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from compressor.errors import ModelError, RecipeError
from compressor.linear import packed_linears
from compressor.pipelines import estimate, job, load, pruning, write
from compressor.prune.importance import FullGradients, LoraGradients, PaperGradients
from compressor.prune.slicing import WIDTHS, drop_blocks
from compressor.prune.widths import prunable
from compressor.tune import loop
from compressor.tune.state import CHECKPOINT
from tests.pipelines.commands import call
from tests.pipelines.pruned import logits, objective, options, ours, source, text, theirs, whole
from tests.prune.helpers import causal, pack
from tests.tolerances import RELATIVE, error


class Killed(Exception):
    """Stands for a crash."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return source(tmp_path_factory.mktemp("source"), tokenizer)


def prune(folder: Path, **keys: Any) -> tuple[load.Loaded, dict[str, Any], Any]:
    loaded = load.load(str(folder), "cpu")
    facts, log = pruning.prune(loaded, options(**keys), objective(), 5)
    return loaded, facts, log


# --- the stage -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [
    {}, {"estimate": "paper", "parts": "all", "start": "random"}, {"method": "taylor"}, {"method": "wanda", "unit": "query"},
    {"method": "magnitude", "one_shot": True}, {"method": "depth"}, {"method": "depth", "one_shot": True}, {"uniform": False},
    {"method": "obert", "pattern": "structured"}, {"method": "magnitude", "pattern": "structured", "every": 5, "end": 1.0, "begin": 0.0},
])  # fmt: skip
def test_every_method_reaches_the_ratio_that_was_planned(folder: Path, keys: dict[str, Any]) -> None:
    planned = pruning.plan(estimate.shell(folder), options(**keys))
    loaded, facts, log = prune(folder, **keys)
    before = prunable(causal(keys=4))
    assert facts | planned.facts() == facts and facts["prunable"] == before
    assert 1 - prunable(loaded.model) / before == pytest.approx(facts["ratio"], abs=1e-12) and abs(facts["ratio"] - 0.4) < 0.11
    assert not packed_linears(loaded.model) and not any("base" in name for name, _ in loaded.model.named_modules())
    shell = pruning.shell_after(folder, options(**keys))
    if keys.get("uniform", True):
        assert {n: p.shape for n, p in shell.named_parameters()} == {n: p.shape for n, p in loaded.model.named_parameters()}
    if keys.get("method") != "obert":
        assert facts["steps"] == log.steps == 12 and facts["tokens"] == sum(row["tokens"] for row in log.curve) > 0
        assert facts["trainable"] == 3 * 2 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 48)) and not facts["packed_base"]
        assert facts["last_prune"] == (10 if keys.get("one_shot") else 11 if keys.get("end") == 1.0 else round(0.9 * 12))
    config = loaded.model.config
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers", "head_dim"):
        assert loaded.config[key] == getattr(config, key)
    assert loaded.config.get(WIDTHS) == getattr(config, WIDTHS, None) and (WIDTHS in loaded.config) == (keys.get("uniform") is False)


def test_the_method_decides_what_is_scored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = pruning.UnitPruner
    monkeypatch.setattr(pruning, "UnitPruner", lambda *args: made.append((type(args[4]), args[6], args[8])) or real(*args))
    for keys in ({}, {"estimate": "paper"}, {"parts": "all"}, {"method": "taylor"}, {"method": "taylor", "parts": "gate", "uniform": False}):
        prune(folder, steps=2, **keys)
    assert [m[0] for m in made] == [LoraGradients, PaperGradients, LoraGradients, FullGradients, FullGradients]
    assert [m[1] for m in made] == [True, True, True, True, False]
    assert [m[2] for m in made] == [True, True, False, False, True]


def test_starts_align_or_do_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(pruning.lowrank, "align", lambda *args: calls.append(1))
    prune(folder, steps=2, start="random")
    assert not calls
    prune(folder, steps=2)
    assert calls == [1]


@pytest.mark.parametrize("method", ["magnitude", "depth"])
def test_a_last_step_that_was_dropped_does_not_lose_the_prune(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    real = loop._gradient
    monkeypatch.setattr(loop, "_gradient", lambda *args: (0.0, "it was told to") if args[3] == 11 else real(*args))
    loaded, facts, log = prune(folder, method=method, end=1.0)
    assert len(log.notes) >= 1 and "it was told to" in log.notes[0]
    assert 1 - prunable(loaded.model) / prunable(causal(keys=4)) == pytest.approx(facts["ratio"], abs=1e-12)


def test_a_packed_base_is_pruned_and_comes_out_dense(folder: Path) -> None:
    loaded = load.load(str(folder), "cpu")
    pack(loaded.model)
    codes = {name: layer.words.clone() for name, layer in packed_linears(loaded.model).items()}
    facts, log = pruning.prune(loaded, options(), objective(), 5)
    assert len(codes) == 21 and facts["packed_base"] and not packed_linears(loaded.model) and facts["heads"] < 8
    assert log.curve[-1]["loss"] < log.curve[0]["loss"] + 1 and "quantization_config" not in loaded.config
    for keys in ({"method": "taylor"}, {"method": "obert"}, {"method": "obert", "pattern": "structured"}, {"method": "magnitude", "pattern": "2:4"}):
        loaded = load.load(str(folder), "cpu")
        with pytest.raises(ModelError, match="is packed, and codes have no gradient: prune whole units of it by loraprune"):
            pruning.prune(replace(loaded, model=pack(loaded.model)), options(**keys), objective(), 5)


def test_what_the_user_should_know_is_noted(folder: Path) -> None:
    _, _, log = prune(folder, steps=2, uniform=False)
    assert any("only compressor loads this folder" in note for note in log.notes)
    _, facts, log = prune(folder, steps=2, ratio=0.17, multiple=48)
    assert facts["asked"] == 0.17 and log.notes == [
        f"17.0% was asked for; the nearest that heads, channels or blocks allow in their steps is {facts['ratio']:.1%}"
    ]
    assert prune(folder, steps=2, method="depth", ratio=1 / 3)[2].notes == []


# --- folders -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "keys", "config"), [
    ("llama", {}, {}), ("llama", {"unit": "query"}, {}), ("qwen2", {}, {}), ("qwen3", {"unit": "group"}, {}), ("llama", {"method": "depth"}, {}),
    ("gemma2", {"method": "depth"}, {"query_pre_attn_scalar": 16, "num_hidden_layers": 5, "sliding_window": 4}),
    ("qwen3", {"method": "depth"}, {"num_hidden_layers": 5, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 4}),
])  # fmt: skip
def test_stock_transformers_loads_the_folder(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, kind: str, keys: dict[str, Any], config: dict[str, Any]
) -> None:
    if "num_hidden_layers" in config:  # those that stay must not be of the kinds that the first three are
        monkeypatch.setattr(pruning.DepthPruner, "keep", lambda self: [1, 2, 4])
    start = source(tmp_path / "in", tokenizer, kind, **config)
    raw = json.loads((start / "config.json").read_text())
    raw.pop("layer_types", None)  # older folders do not list what follows from other keys
    (start / "config.json").write_text(json.dumps(raw))
    loaded, facts, _ = prune(start, **keys)
    write.write_folder(loaded, tmp_path / "out")
    ids = text()
    expected = logits(loaded.model, ids)
    assert facts["ratio"] > 0.2 and error(logits(theirs(tmp_path / "out"), ids), expected) < RELATIVE[torch.float32]
    assert error(logits(ours(tmp_path / "out"), ids), expected) < RELATIVE[torch.float32]
    cut = json.loads((tmp_path / "out" / "config.json").read_text())
    if keys.get("method") == "depth":
        assert cut["num_hidden_layers"] == facts["blocks"] < raw["num_hidden_layers"]
        assert len(cut.get("layer_types", [0] * facts["blocks"])) == facts["blocks"]
    else:
        assert cut["intermediate_size"] == facts["ffn"]


def test_blocks_that_differ_are_for_our_loader_alone(tmp_path: Path, folder: Path) -> None:
    loaded, facts, _ = prune(folder, uniform=False, multiple=2)
    widths = loaded.config[WIDTHS]
    assert sum(widths["ffn"]) == 3 * facts["ffn"] and len(set(widths["ffn"])) > 1
    write.write_folder(loaded, tmp_path / "out")
    ids = text()
    assert error(logits(ours(tmp_path / "out"), ids), logits(loaded.model, ids)) < RELATIVE[torch.float32]
    with pytest.raises(RuntimeError, match="size mismatch|mismatched sizes|ignore_mismatched_sizes"):
        theirs(tmp_path / "out")
    again = load.load(str(tmp_path / "out"), "cpu")
    with pytest.raises(ModelError, match="its blocks differ in width"):
        pruning.prune(again, options(), objective(), 5)
    again, facts, _ = prune(tmp_path / "out", method="depth", ratio=0.34)
    write.write_folder(again, tmp_path / "fewer")
    assert facts["blocks"] == 2 and error(logits(ours(tmp_path / "fewer"), ids), logits(again.model, ids)) < RELATIVE[torch.float32]


# --- refusals ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "match"), [
    ({"method": "magic"}, "pruning method 'magic' is unknown for a causal language model; choose loraprune"),
    ({"pattern": "2:4"}, "loraprune removes whole units, not the pattern 2:4"),
    ({"method": "depth", "ratio": 0.05}, "a depth ratio of 5% takes 0 of 3"),
    ({"steps": 0}, "prune.steps=0 leaves nothing to score units by"), ({"steps": 1}, "prune.steps=1 leaves nothing"),
    ({"method": "depth", "steps": 0}, "prune.steps=0"), ({"method": "obert", "pattern": "2:4", "ratio": 0.6}, "60% cannot be done: the pattern 2:4"),
])  # fmt: skip
def test_plans_that_cannot_be_are_refused(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        pruning.plan(causal(keys=4), options(**keys))


def test_one_step_of_an_epoch_is_no_training(folder: Path) -> None:
    loaded = load.load(str(folder), "cpu")
    with pytest.raises(RecipeError, match="one step of pruning leaves nothing to score units by"):
        pruning.prune(loaded, options(steps=None, epochs=1.0, batch=64), objective(), 5)


@pytest.mark.parametrize(("args", "words"), [
    (["--prune", "magic:20%"], "pruning method 'magic' is unknown"),
    (["--prune", "loraprune:120%"], "asks for 1.2 of the parameters: give a share between 0 and 1"),
    (["--prune", "loraprune"], "--prune 'loraprune' is not understood; write for example loraprune:30%"),
    (["--prune", "loraprune:2:4"], "loraprune removes whole units, not the pattern 2:4"),
    (["--prune", "obert:4:2"], "keeps 4 of 2"),
    (["--quant", "3bit", "--prune-steps", "5"], "--prune-steps says how to prune, and nothing is pruned"),
    (["--quant", "3bit", "--per-layer"], "--per-layer says how to prune, and nothing is pruned"),
    (["--prune", "loraprune:20%", "--tune", "peqa"], "tuner peqa trains what a packer makes, and nothing is packed"),
    (["--prune", "loraprune:20%", "--prune-steps", "0"], "leaves nothing to score units by"),
    (["--prune", "depth:5%"], "a depth ratio of 5% takes 0 of 4 blocks"),
    (["--prune", "obert:80%:4block", "--quant", "sketch3"], "tables, which have no exact zero"),
    (["--prune", "loraprune:20%", "--unit", "row"], "choose auto, group or query"),
    (["--prune", "loraprune:20%", "--multiple", "0"], "must be positive"),
])  # fmt: skip
def test_user_errors_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, "run", "tiny", "-o", "out", "--seqlen", "32", "--device", "cpu", *args)
    assert code == 2 and out == "" and words in " ".join(err.split()), err
    assert "Traceback" not in err and not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


# --- whole runs ----------------------------------------------------------------------------------------------------------------------------

FULL = {"prune__method": "loraprune", "prune__ratio": 0.2, "quant__packer": "gptq", "quant__bits": 3, "tune__method": "peqa"}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """tiny pruned, packed, tuned, unbroken."""
    out = tmp_path_factory.mktemp("full") / "out"
    return out, whole(out, page=True, **FULL)


def test_a_pruned_packed_and_tuned_model_is_an_ordinary_folder(full: tuple[Path, dict[str, Any]]) -> None:
    folder, document = full
    ids = text(vocabulary=2000)
    assert error(logits(theirs(folder), ids), logits(ours(folder), ids)) < 10 * RELATIVE[torch.float32]
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 320
    report = json.loads((folder / "report.json").read_text())
    facts = report["pruning"]
    assert facts["method"] == "loraprune" and facts["asked"] == 0.2 and facts["ratio"] == pytest.approx(0.2083, abs=1e-4)
    assert facts["steps"] == len(facts["curve"]) == 12 and report["pruned"]["bits_per_weight"] == 16.0
    assert report["pruned"]["domain"]["perplexity"] > 1 and report["pruned"]["folder_bytes"] < report["dense"]["folder_bytes"]
    assert document["tuned"]["ratio"] > document["pruned"]["ratio"] > 1 and len(report["layers"]) == 28
    assert "prune" in document["seconds"] and document["resumed"] is False
    assert report["model"]["packed_parameters"] == sum(layer["shape"][0] * layer["shape"][1] for layer in report["layers"])


def test_a_run_killed_while_pruning_resumes_to_the_same_bytes(
    full: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, real, follow, seen = 8, pruning.training, job.follow, []
    monkeypatch.setattr(pruning, "training", lambda o: replace(real(o), checkpoint_every=1))

    def killing(advance: Any) -> Any:
        inner = follow(advance)

        def on_step(row: dict[str, Any]) -> None:
            inner(row)
            seen.append(row["step"])
            if len(seen) == step:
                raise Killed

        return on_step

    monkeypatch.setattr(job, "follow", killing)
    with pytest.raises(Killed):
        whole(tmp_path / "out", **FULL)
    assert not (tmp_path / "out").exists() and list((tmp_path / "out.partial").glob(f"prune-*/{CHECKPOINT}"))
    document = whole(tmp_path / "out", **FULL)
    assert document["resumed"] is True and seen[step] == step, "the step that the checkpoint had not seen yet is the first one done again"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (full[0] / "model.safetensors").read_bytes()
    curves = [json.loads((folder / "report.json").read_text())["pruning"]["curve"] for folder in (full[0], tmp_path / "out")]
    assert curves[0] == curves[1]


def test_lists_by_layer_follow_whatever_a_family_calls_their_number() -> None:
    config = GPTNeoConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        max_position_embeddings=32,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config)
    loaded = load.Loaded(model, None, Path(), "neo", config.to_dict(), torch.float32)
    drop_blocks(model, [0, 3])
    loaded.follow_config()
    assert loaded.config["num_layers"] == 2 and loaded.config["attention_layers"] == ["global", "local"]
    again = GPTNeoConfig.from_dict(json.loads(json.dumps(loaded.config)))
    assert again.attention_layers == ["global", "local"] and len(GPTNeoForCausalLM(again).transformer.h) == 2


def test_pruning_alone_writes_a_dense_folder_also_of_a_packed_one(full: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    document = whole(tmp_path / "out", model=str(full[0]), prune__method="wanda", prune__ratio=0.3)
    assert "packed" not in document and "tuned" not in document and document["pruned"]["bits_per_weight"] == 16.0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pruning"]["packed_base"] and report["export"]["verified"]
    assert report["dense"]["bits_per_weight"] == full[1]["tuned"]["bits_per_weight"] < 3.2
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ids = text(vocabulary=2000)
    assert error(logits(theirs(tmp_path / "out"), ids), logits(ours(tmp_path / "out"), ids)) < RELATIVE[torch.float32]
    assert not any("weight_packed" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    for method in ("taylor", "obert"):
        with pytest.raises(ModelError, match="out is packed, and codes have no gradient"):
            whole(tmp_path / "no", model=str(full[0]), prune__method=method, prune__ratio=0.3)
        assert not (tmp_path / "no.partial").exists(), "refused before any work"


def test_depth_then_quant_is_an_ordinary_folder(tmp_path: Path) -> None:
    document = whole(tmp_path / "out", prune__method="depth", prune__ratio=0.25, quant__packer="rtn", quant__bits=4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and document["packed"]["bits_per_weight"] == 4.125
    ids = text(vocabulary=2000)
    assert error(logits(theirs(tmp_path / "out"), ids), logits(ours(tmp_path / "out"), ids)) < 10 * RELATIVE[torch.float32]


def test_a_per_layer_run_packs_and_says_who_loads_it(tmp_path: Path) -> None:
    changes = {"prune__method": "wanda", "prune__ratio": 0.5, "prune__uniform": False, "prune__multiple": 32, "quant__group": 32}
    whole(tmp_path / "out", quant__packer="rtn", quant__bits=4, **changes)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("only compressor loads" in note for note in report["pruning"]["notes"])
    widths = json.loads((tmp_path / "out" / "config.json").read_text())[WIDTHS]
    loaded = load.load(str(tmp_path / "out"), "cpu")
    found = packed_linears(loaded.model)
    assert [found[f"model.layers.{i}.mlp.down_proj"].in_features for i in range(4)] == widths["ffn"] and len(set(widths["ffn"])) > 1
    assert bool(torch.isfinite(logits(loaded.model, text(vocabulary=2000))).all())
