"""`export`, `task` and `apply`: folders that others load, losses that are measured, values that come back bit for bit."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.errors import ModelError, OutputError, RecipeError
from compressor.kernels import layout
from compressor.linear import packed_linears
from compressor.packed import Affine
from compressor.pipelines import checkpoint, data, evaluate, export, load, output, tasks, write
from compressor.quant import rtn
from compressor.recipe import Quant
from tests.pipelines.commands import call
from tests.pipelines.packed import logits, moved, scale_folder, table_folder

TEXT = "The quick brown fox jumps over the lazy dog, and a list holds the names of every object in it. " * 30


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table_folder(tmp_path_factory.mktemp("tables") / "sk3", 0.15)


@pytest.fixture(scope="module")
def scales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scale_folder(tmp_path_factory.mktemp("scales") / "w3")


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def target(to: str, **options: Any) -> export.Target:
    """A projection is measured on text.txt, in windows of 64; nothing else is."""
    return export.Target(to, **{"device": "cpu"} | options)


def projection(**options: Any) -> export.Target:
    return target("compressed-tensors", **{"data": "text.txt", "window": 64} | options)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())


@pytest.mark.parametrize(("to", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16)])
@pytest.mark.parametrize("kind", ["tables", "scales"])
def test_dense_folders_are_ordinary(at: Path, request: pytest.FixtureRequest, kind: str, to: str, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    source: Path = request.getfixturevalue(kind)
    document, shown = export.export(str(source), at / "out", target(to))
    assert {p.name for p in (at / "out").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "export.json"}
    config = json.loads((at / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    packed = load.load(str(source), "cpu")
    model = AutoModelForCausalLM.from_pretrained(at / "out")
    assert model.dtype == dtype
    for name, weight in load.packed_weights(packed.model).items():
        assert torch.equal(model.get_submodule(name).weight, weight.dequantize().to(dtype))
    assert load.load(str(at / "out"), "cpu").tokenizer("a b")["input_ids"] == packed.tokenizer("a b")["input_ids"]
    if document["exact"]:
        assert torch.allclose(logits(model.float()), logits(packed.model), atol=1e-4, rtol=1e-4)
    rows = record(at / "out")["layers"]
    assert len(rows) == 28 == shown.row_count
    assert document["verified"]
    assert document["folder_bytes"] == checkpoint.model_bytes(at / "out")
    assert document["error"]["largest"] == max(row["largest"] for row in rows)
    if to == "bf16":
        assert 0 < document["error"]["mean"] < document["error"]["largest"] <= 2**-8
    if (kind, to) == ("tables", "float16"):
        assert document["exact"]
        assert document["error"]["largest"] == 0, "float16 tables in a float16 folder lose nothing"


def test_scales_are_written_again_exactly(at: Path, scales: Path) -> None:
    document, _ = export.export(str(scales), at / "out", target("compressed-tensors"))
    assert (document["exact"], document["format"], document["error"]) == (True, "compressed-tensors pack-quantized", {"largest": 0.0, "mean": 0.0})
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (at / "out" / name).read_bytes() == (scales / name).read_bytes()


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group": 32}, {"symmetric": False}, {"group": -1}])
def test_tables_are_projected_with_their_loss(at: Path, tables: Path, options: dict[str, Any]) -> None:
    document, shown = export.export(str(tables), at / "out", projection(**options))
    again, was = load.load(str(at / "out"), "cpu"), load.load(str(tables), "cpu")
    assert again.config["quantization_config"]["quant_method"] == "compressed-tensors"
    sketches = load.packed_weights(was.model)
    rows = {row["name"]: row for row in record(at / "out")["layers"]}
    assert shown.row_count == len(rows) == 28
    for name, weight in load.packed_weights(again.model).items():
        assert isinstance(weight.values, Affine)
        exact = sketches[name].dequantize()
        group = exact.shape[1] if options.get("group") == -1 else options.get("group", 128)
        assert (weight.bits, weight.group, weight.zero is None) == (options.get("bits", 3), group, options.get("symmetric", True))
        best, _ = rtn.pack(exact, None, Quant(bits=weight.bits, symmetric=weight.zero is None), group, torch.float16)
        assert torch.equal(best.dequantize(), weight.dequantize())
        error = float((exact - weight.dequantize()).norm() / exact.norm())
        assert rows[name]["error"] == pytest.approx(error, rel=1e-4)
        assert (rows[name]["table_bits"], rows[name]["segment"]) == (3, exact.shape[1])
    corpus = {"text": data.load_text("text.txt")}
    for key, loaded in (("before", was), ("after", again)):
        found = evaluate.measure(loaded.model, loaded.tokenizer, corpus, 64)["text"]["perplexity"]
        assert document["perplexity"][key] == pytest.approx(found, rel=1e-6)
    assert document["perplexity"]["growth"] == pytest.approx(document["perplexity"]["after"] / document["perplexity"]["before"] - 1)
    assert document["perplexity"]["protocol"]["window"] == 64
    assert not document["exact"]


def test_even_tables_lose_nothing(at: Path) -> None:
    """Tables that hold an even grid are projected onto that very grid."""
    source = table_folder(at / "even", 0.0)
    document, _ = export.export(str(source), at / "out", projection(group=-1))
    assert document["error"]["largest"] < 1e-3, "what is left is the rounding of table entries to float16"
    assert abs(document["perplexity"]["growth"]) < 1e-3


def test_a_loss_too_large_is_refused(at: Path, tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["export", str(tables), "--to", "compressed-tensors", "--bits", "2", "--data", "text.txt", "--window", "64", "-o", "out"]
    code, out, err = call(monkeypatch, capsys, *args, "--max-loss", "0.01")
    assert (code, out) == (2, "")
    assert "--max-loss allows 1.00%; nothing was written" in " ".join(err.split())
    assert [p.name for p in at.iterdir()] == ["text.txt"]
    code, out, err = call(monkeypatch, capsys, *args, "--max-loss", "1e9", "--max-tokens", "128")
    assert code == 0, err
    document = json.loads(out.strip().splitlines()[-1])
    assert document["output"] == "out"
    assert document["perplexity"]["protocol"]["tokens"] == 126
    assert {p.name for p in at.iterdir()} == {"text.txt", "out"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["export", "tiny", "--to", "bf16", "-o", "out"], "tiny is dense"),
        (["export", "nowhere", "--to", "bf16", "-o", "out"], "nowhere"),
        (["export", "TABLES", "--to", "ggml", "-o", "out"], "--to 'ggml' is unknown"),
        (["export", "TABLES", "--to", "bf16", "--bits", "3", "-o", "out"], "is for the projection of tables, and --to bf16 has none"),
        (["export", "TABLES", "--to", "bf16", "--max-loss", "1", "-o", "out"], "and adapters that are absorbed, and --to bf16 has none"),
        (["export", "TABLES", "--to", "compressed-tensors", "--max-loss", "-1", "-o", "out"], "max-loss=-1.0"),
        (["export", "TABLES", "--to", "compressed-tensors", "--max-loss", "nan", "-o", "out"], "max-loss=nan"),
        (["export", "TABLES", "--to", "compressed-tensors", "--bits", "5", "-o", "out"], "bits=5 is not supported"),
        (["export", "TABLES", "--to", "compressed-tensors", "--group", "7", "-o", "out"], "group=7 does not fit"),
        (["export", "TABLES", "--to", "compressed-tensors", "--group", "0", "-o", "out"], "group=0 is not a group size"),
        (["export", "TABLES", "--to", "compressed-tensors", "--data", "missing.txt", "-o", "out"], "missing.txt"),
        (["export", "TABLES", "--to", "compressed-tensors", "--window", "999", "-o", "out"], "more than the 256 tokens"),
        (["export", "SCALES", "--to", "compressed-tensors", "--asym", "-o", "out"], "its grids are written as they are"),
        (["export", "TABLES", "--to", "bf16", "-o", "theirs"], "theirs already holds files"),
        (["export", "TABLES", "--to", "bf16", "-o", "text.txt"], "is a file"),
        (["export", "TABLES", "--to", "bf16", "-o", "."], "is the current folder"),
        (["export", "TABLES", "--to", "bf16", "-o", "/"], "cannot be an output folder"),
        (["export", "TABLES", "--to", "bf16", "-o", "TABLES"], "already holds files"),
        (["export", "TABLES", "--to", "bf16", "-o", "taken"], "holds files that are not of a run"),
        (["export", "TABLES", "--to", "bf16", "--data", "missing.txt", "-o", "out"], "--data is for the projection of tables"),
        (["export", "SCALES", "--to", "compressed-tensors", "--group", "64", "-o", "out"], "--group is for the projection of tables"),
        (["export", "TABLES", "--to", "bf16", "-o", "TABLES/sub"], "lies inside the model's own folder"),
        (["apply", "SCALES", "s.safetensors", "-o", "SCALES/sub"], "lies inside the model's own folder"),
        (["task", "TABLES", "-o", "TABLES/model.task"], "lies inside the model's own folder"),
        (["apply", "TABLES", "theirs", "-o", "out"], "is a folder, not a task file"),
        (["task", "tiny", "-o", "t"], "tiny is dense"),
        (["task", "TABLES", "-o", "text.txt"], "already exists"),
        (["task", "TABLES", "-o", "text.txt/t"], "cannot be written"),
        (["apply", "TABLES", "text.txt", "-o", "out"], "cannot be read"),
        (["apply", "TABLES", "missing", "-o", "out"], "there is no task file missing"),
        (["apply", "TABLES", "s.safetensors", "-o", "out"], "holds scales, but the base holds tables"),
        (["apply", "tiny", "s.safetensors", "-o", "out"], "tiny is dense"),
        (["apply", "SCALES", "s.safetensors", "-o", "theirs"], "theirs already holds files"),
    ],
)
def test_bad_inputs(
    at: Path, tables: Path, scales: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    for name in ("theirs", "taken.exporting"):
        (at / name).mkdir()
        (at / name / "thesis.tex").write_text("mine")
    tasks.extract(str(scales), at / "s.safetensors")
    before = sorted(at.rglob("*"))
    code, out, err = call(monkeypatch, capsys, *(a.replace("TABLES", str(tables)).replace("SCALES", str(scales)) for a in args))
    assert (code, out) == (2, ""), err
    assert words in " ".join(err.split())
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    assert sorted(at.rglob("*")) == before


def test_a_failure_leaves_nothing(at: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.dense, "prove", full)
    with pytest.raises(OutputError, match="the disk is full"):
        export.export(str(tables), at / "out", target("bf16"))
    assert [p.name for p in at.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("kind", ["tables", "scales"])
def test_task_and_apply_give_the_tuned_folder_back(
    at: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    base: Path = request.getfixturevalue(kind)
    loaded = load.load(str(base), "cpu")
    moved(loaded.model)
    write.write_folder(loaded, at / "tuned")
    report = {"compressor": "1", "keys": "k", "model": {"name": "tiny"}, "recipe": {"tune": {"method": "peqa", "lr": 0.005}}}
    (at / "tuned" / "report.json").write_text(json.dumps(report | {"tuned": {"domain": {"perplexity": 29.5}, "outside": {"perplexity": 46.25}}}))
    code, out, err = call(monkeypatch, capsys, "task", "tuned", "-o", "new/t.safetensors")
    assert code == 0, err
    document = json.loads(out.strip().splitlines()[-1])
    assert document["output"] == "new/t.safetensors"
    assert document["bytes"] == (at / "new" / "t.safetensors").stat().st_size
    assert (document["model"], document["recipe"], document["metrics"]) == ("tiny", report["recipe"]["tune"], {"domain": 29.5, "outside": 46.25})
    assert document["base"] == tasks.extract(str(base), at / "untuned.safetensors")["base"]
    code, out, err = call(monkeypatch, capsys, "apply", str(base), "new/t.safetensors", "-o", "out")
    assert code == 0, err
    document = json.loads(out.strip().splitlines()[-1])
    assert (document["output"], document["layers"], document["verified"]) == ("out", 28, True)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (at / "out" / name).read_bytes() == (at / "tuned" / name).read_bytes()
    assert record(at / "out")["tasks"][0]["metrics"] == {"domain": 29.5, "outside": 46.25}


@pytest.mark.parametrize("kind", ["tables", "scales"])
def test_tasks_in_python(at: Path, request: pytest.FixtureRequest, kind: str) -> None:
    base = str(request.getfixturevalue(kind))
    tuned, model = compressor.load(base, "cpu"), compressor.load(base, "cpu")
    moved(tuned.model)
    assert tuned.save_task(at / "t.safetensors")["layers"] == 28
    words = {name: layer.words for name, layer in packed_linears(model.model).items()}
    before = logits(model.model)
    assert not torch.equal(before, logits(tuned.model))
    assert model.load_task(str(at / "t.safetensors")) is model
    assert torch.equal(logits(model.model), logits(tuned.model))
    assert all(layer.words is words[name] for name, layer in packed_linears(model.model).items())
    model.save_task(at / "again.safetensors")
    assert (at / "again.safetensors").read_bytes() == (at / "t.safetensors").read_bytes()


def test_a_model_in_memory_has_the_base_of_its_folder(at: Path) -> None:
    model = compressor.load("tiny", "cpu").compress(bits=2, packer="rtn")
    model.save(at / "folder")
    first = model.save_task(at / "a.safetensors")
    assert compressor.load(str(at / "folder"), "cpu").save_task(at / "b.safetensors")["base"] == first["base"]
    model.tune(data=None, seqlen=32, steps=1, batch=1)
    second = model.save_task(at / "c.safetensors")
    assert second["base"] == first["base"]
    assert second["recipe"]["steps"] == 1
    assert "metrics" not in second
    first_values, again = load_file(at / "a.safetensors"), load_file(at / "b.safetensors")
    assert all(torch.equal(first_values[name], again[name]) for name in again)
    assert not all(torch.equal(first_values[name], value) for name, value in load_file(at / "c.safetensors").items())


@pytest.mark.parametrize("kind", ["tables", "scales"])
def test_the_digest_is_the_documented_one(at: Path, request: pytest.FixtureRequest, kind: str) -> None:
    """Computed anew from the files of the folder, as docs/format.md says."""
    folder: Path = request.getfixturevalue(kind)
    tensors, found = load_file(folder / "model.safetensors"), hashlib.sha256()
    idle = {"quantization_config", "dtype", "torch_dtype", "_name_or_path", "transformers_version", "use_cache"}
    idle |= {f"{which}_token_id" for which in ("bos", "eos", "pad")}
    config = json.loads((folder / "config.json").read_text())
    told = {key: value for key, value in config.items() if key not in idle and value is not None}
    found.update(json.dumps({"config": told}, sort_keys=True).encode() + b"\n")
    modules = sorted({name.rpartition(".")[0] for name in tensors if name.endswith(".weight_packed")})
    for module in modules:
        words, shape = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_shape"].tolist()
        zero = tensors.get(f"{module}.weight_zero_point")
        head = {"bits": 3, "group": shape[1] if kind == "tables" else 128, "kind": kind.removesuffix("s"), "module": module}
        found.update(json.dumps(head | {"shape": shape, "zeros": zero is not None}).encode() + b"\n")
        found.update(layout.unpack_stream(words, 3, shape[1]).numpy().tobytes())
        if zero is not None:
            found.update(layout.unpack_stream(zero.T.contiguous(), 3, shape[0]).T.contiguous().numpy().tobytes())
    for name in sorted(name for name in tensors if name.rpartition(".")[0] not in modules):
        head = {"dtype": "float32", "shape": list(tensors[name].shape), "tensor": name}
        found.update(json.dumps(head).encode() + b"\n" + tensors[name].float().numpy().tobytes())
    assert tasks.extract(str(folder), at / "t.safetensors")["base"] == found.hexdigest()


def test_dense_tensors_of_any_dtype_are_kept(at: Path, scales: Path) -> None:
    shutil.copytree(scales, at / "mixed")
    tensors = load_file(at / "mixed" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    save_file(tensors, at / "mixed" / "model.safetensors", metadata={"format": "pt"})
    export.export(str(at / "mixed"), at / "out", target("compressed-tensors"))
    again = load_file(at / "out" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[name].dtype == tensor.dtype and torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_nothing_is_half_applied(at: Path, tables: Path) -> None:
    model = compressor.load(str(tables), "cpu")
    model.save_task(at / "t.safetensors")
    tensors = load_file(at / "t.safetensors")
    last = list(packed_linears(model.model))[-1]
    for name in tensors:
        tensors[name] *= 2
    tensors[f"{last}.table"][0, 0, 0] = float("inf")
    with export.task.safe_open(at / "t.safetensors", "pt") as file:
        save_file(tensors, at / "bad.safetensors", metadata=file.metadata())
    before = {name: layer.learned.clone() for name, layer in packed_linears(model.model).items()}
    with pytest.raises(ModelError, match="not finite"):
        model.load_task(at / "bad.safetensors")
    assert all(torch.equal(layer.learned, before[name]) for name, layer in packed_linears(model.model).items())


def test_other_bases_are_refused(at: Path, tables: Path) -> None:
    model = compressor.load(str(tables), "cpu")
    model.save_task(at / "t.safetensors")
    shutil.copytree(tables, at / "other")
    tensors = load_file(at / "other" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, at / "other" / "model.safetensors")
    other = compressor.load(str(at / "other"), "cpu")
    with pytest.raises(ModelError, match="made for another base"):
        other.load_task(at / "t.safetensors")
    with pytest.raises(ModelError, match="holds no packed weights"):
        compressor.load("tiny", "cpu").save_task(at / "x.safetensors")
    next(iter(packed_linears(model.model).values())).tuned = torch.nn.Identity()
    with pytest.raises(ModelError, match="is being tuned"):
        model.load_task(at / "t.safetensors")


def test_options_of_a_projection() -> None:
    assert export.Target("compressed-tensors").quant(3) == Quant(packer="rtn")
    assert export.Target("compressed-tensors", bits=4, group=64, symmetric=False).quant(3) == Quant(packer="rtn", bits=4, group=64, symmetric=False)
    with pytest.raises(RecipeError, match="max_tokens=-1"):
        export.Target("compressed-tensors", max_tokens=-1).check()
    assert "export.json" not in output.WRITTEN, "a run does not overwrite exports"
