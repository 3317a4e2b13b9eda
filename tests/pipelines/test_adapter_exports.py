"""Exports of folders with an adapter: folded into dense weights exactly, absorbed by packed ones with the loss measured, or refused."""

import json
import weakref
from pathlib import Path
from typing import Any

import peft as library
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compressor.errors import DataError, ModelError, RecipeError, UserError
from compressor.export import dense
from compressor.integrations import peft
from compressor.linear import find_blocks, linears, packed_linears
from compressor.pipelines import adapters, checkpoint, compress, export, load, projection, write, writers
from compressor.recipe import Quant, Tune
from tests.pipelines.commands import call
from tests.pipelines.pruned import logits, source, text, theirs
from tests.prune.helpers import pack
from tests.tolerances import RELATIVE, error

IDS = text()
TEXT = "\n".join(f"The ship {i} left the harbour at dawn. Below is an instruction that describes a task." for i in range(60))


def beside(folder: Path, kind: str, size: float = 0.05) -> Path:
    """Writes an adapter of this kind with random values beside the packed model of the folder."""
    loaded = load.load(str(folder), "cpu")
    tuner = peft.KINDS[kind](Tune(method=kind, rank=4))
    parameters = tuner.attach(loaded.model)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(size * torch.randn_like(parameter))
    tuner.detach(loaded.model)
    loaded.adapter = tuner.model
    write.write_adapter(loaded, folder, "base")
    return folder


def base(place: Path, tokenizer: Any, table: bool = False, sparse: bool = False) -> Path:
    """A packed Qwen2, whose attention has biases, as a folder; `sparse`: half of its weights are pruned."""
    loaded = load.load(str(source(place / "dense", tokenizer, "qwen2", dtype=torch.float16)), "cpu")
    if sparse:
        for layer in linears(find_blocks(loaded.model)[1]).values():
            layer.weight.data[layer.weight.abs() < layer.weight.abs().median()] = 0
        compress.compress(loaded.model, Quant(bits=4, group=16, packer="rtn"), torch.float16, None, keep_zeros=True)
    else:
        pack(loaded.model, table=table)
    write.write_folder(loaded, place / "packed", sparse=sparse)
    return place / "packed"


@pytest.fixture
def packed(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return base(tmp_path, tokenizer)


def target(to: str, **options: Any) -> projection.Target:
    return projection.Target(to, **{"device": "cpu"} | options)


def absorbing(**options: Any) -> projection.Target:
    return target("compressed-tensors", **{"data": "text.txt", "window": 16} | options)


def alone(folder: Path) -> torch.Tensor:
    """Logits of the base without its adapter."""
    loaded = load.load(str(folder), "cpu")
    with peft.set_aside(loaded):
        return logits(loaded.model, IDS)


@pytest.mark.parametrize("kind", peft.KINDS)
def test_every_kind_folds_exactly(packed: Path, tmp_path: Path, kind: str) -> None:
    beside(packed, kind)
    document, shown = export.export(str(packed), tmp_path / "out", target("float32"))
    wanted = logits(load.load(str(packed), "cpu").model, IDS)
    assert error(logits(theirs(tmp_path / "out"), IDS), wanted) < RELATIVE[torch.float32]
    assert error(alone(packed), wanted) > 100 * RELATIVE[torch.float32]
    assert document["exact"] and document["verified"] and shown.row_count == len(packed_linears(load.load(str(packed), "cpu").model))
    assert document["adapter"]["kind"] == kind
    assert "is folded into the weights" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "adapter").exists()


