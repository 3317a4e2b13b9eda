"""A run whose bits are chosen: within its target, better than uniform packing of the same size, resumable, readable by others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import RecipeError
from compressor.linear import packed_linears
from compressor.pipelines import load, reconstruct
from compressor.pipelines.choose import sensitivity
from compressor.pipelines.choose import stage as choosing
from compressor.pipelines.packers import trains
from compressor.pipelines.run import dry_run, run
from compressor.pipelines.show import Show
from compressor.recipe import Recipe

QUICK = Recipe().with_(data__nsamples=8, data__seqlen=64, eval__max_tokens=2048, quant__packer="rtn", device="cpu")


THREE = ("w2g128", "w3g128", "w4g128")  # enough where the mix itself is not looked at


def chosen(folder: Path, **changes: Any) -> dict[str, Any]:
    run(QUICK.with_(**changes), folder)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return report


@pytest.fixture(scope="module")
def by_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("choose") / "out"
    return folder, chosen(folder, choose__target_bits=2.7)


def test_the_target_is_kept_and_the_prediction_near(by_bits: tuple[Path, dict[str, Any]]) -> None:
    choice = by_bits[1]["choice"]
    assert 2.6 < choice["reached"]["bits_per_weight"] <= 2.7
    assert choice["reached"]["bits_per_weight"] == choice["predicted"]["bits_per_weight"] == by_bits[1]["packed"]["bits_per_weight"]
    assert choice["reached"]["folder_bytes"] <= choice["predicted"]["folder_bytes"] < 1.01 * choice["reached"]["folder_bytes"]
    assert choice["reached"]["loss"] == pytest.approx(choice["predicted"]["loss"], rel=0.25)
    line = {row["spec"]: (row["bits_per_weight"], row["loss"]) for row in choice["uniform"]}
    (x0, y0), (x1, y1) = line["w2g128"], line["w3g128"]
    between = y0 + (y1 - y0) * (choice["reached"]["bits_per_weight"] - x0) / (x1 - x0)
    assert choice["reached"]["loss"] < between


def test_linears_that_servers_fuse_are_alike(by_bits: tuple[Path, dict[str, Any]]) -> None:
    model = load.load(str(by_bits[0]), "cpu").model
    found = {name: (layer.bits, layer.group) for name, layer in packed_linears(model).items()}
    assert len(set(found.values())) > 1
    for index in range(4):
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({found[f"model.layers.{index}.{leaf}"] for leaf in fused}) == 1


def test_transformers_reads_the_mix(by_bits: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(1, 60).unsqueeze(0)
    theirs = AutoModelForCausalLM.from_pretrained(by_bits[0], dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, load.load(str(by_bits[0]), "cpu").model(ids).logits, rtol=1e-4, atol=1e-4)


def test_group_sizes_alone_can_be_chosen(tmp_path: Path) -> None:
    """Rows of one scale among them: of 384 columns their groups are 384, which readers take as a group size like others."""
    from transformers import AutoModelForCausalLM

    sizes = ("w3g32", "w3g64", "w3g128", "w3g-1")
    report = chosen(tmp_path / "out", choose__target_bits=3.2, choose__candidates=sizes)
    assert report["choice"]["reached"]["bits_per_weight"] <= 3.2
    model, ids = load.load(str(tmp_path / "out"), "cpu").model, torch.arange(1, 60).unsqueeze(0)
    found = [(layer.bits, layer.group) for layer in packed_linears(model).values()]
    assert {bits for bits, _ in found} == {3} and len({group for _, group in found}) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_blocks_are_trained_once_and_not_by_every_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, train = [], reconstruct.Reconstruction.train

    def counted(self: Any, block: Any, index: int, *rest: Any) -> tuple[float, float]:
        trained.append(index)
        return train(self, block, index, *rest)

    monkeypatch.setattr(reconstruct.Reconstruction, "train", counted)
    keys: dict[str, Any] = {"choose__target_bits": 2.7, "choose__candidates": THREE, "quant__passes": 1, "data__nsamples": 4, "quant__sweeps": 1}
    report = chosen(tmp_path / "block", **keys, quant__packer="block")
    assert trained == [0, 1, 2, 3]
    plain = chosen(tmp_path / "gptq", **(keys | {"quant__passes": 2}), quant__packer="gptq")
    assert trained == [0, 1, 2, 3]
    assert [unit["chosen"] for unit in report["choice"]["units"]] == [unit["chosen"] for unit in plain["choice"]["units"]]
    assert {row["packer"] for row in report["layers"]} == {"block"}


def test_a_target_of_bytes_counts_the_whole_folder(tmp_path: Path) -> None:
    report = chosen(tmp_path / "out", choose__target_size=1_000_000, choose__measure="error", choose__candidates=THREE)
    assert 990_000 < report["packed"]["folder_bytes"] <= 1_000_000
    assert "loss" not in report["choice"]["reached"]


def test_a_target_of_loss_is_kept(tmp_path: Path) -> None:
    report = chosen(tmp_path / "out", choose__max_loss=0.1, choose__candidates=THREE)
    assert 0 < report["choice"]["reached"]["perplexity_rise"] <= 0.1
    assert report["packed"]["bits_per_weight"] < 6
    assert report["packed"]["domain"]["perplexity"] == pytest.approx(
        report["dense"]["domain"]["perplexity"] * (1 + report["choice"]["reached"]["perplexity_rise"])
    )


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stops after the measuring goes on with the packing, for another target too."""
    from compressor.pipelines import job

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "pack", stop)
        with pytest.raises(KeyboardInterrupt):
            run(QUICK.with_(choose__target_bits=2.7, choose__candidates=THREE), tmp_path / "out")
    monkeypatch.setattr(sensitivity, "_unit", stop)
    report = chosen(tmp_path / "out", choose__target_bits=3.1, choose__candidates=THREE)
    assert 3.0 < report["packed"]["bits_per_weight"] <= 3.1
    shutil.rmtree(tmp_path / "out")


