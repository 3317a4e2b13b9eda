"""The training loop with a pruner beside it: when it is called, what a dropped step undoes, restarts, resume; and the real pruners in it."""

from typing import Any

import pytest
import torch
from safetensors import safe_open

from compressor.errors import NumericError
from compressor.prune import lowrank
from compressor.prune.depth import DepthPruner
from compressor.prune.importance import IMPORTANCES
from compressor.prune.loraprune import UnitPruner
from compressor.prune.schedule import Ramp
from compressor.prune.unit_masks import UnitMasks
from compressor.prune.units import families
from compressor.recipe import Tune
from compressor.tune import loop
from compressor.tune.batches import CausalLM, rate
from compressor.tune.loop import train
from compressor.tune.state import CHECKPOINT
from tests.prune.helpers import causal, pack
from tests.tune.helpers import Killed, kill_at, run, same


class Recorder:
    """Writes down every call and what the loop's state was then; its one tensor counts prunes and observations."""

    def __init__(self, model: Any = None, restarts: tuple[int, ...] = ()):
        self.model, self.restarts = model, restarts
        self.calls: list[tuple[Any, ...]] = []
        self.counts = torch.zeros(2)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"counts": self.counts}

    def prune(self, step: int) -> None:
        self.calls.append(("prune", step))
        self.counts[0] += 1

    def observe(self, step: int) -> None:
        self.calls.append(("observe", step))
        self.counts[1] += 1

    def hold(self) -> None:
        self.calls.append(("hold", self.counts.tolist()))


# --- order of calls ------------------------------------------------------------------------------------------------------------------------


def test_a_step_prunes_observes_and_holds_in_this_order(packed_llama, options, windows):
    model = packed_llama()
    pruner, seen = Recorder(), {}
    model.model.layers[0].register_forward_pre_hook(lambda _module, _args: pruner.calls.append(("forward",)))
    gradients = lambda: {name: (p.grad.clone(), p.detach().clone()) for name, p in model.named_parameters() if p.requires_grad}
    observe = pruner.observe
    pruner.observe = lambda step: (seen.setdefault(step, gradients()), observe(step))
    log, parameters = run(packed_llama, windows, options(steps=3, batch=8, accumulate=2, clip=1e-3), model=model, pruner=pruner)
    calls = [call for call in pruner.calls if call[0] != "forward"]
    assert calls == [
        call for step in range(3) for call in [("prune", step), ("observe", step), *[("hold", [step + 1] * 2)] * 2]  # before the norm, and after
    ]  # fmt: skip
    first, forward = pruner.calls.index(("prune", 1)), [i for i, call in enumerate(pruner.calls) if call == ("forward",)]
    assert [pruner.calls.index(("observe", 1)) - first] == [3] and first + 1 in forward and first + 2 in forward, "two micro-batches between"
    for step, row in enumerate(log.curve):
        norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad, _ in seen[step].values()]))
        assert float(norm) == pytest.approx(row["grad_norm"], rel=1e-5), "gradients are those of the step's mean loss, not clipped yet"
        assert row["grad_norm"] > 1e-2
    assert not any(torch.equal(seen[2][name][1], p) for name, p in parameters.items()), "and nothing has been applied"


def test_a_run_without_a_pruner_is_the_same_as_with_an_idle_one(packed_llama, options, windows):
    plain, expected = run(packed_llama, windows, options(steps=4))
    log, parameters = run(packed_llama, windows, options(steps=4), pruner=Recorder())
    assert log.curve == plain.curve and same(parameters, expected)


# --- undone steps --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gradient", "update"])
def test_a_dropped_step_gives_the_pruner_its_state_back_and_holds(packed_llama, options, windows, monkeypatch, kind):
    real, pruner = loop._gradient, Recorder()

    def faulty(model, loss, batches, step, state):
        if kind == "update" and step == 2:  # the loss that the update of step 1 led to is not finite
            with torch.no_grad():
                next(iter(state.parameters.values())).fill_(torch.nan)
        value, fault = real(model, loss, batches, step, state)
        return (value, "it was told to") if kind == "gradient" and step == 2 else (value, fault)

    monkeypatch.setattr(loop, "_gradient", faulty)
    log, parameters = run(packed_llama, windows, options(steps=5), pruner=pruner)
    assert len(log.notes) == 1 and [row["step"] for row in log.curve] == [1, 2, 4, 5]
    assert ("observe", 2) not in pruner.calls
    after = pruner.calls[pruner.calls.index(("prune", 2)) + 1 :]
    assert after[0] == ("hold", [2, 1]), "the good state is the one before the observation and update of step 1, with its prune"
    assert after[1:3] == [("prune", 3), ("observe", 3)] and pruner.counts.tolist() == [4, 3]
    assert all(bool(torch.isfinite(p).all()) for p in parameters.values())


def test_the_last_update_is_proven_with_the_pruner_as_it_was(packed_llama, options, windows, monkeypatch):
    pruner = Recorder()
    monkeypatch.setattr(loop, "_unproven", lambda *args: "it was told to")
    log, _ = run(packed_llama, windows, options(steps=2), pruner=pruner)
    assert len(log.notes) == 1 and pruner.calls[-1] == ("hold", [2, 1]) and pruner.counts.tolist() == [2, 1]


def test_three_strikes_leave_the_last_good_masks(packed_llama, options, windows, monkeypatch):
    real, pruner = loop._gradient, Recorder()
    monkeypatch.setattr(loop, "_gradient", lambda *args: real(*args) if args[3] < 2 else (0.0, "it was told to"))
    with pytest.raises(NumericError, match="3 non-finite steps"):
        run(packed_llama, windows, options(steps=8), pruner=pruner)
    assert pruner.counts.tolist() == [2, 1] and pruner.calls[-1] == ("hold", [2, 1])


