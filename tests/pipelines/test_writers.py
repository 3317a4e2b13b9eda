"""What every format of `export --to` says of every kind of weight, and that what it says comes true in a folder that is read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compressor
from compressor.errors import CompressorError, ModelError, OutputError, RecipeError, UserError
from compressor.linear import packed_linears
from compressor.packed import PackedWeight
from compressor.pipelines import capabilities, compress, export, load, proof, write, writers
from compressor.recipe import Quant
from tests.pipelines.commands import call
from tests.pipelines.packed import logits, table_folder

pytest.importorskip("gguf")
FOLDERS = ("compressed-tensors", "gptq", "gptq_v2", "awq", "mlx", "table")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`tiny` at some bits, with symmetric grids or not, packed once each."""
    place, made = tmp_path_factory.mktemp("packed"), {}

    def make(bits: int, symmetric: bool, group: int = 128) -> Path:
        key = (bits, symmetric, group)
        if key not in made:
            loaded = load.load("tiny", "cpu")
            quant = Quant(packer="rtn", bits=bits, symmetric=symmetric, group=group, shrink=False)
            write.round_to_folder(loaded, {t.name for t in compress.plan(loaded.model, quant).packed()})
            compress.compress(loaded.model, quant, torch.float16, None)
            made[key] = place / f"w{bits}{symmetric}{group}"
            write.write_folder(loaded, made[key])
        return made[key]

    return make


def target(to: str, **options: Any) -> export.Target:
    return export.Target(to, **{"device": "cpu", "max_tokens": 600} | options)


@pytest.mark.parametrize("to", FOLDERS)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False), (2, True), (8, False)])
def test_a_folder_computes_what_was_promised(folders: Any, tmp_path: Path, to: str, bits: int, symmetric: bool) -> None:
    """Exact formats give the logits of the source bit for bit, the others those of the weights that were measured."""
    source, writer = folders(bits, symmetric), writers.of(to)
    assert writer is not None
    was = load.load(str(source), "cpu")
    packed = load.packed_weights(was.model)
    verdict = writers.verdict(writer, was.config, packed)
    if verdict.kind == "cannot":
        assert bits == 8 and to in ("awq", "table")
        with pytest.raises((ModelError, RecipeError), match="8 bits|4 bits"):
            export.export(str(source), tmp_path / "out", target(to))
        assert not list(tmp_path.iterdir())
        return
    document, _ = export.export(str(source), tmp_path / "out", target(to))
    assert document["exact"] == (verdict.kind == "exact") == ("perplexity" not in document)
    again = load.load(str(tmp_path / "out"), "cpu")
    if verdict.kind == "exact":
        assert torch.equal(logits(again.model), logits(was.model))
    else:
        assert document["error"]["largest"] == pytest.approx(verdict.error, rel=1e-6)
        assert 0 < verdict.error < 1e-3
    for name, weight in load.packed_weights(again.model).items():
        assert float((weight.dequantize() - packed[name].dequantize()).abs().max()) <= 1e-3 * float(packed[name].dequantize().abs().max())
    assert set(load.packed_weights(again.model)) == set(packed)


@pytest.mark.parametrize("to", ["gguf:auto", "gguf:q4_0", "gguf:q4_k", "gguf:f16"])
def test_a_gguf_file_holds_what_was_promised(folders: Any, tmp_path: Path, to: str) -> None:
    source = folders(4, True)
    document, shown = export.export(str(source), tmp_path / "out", target(to))
    assert [path.suffix for path in sorted((tmp_path / "out").iterdir())] == [".md", ".json", ".json", ".gguf"]  # digests and export.json
    assert document["exact"] == (to != "gguf:f16") and shown.row_count == 28
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert len(record["types"]) > 28 and all(("no multiple" in row["note"]) == (to == "gguf:q4_k") for row in record["layers"])
    assert document["bits_per_weight"] == (16.0 if to == "gguf:f16" else 4.5)


@pytest.mark.parametrize("to", capabilities.SHOWN)
def test_every_kind_of_weight_is_exact_or_measured_or_refused_in_a_sentence(to: str) -> None:
    for words, verdict in capabilities.verdicts(to).items():
        if verdict.kind == "cannot":
            assert verdict.why and "\n" not in verdict.why, words
        else:
            assert (verdict.kind == "exact") == (verdict.error == 0.0), words


