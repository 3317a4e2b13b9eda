"""Commands and their errors, in process: exit code 2 and one sentence, JSON as the last line, nothing written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file

from compressor.errors import RecipeError
from compressor.linear import linears
from compressor.pipelines import checkpoint, cli, compress, load, write
from compressor.recipe import Prune, Quant, Recipe
from tests.pipelines.commands import call


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "./nowhere", "--quant", "3bit"], "there is no model folder ./nowhere"),
        (["run", "tiny", "--quant", "5bit"], "bits=5 is not supported; choose 2, 3 or 4"),
        (["run", "tiny", "--quant", "3bit:magic"], "packer 'magic' is unknown"),
        (["run", "tiny", "--tune", "magic"], "tuner 'magic' is unknown"),
        (["run", "tiny", "--quant", "3bit", "--group", "7"], "group"),
        (["run", "tiny", "--data", "empty.txt"], "empty"),
        (["run", "tiny", "--data", "missing.txt"], "missing.txt"),
        (["run", "missing.yaml"], "there is no recipe missing.yaml"),
        (["run", "tiny", "--lr", "-1"], "lr=-1.0 must be positive"),
        (["run", "tiny", "-o", "theirs"], "already holds files that are not of a run"),
        (["run", "notlm"], "not a causal language model"),
        (["run", "nan", "--quant", "3bit"], "model.layers.1.mlp.down_proj.weight holds NaN"),
        (["run", "cut"], "truncated"),
        (["eval", "tiny", "--data", "empty.txt"], "empty"),
        (["eval", "tiny", "--window", "1"], "window"),
        (["eval", "tiny", "--window", "2000"], "more than the 256 tokens that the model was made for"),
        (["run", "tiny", "--seqlen", "300"], "more than the 256 tokens"),
        (["run", "tiny", "--data", "short.txt", "--quant", "3bit:rtn", "--tune", "peqa"], "too few"),
        (["run", "tiny", "--data", "~nosuchuser/x.txt"], "no file or folder"),
        (["run", "x" * 5000], "is no name: it has 5000 characters"),
        (["run", "tiny", "--data", "y" * 5000], "there is no file or folder"),
        (["run", "tiny", "--epochs", "inf"], "epochs=inf"),
        (["run", "tiny", "--seed", "99999999999999999999"], "seed="),
        (["run", "tiny", "--device", "meta"], "device 'meta' is unknown"),
        (["run", "tiny", "-o", "/"], "cannot be an output folder"),
        (["run", "tiny", "-o", "."], "is the current folder or a mount point"),
        (["run", "tiny", "-o", "/proc"], "is the current folder or a mount point"),
        (["run", "tiny", "--data", ""], "the name of the data is empty"),
        (["run", "tiny", "--outside", ""], "the name of the data is empty"),
        (["run", "tiny", "--quant", ""], "is not understood"),
        (["run", "tiny", "-o", "short.txt"], "is a file"),
        (["run", "tiny", "-o", "taken"], "where this run would keep its work, holds files"),
        (["run", "tiny", "-o", "fake", "--overwrite"], "already holds files that are not of a run"),
        (["run", "folder.yaml"], "cannot be read"),
        (["run", "empty.yaml"], "is empty"),
        (["run", "list.yaml"], "must be a mapping"),
        (["generate", "tiny", "--temperature", "-1"], "temperature must be 0 or more"),
        (["generate", "tiny", "--prompt", ""], "the prompt not empty"),
        (["generate", "tiny", "--device", "cpu", "--compile"], "on a GPU only"),
        (["generate", "./nowhere"], "there is no model folder"),
        (["inspect", "cut"], "truncated"),
    ],
)
def test_bad_inputs(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    (at / "empty.txt").write_text("")
    (at / "theirs").mkdir()
    (at / "theirs" / "thesis.tex").write_text("mine")
    (at / "short.txt").write_text("Too short to tune on.\n\nTwice.")
    (at / "taken.partial").mkdir()
    (at / "taken.partial" / "precious").write_text("mine")
    (at / "fake").mkdir()
    (at / "fake" / "report.json").write_text("{}")
    (at / "fake" / "thesis.tex").write_text("mine")
    (at / "folder.yaml").mkdir()
    (at / "empty.yaml").write_text("")
    (at / "list.yaml").write_text("[1, 2]")
    for name in ("notlm", "nan", "cut"):
        shutil.copytree(checkpoint.TINY, at / name)
    config = json.loads((at / "notlm" / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    (at / "notlm" / "config.json").write_text(json.dumps(config))
    tensors = load_file(at / "nan" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, at / "nan" / "model.safetensors", metadata={"format": "pt"})
    whole = (at / "cut" / "model.safetensors").read_bytes()
    (at / "cut" / "model.safetensors").write_bytes(whole[:-1000])
    before = sorted(at.rglob("*"))

    code, out, err = call(monkeypatch, capsys, *args)
    assert code == 2, err
    assert out == ""
    assert words in " ".join(err.split())
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    assert sorted(at.rglob("*")) == before


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load.load("tiny", "cpu")
    write.round_to_folder(loaded, set(linears(loaded.model)))
    compress.compress(loaded.model, Quant(packer="rtn", bits=4), torch.float16, None)
    folder = tmp_path_factory.mktemp("w4")
    write.write_folder(loaded, folder)
    return folder


def test_eval_prints_the_contract(packed: Path, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (at / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 80)
    code, out, err = call(monkeypatch, capsys, "eval", str(packed), "--data", "text.txt", "--window", "64")
    assert code == 0, err
    document = json.loads(out.strip().splitlines()[-1])
    assert document["window"] == 64
    assert document["perplexity"] > 1
    assert document["tokens"] > 500
    assert document["bits_per_weight"] == 4.125
    assert document["ratio"] > 1.5
    assert len(document["data_sha256"]) == 64
    assert document["tokens_per_second"] > 0
    assert document["folder_bytes"] == checkpoint.model_bytes(packed)


def test_generate_and_inspect(packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(monkeypatch, capsys, "generate", str(packed), "--prompt", "Return the", "--max-new-tokens", "8")
    assert code == 0, err
    document = json.loads(out.strip().splitlines()[-1])
    assert document["text"]
    assert 1 <= document["tokens"] <= 8
    prompts = ["Return the", "A class is an object that holds names, and"]
    many = [part for prompt in prompts for part in ("--prompt", prompt)]
    code, out, err = call(monkeypatch, capsys, "generate", str(packed), *many, "--max-new-tokens", "8")
    assert code == 0, err
    assert json.loads(out.strip().splitlines()[-1])["texts"][0] == document["text"], "a row of a batch is written as it is alone"
    code, out, err = call(monkeypatch, capsys, "inspect", str(packed))
    assert code == 0, err
    assert len(json.loads(out.strip().splitlines()[-1])["layers"]) == 28


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(monkeypatch, capsys, "doctor")
    assert code == 0, err
    document = json.loads(out.strip().splitlines()[-1])
    assert document["torch"] == torch.__version__
    assert "torch" in document["kernels"] or "Triton" in document["kernels"]


def test_every_flag_of_run_reaches_the_recipe() -> None:
    group: Any = typer.main.get_command(cli.app)
    command = group.commands["run"]
    names = {p.name for p in command.params}
    assert names - set(cli.FLAGS) == {"model", "quant", "prune", "preset", "output", "overwrite", "dry_run"} and set(cli.FLAGS) <= names
    given: dict[str, object] = dict.fromkeys([*cli.FLAGS, "prune", "preset"])
    assert cli.recipe_of("tiny", None, given) == Recipe().with_(quant__packer="block")
    recipe = cli.recipe_of("tiny", "sketch2", given | {"refit": False, "exponent": 0.0, "absolute": False, "ignore": ["a", "b"], "seed": 0})
    assert (recipe.quant.bits, recipe.quant.packer, recipe.quant.refit, recipe.quant.exponent) == (2, "sketch", False, 0.0)
    assert recipe.tune.parametrization == "relative" and recipe.quant.ignore == ("a", "b") and recipe.seed == 0


def test_presets_say_what_flags_and_files_do_not(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = dict.fromkeys([*cli.FLAGS, "prune", "preset"])

    def made(quant: str | None = "3bit", **flags: Any) -> Recipe:
        return cli.recipe_of("tiny", quant, given | flags)

    assert made() == made(preset="standard") == Recipe().with_(quant__packer="block")
    assert made(preset="fast") == made("3bit:gptq") == Recipe()
    best = made(preset="best", tune="peqa")
    assert best.choose.equal and best.quant.packer == "block" and best.tune.distill == 0.25 and best.quant.end_to_end == 4
    assert made("3bit:gptq", preset="best", tune="lora", adapter_start="residual").quant.end_to_end == 0
    assert made(preset="best", end_to_end=0).quant.end_to_end == 0 and made(None, prune="obert:50%", preset="best").quant.end_to_end == 0
    assert made(preset="best").tune.distill == 0 and made(preset="best", tune="peqa", distill=0.1).tune.distill == 0.1
    assert not made(preset="best", target_bits=3.5).choose.equal and not made(preset="best", mix=False).choose.equal
    assert made("3bit:rtn", preset="standard") == made("3bit:rtn"), "whoever names a packer knows how to pack"
    rounded = made("3bit:rtn", preset="best", tune="peqa")
    assert (rounded.quant.packer, rounded.choose.equal, rounded.tune.distill) == ("rtn", True, 0.25)
    assert not made("3bit:squeezellm", preset="best").choose.equal and not made(prune="obert:2:4", preset="best").choose.equal
    assert made(None, prune="obert:50%").quant.packer == "none"
    assert made(tune="lora", adapter_start="loftq").quant.packer == "gptq", "no path starts beside blocks that are trained"
    with pytest.raises(RecipeError, match="preset 'fastest' is unknown; choose fast, standard, best"):
        made(preset="fastest")
    (at / "own.yaml").write_text(yaml.safe_dump(Recipe().to_dict()))
    assert cli.recipe_of("own.yaml", None, given) == Recipe()
    assert cli.recipe_of("own.yaml", None, given | {"preset": "standard"}).quant.packer == "block"
    alone = Recipe().with_(quant__packer="none", prune__method="depth", prune__ratio=0.3)
    (at / "alone.yaml").write_text(yaml.safe_dump(alone.to_dict()))
    assert cli.recipe_of("alone.yaml", None, given | {"preset": "best"}) == alone, "what a file says comes first"
    wanted = Recipe().with_(quant__packer="rtn", choose__target_bits=3.5, tune__method="peqa", tune__distill=0.1)
    (at / "wanted.yaml").write_text(yaml.safe_dump(wanted.to_dict()))
    assert cli.recipe_of("wanted.yaml", None, given | {"preset": "best"}) == wanted.with_(quant__end_to_end=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert made().quant.packer == "block", "a variable that somebody left behind"
    monkeypatch.setenv("RANK", "0")
    assert made().quant.packer == "gptq" and made(preset="standard").quant.packer == "block"


def test_flags_on_top_of_a_recipe_of_another_method(at: Path) -> None:
    given: dict[str, Any] = dict.fromkeys([*cli.FLAGS, "prune", "preset"])
    grids = Recipe().with_(quant__group=64, quant__symmetric=False, tune__method="peqa", tune__lr=5e-3)
    (at / "grids.yaml").write_text(yaml.safe_dump(grids.to_dict()))
    same = cli.recipe_of("grids.yaml", None, given)
    assert same == grids
    tables = cli.recipe_of("grids.yaml", "sketch3", given | {"tune": "table"})
    assert (tables.quant.group, tables.quant.symmetric, tables.tune.lr) == (128, True, None), "what belonged to grids and to PEQA stays behind"
    assert cli.recipe_of("grids.yaml", None, given | {"absolute": True}).tune.lr is None
    assert cli.recipe_of("grids.yaml", None, given | {"absolute": True, "lr": 0.1}).tune.lr == 0.1
    assert cli.recipe_of("grids.yaml", "2bit", given).quant.group == 64
    for flags, words in (({"sym": True}, "--sym means nothing to packer sketch"), ({"group": 128}, "--group means nothing to packer sketch")):
        with pytest.raises(RecipeError, match=words):
            cli.recipe_of("tiny", "sketch3", given | flags)
    with pytest.raises(RecipeError, match="--refit means nothing to packer block"):
        cli.recipe_of("tiny", "3bit", given | {"refit": True})
    with pytest.raises(RecipeError, match="--group means nothing to packer sketch"):
        cli.recipe_of("tiny", "w3g64:sketch", given)


def test_names_from_files_do_not_steer_the_terminal() -> None:
    assert cli.one_line(ValueError("a\nb \x1b[31mred\x07")) == "a b \N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER}"


def test_flags_of_pruning(at: Path) -> None:
    given: dict[str, Any] = dict.fromkeys([*cli.FLAGS, "prune", "preset"])
    alone = cli.recipe_of("tiny", None, given | {"prune": "loraprune:30%", "per_layer": True, "batch": 2})
    assert alone.prune == Prune(method="loraprune", ratio=0.3, uniform=False, batch=2) and alone.quant.packer == "none"
    assert cli.recipe_of("tiny", "3bit", given | {"prune": "obert:2:4"}).prune.pattern == "2:4"
    (at / "r.yaml").write_text(
        yaml.safe_dump(Recipe().with_(prune__method="obert", prune__ratio=0.5, prune__pattern="2:4", prune__block=8).to_dict())
    )
    same = cli.recipe_of("r.yaml", None, given | {"prune": "obert:30%"})
    assert (same.prune.pattern, same.prune.block, same.quant.packer) == (None, 8, "gptq"), "of the same method what the file says holds"
    assert cli.recipe_of("r.yaml", None, given | {"prune": "wanda:30%"}).prune == Prune(method="wanda", ratio=0.3)
    for flags, words in (({"unit": "group"}, "--unit says how to prune"), ({"prune": "wanda:30%", "steps": 3}, "--prune-steps")):
        with pytest.raises(RecipeError, match=words):
            cli.recipe_of("tiny", None, given | flags)
