"""A small slice of bench/kills.py, with real processes: kill -9 inside of writes, SIGTERM in the middle of tuning, two processes at one output."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from compressor.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
KILL = """
import os, signal, sys
name, number, when = sys.argv[1], int(sys.argv[2]), sys.argv[3]
real, seen = getattr(os, name), 0

def call(*args, **more):
    global seen
    seen += 1
    if seen == number and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **more)
    if seen == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(os, name, call)
sys.argv[:] = ["compressor", *sys.argv[4:]]
from compressor.pipelines.cli import main
main()
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    """A folder with a random LLaMA of two blocks, two texts, and a recipe that tunes it slowly, with a checkpoint only at the end."""
    folder = tmp_path_factory.mktemp("kills")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("\n\n".join(f"The ship number {i} left the harbour at dawn." for i in range(80)))
    recipe = Recipe(model="model").with_(
        quant__packer="rtn", quant__bits=4, quant__group=32, tune__method="peqa", tune__steps=400, tune__batch=2, tune__eval_every=0,
        tune__checkpoint_every=1000, data__data="a.txt", data__outside="b.txt", data__seqlen=32, eval__window=32, eval__max_tokens=256, device="cpu",
    )  # fmt: skip
    (folder / "slow.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    (folder / "quick.yaml").write_text(yaml.safe_dump(recipe.with_(tune__steps=4).to_dict()))
    return folder


def run(place: Path, recipe: str, output: str, *before: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-c", KILL, *before] if before else [sys.executable, "-m", "compressor"]
    return subprocess.run([*start, "run", recipe, "-o", output], cwd=place, env=environment(), capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    done = run(place, "slow.yaml", "whole")
    assert done.returncode == 0, done.stderr
    return place / "whole"


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_sigterm_leaves_a_checkpoint_and_the_same_command_ends_as_if_nothing_had_been(place: Path, whole: Path) -> None:
    command = [sys.executable, "-m", "compressor", "run", "slow.yaml", "-o", "asked"]
    process = subprocess.Popen(command, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    work = place / "asked.partial"
    wait_for(lambda: any(work.glob("tune-*")), process)
    again = run(place, "slow.yaml", "asked")
    assert again.returncode == 2 and "another run is writing" in again.stderr, "two runs on one output refuse each other"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143 and "the same command goes on from here" in said, said
    assert not (place / "asked").exists() and (work / "report.json").exists()
    (checkpoint,) = work.glob("tune-*/tune.safetensors")
    with safe_open(checkpoint, "pt") as file:
        assert 0 < json.loads(file.metadata()["state"])["step"] < 400
    done = run(place, "slow.yaml", "asked")
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["resumed"] is True, done.stderr
    assert (place / "asked" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    curves = [json.loads((folder / "report.json").read_text())["training"]["curve"] for folder in (place / "asked", whole)]
    assert curves[0] == curves[1] and not work.exists()


@pytest.mark.parametrize("at", [("rename", "1", "after"), ("rmdir", "1", "before")])
def test_a_kill_around_the_last_rename_leaves_a_whole_folder_and_nothing_beside_it(place: Path, at: tuple[str, str, str]) -> None:
    output = f"{at[0]}-{at[2]}"
    assert run(place, "quick.yaml", output, *at).returncode == -signal.SIGKILL
    names = {"config.json", "model.safetensors", "report.json", "recipe.yaml", "README.md"}
    assert names <= {path.name for path in (place / output).iterdir()} and (place / f"{output}.partial").exists()
    done = run(place, "quick.yaml", output)
    assert done.returncode == 0 and "nothing to do" in done.stderr
    assert not (place / f"{output}.partial").exists()