def test_what_each_format_is_for() -> None:
    """The claims that users rely on most."""
    exact = {
        "compressed-tensors": ["2 bits, symmetric, groups of 32", "3 bits, asymmetric, groups of 128", "8 bits, asymmetric, whole rows"],
        "gptq": ["3 bits, asymmetric, groups of 32", "4 bits, asymmetric, act-order"],
        "awq": ["4 bits, asymmetric, groups of 128", "3 bits, symmetric, groups of 128"],
        "mlx": ["3 bits, symmetric, groups of 128"],
        "table": ["3 bits, one table a row"],
        "gguf:q4_0": ["4 bits, symmetric, groups of 32", "3 bits, asymmetric, groups of 32"],
        "gguf:q8_0": ["8 bits, symmetric, groups of 128"],
        "gguf:q4_k": ["4 bits, symmetric, whole rows"],
    }
    for to, kinds in exact.items():
        found = capabilities.verdicts(to)
        assert [found[kind].kind for kind in kinds] == ["exact"] * len(kinds), (to, [str(found[kind]) for kind in kinds])
    assert capabilities.verdicts("gguf:q4_k")["4 bits, symmetric, groups of 128"].kind == "lossy"
    assert "tables" in capabilities.verdicts("gptq")["3 bits, one table a row"].why
    assert "tuned zeros" in capabilities.verdicts("awq")["3 bits, tuned zeros"].why
    assert "order" in capabilities.verdicts("compressed-tensors")["4 bits, asymmetric, act-order"].why


def test_wider_fields_on_request(folders: Any, tmp_path: Path) -> None:
    """3-bit codes for servers that know 4 bits alone, symmetric ones still symmetric."""
    source = folders(3, True)
    document, _ = export.export(str(source), tmp_path / "out", target("gptq", bits=4))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["sym"], document["exact"]) == (4, True, True)
    assert 4 < document["bits_per_weight"] < 4.8  # codes, scales, zeros that are written out, and the index of groups
    assert torch.equal(logits(load.load(str(tmp_path / "out"), "cpu").model), logits(load.load(str(source), "cpu").model))


def test_act_order_is_packed_anew_where_a_format_has_no_place_for_it(folders: Any, tmp_path: Path) -> None:
    loaded = load.load(str(folders(4, False)), "cpu")
    for layer in packed_linears(loaded.model).values():
        layer.columns = torch.randperm(layer.in_features)
    wanted = logits(loaded.model)
    facts = write_gptq(loaded, tmp_path / "gptq")
    again = load.load(str(tmp_path / "gptq"), "cpu")
    assert facts == "gptq" and torch.allclose(logits(again.model), wanted, rtol=1e-4, atol=1e-3)  # columns of a group are summed in another order
    assert all(torch.equal(packed_linears(again.model)[name].weight[:], layer.weight[:]) for name, layer in packed_linears(loaded.model).items())
    document, _ = export.export(str(tmp_path / "gptq"), tmp_path / "out", target("compressed-tensors"))
    assert not document["exact"] and document["perplexity"]["growth"] != 0
    document, _ = export.export(str(tmp_path / "gptq"), tmp_path / "same", target("gptq_v2"))
    assert document["exact"] and torch.equal(logits(load.load(str(tmp_path / "same"), "cpu").model), logits(again.model))


