import errno
import math

import pytest
import torch
from safetensors import safe_open

from compressor.errors import DataError, OutputError, RecipeError
from compressor.tune import loop, state
from compressor.tune import loss as losses
from compressor.tune.batches import Batches, CausalLM, rate
from compressor.tune.loss import loss_function
from compressor.tune.state import CHECKPOINT
from tests.tune.helpers import Killed, kill_at, run, same

# --- schedule and data order ---------------------------------------------------------------------------------------------------------------


def test_schedules(options):
    keys = {"steps": 10, "warmup": 0.2}
    cosine = [rate(s, 10, options(schedule="cosine", **keys)) for s in range(10)]
    assert cosine == pytest.approx([0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])
    assert [rate(s, 10, options(schedule="linear", **keys)) for s in range(10)] == pytest.approx([0.5, 1.0] + [1 - i / 8 for i in range(8)])
    assert [rate(s, 10, options(schedule="constant", **keys)) for s in range(10)] == [0.5] + [1.0] * 9
    assert [rate(s, 4, options(schedule="linear")) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_schedule_is_what_the_optimiser_gets(packed_llama, options, windows):
    chosen = options(steps=4, schedule="linear", lr=0.02)
    log, _ = run(packed_llama, windows, chosen)
    assert [row["lr"] for row in log.curve] == pytest.approx([0.02, 0.015, 0.01, 0.005])
    assert [row["step"] for row in log.curve] == [1, 2, 3, 4]


@pytest.mark.parametrize("count, batch, accumulate", [(20, 4, 1), (7, 2, 2), (3, 4, 2), (1, 1, 1)])
def test_every_epoch_sees_every_window_once(options, count, batch, accumulate):
    ids = torch.arange(count * 2).view(count, 2)
    batches = Batches(CausalLM(ids, ids), options(steps=None, epochs=3.0, batch=batch, accumulate=accumulate), seed=1)
    assert batches.size == min(batch * accumulate, count)
    assert batches.steps == math.ceil(3 * count / batches.size)
    rows = torch.cat([batches.windows(s) for s in range(batches.steps)]).tolist()
    for epoch in range(3):
        assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))
    if count > 3:
        assert rows[:count] != rows[count : 2 * count], "epochs must be shuffled differently"
        other = Batches(CausalLM(ids, ids), options(batch=batch, accumulate=accumulate), seed=2)
        assert other.windows(0).tolist() != batches.windows(0).tolist()
    again = Batches(CausalLM(ids, ids), options(steps=None, epochs=3.0, batch=batch, accumulate=accumulate), seed=1)
    assert again.windows(batches.steps - 1).tolist() == rows[-batches.size :]


@pytest.mark.parametrize(("batch", "accumulate", "steps"), [(4, 1, 2), (2, 2, 1), (4, 2, 3), (8, 4, 2)])
def test_the_windows_in_use_are_those_of_all_steps(options, batch, accumulate, steps):
    ids, labels = torch.arange(40).view(20, 2), torch.arange(40).view(20, 2)
    labels[[0, 7], 1] = -100
    batches = Batches(CausalLM(ids, labels), options(steps=steps, batch=batch, accumulate=accumulate), seed=1)
    seen = torch.cat([batches.windows(step) for step in range(steps)])
    assert batches.used().equal(seen.unique())


def test_windows_without_tokens_are_left_out_and_counted(packed_llama, options, windows):
    ids, labels = windows[0], windows[1].clone()
    labels[[2, 5], 1:] = -100
    log, _ = run(packed_llama, (ids, labels), options(steps=None, epochs=1.0, batch=8))
    assert log.steps == 3 and "2 of 20 training windows" in log.notes[0]
    with pytest.raises(DataError, match="none of the 20"):
        run(packed_llama, (ids, torch.full_like(ids, -100)), options())
    with pytest.raises(DataError, match="must be"):
        run(packed_llama, (ids, labels[:, :-1]), options())


