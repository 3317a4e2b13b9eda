"""`diff`: one base or not, and how far values are apart, from folders and from task files alike."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import compressor
from compressor.linear import packed_linears
from compressor.pipelines.differences import diff
from tests.pipelines.commands import call
from tests.pipelines.packed import moved, scale_folder, table_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scales and tables, folders, and of each a tuned one with its task file."""
    at = tmp_path_factory.mktemp("diff")
    scale_folder(at / "scales")
    table_folder(at / "tables", 0.15)
    for name in ("scales", "tables"):
        model = compressor.load(str(at / name), "cpu")
        moved(model.model)
        layer = packed_linears(model.model)["model.layers.1.mlp.up_proj"]
        layer.learned = layer.learned * 2
        model.save(at / f"{name}-tuned")
        model.save_task(at / f"{name}.safetensors")
    return at


@pytest.fixture
def at(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folders)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folders


@pytest.mark.parametrize("kind", ["scales", "tables"])
def test_values_of_one_base(at: Path, kind: str) -> None:
    document, table = diff(kind, f"{kind}-tuned")
    assert (document["same_base"], document["same_values"], document["differences"], document["moved"]) == (True, False, [], 28)
    assert table.row_count == 28
    norms = [row["norm"] for row in document["layers"]]
    assert norms == sorted(norms, reverse=True)
    assert document["layers"][0]["name"] == "model.layers.1.mlp.up_proj"
    before, after = (packed_linears(compressor.load(name, "cpu").model) for name in (kind, f"{kind}-tuned"))
    for row in document["layers"]:
        a, b = before[row["name"]].learned.double(), after[row["name"]].learned.double()
        assert row["norm"] == pytest.approx(float((b - a).square().sum().sqrt() / a.square().sum().sqrt()))
        unit = a.abs() if kind == "scales" else a.square().mean(-1, keepdim=True).sqrt()
        assert row["largest"] == pytest.approx(float(((b - a).abs() / unit).max()))
    for one, other in ((kind, f"{kind}.safetensors"), (f"{kind}.safetensors", f"{kind}-tuned")):
        found, _ = diff(one, other)
        assert found["same_base"]
        assert found["layers"] == (document["layers"] if one == kind else sorted(found["layers"], key=lambda row: row["norm"]))
    same, _ = diff(f"{kind}.safetensors", f"{kind}-tuned")
    assert (same["same_values"], same["moved"]) == (True, 0)


def test_files_of_two_kinds_cannot_say_whether_they_have_one_base(
    at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, capsys, "diff", "scales.safetensors", "tables.safetensors")
    document = json.loads(out.strip().splitlines()[-1])
    assert (code, document["same_base"], document["same_values"], document["layers"]) == (0, None, False, [])
    assert "cannot say whether they are of one base" in " ".join(err.split())


def test_names_are_neither_markup_nor_control(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (at / "lr[").mkdir(exist_ok=True)
    (at / "lr[" / "1]").mkdir(exist_ok=True)
    shutil.copy(at / "scales.safetensors", at / "lr[" / "1]" / "task.safetensors")
    with safe_open(at / "scales.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = {name: load_file(at / "scales.safetensors")[f"{LAYER}.scale"] for name in ("[/x].scale", "\x1b]0;p\x07\x1b[31mred.scale")}
    save_file(tensors, at / "strange", metadata=metadata)
    for one, other, words in (("scales", "lr[/1]", "lr[/1]"), ("strange", "strange", "[/x]")):
        code, out, err = call(monkeypatch, capsys, "diff", one, other)
        assert code == 0, err
        assert json.loads(out.strip().splitlines()[-1])["b"] == other
        assert words in err and "\x1b]" not in err and "\x07" not in err


def test_the_document_is_json(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(monkeypatch, capsys, "diff", "scales", "scales.safetensors")
    assert code == 0, err
    document = json.loads(out.strip().splitlines()[-1])
    assert document.keys() == {"a", "b", "kinds", "bases", "same_base", "same_values", "differences", "moved", "layers"}
    assert "one base, 28 layers moved" in " ".join(err.split())
    assert "model.layers.1.mlp.up_proj" in err


def damaged(at: Path, change: Any) -> str:
    """A copy of the folder `scales` with changed tensors."""
    shutil.rmtree(at / "other", ignore_errors=True)
    shutil.copytree(at / "scales", at / "other")
    tensors = load_file(at / "other" / "model.safetensors")
    change(tensors)
    save_file(tensors, at / "other" / "model.safetensors", metadata={"format": "pt"})
    return "other"


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "name", "what"),
    [
        (lambda t: t[f"{LAYER}.weight_packed"][3].bitwise_xor_(1), LAYER, "codes"),
        (lambda t: t[f"{LAYER}.weight_zero_point"][0].bitwise_xor_(1), LAYER, "zeros"),
        (lambda t: t["model.norm.weight"][0].add_(1), "model.norm.weight", "numbers"),
    ],
)
def test_unlike_bases_are_told_apart_by_name(at: Path, change: Any, name: str, what: str) -> None:
    document, table = diff("scales", damaged(at, change))
    assert document["same_base"] is False
    assert document["differences"] == [{"name": name, "what": what}]
    assert (document["same_values"], document["moved"], len(document["layers"])) == (False, 0, 28)
    assert table.row_count == 29
    found, table = diff("other", "scales.safetensors")
    assert (found["same_base"], found["differences"], found["moved"]) == (False, [], 28)


def test_other_shapes_and_kinds(at: Path) -> None:
    document, _ = diff("scales", "tables")
    assert (document["kinds"], document["same_base"], document["layers"]) == (["scale", "table"], False, [])
    assert {row["what"].rpartition(" ")[2] for row in document["differences"]} == {"tables"}
    compressor.load("tiny", "cpu").compress(bits=2, packer="rtn", ignore=["q_proj"]).save(at / "two")
    document, _ = diff("scales", "two")
    told = {row["name"]: row["what"] for row in document["differences"]}
    assert told[LAYER] == "packed in A only"
    assert told[f"{LAYER}.weight"] == "dense in B only"
    assert "3 bits" in told["model.layers.0.mlp.up_proj"]
    assert "2 bits" in told["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tiny", "scales"], "tiny is dense"),
        (["scales", "missing.safetensors"], "there is no task file missing.safetensors"),
        (["scales", "./missing"], "there is no model folder ./missing"),
        (["scales", "scales/model.safetensors"], "is no task file"),
        (["scales", "scales/config.json"], "cannot be read"),
    ],
)
def test_bad_inputs(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    code, out, err = call(monkeypatch, capsys, "diff", *args)
    assert (code, out) == (2, ""), err
    assert words in " ".join(err.split())