def test_one_layer_is_dense_at_a_time(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside(packed, "lora")
    folded, alive, real = [], [], adapters.fold

    def counting(wrapper: Any) -> nn.Linear:
        alive.append(sum(ref() is not None for ref in folded))
        made = real(wrapper)
        folded.append(weakref.ref(made))
        return made

    monkeypatch.setattr(adapters, "fold", counting)
    document, _ = export.export(str(packed), tmp_path / "out", target("bf16"))
    layers = len(packed_linears(load.load(str(packed), "cpu").model))
    assert len(alive) == 2 * layers and not any(alive), "each is folded once to be written and once to be proven"
    assert 0 < document["error"]["mean"] < document["error"]["largest"] <= 2**-8


def test_the_disk_has_room_for_what_is_folded(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside(packed, "lora")
    asked: list[int] = []
    monkeypatch.setattr(export, "check_room", lambda _place, need: asked.append(need))
    export.export(str(packed), tmp_path / "out", target("bf16"))
    shapes = [layer.packed().shape for layer in packed_linears(load.load(str(packed), "cpu").model).values()]
    assert set(asked) == {checkpoint.model_bytes(packed) + 2 * sum(n * k for n, k in shapes)}
    assert min(asked) > checkpoint.model_bytes(tmp_path / "out")


def test_a_wrapper_is_as_before_folding(packed: Path) -> None:
    loaded = load.load(str(beside(packed, "ia3")), "cpu")
    before, made = logits(loaded.model, IDS), loaded.adapter
    wrappers = adapters.take_off(loaded)
    assert not torch.equal(logits(loaded.model, IDS), before) and loaded.adapter is None
    name = next(name for name in wrappers if name.endswith("q_proj"))
    changed = adapters.fold(wrappers[name])
    assert changed.bias is not None and not torch.equal(changed.bias, wrappers[name].base_layer.bias)
    assert torch.equal(changed.weight, adapters.fold(wrappers[name]).weight)
    peft.put_back(loaded.model, wrappers, made)
    assert torch.equal(logits(loaded.model, IDS), before)


def test_a_changed_bias_is_stored_as_a_run_stores_it(packed: Path, tmp_path: Path) -> None:
    """It is rounded when it is taken up, so that the folder proves to hold what was measured."""
    loaded = load.load(str(beside(packed, "ia3")), "cpu")
    facts = adapters.take_up(loaded, Quant(bits=4, packer="rtn"), None, IDS, lambda: 1.0, 0.0)
    assert facts["absorbed"] and facts["rise"] == 0
    write.write_folder(loaded, tmp_path / "out")
    assert torch.equal(logits(load.load(str(tmp_path / "out"), "cpu").model, IDS), logits(loaded.model, IDS))


def test_an_adapter_that_costs_too_much_comes_back(packed: Path) -> None:
    loaded = load.load(str(beside(packed, "ia3")), "cpu")
    before, made, values = logits(loaded.model, IDS), loaded.adapter, iter((1.0, 2.0))
    facts = adapters.take_up(loaded, Quant(bits=4, packer="rtn"), None, IDS, lambda: next(values), 0.5)
    assert not facts["absorbed"] and loaded.adapter is made and torch.equal(logits(loaded.model, IDS), before)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "miss"])
def test_compressed_tensors_absorb_it_with_the_loss(packed: Path, tmp_path: Path, kind: str) -> None:
    beside(packed, kind, 0.2)
    document, shown = export.export(str(packed), tmp_path / "out", absorbing())
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    again, was = load.load(str(tmp_path / "out"), "cpu"), load.load(str(packed), "cpu")
    names = packed_linears(again.model)
    assert again.adapter is None and again.config["quantization_config"]["quant_method"] == "compressed-tensors"
    wanted, untuned = logits(was.model, IDS), alone(packed)
    assert error(logits(again.model, IDS), wanted) < error(untuned, wanted) / 2
    assert shown.row_count == len(names) == sum(document["adapter"]["ways"].values())
    for row in record["layers"]:
        assert 0 < row["error"] < row["dropped"] and (row["bits"], row["group"], row["symmetric"]) == (4, 16, False)
        assert row["way"] in document["adapter"]["ways"] and row["note"] == f"absorbed by {row['way']}"
    found = document["perplexity"]
    assert not document["exact"] and found["growth"] == pytest.approx(found["after"] / found["before"] - 1)
    assert (found["protocol"]["name"], found["protocol"]["window"]) == ("text.txt [test]", 16)
    assert document["adapter"]["calibration"] | {"windows": 0} == {"name": "text.txt [train]", "windows": 0, "seqlen": 16}
    assert "adapter was absorbed: perplexity" in (tmp_path / "out" / "README.md").read_text()
    biases = {name for name in load_file(packed / "model.safetensors") if name.endswith(".bias")}
    stored, old = load_file(tmp_path / "out" / "model.safetensors"), load_file(packed / "model.safetensors")
    assert biases and all(torch.equal(stored[name], old[name]) is (kind != "ia3") for name in biases)
    assert all(stored[name].dtype == old[name].dtype for name in biases)


def test_the_change_of_logits_is_that_of_the_windows(packed: Path, tmp_path: Path) -> None:
    beside(packed, "lora", 0.2)
    loaded = load.load(str(packed), "cpu")
    corpus = projection.data.load("text.txt").train
    ids = projection.data.calibration(corpus, loaded.tokenizer, 16, 128, 42)[: adapters.PROBE]
    document, _ = export.export(str(packed), tmp_path / "out", absorbing())
    change = (logits(load.load(str(tmp_path / "out"), "cpu").model, ids) - logits(loaded.model, ids)).abs().max()
    assert document["adapter"]["max_logit_change"] == pytest.approx(float(change), rel=1e-3)


def test_a_loss_too_large_is_refused_and_nothing_is_written(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside(packed, "lora", 0.2)
    real = projection.evaluate.measure
    growing = iter((1.0, 1.1))

    def measure(*args: Any) -> dict[str, Any]:
        found = real(*args)
        found["text"]["perplexity"] = next(growing)
        return found

    monkeypatch.setattr(projection.evaluate, "measure", measure)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"by 10\.00%, and --max-loss allows 5\.00%; nothing was written: --to bf16"):
        export.export(str(packed), tmp_path / "out", absorbing(max_loss=0.05))
    assert sorted(tmp_path.rglob("*")) == before


