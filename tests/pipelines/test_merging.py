"""`merge-tasks` and `apply` of several tasks: files like any other, perplexities of every stage, errors in one sentence before anything slow."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import compressor
from compressor.errors import RecipeError
from compressor.export import merge, task
from compressor.linear import packed_linears
from compressor.pipelines import data, evaluate, load, merging, tasks
from tests.pipelines.commands import call
from tests.pipelines.packed import moved, scale_folder, table_folder

TEXTS = {"a.txt": "The quick brown fox jumps over the lazy dog, and goes home. ", "b.txt": "def names(values):\n    return sorted(values)\n\n"}


@pytest.fixture(scope="module", params=["scales", "tables"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a folder; a, b and c, tasks of it; a.txt and b.txt."""
    at = tmp_path_factory.mktemp(request.param)
    scale_folder(at / "base") if request.param == "scales" else table_folder(at / "base", 0.15)
    for seed, name in ((1, "a"), (2, "b"), (3, "c")):
        model = compressor.load(str(at / "base"), "cpu")
        moved(model.model, seed)
        model.save_task(at / f"{name}.safetensors")
    for name, text in TEXTS.items():
        (at / name).write_text("".join(f"{i}. {text}" for i in range(80)))
    return at


@pytest.fixture
def at(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder that sees all of `place`."""
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def start(folder: str = "base") -> dict[str, torch.Tensor]:
    return {name: layer.learned.clone() for name, layer in packed_linears(load.load(folder, "cpu").model).items()}


def values(file: str) -> dict[str, torch.Tensor]:
    return task.read_alone(Path(file)).values


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["sum", "ties", "breadcrumbs", "lines", "soup"])
def test_a_merged_file_is_a_task_file(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str) -> None:
    extra = ["--weights", "0.5,0.25"] if method in ("sum", "ties") else ["--scale", "0.5"]
    args = ["merge-tasks", "base", "a.safetensors", "b.safetensors", "-o", "new/m.safetensors", "--method", method, *extra, "--device", "cpu"]
    code, out, err = call(monkeypatch, capsys, *args)
    assert code == 0, err
    document = json.loads(out.strip().splitlines()[-1])
    options = merge.Options(method, weights=(0.5, 0.25)) if extra[0] == "--weights" else merge.Options(method, scale=0.5)
    found = task.read_alone(at / "new" / "m.safetensors")
    base = start()
    wanted, done = merge.merge(base, [values("a.safetensors"), values("b.safetensors")], found.kind, options)
    assert same(found.values, wanted)
    assert not same(wanted, base)
    assert found.recipe["merge"] == done == document["recipe"]["merge"]
    files = [{"file": name, "sha256": hashlib.sha256((at / name).read_bytes()).hexdigest()} for name in ("a.safetensors", "b.safetensors")]
    assert found.recipe["tasks"] == files
    assert (document["output"], document["base_folder"], document["notes"], "scores" in document) == ("new/m.safetensors", "base", [], False)
    assert document["base"] == found.base == task.read_header(at / "a.safetensors").base
    model = compressor.load("base", "cpu").load_task("new/m.safetensors")
    assert same({name: layer.learned for name, layer in packed_linears(model.model).items()}, wanted)


def test_scores_are_those_of_each_model(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["merge-tasks", "base", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--data", "a.txt", "--data", "b.txt", "--window", "32"]
    code, out, err = call(monkeypatch, capsys, *args, "--device", "cpu")
    assert code == 0, err
    document = json.loads(out.strip().splitlines()[-1])
    assert [row["name"] for row in document["scores"]] == ["base", "a.safetensors", "b.safetensors", "merged"]
    loaded = load.load("base", "cpu")
    corpora = {name: data.load(name).test for name in TEXTS}
    stages = [start(), values("a.safetensors"), values("b.safetensors"), values("m.safetensors")]
    for row, stage in zip(document["scores"], stages, strict=True):
        tasks.put(loaded, stage)
        found = evaluate.measure(loaded.model, loaded.tokenizer, corpora, 32)
        assert row["perplexity"] == pytest.approx([found[name]["perplexity"] for name in TEXTS], rel=1e-9)
        assert row["mean"] == pytest.approx(math.prod(row["perplexity"]) ** 0.5)
    assert [p["name"] for p in document["protocol"]] == [corpus.name for corpus in corpora.values()]
    assert document["protocol"][0]["window"] == 32
    assert document["metrics"] == dict(zip((c.name for c in corpora.values()), document["scores"][-1]["perplexity"], strict=True))
    shown = " ".join(err.split())
    assert "merged" in shown
    assert f"{document['scores'][-1]['mean']:.3f}" in shown


def test_a_greedy_soup_is_no_worse_than_its_best_task(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["a.safetensors", "b.safetensors", "c.safetensors"]
    args = ["merge-tasks", "base", *files, "-o", "m.safetensors", "--method", "greedy", "--window", "32", "--device", "cpu"]
    code, out, err = call(monkeypatch, capsys, *args, *(word for text in ("a.txt", "b.txt", "b.txt") for word in ("--data", text)))
    assert code == 0, err
    document = json.loads(out.strip().splitlines()[-1])
    means = {row["name"]: row["mean"] for row in document["scores"]}
    chosen = document["recipe"]["merge"]["chosen"]
    assert means["merged"] <= min(means[name] for name in files)
    assert files[chosen[0]] == min(files, key=means.__getitem__)
    share = [1.0 / len(chosen)] * len(chosen)
    picked = [values(files[t]) for t in chosen]
    kind = task.read_header(at / "m.safetensors").kind
    assert same(values("m.safetensors"), {n: merge.combined(t, [p[n] for p in picked], share, kind) for n, t in start().items()})
    assert document["notes"] == ["the tasks of the soup were chosen by the mean perplexity reported here"]


def test_several_tasks_apply_as_their_sum(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, capsys, "merge-tasks", "base", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--device", "cpu")[0] == 0
    code, out, err = call(monkeypatch, capsys, "apply", "base", "a.safetensors", "b.safetensors", "-o", "both")
    assert code == 0, err
    assert json.loads(out.strip().splitlines()[-1])["verified"] is True
    assert call(monkeypatch, capsys, "apply", "base", "m.safetensors", "-o", "merged")[0] == 0
    assert (at / "both" / "model.safetensors").read_bytes() == (at / "merged" / "model.safetensors").read_bytes()
    told = json.loads((at / "both" / "export.json").read_text())["tasks"]
    assert [each["file"] for each in told] == ["a.safetensors", "b.safetensors"]
    assert call(monkeypatch, capsys, "apply", "base", "a.safetensors", "-o", "one")[0] == 0
    assert call(monkeypatch, capsys, "apply", "merged", "a.safetensors", "-o", "other")[0] == 0
    one, other = load_file(at / "one" / "model.safetensors"), load_file(at / "other" / "model.safetensors")
    assert same(one, other), "of one task the values of the base do not count"


def test_an_applied_folder_says_what_it_holds(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first = task.read_alone(at / "a.safetensors")
    told = {"model": "tiny", "recipe": {"method": "peqa", "lr": 0.5}, "metrics": {"domain": 3.5}}
    tasks.save(load.load("base", "cpu"), at / "t" / "task.safetensors", told, dict(first.values))
    for files, output in ((["t"], "one"), (["t", "b.safetensors"], "two")):
        code, out, err = call(monkeypatch, capsys, "apply", "base", *files, "-o", output)
        assert code == 0 and json.loads(out.strip().splitlines()[-1])["notes"] == [], err
        assert "base with `t/task.safetensors`" in (at / output / "README.md").read_text()
        assert call(monkeypatch, capsys, "task", output, "-o", f"{output}.safetensors")[0] == 0
    found = task.read_header(at / "one.safetensors")
    assert {"model": found.model, "recipe": found.recipe, "metrics": found.metrics} == told
    found = task.read_header(at / "two.safetensors")
    assert found.recipe["merge"] == {"method": "sum", "weights": [1.0, 1.0]} and found.recipe["tasks"][0]["recipe"] == told["recipe"]
    code, out, err = call(monkeypatch, capsys, "apply", "one", "a.safetensors", "b.safetensors", "-o", "three")
    assert code == 0 and "one was itself tuned" in json.loads(out.strip().splitlines()[-1])["notes"][0] and "was itself tuned" in err
    document, _ = merging.merge_tasks("two", [Path("t"), Path("b.safetensors")], at / "m", merge.Options(), merging.Texts(), "cpu")
    assert "two was itself tuned" in document["notes"][0]
    code, _, err = call(monkeypatch, capsys, "apply", "base", "t", "t/task.safetensors", "-o", "four")
    assert code == 2 and "t/task.safetensors is named twice" in " ".join(err.split())


def test_texts_of_one_name_are_told_apart(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (at / "x").mkdir()
    (at / "x" / "a.txt").write_text((at / "b.txt").read_text())
    (at / "[b").mkdir()
    shutil.copy(at / "b.safetensors", at / "[b" / "1]")  # what rich takes for markup
    texts = ["--data", "a.txt", "--data", "x/a.txt", "--window", "32", "--max-tokens", "256", "--device", "cpu"]
    code, out, err = call(monkeypatch, capsys, "merge-tasks", "base", "a.safetensors", "[b/1]", "-o", "m", *texts)
    assert code == 0, err
    document = json.loads(out.strip().splitlines()[-1])
    name = document["protocol"][0]["name"]
    assert document["metrics"] == dict(zip((name, f"{name} #2"), document["scores"][-1]["perplexity"], strict=True))
    assert "[b/1]" in err and f"{name} #2" in " ".join(err.split())


def test_a_tuned_base_is_pointed_out(at: Path) -> None:
    assert compressor.load("base", "cpu").load_task("a.safetensors").save(at / "tuned")["verified"]
    report = {"compressor": "1", "keys": "k", "recipe": {"tune": {"method": "peqa"}}, "tuned": {"domain": {"perplexity": 2.0}}}
    (at / "tuned" / "report.json").write_text(json.dumps(report))
    files = [Path("a.safetensors"), Path("b.safetensors")]
    document, table = merging.merge_tasks("tuned", files, at / "m.safetensors", merge.Options(), merging.Texts(), "cpu")
    assert "was itself tuned" in document["notes"][0]
    assert table is None
    document, _ = merging.merge_tasks("tuned", files, at / "s.safetensors", merge.Options("soup"), merging.Texts(), "cpu")
    assert document["notes"] == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["base", "a.safetensors", "--method", "slerp"], "--method 'slerp' is unknown"),
        (["base", "a.safetensors", "--weights", "1,x"], "--weights '1,x' is not understood"),
        (["base", "a.safetensors", "--weights", ""], "--weights '' is not understood"),
        (["base", "a.safetensors", "--weights", "1,1"], "--weights has 2 numbers for 1 tasks"),
        (["base", "a.safetensors", "--lines", "1,2,3"], "--lines '1,2,3' has 3 numbers"),
        (["base", "a.safetensors", "--density", "0.5"], "--density means nothing to sum"),
        (["base", "a.safetensors", "b.safetensors", "--data", "a.txt"], "--data names 1 texts for 2 tasks"),
        (["base", "a.safetensors", "b.safetensors", "--method", "greedy"], "greedy measures every candidate"),
        (["base", "a.safetensors", "--window", "32"], "--window and --max-tokens say how texts are measured"),
        (["base", "a.safetensors", "./a.safetensors"], "is named twice"),
        (["base", "a.safetensors", "--lines", "0.5,-1"], "beta=-1.0 is what the factor grows by"),
        (["base", "a.safetensors", "--data", "missing.txt"], "missing.txt"),
        (["base", "a.safetensors", "--data", "a.txt", "--window", "1"], "window=1 must be at least 2"),
        (["base", "a.safetensors", "--data", "a.txt", "--window", "999"], "more than the 256 tokens"),
        (["base", "missing.safetensors"], "there is no task file missing.safetensors"),
        (["base", "base"], "is a folder, not a task file"),
        (["base", "a.safetensors", "cut.safetensors"], "cannot be read"),
        (["tiny", "a.safetensors"], "tiny is dense"),
        (["base", "a.safetensors", "-o", "a.txt"], "a.txt already exists"),
        (["base", "a.safetensors", "-o", "base/m.safetensors"], "lies inside the model's own folder"),
        (["base", "foreign.safetensors"], "made for another base"),
    ],
)
def test_bad_inputs(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    (at / "cut.safetensors").write_bytes((at / "a.safetensors").read_bytes()[:-8])
    first = task.read_alone(at / "a.safetensors")
    packed = load.packed_weights(load.load("base", "cpu").model)
    task.write(at / "foreign.safetensors", task.Task(first.kind, "0" * 64, first.values), packed)
    before = sorted(at.rglob("*"))
    code, out, err = call(monkeypatch, capsys, "merge-tasks", *(args if "-o" in args else [*args, "-o", "m.safetensors"]))
    assert (code, out) == (2, ""), err
    assert words in " ".join(err.split())
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    assert sorted(at.rglob("*")) == before


def test_numbers_on_the_command_line() -> None:
    assert merging.parse_numbers("0.5, -1e-1", "--weights") == (0.5, -0.1)
    assert merging.parse_numbers(None, "--weights") is merging.parse_lines(None) is None
    assert merging.parse_lines("auto") == (None, None)
    assert (merging.parse_lines("0.3"), merging.parse_lines("0.3,0.5")) == ((0.3, None), (0.3, 0.5))
    with pytest.raises(RecipeError, match="--lines 'a' is not understood"):
        merging.parse_lines("a")
