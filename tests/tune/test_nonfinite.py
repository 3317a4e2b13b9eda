"""Non-finite numbers never reach the parameters: failed steps, updates and evaluations of the training loop."""

import math

import pytest
import torch
from safetensors import safe_open

from compressor.errors import ModelError, NumericError
from compressor.tune import loop
from compressor.tune.batches import Batches, CausalLM
from compressor.tune.loop import train
from compressor.tune.peqa import Peqa
from compressor.tune.state import CHECKPOINT
from tests.tune.helpers import Killed, kill_at, run, same


@pytest.fixture
def poison():
    """Makes the gradient of a parameter NaN at the given backward passes (counted from 0)."""

    def add(parameter, when):
        calls = iter(range(1000))
        parameter.register_hook(lambda grad: torch.full_like(grad, float("nan")) if next(calls) in when else grad)

    return add


def test_a_failed_evaluation_costs_one_step_and_its_update(packed_llama, options, windows):
    model, chosen = packed_llama(), options(steps=5, eval_every=2, schedule="constant")
    parameters = Peqa(chosen).attach(model)
    copy = lambda: {name: p.detach().clone() for name, p in parameters.items()}
    records, seen, values = [], [copy()], iter([1.0, None, float("nan"), 4.0])

    def evaluate():
        if (value := next(values)) is None:
            raise NumericError("the loss of windows 0 to 3 is not finite")
        return value

    def on_step(record):
        records.append(record)
        seen.append(copy())

    log = train(model, parameters, CausalLM(*windows), chosen, 5, None, "", evaluate, on_step)
    assert log.evals == [{"step": 2, "value": 1.0}, {"step": 5, "value": 4.0}], "the last value is that of what is kept"
    assert [row["step"] for row in log.curve] == [1, 2, 3] and [row["loss"] is None for row in records] == [False] * 3 + [True] * 2
    assert "step 4 was dropped: the evaluation failed (the loss of windows 0 to 3" in log.notes[0]
    assert "step 5 was dropped: the evaluation gave nan" in log.notes[1] and "now 0.25 of" in log.notes[1]
    assert same(seen[4], seen[3]) and same(seen[5], seen[3]) and not same(seen[3], seen[2])
    assert not model.training


def test_three_failed_evaluations_in_a_row_end_the_run(packed_llama, options, windows, tmp_path):
    chosen, records = options(steps=9, eval_every=2, checkpoint_every=1), []
    with pytest.raises(NumericError, match="3 non-finite evaluations in a row, the last at step 6"):
        run(packed_llama, windows, chosen, evaluate=lambda: math.nan, on_step=records.append)
    assert [row["step"] for row in records if row["loss"] is not None] == [1, 3, 5]
    with pytest.raises(Killed):
        run(packed_llama, windows, chosen, tmp_path, evaluate=lambda: math.nan, on_step=kill_at(4))
    with pytest.raises(NumericError, match="the last at step 6"):
        run(packed_llama, windows, chosen, tmp_path, evaluate=lambda: math.nan)
    with pytest.raises(NumericError, match="the last at step 1: the evaluation gave inf"):
        run(packed_llama, windows, options(steps=1), evaluate=lambda: math.inf)


@pytest.mark.parametrize("broken", [float("nan"), 1e30], ids=["parameter", "loss"])
def test_the_last_update_is_proven_before_it_is_kept(packed_llama, options, windows, tmp_path, monkeypatch, broken):
    chosen, update, calls = options(steps=3, parametrization="absolute"), loop.State.update, []

    def breaking(self, lr, clip):
        calls.append({name: p.detach().clone() for name, p in self.parameters.items()})
        norm = update(self, lr, clip)
        if len(calls) == 3:
            for p in self.parameters.values():
                p.data.fill_(broken)
        return norm

    monkeypatch.setattr(loop.State, "update", breaking)
    log, parameters = run(lambda: packed_llama(dtype=torch.float32), windows, chosen, tmp_path)
    assert [row["step"] for row in log.curve] == [1, 2] and len(log.notes) == 1
    assert "step 3 was dropped" in log.notes[0] and "model.layers.0.self_attn." in log.notes[0]
    assert same(parameters, calls[2])
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        assert all(torch.equal(file.get_tensor(f"value/{name}"), p) for name, p in parameters.items())


