"""oBERT on causal language models: single weights and whole units, block by block, and what of it survives packing, tuning and writing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor.errors import ModelError, RecipeError
from compressor.linear import find_blocks, linears, packed_linears
from compressor.pipelines import load, pruning, surgery, write
from compressor.pipelines.surgery import DONE
from compressor.prune.masks import Pattern, parse_pattern
from compressor.prune.obert import Settings
from compressor.prune.widths import prunable
from tests.pipelines.pruned import logits, objective, options, ours, source, text, theirs, whole
from tests.prune.helpers import backward, causal
from tests.tolerances import RELATIVE, error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return source(tmp_path_factory.mktemp("source"), tokenizer)


def prune(folder: Path, place: Path | None = None, **keys: Any) -> tuple[load.Loaded, dict[str, Any], Any]:
    loaded = load.load(str(folder), "cpu")
    facts, log = pruning.prune(loaded, options(**{"method": "obert"} | keys), objective(), 5, place)
    return loaded, facts, log


def weights(model: Any) -> dict[str, Tensor]:
    return {name: layer.weight.detach() for name, layer in linears(find_blocks(model)[1]).items()}


def zeros(model: Any) -> dict[str, Tensor]:
    return {name: w == 0 for name, w in weights(model).items()}


# --- single weights ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["obert", "magnitude"])
@pytest.mark.parametrize(("ratio", "pattern"), [(0.37, "unstructured"), (0.5, "4block"), (0.5, "2:4"), (0.75, "1:4")])
def test_exactly_as_many_weights_go_in_the_pattern(folder: Path, method: str, ratio: float, pattern: str) -> None:
    loaded, facts, log = prune(folder, method=method, ratio=ratio, pattern=pattern)
    gone = torch.cat([m.flatten() for m in zeros(loaded.model).values()])
    assert facts["ratio"] == pytest.approx(ratio, abs=4 / len(gone)) and int(gone.sum()) == round(facts["ratio"] * len(gone))
    assert facts["pattern"] == pattern and ("gradients" in facts) == (method == "obert") and log.steps == 0
    runs = gone.view(-1, 4).sum(1)
    if pattern == "4block":
        assert set(runs.tolist()) == {0, 4}
    elif pattern != "unstructured":
        assert set(runs.tolist()) == {4 - int(pattern[0])}
    else:
        shares = [float(m.float().mean()) for m in zeros(loaded.model).values()]
        assert max(shares) - min(shares) > 0.01, "one threshold over all blocks, not a share of each"
    before = weights(load.load(str(folder), "cpu").model)
    moved = any(not torch.equal(w[w != 0], before[n][w != 0]) for n, w in weights(loaded.model).items())
    assert moved == (method == "obert"), "curvature moves what stays, magnitude does not"
    assert bool(torch.isfinite(logits(loaded.model, text())).all()) and not any(p.grad is not None for p in loaded.model.parameters())


def test_magnitude_takes_the_smallest_weights_of_all_blocks(folder: Path) -> None:
    before = torch.cat([w.flatten() for w in weights(load.load(str(folder), "cpu").model).values()]).abs()
    loaded, _, _ = prune(folder, method="magnitude", ratio=0.4, pattern="unstructured")
    gone = torch.cat([m.flatten() for m in zeros(loaded.model).values()])
    assert float(before[gone].max()) <= float(before[~gone].min())


def test_without_a_pattern_obert_is_unstructured_and_magnitude_structured() -> None:
    assert pruning.sparse(options(method="obert")) and not pruning.sparse(options(method="magnitude"))
    assert not pruning.sparse(options(method="obert", pattern="structured")) and pruning.sparse(options(method="magnitude", pattern="4block"))


def test_settings_say_what_was_asked_for() -> None:
    found = Settings.of(options(method="obert", pattern="2:4", damp=1e-4, block=8, gradients=9, recompute=3, joint=False))
    assert found == Settings(parse_pattern("2:4"), "obert", 1e-4, 8, 9, 3, False)
    assert Settings.of(options(method="magnitude", pattern="structured")).pattern == Pattern()


def test_ratios_and_shapes_that_a_pattern_does_not_allow_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="pruning 51% cannot be done: the pattern 2:4 goes to 50%"):
        pruning.plan(causal(keys=4), options(method="obert", pattern="2:4", ratio=0.51))
    with pytest.raises((RecipeError, ModelError), match="down_proj"):
        pruning.plan(causal(keys=4, intermediate_size=50), options(method="obert", pattern="4block", ratio=0.5))


def test_mini_batches_are_single_windows_of_what_requires_a_gradient() -> None:
    model, goal = causal(keys=4, vocab_size=320), objective()
    model.requires_grad_(False)
    wanted = model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    stream, seen = surgery._stream(model, goal, 5), []
    for _ in stream(4):
        assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.layers.1.mlp.down_proj.weight"]
        seen.append(wanted.grad.clone())
    singles = []
    for row in goal.ids:
        model.zero_grad()
        backward(model, row[None])
        singles.append(wanted.grad / (len(row) - 1))
    for found in seen:
        assert min(error(found, single) for single in singles) < 20 * RELATIVE[torch.float32]
    assert len({float(s.norm()) for s in seen}) == 4


# --- whole units ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["group", "query"])
def test_whole_units_go_and_stock_transformers_loads_the_rest(folder: Path, tmp_path: Path, unit: str) -> None:
    loaded, facts, _ = prune(folder, pattern="structured", unit=unit)
    assert 1 - prunable(loaded.model) / prunable(causal(keys=4)) == pytest.approx(facts["ratio"], abs=1e-12)
    assert facts["unit"] == unit and loaded.config["intermediate_size"] == facts["ffn"] < 48
    write.write_folder(loaded, tmp_path / "out")
    assert error(logits(theirs(tmp_path / "out"), text()), logits(loaded.model, text())) < RELATIVE[torch.float32]


# --- what was done is not done again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{"pattern": "2:4", "ratio": 0.5}, {"pattern": "structured"}])
def test_a_finished_prune_is_read_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]) -> None:
    first, facts, log = prune(folder, tmp_path, **keys)
    assert [p.name for p in tmp_path.iterdir()] == [DONE]
    with monkeypatch.context() as patch:
        patch.setattr(surgery, "_stream", lambda *args: pytest.fail("it was pruned again"))
        patch.setattr(surgery, "prune_blocks", lambda *args: pytest.fail("it was pruned again"))
        again, told, said = prune(folder, tmp_path, **keys)
    assert told == facts and said.notes == log.notes
    assert all(torch.equal(w, weights(again.model)[name]) for name, w in weights(first.model).items())


# --- whole runs ----------------------------------------------------------------------------------------------------------------------------

FAST = {"prune__block": 8, "prune__gradients": 3}  # of oBERT


@pytest.mark.parametrize(("ratio", "pattern"), [(0.5, None), (0.5, "2:4")])
def test_zeros_stay_zeros_through_packing_and_tuning(tmp_path: Path, ratio: float, pattern: str | None) -> None:
    changes = {"prune__method": "obert" if pattern is None else "magnitude", "prune__ratio": ratio, "prune__pattern": pattern}
    changes |= FAST if pattern is None else {}
    document = whole(tmp_path / "out", quant__packer="gptq", quant__bits=3, tune__method="peqa", **changes)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pruning"]["ratio"] == pytest.approx(0.5, abs=1e-5) and report["pruning"]["pattern"] == (pattern or "unstructured")
    model = load.load(str(tmp_path / "out"), "cpu").model
    gone = torch.cat([(layer.packed().dequantize(torch.float32) == 0).flatten() for layer in packed_linears(model).values()])
    assert len(gone) == 786432 and float(gone.float().mean()) >= 0.5
    if pattern:
        assert int(gone.view(-1, 4).sum(1).min()) >= 2
        start = torch.cat([w.flatten() for w in weights(load.load("tiny", "cpu").model).values()]).abs().view(-1, 4)
        assert bool(gone.view(-1, 4)[start < start.sort(1).values[:, 2:3]].all()), "the very weights that magnitude took"
    assert document["tuned"]["bits_per_weight"] < 3.125 and document["tuned"]["folder_bytes"] < document["pruned"]["folder_bytes"]
    tables = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.endswith("q_proj.weight") for name in tables)
    values = model(input_ids=text(vocabulary=2000)).logits
    assert bool(torch.isfinite(values).all()) and document["tuned"]["domain"]["perplexity"] < 1.5 * document["packed"]["domain"]["perplexity"]


def test_sparse_weights_alone_are_written_as_masks_and_read_back(tmp_path: Path) -> None:
    document = whole(tmp_path / "out", prune__method="obert", prune__ratio=0.8, prune__pattern="4block", **FAST)
    model = ours(tmp_path / "out")
    gone = torch.cat([m.flatten() for m in zeros(model).values()])
    assert float(gone.float().mean()) == pytest.approx(0.8, abs=1e-4) and document["pruned"]["bits_per_weight"] < 4
    runs = gone.view(-1, 4).sum(1)
    assert int((runs == 4).sum()) == round(0.8 * len(runs))
    assert int(((runs > 0) & (runs < 4)).sum()) < 5, "survivors under 3e-8, which float16 writes as 0: here one, of -1.8e-8"
    assert document["pruned"]["folder_bytes"] < 0.6 * document["dense"]["folder_bytes"]
