"""`torchrun -m compressor run` with two processes: one is killed, the rest say so, and the same command ends where one process would have."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from compressor.pipelines.run import run
from compressor.recipe import Recipe
from tests.launched import member

RECIPE = {
    "model": "tiny", "device": "cpu", "quant": {"bits": 3, "packer": "rtn"}, "data": {"seqlen": 32}, "eval": {"max_tokens": 320},
    "tune": {"method": "peqa", "steps": 16, "batch": 2, "accumulate": 2, "checkpoint_every": 2, "eval_every": 0, "shard": True},
}  # fmt: skip


def started(place: Path) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    args = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "compressor", "run", "recipe.yaml", "-o", "out"]
    return subprocess.Popen(args, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A folder in which process 1 of 2 was killed after the first checkpoint; exit code and stderr."""
    place = tmp_path_factory.mktemp("two")
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), "utf-8")
    job = started(place)
    while not list(place.glob("out.partial/tune-*/tune-*.dcp/record.json")):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.02)
    os.kill(member(job.pid, 1), signal.SIGKILL)
    stderr = job.communicate(timeout=90)[1]
    return place, job.returncode, stderr


def test_a_killed_process_ends_the_run_with_one_sentence(broken) -> None:
    place, code, stderr = broken
    said = [line for line in stderr.splitlines() if "was lost" in line]
    assert code == 1 and len(said) == 1, stderr
    assert said[0].startswith("process 1 of 2 was lost (killed") or said[0].startswith("failed: process 1 of 2 was lost (killed")
    assert said[0].endswith("the same command goes on from the last checkpoint") and not (place / "out").exists()


def test_the_same_command_goes_on_to_what_one_process_makes(broken, tmp_path) -> None:
    place = broken[0]
    job = started(place)
    stdout, stderr = job.communicate(timeout=300)
    assert job.returncode == 0, stderr
    document = json.loads(stdout.splitlines()[-1])
    assert document["resumed"] and stdout.count('"output"') == 1 and not (place / "out.partial").exists()
    run(Recipe.from_dict(RECIPE), tmp_path / "one")
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", place / "out"))
    reports = [json.loads((folder / "report.json").read_text("utf-8")) for folder in (tmp_path / "one", place / "out")]
    assert one.keys() == two.keys() and reports[1]["training"]["processes"] == 2
    for key, t in one.items():
        if key.endswith("weight_scale"):  # Adam follows the sign of a gradient, which may be that of a rounding where it is next to nothing
            assert float(((t - two[key]).abs() > 2e-3 * t.abs()).float().mean()) < 0.01, key
        else:
            assert torch.equal(t, two[key]), key
    errors = [[row["error"] for row in report["layers"]] for report in reports]
    assert errors[0] == errors[1]
    curves = [[row["loss"] for row in report["training"]["curve"]] for report in reports]
    assert len(curves[0]) == 16 and curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert {row["reduced_bytes"] for row in reports[1]["training"]["curve"]} == {4 * (1 + reports[1]["training"]["trainable"])}


def test_sigterm_to_all_ends_with_a_checkpoint_of_all_and_is_no_loss(tmp_path) -> None:
    slow = RECIPE | {"tune": RECIPE["tune"] | {"steps": 4000, "checkpoint_every": 20}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(slow), "utf-8")
    job = started(tmp_path)
    while not list(tmp_path.glob("out.partial/tune-*/tune-*.dcp/record.json")):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.02)
    for rank in (1, 0):
        os.kill(member(job.pid, rank), signal.SIGTERM)
    stderr = job.communicate(timeout=90)[1]
    assert stderr.count("stopped by a signal; the same command goes on") == 1 and "was lost" not in stderr, stderr
    assert set(re.findall(r"exitcode  : (\S+)", stderr)) == {"143"}, stderr  # torchrun lists those that it saw end
    kept = [json.loads(path.read_text("utf-8"))["step"] for path in tmp_path.glob("out.partial/tune-*/tune-*.dcp/record.json")]
    assert len(kept) == 1 and kept[0] > 20 and kept[0] % 20, kept
