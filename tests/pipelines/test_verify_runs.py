"""`compressor verify` on the folders of every command that writes one: all are whole, and the same run has the same digests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import compressor
from compressor.pipelines import checkpoint, digests, encoder_run, export
from compressor.pipelines.verify import WHOLE, verify
from compressor.recipe import Recipe
from tests.pipelines import encoders, pruned
from tests.pipelines import foreign_folders as made
from tests.pipelines.commands import call
from tests.pipelines.test_verify import only


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Folders of runs, exports and tasks, all from the dense folder `source`."""
    at = tmp_path_factory.mktemp("runs")
    source = pruned.source(at / "source", tokenizer, keys=2, dtype=torch.float16)
    packed = {"model": str(source), "quant__packer": "rtn", "quant__bits": 4, "quant__group": 16}
    pruned.whole(at / "run", page=True, **packed)
    (at / "again").mkdir()
    pruned.whole(at / "again" / "run", **packed)
    pruned.whole(at / "adapter", tune__method="lora", tune__rank=2, **packed)
    pruned.whole(at / "tables", **packed | {"quant__packer": "sketch", "quant__bits": 2, "quant__group": 128})
    pruned.whole(at / "tuned", tune__method="peqa", **packed)
    pruned.whole(at / "task", tune__method="peqa", save="task", **packed)
    pruned.whole(at / "pruned", model=str(source), prune__method="magnitude", prune__ratio=0.25)
    for to in ("gptq", "table", "bf16"):
        export.export(str(at / "run"), at / to, export.Target(to, device="cpu", consumers=False))
    export.apply(str(at / "run"), [at / "task"], at / "applied")
    (at / "dense").mkdir()
    made.dense_folder(at / "dense", tokenizer)
    made.tune(at / "gptq", at / "retuned")
    compressor.load(str(at / "run"), "cpu").save(at / "api")
    encoders.make_encoder(at / "bert")
    encoders.write_tsv(at / "train.tsv", encoders.sentences(80))
    short = {"finetune__steps": 2, "prune__method": "obert", "prune__ratio": 0.5, "prune__steps": 4, "prune__gradients": 2, "prune__prunes": 1}
    encoder_run.run(
        Recipe(model=str(at / "bert")).with_(data__data=str(at / "train.tsv"), quant__packer="none", device="cpu", **short), at / "encoder"
    )
    return at


WRITTEN = {
    "run": "source", "adapter": "source", "tables": "source", "tuned": "source", "task": "source", "pruned": "source", "gptq": "run",
    "table": "run", "bf16": "run", "applied": "run", "retuned": "gptq", "api": "run", "encoder": "bert",
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_the_folder_of_every_command_passes(runs: Path, name: str) -> None:
    document, _ = verify(runs / name, source=str(runs / WRITTEN[name]))
    assert (document["verdict"], document["faults"], document["notes"]) == (WHOLE, [], [])
    assert document["source"]["name"] == WRITTEN[name]
    assert only(runs / name, source="tiny")["what"].startswith(f"says that the folder was made from {WRITTEN[name]}, sha256 ")
    seen = sorted(str(path.relative_to(runs / name)) for path in (runs / name).rglob("*") if path.is_file())
    assert seen == sorted([*digests.read(runs / name)["files"], digests.NAME]), "nothing is left out"
    for told in ("README.md", "report.json", "export.json"):
        assert not (runs / name / told).exists() or document["model"] in (runs / name / told).read_text()


def test_digests_are_no_part_of_the_model(runs: Path) -> None:
    assert digests.NAME not in [path.name for path in checkpoint.model_files(runs / "run")]
    report = json.loads((runs / "run" / "report.json").read_text())
    assert report["packed"]["folder_bytes"] == checkpoint.model_bytes(runs / "run")


def test_the_same_run_has_the_same_digests_but_for_its_times(runs: Path) -> None:
    first, second = digests.read(runs / "run"), digests.read(runs / "again" / "run")
    assert first["source"] == second["source"] and first["weights"] == second["weights"]
    changed = [name for name, each in first["files"].items() if each["sha256"] != second["files"][name]["sha256"]]
    recipe = [yaml.safe_load((runs / name / "recipe.yaml").read_text())["data"] for name in ("run", "again/run")]
    assert recipe[0] != recipe[1], "the texts lie in other places, which the recipe says"
    assert set(changed) <= {"recipe.yaml", *digests.ABOUT}
    values = digests.read(runs / "tuned")["weights"]
    assert values == digests.read(runs / "applied")["weights"] != first["weights"], "a base with its task is the tuned model"


def test_a_run_that_is_found_finished_tells_its_root(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = pruned.whole(runs / "run", model=str(runs / "source"), quant__packer="rtn", quant__bits=4, quant__group=16)
    assert found["resumed"] and found["digest"] == digests.recorded(runs / "run")["root"]
    code, out, _ = call(monkeypatch, capsys, "verify", str(runs / "run"), "--digest", found["digest"])
    assert (code, json.loads(out)["verdict"]) == (0, WHOLE)
    code, out, err = call(monkeypatch, capsys, "inspect", str(runs / "run"))
    assert json.loads(out)["digests"] == digests.recorded(runs / "run") and "compressor verify" in err
    code, out, err = call(monkeypatch, capsys, "doctor", str(runs / "source"))
    assert json.loads(out)["digests"] is None and "no digests" in err
