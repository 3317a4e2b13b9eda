"""`compressor tune`: folders of every format are tuned as they are and come back in their own format, bit for bit what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor.errors import ModelError, RecipeError
from compressor.integrations import peft
from compressor.linear import packed_linears
from compressor.packed import Affine, PackedWeight
from compressor.pipelines import checkpoint, evaluate, load, retune
from compressor.pipelines.show import Show
from compressor.pipelines.tools import evaluate_folder
from tests.pipelines import foreign_folders as made
from tests.pipelines.commands import call
from tests.pipelines.foreign_folders import logits, quantization, tune

FORMS = [form for form in made.FORMS if form != "compressor"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """(form, bits, symmetric, group, edit) -> a packed folder, made once."""
    return made.maker(tmp_path_factory.mktemp("made"), tokenizer)


@pytest.fixture
def own(folder: Any, tmp_path: Path) -> Any:
    """As `folder`, a copy that a test may spoil."""
    return made.copier(folder, tmp_path)


def keeps_model(monkeypatch: pytest.MonkeyPatch) -> list[load.Loaded]:
    """The models that tunings begin with and change in place."""
    kept, real = list[load.Loaded](), retune.Retune.read

    def read(self: retune.Retune) -> load.Loaded:
        kept.append(real(self))
        return kept[-1]

    monkeypatch.setattr(retune.Retune, "read", read)
    return kept


# --- the same format -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_learn_and_everything_else_stays(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, symmetric: bool) -> None:
    source, kept = folder(form, 4, symmetric), keeps_model(monkeypatch)
    document = tune(source, tmp_path / "out")
    before, after = quantization(source), quantization(tmp_path / "out")
    assert before == after or form == "compressed-tensors"
    assert (before["quant_method"], before.get("format")) == (after["quant_method"], after.get("format"))
    made.assert_only_values_moved(source, tmp_path / "out")
    again = load.load(str(tmp_path / "out"), "cpu").model
    assert torch.equal(logits(again), logits(kept[0].model)), "the folder is not the model that was measured"
    assert not torch.equal(logits(again), logits(load.load(str(source), "cpu").model))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["packed"] and report["tuned"] and not report.get("dense") and report["export"]["verified"]
    assert "dense" not in document and document["tuned"]["domain"]["perplexity"] < document["packed"]["domain"]["perplexity"]
    assert "notes" not in report and document["packed"]["folder_bytes"] == checkpoint.model_bytes(source)
    assert document["tuned"]["folder_bytes"] == checkpoint.model_bytes(tmp_path / "out")


@pytest.mark.parametrize(("form", "bits", "group"), [
    ("gptq", 3, 32), ("gptq_v2", 2, 32), ("gptq", 8, 32), ("compressed-tensors", 8, 32), ("hqq", 8, 32), ("mlx", 8, 64), ("hqq", 3, 64),
    ("mlx", 2, 64), ("gptq", 4, 64), ("awq", 4, 64), ("compressed-tensors", 3, 64), ("compressor_sparse", 2, 32),
])  # fmt: skip
def test_other_widths_and_groups(folder: Any, tmp_path: Path, form: str, bits: int, group: int) -> None:
    source = folder(form, bits, False, group)
    tune(source, tmp_path / "out")
    made.assert_only_values_moved(source, tmp_path / "out")
    assert quantization(tmp_path / "out")["quant_method"] == quantization(source)["quant_method"]


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_act_order_stays(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    source, kept = folder(form, edit=made.permuted), keeps_model(monkeypatch)
    assert quantization(source)["desc_act"]
    document = tune(source, tmp_path / "out")
    made.assert_only_values_moved(source, tmp_path / "out")
    assert quantization(tmp_path / "out") == quantization(source)
    assert torch.equal(logits(load.load(str(tmp_path / "out"), "cpu").model), logits(kept[0].model))
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["layers"]
    assert {row["note"] for row in rows} == {"act-order"} and document["tuned"]["bits_per_weight"] > 4.625


def zero_ended(weight: PackedWeight) -> PackedWeight:
    """Zeros of 0 throughout, which the first version of GPTQ's format mirrors where all codes are in use."""
    assert weight.zero is not None
    codes = weight.codes()
    codes[:, ::32], codes[::2, ::32] = 15, 3
    return PackedWeight.pack(codes, Affine(weight.learned, torch.zeros_like(weight.zero)), weight.bits)


