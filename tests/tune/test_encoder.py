"""The objective of encoders against its formulas: padding, pieces, masks, distillation; the stream of gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

from compressor.errors import DataError
from compressor.recipe import Tune
from compressor.tune import encoder
from compressor.tune.encoder import EncoderTask, Examples, Teacher, distance, pieces
from compressor.tune.gradients import Gradients
from compressor.tune.loop import train

KIND = {"sequence": BertForSequenceClassification, "token": BertForTokenClassification, "question": BertForQuestionAnswering}


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50, "num_labels": 3}
    if kind == "question":
        shape["num_labels"] = 2
    return KIND[kind](BertConfig(**shape, initializer_range=0.2, max_position_embeddings=40)).eval()


def examples_of(kind, count=13, seed=1):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (count,), generator=draw)
    total = int(lengths.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    labels = {
        "sequence": torch.randint(0, 3, (count,), generator=draw),
        "token": torch.randint(0, 3, (total,), generator=draw).masked_fill(torch.rand(total, generator=draw) < 0.4, -100),
        "question": torch.stack([torch.randint(0, 2, (count,), generator=draw)] * 2, 1) + torch.tensor([0, 1]),
    }[kind]
    ids = torch.randint(1, 50, (total,), generator=draw, dtype=torch.int32)
    return Examples(kind, ids, offsets, labels, torch.randint(0, 2, (total,), generator=draw, dtype=torch.int8))


def alone(model, rows, i):
    """The summed cross entropy of row i without any padding, from the formula; its logits [m, c] too."""
    a, b = int(rows.offsets[i]), int(rows.offsets[i + 1])
    out = model(input_ids=rows.ids[None, a:b].long(), token_type_ids=rows.types[None, a:b].long())
    if rows.kind == "sequence":
        return functional.cross_entropy(out.logits, rows.labels[i : i + 1]), out.logits
    if rows.kind == "token":
        logits = out.logits[0]
        return functional.cross_entropy(logits, rows.labels[a:b], ignore_index=-100, reduction="sum"), logits[rows.labels[a:b] != -100]
    logits = torch.cat([out.start_logits, out.end_logits])
    return functional.cross_entropy(logits, rows.labels[i], reduction="mean"), logits


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("worth", [1, 20, 10**6])
def test_a_batch_costs_what_its_rows_cost_alone(kind, worth, monkeypatch):
    monkeypatch.setitem(encoder.PIECE, "cpu", worth)
    model, rows = model_of(kind), examples_of(kind)
    task = EncoderTask(rows)
    which = torch.tensor([4, 0, 9, 12, 7])
    found = task.loss(model)(*task.rows(which))
    torch.testing.assert_close(found, sum(alone(model, rows, i)[0] for i in which.tolist()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KIND)
def test_counts_are_the_labels(kind):
    rows = examples_of(kind)
    wanted = [int((rows.labels[a:b] != -100).sum()) if kind == "token" else 1 for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)]
    assert EncoderTask(rows).counts.tolist() == wanted


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_distillation_is_its_formula(kind, share):
    student, teacher, rows, t = model_of(kind), model_of(kind, seed=5), examples_of(kind), 2.5
    task = EncoderTask(rows, Teacher(teacher, share, t))
    which = torch.arange(len(rows))
    wanted = 0.0
    for i in which.tolist():
        own, logits = alone(student, rows, i)
        target = (alone(teacher, rows, i)[1] / t).softmax(1)
        kl = (target * (target.log() - (logits / t).log_softmax(1))).sum()
        wanted = wanted + (1 - share) * own + share * t * t * kl * (0.5 if kind == "question" else 1.0)
    torch.testing.assert_close(task.loss(student)(*task.rows(which)), wanted, rtol=1e-5, atol=1e-4)


def test_a_teacher_is_in_eval_mode_and_gets_no_gradient():
    student, teacher = model_of("sequence").train(), model_of("sequence", 5).train()
    task = EncoderTask(examples_of("sequence"), Teacher(teacher))
    loss = task.loss(student)
    loss(*task.rows(torch.arange(4))).backward()
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())


def test_distance_to_itself_is_nothing():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert float(distance(logits, logits, 3.0)) == pytest.approx(0.0, abs=1e-5)


def test_pieces_cover_all_rows_once():
    lengths = torch.tensor([3, 3, 3, 4, 9, 9, 30])
    for worth in (1, 9, 100):
        cut = pieces(lengths, worth)
        assert [i for part in cut for i in range(part.start, part.stop)] == list(range(7))
    assert pieces(lengths, 1) == [slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7)]


def test_batches_by_length_hold_every_row_once_and_keep_their_bound():
    rows = examples_of("sequence", 50)
    seen = torch.cat(list(rows.sorted_batches(60)))
    assert seen.sort().values.tolist() == list(range(50))
    assert all(len(w) == 1 or len(w) * int(rows.lengths[w].max()) <= 60 for w in rows.sorted_batches(60))


def test_labels_of_another_shape_are_refused():
    rows = examples_of("sequence")
    with pytest.raises(DataError, match="labels of"):
        Examples("token", rows.ids, rows.offsets, rows.labels)


def test_the_loop_learns_and_distils():
    model, rows = model_of("sequence"), examples_of("sequence", 24)
    options = Tune(method="dense", batch=8, steps=80, lr=3e-3, warmup=0.0, eval_every=0)
    log = train(model, dict(model.named_parameters()), EncoderTask(rows), options, 0, None, "")
    assert log.curve[-1]["loss"] < 0.5 * log.curve[0]["loss"]
    student = model_of("sequence", 9)
    log = train(student, dict(student.named_parameters()), EncoderTask(rows, Teacher(copy.deepcopy(model))), options, 0, None, "")
    assert log.curve[-1]["loss"] < 0.5 * log.curve[0]["loss"]


def test_what_is_pruned_does_not_count_in_the_norm():
    model, rows = model_of("sequence"), examples_of("sequence", 8)
    gone, seen = model.bert.encoder.layer[0].output.dense.weight, []

    class Pruner:
        restarts = ()

        def tensors(self):
            return {}

        def prune(self, step):
            self.hold()

        def observe(self, step):
            grads = [p.grad for p in model.parameters() if p is not gone and p.grad is not None]
            seen.append((float(torch.nn.utils.get_total_norm(grads)), float(gone.grad.norm())))

        def hold(self):
            with torch.no_grad():
                gone.zero_()
                if gone.grad is not None:
                    gone.grad.zero_()

    options = Tune(method="dense", batch=8, steps=1, lr=1e-3, warmup=0.0, eval_every=0)
    log = train(model, dict(model.named_parameters()), EncoderTask(rows), options, 0, None, "", pruner=Pruner())
    assert seen[0][1] > 0.01 * seen[0][0]
    assert log.curve[0]["grad_norm"] == pytest.approx(seen[0][0], rel=1e-6)


def weights_of(model):
    return {f"{n}.weight": m.weight for n, m in model.bert.encoder.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("named", [True, False])
def test_gradients_are_of_the_mean_task_loss(named):
    model, rows = model_of("sequence"), examples_of("sequence", 20)
    task, weights = EncoderTask(rows), weights_of(model)
    if not named:
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
    stream = Gradients(model, weights if named else None, task, 4, seed=3)
    found = [{n: w.grad.clone() for n, w in weights.items()} for _ in stream(3)]
    assert sum(p.grad is not None for p in model.parameters()) == len(weights)
    mean = task.loss(model)(*task.rows(stream.batches.windows(1))) / 4
    for (name, _), gradient in zip(weights.items(), torch.autograd.grad(mean, list(weights.values())), strict=True):
        torch.testing.assert_close(found[1][name], gradient)


def test_the_stream_continues_and_can_be_set_back():
    model, task = model_of("sequence"), EncoderTask(examples_of("sequence", 20))
    weights = weights_of(model)
    one = next(iter(weights.values()))
    stream = Gradients(model, weights, task, 4, seed=3)
    whole = [one.grad.clone() for _ in stream(4)]
    again = Gradients(model, weights, task, 4, seed=3)
    parts = [one.grad.clone() for _ in again(2)] + [one.grad.clone() for _ in again(2)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    again.position.copy_(torch.tensor(1))
    assert torch.equal(next(iter([one.grad.clone() for _ in again(1)])), whole[1])
