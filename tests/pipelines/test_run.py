"""The main job from the command line, in processes of its own: results, resume after kill -9, full disk, recipes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from compressor.errors import OutputError
from compressor.pipelines.run import run
from compressor.recipe import Recipe

QUICK = ["--nsamples", "8", "--seqlen", "64", "--steps", "8", "--batch", "4", "--max-tokens", "1024", "--device", "cpu"]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "compressor", *args]


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def call(*args: str, cwd: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON document of the last stdout line, and stderr."""
    done = subprocess.run(command(*args), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    lines = done.stdout.strip().splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One short run of tiny, unbroken."""
    place = tmp_path_factory.mktemp("run")
    code, document, stderr = call("run", "tiny", "--quant", "3bit", "--tune", "peqa", "-o", "out", *QUICK, cwd=place)
    assert code == 0, stderr
    return place / "out", document


def test_the_document_is_the_contract(quick: tuple[Path, dict[str, Any]]) -> None:
    _, document = quick
    assert document["output"] == "out"
    assert document["resumed"] is False
    for name in ("dense", "packed", "tuned"):
        assert document[name]["domain"]["perplexity"] > 1
        assert document[name]["outside"]["perplexity"] > 1
        assert document[name]["ratio"] >= 1
    assert document["packed"]["bits_per_weight"] == document["tuned"]["bits_per_weight"] == 3.125
    assert document["tuned"]["domain"]["perplexity"] < document["packed"]["domain"]["perplexity"]
    stages = {"load", "compress", "tune", "export", "evaluate dense", "evaluate packed", "evaluate tuned"}
    assert stages <= set(document["seconds"])
    assert stages <= set(document["peak_bytes"])


def test_the_folder_is_complete(quick: tuple[Path, dict[str, Any]]) -> None:
    folder, document = quick
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", "recipe.yaml", "report.json", "report.html"}
    assert not any("tmp" in n or "partial" in n for n in names)
    assert not folder.with_name("out.partial").exists()
    report = json.loads((folder / "report.json").read_text())
    assert len(report["layers"]) == 28
    assert report["export"]["verified"] is True
    about = ("README.md", "recipe.yaml", "report.json", "report.html", "digests.json")
    served = sum(p.stat().st_size for p in folder.iterdir() if p.name not in about)
    assert document["tuned"]["folder_bytes"] == served


def test_transformers_reads_the_same_logits(quick: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM

    from compressor.pipelines import load

    ids = torch.randint(1, 2000, (2, 48), generator=torch.Generator().manual_seed(1))
    ours = load.load(str(quick[0]), "cpu").model
    theirs, info = AutoModelForCausalLM.from_pretrained(quick[0], dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert float((ours(ids).logits - theirs(ids).logits).abs().max()) <= 1e-4


def test_tuning_moves_scales_and_nothing_else(quick: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    code, document, stderr = call("run", "tiny", "--quant", "3bit", "--tune", "none", "-o", "plain", *QUICK, cwd=tmp_path)
    assert code == 0, stderr
    assert "tuned" not in document
    before, after = load_file(tmp_path / "plain" / "model.safetensors"), load_file(quick[0] / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"weight_scale"}


def test_the_same_command_again_does_nothing_and_another_is_refused(quick: tuple[Path, dict[str, Any]]) -> None:
    folder, document = quick
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    code, again, _ = call("run", "tiny", "--quant", "3bit", "--tune", "peqa", "-o", "out", *QUICK, cwd=folder.parent)
    assert code == 0
    assert again["resumed"] is True
    assert again["tuned"] == document["tuned"]
    code, _, stderr = call("run", "tiny", "--quant", "2bit", "--tune", "peqa", "-o", "out", *QUICK, cwd=folder.parent)
    assert code == 2
    assert "already holds the result of another run" in stderr
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_neighbours_of_the_output_are_left_alone(tmp_path: Path, quick: tuple[Path, dict[str, Any]]) -> None:
    (tmp_path / "y.old").mkdir()
    (tmp_path / "y.old" / "precious").write_text("mine")
    shutil.copytree(quick[0], tmp_path / "real")
    (tmp_path / "y").symlink_to("real")
    options = ["--quant", "4bit:rtn", "-o", "y", "--seqlen", "64", "--max-tokens", "512", "--device", "cpu"]
    code, document, stderr = call("run", "tiny", *options, "--overwrite", cwd=tmp_path)
    assert code == 0, stderr
    assert document["packed"]["bits_per_weight"] == 4.125
    assert (tmp_path / "y.old" / "precious").read_text() == "mine"
    assert (tmp_path / "y").is_symlink()
    assert json.loads((tmp_path / "real" / "report.json").read_text())["recipe"]["quant"]["bits"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["real", "y", "y.old"]
    (tmp_path / "real" / "model.safetensors").unlink()  # an incomplete folder is not a finished one
    code, _, stderr = call("run", "tiny", *options, cwd=tmp_path)
    assert code == 2
    assert "another run" in stderr


def test_the_recipe_in_the_folder_repeats_the_run(quick: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copy(quick[0] / "recipe.yaml", tmp_path / "recipe.yaml")
    code, document, stderr = call("run", "recipe.yaml", "-o", "again", cwd=tmp_path)
    assert code == 0, stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (quick[0] / "model.safetensors").read_bytes()
    assert document["tuned"]["domain"]["perplexity"] == quick[1]["tuned"]["domain"]["perplexity"]


def kill_when(ready: Any, *args: str, cwd: Path) -> None:
    """Start a run and kill -9 it as soon as `ready()` holds; fails if the run ends before."""
    process = subprocess.Popen(command(*args), cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(60_000):
            if ready():
                break
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_kill_9_while_compressing_and_while_tuning_then_resume(quick: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    recipe = yaml.safe_load((quick[0] / "recipe.yaml").read_text())
    recipe["tune"]["checkpoint_every"] = 1
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    work = tmp_path / "o.partial"
    kill_when(lambda: any(work.glob("blocks-*/block-00001.safetensors")), "run", "r.yaml", "-o", "o", cwd=tmp_path)
    assert not (tmp_path / "o").exists()
    kill_when(lambda: any(work.glob("tune-*/tune.safetensors")), "run", "r.yaml", "-o", "o", cwd=tmp_path)
    assert not (tmp_path / "o").exists()
    code, document, stderr = call("run", "r.yaml", "-o", "o", cwd=tmp_path)
    assert code == 0, stderr
    assert document["resumed"] is True
    assert (tmp_path / "o" / "model.safetensors").read_bytes() == (quick[0] / "model.safetensors").read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.3 MB, where the user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small file system needs rights that this user lacks")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_any_work(small_disk: Path) -> None:
    code, _, stderr = call("run", "tiny", "--quant", "4bit:rtn", "-o", "out", *QUICK, cwd=small_disk)
    assert code == 2
    assert "free some space" in stderr
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_is_one_sentence_and_loses_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe().with_(
        quant__packer="rtn", quant__bits=4, tune__method="peqa", tune__steps=4, tune__batch=4, data__seqlen=64, eval__max_tokens=1024, device="cpu"
    )
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1 << 40}))
    with pytest.raises(OutputError, match="the disk is full.*finished work is kept"):
        run(recipe, small_disk / "out")
    assert not (small_disk / "out").exists()
    assert list((small_disk / "out.partial").glob("blocks-*/block-*.safetensors"))
    subprocess.run(["mount", "-o", "remount,size=6m", str(small_disk)], check=True)
    document = run(recipe, small_disk / "out")
    assert document["resumed"] is True
    assert (small_disk / "out" / "model.safetensors").exists()


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    code, document, stderr = call("run", "tiny", "--quant", "3bit", "--tune", "peqa", "--dry-run", cwd=tmp_path)
    assert code == 0, stderr
    assert document["bits_per_weight"] == pytest.approx(3.125, abs=1e-3)
    assert document["packed_layers"] == 28
    assert all(v > 0 for v in document["seconds"].values())
    assert list(tmp_path.iterdir()) == []


def test_shared_models_run_too(shared: Path, tmp_path: Path) -> None:
    model, text = shared / "models" / "babyllama", shared / "data" / "tinystories" / "stories.txt"
    code, document, stderr = call(
        "run", str(model), "--data", str(text), "--quant", "3bit", "--group", "32", "--tune", "peqa", "-o", "o", *QUICK, cwd=tmp_path
    )
    assert code == 0, stderr
    assert document["dense"]["domain"]["perplexity"] < document["packed"]["domain"]["perplexity"]
    assert document["packed"]["bits_per_weight"] == 3.5
