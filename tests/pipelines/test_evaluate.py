"""Perplexity against a plain computation, token by token, and everything a report says about it."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import DataError, NumericError
from compressor.pipelines import data, evaluate
from compressor.pipelines.data import IGNORE, Corpus, Document

SENTENCE = "The ship left the harbour at dawn. "


def ids_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plainly(model: Any, rows: list[list[int]], labels: list[list[int]] | None = None) -> tuple[float, int]:
    """(mean loss, predicted tokens): one window at a time, one token at a time, probabilities by softmax in float64."""
    losses = []
    for row, wanted in zip(rows, labels or rows, strict=True):
        p = torch.softmax(model(input_ids=torch.tensor([row])).logits[0].double(), -1)
        losses += [-math.log(float(p[i - 1, row[i]])) for i in range(1, len(row)) if wanted[i] != IGNORE]
    return sum(losses) / len(losses), len(losses)


def chunks(ids: torch.Tensor, window: int) -> list[list[int]]:
    return [ids[i : i + window].tolist() for i in range(0, len(ids) - window + 1, window)]


@pytest.mark.parametrize(("count", "window"), [(96, 16), (100, 16), (111, 16), (64, 64), (33, 2)])
def test_against_a_plain_computation(model: Any, count: int, window: int) -> None:
    ids = ids_of(count)
    loss, tokens = plainly(model, chunks(ids, window))
    found = evaluate.perplexity(model, ids, window)
    assert found["loss"] == pytest.approx(loss, rel=1e-6) and found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["tokens"] == tokens == (window - 1) * (count // window)
    assert (found["window"], found["stride"], found["windows"]) == (window, window, count // window)
    assert found["seconds"] > 0 and found["tokens_per_second"] == pytest.approx(tokens / found["seconds"])


def test_a_text_shorter_than_a_window_is_one_window(model: Any) -> None:
    ids = ids_of(10)
    found = evaluate.perplexity(model, ids, 64)
    assert found["loss"] == pytest.approx(plainly(model, [ids.tolist()])[0], rel=1e-6)
    assert (found["tokens"], found["window"], found["windows"]) == (9, 10, 1)


def test_max_tokens(model: Any) -> None:
    ids = ids_of(200)
    assert evaluate.perplexity(model, ids, 16, 50)["loss"] == pytest.approx(evaluate.perplexity(model, ids[:48], 16)["loss"], rel=1e-6)
    assert evaluate.perplexity(model, ids, 16, 0)["windows"] == 12
    assert evaluate.perplexity(model, ids, 64, 20)["window"] == 20
    rows = ids[:192].reshape(12, 16)
    assert evaluate.perplexity(model, rows, 16, 50)["windows"] == 3


def test_batches_do_not_change_the_result(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, seen = ids_of(16 * 40), []
    whole = evaluate.perplexity(model, ids, 16, progress=lambda done, count: seen.append((done, count)))
    assert seen == [(1, 40), (40, 40)]
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", 3 * 16 * 320 * 4)
    monkeypatch.setattr(evaluate, "CHUNK_BYTES", 7 * 320 * 4)
    sizes, forward = [], evaluate._logits
    monkeypatch.setattr(evaluate, "_logits", lambda m, x: sizes.append(len(x)) or forward(m, x))
    assert evaluate.perplexity(model, ids, 16)["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert sizes == [1, 1] + [3] * 13, "the first is the warm-up"


def test_masked_labels_do_not_count(model: Any) -> None:
    rows = ids_of(64).reshape(4, 16)
    labels = torch.where(torch.arange(64).reshape(4, 16) % 3 == 0, rows, IGNORE)
    found = evaluate.perplexity(model, rows, 16, labels=labels)
    loss, tokens = plainly(model, rows.tolist(), labels.tolist())
    assert found["loss"] == pytest.approx(loss, rel=1e-6) and found["tokens"] == tokens
    assert evaluate.perplexity(model, rows.flatten(), 16, labels=labels.flatten())["loss"] == found["loss"]


def test_nothing_to_predict_and_not_finite(model: Any, tokenizer: Any) -> None:
    for ids, labels in ((ids_of(1), None), (ids_of(0), None), (ids_of(8), torch.full((8,), IGNORE))):
        with pytest.raises(DataError, match="at least two tokens"):
            evaluate.perplexity(model, ids, 8, labels=labels)
    weight = model.lm_head.weight.data
    kept = weight.clone()
    try:
        weight[3] = float("nan")
        with pytest.raises(NumericError, match="not finite"):
            evaluate.perplexity(model, ids_of(64), 8)
        with pytest.raises(NumericError, match="^story: "):
            evaluate.measure(model, tokenizer, {"domain": Corpus.of("story", [Document(SENTENCE)])}, 8)
        weight.copy_(kept * 1e6)
        with pytest.raises(NumericError, match="no finite perplexity"):
            evaluate.perplexity(model, ids_of(64), 8)
    finally:
        weight.copy_(kept)


def test_the_model_is_left_as_it_was(model: Any) -> None:
    model.train()
    try:
        evaluate.perplexity(model, ids_of(32), 8)
        assert model.training and torch.is_grad_enabled()
    finally:
        model.eval()


def test_streams(tokenizer: Any, same_ends: Any, no_ends: Any) -> None:
    one, two = Corpus.of("x", [Document(SENTENCE)]), Corpus.of("x", [Document("The ship"), Document("at dawn")])
    ids = lambda tok, text: tok(text, add_special_tokens=False)["input_ids"]
    assert evaluate.stream(one, tokenizer).tolist() == tokenizer(SENTENCE, verbose=False)["input_ids"]
    assert evaluate.stream(two, tokenizer).tolist() == [0, *ids(tokenizer, "The ship"), 0, *ids(tokenizer, "at dawn")]
    assert evaluate.joining(two, tokenizer) == "<s> before each document"
    no_ends.eos_token = "</s>"
    try:
        assert evaluate.stream(two, no_ends).tolist() == [*ids(no_ends, "The ship"), 1, *ids(no_ends, "at dawn")]
        assert evaluate.joining(two, no_ends) == "</s> between documents"
    finally:
        no_ends.eos_token = None
    blank = ids(no_ends, "\n\n")
    assert evaluate.stream(two, no_ends).tolist() == [*ids(no_ends, "The ship"), *blank, *ids(no_ends, "at dawn")]
    pairs = Corpus.of("x", [Document("b", "a"), Document("d", "c")])
    assert evaluate.stream(pairs, same_ends).tolist() == data.token_stream(pairs, same_ends).tolist()


def test_one_text_gets_the_tokenizers_own_special_tokens(tokenizer: Any, adding: Any) -> None:
    one = Corpus.of("x", [Document(SENTENCE)])
    assert evaluate.stream(one, adding).tolist() == [0, *evaluate.stream(one, tokenizer).tolist()]


def test_measure_names_its_protocol(model: Any, tokenizer: Any) -> None:
    domain = Corpus.of("stories [test]", [Document(SENTENCE * 9), Document(SENTENCE)])
    outside = Corpus.of("questions", [Document(" at dawn", "When did the ship leave?"), Document(" dawn" * 40, "The"), Document("no", "The " * 40)])
    calls: list[tuple[str, int, int]] = []
    found = evaluate.measure(model, tokenizer, {"domain": domain, "outside": outside}, 32, 100, lambda *step: calls.append(step))
    assert found["domain"]["loss"] == evaluate.perplexity(model, evaluate.stream(domain, tokenizer), 32, 100)["loss"]
    packed = data.windows(outside, tokenizer, 32)
    loss, tokens = plainly(model, packed.ids[:3].tolist(), packed.labels[:3].tolist())
    assert found["outside"]["loss"] == pytest.approx(loss, rel=1e-6) and found["outside"]["tokens"] == tokens
    assert [c[0] for c in calls] == sorted(c[0] for c in calls) and all(c[1] <= c[2] for c in calls) and calls[-1][1] == calls[-1][2]
    assert found["protocol"]["domain"] == {
        "name": "stories [test]", "data_sha256": domain.sha256, "documents": 2, "bos": "<s> before each document", "counted": "all tokens",
        "window": 32, "stride": 32, "tokens": 93, "max_tokens": 100,
    }  # fmt: skip
    outside_protocol = found["protocol"]["outside"]
    assert (outside_protocol["counted"], outside_protocol["cut"], outside_protocol["dropped"]) == ("completions", 2, 1)


def test_samples_are_greedy_and_repeatable(model: Any, tokenizer: Any) -> None:
    prompts = ["The ship", "Question: Why?"]
    one, two = evaluate.generate_samples(model, tokenizer, prompts, 6), evaluate.generate_samples(model, tokenizer, prompts, 6)
    assert one == two and len(one) == 2 and all(isinstance(s, str) for s in one)
    ids = tokenizer(prompts[0])["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
    assert one[0] == tokenizer.decode(ids[len(tokenizer(prompts[0])["input_ids"]) :], skip_special_tokens=True)
    with pytest.raises(DataError, match="no tokens"):
        evaluate.generate_samples(model, tokenizer, [""], 2)


def test_prompts_come_from_the_documents(tokenizer: Any) -> None:
    text = Corpus.of("x", [Document(f"{i}: {SENTENCE}") for i in range(9)])
    found = evaluate.prompts(text, tokenizer, 3, 6)
    assert [p[:2] for p in found] == ["0:", "3:", "6:"] and all(SENTENCE.startswith(p[3:]) for p in found)
    pairs = Corpus.of("x", [Document("b", "a"), Document("d", "c")])
    assert evaluate.prompts(pairs, tokenizer) == ["a", "c"]
    assert evaluate.prompts(Corpus.of("x", [Document("\n\n" + SENTENCE)]), tokenizer)[0].strip()


def test_quiet(model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, recwarn: Any) -> None:
    """No warning about long texts, nor about sampling flags that a model folder brings along."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    config, kept = model.generation_config, (model.generation_config.temperature, model.generation_config.top_p)
    config.temperature, config.top_p, config.do_sample = 0.6, 0.9, True
    try:
        evaluate.measure(model, tokenizer, {"one": Corpus.of("x", [Document(SENTENCE * 50)])}, 16)
        evaluate.generate_samples(model, tokenizer, [SENTENCE * 5], 3)
    finally:
        logger.removeHandler(caplog.handler)
        (config.temperature, config.top_p), config.do_sample = kept, False
    assert "".join(capfd.readouterr()) == "" and not caplog.records and not list(recwarn)


def test_shared_story_text(model: Any, tokenizer: Any) -> None:
    path = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tinystories"
    if not path.exists():
        pytest.skip("tinystories is not in ../shared/data beside this checkout")
    corpus = data.load(str(path)).test
    found = evaluate.measure(model, tokenizer, {"domain": corpus}, 128, 2048)
    rows = chunks(evaluate.stream(corpus, tokenizer)[:2048], 128)
    assert found["domain"]["loss"] == pytest.approx(plainly(model, rows)[0], rel=1e-6) and found["domain"]["tokens"] == 16 * 127
