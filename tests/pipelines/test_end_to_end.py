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
from compressor.tune import loop
from tests.pipelines import toys

RTN = {"quant__packer": "rtn", "quant__bits": 2, "tune__batch": 2}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return toys.make(tmp_path / "llama", "llama")


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


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


@pytest.mark.parametrize("packer", ["rtn", "block"])
def test_a_killed_run_takes_no_step_again_and_blocks_give_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packer: str
) -> None:
    asked = toys.recipe(llama, **RTN | {"quant__packer": packer}, quant__end_to_end=2)
    pipeline.run(asked.with_(memory="whole"), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(end_to_end.Tuning, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(asked.with_(memory="blocks"), tmp_path / "blocks")
    monkeypatch.setattr(teacher, "top", killed)
    monkeypatch.setattr(loop, "_gradient", killed)
    again = pipeline.run(asked.with_(memory="blocks"), tmp_path / "blocks")
    assert again["resumed"] and toys.sums(tmp_path / "whole") == toys.sums(tmp_path / "blocks")


def test_what_is_tuned_later_starts_from_what_was_trained(llama: Path, tmp_path: Path) -> None:
    asked = toys.recipe(llama, **RTN, quant__end_to_end=2)
    pipeline.run(asked, tmp_path / "packed")
    pipeline.run(asked.with_(tune__method="peqa", tune__steps=1, tune__lr=1e-9), tmp_path / "tuned")
    assert packed(tmp_path / "tuned")["packed"]["domain"] == packed(tmp_path / "packed")["packed"]["domain"] | {
        key: packed(tmp_path / "tuned")["packed"]["domain"][key] for key in ("seconds", "tokens_per_second")
    }


def test_keys_tell_runs_apart_and_keep_what_was_packed(llama: Path, tmp_path: Path) -> None:
    def keys(**changes: Any) -> list[str]:
        job = pipeline.Run(toys.recipe(llama, **RTN | {"quant__packer": "gptq", "tune__method": "peqa"} | changes), tmp_path / "out", Show())
        return [job.key_compress, job.key_damage, job.key_packed, job.key_tune, job.key_written]

    plain, trained = keys(), keys(quant__end_to_end=2)
    assert trained[:2] == plain[:2] and not set(trained[2:]) & set(plain[2:])
    assert keys(quant__end_to_end=2, tune__batch=4)[:3] == trained[:3], "how steps are cut changes no result"


def test_a_pruned_model_learns_from_what_pruning_and_healing_made_of_it(llama: Path, tmp_path: Path) -> None:
    pruned = {"prune__method": "magnitude", "prune__ratio": 0.3, "prune__multiple": 8, "prune__steps": 12, "prune__lr": 1e-3}
    asked = toys.recipe(llama, **RTN | {"quant__bits": 4}, **pruned)
    plain, trained = (pipeline.run(each, tmp_path / str(n)) for n, each in enumerate((asked, asked.with_(quant__end_to_end=8))))
    gap = [found["packed"]["domain"]["loss"] - found["pruned"]["domain"]["loss"] for found in (plain, trained)]
    assert abs(gap[1]) < abs(gap[0])


def test_packing_again_for_a_loss_leaves_one_note(llama: Path, tmp_path: Path) -> None:
    asked = toys.recipe(llama, **RTN, quant__end_to_end=1, choose__max_loss=0.05, choose__candidates=("w2g16", "w4g16"), choose__windows=1)
    pipeline.run(asked, tmp_path / "out")
    assert len([note for note in packed(tmp_path / "out")["notes"] if end_to_end.TOLD in note]) == 1


def test_bits_by_layer_are_trained_too(llama: Path, tmp_path: Path) -> None:
    asked = toys.recipe(llama, **RTN, quant__group=16, choose__target_bits=4.0, choose__candidates=("w2g16", "w4g16"), choose__windows=1)
    plain, trained = (pipeline.run(each, tmp_path / str(number)) for number, each in enumerate((asked, asked.with_(quant__end_to_end=8))))
    assert trained["packed"]["divergence"]["mean"] < plain["packed"]["divergence"]["mean"]
    assert trained["packed"]["bits_per_weight"] == plain["packed"]["bits_per_weight"]


def test_what_it_takes_is_said_before(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.stages, "resident_bytes", lambda: 0)  # it grows from run to run
    asked = toys.recipe(llama, **RTN)
    held = 6 * 64 * 32  # bytes, top, tokens
    asked = asked.with_(quant__packer="block")
    for memory in ("whole", "blocks"):
        plain, with_, double = (
            pipeline.dry_run(each.with_(memory=memory), tmp_path / "out", Show())
            for each in (asked, asked.with_(quant__end_to_end=2), asked.with_(quant__end_to_end=2, data__nsamples=8))
        )
        assert not {"teach", "end-to-end"} & set(plain["peak_bytes"] | plain["seconds"]) and {"teach", "end-to-end"} <= set(with_["seconds"])
        assert double["peak_bytes"]["end-to-end"] - with_["peak_bytes"]["end-to-end"] == 2 * held
        assert double["peak_bytes"]["teach"] >= with_["peak_bytes"]["teach"] + 2 * held > plain["peak_bytes"]["load"]
    free = [room.needed(pipeline.Run(each, tmp_path / "out", Show())) for each in (asked, asked.with_(quant__end_to_end=2))]
    assert free[1] - free[0] > 6 * held


def test_what_cannot_be_is_said(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"end_to_end=-1 must not be negative"):
        toys.recipe(llama, quant__end_to_end=-1)
    beside = toys.recipe(llama, quant__packer="gptq", quant__end_to_end=1, tune__method="lora", tune__steps=2, tune__start="residual")
    with pytest.raises(RecipeError, match="give --end-to-end 0"):
        pipeline.run(beside, tmp_path / "out")
    with pytest.raises(RecipeError, match="this run is on the CPU"):
        pipeline.run(toys.recipe(llama, **RTN, quant__end_to_end=1, tune__offload="cpu", tune__gradient_checkpointing=True), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(RecipeError, match="nothing is packed"):
        pipeline.run(toys.recipe(llama, quant__packer="none", quant__end_to_end=1, prune__method="magnitude", prune__ratio=0.2), tmp_path / "out")
