import math

import pytest
import torch
from safetensors import safe_open
from torch import nn

from compressor.errors import MissingExtra, RecipeError
from compressor.integrations import bitsandbytes
from compressor.recipe import OPTIMIZERS, Recipe
from compressor.tune import loop
from compressor.tune.batches import Batches, CausalLM
from compressor.tune.optimizers import LEAST, moment_bytes, own
from compressor.tune.state import CHECKPOINT, State
from tests.tune.conftest import options, packed_llama, windows  # noqa: F401
from tests.tune.helpers import Killed, kill_at, run, same

CPU = torch.device("cpu")


@pytest.fixture
def eight(monkeypatch):
    """The maker of 8-bit optimizers, for tensors of any size."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes, "LEAST", 1)
    return bitsandbytes.maker("adamw8bit", CPU)


def test_names_and_libraries_are_checked(monkeypatch):
    with pytest.raises(RecipeError, match="choose adamw, adamw8bit"):
        Recipe().with_(tune__optimizer="sgd")
    with pytest.raises(RecipeError, match="choose adamw8bit"):
        bitsandbytes.maker("adamw", CPU)
    with pytest.raises(RecipeError, match="this run is on the CPU: use adamw8bit"):
        bitsandbytes.maker("paged-adamw8bit", CPU)
    with pytest.raises(RecipeError, match="hand its maker"):
        own("adamw8bit")
    monkeypatch.setattr(bitsandbytes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'compressor\[optim\]'"):
        bitsandbytes.maker("adamw8bit", CPU)


@pytest.mark.parametrize("broken", ["raises", "does nothing"])
def test_a_build_that_cannot_step_is_found_before_any_work(monkeypatch, broken):
    pytest.importorskip("bitsandbytes")

    def step(self, lr):
        if broken == "raises":
            raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(bitsandbytes.Adam, "step", step)
    with pytest.raises(RecipeError, match="no kernel image for this device" if broken == "raises" else "does not move parameters") as found:
        bitsandbytes.maker("adamw8bit", CPU)
    assert "\n" not in str(found.value)


def test_moments_take_the_bytes_that_the_estimate_counts():
    pytest.importorskip("bitsandbytes")
    parameters = {"large": nn.Parameter(torch.randn(64, 2 * LEAST // 64)), "small": nn.Parameter(torch.randn(LEAST // 2))}
    for name in OPTIMIZERS[:2]:
        state = State(parameters, 0.0, make=own(name) if name == "adamw" else bitsandbytes.maker(name, CPU))
        held = {part: sum(t.nbytes for t in state.optimizer.moments(parameters[part]).values() if t.dim()) for part in parameters}
        assert held == {"large": 2 * LEAST * moment_bytes(name), "small": LEAST // 2 * 8}
        live = sum(t.nbytes for t in state.tensors().values())
        assert sum(t.nbytes for t in state.good.values()) == live


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(packed_llama, options, windows, tmp_path, eight):  # noqa: F811
    chosen = options(steps=9, checkpoint_every=2, weight_decay=0.01, optimizer="adamw8bit")
    unbroken, expected = run(packed_llama, windows, chosen, optimizer=eight)
    for step in (4, 7):
        with pytest.raises(Killed):
            run(packed_llama, windows, chosen, tmp_path, on_step=kill_at(step), optimizer=eight)
    log, parameters = run(packed_llama, windows, chosen, tmp_path, optimizer=eight)
    assert log.resumed_from == 6 and log.curve == unbroken.curve and log.notes == [] and same(parameters, expected)
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        kinds = {key.partition("/")[0]: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert kinds.keys() == {"value", "step", "state1", "state2", "absmax1", "absmax2"}
    assert kinds["state1"].dtype == torch.uint8 and int(kinds["step"]) == 9
    adamw, _ = run(packed_llama, windows, options(steps=9, weight_decay=0.01), tmp_path)
    assert adamw.resumed_from == 0 and "does not fit" in adamw.notes[0], "a checkpoint of another optimizer starts nothing"


def test_it_learns_what_adamw_learns(packed_llama, options, windows, eight):  # noqa: F811
    plain, values = run(packed_llama, windows, options(steps=12))
    log, others = run(packed_llama, windows, options(steps=12, optimizer="adamw8bit"), optimizer=eight)
    assert log.curve[-1]["loss"] == pytest.approx(plain.curve[-1]["loss"], rel=2e-3) and not same(values, others)
    moved = torch.cat([p.flatten() for p in values.values()])
    assert (torch.cat([p.flatten() for p in others.values()]) - moved).norm() < 0.2 * moved.norm()


def test_a_bad_window_gives_the_8_bit_moments_back(packed_llama, options, windows, monkeypatch, eight):  # noqa: F811
    states, seen, ids = [], [], windows[0].clone()

    class Watched(State):
        def __init__(self, *args):
            super().__init__(*args)
            states.append(self)

    monkeypatch.setattr(loop, "State", Watched)
    model, chosen = packed_llama(), options(batch=2, steps=4, schedule="constant", optimizer="adamw8bit")
    ids[Batches(CausalLM(ids, windows[1]), chosen, 5).windows(2)[0], 0] = 63
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = math.nan
    look = lambda record: seen.append({key: t.clone() for key, t in states[0].tensors().items()})
    log, parameters = run(packed_llama, (ids, windows[1]), chosen, model=model, on_step=look, optimizer=eight)
    assert [row["step"] for row in log.curve] == [1, 2, 4] and same(seen[2], seen[0])
    assert not torch.equal(*(torch.cat([t.flatten() for key, t in s.items() if key.startswith("state1")]) for s in (seen[1], seen[0])))
    assert all(torch.isfinite(p).all() for p in parameters.values())


def test_the_loop_takes_no_other_optimizer_than_it_was_asked_for(packed_llama, options, windows):  # noqa: F811
    with pytest.raises(RecipeError, match="hand its maker"):
        run(packed_llama, windows, options(optimizer="adamw8bit"))
