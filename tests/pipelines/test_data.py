"""Tokens: ends, windows, masks, chat templates, samples."""

import logging
from typing import Any

import pytest
import torch

from compressor.errors import DataError
from compressor.pipelines import data
from compressor.pipelines.data import IGNORE, Corpus, Document
from compressor.pipelines.shapes import documents


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def corpus(*docs: Document) -> Corpus:
    return Corpus.of("x", list(docs))


def test_text_is_one_stream_with_ends(tokenizer: Any, same_ends: Any, no_ends: Any) -> None:
    docs, (a, b) = corpus(Document("The ship"), Document("at dawn.")), ("The ship", "at dawn.")
    flat = [0, *ids_of(tokenizer, a), 1, 0, *ids_of(tokenizer, b), 1]
    made = data.windows(docs, tokenizer, 4)
    assert made.ids.dtype == made.labels.dtype == torch.int64
    assert made.ids.flatten().tolist() == flat[: len(flat) // 4 * 4] and torch.equal(made.ids, made.labels)
    assert data.token_stream(docs, same_ends).tolist() == [1, *ids_of(same_ends, a), 1, *ids_of(same_ends, b), 1]
    assert data.token_stream(docs, no_ends).tolist() == [*ids_of(no_ends, a), *ids_of(no_ends, b)]


def test_too_few_tokens(tokenizer: Any) -> None:
    for make in (lambda c: data.windows(c, tokenizer, 4096), lambda c: data.calibration(c, tokenizer, 4096, 1, 0)):
        with pytest.raises(DataError, match="tokens, too few for one window of 4096"):
            make(corpus(Document("a short text")))


def test_the_prompt_mask_is_exact(tokenizer: Any) -> None:
    prompt, reply = "Question: Why?\nAnswer:", " the harbour"
    made = data.windows(corpus(Document(reply, prompt)), tokenizer, 64)
    head, tail = [0, *ids_of(tokenizer, prompt)], [*ids_of(tokenizer, reply), 1]
    rest = 64 - len(head) - len(tail)
    assert made.ids.tolist() == [head + tail + [2] * rest]
    assert made.labels.tolist() == [[IGNORE] * len(head) + tail + [IGNORE] * rest]
    everything = data.windows(corpus(Document(reply, prompt)), tokenizer, 64, train_on_prompt=True)
    assert everything.labels.tolist() == [head + tail + [IGNORE] * rest]


def test_a_token_across_the_border_counts_as_completion(tokenizer: Any) -> None:
    joint = ids_of(tokenizer, "harbour")
    assert len(joint) < len(ids_of(tokenizer, "har")) + len(ids_of(tokenizer, "bour"))
    ((ids, labels),) = data.encode(corpus(Document("bour", "at har")), tokenizer)
    known = [0, *ids_of(tokenizer, "at")]
    assert ids[: len(known)] == known and labels[: len(known)] == [IGNORE] * len(known) and labels[-1] == 1
    assert labels[-2] == ids[-2] != IGNORE


def test_pairs_are_packed_whole_in_order(tokenizer: Any) -> None:
    docs = [Document(" dawn" * n, "The ship") for n in (1, 2, 6, 1, 3, 9, 1)]
    rows = [ids for ids, _ in data.encode(corpus(*docs), tokenizer)]
    seqlen = max(map(len, rows)) + 1
    made = data.windows(corpus(*docs), tokenizer, seqlen)
    flat = [i for row in made.ids.tolist() for i in row if i != 2]
    assert flat == [i for row in rows for i in row]
    assert all(row[0] == 0 for row in made.ids.tolist())  # every window begins with a whole pair
    assert (made.labels[made.ids == 2] == IGNORE).all() and (made.cut, made.dropped) == (0, 0)
    assert made.labels[made.labels != IGNORE].tolist() == [i for _, labels in data.encode(corpus(*docs), tokenizer) for i in labels if i != IGNORE]


def test_long_pairs_are_cut_and_hopeless_ones_dropped(tokenizer: Any) -> None:
    long, hopeless, short = Document(" dawn" * 40, "The ship"), Document(" dawn", "The ship " * 40), Document(" dawn", "The")
    made = data.windows(corpus(long, hopeless, short), tokenizer, 16)
    whole = next(data.encode(corpus(long), tokenizer))
    assert (made.cut, made.dropped, len(made)) == (2, 1, 2)
    assert made.ids[0].tolist() == whole[0][:16] and made.labels[0].tolist() == whole[1][:16]
    with pytest.raises(DataError, match="window of 16 tokens"):
        data.windows(corpus(hopeless), tokenizer, 16)


TALK = (("system", "Be brief."), ("user", "Hi"), ("assistant", "The ship left."), ("user", "When?"), ("assistant", "at dawn"))


def chat(*messages: tuple[str, str]) -> Corpus:
    return corpus(*documents([{"messages": [{"role": r, "content": c} for r, c in messages]}], "x"))


def test_chat_template_and_mask_of_every_assistant_turn(chat_tokenizer: Any) -> None:
    ((ids, labels),) = data.encode(chat(*TALK), chat_tokenizer)
    text = "".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in TALK)
    assert ids == ids_of(chat_tokenizer, text)  # complete: no BOS, no further EOS
    learned = [i for i in labels if i != IGNORE]
    assert learned == ids_of(chat_tokenizer, "The ship left.<|im_end|>\n") + ids_of(chat_tokenizer, "at dawn<|im_end|>\n")
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))


