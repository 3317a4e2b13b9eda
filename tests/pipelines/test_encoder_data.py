"""Files -> labelled examples -> tokens: columns, parts, labels, alignment of tags, windows of contexts, and sentences for bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import DataError, ModelError, RecipeError, UserError
from compressor.pipelines import encoder_data, encoder_load
from compressor.pipelines.encoder_data import Labelled, Question, Tagged, load, load_test
from compressor.pipelines.encoder_eval import entities, measure, overlap, text_of
from compressor.pipelines.encoder_tokens import encode
from tests.pipelines import encoders

ROWS = [("a fine film", "1"), ("a dull plot", "0")] * 10


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return encoders.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_tenth_example_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    rows = [(f"film {i} fine", str(i % 2)) for i in range(40)]
    task = load(str(encoders.write_tsv(tmp_path / "train.tsv", rows)))
    assert (task.kind, task.labels, len(task.train), len(task.test)) == ("sequence", ("0", "1"), 36, 4)
    assert [e.text for e in task.test] == [f"film {i} fine" for i in (9, 19, 29, 39)]
    assert "one in 10 of 40" in task.rule


def test_a_folder_keeps_its_parts_and_repeats_are_left_out(tmp_path: Path) -> None:
    encoders.write_tsv(tmp_path / "train.tsv", [*ROWS, ("only here", "1")])
    encoders.write_tsv(tmp_path / "dev.tsv", [("a fine film", "1")])
    encoders.write_tsv(tmp_path / "test.tsv", [("without label",)], header="sentence")
    task = load(str(tmp_path))
    assert [e.text for e in task.test] == ["a fine film"]
    assert len(task.train) == 11
    assert "left out of training because they are in the test part too: 10" in task.rule
    assert load_test(str(tmp_path)).test == task.test


def test_a_file_is_measured_on_what_a_run_would_hold_out_of_it(tmp_path: Path) -> None:
    rows = [(f"film {i} fine", str(i % 2)) for i in range(40)]
    made = str(encoders.write_tsv(tmp_path / "train.tsv", rows))
    found = load_test(made)
    assert found.test == load(made).test
    assert found.rule == "one in 10 of 40 examples held out"
    whole = load_test(str(encoders.write_tsv(tmp_path / "dev.tsv", rows)))
    assert (len(whole.test), whole.rule) == (40, "all of the source")


def test_parts_are_told_by_how_their_names_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(word: str, label: int | None = None) -> list[dict[str, Any]]:
        return [{"premise": f"{word} {i}", "hypothesis": "b", "label": i % 2 if label is None else label} for i in range(20)]

    parts = {"train": rows("t"), "validation_mismatched": rows("no"), "validation_matched": rows("yes"), "test_matched": rows("x", -1)}
    monkeypatch.setattr(encoder_data, "tables", lambda source: (source, parts))
    assert {e.text.split()[0] for e in load("mnli").test} == {"yes"}
    assert load_test("mnli").rule == "validation_matched part of the source"


def test_whole_numbers_only_are_numbers() -> None:
    assert [encoder_data._whole(name) for name in ("-1", "10", "--1", "-", "")] == [True, True, False, False, False]


def test_spaces_around_an_answer_are_no_part_of_it(tmp_path: Path, tokenizer: Any) -> None:
    row = {"question": "where ?", "context": "the film was rome .", "answers": {"text": [" rome "], "answer_start": [12]}}
    asked = load_test(str(lines(tmp_path / "a.jsonl", [row]))).test
    assert (asked[0].answers, asked[0].starts) == (("rome",), (13,))
    assert encode(asked, tokenizer, {}, 24).rows.labels[0].tolist() != [0, 0]


@pytest.mark.parametrize("columns", encoder_data.PAIRS)
def test_pairs(tmp_path: Path, columns: tuple[str, str]) -> None:
    rows = [{columns[0]: f"one {i}", columns[1]: "two", "label": ["no", "yes"][i % 2], "idx": i} for i in range(20)]
    task = load(str(lines(tmp_path / "pairs.jsonl", rows)))
    assert task.labels == ("no", "yes")
    assert task.train[0] == Labelled("one 0", "no", "two")


def test_labels_are_sorted_numbers_by_value(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": i % 12} for i in range(60)]
    assert load(str(lines(tmp_path / "a.jsonl", rows))).labels == tuple(map(str, range(12)))


def test_words_and_tags_as_json_and_as_conll(tmp_path: Path) -> None:
    rows = [{"tokens": ["paris", "was", f"a{i}"], "ner_tags": ["B-LOC", "O", "O"]} for i in range(20)]
    task = load(str(lines(tmp_path / "a.jsonl", rows)))
    assert (task.kind, task.labels) == ("token", ("B-LOC", "O"))
    text = "-DOCSTART- -X- O\n\n" + "\n\n".join(f"paris NNP B-LOC\nwas VBD O\na{i} DT O" for i in range(20)) + "\n"
    (tmp_path / "b.conll").write_text(text)
    assert load(str(tmp_path / "b.conll")).train == task.train
    (tmp_path / "b.conll").write_text("paris\n\nwas O\n")
    with pytest.raises(DataError, match="without a tag"):
        load(str(tmp_path / "b.conll"))


def test_squad_and_its_rows_as_lines_are_the_same(tmp_path: Path) -> None:
    context = "the story of paris ."
    answers = [{"text": "paris", "answer_start": 13}]
    asked = [f"where was it {i} ?" for i in range(20)]
    squad = {
        "version": "1.1",
        "data": [{"title": "t", "paragraphs": [{"context": context, "qas": [{"question": q, "answers": answers} for q in asked]}]}],
    }
    (tmp_path / "train.json").write_text(json.dumps(squad))
    task = load(str(tmp_path / "train.json"))
    assert (task.kind, task.labels, len(task.train)) == ("question", (), 18)
    rows = [{"question": q, "context": context, "answers": {"text": ["paris"], "answer_start": [13]}} for q in asked]
    assert load(str(lines(tmp_path / "b.jsonl", rows))).train == task.train


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.tsv", "sentence\tlabel\na\t0.5\nb\t1.25\n" * 1, "too few|regression"),
        ("a.tsv", "sentence\tlabel\n" + "\n".join(f"a{i}\t{i / 7:.3f}" for i in range(40)), "regression"),
        ("a.tsv", "sentence\tlabel\n" + "\n".join(f"a{i}\tyes" for i in range(40)), "only the label 'yes'"),
        ("a.tsv", "sentence\tscore\n" + "\n".join(f"a{i}\t1" for i in range(40)), "sentence, score"),
        ("a.jsonl", "\n".join(json.dumps({"tokens": ["a", "b"], "tags": ["O"]}) for _ in range(20)), "2 words and 1 tags"),
        ("a.jsonl", '{"question": "q", "context": "abc", "answers": [{"text": "x", "answer_start": 1}]}\n' * 20, "does not say"),
        ("a.jsonl", "\n".join(['{"text": "a", "label": 1}', '{"other": 1}'] * 10), "not like the first"),
        ("a.jsonl", "\n".join(['{"text": "a", "label": null}'] * 20), "no label"),
        ("a.jsonl", "\n".join(['{"text": "a", "label": 1}', '{"text": null, "label": 0}'] * 10), "example 2 has null"),
        ("a.jsonl", "\n".join(['{"tokens": ["a", null], "tags": ["O", "O"]}'] * 20), "example 1 has null"),
        ("a.jsonl", '{"question": null, "context": "abc", "answers": []}\n' * 20, "example 1 has null"),
        ("a.jsonl", "\n".join(['{"text1": "a", "text2": "b", "label": 1}', '{"text": "a", "label": 0}'] * 10), "example 2, .*it has no text1"),
        ("a.jsonl", "\n".join(['{"text": "a", "label": 0}', '{"text1": "a", "text2": "b", "label": 1}'] * 10), "example 2, .*it has no text"),
        ("a.json", json.dumps({"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "b"}]}]}]}), "has no answers"),
        ("a.jsonl", "[1]\n[2]", "list where rows"),
        ("a.tsv", "sentence\tlabel\n", "no examples"),
    ],
)  # fmt: skip
def test_bad_data_is_one_sentence(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence) as error:
        load(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_no_data_at_all_says_what_to_give() -> None:
    for source in (None, "python"):
        with pytest.raises(DataError, match="--data"):
            load(source)


def test_a_label_that_only_the_test_part_has_is_an_error(tmp_path: Path) -> None:
    encoders.write_tsv(tmp_path / "train.tsv", ROWS)
    encoders.write_tsv(tmp_path / "dev.tsv", [("other", "2")])
    with pytest.raises(DataError, match="'2' is only in the test part"):
        load(str(tmp_path))


# Tokens.


def test_texts_and_pairs_become_rows_with_types(tokenizer: Any) -> None:
    rows = encode([Labelled("the film", "b", "was fine"), Labelled("a", "a", "plot of it")], tokenizer, {"a": 0, "b": 1}, 32).rows
    ids, mask, types, labels = rows.padded(torch.tensor([0, 1]))
    assert tokenizer.decode(ids[0][mask[0].bool()]) == "[CLS] the film [SEP] was fine [SEP]"
    assert types[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert labels.tolist() == [1, 0]
    assert ids.shape == (2, 7)
    assert rows.types is not None


def test_long_texts_are_cut_and_counted(tokenizer: Any) -> None:
    found = encode([Labelled("the film " * 20, "a"), Labelled("fine", "a"), Labelled("the film " * 7, "a")], tokenizer, {"a": 0}, 16)
    assert found.rows.lengths.tolist() == [16, 3, 16]
    assert found.cut == 1


def test_the_first_piece_of_a_word_carries_its_tag(tokenizer: Any) -> None:
    found = encode([Tagged(("goodly", "films", "was"), ("A", "B", "A"))], tokenizer, {"A": 0, "B": 1}, 32)
    pieces = tokenizer.convert_ids_to_tokens(found.rows.ids.tolist())
    assert pieces == ["[CLS]", "good", "##ly", "film", "##s", "was", "[SEP]"]
    assert found.rows.labels.tolist() == [-100, 0, -100, 1, -100, 0, -100]


def test_an_unknown_label_names_the_models(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="'c' is none of the model's: a"):
        encode([Labelled("fine", "c")], tokenizer, {"a": 0}, 16)


def test_windows_of_a_context_point_at_the_answer_or_at_the_start(tokenizer: Any) -> None:
    context = "the film was a story of it and paris . " * 3 + "rome ."
    question = Question("where was it ?", context, ("rome",), (context.index("rome"),))
    found = encode([question], tokenizer, {}, 24)
    assert len(found.rows) > 2
    assert found.owner == [0] * len(found.rows)
    assert found.places is not None
    hits = 0
    for i, (first, last) in enumerate(found.rows.labels.tolist()):
        begin = int(found.rows.offsets[i])
        if first:
            a, b = found.places[begin + first, 0], found.places[begin + last, 1]
            assert context[a:b] == "rome"
            hits += 1
        else:
            assert last == 0
    assert hits >= 1


def test_short_rows_leave_room_for_a_context(tokenizer: Any) -> None:
    question = Question("where was the film of it ?", "the film was a story of it and paris . " * 3, (), ())
    assert len(encode([question], tokenizer, {}, 16).rows) > 2
    assert len(encode([question], tokenizer, {}, 8).rows) > 2
    with pytest.raises(RecipeError, match="at least 16"):
        encode([question], tokenizer, {}, 5)
    with pytest.raises(RecipeError, match="at least 16"):
        encoder_load.max_length({}, "question", 15)
    assert encoder_load.max_length({}, "sequence", 15) == 15


def test_a_slow_tokenizer_cannot_align(tokenizer: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        encode([Tagged(("a",), ("O",))], Slow(), {"O": 0}, 16)


# Measures.


def test_entities_follow_conlleval() -> None:
    assert entities(["B-LOC", "I-LOC", "O", "I-PER", "B-PER", "I-LOC"]) == {(0, 1, "LOC"), (3, 3, "PER"), (4, 4, "PER"), (5, 5, "LOC")}
    assert entities(["O"]) == set()


def test_answers_are_compared_as_squad_does() -> None:
    assert text_of("The  Cat, sat!") == "cat sat"
    assert overlap("the cat sat", "a cat") == pytest.approx(2 * 1 / 3)
    assert overlap("", "") == 1.0
    assert overlap("", "cat") == 0.0


class Answers(torch.nn.Module):
    """Stands for a model of questions: every token whose id is `wanted` is first and last of an answer."""

    def __init__(self, wanted: int):
        super().__init__()
        self.wanted, self.weight = wanted, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
        scores = (input_ids == self.wanted).float() * 5
        return type("Out", (), {"start_logits": scores, "end_logits": scores})()


def test_the_best_span_over_all_windows_is_the_answer(tokenizer: Any) -> None:
    context = "the film was a story of it and paris . " * 2 + "rome ."
    asked = [Question("where ?", context, ("rome",), (context.index("rome"),)), Question("who ?", "the actor was rome .", ("actor",), (4,))]
    found = encode(asked, tokenizer, {}, 20)
    scores = measure(Answers(tokenizer.convert_tokens_to_ids("rome")), found, asked, {})
    assert scores["exact_match"] == 50.0
    assert scores["f1"] == 50.0


class Constant(torch.nn.Module):
    """Always class 1 of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
        shape = input_ids.shape if getattr(self, "words", False) else input_ids.shape[:1]
        return type("Out", (), {"logits": torch.tensor([0.0, 1.0]).expand(*shape, 2)})()


