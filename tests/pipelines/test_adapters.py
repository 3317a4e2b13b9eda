"""Runs with adapters: the folder, the adapter beside it, absorbing, starts, resume, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compressor
from compressor.errors import ModelError, RecipeError
from compressor.integrations import peft as adapters
from compressor.linear import packed_linears
from compressor.pipelines import job, load, tuners
from compressor.recipe import Tune
from tests.pipelines.commands import call
from tests.pipelines.pruned import logits, text, whole
from tests.tolerances import RELATIVE, error

FULL: dict[str, Any] = {"quant__packer": "rtn", "quant__bits": 3, "tune__method": "lora", "tune__rank": 4, "tune__steps": 6, "tune__lr": 5e-3}
IDS = text(vocabulary=2000)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of tiny that keeps its adapter."""
    place = tmp_path_factory.mktemp("adapters") / "out"
    return place, whole(place, **FULL)


def test_the_adapter_lies_beside_the_untuned_base(kept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, document = kept
    assert sorted(p.name for p in (folder / "adapter").iterdir()) == [adapters.CONFIG, adapters.WEIGHTS]
    whole(tmp_path / "base", **{key: value for key, value in FULL.items() if not key.startswith("tune__")})
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    beside = sum(p.stat().st_size for p in (folder / "adapter").iterdir())
    assert document["tuned"]["folder_bytes"] == document["packed"]["folder_bytes"] + beside
    assert document["tuned"]["domain"]["perplexity"] < document["packed"]["domain"]["perplexity"]
    report = json.loads((folder / "report.json").read_text())
    assert report["training"]["trainable"] == 4 * sum(sum(row["shape"]) for row in report["layers"])
    assert report["export"]["adapter_bytes"] == beside and "adapter" in (folder / "README.md").read_text()


def test_what_loads_the_folder_has_the_adapter(kept: tuple[Path, dict[str, Any]]) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    ours, base = load.load(str(kept[0]), "cpu"), load.load(str(kept[0]), "cpu")
    assert ours.adapter is not None
    adapters.strip(base.model)
    stock = AutoModelForCausalLM.from_pretrained(kept[0], dtype=torch.float32)
    assert error(logits(stock, IDS), logits(base.model, IDS)) < RELATIVE[torch.float32]
    assert error(logits(ours.model, IDS), logits(base.model, IDS)) > 1e-3
    on_ours = peft.PeftModel.from_pretrained(base.model, kept[0] / "adapter")
    assert error(logits(on_ours, IDS), logits(ours.model, IDS)) < RELATIVE[torch.float32], "two passes, as peft alone computes it, and one"


def test_eval_measures_with_the_adapter(
    kept: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, "eval", str(kept[0]), "--window", "32", "--max-tokens", "128", "--device", "cpu")
    found = json.loads(out)
    model = compressor.load(str(kept[0]), "cpu")
    assert code == 0 and found["perplexity"] == model.evaluate(window=32, max_tokens=128)["perplexity"]
    assert found["folder_bytes"] == kept[1]["tuned"]["folder_bytes"]
    adapters.strip(model.model)
    assert found["perplexity"] != model.evaluate(window=32, max_tokens=128)["perplexity"]


def test_exports_fold_it_in(
    kept: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(monkeypatch, capsys, "export", str(kept[0]), "--to", "float16", "-o", str(tmp_path / "dense"))
    assert code == 0, err
    dense = load.load(str(tmp_path / "dense"), "cpu")
    assert not packed_linears(dense.model) and not (tmp_path / "dense" / "adapter").exists()
    assert error(logits(dense.model, IDS), logits(load.load(str(kept[0]), "cpu").model, IDS)) < 5 * RELATIVE[torch.float16]


# --- absorbing -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "absorbed"), [(1e9, True), (0.0, False)])
def test_absorbing_is_measured_and_may_be_refused(kept: tuple[Path, dict[str, Any]], tmp_path: Path, limit: float, absorbed: bool) -> None:
    document = whole(tmp_path / "out", **FULL | {"tune__adapter": "absorb", "tune__absorb_limit": limit})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    facts = report["training"]["absorb"]
    assert facts["absorbed"] is absorbed and (tmp_path / "out" / "adapter").exists() is not absorbed
    assert facts["before"] == pytest.approx(kept[1]["tuned"]["domain"]["perplexity"], rel=1e-6)
    assert facts["rise"] == pytest.approx(facts["after"] / facts["before"] - 1) and facts["max_logit_change"] > 0
    assert any("the adapter was absorbed" in n if absorbed else "the adapter stays beside the base" in n for n in report["notes"])
    if absorbed:
        assert document["tuned"]["domain"]["perplexity"] == pytest.approx(facts["after"], rel=1e-6)
        assert document["tuned"]["folder_bytes"] == document["packed"]["folder_bytes"]
    else:
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (kept[0] / "model.safetensors").read_bytes()
        assert (tmp_path / "out" / "adapter" / adapters.WEIGHTS).read_bytes() == (kept[0] / "adapter" / adapters.WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", ["dora", "ia3", "miss"])
def test_kinds_whose_change_is_no_sum_are_absorbed_too(tmp_path: Path, kind: str) -> None:
    """The loss of absorbing is small beside what was trained: a part of it remains."""
    keys = {"tune__method": kind, "tune__adapter": "absorb", "tune__absorb_limit": 1e9, "tune__rank": 8 if kind == "ia3" else 4, "tune__lr": 2e-2}
    document = whole(tmp_path / "out", **FULL | keys)
    facts = json.loads((tmp_path / "out" / "report.json").read_text())["training"]["absorb"]
    assert facts["absorbed"] and not (tmp_path / "out" / "adapter").exists()
    assert document["tuned"]["domain"]["perplexity"] == pytest.approx(facts["after"], rel=1e-6)
    assert facts["before"] < document["packed"]["domain"]["perplexity"] and facts["after"] < document["packed"]["domain"]["perplexity"]


# --- starts --------------------------------------------------------------------------------------------------------------------------------


def test_starts_reach_the_adapter_and_survive_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = FULL | {"quant__packer": "gptq", "tune__start": "residual", "tune__targets": "q_proj,down_proj", "tune__checkpoint_every": 2}
    whole(tmp_path / "one", **keys)

    class Killed(Exception):
        pass

    real, steps = job.follow, []

    def watching(advance: Any, last: int = 10**9) -> Any:
        inner = real(advance)

        def on_step(row: dict[str, Any]) -> None:
            inner(row)
            steps.append(row["step"])
            if row["step"] == last:
                raise Killed

        return on_step

    with monkeypatch.context() as patch:
        patch.setattr(job, "follow", lambda advance: watching(advance, 4))
        with pytest.raises(Killed):
            whole(tmp_path / "two", **keys)
    steps.clear()
    monkeypatch.setattr(job, "follow", watching)
    two = whole(tmp_path / "two", **keys)
    assert two["resumed"] is True and steps[0] > 1 and steps[-1] == 6, "training goes on from its checkpoint"
    for file in ("model.safetensors", f"adapter/{adapters.WEIGHTS}"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    names = {key.split(".")[-3] for key in load_file(tmp_path / "one" / "adapter" / adapters.WEIGHTS)}
    assert names == {"q_proj", "down_proj"}
    rows = json.loads((tmp_path / "one" / "report.json").read_text())["layers"]
    assert all(("start_error" in row) == row["name"].endswith(("q_proj", "down_proj")) for row in rows)


# --- refused -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "words"), [
    ({"method": "peqa", "rank": 4}, "tune.rank=4 means nothing to peqa"),
    ({"method": "ia3", "rank": 4}, "tune.rank=4 means nothing to ia3"),
    ({"method": "dora", "start": "loftq"}, "tune.start=loftq means nothing to dora"),
    ({"method": "lora", "parametrization": "absolute"}, "--absolute says how scales are trained"),
    ({"method": "lora", "rank": 0}, "rank and alpha above 0"), ({"method": "lora", "dropout": 1.0}, "dropout from 0 to below 1"),
    ({"method": "lora", "start": "magic"}, "choose zero, residual"), ({"method": "lora", "adapter": "drop"}, "keep or absorb"),
])  # fmt: skip
def test_options_that_mean_nothing_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        tuners.resolved(Tune(**keys))


def test_in_python(tmp_path: Path) -> None:
    model = compressor.load("tiny", "cpu").compress(bits=4, packer="rtn")
    model.tune(method="lora", rank=4, steps=4, seqlen=32, batch=4)
    tuned = logits(model.model, IDS)
    with pytest.raises(ModelError, match="has an adapter already"):
        model.tune(method="lora", rank=4, steps=2, seqlen=32)
    model.save(tmp_path / "out")
    assert torch.equal(logits(compressor.load(str(tmp_path / "out"), "cpu").model, IDS), tuned)