# --- restarts ------------------------------------------------------------------------------------------------------------------------------


def test_the_schedule_begins_again_at_every_restart(options):
    keys = options(schedule="linear", warmup=0.25, steps=12)
    plain = lambda total: [rate(s, total, keys) for s in range(total)]
    assert [rate(s, 12, keys, (4,)) for s in range(12)] == plain(4) + plain(8)
    assert [rate(s, 12, keys, (2, 8)) for s in range(12)] == plain(2) + plain(6) + plain(4)
    assert [rate(s, 12, keys, (0, 4)) for s in range(12)] == plain(4) + plain(8)
    assert [rate(s, 12, keys) for s in range(12)] == plain(12)


def test_the_optimiser_follows_the_pruners_restarts(packed_llama, options, windows):
    chosen = options(steps=6, schedule="linear", lr=0.01)
    log, _ = run(packed_llama, windows, chosen, pruner=Recorder(restarts=(2,)))
    assert [row["lr"] for row in log.curve] == pytest.approx([0.01, 0.005, 0.01, 0.0075, 0.005, 0.0025])


# --- checkpoints ---------------------------------------------------------------------------------------------------------------------------


def test_the_checkpoint_holds_the_pruners_state_and_gives_it_back(packed_llama, options, windows, tmp_path):
    with pytest.raises(Killed):
        run(packed_llama, windows, options(steps=6, checkpoint_every=2), tmp_path, on_step=kill_at(4), pruner=Recorder())
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        assert file.get_tensor("pruned/counts").tolist() == [3, 2], "step 2 was pruned for before it proved the state after steps 0 and 1"
    pruner = Recorder()
    log, _ = run(packed_llama, windows, options(steps=6, checkpoint_every=2), tmp_path, pruner=pruner)
    assert log.resumed_from == 2 and pruner.calls[:2] == [("hold", [3, 2]), ("prune", 2)]


def test_a_checkpoint_without_the_pruners_state_is_not_used(packed_llama, options, windows, tmp_path):
    run(packed_llama, windows, options(steps=2), tmp_path)
    log, _ = run(packed_llama, windows, options(steps=2), tmp_path, pruner=Recorder())
    assert log.resumed_from == 0 and "was not used" in log.notes[0]


# --- the real pruners ----------------------------------------------------------------------------------------------------------------------


def prune(windows, kind="loraprune", folder=None, base=lambda model: model, uniform=True, steps=14, kill=None):
    """Train a small model with a pruner; returns (log, its tensors, parameters)."""
    model = base(causal(keys=4))
    paths = lowrank.attach(model, 4, 8.0, seed=1)
    ramp = Ramp(1, 10, 2)
    if kind == "depth":
        pruner: Any = DepthPruner(model, 1, windows[0] % 48, ramp)
    else:
        units = families(model)
        kept = {f.key: f.count // 2 for f in units}
        pruner = UnitPruner(paths, units, UnitMasks(model, units), kept, IMPORTANCES[kind](paths), ramp, uniform, {"ffn": 8})
    options = Tune(method="prune", steps=steps, lr=5e-3, batch=4, schedule="linear", warmup=0.0, eval_every=0, checkpoint_every=1)
    parameters = lowrank.parameters(paths)
    on_step = None if kill is None else kill_at(kill)
    log = train(model, parameters, CausalLM(windows[0] % 48, windows[0] % 48), options, 5, folder, "a", None, on_step, pruner)
    return log, {key: t.clone() for key, t in pruner.tensors().items()}, parameters


@pytest.mark.parametrize(("kind", "packed", "uniform"), [
    ("loraprune", False, True), ("loraprune", True, True), ("loraprune", False, False), ("taylor", False, True), ("wanda", False, True),
    ("magnitude", True, True), ("depth", False, True),
])  # fmt: skip
def test_pruning_resumed_at_any_step_equals_an_unbroken_run(windows, tmp_path, kind, packed, uniform):
    keys = {"kind": kind, "base": pack if packed else lambda model: model, "uniform": uniform}
    log, tensors, parameters = prune(windows, **keys)
    for step in (3, 7, 11) if kind != "depth" else (6,):
        with pytest.raises(Killed):
            prune(windows, folder=tmp_path, kill=step, **keys)
    again, restored, others = prune(windows, folder=tmp_path, **keys)
    assert again.resumed_from == (10 if kind != "depth" else 5)
    assert same(restored, tensors) and same(others, parameters) and again.curve == log.curve
    left = {key: int(t.sum()) for key, t in tensors.items() if not key.startswith("score.")}
    if kind == "depth":
        assert left == {"blocks": 1}
    elif uniform:
        assert left == {f"{b}.{name}": n for b in range(3) for name, n in (("heads", 2), ("ffn", 24))}
    else:
        assert sum(n for key, n in left.items() if "ffn" in key) == 72 and all(n % 8 == 0 for key, n in left.items() if "ffn" in key)


def test_masks_undone_with_a_step_come_back_with_the_next_prune(windows, monkeypatch):
    _, expected, _ = prune(windows, "magnitude")
    real = loop._gradient
    monkeypatch.setattr(loop, "_gradient", lambda *args: (0.0, "it was told to") if args[3] == 10 else real(*args))
    log, tensors, _ = prune(windows, "magnitude")
    assert len(log.notes) == 1
    assert all(int(tensors[key].sum()) == int(expected[key].sum()) for key in expected if not key.startswith("score."))


def test_a_healed_model_is_better_than_one_that_was_only_cut(windows):
    log, _, _ = prune(windows, steps=40)
    losses = [row["loss"] for row in log.curve]
    assert losses[-1] < losses[10] and all(torch.isfinite(torch.tensor(losses)))
