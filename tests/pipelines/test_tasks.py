"""Hot swap: bit for bit, in place, without reading the base again, and never on another base. Runs that keep only a task file."""

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import compressor
from compressor.errors import ModelError, RecipeError
from compressor.export import task
from compressor.linear import packed_linears
from compressor.pipelines import bases, differences, load, tasks
from compressor.recipe import Recipe
from tests.pipelines.commands import call
from tests.pipelines.packed import logits, moved, scale_folder, table_folder

QUICK = ["--nsamples", "4", "--seqlen", "64", "--steps", "2", "--batch", "2", "--max-tokens", "256", "--device", "cpu"]


@pytest.fixture(scope="module", params=["scales", "tables"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return scale_folder(folder) if request.param == "scales" else table_folder(folder, 0.15)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def two(base: Path, at: Path) -> list[torch.Tensor]:
    """a.safetensors and b.safetensors in `at`, and the logits of the two models tuned on their own."""
    out = []
    for seed, name in ((1, "a"), (2, "b")):
        model = compressor.load(str(base), "cpu")
        moved(model.model, seed)
        model.save_task(at / f"{name}.safetensors")
        out.append(logits(model.model))
    return out


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every digest of a base that is formed."""
    out: list[str] = []
    digest = task.digest
    monkeypatch.setattr(tasks.task, "digest", lambda *args: out.append("digest") or digest(*args))
    return out


def test_swaps_are_bit_exact_in_place_and_read_the_base_once(base: Path, at: Path, counted: list[str]) -> None:
    wanted = two(base, at)
    model = compressor.load(str(base), "cpu")
    untuned = logits(model.model)
    layers = packed_linears(model.model)
    held = {name: (layer.words, layer.learned) for name, layer in layers.items()}
    codes = {name: layer.words.clone() for name, layer in layers.items()}
    model.save_task(at / "untuned.safetensors")
    counted.clear()
    for name, logit in (("a", wanted[0]), ("b", wanted[1]), ("a", wanted[0]), ("untuned", untuned)):
        model.load_task(at / f"{name}.safetensors")
        assert torch.equal(logits(model.model), logit)
    assert not counted, "saving formed the digest"
    assert all(layer.words is held[name][0] and layer.learned is held[name][1] for name, layer in layers.items())
    assert all(torch.equal(layer.words, codes[name]) for name, layer in layers.items())
    assert not torch.equal(wanted[0], wanted[1])


def test_a_swap_takes_milliseconds(base: Path, at: Path) -> None:
    """Measured 4 ms on a shared core; the limit leaves room for a busy one."""
    two(base, at)
    model = compressor.load(str(base), "cpu").load_task(at / "a.safetensors")
    seconds = []
    for i in range(20):
        start = time.perf_counter()
        model.load_task(at / f"{'ba'[i % 2]}.safetensors")
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.05


def change_codes(model: Any) -> None:
    next(iter(packed_linears(model).values())).words[0] ^= 1


def replace_codes(model: Any) -> None:
    layer = next(iter(packed_linears(model).values()))
    layer.words = layer.words ^ 1


def change_norm(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] += 1


def replace_norm(model: Any) -> None:
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach() + 1)


def change_group(model: Any) -> None:
    next(iter(packed_linears(model).values())).group //= 2


@pytest.mark.parametrize("change", [change_codes, replace_codes, change_norm, replace_norm, change_group])
def test_a_base_that_changed_since_is_refused(base: Path, at: Path, change: Any) -> None:
    two(base, at)
    model = compressor.load(str(base), "cpu").load_task(at / "a.safetensors")
    change(model.model)
    before = {name: layer.learned.clone() for name, layer in packed_linears(model.model).items()}
    with pytest.raises(ModelError, match="made for another base"):
        model.load_task(at / "b.safetensors")
    assert all(torch.equal(layer.learned, before[name]) for name, layer in packed_linears(model.model).items())


def test_what_only_moves_is_the_same_base(base: Path, at: Path, counted: list[str]) -> None:
    """A cast of the dense tensors and back replaces them: the digest is formed again, and is the same."""
    wanted = two(base, at)
    model = compressor.load(str(base), "cpu").load_task(at / "a.safetensors")
    counted.clear()
    model.model.double().float()
    model.load_task(at / "b.safetensors")
    assert counted == ["digest"]
    assert torch.equal(logits(model.model), wanted[1])


def test_inference_tensors_keep_no_count_of_their_changes(base: Path, at: Path, counted: list[str]) -> None:
    two(base, at)
    model = compressor.load(str(base), "cpu")
    with torch.inference_mode():
        model.model.model.norm.register_buffer("extra", torch.ones(1), persistent=False)
    counted.clear()
    for name in ("a", "b"):
        model.load_task(at / f"{name}.safetensors")
    assert counted == ["digest"] * 2
    assert bases.marks(model.model, values=False) is None


def test_a_model_of_inference_mode_is_changed_there_alone(base: Path, at: Path) -> None:
    wanted = two(base, at)
    with torch.inference_mode():
        model = compressor.load(str(base), "cpu")
    with pytest.raises(ModelError, match="was loaded under torch.inference_mode and can be changed only there"):
        model.load_task(at / "a.safetensors")
    with torch.inference_mode():
        assert torch.equal(logits(model.load_task(at / "a.safetensors").model), wanted[0])


def copied(base: Path, folder: Path, change: Any, **config: Any) -> Path:
    """The base with other tensors and keys of its configuration."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | config))
    return folder


def wide(factor: float) -> Any:
    return lambda tensors: tensors.update({name: t.float() * factor for name, t in tensors.items() if name.endswith("norm.weight")})


def test_a_digest_knows_every_bit_and_the_configuration(base: Path, at: Path) -> None:
    two(base, at)
    first = bases.base_digest(load.load(str(base), "cpu"))
    alike = copied(base, at / "alike", wide(1.0), transformers_version="1", use_cache=False)
    assert bases.base_digest(load.load(str(alike), "cpu")) == first, "the same numbers in a wider dtype"
    others = [copied(base, at / "finer", wide(1 + 2**-18)), copied(base, at / "other", lambda t: None, hidden_act="relu")]
    for folder in others:
        model = compressor.load(str(folder), "cpu")
        assert bases.base_digest(model._loaded) != first
        with pytest.raises(ModelError, match="made for another base"):
            model.load_task(at / "a.safetensors")
    assert bases.base_digest(load.load(str(others[0]), "cpu")) != bases.base_digest(
        load.load(str(copied(base, at / "finest", wide(1 + 2**-17))), "cpu")
    )
    assert differences.diff(str(base), str(others[1]))[0]["differences"] == [{"name": "config.json", "what": "hidden_act"}]


def test_values_are_judged_before_the_first_is_copied(base: Path, at: Path) -> None:
    two(base, at)
    loaded = load.load(str(base), "cpu")
    values = dict(task.read_alone(at / "a.safetensors").values)
    before = {name: layer.learned.clone() for name, layer in packed_linears(loaded.model).items()}
    last = list(before)[-1]
    for bad in (values[last][:1], values[last].double()):
        with pytest.raises(ModelError, match=f"the scales of {last} are missing, or of another shape or dtype"):
            tasks.put(loaded, values | {last: bad})
    assert all(torch.equal(layer.learned, before[name]) for name, layer in packed_linears(loaded.model).items())


def test_marks_tell_tensors_apart_by_identity() -> None:
    model = torch.nn.Linear(3, 3)
    first = bases.marks(model, values=False)
    assert bases.same(first, bases.marks(model, values=False))
    weight = model.weight
    model.weight = torch.nn.Parameter(weight.detach())  # the same memory, another tensor
    assert not bases.same(first, bases.marks(model, values=False))
    model.weight = weight
    assert bases.same(first, bases.marks(model, values=False))
    del model, weight
    assert not bases.same(first, first), "what is gone is no proof"
    assert not bases.same(None, None)


def test_a_task_is_told_of_only_while_nobody_moves_its_values(base: Path, at: Path) -> None:
    model = compressor.load(str(base), "cpu")
    told = {"model": "tiny", "recipe": {"method": "peqa"}, "metrics": {"domain": 2.0}}
    tasks.save(model._loaded, at / "a.safetensors", told)
    model.load_task(at / "a.safetensors")
    found = model.save_task(at / "b.safetensors")
    assert {key: found[key] for key in told} == told
    with torch.no_grad():
        next(iter(packed_linears(model.model).values())).learned.mul_(2)
    assert "recipe" not in model.save_task(at / "c.safetensors")


@pytest.mark.parametrize("quant", ["3bit:rtn", "sketch3"])
def test_a_run_that_keeps_only_the_task(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quant: str) -> None:
    """The file is the one that `task` takes out of the folder, and with the untuned folder of the same recipe it gives that folder again."""
    tune = "table" if quant == "sketch3" else "peqa"

    def run(*args: str) -> dict[str, Any]:
        code, out, err = call(monkeypatch, capsys, "run", "tiny", "--quant", quant, *QUICK, *args)
        assert code == 0, err
        return json.loads(out.strip().splitlines()[-1])

    whole, only = run("--tune", tune, "-o", "whole"), run("--tune", tune, "--save", "task", "-o", "only")
    assert (only["output"], only["task"]) == ("only", "only/task.safetensors")
    for key in ("domain", "outside"):
        assert only["tuned"][key]["perplexity"] == whole["tuned"][key]["perplexity"]
    assert only["tuned"]["folder_bytes"] == whole["tuned"]["folder_bytes"]
    assert {p.name for p in (at / "only").iterdir()} == {"README.md", "recipe.yaml", "report.json", "report.html", "digests.json", "task.safetensors"}
    assert not (at / "only.partial").exists()
    assert yaml.safe_load((at / "only" / "recipe.yaml").read_text())["save"] == "task"
    tasks.extract("whole", at / "whole.safetensors")
    one, other = task.read_alone(at / "whole.safetensors"), task.read_alone(at / "only" / "task.safetensors")
    assert one.header() == other.header()
    assert other.metrics["domain"] == only["tuned"]["domain"]["perplexity"]
    assert all(torch.equal(value, other.values[name]) for name, value in one.values.items())
    run("-o", "base")
    code, _, err = call(monkeypatch, capsys, "apply", "base", "only/task.safetensors", "-o", "again")
    assert code == 0, err
    again, first = load_file(at / "again" / "model.safetensors"), load_file(at / "whole" / "model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert run("--tune", tune, "--save", "task", "-o", "only")["resumed"] is True
    assert "already holds the result" in call(monkeypatch, capsys, "run", "tiny", "--quant", quant, "--tune", tune, *QUICK, "-o", "only")[2]
    (at / "only" / "task.safetensors").write_bytes(b"cut")
    assert run("--tune", tune, "--save", "task", "-o", "only", "--overwrite")["resumed"] is False
    task.read_alone(at / "only" / "task.safetensors")


def test_what_a_run_can_save(at: Path) -> None:
    for tune, words in (
        ({"method": "qalora", "targets": "q_proj"}, "targets=q_proj tunes those of some"),
        ({"method": "lora", "adapter": "absorb"}, "adapter=absorb changes codes"),
        ({"method": "lora", "start": "loftq"}, "start=loftq changes codes"),
    ):
        with pytest.raises(RecipeError, match=words):
            compressor.run({"model": "tiny", "quant": {"packer": "rtn"}, "tune": tune, "save": "task"}, at / "out")
    with pytest.raises(RecipeError, match="nothing is tuned: add --tune"):
        Recipe(save="task")
    with pytest.raises(RecipeError, match="save='both': choose folder or task"):
        Recipe(save="both")
    tuned = Recipe().with_(save="task", tune__method="peqa")
    assert Recipe.from_dict(tuned.to_dict()) == tuned
    assert tuned.digest() == Recipe().with_(tune__method="peqa").digest(), "what is computed is the same"


def test_names_of_files_are_short() -> None:
    assert [tasks.short(Path(p)) for p in ("t.safetensors", "a/t.safetensors", "/home/me/a/t.safetensors")] == [
        "t.safetensors",
        *["a/t.safetensors"] * 2,
    ]
