"""`compressor tune` as a command: what it refuses in one sentence, going on after a break, sizes foretold, and its recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.errors import OutputError
from compressor.pipelines import checkpoint
from compressor.pipelines.run import dry_run, run
from compressor.pipelines.show import Show
from tests.pipelines import encoders
from tests.pipelines import foreign_folders as made
from tests.pipelines.commands import call
from tests.pipelines.foreign_folders import tune


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """(form, bits, symmetric, group, edit) -> a packed folder, made once."""
    return made.maker(tmp_path_factory.mktemp("made"), tokenizer)


@pytest.fixture
def own(folder: Any, tmp_path: Path) -> Any:
    """As `folder`, a copy that a test may spoil."""
    return made.copier(folder, tmp_path)


# --- what is refused -----------------------------------------------------------------------------------------------------------------------------


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path, *args: str) -> str:
    """The one sentence on stderr of a command that exits with 2 and writes nothing in `place`."""
    before = sorted(place.rglob("*"))
    capsys.readouterr()  # what making the folder had to say
    code, out, err = call(monkeypatch, capsys, *args, "-o", str(place / "refused"))
    assert code == 2 and not out, err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1 and sorted(place.rglob("*")) == before
    return err


@pytest.mark.parametrize(("form", "options", "words"), [
    ("gptq", ["--tune", "peqq"], "tuner 'peqq' is unknown"), ("gptq", ["--tune", "none"], "give --tune, for example peqa"),
    ("compressor", ["--tune", "peqa"], "holds tables, which peqa cannot train: use --tune table"),
    ("compressor", ["--tune", "qalora"], "holds tables, which qalora cannot train: use --tune table"),
    ("gptq", ["--tune", "lora", "--targets", "q_proj,foo"], "no packed linear is named foo"), ("gptq", ["--rank", "4"], "means nothing to peqa"),
    ("gptq", ["--seqlen", "4096"], "seqlen=4096 is more than the 128 tokens"),
])  # fmt: skip
def test_options_that_cannot_work(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str, options: list[str], words: str
) -> None:
    assert words in refused(monkeypatch, capsys, tmp_path, "tune", str(folder(form)), *options)


def truncate(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage(source: Path) -> None:
    made.change_tensors(source, lambda t: t.pop("model.layers.1.mlp.up_proj.scales"))


def label(source: Path) -> None:
    made.change_config(source, lambda config: config.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))


def spoil(source: Path) -> None:
    made.change_config(source, lambda config: config.update(quantization_config=["gptq"]))


@pytest.mark.parametrize(("change", "words"), [
    (truncate, "truncated or damaged"), (damage, "model.layers.1.mlp.up_proj is incomplete: scales missing"),
    (label, "is quantised as bitsandbytes; compressor reads"), (spoil, "quantization_config is no mapping"),
])  # fmt: skip
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_folders_that_cannot_be_read(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Any, words: str, options: list[str]
) -> None:
    source = own("gptq")
    change(source)
    if options and change is damage:
        return  # a dry run reads no weights
    assert words in refused(monkeypatch, capsys, tmp_path, "tune", str(source), *options)


def test_what_is_not_packed_and_what_is(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    dense, packed = folder("gptq").parent / "dense", folder("gptq")
    assert "is not packed: `compressor run` packs" in refused(monkeypatch, capsys, tmp_path, "tune", str(dense))
    assert "is not packed: `compressor run` packs" in refused(monkeypatch, capsys, tmp_path, "tune", str(dense), "--dry-run")
    assert "`compressor tune` tunes it as it is" in refused(monkeypatch, capsys, tmp_path, "run", str(packed), "--quant", "3bit", "--tune", "peqa")
    assert "nothing/here" in refused(monkeypatch, capsys, tmp_path, "tune", "./nothing/here")


def test_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    encoders.make_encoder(tmp_path / "bert", "BertForSequenceClassification")
    for options in ([], ["--dry-run"]):
        assert "encoder" in refused(monkeypatch, capsys, tmp_path, "tune", str(tmp_path / "bert"), *options)


# --- runs ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "method"), [("gptq", "peqa"), ("mlx", "peqa"), ("hqq", "qalora"), ("awq", "lora"), ("compressed-tensors", "table")])
@pytest.mark.parametrize("after", ["tune", "write"])
def test_a_run_that_stops_goes_on_to_the_same_bytes(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, method: str, after: str
) -> None:
    """Stopped between two steps, and after all is measured."""
    source, keys = folder(form), {"tune__checkpoint_every": 1} | ({"tune__rank": 1} if method in ("qalora", "lora") else {})
    whole = tune(source, tmp_path / "whole", method, **keys)

    class Stop(KeyboardInterrupt):
        pass

    def stop(*args: Any, **keys: Any) -> None:
        raise Stop

    def follow(advance: Any) -> Any:
        return lambda row: stop() if row["step"] == 2 else None

    with monkeypatch.context() as patch, pytest.raises(Stop):
        if after == "tune":
            patch.setattr("compressor.pipelines.job.follow", follow)
        else:
            patch.setattr("compressor.pipelines.write.write_folder", stop)
        tune(source, tmp_path / "out", method, **keys)
    assert not (tmp_path / "out").exists() and list((tmp_path / "out.partial").glob("tune-*/*.safetensors"))
    document = tune(source, tmp_path / "out", method, **keys)
    assert document["resumed"] and not whole["resumed"]
    assert all(document["tuned"][text]["perplexity"] == whole["tuned"][text]["perplexity"] for text in ("domain", "outside"))
    files = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")}
    assert len(files) == 1 + (method == "lora")
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in files)
    assert not (tmp_path / "out.partial").exists()
    assert tune(source, tmp_path / "out", method, **keys)["resumed"], "the same command again does something"


@pytest.mark.parametrize("form", ["gptq", "mlx", "hqq"])
def test_another_result_in_the_place_is_replaced_only_if_asked_for(folder: Any, tmp_path: Path, form: str) -> None:
    source = folder(form)
    tune(source, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="already holds the result of another run; add --overwrite"):
        tune(source, tmp_path / "out", tune__lr=0.01)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    run(made.recipe(source, tune__lr=0.01), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]["tune"]["lr"] == 0.01


@pytest.mark.parametrize("form", [form for form in made.FORMS if form != "compressor"])
@pytest.mark.parametrize("method", ["peqa", "lora"])
def test_a_dry_run_foretells_the_size_and_writes_nothing(folder: Any, tmp_path: Path, form: str, method: str) -> None:
    recipe = made.recipe(folder(form), method)
    found = dry_run(recipe, tmp_path / "out", Show())
    assert not list(tmp_path.iterdir())
    document = run(recipe, tmp_path / "out")
    assert found["folder_bytes"] == pytest.approx(document["tuned"]["folder_bytes"], rel=0.02)
    assert found["packed_layers"] == 14 and all(seconds >= 0 for seconds in found["seconds"].values())
    if form not in ("mlx", "hqq", "compressor_sparse"):  # bits of gptq include g_idx, those of MLX and HQQ what describes codes
        assert found["bits_per_weight"] == pytest.approx(document["tuned"]["bits_per_weight"], rel=0.15)


def test_efficientqat_and_tables_are_foretold_too(folder: Any, tmp_path: Path) -> None:
    source = made.copier(folder, tmp_path)("gptq_v2", 3)
    made.like_efficientqat(source)
    found = dry_run(made.recipe(source), tmp_path / "out", Show())
    assert found["packed_layers"] == 14 and found["folder_bytes"] == checkpoint.model_bytes(source)
    assert "take more" in dry_run(made.recipe(source, "table"), tmp_path / "out", Show())["notes"][0]


@pytest.mark.parametrize(("form", "method"), [("gptq", "peqa"), ("awq", "lora"), ("compressed-tensors", "table")])
def test_the_recipe_in_the_folder_repeats_the_run(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str, method: str
) -> None:
    document = tune(folder(form), tmp_path / "out", method)
    code, out, err = call(monkeypatch, capsys, "run", str(tmp_path / "out" / "recipe.yaml"), "-o", str(tmp_path / "again"))
    assert code == 0, err
    again = json.loads(out.splitlines()[-1])
    assert again["tuned"]["domain"]["perplexity"] == document["tuned"]["domain"]["perplexity"]
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text()) == yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())


def test_the_folder_is_named_after_the_model_and_the_tuner(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, text = folder("awq"), str(folder("awq").parent / "dense" / "notes.txt")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, "tune", str(source), "--data", text, "--outside", text, *made.QUICK)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["output"] == f"{source.name.lower()}-peqa"
    card = (tmp_path / f"{source.name.lower()}-peqa" / "README.md").read_text()
    assert "AWQ" in card