def test_mirrored_groups_stay_mirrored(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, kept = folder("gptq", edit=zero_ended), keeps_model(monkeypatch)
    assert any(bool((weight.learned < 0).any()) for weight in made.read(source).values())
    tune(source, tmp_path / "out")
    made.assert_only_values_moved(source, tmp_path / "out")
    signs = [[torch.sign(weight.learned) for weight in made.read(place).values()] for place in (source, tmp_path / "out")]
    assert all(torch.equal(*pair) for pair in zip(*signs, strict=True))
    again = load.load(str(tmp_path / "out"), "cpu").model
    assert torch.equal(logits(again), logits(kept[0].model)) and made.same_weights(again, kept[0].model)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_efficientqat(own: Any, tmp_path: Path, bits: int) -> None:
    source = own("gptq_v2", bits)
    wanted = logits(load.load(str(source), "cpu").model)
    made.like_efficientqat(source)
    assert torch.equal(logits(load.load(str(source), "cpu").model), wanted)
    tune(source, tmp_path / "out")
    made.assert_only_values_moved(source, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (after["quant_method"], after["checkpoint_format"], after["bits"], after["group_size"]) == ("gptq", "gptq_v2", bits, 32)


def test_leftovers_of_autogptq(own: Any, tmp_path: Path) -> None:
    """Its own name for the weights, quantize_config.json alone, biases of zeros that the architecture has not; another bias is an error."""
    source = own("gptq")
    made.change_config(source, lambda config: config.pop("quantization_config"))
    made.change_config(source, lambda config: config.pop("quant_method"), "quantize_config.json")
    (source / "model.safetensors").rename(source / "gptq_model-4bit-128g.safetensors")
    names, file = list(made.read(source)), "gptq_model-4bit-128g.safetensors"
    made.change_tensors(source, lambda tensors: tensors.update({f"{name}.bias": torch.zeros(64).half() for name in names}), file)
    tune(source, tmp_path / "out")
    was, now = made.read(source), made.read(tmp_path / "out")
    assert all(torch.equal(weight.codes(), now[name].codes()) for name, weight in was.items())
    assert quantization(tmp_path / "out")["checkpoint_format"] == "gptq"
    assert not any(name.endswith("bias") for name in load_file(tmp_path / "out" / "model.safetensors"))
    made.change_tensors(source, lambda tensors: tensors[f"{names[0]}.bias"].fill_(0.5), file)
    with pytest.raises(ModelError, match=f"{names[0]} has a foreign bias"):
        tune(source, tmp_path / "none")
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.partial").exists()


def test_the_older_key_of_compressed_tensors(own: Any, tmp_path: Path) -> None:
    source = own("compressed-tensors")
    made.change_config(source, lambda config: config.update(compression_config=config.pop("quantization_config")))
    tune(source, tmp_path / "out")
    made.assert_only_values_moved(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors" and "compression_config" not in config


@pytest.mark.parametrize("keys", [["quantization"], ["quantization_config"], ["quantization", "quantization_config"]])
def test_an_mlx_folder_says_no_method(own: Any, tmp_path: Path, keys: list[str]) -> None:
    source = own("mlx")
    made.change_config(source, lambda config: [config.pop(key) for key in {"quantization", "quantization_config"} - set(keys)])
    tune(source, tmp_path / "out")
    made.assert_only_values_moved(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] and "quant_method" not in config["quantization"]


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_wide_scales_are_rounded_before_anything_is_measured(own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Scales in float32, which the formats hold in float16, and a norm in float32 between dense tensors of float16."""
    source, kept = own(form, edit=zero_ended if form == "gptq" else None), keeps_model(monkeypatch)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith((".scales", "input_layernorm.weight"))]:
            tensors[name] = tensors[name].float() * (1 + 1e-4)

    made.change_tensors(source, widen)
    tune(source, tmp_path / "out")
    assert quantization(tmp_path / "out") == quantization(source)
    assert torch.equal(logits(load.load(str(tmp_path / "out"), "cpu").model), logits(kept[0].model))


def test_a_folder_of_tables(folder: Any, tmp_path: Path) -> None:
    source = folder("compressor", 3)
    tune(source, tmp_path / "out", "table")
    before, after = made.read(source), made.read(tmp_path / "out")
    assert quantization(tmp_path / "out")["format"] == "table"
    assert all(torch.equal(weight.codes(), after[name].codes()) for name, weight in before.items())
    assert all(not torch.equal(weight.learned, after[name].learned) for name, weight in before.items())


def test_pruned_weights_stay_zero_in_their_own_format(own: Any, tmp_path: Path) -> None:
    def pruned(weight: PackedWeight) -> PackedWeight:
        codes = weight.codes()
        codes[:, ::2] = 8
        return PackedWeight.pack(codes, weight.values, weight.bits)

    source = own("compressor_sparse", symmetric=True, edit=pruned)
    document = tune(source, tmp_path / "out")
    assert quantization(tmp_path / "out")["quant_method"] == "compressor_sparse"
    assert document["packed"]["bits_per_weight"] == document["tuned"]["bits_per_weight"] < 4
    assert all(not weight.dequantize()[:, ::2].any() for weight in made.read(tmp_path / "out").values())
    for method, words in (("qalora", "would bring pruned weights back"), ("table", "cannot be written once it is tuned")):
        with pytest.raises((ModelError, RecipeError), match=words):
            tune(source, tmp_path / "none", method)
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.partial").exists()


@pytest.mark.parametrize("form", ["gptq", "mlx", "compressed-tensors"])
def test_the_folder_is_as_good_as_the_document_says(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    source = folder(form)
    text = str(source.parent / "dense" / "notes.txt")
    code, out, err = call(
        monkeypatch, capsys, "tune", str(source), "--tune", "peqa", "--data", text, "--outside", text, "-o", str(tmp_path / "o"), *made.QUICK
    )
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    for state, place in (("packed", source), ("tuned", tmp_path / "o")):
        found = evaluate_folder(str(place), text, 32, 256, "cpu", Show())
        assert found["perplexity"] == pytest.approx(document[state]["outside"]["perplexity"], rel=1e-6)
        assert found["folder_bytes"] == document[state]["folder_bytes"]
        assert found["bits_per_weight"] == pytest.approx(document[state]["bits_per_weight"], rel=1e-6)
    assert "rope_theta" in json.loads((tmp_path / "o" / "config.json").read_text()) or form != "gptq"


# --- other tuners --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "symmetric"), [("gptq", False), ("awq", True), ("hqq", False), ("compressed-tensors", True), ("mlx", True)])
def test_tables_begin_as_the_scales_were(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, symmetric: bool) -> None:
    source, kept = folder(form, 4, symmetric), keeps_model(monkeypatch)
    started: list[torch.Tensor] = []

    def sample(model: Any, _tokenizer: Any, prompts: list[str], _count: int) -> list[str]:
        started.append(logits(model))
        return [""] * len(prompts)

    monkeypatch.setattr(evaluate, "generate_samples", sample)
    document = tune(source, tmp_path / "out", "table")
    before = load.load(str(source), "cpu")
    weights, after = load.packed_weights(before.model), made.read(tmp_path / "out")
    exact, close = logits(before.model), started[0]
    assert float((exact - close).abs().max()) < 0.02 * float(exact.std()), "tables do not start at the scales"
    assert quantization(tmp_path / "out")["quant_method"] == "compressor" and after.keys() == weights.keys()
    assert all(torch.equal(weight.codes(), after[name].codes()) and after[name].learned.dim() == 3 for name, weight in weights.items())
    assert torch.equal(logits(load.load(str(tmp_path / "out"), "cpu").model), logits(kept[0].model))
    assert document["packed"]["bits_per_weight"] < document["tuned"]["bits_per_weight"] == 12.0
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert "is written as compressor table" in notes[0] or form == "compressed-tensors"


def test_tables_of_wide_scales_begin_exactly(own: Any) -> None:
    source = own("compressed-tensors")
    made.change_tensors(source, lambda t: t.update({name: t[name].float() for name in t if name.endswith("weight_scale")}))
    loaded = load.load(str(source), "cpu")
    wanted = logits(loaded.model)
    retune.to_tables(loaded)
    assert all(layer.table for layer in packed_linears(loaded.model).values()) and torch.equal(logits(loaded.model), wanted)


@pytest.mark.parametrize(("form", "bits", "edit"), [("gptq", 4, made.permuted), ("gptq", 8, None), ("compressed-tensors", 8, None), ("hqq", 8, None)])
def test_tables_have_no_place_for_act_order_and_8_bits(folder: Any, tmp_path: Path, form: str, bits: int, edit: Any) -> None:
    with pytest.raises(ModelError, match="cannot get tables: tables are for weights of 2, 3 and 4 bits whose columns are in order"):
        tune(folder(form, bits, edit=edit), tmp_path / "out", "table")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_lies_beside_a_base_that_stays(folder: Any, tmp_path: Path, form: str) -> None:
    source = folder(form)
    document = tune(source, tmp_path / "out", "lora", tune__rank=4)
    assert (tmp_path / "out" / peft.FOLDER / peft.WEIGHTS).exists()
    before, after = (load_file(place / "model.safetensors") for place in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert quantization(tmp_path / "out")["quant_method"] == quantization(source)["quant_method"]
    again = load.load(str(tmp_path / "out"), "cpu")
    assert again.adapter is not None
    found = evaluate_folder(str(tmp_path / "out"), str(source.parent / "dense" / "notes.txt"), 32, 256, "cpu", Show())
    assert found["perplexity"] == pytest.approx(document["tuned"]["outside"]["perplexity"], rel=1e-5)
    with pytest.raises(ModelError, match="has an adapter beside its packed weights: export it"):
        tune(tmp_path / "out", tmp_path / "none")


@pytest.mark.parametrize("form", FORMS)
def test_tuned_zeros_go_where_a_format_holds_them(own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    source, kept = own(form), keeps_model(monkeypatch)
    if form == "compressor_sparse":
        with pytest.raises(RecipeError, match="would bring pruned weights back"):
            tune(source, tmp_path / "out", "qalora")
        return
    if form == "hqq":  # in which zeros have the dtype of scales
        made.change_tensors(source, lambda t: t.update({name: t[name].bfloat16() for name in t if name.endswith((".scale", ".zero"))}))
    tune(source, tmp_path / "out", "qalora", tune__rank=1)
    before, after = made.read(source), made.read(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    if form in ("hqq", "mlx"):
        assert quantization(tmp_path / "out")["quant_method"] == form and "notes" not in report
    else:
        assert quantization(tmp_path / "out")["quant_method"] == "compressor_sparse"
        assert report["notes"] == [f"the folder came as {made.FORMS[form].NAME} and is written as compressor sparse, which holds what qalora tunes"]
    assert all(weight.float_zeros for weight in after.values())
    for name, weight in load.packed_weights(load.load(str(source), "cpu").model).items():
        assert torch.equal(weight.codes(), after[name].codes()) and torch.equal(weight.learned, after[name].learned) and before.keys() == after.keys()
    assert torch.equal(logits(load.load(str(tmp_path / "out"), "cpu").model), logits(kept[0].model))


def test_zeros_that_no_format_could_hold_are_refused_before_any_work(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "measure", lambda *a, **k: pytest.fail("something was measured"))
    for source in (folder("gptq", edit=made.permuted), folder("gptq", 8)):
        with pytest.raises(ModelError, match="cannot be written once it is tuned: no format can hold the model"):
            tune(source, tmp_path / "out", "qalora")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
