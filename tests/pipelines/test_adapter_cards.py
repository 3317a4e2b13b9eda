"""What the card and `inspect` say of folders with adapters; the code on the card is run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compressor
from compressor.integrations import peft
from compressor.pipelines import checkpoint, encoder_run, load
from compressor.pipelines.tools import inspect_folder
from compressor.recipe import Recipe
from tests.pipelines import encoders
from tests.pipelines.pruned import logits, text, whole
from tests.tolerances import RELATIVE, error

TUNED: dict[str, Any] = {"quant__packer": "rtn", "quant__bits": 3, "tune__method": "rslora", "tune__rank": 4, "tune__steps": 4, "tune__lr": 2e-2}
IDS = text(vocabulary=2000)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tiny that keeps its adapter."""
    place = tmp_path_factory.mktemp("cards") / "out"
    whole(place, page=True, **TUNED)
    return place


def card(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


def executed(folder: Path) -> list[dict[str, Any]]:
    """What each block of Python on the card leaves behind, run in their order."""
    out: list[dict[str, Any]] = [{}]
    for code in re.findall(r"```python\n(.*?)```", card(folder), re.DOTALL):
        out.append(dict(out[-1]))
        exec(compile(code.replace("FOLDER", str(folder)), "card", "exec"), out[-1])
    return out[1:]


def answers(model: Any, ids: Tensor = IDS) -> Tensor:
    return logits(model.eval(), ids.to(next(model.parameters()).device)).cpu()


def both(model: Any) -> tuple[Tensor, Tensor]:
    """Logits with the adapter of a loaded folder and of the bare base."""
    tuned = answers(model)
    peft.strip(model)
    return tuned, answers(model)


def test_the_code_on_the_card_loads_base_and_adapter(kept: Path) -> None:
    tuned, base = both(compressor.load(str(kept)).model)
    first, stock = executed(kept)
    assert torch.equal(answers(first["model"]), tuned)
    assert error(tuned, base) > 1e-2
    assert error(answers(stock["model"]), base) < 10 * RELATIVE[torch.float16]
    assert "compressed-tensors" in card(kept) and "peft cannot attach the adapter" in card(kept)


def test_the_code_on_the_card_of_tables_too(tmp_path: Path) -> None:
    table = {"quant__packer": "sketch", "quant__bits": 3, "quant__start": "uniform", "quant__feedback": False, "quant__refit": False}
    whole(tmp_path / "out", **TUNED | table | {"tune__method": "ia3", "tune__rank": 8, "tune__lr": 0.2})
    tuned, base = both(compressor.load(str(tmp_path / "out")).model)
    stock, adapted = executed(tmp_path / "out")
    assert "peft_model" in str(type(adapted["model"])) and "peft" not in str(type(stock["model"]))
    limit = 10 * RELATIVE[torch.float16]
    assert error(answers(adapted["model"]), tuned) < limit < error(tuned, base)
    said = card(tmp_path / "out")
    assert "--enable-lora" not in said and "of the kind ia3, is left out" in said


def test_the_code_on_the_card_of_an_encoder(tmp_path: Path) -> None:
    encoders.make_encoder(tmp_path / "bert")
    encoders.write_tsv(tmp_path / "train.tsv", encoders.sentences(200))
    keys: dict[str, Any] = {"data__data": str(tmp_path / "train.tsv"), "finetune__steps": 20, "quant__packer": "rtn", "quant__group": 32}
    recipe = Recipe(model=str(tmp_path / "bert"), device="cpu").with_(**keys, tune__method="lora", tune__steps=10, tune__lr=2e-2)
    folder = tmp_path / "out"
    encoder_run.run(recipe, folder)
    ids = torch.randint(5, len(encoders.VOCAB), (4, 9), generator=torch.Generator().manual_seed(0))
    loaded = load.load_packed(folder, checkpoint.any_config(folder), torch.device("cpu"), "out")
    tuned = answers(loaded.model, ids)
    peft.strip(loaded.model)
    first, stock = executed(folder)
    assert error(answers(first["model"], ids), tuned) < 1e-5 and error(tuned, answers(loaded.model, ids)) > 1e-2
    assert error(answers(stock["model"], ids), answers(loaded.model, ids)) < 10 * RELATIVE[torch.float16]
    assert "vllm" not in card(folder).lower()


def test_an_absorbed_adapter_is_said_to_be(tmp_path: Path) -> None:
    whole(tmp_path / "out", **TUNED | {"tune__adapter": "absorb", "tune__absorb_limit": 1e9})
    facts = json.loads((tmp_path / "out" / "report.json").read_text())["training"]["absorb"]
    said = card(tmp_path / "out")
    assert "the codes stayed" not in said and "the packed weights then took it up" in said
    assert f"{facts['before']:,.3f} with the adapter beside, {facts['after']:,.3f} absorbed ({facts['rise']:+.1%})" in said
    assert f"logits change by {facts['max_logit_change']:.3f} at most" in said and "PeftModel" not in said


def test_inspect_names_layers_and_adapter(kept: Path) -> None:
    document, table = inspect_folder(str(kept))
    report = json.loads((kept / "report.json").read_text())
    assert [(row["name"], row["error"]) for row in document["layers"]] == [(row["name"], row["error"]) for row in report["layers"]]
    beside = sum(p.stat().st_size for p in (kept / "adapter").iterdir())
    trained = report["training"]["trainable"]
    assert document["adapter"] == {"kind": "rslora", "rank": 4, "linears": 28, "parameters": trained, "bytes": beside}
    assert document["folder_bytes"] == checkpoint.model_bytes(kept) + beside and document["bits_per_weight"] == 3.125
    assert f"rslora of rank 4 beside 28 of 28 linears, {trained:,} numbers" in str(table.caption)


def test_float_zeros_are_named(tmp_path: Path) -> None:
    document = whole(
        tmp_path / "out", page=True, quant__packer="rtn", quant__bits=3, tune__method="qalora", tune__steps=2, tune__targets="q_proj, down_proj"
    )
    found, table = inspect_folder(str(tmp_path / "out"))
    tuned = {row["name"]: row["name"].endswith(("q_proj", "down_proj")) for row in found["layers"]}
    assert {row["name"]: row["float_zeros"] for row in found["layers"]} == tuned and "adapter" not in found
    assert list(table.columns[4].cells) == ["float zeros" if floats else "sym" for floats in tuned.values()]
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert page.count("<td>float zeros</td>") == 8 + 1 and page.count("<td>symmetric</td>") == 20 + 1
    packed, after = document["packed"], document["tuned"]
    assert packed["bits_per_weight"] == 3.125 < after["bits_per_weight"]
    zeros = 2 * (4 * 128 + 4 * 128 * 3)
    assert after["folder_bytes"] - packed["folder_bytes"] == zeros
