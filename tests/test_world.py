"""Several processes: sums, values and errors that all have alike, and a training loop that gives what one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from compressor import world
from compressor.errors import OutputError, RecipeError
from compressor.pipelines import cli_world, parallel
from compressor.recipe import Recipe
from compressor.tune import distributed
from tests import parallel_worker

WORKER = Path(parallel_worker.__file__)


def test_one_process_has_what_it_gives() -> None:
    t = torch.ones(3)
    assert world.size() == 1 and world.lead() and world.add([t]) == 0 and world.dealt(t) is t
    assert world.share({"a": 1}) == {"a": 1} and world.gather(5) == [5] and world.send({"t": t}, 0, t.device)["t"] is t
    with pytest.raises(OutputError):
        world.first(parallel_worker.refusal)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """What two processes of the worker saw, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(WORKER.parents[1])
    env = os.environ | {"PYTHONPATH": root, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    args = [[sys.executable, str(WORKER), str(i), str(port), str(folder)] for i in range(2)]
    started = [subprocess.Popen(each, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for each in args]
    said = [each.communicate(timeout=200) for each in started]
    assert [each.returncode for each in started] == [0, 0], said
    return [json.loads(out.splitlines()[-1]) for out, _ in said], folder


def test_sums_values_and_errors_reach_all(two) -> None:
    for seen in two[0]:
        assert seen["stats"] < 1e-6 and seen["tokens"] == 10 and seen["all"] == [0, 1]
        assert seen["sent"] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] and seen["refused"] == "no room"


def test_two_processes_train_as_one(two) -> None:
    first, second = two[0]
    log, weight = parallel_worker.tuned(7, None)
    assert first["weight"] == second["weight"], "the state is the same to the last bit"
    assert torch.allclose(torch.tensor(first["weight"]), weight, rtol=0, atol=1e-6)
    assert first["losses"] == pytest.approx([row["loss"] for row in log.curve], rel=1e-6)
    assert first["bytes"] == 4 * (1 + 16 + 4) and "reduced_bytes" not in log.curve[0]


def test_a_strike_on_one_process_is_one_on_all(two) -> None:
    first, second = two[0]
    assert first["notes"] == second["notes"] and len(first["notes"]) == 1
    assert first["notes"][0].startswith("step 2 was dropped: the loss is nan") and "(process 1)" in first["notes"][0]
    assert first["spoilt"] == second["spoilt"] != first["weight"]


def test_three_spoilt_steps_of_one_process_end_all(two) -> None:
    for seen in two[0]:
        assert seen["ended"].startswith("tuning stopped after 3 non-finite steps in a row, the last at step 3: the loss is nan"), seen["ended"]
        assert "(process 0)" in seen["ended"]


def test_a_checkpoint_of_two_holds_no_pickle_and_goes_on_in_one(two, tmp_path) -> None:
    place = distributed.latest(two[1])
    assert place is not None and place.name == "tune-00000007.dcp"
    files = sorted(p.name for p in two[1].rglob("*") if p.is_file())
    assert files == ["record.json", "shard-00001-model-00001-of-00001.safetensors", "shard-00002-model-00001-of-00001.safetensors"]
    log, weight = parallel_worker.tuned(7, two[1])
    assert log.resumed_from == 7 and weight.tolist() == two[0][0]["weight"]
    (place / files[1]).write_bytes(b"\0" * 40)
    log, again = parallel_worker.tuned(7, two[1])
    assert log.resumed_from == 0 and "is damaged or does not fit" in log.notes[0] and torch.allclose(again, weight, atol=1e-6)


def test_linears_go_to_whoever_has_least_to_do(monkeypatch) -> None:
    monkeypatch.setattr(world, "size", lambda: 2)
    assert parallel.owners({"q": 512, "k": 128, "v": 128, "down": 4608}) == {"down": 0, "q": 1, "k": 1, "v": 1}
    assert parallel.owners({"q": 64, "k": 16, "v": 16, "down": 80}) == {"down": 0, "q": 1, "k": 1, "v": 0}


def test_without_the_store_nobody_is_named(monkeypatch) -> None:
    """Process 0, which keeps the store, goes away: that the others do not answer there says nothing of them."""
    keep = "import sys, torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, is_master=True); print(s.port, flush=True); sys.stdin.read()"
    first = subprocess.Popen([sys.executable, "-c", keep], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    store: Any = dist.TCPStore("127.0.0.1", int(first.stdout.readline()), is_master=False)
    board = dist.PrefixStore("compressor/0", store)
    for name, value in {"size": lambda: 3, "rank": lambda: 1, "_board": [board], "PATIENCE": 0.3}.items():
        monkeypatch.setattr(world, name, value)
    board.set("here/0", "here")
    assert world.lost().startswith("process 2 of 3 was lost (killed, out of memory")
    board.set("failed/2", "no room")
    assert world.lost().startswith("process 2 of 3 was lost (no room)")
    board.set("here/2", "here")
    assert world.lost() == ""
    first.kill()
    first.wait()
    for boards in ([board], []):
        monkeypatch.setattr(world, "_board", boards)
        said = world.lost()
        assert said.startswith("processes lost each other: process 0, or the store through which they meet, cannot be reached (killed"), said
        assert said.endswith("the same command goes on from the last checkpoint") and "of 3" not in said


@pytest.mark.parametrize(
    "change", [{"prune__method": "obert", "prune__ratio": 0.5}, {"choose__target_bits": 3.5}, {"tune__adapter": "absorb"}, {"data__nsamples": 1}]
)
def test_what_one_process_does_alone_is_refused(monkeypatch, change) -> None:
    recipe = Recipe().with_(**change)
    parallel.check_alone(recipe, encoder=False)
    monkeypatch.setattr(world, "size", lambda: 2)
    parallel.check_alone(Recipe(), encoder=False)
    with pytest.raises(RecipeError):
        parallel.check_alone(recipe, encoder=False)
    with pytest.raises(RecipeError, match="an encoder works in one process"):
        parallel.check_alone(Recipe(), encoder=True)


def test_the_launcher_says_how_many(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    cli_world.check("eval")
    assert cli_world.count() == 1, "a variable that somebody left behind"
    monkeypatch.setenv("RANK", "0")
    cli_world.check("run")
    with pytest.raises(RecipeError, match="`compressor eval` works in one process"):
        cli_world.check("eval")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with (
        pytest.raises(RecipeError, match="WORLD_SIZE=2 are in the environment, and MASTER_ADDR not: start .* torchrun"),
        cli_world.joined("cpu"),
    ):
        pass
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name, value in (("MASTER_PORT", "70000"), ("RANK", "2")):
        monkeypatch.setenv(name, value)
        with pytest.raises(RecipeError, match="do not fit together"), cli_world.joined("cpu"):
            pass
        monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(RecipeError, match="WORLD_SIZE=two"):
        cli_world.check("run")