def test_one_bad_window_costs_one_step(packed_llama, options, windows, monkeypatch):
    class Watched(loop.State):
        def __init__(self, *args):
            super().__init__(*args)
            states.append(self)

    states = []
    monkeypatch.setattr(loop, "State", Watched)
    ids = windows[0].clone()
    model = packed_llama()
    chosen = options(batch=2, steps=5, schedule="constant")
    batches = Batches(CausalLM(ids, windows[1]), chosen, 5)
    ids[batches.windows(2)[0], 0] = 63
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = float("nan")
    records, seen = [], []
    parameters = Peqa(chosen).attach(model)

    def on_step(record):
        records.append(record)
        seen.append({key: t.clone() for key, t in states[0].tensors().items()})

    log = train(model, parameters, CausalLM(ids, windows[1]), chosen, 5, None, "", on_step=on_step)
    assert [row["step"] for row in log.curve] == [1, 2, 4, 5] and len(log.notes) == 1
    assert "step 3 was dropped" in log.notes[0] and "model.embed_tokens" in log.notes[0]
    assert records[2] == {"step": 3, "loss": None, "note": log.notes[0]}
    assert [row["lr"] for row in log.curve] == pytest.approx([1e-2, 1e-2, 5e-3, 5e-3])
    assert same(seen[2], seen[0]), "back to the state of the last finite gradient, Adam moments too: before the update of step 2"
    assert all(
        any(not torch.equal(seen[1][key], seen[0][key]) for key in seen[0] if key.startswith(kind))
        for kind in ("value", "exp_avg/", "exp_avg_sq", "step")
    )
    assert not same(seen[3], seen[2]) and all(torch.isfinite(p).all() for p in parameters.values())


def test_an_update_that_breaks_the_model_is_undone_and_the_scale_named(packed_llama, options, windows):
    model, chosen = packed_llama(), options(steps=6)
    parameters = Peqa(chosen).attach(model)
    broken = "model.layers.1.self_attn.v_proj.tuned.delta"
    good = {}

    def on_step(record):
        if record["step"] == 2:
            good.update({name: p.detach().clone() for name, p in parameters.items()})
        if record["step"] == 3:
            parameters[broken].data[3, 1] = float("inf") - float("inf")
        if record["step"] == 4:
            assert record["loss"] is None and same(good, parameters)

    log = train(model, parameters, CausalLM(*windows), chosen, 5, None, "", on_step=on_step)
    assert len(log.notes) == 1 and "first seen in model.layers.1.self_attn.v_proj;" in log.notes[0]
    assert len(log.curve) == 5 and all(torch.isfinite(p).all() for p in parameters.values())


def test_three_bad_losses_in_a_row_raise_and_name_the_layer(packed_llama, options, windows):
    model = packed_llama()
    with torch.no_grad():
        model.get_submodule("model.layers.1.input_layernorm").weight[5] = float("inf")
    parameters = Peqa(options()).attach(model)
    steps = []
    with pytest.raises(NumericError, match=r"3 non-finite steps in a row.*model\.layers\.1\.input_layernorm"):
        train(model, parameters, CausalLM(*windows), options(), 5, None, "", on_step=steps.append)
    assert len(steps) == 2 and not any(p.any() for p in parameters.values()) and not model.training


def test_bad_gradients_name_the_layer(packed_llama, options, windows, poison):
    model = packed_llama()
    parameters = Peqa(options()).attach(model)
    poison(parameters["model.layers.1.mlp.down_proj.tuned.delta"], {0, 1, 3})
    log = train(model, parameters, CausalLM(*windows), options(schedule="constant"), 5, None, "")
    assert [row["step"] for row in log.curve] == [3, 5, 6] and len(log.notes) == 3
    assert all("gradient of model.layers.1.mlp.down_proj (1 of 14 parameters)" in note for note in log.notes)
    assert [row["lr"] for row in log.curve] == pytest.approx([1e-2 / 4, 1e-2 / 8, 1e-2 / 8])
    poison(parameters["model.layers.0.mlp.gate_proj.tuned.delta"], {1, 2, 3})
    with pytest.raises(NumericError, match=r"model\.layers\.0\.mlp\.gate_proj"):
        train(model, parameters, CausalLM(*windows), options(), 5, None, "")


def test_a_resume_after_a_dropped_step_is_exact_too(packed_llama, options, windows, tmp_path):
    ids, chosen = windows[0].clone(), options(batch=2, steps=8, checkpoint_every=2)
    for step in (2, 4):  # the checkpoint due at step 4 has to wait for step 6
        ids[Batches(CausalLM(ids, windows[1]), chosen, 5).windows(step)[1], 0] = 63

    def make():
        model = packed_llama()
        with torch.no_grad():
            model.get_input_embeddings().weight[63] = float("nan")
        return model

    unbroken, expected = run(make, (ids, windows[1]), chosen)
    with pytest.raises(Killed):
        run(make, (ids, windows[1]), chosen, tmp_path, on_step=kill_at(7))
    log, parameters = run(make, (ids, windows[1]), chosen, tmp_path)
    assert log.resumed_from == 6 and log.notes == unbroken.notes and len(log.notes) == 2
    assert log.curve == unbroken.curve and same(parameters, expected)


def test_parameters_that_cannot_be_trained_are_refused(packed_llama, options, windows):
    model = packed_llama()
    parameters = Peqa(options()).attach(model)
    with pytest.raises(ModelError, match="nothing to train"):
        train(model, {}, CausalLM(*windows), options(), 0, None, "")
    name = next(iter(parameters))
    for bad in (torch.nn.Parameter(torch.ones(2).half()), torch.nn.Parameter(torch.ones(2), requires_grad=False)):
        with pytest.raises(ModelError, match=name):
            train(model, parameters | {name: bad}, CausalLM(*windows), options(), 0, None, "")
