"""Divergences against plain sums in float64, token by token; their statistics, error bars and floor."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor.errors import DataError, NumericError
from compressor.pipelines import evaluate
from compressor.pipelines.data import IGNORE
from compressor.pipelines.measure import divergence
from tests.tolerances import RELATIVE

CPU = torch.device("cpu")
CLOSE = RELATIVE[torch.float32]


def plain_kl(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)


@pytest.fixture(scope="module")
def other(model: Any) -> Any:
    """The model with every weight moved a little."""
    changed = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in changed.parameters():
            p += 0.05 * p.std() * torch.randn(p.shape, generator=noise)
    return changed


def rows_of(count: int, window: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 320, (count, window), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: Any, other: Any, rows: torch.Tensor, targets: torch.Tensor | None = None) -> dict[str, Any]:
    forwards = divergence.forward_of(model), divergence.forward_of(other)
    return divergence.compare(*forwards, rows, rows if targets is None else targets, CPU)


@given(st.integers(2, 40), st.integers(0, 2**31), st.floats(-6, 1), st.floats(0.1, 60))
@settings(max_examples=60, deadline=None)
def test_against_the_plain_sum(vocab: int, seed: int, apart: float, scale: float) -> None:
    """Near and far, sharp and flat: the float32 sum has the relative error of float32, where the plain one would drown in rounding."""
    noise = torch.Generator().manual_seed(seed)
    reference = scale * torch.randn(4, vocab, generator=noise)
    logits = reference + 10**apart * torch.randn(4, vocab, generator=noise)
    found, wanted = divergence.token_divergence(reference, logits), plain_kl(reference, logits)
    step = torch.finfo(torch.float32).eps * float(torch.cat([reference, logits]).abs().max())  # what log_softmax may be off by
    assert (found >= -1e-30).all()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2 * step * float((reference - logits).abs().max()) + 2 * step**2)


def test_tokens_without_probability() -> None:
    """What the reference excludes costs nothing by itself; a model that excludes what the reference expects is infinitely far."""
    p, q = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[0.5, 0.5, 0.0]])
    assert float(divergence.token_divergence(p, q)) == pytest.approx(float(plain_kl(p, q)), rel=CLOSE)
    both = torch.tensor([[0.5, 0.5, -math.inf]])
    assert float(divergence.token_divergence(p, both)) == pytest.approx(float(plain_kl(p[:, :2], both[:, :2])), rel=CLOSE)
    assert not math.isfinite(float(divergence.token_divergence(q, p)))


@torch.no_grad()
def test_statistics_against_a_plain_loop(model: Any, other: Any) -> None:
    rows = rows_of(7, 24)
    targets = torch.where(torch.rand(7, 24, generator=torch.Generator().manual_seed(2)) < 0.3, IGNORE, rows)
    found = run(model, other, rows, targets)
    kls, same, changes, counts = [], 0, [], []
    for row, wanted in zip(rows, targets, strict=True):
        p, q = (m(input_ids=row[None]).logits[0].double() for m in (model, other))
        at = [i for i in range(1, 24) if wanted[i] != IGNORE]
        kls.append([float(plain_kl(p[i - 1 : i], q[i - 1 : i])) for i in at])
        same += sum(int(p[i - 1].argmax() == q[i - 1].argmax()) for i in at)
        changes.append(sum(float(p.log_softmax(-1)[i - 1, row[i]] - q.log_softmax(-1)[i - 1, row[i]]) for i in at))
        counts.append(len(at))
    flat, total = sorted(kl for each in kls for kl in each), sum(counts)
    close = lambda value: pytest.approx(value, rel=1e-3)
    assert found["tokens"] == total and found["windows"] == 7 and found["top1"] == same / total
    assert found["mean"] == close(sum(flat) / total) and found["max"] == close(flat[-1])
    for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found[name] == close(flat[math.ceil(share * total) - 1]), name
    change = sum(changes) / total
    assert found["loss_change"] == close(change)
    assert found["loss_change"] == pytest.approx(math.log(found["perplexity"] / found["reference_perplexity"]), abs=1e-9)
    spread = sum((c - change * n) ** 2 for c, n in zip(changes, counts, strict=True))
    assert found["loss_change_stderr"] == close(math.sqrt(7 / 6 * spread) / total)
    assert found["stderr"] == close(math.sqrt(7 / 6 * sum((sum(k) - sum(flat) / total * len(k)) ** 2 for k in kls)) / total)


def test_losses_are_those_of_perplexity(model: Any, other: Any) -> None:
    ids = rows_of(1, 400)[0]
    for stride in (32, 8):
        found = run(model, other, *evaluate.cut(ids, None, 32, 0, stride))
        for key, each in (("reference_perplexity", model), ("perplexity", other)):
            alone = evaluate.perplexity(each, ids, 32, stride=stride)
            assert found[key] == pytest.approx(alone["perplexity"], rel=CLOSE) and found["tokens"] == alone["tokens"]


def test_batches_and_chunks_do_not_change_the_result(model: Any, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, steps = rows_of(9, 16), list[tuple[int, int]]()
    whole = run(model, other, rows)
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", 2 * 16 * 320 * 4)
    monkeypatch.setattr(evaluate, "CHUNK_BYTES", 7 * 320 * 4)
    with torch.no_grad():
        forwards = divergence.forward_of(model), divergence.forward_of(other)
        again = divergence.compare(*forwards, rows, rows, CPU, lambda *step: steps.append(step))
    assert steps == [(1, 9), (3, 9), (5, 9), (7, 9), (9, 9)]
    assert again == {key: pytest.approx(value, rel=1e-3) for key, value in whole.items()}


def test_one_window_has_no_error_bar(model: Any, other: Any) -> None:
    found = run(model, other, rows_of(1, 32))
    assert found["stderr"] is None and found["loss_change_stderr"] is None and found["mean"] > 0


@torch.no_grad()
def test_on_its_own_text_the_divergence_is_the_change_of_the_loss(model: Any, other: Any) -> None:
    """The mean of ln p - ln q over tokens drawn from p is KL(p || q): the two columns must agree within their error bars."""
    rows, noise = torch.zeros(96, 1, dtype=torch.int64), torch.Generator().manual_seed(3)
    for _ in range(24):
        p = model(input_ids=rows).logits[:, -1].softmax(-1)
        rows = torch.cat([rows, torch.multinomial(p, 1, generator=noise)], 1)
    found = run(model, other, rows)
    assert abs(found["mean"] - found["loss_change"]) < 4 * found["loss_change_stderr"]
    assert found["mean"] > 10 * found["stderr"]


def test_a_sample_remembers_what_the_model_was(model: Any, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(7, 24)
    labels = torch.where(torch.rand(7, 24, generator=torch.Generator().manual_seed(2)) < 0.3, IGNORE, rows)
    labels[1] = IGNORE  # a window that predicts nothing
    changing = copy.deepcopy(model).train()
    samples = divergence.Sample(changing, rows), divergence.Sample(changing, rows, labels)
    changing.load_state_dict(other.state_dict())
    assert samples[0].compare(changing) == run(model, other, rows) and changing.training
    wanted = run(model, other, rows, labels)
    for _ in range(2):  # it can be asked again
        found = samples[1].compare(changing)
        assert found == {key: pytest.approx(value, rel=1e-6) for key, value in wanted.items()}
    monkeypatch.setattr(divergence, "SAMPLE_LOGITS", 3 * 24 * 320 + 5)
    assert divergence.Sample(model, rows).compare(other) == {
        key: pytest.approx(value, rel=1e-6) for key, value in run(model, other, rows[:3]).items()
    }
    monkeypatch.setattr(divergence, "SAMPLE_LOGITS", 1)
    assert divergence.Sample(model, rows).compare(other)["windows"] == 1
    with pytest.raises(DataError, match="leaves nothing to predict"):
        divergence.Sample(model, rows, torch.full_like(rows, IGNORE))


def test_the_floor_is_far_below(model: Any, other: Any) -> None:
    rows = rows_of(6, 32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        found = divergence.floor(model, torch.float32, rows, rows)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert not any(module._forward_hooks for module in model.modules())
    order, rounding, real = found["order"], found["rounding"], run(model, other, rows)
    assert "bfloat16" in rounding["how"] and order["tokens"] == rounding["tokens"] == real["tokens"]
    assert 0 <= order["mean"] < 1e-9 and order["top1"] > 0.99
    assert 1e-7 < rounding["mean"] < real["mean"] / 10


@torch.no_grad()
def test_the_floor_of_rounding_is_near_that_of_a_16_bit_model(model: Any) -> None:
    """Rounded weights and outputs in place of 16-bit arithmetic: of the same size, rather less."""
    rows = rows_of(6, 32)
    half = copy.deepcopy(model).to(torch.bfloat16)
    real = run(model, half, rows)["mean"]
    assert real / 5 < divergence.floor(model, torch.bfloat16, rows, rows)["rounding"]["mean"] < 2 * real
    assert "float16" in divergence.floor(model, torch.float16, rows[:2], rows[:2])["rounding"]["how"]


@torch.no_grad()
def test_the_floor_of_a_model_that_computes_in_16_bits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, half = rows_of(4, 32), copy.deepcopy(model).to(torch.bfloat16)
    found = divergence.floor(half, torch.bfloat16, rows, rows)
    wanted = run(half, copy.deepcopy(half).float(), rows)
    assert found["rounding"]["how"] == "bfloat16 against the same weights in float32"
    assert found["rounding"]["mean"] == pytest.approx(wanted["mean"], rel=0.01)
    assert next(half.parameters()).dtype == torch.bfloat16

    def full(_model: nn.Module, _dtype: torch.dtype) -> divergence.Forward:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(divergence, "recomputed", full)
    assert "does not fit" in divergence.floor(half, torch.bfloat16, rows, rows)["rounding"]["missing"]


@torch.no_grad()
def test_what_cannot_be_compared(model: Any) -> None:
    rows = rows_of(2, 8)
    forward = divergence.forward_of(model)
    with pytest.raises(DataError, match="319 tokens, the reference for 320"):
        divergence.compare(forward, lambda ids: forward(ids)[..., :319], rows, rows, CPU)
    with pytest.raises(NumericError, match="not finite"):
        divergence.compare(forward, lambda ids: forward(ids) * math.nan, rows, rows, CPU)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantiles(values: list[float], share: float) -> None:
    found = divergence.quantile(torch.tensor(values, dtype=torch.float64), share)
    assert found in values and sum(v <= found for v in values) >= share * len(values) - 1e-6
    assert sum(v < found for v in values) < share * len(values)
