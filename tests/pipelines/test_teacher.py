"""Runs that learn from the dense model: its predictions are made once, by blocks as well, and where there is no dense model that is said."""

import json
from pathlib import Path

import pytest

from compressor.errors import RecipeError
from compressor.pipelines import load, teacher
from compressor.pipelines import run as pipeline
from compressor.pipelines.show import Show
from compressor.recipe import Recipe
from tests.pipelines import toys

TAUGHT = {"quant__packer": "rtn", "quant__bits": 2, "tune__method": "peqa", "tune__steps": 4, "tune__batch": 2, "tune__lr": 0.02}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return toys.make(tmp_path / "llama", "llama")


def test_a_run_learns_from_the_dense_model_and_goes_on_without_asking_it_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = toys.recipe(llama, **TAUGHT, tune__distill=1.0, tune__distill_top=32)
    pipeline.run(asked.with_(memory="whole"), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Tuning, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.run(asked.with_(memory="blocks"), tmp_path / "blocks")
    assert len(list((tmp_path / "blocks.partial").glob("taught-*/predictions.safetensors"))) == 1
    monkeypatch.setattr(teacher, "top", lambda *_: 1 / 0)
    again = pipeline.run(asked.with_(memory="blocks"), tmp_path / "blocks")
    assert again["resumed"] and toys.sums(tmp_path / "whole") == toys.sums(tmp_path / "blocks")
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    kl = {key: report[key]["divergence"]["mean"] for key in ("packed", "tuned")}
    assert kl["tuned"] < kl["packed"] and "teach" in report["seconds"]


def test_what_predictions_take_is_said_before(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.stages, "resident_bytes", lambda: 0)  # it grows from run to run
    asked = toys.recipe(llama, **TAUGHT, tune__distill=0.5, tune__distill_top=32)
    held = 6 * 32 * 8 * 32  # bytes, top, windows of four steps of two, tokens
    for memory in ("whole", "blocks"):
        plain, with_, double = (
            pipeline.dry_run(each.with_(memory=memory), tmp_path / "out", Show())
            for each in (asked.with_(tune__distill=0.0), asked, asked.with_(tune__distill_top=64))
        )
        assert "teach" not in plain["peak_bytes"] | plain["seconds"] and "teach" in with_["seconds"]
        assert with_["peak_bytes"]["tune"] - plain["peak_bytes"]["tune"] == double["peak_bytes"]["teach"] - with_["peak_bytes"]["teach"] == held
    for steps, windows in ((4, 8), (1000, None)):
        job = pipeline.Run(asked.with_(tune__steps=steps), tmp_path / "out", Show())
        found = job.texts(load.load_tokenizer(llama))[1]
        assert found is not None and job.taught == (windows or len(found.ids))


def test_only_windows_that_are_seen_are_taught_and_a_broken_pass_leaves_no_file(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real, rows = toys.recipe(llama, **TAUGHT, tune__distill=1.0), teacher.top, list[int]()
    monkeypatch.setattr(teacher, "top", lambda *given: (rows.append(1), real(*given) if len(rows) < 5 else 1 / 0)[1])
    with pytest.raises(ZeroDivisionError):
        pipeline.run(asked, tmp_path / "out")
    assert not list((tmp_path / "out.partial").glob("taught-*/*"))
    monkeypatch.setattr(teacher, "top", lambda *given: (rows.append(1), real(*given))[1])
    rows.clear()
    pipeline.run(asked, tmp_path / "out")
    assert len(rows) == 8


def test_other_shares_are_other_runs(llama: Path, tmp_path: Path) -> None:
    found = [pipeline.run(toys.recipe(llama, **TAUGHT, tune__distill=share), tmp_path / str(share)) for share in (0.0, 0.5)]
    assert found[0]["tuned"]["domain"]["perplexity"] != found[1]["tuned"]["domain"]["perplexity"]


def test_where_there_is_no_dense_model_that_is_said(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing is tuned"):
        pipeline.run(toys.recipe(llama, tune__distill=0.5), tmp_path / "out")
    kept = Recipe(model=str(llama)).with_(quant__packer="kept", tune__method="peqa", tune__distill=0.5)
    with pytest.raises(RecipeError, match="start from the dense one"):
        pipeline.run(kept, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"tune\.distill=1\.5 is a share"):
        toys.recipe(llama, tune__distill=1.5)