def test_the_dry_run_tells_the_target(tmp_path: Path) -> None:
    told = dry_run(QUICK.with_(choose__target_bits=3.1), tmp_path / "out", Show())
    assert told["bits_per_weight"] == pytest.approx(3.1)
    assert told["seconds"]["choose"] > 0
    assert "found in the run" in told["notes"][-1]
    with pytest.raises(RecipeError, match="below the smallest of the candidates"):
        dry_run(QUICK.with_(choose__target_bits=1.5), tmp_path / "out", Show())


def test_candidates_that_train_blocks_cost_what_their_start_does() -> None:
    def estimated(recipe: Recipe) -> dict[str, Any]:
        bits, seconds = float(recipe.quant.bits), {"compress": 100.0 if trains(recipe.quant) else 1.0}
        return {"bits_per_weight": bits, "folder_bytes": round(1000 * bits), "ratio": 2.0, "packed_layers": 4, "notes": [], "seconds": seconds}

    recipe = QUICK.with_(quant__packer="block", choose__target_bits=3.1, choose__measure="error", choose__candidates=THREE)
    assert choosing.cost(recipe, estimated, 0.0)["seconds"] == {"compress": 100.0, "choose": 3.0}


def test_recipes_that_cannot_choose(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give one of target_bits"):
        QUICK.with_(choose__target_bits=3.0, choose__max_loss=0.1)
    with pytest.raises(RecipeError, match="nothing is chosen"):
        QUICK.with_(choose__windows=3)
    with pytest.raises(RecipeError, match="leave one of them out"):
        QUICK.with_(choose__target_bits=3.0, quant__layers={"re:down": "w4g64"})
    with pytest.raises(RecipeError, match="does not know: leave choose.measure at kl"):
        run(QUICK.with_(choose__max_loss=0.1, choose__measure="error"), Path("never"))
    with pytest.raises(RecipeError, match="nothing is packed: add --quant"):
        run(QUICK.with_(choose__target_bits=3.0, quant__packer="none", prune__method="loraprune", prune__ratio=0.3), Path("never"))
    with pytest.raises(RecipeError, match="makes tables"):  # a candidate that the tuner could not go on with
        run(QUICK.with_(choose__target_bits=3.0, choose__candidates=("sketch2", "sketch3"), tune__method="peqa"), Path("never"))
    with pytest.raises(RecipeError, match="below the 2.125 bits"):  # before anything is measured
        run(QUICK.with_(choose__target_bits=2.0), tmp_path / "out")
    with pytest.raises(RecipeError, match="the smallest candidates come to"):
        run(QUICK.with_(choose__target_size=1000), tmp_path / "out")
