"""Task files: every shape becomes the questions it means, and whatever is wrong is an error that names file and row."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import CompressorError, DataError, RecipeError
from compressor.pipelines.measure import task_files
from compressor.pipelines.shapes import documents

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
BOOL = {"instruction": "Is it so?\n\nAnswer format: true/false", "input": "", "output": "the correct answer is false", "answer": "false"}
PLAIN = {"question": "What is blue?", "choices": ["grass", "the sky", "coal"], "answer": 1}


def write(folder: Path, rows: list[Any], name: str = "t.jsonl") -> Path:
    path = folder / name
    text = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows)
    path.write_text(text, "utf-8")
    return path


def read(folder: Path, *rows: Any) -> task_files.TaskFile:
    return task_files.read(write(folder, list(rows)))


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_an_instruction_is_asked_as_it_was_learned(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, [BOOL, BOOL | {"output": "the correct answer is true", "answer": "true"}], name)
    file = task_files.read(path)
    assert (file.shape, file.choice, file.join) == ("instruction", True, "")
    assert file.rows[0]["text"] == documents([BOOL], "x")[0].prompt
    assert file.rows[0]["choices"] == ["the correct answer is true", "the correct answer is false"]
    assert [row["gold"] for row in file.rows] == [1, 0]
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.rows[0]["text"] + file.rows[0]["choices"][1] == documents([BOOL], "x")[0].prompt + documents([BOOL], "x")[0].text


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        (PLAIN, 1),
        (PLAIN | {"answer": "the sky"}, 1),
        (PLAIN | {"answer": "C"}, 2),
        ({"ctx": "Blue is", "endings": ["grass", "the sky", "coal"], "label": "1"}, 1),
        ({"query": "Blue is ", "options": ["grass", " the sky", "coal"], "gold": 0}, 0),
        ({"question": "?", "choices": {"text": ["grass", "the sky", "coal"], "label": ["A", "B", "C"]}, "answerKey": "B"}, 1),
        ({"question": "?", "choices": {"text": ["grass", "the sky", "coal"], "label": ["1", "2", "3"]}, "answerKey": "3"}, 2),
        ({"question": "?", "choices": {"text": ["grass", "the sky", "coal"], "label": ["0", "1", "2"]}, "answerKey": "2"}, 2),
        ({"prompt": "?", "choices": ["3", "1", "2"], "answer": "1"}, 1),
        ({"prompt": "?", "choices": [3, 1, 2], "answer": 1}, 1),
    ],
)
def test_choices(tmp_path: Path, row: dict, gold: int) -> None:
    file = read(tmp_path, row)
    assert (file.shape, file.join, file.rows[0]["gold"]) == ("choices", " ", gold)
    assert len(file.rows[0]["choices"]) == 3 and not file.rows[0]["text"].endswith(" ")
    assert all(c == c.strip() for c in file.rows[0]["choices"])


def test_templates(tmp_path: Path) -> None:
    asked = [{"question": "a?", "answer": "x"}, {"question": "a?", "context": "c", "answer": "x"}, {"prompt": "a \n", "answer": "x"}]
    assert [task_files.read(write(tmp_path, [row])).rows[0]["text"] for row in asked] == ["Question: a?\nAnswer:", "c\nQuestion: a?\nAnswer:", "a"]
    file = read(tmp_path, {"question": "is it so", "passage": "It is.", "answer": True}, {"question": "is it?", "passage": "No.", "answer": False})
    assert file.shape == "yes or no" and [row["gold"] for row in file.rows] == [1, 0]
    assert file.rows[0]["text"] == "It is.\nQuestion: is it so?\nAnswer:" and file.rows[0]["choices"] == ["no", "yes"]


def test_answers_to_be_written(tmp_path: Path) -> None:
    file = read(tmp_path, {"question": "1+1?", "answer": "1 and 1 is 2.\n#### 2"}, {"question": "2+2?", "answer": "4"})
    assert file.shape == "match" and file.worked and not file.choice
    assert [row["answers"] for row in file.rows] == [["2"], ["4"]] and file.rows[0]["target"].endswith("#### 2")
    file = read(tmp_path, {"prompt": "Capital?", "answer": ["Paris", "paris city"]})
    assert not file.worked and file.rows[0]["answers"] == ["Paris", "paris city"]
    file = read(tmp_path, {"instruction": "1+1?", "output": "It is 2.", "answer": 2})
    assert file.shape == "instruction, match" and file.worked and file.rows[0]["answers"] == ["2", "It is 2."]


@pytest.mark.parametrize(
    ("written", "answers", "worked", "right"),
    [
        (" Paris.", ["paris"], False, True),
        (" Paris is big", ["paris"], False, False),
        (" 1,000", ["1000"], False, True),
        (" $7.50", ["7.5"], False, True),
        (" so 3 + 4 = 7\n#### 7\nand 9", ["7"], True, True),
        (" so 3 + 4 = 7", ["7"], True, True),
        ("#### 5\nQ: next\nA: 3+3\n#### 6", ["5"], True, True),
        ("#### 5\nQ: next\nA: 3+3\n#### 6", ["6"], True, False),
        ("#### none", ["7"], True, False),
        (" pages 10-12", ["12"], False, True),
        (" pages 10-12", ["-12"], False, False),
        (" so x = -12", ["-12"], True, True),
        (" it loses -$12", ["-12"], True, True),
        (" so 7 = 3 + 4", ["7"], True, False),
        (" -3", ["3"], False, False),
        ("", ["7"], True, False),
        ("", ["x"], False, False),
        ("", ["?"], False, False),
        ("\n ?\nmore", ["?"], False, True),
    ],
)
def test_matches(written: str, answers: list[str], worked: bool, right: bool) -> None:
    assert task_files.matches(written, answers, worked) is right


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (PLAIN | {"answer": 3}, "t.jsonl row 2: answer '3' is no place, text or letter of its 3 choices"),
        (PLAIN | {"answer": -1}, "row 2: answer '-1' is no place"),
        (PLAIN | {"answer": True}, "row 2: answer 'True' is no place"),
        (PLAIN | {"choices": ["a", "a"]}, "row 2 has the same choice twice"),
        (PLAIN | {"choices": ["a", " "]}, "row 2: choices is blank"),
        (PLAIN | {"choices": ["a"]}, "row 2: 'choices' must be a list of two or more"),
        (PLAIN | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "row 2: 'choices' needs as many labels"),
        ({"question": "?", "choices": ["a", "b"]}, "row 2 lacks its answer"),
        ({"choices": ["a", "b"], "answer": 0}, "row 2 lacks what is asked"),
        (PLAIN | {"question": "a\ud800"}, "row 2: question holds half a character"),
        (PLAIN | {"question": ["a"]}, "row 2: question holds a list"),
        ({"question": "?", "answer": "4"}, "row 2 has the shape 'match', row 1 the shape 'choices'"),
        ({"story": "a"}, "row 2 has the columns story, which make no question"),
        ("words", "row 2 holds a str where a row"),
    ],
)
def test_errors_name_file_and_row(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(DataError, match="(?s)" + said.replace("?", r"\?")):
        read(tmp_path, PLAIN, row)


def test_an_answer_that_is_no_number(tmp_path: Path) -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(DataError, match=f"row 1: answer holds {value}, which is no number"):
            read(tmp_path, {"question": "a?", "answer": value})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": "maybe"}, "the answer 'maybe' is none of those of its answer format, true/false"),
        ({"output": "no idea"}, "the output must end in the answer 'false'"),
        ({"instruction": "Answer format: x"}, "none of those of its answer format, x"),
        ({"input": {}, "context": {"a": 1}}, "context holds a dict"),
    ],
)
def test_damaged_instructions(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, BOOL | changes)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[1", '{"a": ' * 5000, "1" * 5000, '{"question": "a"}\n{'])
def test_damaged_files(tmp_path: Path, text: str) -> None:
    for name in ("t.json", "t.jsonl"):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=name):
            task_files.read(tmp_path / name)


def test_names(tmp_path: Path) -> None:
    assert all(map(task_files.is_file, ("a.jsonl", "A.JSON", "./x", "/x", "~/x")))
    assert not any(map(task_files.is_file, ("arc_easy", "mmlu", "boolq")))
    for name in (str(tmp_path / "none.jsonl"), "a\0.json", "x" * 5000 + ".json"):
        with pytest.raises(RecipeError, match="there is no task file"):
            task_files.find(name)
    with pytest.raises(RecipeError, match="must end in .jsonl or .json"):
        task_files.find("./notes.txt")


def test_examples_come_from_the_train_file_beside(tmp_path: Path) -> None:
    test, train, other = write(tmp_path, [PLAIN], "my_test.jsonl"), tmp_path / "my_train.json", PLAIN | {"question": "What is red?"}
    (train).write_text(json.dumps([other, PLAIN, PLAIN | {"choices": PLAIN["choices"][::-1]}, other]))
    asked = task_files.read(test)
    shown = task_files.examples(test, asked, 2)
    assert [row["text"] for row in shown.rows] == ["Question: What is red?\nAnswer:"] * 2, "what is asked is not shown, in whatever order"
    assert shown.sha256 == hashlib.sha256(train.read_bytes()).hexdigest()
    with pytest.raises(RecipeError, match="shots=3 is more than the 2 examples of my_train.json that are not asked"):
        task_files.examples(test, asked, 3)
    with pytest.raises(DataError, match="examples must look like the questions"):
        task_files.examples(test, replace(asked, shape="match"), 1)
    train.unlink()
    with pytest.raises(RecipeError, match="give my_train.jsonl beside it, or shots=0"):
        task_files.examples(test, asked, 1)
    with pytest.raises(RecipeError, match="'latest.json' has none; give a file whose name has 'test' in it"):
        task_files.examples(tmp_path / "latest.json", asked, 1)


KEYS = st.sampled_from(
    ["question", "prompt", "query", "context", "ctx", "passage", "choices", "options", "endings", "answer", "label", "gold", "answerKey",
     "instruction", "input", "output", "text", "a"]
)  # fmt: skip
TEXTS = st.text(max_size=8) | st.sampled_from(["A", "B", "1", "0", "x Answer format: A/B", "the correct answer is A", "#### 7", "\ud800", " "])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | TEXTS,
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(["text", "label"]), v),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=6) | VALUES, min_size=1, max_size=3))
def test_random_rows_give_questions_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "random.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        file = task_files.read(path)
    except CompressorError as error:
        assert "random.jsonl" in str(error)
        return
    for row in file.rows:
        assert row["text"].strip()
        if file.choice:
            assert 0 <= row["gold"] < len(set(row["choices"])) == len(row["choices"])
        else:
            assert row["target"].strip() and task_files.matches(row["answers"][0].split("####")[-1], row["answers"], file.worked)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared")
@pytest.mark.parametrize(("name", "options"), [("boolq", {2}), ("arc_easy", {3, 4, 5})])
def test_the_shared_files(name: str, options: set[int]) -> None:
    file = task_files.read(SHARED / name / "test.json")
    assert file.shape == "instruction" and {len(row["choices"]) for row in file.rows} <= options
    assert len(task_files.examples(SHARED / name / "test.json", file, 5).rows) > 1000