def write_gptq(loaded: load.Loaded, folder: Path) -> str:
    folder.mkdir()
    packed = load.packed_weights(loaded.model)
    writer = writers.of("gptq")
    assert writer is not None
    dense = write.dense_tensors(loaded)
    held: dict[str, PackedWeight] = {}
    for name, weight in packed.items():
        stored = writer.held(weight)
        assert isinstance(stored, PackedWeight)
        held[name] = stored
    config = {key: value for key, value in loaded.config.items() if key != "quantization_config"}
    writer.write(folder, loaded.folder, config, [*dense.items(), *held.items()], [])
    write.copy_companions(loaded.folder, folder)
    return str(json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"])


def test_what_is_packed_anew_uses_the_width_that_it_gets(tmp_path: Path) -> None:
    """AWQ has 4 bits: tables of 3 become grids of 4, and not grids of 3 in fields of 4."""
    source = table_folder(tmp_path / "sk3", 0.6)
    four, _ = export.export(str(source), tmp_path / "four", target("awq"))
    three, _ = export.export(str(source), tmp_path / "three", target("gptq"))
    assert four["error"]["largest"] < 0.7 * three["error"]["largest"]
    card = (tmp_path / "three" / "README.md").read_text()
    assert "## What it cost" in card and f"{three['perplexity']['after']:.3f} after" in card


def test_nothing_is_written_where_one_of_several_places_is_taken(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "all" / "mlx").mkdir(parents=True)
    (tmp_path / "all" / "mlx" / "thesis.tex").write_text("mine")
    code, out, err = call(monkeypatch, capsys, "export", str(folders(4, True)), "--to", "gptq,mlx", "-o", str(tmp_path / "all"))
    assert (code, out) == (2, "") and "already holds files" in " ".join(err.split())
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["mlx"]


@pytest.mark.parametrize("to", ["gptq", "mlx", "gguf:q4_1"])
def test_tables_are_projected_or_fitted_and_too_much_loss_is_refused(tmp_path: Path, to: str) -> None:
    source = table_folder(tmp_path / "sk3", 0.6)
    document, _ = export.export(str(source), tmp_path / "out", target(to))
    assert not document["exact"] and document["error"]["largest"] > 0.01
    assert document["perplexity"]["growth"] == pytest.approx(document["perplexity"]["after"] / document["perplexity"]["before"] - 1)
    assert document["perplexity"]["growth"] > 0.01
    with pytest.raises(UserError, match="--max-loss allows"):
        export.export(str(source), tmp_path / "none", target(to, max_loss=document["perplexity"]["growth"] / 2))
    assert not (tmp_path / "none").exists()


def test_several_formats_in_one_command(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(
        monkeypatch, capsys, "export", str(folders(4, True)), "--to", "gptq,gguf:q4_0", "--to", "mlx", "-o", str(tmp_path / "all"), "--device", "cpu"
    )
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    assert [row["to"] for row in document["exports"]] == ["gptq", "gguf:q4_0", "mlx"]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["gguf-q4_0", "gptq", "mlx"]
    card = (tmp_path / "all" / "gptq" / "README.md").read_text()
    assert "every weight bit for bit" in card and "vllm serve FOLDER" in card


@pytest.mark.parametrize(
    ("to", "words"),
    [("ggml", "is unknown; choose among"), ("gguf:q9", "is unknown; choose among"), ("gptq,gptq", "names gptq twice"), (",", "names no format")],
)
def test_names_that_are_none(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str, words: str
) -> None:
    code, _, err = call(monkeypatch, capsys, "export", str(folders(4, True)), "--to", to, "-o", str(tmp_path / "out"))
    assert code == 2 and words in " ".join(err.split()) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["gptq", "mlx", "gguf:q4_0"])
def test_a_wrong_byte_is_found_and_nothing_is_published(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    real = proof.read_back

    def spoiled(writer: Any, folder: Path, kept: Any, layers: Any) -> None:
        path = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
        content = bytearray(path.read_bytes())
        content[-len(content) // 3] ^= 4
        path.write_bytes(content)
        real(writer, folder, kept, layers)

    monkeypatch.setattr(proof, "read_back", spoiled)
    with pytest.raises(CompressorError, match="reads back with other"):
        export.export(str(folders(4, True)), tmp_path / "out", target(to))
    assert not list(tmp_path.iterdir())


@pytest.mark.consumers
@pytest.mark.parametrize(("to", "symmetric"), [("compressed-tensors", True), ("compressed-tensors", False), ("gguf:q4_1", False)])
def test_a_consumer_agrees_and_one_that_does_not_stops_the_export(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, symmetric: bool
) -> None:
    document, _ = export.export(str(folders(3, symmetric)), tmp_path / "out", target(to))
    assert len(document["proof"]) >= 1 and "logits differ by at most" in document["proof"][0]
    assert document["proof"][0].split(" on a CPU")[0] in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(load, "context", lambda config, asked=None, name="window": 8)
    real = proof.consumers.check
    monkeypatch.setattr(proof.consumers, "check", lambda reader, folder, ids, expected: real(reader, folder, ids, 1.05 * expected))
    with pytest.raises(CompressorError, match="WRONG"):
        export.export(str(folders(3, symmetric)), tmp_path / "bad", target(to, window=8))
    assert not (tmp_path / "bad").exists()


def test_in_python(folders: Any, tmp_path: Path) -> None:
    model = compressor.load(str(folders(3, True)), "cpu")
    found = model.export(tmp_path / "gptq", to="gptq")
    assert found["exact"] and found["format"] == "GPTQ (gptq)"
    again = compressor.load(str(tmp_path / "gptq"), "cpu")
    assert torch.equal(logits(again.model), logits(model.model))
    again.tune(data="python", steps=1, batch=2)
    assert again.save(tmp_path / "tuned")["format"] == "GPTQ (gptq)"
    with pytest.raises(OutputError, match="already holds files"):
        model.export(tmp_path / "gptq", to="awq")
