"""Runs that learn from the dense model: its predictions are made once, by blocks as well, and where there is no dense model that is said."""

import json
from pathlib import Path

import pytest

from compressor.errors import RecipeError
from compressor.pipelines import run as pipeline
from compressor.pipelines import teacher
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