def test_accuracy_and_macro_f1_by_hand(tokenizer: Any) -> None:
    examples = [Labelled("fine", "b"), Labelled("the film", "b"), Labelled("bad film it", "a")]
    found = measure(Constant(), encode(examples, tokenizer, {"a": 0, "b": 1}, 16), examples, {0: "a", 1: "b"})
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((0 + 2 * 2 / 5) / 2)


def test_entities_of_tokens_are_counted_row_by_row(tokenizer: Any) -> None:
    model = Constant()
    model.words = True
    examples = [Tagged(("paris", "was"), ("B-LOC", "O")), Tagged(("rome", "films", "was"), ("B-LOC", "B-LOC", "O"))]
    found = measure(model, encode(examples, tokenizer, {"O": 0, "B-LOC": 1}, 16), examples, {0: "O", 1: "B-LOC"})
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["entity_f1"] == pytest.approx(2 * 3 / (5 + 3))


# Classes.


def task_of(labels: tuple[str, ...]) -> encoder_data.Task:
    return encoder_data.Task("d", "sequence", [], [], labels, "")


def test_classes_come_from_names_numbers_or_order() -> None:
    named = {"id2label": {"0": "NEGATIVE", "1": "POSITIVE"}}
    assert encoder_load.classes_of(named, task_of(("negative", "positive"))) == {"negative": 0, "positive": 1}
    assert encoder_load.classes_of(named, task_of(("0", "1"))) == {"0": 0, "1": 1}
    assert encoder_load.classes_of({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, task_of(("no", "yes"))) == {"no": 0, "yes": 1}
    assert encoder_load.classes_of({"id2label": {"0": "Yes", "1": "yes"}}, task_of(("Yes", "yes"))) == {"Yes": 0, "yes": 1}
    with pytest.raises(DataError, match="NEGATIVE"):
        encoder_load.classes_of(named, task_of(("no", "yes")))


def test_two_labels_of_the_data_are_never_one_class() -> None:
    named = {"id2label": {"0": "no", "1": "yes"}}
    for labels in (("Yes", "yes"), ("01", "1")):
        with pytest.raises(DataError, match="one class of the model"):
            encoder_load.classes_of(named, task_of(labels))


def test_names_that_are_numbers_are_not_counted() -> None:
    with pytest.raises(DataError, match="give data of its task"):
        encoder_load.classes_of({"id2label": {"0": "1", "1": "2", "2": "3"}}, task_of(("0", "1")))


@pytest.mark.parametrize("names", [5, ["a", "b"], {"a": "b"}])
def test_a_damaged_configuration_is_one_sentence(names: Any) -> None:
    with pytest.raises(ModelError, match="id2label in config"):
        encoder_load.task_of({"architectures": ["BertForSequenceClassification"], "id2label": names})
    assert encoder_load.task_of({"architectures": []}) is None
    assert not encoder_load.is_encoder({"model_type": "bert", "architectures": 5})