def test_options_of_the_folders_own_recipe_are_heeded(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside(packed, "lora")
    seen: list[Any] = []
    real = adapters.take_up

    def seeing(loaded: Any, quant: Any, ids: torch.Tensor, *rest: Any) -> dict[str, Any]:
        seen.append((quant.packer, quant.damp, len(ids), ids.shape[1]))
        return real(loaded, quant, ids, *rest)

    monkeypatch.setattr(adapters, "take_up", seeing)
    recipes = [{"quant": {"packer": "rtn", "damp": 0.5}, "data": {"nsamples": 3, "seqlen": 8}}, {"quant": {"damp": "much"}}]
    for i, recipe in enumerate(recipes):
        (packed / "report.json").write_text(json.dumps({"compressor": "1", "keys": "k", "recipe": recipe}))
        export.export(str(packed), tmp_path / f"out{i}", absorbing(window=None if i == 0 else 16))
    assert seen[0] == ("gptq", 0.5, 3, 8) and seen[1][:2] == ("gptq", 0.01) and seen[1][3] == 16


def test_the_text_is_the_one_that_the_adapter_learnt(packed: Path, tmp_path: Path) -> None:
    beside(packed, "lora")
    with pytest.raises(RecipeError, match="no report says what text the adapter was trained on: name it with --data"):
        export.export(str(packed), tmp_path / "out", absorbing(data=None))
    for name, words in (("text.txt", ""), ("gone.txt", "trained on gone.txt, and .*: name that text with --data")):
        recipe = {"data": {"data": name}, "tune": {"method": "lora"}}
        (packed / "report.json").write_text(json.dumps({"compressor": "1", "keys": "k", "recipe": recipe}))
        if not words:
            document, _ = export.export(str(packed), tmp_path / "out", absorbing(data=None))
            assert document["perplexity"]["protocol"]["name"] == "text.txt [test]"
            assert document["adapter"]["calibration"]["name"] == "text.txt [train]"
            continue
        with pytest.raises(DataError, match=words):
            export.export(str(packed), tmp_path / "none", absorbing(data=None))


@pytest.mark.parametrize(("args", "words"), [
    (["--bits", "4"], "--bits is for the projection of tables, and packed holds scales, whose grids an absorbed adapter keeps"),
    (["--asym"], "--sym or --asym is for the projection of tables"),
    (["--data", "missing.txt"], "there is no file or folder 'missing.txt'"), (["--data", "text.txt", "--window", "9999"], "window=9999 is more than"),
    (["--data", "short.txt", "--window", "64"], "an adapter is absorbed on calibration windows, and short.txt [train] has"),
    (["--max-loss", "-1"], "max-loss=-1"),
])  # fmt: skip
def test_bad_inputs(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    beside(packed, "lora")
    (tmp_path / "short.txt").write_text("a b c d e f g h i j k l m n o p")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(monkeypatch, capsys, "export", "packed", "--to", "compressed-tensors", "-o", "out", "--device", "cpu", *args)
    assert (code, out) == (2, "") and words in " ".join(err.split()) and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_tables_with_an_adapter_are_folded_but_not_projected(tmp_path: Path, tokenizer: Any) -> None:
    folder = beside(base(tmp_path, tokenizer, table=True), "lora")
    with pytest.raises(ModelError, match="holds tables with an adapter beside them: export --to bf16, which folds it in"):
        export.export(str(folder), tmp_path / "out", target("compressed-tensors"))
    assert not (tmp_path / "out").exists()
    export.export(str(folder), tmp_path / "out", target("float32"))
    assert error(logits(theirs(tmp_path / "out"), IDS), logits(load.load(str(folder), "cpu").model, IDS)) < RELATIVE[torch.float32]


@pytest.mark.parametrize("to", ["bf16", "compressed-tensors"])
def test_what_packed_linears_cannot_take_up_is_refused(packed: Path, tmp_path: Path, to: str) -> None:
    loaded, words = load.load(str(packed), "cpu"), "changes lm_head, which is no packed linear"
    loaded.adapter = library.get_peft_model(loaded.model, library.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    before = logits(loaded.model, IDS)
    write.write_adapter(loaded, packed, "base")
    with pytest.raises(ModelError, match=words):
        export.export(str(packed), tmp_path / "out", target(to) if to == "bf16" else absorbing())
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match=words):
        adapters.take_off(loaded)
    assert loaded.adapter is not None and torch.equal(logits(loaded.model, IDS), before)


def test_what_was_pruned_stays_zero(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    folder = beside(base(tmp_path, tokenizer, sparse=True), "lora", 0.2)
    zeros = {name.removesuffix(".base_layer"): w.dequantize() == 0 for name, w in load.packed_weights(load.load(str(folder), "cpu").model).items()}
    document, _ = export.export(str(folder), tmp_path / "out", absorbing())
    assert set(document["adapter"]["ways"]) == {"values"}
    for name, layer in packed_linears(load.load(str(tmp_path / "out"), "cpu").model).items():
        assert zeros[name].float().mean() >= 0.4 and not layer.packed().dequantize()[zeros[name]].any()


def test_names_of_dense_formats() -> None:
    assert set(dense.DTYPES) < set(writers.DTYPES) and set(writers.DTYPES) == {"bf16", "float16", "float32"}
