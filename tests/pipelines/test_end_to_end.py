"""Values of a packed model that learn together what the dense model predicts: with whatever packer, resumed, by blocks, and said beforehand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import RecipeError
from compressor.pipelines import end_to_end, load, room, teacher
from compressor.pipelines import run as pipeline
from compressor.pipelines.show import Show
from tests.pipelines import toys

RTN = {"quant__packer": "rtn", "quant__bits": 2, "tune__batch": 2}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return toys.make(tmp_path / "llama", "llama")


def packed(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize("packer", ["rtn", "gptq", "block", "sketch"])
def test_codes_stay_and_predictions_come_nearer_to_the_dense_ones(llama: Path, tmp_path: Path, packer: str) -> None:
    asked = toys.recipe(llama, **RTN | {"quant__packer": packer} | ({"quant__group": 128} if packer == "sketch" else {}))
    pipeline.run(asked, tmp_path / "plain")
    pipeline.run(asked.with_(quant__end_to_end=8), tmp_path / "trained")
    plain, trained = (load.packed_weights(load.load(str(tmp_path / name), "cpu").model) for name in ("plain", "trained"))
    for name, weight in plain.items():
        assert torch.equal(weight.words, trained[name].words)
    assert any(not torch.equal(weight.learned, trained[name].learned) for name, weight in plain.items())
    before, after = packed(tmp_path / "plain"), packed(tmp_path / "trained")
    assert after["packed"]["divergence"]["mean"] < before["packed"]["divergence"]["mean"]
    assert after["packed"]["folder_bytes"] == pytest.approx(before["packed"]["folder_bytes"], abs=64)
    assert {"teach", "end-to-end"} <= set(after["seconds"]) and any("trained end to end" in note for note in after["notes"])


def test_a_killed_run_goes_on_and_blocks_give_the_same_bytes(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = toys.recipe(llama, **RTN, quant__end_to_end=2, tune__method="peqa", tune__steps=2)
    pipeline.run(asked.with_(memory="whole"), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(end_to_end.Tuning, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.run(asked.with_(memory="blocks"), tmp_path / "blocks")
    monkeypatch.setattr(teacher, "top", lambda *_: 1 / 0)
    again = pipeline.run(asked.with_(memory="blocks"), tmp_path / "blocks")
    assert again["resumed"] and toys.sums(tmp_path / "whole") == toys.sums(tmp_path / "blocks")


def test_bits_by_layer_are_trained_too(llama: Path, tmp_path: Path) -> None:
    asked = toys.recipe(llama, **RTN, quant__group=16, choose__target_bits=4.0, choose__candidates=("w2g16", "w4g16"), choose__windows=1)
    plain, trained = (pipeline.run(each, tmp_path / str(number)) for number, each in enumerate((asked, asked.with_(quant__end_to_end=8))))
    assert trained["packed"]["divergence"]["mean"] < plain["packed"]["divergence"]["mean"]
    assert trained["packed"]["bits_per_weight"] == plain["packed"]["bits_per_weight"]


def test_what_it_takes_is_said_before(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.stages, "resident_bytes", lambda: 0)  # it grows from run to run
    asked = toys.recipe(llama, **RTN, tune__distill_top=32)
    held = 6 * 32 * asked.data.nsamples * 32  # bytes, top, windows, tokens
    for memory in ("whole", "blocks"):
        plain, with_, double = (
            pipeline.dry_run(each.with_(memory=memory), tmp_path / "out", Show())
            for each in (asked, asked.with_(quant__end_to_end=2), asked.with_(quant__end_to_end=2, tune__distill_top=64))
        )
        assert not {"teach", "end-to-end"} & set(plain["peak_bytes"] | plain["seconds"]) and {"teach", "end-to-end"} <= set(with_["seconds"])
        for stage in ("teach", "end-to-end"):
            assert double["peak_bytes"][stage] - with_["peak_bytes"][stage] == held
    free = [room.needed(pipeline.Run(each, tmp_path / "out", Show())) for each in (asked, asked.with_(quant__end_to_end=2))]
    assert free[1] - free[0] > held


def test_what_cannot_be_is_said(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"end_to_end=-1 must not be negative"):
        toys.recipe(llama, quant__end_to_end=-1)
    beside = toys.recipe(llama, quant__packer="gptq", quant__end_to_end=1, tune__method="lora", tune__steps=2, tune__start="residual")
    with pytest.raises(RecipeError, match="leave --end-to-end out"):
        pipeline.run(beside, tmp_path / "out")
    with pytest.raises(RecipeError, match="nothing is packed"):
        pipeline.run(toys.recipe(llama, quant__packer="none", quant__end_to_end=1, prune__method="magnitude", prune__ratio=0.2), tmp_path / "out")
