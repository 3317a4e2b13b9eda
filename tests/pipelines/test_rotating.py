"""Runs that rotate: the same model before packing, folders that others load, the same bytes by blocks and when killed; what cannot be is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compressor
from compressor import stored, world
from compressor.errors import ModelError, RecipeError
from compressor.pipelines import compress, load, rotating
from compressor.pipelines import run as pipeline
from compressor.pipelines.blockwise import opening
from compressor.pipelines.show import Show
from compressor.recipe import Choose, Quant, Recipe
from compressor.rotate import learned, merge, roles
from tests.pipelines import encoders, toys

IDS = torch.randint(5, 320, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return toys.make(tmp_path / "tied", "qwen2", tie_word_embeddings=True)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


@pytest.mark.parametrize("method", ["hadamard", "heads"])
def test_the_folder_loads_elsewhere_and_its_bytes_are_foretold(tied: Path, tmp_path: Path, method: str) -> None:
    asked = toys.recipe(tied, quant__rotate=method, quant__bits=4)
    foretold, plain = (pipeline.dry_run(each, tmp_path / "dry", Show()) for each in (asked, asked.with_(quant__rotate="none")))
    done, usual = pipeline.run(asked, tmp_path / "out"), pipeline.run(asked.with_(quant__rotate="none"), tmp_path / "none")
    report, config = (json.loads((tmp_path / "out" / name).read_text()) for name in ("report.json", "config.json"))
    head = 320 * 32 * 2 if method == "hadamard" else 0
    assert foretold["folder_bytes"] - plain["folder_bytes"] == head
    assert done["packed"]["folder_bytes"] - usual["packed"]["folder_bytes"] == pytest.approx(head, abs=200)  # a header more
    told = [note for note in (*report.get("notes", []), *foretold["notes"]) if "parts the head" in note]
    assert (len(told), config["tie_word_embeddings"]) == ((2, False) if head else (0, True)) and all(f"{head:,}" in note for note in told)
    ours = load.load(str(tmp_path / "out"), "cpu").model
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)
    assert done["dense"]["domain"]["perplexity"] == usual["dense"]["domain"]["perplexity"] and "rotate" in report["seconds"]


@pytest.mark.parametrize(("family", "method"), [("qwen2", "hadamard"), ("gemma", "hadamard"), ("gemma2", "heads")])
def test_by_blocks_and_killed_it_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, method: str) -> None:
    folder = toys.make(tmp_path / family, family, tie_word_embeddings=True)
    asked = toys.recipe(folder, quant__rotate=method, quant__bits=3, quant__ignore=("k_proj",), eval__max_tokens=128)
    pipeline.run(asked.with_(memory="whole"), tmp_path / "whole")
    real = compress._pack_block
    with monkeypatch.context() as patch:
        patch.setattr(compress, "_pack_block", lambda block, index, *rest: real(block, index, *rest) if index < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.run(asked.with_(memory="blocks", data__activations="disk"), tmp_path / "blocks")
    assert pipeline.run(asked.with_(memory="blocks", data__activations="disk"), tmp_path / "blocks")["resumed"]
    assert toys.sums(tmp_path / "whole") == toys.sums(tmp_path / "blocks")


def test_tuning_and_a_vocabulary_that_waits_in_16_bits_go_on_from_it(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "LARGE", 1 << 10)
    asked = toys.recipe(tied, quant__rotate="hadamard", quant__packer="rtn", tune__method="peqa", tune__steps=2, tune__batch=2)
    for memory in ("whole", "blocks"):
        pipeline.run(asked.with_(memory=memory), tmp_path / memory)
    assert toys.sums(tmp_path / "whole") == toys.sums(tmp_path / "blocks")
    pipeline.run(asked.with_(tune__method="lora", tune__start="residual", quant__packer="gptq"), tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter").is_dir()


def test_the_choice_of_widths_counts_the_head(tied: Path, tmp_path: Path) -> None:
    """A size that holds the smallest candidates but not the head beside them is refused before any work."""
    plain = toys.recipe(tied, quant__bits=2)
    found = [pipeline.dry_run(plain.with_(quant__rotate=how), tmp_path / how, Show()) for how in ("none", "hadamard")]
    sizes = [each["folder_bytes"] for each in found]
    assert sizes[1] - sizes[0] > 10_000
    choice = Choose(target_size=sum(sizes) // 2, candidates=("w2g16", "w4g16"), windows=1)
    with pytest.raises(RecipeError, match="is below the"):
        pipeline.run(plain.with_(choose=choice, quant__rotate="hadamard"), tmp_path / "out")


def test_seeds_and_methods_are_other_runs_and_the_same_recipe_the_same_bytes(tied: Path, tmp_path: Path) -> None:
    own: dict[str, dict[str, Any]] = {"seed": {"seed": 7}, "heads": {"quant__rotate": "heads"}, "none": {"quant__rotate": "none"}}
    found = {}
    for name in ("one", "again", *own):
        asked = toys.recipe(tied, **{"quant__rotate": "hadamard", "quant__packer": "rtn"} | own.get(name, {}))
        pipeline.run(asked, tmp_path / name)
        found[name] = toys.sums(tmp_path / name)["model.safetensors"]
    assert found["one"] == found["again"] and len(set(found.values())) == 4


def test_a_model_of_the_api_is_rotated_too(tied: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The ship left the harbour at dawn, and nobody saw it go. " * 400)
    found = compressor.load(str(tied), device="cpu").compress(str(text), nsamples=4, seqlen=32, bits=8, packer="rtn", group=16, rotate="hadamard")
    found.save(tmp_path / "api")
    ours, dense = compressor.load(str(tmp_path / "api"), device="cpu").model, load.load(str(tied), "cpu").model
    assert torch.equal(logits(ours), logits(found.model))
    assert float((logits(ours) - logits(dense)).norm() / logits(dense).norm()) < 0.1
    with pytest.raises(ModelError, match="cannot be rotated by heads"):
        compressor.load(str(toys.make(tmp_path / "neox", "gpt_neox")), device="cpu").compress(str(text), rotate="heads", bits=4)


def test_a_model_that_computes_something_else_is_refused(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load.load(str(tied), "cpu")
    monkeypatch.setattr(merge, "WRITERS", roles.WRITERS[:1])
    with pytest.raises(ModelError, match="computes something else once it is rotated by hadamard: its logits move by"):
        rotating.apply(loaded, Quant(rotate="hadamard"), 0)
    with torch.no_grad():
        loaded, _ = opening.load_blocks(str(tied), "cpu")
        loaded.model.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(ModelError, match="move by nan"):
        rotating.apply(loaded, Quant(rotate="heads"), 0)


def test_what_cannot_be_is_said_before_any_work(tied: Path, tmp_path: Path) -> None:
    neox, gemma = toys.make(tmp_path / "neox", "gpt_neox"), toys.make(tmp_path / "gemma", "gemma2")
    for asked, error, words in (
        (toys.recipe(neox, quant__rotate="heads"), ModelError, "no v_proj and o_proj; leave --rotate out"),
        (toys.recipe(gemma, quant__rotate="hadamard"), ModelError, "post_feedforward_layernorm.*or give --rotate heads, leave"),
        (toys.recipe(tied, quant__rotate="heads", prune__method="magnitude", prune__ratio=0.5, prune__pattern="2:4"), RecipeError, "no zero stays"),
        (toys.recipe(tied, quant__rotate="heads", quant__packer="none", prune__method="depth", prune__ratio=0.3), RecipeError, "nothing is packed"),
        (toys.recipe(tied, quant__rotate="heads", quant__packer="kept", tune__method="peqa"), RecipeError, "nothing is packed"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            pipeline.run(asked, tmp_path / "out")
        with pytest.raises(error, match=words):
            pipeline.dry_run(asked, tmp_path / "out", Show())
    with pytest.raises(RecipeError, match="choose none, heads, hadamard, learned"):
        toys.recipe(tied, quant__rotate="no")
    bert = encoders.make_encoder(tmp_path / "bert", "BertForSequenceClassification")
    with pytest.raises(RecipeError, match="is for causal language models"):
        pipeline.run(Recipe(model=str(bert)).with_(quant__rotate="heads"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_learned_rotations_are_kept_for_a_run_that_goes_on(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = toys.recipe(tied, quant__rotate="learned", quant__bits=3, eval__max_tokens=128)
    pipeline.run(asked, tmp_path / "whole")
    real = compress._pack_block
    with monkeypatch.context() as patch:
        patch.setattr(compress, "_pack_block", lambda block, index, *rest: real(block, index, *rest) if index < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.run(asked, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(learned, "learn", lambda *_: 1 / 0)
        assert pipeline.run(asked, tmp_path / "killed")["resumed"]
    assert toys.sums(tmp_path / "whole") == toys.sums(tmp_path / "killed")
    assert pipeline.dry_run(asked, tmp_path / "dry", Show())["seconds"]["rotate"] >= 0
    for changes, words in (
        ({"memory": "blocks"}, "rotations are learned on all blocks at once"),
        ({"quant__packer": "sketch", "quant__group": 128}, "learned is for even grids, and sketch makes tables"),
    ):
        with pytest.raises(RecipeError, match=words):
            pipeline.run(asked.with_(**changes), tmp_path / "out")
    monkeypatch.setattr(world, "size", lambda: 2)
    with pytest.raises(RecipeError, match="are learned in one process"):
        rotating.check(load.load(str(tied), "cpu").model, asked.quant, "tied")
