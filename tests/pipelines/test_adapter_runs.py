"""Adapters around runs: encoders, what is refused before any work, what the Python API refuses, and the script of docs/methods.md."""

import re
from pathlib import Path
from typing import Any

import peft as library
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import compressor
from compressor.errors import ModelError, RecipeError
from compressor.integrations import attach
from compressor.integrations import peft as adapters
from compressor.pipelines import api, encoder_data, encoder_load, encoder_run, evaluate, tuners
from compressor.pipelines.run import Run, dry_run
from compressor.pipelines.show import Show
from compressor.recipe import Recipe, Tune
from tests.pipelines import encoders
from tests.pipelines.pruned import quick, whole

ROOT = Path(__file__).parents[2]
LORA: dict[str, Any] = {"quant__packer": "rtn", "quant__bits": 3, "tune__method": "lora", "tune__rank": 4, "tune__steps": 2}

# --- encoders --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A short run on an encoder with a head, stored in float16."""
    place = tmp_path_factory.mktemp("encoder")
    source = encoders.make_encoder(place / "bert", "BertForSequenceClassification")
    task = place / "train.tsv"
    AutoModelForSequenceClassification.from_pretrained(source).half().save_pretrained(source)
    encoders.write_tsv(task, encoders.sentences(200))
    return Recipe(model=str(source)).with_(device="cpu", data__data=str(task), quant__packer="rtn", quant__group=32, tune__steps=60, tune__batch=16)


def head(folder: Path, task: str) -> dict[str, torch.Tensor]:
    model = encoder_load.load_encoder(str(folder), "cpu", encoder_data.load(task), 0).model
    return {name: p.detach() for name, p in model.named_parameters() if "classifier" in name}


def test_the_head_of_an_encoder_trains_with_the_adapter_and_the_base_stays(bert: Recipe, tmp_path: Path) -> None:
    plain = encoder_run.run(bert, tmp_path / "plain")
    tuned = encoder_run.run(bert.with_(tune__method="lora", tune__lr=5e-3, prune__distill=0.0), tmp_path / "tuned")
    base, same = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "tuned"))
    assert base.keys() == same.keys() and all(torch.equal(base[key], same[key]) for key in base), "the base is not the untuned one"
    assert any("classifier" in key for key in load_file(tmp_path / "tuned" / "adapter" / adapters.WEIGHTS))
    assert tuned["tuned"]["task"]["loss"] < tuned["packed"]["task"]["loss"] and tuned["packed"]["task"]["loss"] == plain["packed"]["task"]["loss"]
    found = encoder_run.evaluate_encoder(str(tmp_path / "tuned"), str(bert.data.data), "cpu", Show())
    assert "sparsity" not in found and found["folder_bytes"] == tuned["tuned"]["folder_bytes"]
    assert found["loss"] == pytest.approx(tuned["tuned"]["task"]["loss"], abs=1e-6)
    assert len(head(tmp_path / "tuned", str(bert.data.data))) == 2 * len(head(tmp_path / "plain", str(bert.data.data)))


def test_an_encoder_absorbs_nothing(bert: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="judged by perplexity, which an encoder has none of"):
        encoder_run.run(bert.with_(tune__method="lora", tune__adapter="absorb"), tmp_path / "out")


# --- before any work ---------------------------------------------------------------------------------------------------------------------------


EARLY: list[tuple[dict[str, Any], str]] = [
    ({"tune__targets": "q_proj,foo"}, "no packed linear is named foo: choose targets among"),
    ({"tune__start": "eva"}, "needs statistics of the inputs"),
    ({"tune__rank": 5000}, "rank=5000 is above the smaller side of a linear, 64"),
    ({"tune__rank": 129, "tune__start": "residual"}, "tune.rank=129 does not fit"),
]


@pytest.mark.parametrize(("keys", "words"), EARLY)
def test_what_the_layers_cannot_have_is_said_before_any_work(
    keys: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "measure", lambda *a, **k: pytest.fail("something was measured"))
    with pytest.raises(RecipeError, match=words):
        whole(tmp_path / "out", **LORA | keys)
    with pytest.raises(RecipeError, match=words):
        dry_run(quick(**LORA | keys), tmp_path / "out", Show())


@pytest.mark.parametrize(("keys", "words"), [
    ({"alpha": float("inf")}, "must be finite"), ({"adapter": "absorb", "absorb_limit": float("nan")}, "must be finite"),
    ({"adapter": "absorb", "absorb_limit": -1.0}, "the limit 0 or more"), ({"absorb_limit": 0.5}, "the adapter is kept: add --adapter absorb"),
    ({"method": "loha", "dropout": 0.1}, "tune.dropout=0.1 means nothing to loha"),
])  # fmt: skip
def test_numbers_that_cannot_work_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        tuners.resolved(Tune(**{"method": "lora"} | keys))


