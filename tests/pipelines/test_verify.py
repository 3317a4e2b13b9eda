"""`compressor verify`: every flipped bit is found and its tensor named, whatever the format; so is whatever else lies in the folder."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compressor.errors import RecipeError
from compressor.export import compressed_tensors
from compressor.pipelines import digests, export
from compressor.pipelines.verify import BROKEN, UNPROVEN, WHOLE, verify
from compressor.recipe import Recipe
from tests.pipelines import folders, pruned
from tests.pipelines import foreign_folders as made
from tests.pipelines.commands import call

FORMATS = ["compressed-tensors", "compressor", "gptq", "awq", "mlx", "hqq"]
SOURCE = {"name": "somebody", "sha256": "0" * 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """(form, bits, symmetric, group) -> a packed folder, made once, without digests."""
    return made.maker(tmp_path_factory.mktemp("made"), tokenizer)


@pytest.fixture
def sealed(folder: Any, tmp_path: Path) -> Callable[..., Path]:
    """The same with digests, an adapter, a task file, a card, a recipe and a report beside the weights: a copy to spoil."""

    def make(*args: Any, name: str = "sealed", seed: int = 0) -> Path:
        place = Path(shutil.copytree(folder(*args), tmp_path / name))
        torch.manual_seed(seed)
        (place / "adapter").mkdir()
        (place / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 2, "seed": seed}))
        save_file({"base.lora_A.weight": torch.randn(2, 32), "base.lora_B.weight": torch.randn(32, 2)}, place / "adapter/adapter_model.safetensors")
        save_file({"layer.scale": torch.rand(8, 2)}, place / "task.safetensors")
        recipe = Recipe(model="somebody", seed=seed).to_dict()
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (place / "report.json").write_text(json.dumps({"compressor": "0", "keys": "k", "recipe": recipe, "created": random.random()}))
        (place / "README.md").write_text(f"# A model\n\nof seed {seed}\n")
        digests.seal(place, SOURCE)
        return place

    return make


def faults(place: Path, **asked: Any) -> list[dict[str, Any]]:
    return verify(place, **asked)[0]["faults"]


def only(place: Path, **asked: Any) -> dict[str, Any]:
    """The one fault of a folder."""
    found = faults(place, **asked)
    assert len(found) == 1, found
    return found[0]


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flips one bit of a file; a second time brings it back."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def flip_each(place: Path) -> int:
    """One bit at a random place in each tensor of each file, one at a time: exactly that tensor is named. Returns how many."""
    draw, count = random.Random(0), 0
    for name in digests.listed(place):
        for span in digests.layout(place / name) if digests.weights(name) else []:
            at, bit = draw.randrange(span.begin, span.end), draw.randrange(8)
            flip(place / name, at, bit)
            found = only(place)
            assert (found["file"], found["tensor"]) == (name, span.name) and found["begin"] <= at - span.begin < found["end"], (span, found)
            flip(place / name, at, bit)
            count += 1
    return count


@pytest.mark.parametrize("form", FORMATS)
def test_a_flipped_bit_is_found_and_its_tensor_named(sealed: Any, form: str) -> None:
    place = sealed(form)
    assert verify(place)[0]["verdict"] == WHOLE
    assert flip_each(place) == sum(len(each.get("tensors", ())) for each in digests.read(place)["files"].values()) > 20
    assert verify(place)[0]["verdict"] == WHOLE, "every bit is back in its place"


def test_of_sparse_dense_and_gguf_folders_too(sealed: Any, tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("gguf")
    source = pruned.source(tmp_path / "dense", tokenizer, keys=2)
    pruned.whole(tmp_path / "sparse", model=str(source), prune__method="obert", prune__ratio=0.5)
    packed = sealed("compressed-tensors")
    for name in ("adapter", "task.safetensors"):
        shutil.rmtree(packed / name) if (packed / name).is_dir() else (packed / name).unlink()
    for to in ("gguf:q4_0", "bf16"):
        export.export(str(packed), tmp_path / to, export.Target(to, device="cpu", consumers=False))
    for name in ("sparse", "gguf:q4_0", "bf16"):
        assert verify(tmp_path / name)[0]["verdict"] == WHOLE
        assert flip_each(tmp_path / name) > 10


def test_large_tensors_say_where_bits_flipped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file({"w": torch.randn(5000, 128), "x": torch.zeros(3)}, tmp_path / "model.safetensors")
    digests.seal(tmp_path, None)
    span = next(span for span in digests.layout(tmp_path / "model.safetensors") if span.name == "w")
    flip(tmp_path / "model.safetensors", span.begin + 4 * (128 * 3000 + 5))
    found = only(tmp_path)
    assert (found["tensor"], found["begin"], found["end"]) == ("w", 1 << 20, 2 << 20)
    assert found["what"] == "has other bits within its bytes 1048576 to 2097151, rows 2048 to 4095"


def test_a_shard_of_another_run_or_in_another_place(tmp_path: Path) -> None:
    weights = {f"model.layers.{i}.mlp.down_proj": folders.weight(3) for i in range(6)}
    for name, noise in (("a", 0.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        tensors = {f"model.layers.{i}.norm.weight": torch.randn(600) + noise for i in range(12)}
        compressed_tensors.write(tmp_path / name, folders.CONFIG, [*tensors.items(), *weights.items()], [], shard_bytes=7000)
        digests.seal(tmp_path / name, None)
    shards = sorted(path.name for path in (tmp_path / "a").glob("model-*.safetensors"))
    assert len(shards) > 3 and faults(tmp_path / "a") == []
    copy = Path(shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "far"))
    assert faults(copy) == [], "a copy in another place is as good"
    shutil.copyfile(tmp_path / "b" / shards[0], copy / shards[0])
    found = faults(copy)
    assert {each["file"] for each in found} == {shards[0]}
    shutil.copyfile(tmp_path / "a" / shards[1], copy / shards[0])
    assert only(copy) == {"file": shards[0], "what": f"holds what {shards[1]} should hold"}
    (copy / shards[0]).unlink()
    assert only(copy) == {"file": shards[0], "what": "is missing"}


def test_weights_of_another_model_with_the_same_names(sealed: Any) -> None:
    a, b = sealed("compressed-tensors", name="a"), sealed("compressed-tensors", name="b", seed=1)
    shutil.copyfile(b / "adapter" / "adapter_model.safetensors", a / "adapter" / "adapter_model.safetensors")
    assert {each["file"] for each in faults(a)} == {"adapter/adapter_model.safetensors"}
    tensors = load_file(a / "model.safetensors")
    save_file({key: t.view(torch.uint8).bitwise_not().view(t.dtype) for key, t in tensors.items()}, b / "model.safetensors", {"format": "pt"})
    assert only(b)["what"] == f"holds other numbers in all of its {len(tensors)} tensors: it is a file of another model or run"


Damage = Callable[[Path, dict[str, torch.Tensor]], Any]


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weights"] = tensors.pop("model.norm.weight")


@pytest.mark.parametrize(("change", "tensor", "what"), [
    (_rename, "model.norm.weight", "is called 'model.norm.weights' now"),
    (lambda t: t.pop("model.norm.weight"), "model.norm.weight", "is missing"),
    (lambda t: t.update(more=torch.zeros(2)), "more", "was not written"),
    (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}), "model.norm.weight", "is F32 [64], where F16 [64] was written"),
    (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][None]}), "model.norm.weight", "is F16 [1, 64], where F16 [64] was written"),
])  # fmt: skip
def test_tensors_under_other_names_shapes_and_dtypes(sealed: Any, change: Any, tensor: str, what: str) -> None:
    place = sealed("compressed-tensors")
    made.change_tensors(place, change)
    assert only(place) == {"file": "model.safetensors", "tensor": tensor, "what": what}


def test_headers_ends_and_files(sealed: Any) -> None:
    place = sealed("compressed-tensors")
    path = place / "model.safetensors"
    content = path.read_bytes()
    last = digests.layout(path)[-1].name
    path.write_bytes(content[:-1])
    found = faults(place)
    assert found[0]["what"] == f"is truncated: {len(content) - 1} bytes, where there should be {len(content)}"
    assert found[1]["tensor"] == last and len(found) == 2
    path.write_bytes(content + b"\0")
    assert only(place)["what"] == "has 1 bytes behind its last tensor that nobody wrote"
    save_file(load_file(path), path, metadata={"format": "pt", "by": "somebody"}) if path.write_bytes(content) else None
    assert only(place)["what"] == "has another header, with the same tensors"
    for wrong in (
        b"",
        b"\xff" * 8,
        content[:20],
        b"\x10" + bytes(7) + b'{"a": {"dtype": ',
        b"\x02" + bytes(7) + b"[]",
        content[:8] + b"x" + content[9:],
    ):
        path.write_bytes(wrong)
        assert "cannot be read" in only(place)["what"]
    path.unlink()
    os.mkfifo(path)
    assert only(place) == {"file": "model.safetensors", "what": "is no plain file"}, "and nobody waits for it"


def test_what_does_not_belong_together(sealed: Any) -> None:
    place, other = sealed("gptq"), sealed("gptq", name="other", seed=1)
    kept = {name: (place / name).read_bytes() for name in ("README.md", "recipe.yaml", "report.json", "config.json", digests.NAME)}
    model = digests.recorded(other)["model"]

    def told() -> str:
        found = only(place)
        for name, content in kept.items():
            (place / name).write_bytes(content)
        assert faults(place) == []
        return f"{found['file']} {found['what']}"

    for name in ("README.md", "report.json"):
        shutil.copyfile(other / name, place / name)
        assert told() == f"{name} is of another model, whose digest is {model}"
    (place / "README.md").write_bytes(kept["README.md"].replace(b"A model", b"The best model"))
    assert told() == "README.md was edited after it was written"
    (place / "README.md").write_text("# Hello")
    assert told() == "README.md was edited: it names no digest of the model"
    (place / "recipe.yaml").write_bytes(kept["recipe.yaml"].replace(b"bits: 3", b"bits: 4"))
    assert told() == "recipe.yaml was edited: quant.bits"
    (place / "config.json").write_bytes(kept["config.json"].replace(b"64", b"65"))
    assert told() == "config.json was changed in place"
    (place / "tokenizer.model").write_text("mine")
    assert only(place) == {"file": "tokenizer.model", "what": "was not written with the folder"}
    (place / "tokenizer.model").unlink()
    (place / digests.NAME).write_bytes(kept[digests.NAME].replace(b'"somebody"', b'"tiny"'))
    assert told() == "digests.json was edited: its digests are not those of its own entries"
    shutil.copyfile(other / digests.NAME, place / digests.NAME)
    assert {each["file"] for each in faults(place)} >= {"recipe.yaml", "README.md", "adapter/adapter_model.safetensors"}
    (place / digests.NAME).unlink()
    found = only(place)
    assert found["file"] == digests.NAME and found["what"] == "is missing or damaged, although README.md was written with one"


def test_a_list_that_was_made_anew_is_known_by_its_root_alone(sealed: Any) -> None:
    place = sealed("gptq")
    noted = digests.recorded(place)
    flip(place / "model.safetensors", (place / "model.safetensors").stat().st_size - 1)
    card = (place / "README.md").read_text()
    digests.seal(place, SOURCE)
    assert verify(place)[0]["verdict"] == WHOLE
    for kind in ("root", "model"):
        assert only(place, digest=noted[kind])["what"].startswith("is not of the folder that was asked for")
    assert faults(place, digest=f"SHA256:{digests.recorded(place)['root'].upper()}") == []
    (place / "README.md").write_text(card)
    document = digests.read(place)
    document["files"]["README.md"] = digests.entry(place / "README.md")
    (place / digests.NAME).write_text(json.dumps(document | {"root": digests.root(document)}))
    assert only(place)["what"] == f"is of another model, whose digest is {noted['model']}", "also where the list was made to fit"
    with pytest.raises(RecipeError, match="64 hex digits"):
        verify(place, digest="abc")


def test_a_list_that_keeps_the_tensors_of_other_weights_is_no_answer_to_their_digest(sealed: Any) -> None:
    place, other = sealed("compressed-tensors"), sealed("compressed-tensors", name="other", seed=1)
    noted, path = digests.read(place), place / "model.safetensors"
    flip(path, digests.layout(path)[-1].begin)
    shutil.copyfile(other / "adapter/adapter_model.safetensors", place / "adapter/adapter_model.safetensors")
    digests.seal(place, SOURCE)  # so that card and reports name the new model
    forged = digests.read(place)
    for name, each in noted["files"].items():
        if "tensors" in each:
            forged["files"][name]["tensors"] = each["tensors"]
    forged |= digests.sums(forged["files"])
    (place / digests.NAME).write_text(json.dumps(forged | {"root": digests.root(forged)}))
    assert digests.read(place)["weights"] == noted["weights"], "the old tensors, over the new files"
    for name in ("README.md", "report.json"):
        assert forged["model"] in (place / name).read_text()
    document, _ = verify(place, digest=noted["weights"])
    wrong = {"model.safetensors", "adapter/adapter_model.safetensors"}
    assert document["verdict"] == BROKEN and {each["file"] for each in document["faults"]} == wrong
    assert {each["what"] for each in document["faults"]} == {"does not hold the tensors that digests.json lists of it"}
    assert verify(other, digest=digests.read(other)["weights"])[0]["verdict"] == WHOLE


BESIDE = ("folder", "empty folder", "pipe", "dangling", "link to a folder", "inside the adapter's", "folder in place of a file")


@pytest.mark.parametrize("kind", BESIDE)
def test_whatever_lies_beside_breaks_a_folder(sealed: Any, kind: str, tmp_path: Path) -> None:
    place = sealed("gptq")
    path = place / ("adapter/more" if kind == "inside the adapter's" else "additional_chat_templates")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "link to a folder":
        path.symlink_to(tmp_path)
    elif kind == "folder in place of a file":
        path = place / "tokenizer_config.json"
        path.unlink()
        path.mkdir()
    else:
        path.mkdir()
        if kind == "folder":
            (path / "tool_use.jinja").write_text("{{ messages }}")
    document, _ = verify(place)
    what = "is no plain file" if kind == "folder in place of a file" else "was not written with the folder"
    assert (document["verdict"], document["notes"]) == (BROKEN, [])
    assert document["faults"] == [{"file": str(path.relative_to(place)), "what": what}]


def test_hidden_things_are_passed_over_and_an_empty_adapter_is_only_missing_its_files(sealed: Any) -> None:
    place = sealed("gptq")
    (place / ".cache" / "huggingface").mkdir(parents=True)
    (place / ".gitattributes").write_text("")
    assert verify(place)[0]["verdict"] == WHOLE
    for path in (place / "adapter").iterdir():
        path.unlink()
    assert [each["what"] for each in faults(place)] == ["is missing", "is missing"]


@pytest.mark.parametrize("edit", [
    lambda d: [], lambda d: d | {"version": 2}, lambda d: d | {"root": 5}, lambda d: d | {"files": {"../x": d["files"]["README.md"]}},
    lambda d: d | {"files": {"/etc/passwd": d["files"]["README.md"]}}, lambda d: d | {"files": {"a": {}}}, lambda d: d | {"source": "me"},
    lambda d: d | {"files": {"a": {"bytes": True, "sha256": "0" * 64}}}, lambda d: d | {"files": {"adapter/../x": d["files"]["README.md"]}},
])  # fmt: skip
def test_a_strange_list_is_one_sentence(sealed: Any, edit: Any) -> None:
    place = sealed("gptq")
    (place / digests.NAME).write_text(json.dumps(edit(digests.read(place))))
    found = faults(place)
    assert found[0]["file"] == digests.NAME and str(place) in found[0]["what"] and "\n" not in found[0]["what"]


def test_folders_without_digests(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    place = Path(shutil.copytree(folder("gptq"), tmp_path / "foreign"))
    code, out, err = call(monkeypatch, capsys, "verify", str(place))
    assert (code, json.loads(out)["verdict"]) == (2, UNPROVEN)
    assert "no digests" in err and json.loads(out)["faults"] == []
    (place / "images").mkdir()
    assert "the folder images inside it was not looked at" in verify(place)[0]["notes"]
    made.change_tensors(place, lambda tensors: tensors["model.layers.1.mlp.up_proj.scales"].view(-1)[7:8].fill_(torch.inf))
    code, out, _ = call(monkeypatch, capsys, "verify", str(place), "--source", "tiny")
    assert (code, json.loads(out)["verdict"]) == (1, BROKEN)
    assert [each["what"] for each in json.loads(out)["faults"]] == [
        "holds numbers that are not finite", "does not say what the folder was made from",
    ]  # fmt: skip
    assert json.loads(out)["faults"][0]["tensor"] == "model.layers.1.mlp.up_proj.scales"
    with (place / "model.safetensors").open("ab") as file:
        file.truncate(file.tell() - 9)
    assert any("truncated or damaged" in each["what"] for each in faults(place))
    for wrong in (tmp_path / "none", tmp_path):
        (tmp_path / "foreign").rename(tmp_path / ".hidden") if wrong == tmp_path else None
        code, out, err = call(monkeypatch, capsys, "verify", str(wrong))
        assert code == 2 and not out and err.startswith("error: ") and len(err.strip().splitlines()) == 1