def test_chat_without_a_template(tokenizer: Any) -> None:
    ((ids, labels),) = data.encode(chat(*TALK), tokenizer)
    text = "System: Be brief.\n\nUser: Hi\n\nAssistant: The ship left.\n\nUser: When?\n\nAssistant: at dawn"
    assert ids == [0, *ids_of(tokenizer, text), 1]
    assert [i for i in labels if i != IGNORE] == [*ids_of(tokenizer, " The ship left."), *ids_of(tokenizer, " at dawn"), 1]


def test_templates_that_rewrite_earlier_turns_or_refuse(chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>"
    kept = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}" + turn + "{% endif %}{% endfor %}"
    monkeypatch.setattr(chat_tokenizer, "chat_template", kept + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}")
    ((_, labels),) = data.encode(chat(*TALK[1:]), chat_tokenizer)
    assert [i for i in labels if i != IGNORE] == ids_of(chat_tokenizer, "at dawn<|im_end|>")
    for template, words in (("{{ raise_exception('no system role') }}", "no system role"), ("nothing", "does not show")):
        monkeypatch.setattr(chat_tokenizer, "chat_template", template)
        with pytest.raises(DataError, match=words):
            data.windows(chat(*TALK), chat_tokenizer, 64)


def test_samples_follow_the_seed_and_calibration_sees_no_padding(tokenizer: Any) -> None:
    made = data.windows(corpus(Document("The ship left the harbour at dawn. " * 60)), tokenizer, 8)
    one, two, other = data.sample(made, 5, 1), data.sample(made, 5, 1), data.sample(made, 5, 2)
    assert one.ids.shape == (5, 8) and torch.equal(one.ids, two.ids) and not torch.equal(one.ids, other.ids)
    assert torch.equal(data.sample(made, 10**6, 3).ids, made.ids)
    pairs = corpus(*[Document(" dawn", "The ship " * n) for n in range(1, 9)])
    ids = data.calibration(pairs, tokenizer, 16, 100, 0)
    assert (data.windows(pairs, tokenizer, 32).ids == 2).any() and not (ids == 2).any()
    assert ids.flatten().tolist() == [i for row, _ in data.encode(pairs, tokenizer) for i in row][: ids.numel()]


def test_no_warning_about_long_texts(tokenizer: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], recwarn: Any) -> None:
    tokenizer.deprecation_warnings.clear()  # the library says it once
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        data.windows(corpus(Document("The ship " * 500)), tokenizer, 16)
        data.calibration(corpus(Document("a" * 500, "b" * 500)), tokenizer, 16, 2, 0)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records and "".join(capfd.readouterr()) == "" and not list(recwarn)