def test_what_becomes_of_an_adapter_does_not_train_it_again(tmp_path: Path) -> None:
    jobs = [Run(quick(**LORA | keys), tmp_path / "out", Show()) for keys in ({}, {"tune__adapter": "absorb"}, {"tune__alpha": 8.0})]
    assert jobs[0].key_tune == jobs[1].key_tune != jobs[2].key_tune
    assert jobs[0].key_tuned != jobs[1].key_tuned


# --- folders and Python --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder with an adapter."""
    place = tmp_path_factory.mktemp("tuned") / "out"
    whole(place, **LORA)
    return place


def test_a_folder_with_an_adapter_is_no_start_of_a_run(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has an adapter beside its packed weights: export it"):
        whole(tmp_path / "out", model=str(tuned), prune__method="magnitude", prune__ratio=0.3)
    with pytest.raises(ModelError, match="has an adapter, which pruning knows nothing of"):
        compressor.load(str(tuned), "cpu").prune(0.3, "magnitude")


def test_python_refuses_what_only_a_run_does() -> None:
    model = compressor.load("tiny", "cpu").compress(bits=4, packer="rtn")
    with pytest.raises(RecipeError, match="start=loftq is found while a model is packed"):
        model.tune(method="lora", start="loftq", steps=1, seqlen=32)
    with pytest.raises(RecipeError, match="adapter=absorb is of runs"):
        model.tune(method="lora", adapter="absorb", steps=1, seqlen=32)
    assert model._loaded.adapter is None


def test_an_adapter_that_peft_attached_is_not_lost(tmp_path: Path) -> None:
    model = compressor.load("tiny", "cpu").compress(bits=4, packer="rtn")
    model.save_task(tmp_path / "t")
    theirs = library.get_peft_model(model.model, library.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        before = theirs(torch.arange(8)[None]).logits
    for call in (
        lambda: model.save(tmp_path / "x"), lambda: model.save_task(tmp_path / "y"), lambda: model.load_task(tmp_path / "t"), model.unload_task,
        lambda: model.tune(method="lora", steps=1, seqlen=32), lambda: model.prune(0.3, "magnitude"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match="has an adapter that peft attached: save it with save_pretrained"):
            call()
    with torch.no_grad():
        assert torch.equal(theirs(torch.arange(8)[None]).logits, before)
    theirs.unload()
    model.load_task(tmp_path / "t")


def test_python_says_what_layers_cannot_have_and_gives_up_cleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressor.load("tiny", "cpu").compress(bits=4, packer="rtn")
    with pytest.raises(RecipeError, match="rank=200 is above the smaller side"):
        model.tune(method="miss", rank=200, steps=1, seqlen=32)

    def failing(*a: Any, **k: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(api, "train", failing)
        model.tune(method="lora", steps=1, seqlen=32)
    assert model._loaded.adapter is None and not attach.wrapped(model.model)
    model.tune(method="peqa", steps=1, seqlen=32)


def test_a_task_carries_the_recipe_of_its_own_tuning(tmp_path: Path) -> None:
    model = compressor.load("tiny", "cpu").compress(bits=4, packer="rtn")
    model.tune(method="peqa", lr=7e-3, steps=1, seqlen=32)
    model.tune(method="lora", rank=2, steps=1, seqlen=32)
    model.unload_task()
    assert model.save_task(tmp_path / "t")["recipe"]["lr"] == 7e-3


def test_a_pruned_folder_keeps_its_zeros_in_python(tmp_path: Path) -> None:
    model = compressor.load("tiny", "cpu")
    model.prune(0.5, "magnitude", pattern="unstructured")
    model.compress(bits=4, packer="rtn").save(tmp_path / "sparse")
    again = compressor.load(str(tmp_path / "sparse"), "cpu")
    with pytest.raises(RecipeError, match="would bring pruned weights back"):
        again.tune(method="qalora", steps=1, seqlen=32)
    assert again.save(tmp_path / "again")["format"] == "compressor sparse"


@pytest.mark.parametrize("packer", ["rtn", "sketch"])
def test_the_script_of_the_docs_trains_saves_and_reloads(
    packer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = re.search(r"```python\n(import compressor, peft, torch, transformers\n.*?)```", (ROOT / "docs" / "methods.md").read_text("utf-8"), re.S)
    assert script is not None
    monkeypatch.chdir(tmp_path)
    more = {"nsamples": 2, "seqlen": 32} if packer == "sketch" else {}
    compressor.load("tiny", "cpu").compress(bits=3, packer=packer, **more).save("OUT")
    Path("notes.txt").write_text("".join(f"Statement {i} of the language is run in order.\n" for i in range(24)))
    names: dict[str, Any] = {}
    exec(compile(script[1], "docs/methods.md", "exec"), names)
    assert capsys.readouterr().out.splitlines()[-1] == "True", "the reloaded adapter gives other logits"
    base = compressor.load("OUT", "cpu").model
    with torch.no_grad():
        assert not torch.equal(base(names["ids"].to("cpu")).logits, names["model"](names["ids"]).logits.to("cpu")), "nothing was trained"
