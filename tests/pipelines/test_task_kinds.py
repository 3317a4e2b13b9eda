"""Task files of tuned zeros and of adapters: bit for bit, bound to their base, swapped, applied, merged and compared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import compressor
from compressor.errors import ModelError
from compressor.export import merge, task
from compressor.integrations import attach, peft
from compressor.linear import packed_linears
from compressor.pipelines import differences, export, load, merging, tasks
from compressor.pipelines.api import Model
from compressor.pipelines.bases import base_digest
from compressor.recipe import Tune
from compressor.tune.qalora import float_zeros
from tests.pipelines.commands import call
from tests.pipelines.packed import logits, moved, scale_folder, table_folder

QUICK = ["--nsamples", "4", "--seqlen", "64", "--steps", "2", "--batch", "2", "--max-tokens", "256", "--device", "cpu"]


def symmetric_folder(folder: Path) -> Path:
    compressor.load("tiny", "cpu").compress(bits=3, packer="rtn").save(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("bases")
    return {"asym": scale_folder(at / "asym"), "sym": symmetric_folder(at / "sym"), "tables": table_folder(at / "tables", 0.15)}


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def zeros_moved(model: Model, seed: int) -> None:
    torch.manual_seed(seed)
    for layer in packed_linears(model.model).values():
        layer.zero = float_zeros(layer) + 0.3 * torch.randn(layer.learned.shape).to(float_zeros(layer).dtype)


def adapted(model: Model, seed: int, kind: str = "lora", rank: int = 4, **keys: Any) -> None:
    """An adapter beside the model whose paths say something."""
    tuner = peft.KINDS[kind](Tune(**({"method": kind} | ({} if kind == "ia3" else {"rank": rank}) | keys)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuner.attach(model.model, None, 10).values():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    tuner.detach(model.model)
    model._loaded.adapter = tuner.model


MOVES = {"zero": zeros_moved, "adapter": adapted}
CASES = [("asym", "zero"), ("sym", "zero"), ("asym", "adapter"), ("tables", "adapter")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_swaps_are_bit_exact_and_folders_come_back(
    bases: dict[str, Path], at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    wanted, base = {}, str(bases[name])
    untuned = logits(compressor.load(base, "cpu").model)
    for seed, label in ((1, "a"), (2, "b")):
        model = compressor.load(base, "cpu")
        MOVES[kind](model, seed)
        wanted[label] = logits(model.model)
        assert not torch.equal(wanted[label], untuned)
        model.save_task(at / f"{label}.memory")
        model.save(at / label)
        code, out, err = call(monkeypatch, capsys, "task", label, "-o", f"{label}.safetensors")
        assert code == 0, err
        document = json.loads(out.strip().splitlines()[-1])
        assert (document["kind"], document["layers"], document["bytes"]) == (kind, 28, (at / f"{label}.safetensors").stat().st_size)
        one, other = task.read_alone(at / f"{label}.memory"), task.read_alone(at / f"{label}.safetensors")
        assert one.base == other.base == document["base"]
        assert one.values.keys() == other.values.keys() and all(torch.equal(value, other.values[key]) for key, value in one.values.items())
        assert one.config | {"base_model_name_or_path": label} == other.config or kind == "zero"
    model = compressor.load(base, "cpu")
    layers = packed_linears(model.model)
    words = {key: layer.words for key, layer in layers.items()}
    counts = []
    monkeypatch.setattr(tasks.task, "digest", lambda *args, digest=task.digest: counts.append(1) or digest(*args))
    for label in ("a", "b", "a"):
        assert model.load_task(at / f"{label}.safetensors") is model
        assert torch.equal(logits(model.model), wanted[label])
    assert counts == [1], "the base is read once"
    assert all(layer.words is words[key] for key, layer in layers.items())
    model.save_task(at / "again")
    assert (at / "again").read_bytes() == (at / "a.safetensors").read_bytes()
    code, _, err = call(monkeypatch, capsys, "apply", base, "a.safetensors", "-o", "out")
    assert code == 0, err
    files = ["model.safetensors", "config.json"] + ([f"adapter/{peft.CONFIG}", f"adapter/{peft.WEIGHTS}"] if kind == "adapter" else [])
    for file in files:
        assert (at / "out" / file).read_bytes() == (at / "a" / file).read_bytes(), file
    assert torch.equal(logits(compressor.load("out", "cpu").model), wanted["a"])
    assert call(monkeypatch, capsys, "apply", "b", "a.safetensors", "-o", "over")[0] == 0, "any folder tuned from the base is a base"
    assert (at / "over" / files[-1]).read_bytes() == (at / "a" / files[-1]).read_bytes()


@pytest.mark.parametrize("kind", sorted(peft.KINDS))
def test_every_kind_of_adapter_is_exchanged(bases: dict[str, Path], at: Path, kind: str) -> None:
    model = compressor.load(str(bases["sym"]), "cpu")
    untuned = logits(model.model)
    adapted(model, 1, kind, targets="q_proj,down_proj")
    wanted = logits(model.model)
    model.save_task(at / "a")
    other = compressor.load(str(bases["sym"]), "cpu")
    adapted(other, 2, "rslora", 2)
    other.save_task(at / "b")
    before = torch.get_rng_state()
    for _ in range(2):
        assert torch.equal(logits(other.load_task(at / "a").model), wanted)
        other.load_task(at / "b")
    assert torch.equal(torch.get_rng_state(), before), "a server's draws go on"
    assert torch.equal(logits(other.unload_task().model), untuned)
    assert other._loaded.adapter is None and len(packed_linears(other.model)) == 28


def test_a_failed_exchange_leaves_the_first_adapter(bases: dict[str, Path], at: Path) -> None:
    model = compressor.load(str(bases["sym"]), "cpu")
    adapted(model, 1)
    model.save_task(at / "a")
    wanted, made = logits(model.model), model._loaded.adapter
    tensors, header = load_file(at / "a"), safe_open(at / "a", "pt").metadata()
    key = next(key for key in tensors if "down_proj.lora_B" in key)
    for change in (
        lambda t: t.pop(key), lambda t: t.update({key: torch.ones(3, 4)}), lambda t: t.update({"nose.lora_A.weight": torch.ones(4, 4)}),
        lambda t: t.update({key: t[key] / 0}),
    ):  # fmt: skip
        changed = dict(tensors)
        change(changed)
        save_file(changed, at / "bad", metadata=header)
        with pytest.raises(ModelError) as error:
            model.load_task(at / "bad")
        assert "\n" not in str(error.value)
        assert model._loaded.adapter is made and torch.equal(logits(model.model), wanted)
        with pytest.raises(ModelError):
            fresh = compressor.load(str(bases["sym"]), "cpu")
            fresh.load_task(at / "bad")
        assert fresh._loaded.adapter is None and len(packed_linears(fresh.model)) == 28
        assert not any(name.endswith("base_layer") for name in packed_linears(fresh.model))


def test_a_failed_exchange_by_another_configuration(bases: dict[str, Path], at: Path) -> None:
    model, other = (compressor.load(str(bases["sym"]), "cpu") for _ in range(2))
    adapted(model, 1)
    adapted(other, 2, "dora", 2)
    other.save_task(at / "b")
    tensors, header = load_file(at / "b"), safe_open(at / "b", "pt").metadata()
    tensors.pop(next(key for key in tensors if "down_proj.lora_B" in key))
    save_file(tensors, at / "bad", metadata=header)
    wanted, made, config = logits(model.model), model._loaded.adapter, attach.plain(model._loaded.adapter)
    with pytest.raises(ModelError, match="does not fit this model"):
        model.load_task(at / "bad")
    assert model._loaded.adapter is made and attach.plain(made) == config and torch.equal(logits(model.model), wanted)
    model.save_task(at / "a")
    assert task.read_header(at / "a").config == config
    assert torch.equal(logits(model.load_task(at / "b").model), logits(other.model))


@pytest.mark.parametrize("name", ["asym", "sym", "tables"])
def test_one_model_serves_every_kind_in_turn(bases: dict[str, Path], at: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wanted = {}
    kinds = {"values": lambda m, seed: moved(m.model, seed), "adapter": adapted} | ({} if name == "tables" else {"zero": zeros_moved})
    labels = [f"{kind}{seed}" for kind in kinds for seed in (1, 2)]
    for kind, change in kinds.items():
        for seed in (1, 2):
            model = compressor.load(str(bases[name]), "cpu")
            change(model, seed)
            wanted[f"{kind}{seed}"] = logits(model.model)
            model.save_task(at / f"{kind}{seed}")
    model = compressor.load(str(bases[name]), "cpu")
    own = {key: (layer.learned.clone(), layer.zero) for key, layer in packed_linears(model.model).items()}
    untuned = logits(model.model)
    counts: list[int] = []
    monkeypatch.setattr(tasks.task, "digest", lambda *args, digest=task.digest: counts.append(1) or digest(*args))
    for one in labels:
        for other in labels:
            for label in (one, other):
                assert torch.equal(logits(model.load_task(at / label).model), wanted[label]), (one, other)
        assert model.unload_task() is model and torch.equal(logits(model.model), untuned), one
        assert model.unload_task() is model
    assert len(counts) <= 2 * len(kinds), "the base is read once or twice a kind, not at every turn"
    assert model._loaded.adapter is None
    for key, layer in packed_linears(model.model).items():
        assert torch.equal(layer.learned, own[key][0])
        assert (layer.zero is None) == (own[key][1] is None)
        assert layer.zero is None or (layer.zero.dtype == torch.uint8 and torch.equal(layer.zero, own[key][1]))
    assert "recipe" not in model.save_task(at / "untuned")


@pytest.mark.parametrize("error", [ModelError, KeyboardInterrupt])
def test_a_swap_between_kinds_is_all_or_nothing(bases: dict[str, Path], at: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    for name, change in (("z", lambda m: zeros_moved(m, 1)), ("s", lambda m: moved(m.model)), ("a", lambda m: adapted(m, 1))):
        model = compressor.load(str(bases["sym"]), "cpu")
        change(model)
        model.save_task(at / name)

    def fails(*args: Any) -> None:
        raise error("stopped")

    copies: list[Any] = []
    late = lambda tensor, copy=tasks._copy: fails() if copies.append(tensor) or len(copies) > 70 else copy(tensor)
    cases = ("z", "a", peft, "beside", fails), ("s", "a", peft, "beside", fails), ("a", "s", peft, "strip", fails), ("s", "z", tasks, "_copy", late)
    for first, then, module, function, replaced in cases:
        model = compressor.load(str(bases["sym"]), "cpu").load_task(at / first)
        wanted, made = logits(model.model), model._loaded.adapter
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(module, function, replaced)
            model.load_task(at / then)
        assert torch.equal(logits(model.model), wanted) and model._loaded.adapter is made, (first, then)
        assert torch.equal(logits(model.load_task(at / then).model), logits(compressor.load(str(bases["sym"]), "cpu").load_task(at / then).model))


def test_nothing_of_a_serving_model_changes_when_tasks_are_saved_or_refused(bases: dict[str, Path], at: Path) -> None:
    model = compressor.load(str(bases["sym"]), "cpu")
    moved(model.model)
    model.save_task(at / "s")
    model = compressor.load(str(bases["asym"]), "cpu")
    adapted(model, 1)
    before = {name: id(module) for name, module in model.model.named_modules()}
    swapped: list[str] = []

    setter = torch.nn.Module.__setattr__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__setattr__", lambda s, k, v: swapped.append(k) or setter(s, k, v))
        model.save_task(at / "a")
        with pytest.raises(ModelError, match="made for another base"):
            model.load_task(at / "s")
    assert not swapped and {name: id(module) for name, module in model.model.named_modules()} == before
    assert base_digest(model._loaded) == base_digest(load.load(str(bases["asym"]), "cpu"))


def test_digests_know_what_a_kind_leaves_alone(bases: dict[str, Path], at: Path) -> None:
    found = {}
    for name, change in {"base": lambda m: None, "zeros": lambda m: zeros_moved(m, 1), "scales": lambda m: moved(m.model)}.items():
        model = compressor.load(str(bases["asym"]), "cpu")
        change(model)
        found[name] = {kind: base_digest(model._loaded, kind) for kind in ("scale", "zero", "adapter")}
    base, zeros, scales = (found[name] for name in ("base", "zeros", "scales"))
    assert (zeros["zero"], scales["scale"]) == (base["zero"], base["scale"])
    assert len({base["scale"], zeros["scale"], base["zero"], scales["zero"], *(each["adapter"] for each in found.values())}) == 7
    one, other = compressor.load(str(bases["asym"]), "cpu"), compressor.load(str(bases["asym"]), "cpu")
    for layer in packed_linears(other.model).values():
        layer.zero = None
    assert base_digest(one._loaded, "zero") == base_digest(other._loaded, "zero"), "zeros of the base are no part of it"
    adapted(other, 1)
    assert base_digest(other._loaded, "zero") == base["zero"], "nor is an adapter beside it"


def test_files_that_do_not_fit_end_in_one_sentence(bases: dict[str, Path], at: Path) -> None:
    for name, change in (("z", lambda m: zeros_moved(m, 1)), ("s", lambda m: moved(m.model)), ("a", lambda m: adapted(m, 1))):
        model = compressor.load(str(bases["asym"]), "cpu")
        change(model)
        model.save_task(at / name)
    tuned, scaled = compressor.load(str(bases["asym"]), "cpu"), compressor.load(str(bases["asym"]), "cpu")
    zeros_moved(tuned, 1)
    moved(scaled.model)
    with pytest.raises(ModelError, match="holds scales, but the base holds zeros that were tuned"):
        tuned.load_task(at / "s")
    for model, name in ((tuned, "a"), (scaled, "a"), (scaled, "z")):
        with pytest.raises(ModelError, match="made for another base: its digest"):
            model.load_task(at / name)
    with pytest.raises(ModelError, match="holds zeros, but the base holds tables"):
        compressor.load(str(bases["tables"]), "cpu").load_task(at / "z")
    layer = next(iter(packed_linears(tuned.model).values()))
    layer.tuned_zero = torch.nn.Identity()
    with pytest.raises(ModelError, match="is being tuned"):
        tuned.load_task(at / "z")
    layer.tuned_zero, layer.zero = None, None
    with pytest.raises(ModelError, match="holds tuned zeros in some layers"):
        tuned.save_task(at / "mixed")
    with pytest.raises(ModelError, match="tasks of two kinds do not add up"):
        export.apply(str(bases["asym"]), [at / "z", at / "s"], at / "out")
    with pytest.raises(ModelError, match="an adapter adds up with no other task"):
        export.apply(str(bases["asym"]), [at / "a", at / "a"], at / "out")
    with pytest.raises(ModelError, match="join them with peft's add_weighted_adapter"):
        merging.merge_tasks(str(bases["asym"]), [at / "a"], at / "m", merge.Options(), merging.Texts(), "cpu")
    assert not (at / "out").exists()


@pytest.mark.parametrize("name", ["asym", "sym"])
def test_zeros_merge_like_scales(bases: dict[str, Path], at: Path, name: str) -> None:
    files = [at / "a.safetensors", at / "b.safetensors"]
    for seed, file in enumerate(files):
        model = compressor.load(str(bases[name]), "cpu")
        zeros_moved(model, seed)
        model.save_task(file)
    start = {key: float_zeros(layer) for key, layer in packed_linears(load.load(str(bases[name]), "cpu").model).items()}
    values = [task.read_alone(file).values for file in files]
    for method in ("sum", "ties", "breadcrumbs", "soup"):
        out = at / f"{method}.safetensors"
        merging.merge_tasks(str(bases[name]), files, out, merge.Options(method), merging.Texts(), "cpu")
        found, wanted = task.read_alone(out), merge.merge(start, values, "zero", merge.Options(method))[0]
        assert found.kind == "zero" and all(torch.equal(found.values[key], value) for key, value in wanted.items())
    key = next(iter(start))
    total = sum(v[key].double() - start[key].double() for v in values) + start[key].double()
    assert torch.equal(task.read_alone(at / "sum.safetensors").values[key], total.half())
    first = merge.Options("sum", weights=(1.0, 0.0))
    merging.merge_tasks(str(bases[name]), files, at / "first", first, merging.Texts(), "cpu")
    assert all(torch.equal(value, values[0][key]) for key, value in task.read_alone(at / "first").values.items())
    (at / "t.txt").write_text("".join(f"{i}. The quick brown fox jumps over the lazy dog. " for i in range(80)))
    texts = merging.Texts((str(at / "t.txt"),) * 2, 32, 256)
    document, _ = merging.merge_tasks(str(bases[name]), files, at / "measured", merge.Options("greedy"), texts, "cpu")
    assert document["scores"][-1]["mean"] <= min(row["mean"] for row in document["scores"][1:3])
    export.apply(str(bases[name]), files, at / "both")
    assert all(
        torch.equal(layer.zero, task.read_alone(at / "sum.safetensors").values[key])
        for key, layer in packed_linears(load.load(str(at / "both"), "cpu").model).items()
    )


def test_diff_of_zeros_and_adapters(bases: dict[str, Path], at: Path) -> None:
    base = str(bases["asym"])
    for name, change in (
        ("z", lambda m: zeros_moved(m, 1)),
        ("a", lambda m: adapted(m, 1)),
        ("b", lambda m: adapted(m, 2)),
        ("s", lambda m: moved(m.model)),
    ):
        model = compressor.load(base, "cpu")
        change(model)
        model.save(at / name)
        model.save_task(at / f"{name}.safetensors")
    found, _ = differences.diff(base, "z")
    assert (found["kinds"], found["same_base"], found["moved"], len(found["layers"])) == (["scale", "zero"], True, 28, 28)
    before, after = (packed_linears(load.load(name, "cpu").model) for name in (base, "z"))
    row = found["layers"][0]
    steps = after[row["name"]].zero.double() - before[row["name"]].zero.double()
    assert row["largest"] == pytest.approx(float(steps.abs().max()))
    for one, other in (("z", "z.safetensors"), ("z.safetensors", "z"), ("a", "a.safetensors"), ("a", "a")):
        same, _ = differences.diff(one, other)
        assert (same["same_base"], same["same_values"], same["moved"]) == (True, True, 0), (one, other)
    assert differences.diff(base, "z.safetensors")[0]["same_base"]
    found, table = differences.diff("a", "b")
    tensors = len(load_file(at / "a" / "adapter" / peft.WEIGHTS))
    assert (found["kinds"], found["same_base"], found["same_values"], found["moved"]) == (["adapter"] * 2, True, False, tensors)
    assert len(found["layers"]) == table.row_count == 28 + tensors
    found, _ = differences.diff(base, "b")
    assert (found["kinds"], found["same_base"], found["same_values"], found["moved"]) == (["scale", "adapter"], True, False, tensors)
    assert {row["in"] for row in found["layers"] if "in" in row} == {"B"}
    found, _ = differences.diff("s", "a")
    assert (found["same_base"], {row["what"] for row in found["differences"]}) == (False, {"scales"})
    found, _ = differences.diff("z", "a")
    assert (found["same_base"], {row["what"] for row in found["differences"]}) == (False, {"zeros"})
    assert differences.diff("s.safetensors", "z.safetensors")[0]["layers"] == []
    assert not differences.diff("s.safetensors", "z")[0]["same_base"]
    some = compressor.load(base, "cpu")
    next(iter(packed_linears(some.model).values())).zero = float_zeros(next(iter(packed_linears(some.model).values()))) + 1
    some.save(at / "some")
    assert differences.diff(base, "some")[0]["moved"] == 1, "zeros that were tuned in some layers"


@pytest.mark.parametrize("tune", ["lora", "qalora"])
def test_a_run_that_keeps_only_the_task(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tune: str) -> None:
    def run(*args: str) -> dict[str, Any]:
        code, out, err = call(monkeypatch, capsys, "run", "tiny", "--quant", "3bit:rtn", *QUICK, *args)
        assert code == 0, err
        return json.loads(out.strip().splitlines()[-1])

    whole, only = run("--tune", tune, "-o", "whole"), run("--tune", tune, "--save", "task", "-o", "only")
    assert only["tuned"]["domain"]["perplexity"] == whole["tuned"]["domain"]["perplexity"]
    assert {p.name for p in (at / "only").iterdir()} == {"README.md", "recipe.yaml", "report.json", "report.html", "digests.json", "task.safetensors"}
    assert tasks.OTHERS["adapter" if tune == "lora" else "zero"] in (at / "only" / "README.md").read_text()
    tasks.extract("whole", at / "whole.safetensors")
    one, other = task.read_alone(at / "whole.safetensors"), task.read_alone(at / "only" / "task.safetensors")
    assert one.header() | {"config": None} == other.header() | {"config": None}
    assert all(torch.equal(value, other.values[name]) for name, value in one.values.items())
    run("-o", "base")
    assert call(monkeypatch, capsys, "apply", "base", "only/task.safetensors", "-o", "again")[0] == 0
    for file in ("model.safetensors", "config.json", *([f"adapter/{peft.WEIGHTS}"] if tune == "lora" else [])):
        assert (at / "again" / file).read_bytes() == (at / "whole" / file).read_bytes(), file
    assert run("--tune", tune, "--save", "task", "-o", "only")["resumed"] is True
