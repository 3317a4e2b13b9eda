"""Learning from kept predictions: the loss is the KL that it says, zero for the teacher itself, and pulls a student to it."""

from typing import Any

import pytest
import torch

from compressor.errors import DataError
from compressor.linear import packed_linears
from compressor.tune import loss as losses
from compressor.tune.batches import CausalLM
from compressor.tune.distill import Distilled, Taught, top
from compressor.tune.loop import train
from compressor.tune.loss import MASKED
from compressor.tune.peqa import Peqa


@pytest.fixture
def student(packed_llama):
    return packed_llama()


@torch.no_grad()
def predicted(model: Any, ids: torch.Tensor, count: int) -> Taught:
    return Taught(*top(model(input_ids=ids).logits, count))


@torch.no_grad()
def value(objective: CausalLM, model: Any) -> float:
    return float(objective.loss(model)(*objective.rows(torch.arange(len(objective.ids)))))


def test_the_loss_of_all_tokens_is_the_kl_of_the_logits(student, windows):
    ids, labels = windows[0][:4], windows[1][:4].clone()
    labels[1, 3:] = MASKED
    vocab = student.config.vocab_size
    with torch.no_grad():
        said = student(input_ids=ids).logits.log_softmax(-1)
    theirs = (said + 0.7 * torch.randn(said.shape, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    counted = labels[:, 1:] != MASKED
    kl = (theirs.exp() * (theirs - said)).sum(-1)[:, :-1][counted].sum()
    whole = Distilled(ids, labels, Taught(*top(theirs, vocab)), 1.0)
    assert value(whole, student) == pytest.approx(float(kl), rel=2e-3)  # log-probabilities are kept in float16
    few = value(Distilled(ids, labels, Taught(*top(theirs, 8)), 1.0), student)
    assert 0 < few < float(kl)  # of a coarser choice
    text = value(CausalLM(ids, labels), student)
    half = value(Distilled(ids, labels, Taught(*top(theirs, 8)), 0.5), student)
    assert half == pytest.approx((few + text) / 2, rel=1e-5)
    assert value(Distilled(ids, labels, Taught(*top(theirs, 8)), 0.0), student) == pytest.approx(text, rel=1e-6)


def test_the_teacher_itself_has_nothing_to_learn(student, windows):
    ids, labels = windows
    assert abs(value(Distilled(ids, labels, predicted(student, ids, 16), 1.0), student)) < 1e-3 * ids.numel()


def test_chunks_make_no_difference(student, windows, monkeypatch):
    ids, labels = windows
    objective = Distilled(ids, labels, predicted(student, ids, 4), 0.5)
    one = value(objective, student)
    monkeypatch.setattr(losses, "LOGITS", 7 * student.config.vocab_size)
    assert value(objective, student) == pytest.approx(one, rel=1e-5)


def test_scales_that_were_spoilt_are_learnt_back_from_the_teacher(student, options, windows):
    ids, labels = windows
    taught = predicted(student, ids, 32)
    objective = Distilled(ids, labels, taught, 1.0)
    for layer in packed_linears(student).values():
        layer.learned *= 1.3
    before, chosen = value(objective, student), options(steps=30, lr=0.01)
    train(student, Peqa(chosen).attach(student), objective, chosen, 1, None, "")
    assert value(objective, student) < 0.5 * before


def test_predictions_of_other_windows_are_refused(student, windows):
    ids, labels = windows
    with pytest.raises(DataError, match="do not belong to windows"):
        Distilled(ids, labels, predicted(student, ids[:3], 4), 1.0)


def test_predictions_of_some_windows_serve_those_and_no_others(student, windows):
    ids, labels = windows
    used = torch.tensor([1, 3, 4])
    some = Distilled(ids, labels, predicted(student, ids[used], 4), 0.5, used)
    every = Distilled(ids, labels, predicted(student, ids, 4), 0.5)
    for one, other in zip(some.rows(used[[2, 0]]), every.rows(used[[2, 0]]), strict=True):
        assert one.equal(other)
    with pytest.raises(DataError, match="predictions of window 2 were not kept"):
        some.rows(torch.tensor([1, 2]))