# --- loss ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1 << 25, 64 * 7])
def test_loss_is_the_cross_entropy_of_shifted_unmasked_labels(packed_llama, windows, monkeypatch, chunk):
    monkeypatch.setattr(losses, "LOGITS", chunk)
    ids, labels = windows
    grads = []
    for ours in (True, False):
        model = packed_llama()
        embedding = model.get_input_embeddings().weight.requires_grad_(True)
        if ours:
            loss = loss_function(model, ids[:1, :8])(ids, labels)
        else:
            logits = model(ids).logits[:, :-1].double()
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
        loss.backward()
        grads.append((loss.double(), embedding.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-5)


def test_logits_exist_in_bounded_chunks_for_unmasked_tokens_only(packed_llama, windows, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS", 64 * 7)
    model = packed_llama()
    loss = loss_function(model, windows[0][:1, :8])
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    with torch.no_grad():
        loss(*windows)
    assert max(sizes) <= 7 and sum(sizes) == int((windows[1][:, 1:] != -100).sum())


def test_a_model_that_changes_its_logits_keeps_its_own_loss(packed_llama, windows):
    model = packed_llama()
    plain = model.forward

    def capped(**inputs):
        output = plain(**inputs)
        output.logits = torch.tanh(output.logits / 2) * 2
        return output

    model.forward = capped
    logits = model(input_ids=windows[0]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), windows[1][:, 1:].reshape(-1), reduction="sum")
    torch.testing.assert_close(loss_function(model, windows[0][:1, :8])(*windows), expected)


def test_accumulation_equals_one_large_batch(packed_llama, options, windows):
    log, _ = run(packed_llama, windows, options(batch=8, steps=3))
    _, parameters = run(packed_llama, windows, options(batch=8, steps=1, clip=0.0))
    assert len({row["tokens"] for row in log.curve}) > 1, "the masks must be uneven for this to test anything"
    for batch, accumulate in ((4, 2), (1, 8)):
        other, _ = run(packed_llama, windows, options(batch=batch, accumulate=accumulate, steps=3))
        _, others = run(packed_llama, windows, options(batch=batch, accumulate=accumulate, steps=1, clip=0.0))
        for a, b in zip(log.curve, other.curve, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
            assert a["tokens"] == b["tokens"]
        for name, parameter in parameters.items():  # not the parameters: Adam amplifies rounding where a gradient is almost 0
            assert (others[name].grad - parameter.grad).norm() < 1e-4 * parameter.grad.norm()


def test_gradients_do_not_vanish_in_float16(packed_llama, options, windows, monkeypatch):
    """A step of very many tokens: the gradient of the mean loss would underflow inside a float16 model."""
    real = Batches.tokens
    monkeypatch.setattr(Batches, "tokens", lambda self, step: 8192 * real(self, step))
    grads = []
    for dtype in (torch.float32, torch.float16):
        log, parameters = run(packed_llama, windows, options(steps=1, clip=0.0), model=packed_llama().to(dtype))
        grads.append({name: p.grad for name, p in parameters.items()})
        assert log.curve[0]["tokens"] > 1e5
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() < 0.01 * grad.norm(), name


def test_a_micro_batch_mean_would_differ(packed_llama, windows):
    """The trap that accumulation avoids: means of uneven micro-batches are not the mean of all tokens."""
    ids, labels = windows[0][:8], windows[1][:8]
    loss = loss_function(packed_llama(), ids[:1])
    with torch.no_grad():
        halves = [loss(ids[s], labels[s]) / (labels[s, 1:] != -100).sum() for s in (slice(0, 4), slice(4, 8))]
        whole = loss(ids, labels) / (labels[:, 1:] != -100).sum()
    assert abs(sum(halves) / 2 - whole) > 1e-3


def test_gradient_checkpointing_changes_nothing_and_is_turned_off_again(packed_llama, options, windows):
    plain, expected = run(packed_llama, windows, options(steps=3))
    model = packed_llama()
    log, parameters = run(packed_llama, windows, options(steps=3, gradient_checkpointing=True), model=model)
    assert log.curve == plain.curve and same(parameters, expected)
    assert not model.training and not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    with pytest.raises(RecipeError, match="gradient checkpointing"):
        loop._recompute(torch.nn.Linear(2, 2))


def test_clip_and_weight_decay(packed_llama, options, windows):
    one = {"steps": 1, "schedule": "constant"}
    log, free = run(packed_llama, windows, options(clip=0.0, **one))
    clipped_log, clipped = run(packed_llama, windows, options(clip=1e-9, **one))
    assert log.curve[0]["grad_norm"] == clipped_log.curve[0]["grad_norm"] > 1e-3, "the norm is that before clipping"
    assert max(p.abs().max() for p in clipped.values()) < 0.5 * max(p.abs().max() for p in free.values())
    _, absolute = run(packed_llama, windows, options(parametrization="absolute", clip=1e-30, **one))
    _, decayed = run(packed_llama, windows, options(parametrization="absolute", clip=1e-30, weight_decay=0.5, **one))
    for name in absolute:
        torch.testing.assert_close(decayed[name], absolute[name] * (1 - 0.01 * 0.5))


# --- evaluation ----------------------------------------------------------------------------------------------------------------------------


def test_evaluation_runs_in_eval_mode_and_is_recorded(packed_llama, options, windows):
    model, modes = packed_llama(), []

    def evaluate():
        modes.append((model.training, torch.is_grad_enabled()))
        torch.manual_seed(99)  # an evaluation may draw numbers without changing the training
        return float(len(modes))

    records = []
    log, parameters = run(packed_llama, windows, options(steps=5, eval_every=2), model=model, evaluate=evaluate, on_step=records.append)
    assert log.evals == [{"step": 2, "value": 1.0}, {"step": 4, "value": 2.0}, {"step": 5, "value": 3.0}]
    assert modes == [(False, False)] * 3 and records == log.curve and not model.training
    only_end, others = run(packed_llama, windows, options(steps=5), evaluate=lambda: 1.0)
    assert [row["step"] for row in only_end.evals] == [5] and same(parameters, others)


# --- checkpoint and resume -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(packed_llama, options, windows, tmp_path, dropout):
    make = lambda: packed_llama(attention_dropout=dropout)
    chosen = options(steps=9, checkpoint_every=2, eval_every=3, weight_decay=0.01, accumulate=2)
    hooks = {"evaluate": lambda: 1.5}
    unbroken, expected = run(make, windows, chosen, **hooks)
    with pytest.raises(Killed):
        run(make, windows, chosen, tmp_path, on_step=kill_at(4), **hooks)
    with pytest.raises(Killed):
        run(make, windows, chosen, tmp_path, on_step=kill_at(7), **hooks)
    torch.manual_seed(123)
    log, parameters = run(make, windows, chosen, tmp_path, **hooks)
    assert log.resumed_from == 6 and unbroken.resumed_from == 0
    assert same(parameters, expected)
    assert log.curve == unbroken.curve and log.evals == unbroken.evals and log.notes == []
    steps = []
    again, loaded = run(make, windows, chosen, tmp_path, on_step=steps.append, **hooks)
    assert again.resumed_from == 9 and steps == [] and same(loaded, expected) and again.curve == unbroken.curve
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_checkpoint_holds_values_moments_and_curve(packed_llama, options, windows, tmp_path):
    _, parameters = run(packed_llama, windows, options(steps=2), tmp_path / "deep" / "folder")
    with safe_open(tmp_path / "deep" / "folder" / CHECKPOINT, framework="pt") as file:
        assert len(list(file.keys())) == 4 * len(parameters)
        for name, p in parameters.items():
            assert torch.equal(file.get_tensor(f"value/{name}"), p) and file.get_tensor(f"exp_avg/{name}").any()
        assert '"fingerprint": "a"' in file.metadata()["state"]


def test_a_checkpoint_of_another_run_is_not_used(packed_llama, options, windows, tmp_path):
    run(packed_llama, windows, options(steps=3, lr=0.1), tmp_path, "other")
    _, expected = run(packed_llama, windows, options(steps=3))
    log, parameters = run(packed_llama, windows, options(steps=3), tmp_path, "a")
    assert log.resumed_from == 0 and same(parameters, expected) and "another run" in log.notes[0]
    assert run(packed_llama, windows, options(steps=3), tmp_path, "a")[0].resumed_from == 3


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "other shapes", "not finite"])
def test_a_damaged_checkpoint_is_noted_and_the_run_starts_afresh(packed_llama, options, windows, tmp_path, damage):
    chosen, path = options(steps=3), tmp_path / CHECKPOINT
    _, expected = run(packed_llama, windows, chosen)
    if damage == "other shapes":
        run(lambda: packed_llama(group=16), windows, chosen, tmp_path)
    elif damage == "not finite":
        with pytest.raises(Killed):
            run(packed_llama, windows, options(steps=3, checkpoint_every=1), tmp_path, on_step=kill_at(2))
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        next(iter(tensors.values())).fill_(float("inf"))
        state.save_file(tensors, path, metadata)
    else:
        run(packed_llama, windows, chosen, tmp_path)
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-100], "noise": bytes(range(256)) * 8, "empty": b""}[damage])
    log, parameters = run(packed_llama, windows, chosen, tmp_path)
    assert log.resumed_from == 0 and same(parameters, expected)
    assert len(log.notes) == 1 and CHECKPOINT in log.notes[0] and "was not used" in log.notes[0]
    assert run(packed_llama, windows, chosen, tmp_path)[0].resumed_from == 3


def test_a_full_disk_is_one_sentence_and_leaves_the_old_checkpoint(packed_llama, options, windows, tmp_path, monkeypatch):
    real, chosen = state.save_file, options(steps=6, checkpoint_every=2)

    def full(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Killed):
        run(packed_llama, windows, chosen, tmp_path, on_step=kill_at(3))
    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        run(packed_llama, windows, chosen, tmp_path)
    assert "\n" not in str(caught.value) and [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]
    monkeypatch.setattr(state, "save_file", real)
    log, parameters = run(packed_llama, windows, chosen, tmp_path)
    assert log.resumed_from == 2 and same(parameters, run(packed_llama, windows, chosen)[1])


def test_a_folder_that_cannot_be_written_is_an_output_error(packed_llama, options, windows, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        run(packed_llama, windows, options(steps=1), tmp_path / "file")
