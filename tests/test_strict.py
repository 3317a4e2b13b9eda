"""JSON and regular expressions of strangers: what is taken, and the sentence of what is not."""

import json
import os
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor import strict
from compressor.errors import LONGEST, ModelError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nests deeper"),
        ("[" * 80 + "]" * 80, "nests deeper"),
        ('{"a": 1, "a": 2}', "names 'a' twice"),
        ("1" * 5000, "number of 5000 digits"),
        ("[1,]", "Expecting value"),
        (b"\xff", "invalid start byte"),
    ],
)
def test_json_that_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        strict.parse(text)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(VALUES)
def test_json_that_is_taken_is_the_value(value: object) -> None:
    assert strict.parse(json.dumps(value)) == value


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.binary(max_size=60) | st.text(max_size=60))
def test_whatever_is_no_json_is_a_value_error(content: bytes | str) -> None:
    try:
        strict.parse(content)
    except ValueError as error:
        assert str(error)


def test_numbers_that_are_none_may_count_as_null() -> None:
    assert strict.parse('[NaN, -Infinity, {"a": NaN}]', blank=True) == [None, None, {"a": None}]


def test_files_that_are_too_large_or_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(3 << 30)  # a hole
    with pytest.raises(ValueError, match="larger than"):
        strict.read(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        strict.read(tmp_path / "pipe")


def test_values_that_are_written_once_and_meant_often_are_counted() -> None:
    row: list[object] = [1]
    for _ in range(40):
        row = [row, row]  # 2**40 values in 40 lists
    with pytest.raises(ValueError, match="more than 1000 values"):
        strict.bounded(row, 1000)
    round_: list[object] = []
    round_.append(round_)
    with pytest.raises(ValueError, match="nests deeper"):
        strict.bounded(round_, 1000)


@pytest.mark.parametrize("pattern", [
    "(a+)+$", "(.*)*x", "(a|a)*b", ".*" * 6, ".?" * 9, r"(a)\1", "(a|.)" * 6, "(?:a{2,5}){30}", "a" * 2000,
    "(?x)(a+) +$", "(?x:(a+) +)$", "(?ix)(a+) +$", "(?i-x:a)", "(?x)a", "(?sxm:(a+)#\n+)", r"\[?(a+)+!]", r"\[(a+)+]", r"[\]](a+)+[\]]",
    r"\\\[?(a+)+]", "(?#[)(a+)+!(?#])", "(?x)#[\n(a+)+!#]",
])  # fmt: skip
def test_patterns_that_could_take_for_ever(pattern: str) -> None:
    assert strict.tame(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.mlp\.(gate|up|down)_proj$", r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj", r".*\.layers\.\d+\..*\.experts\.\d+\..*", "lm_head",
        r"^(?!.*(foo)).*$", r"^model\.layers\.0\.mlp\.up_proj$", r"down_proj|layers\.[0-3]\.", "(?i)lm_head", "(?-i:lm_head)", "(?P<x>lm_head)",
        "(?:x_proj)", r"blocks\[\d+\]\.(up|down)", r"[\[\]()*+.]+_proj", "[]*](a)",
    ],
)  # fmt: skip
def test_patterns_that_people_write(pattern: str) -> None:
    assert strict.tame(pattern) is None


ATOMS = st.sampled_from([
    "a", ".", r"\w", "[a-z.]", "(a|a)", "(a|b|ab)", r"\d", "a?", "(.*)", "(?:a+)", "*", "+", "?", "{2,}", "{0,30}", r"\.",
    "(?x)", "(?ix)", " ", "(?x: ", "(?#", "(?-i:", ")", r"\[", "]", r"\\", "[",
])  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(ATOMS, min_size=1, max_size=10))
def test_patterns_that_are_tame_end(atoms: list[str]) -> None:
    import re

    pattern = "".join(atoms) + "!"
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of sets in sets
            compiled = re.compile(pattern)
    except re.error:
        return
    if strict.tame(pattern) is None:
        begin = time.process_time()
        compiled.search("[" + "a" * 59)
        assert time.process_time() - begin < 2


def test_a_sentence_has_an_end() -> None:
    said = str(ModelError("x" * 100_000 + " at the end"))
    assert len(said) == LONGEST and said.endswith("at the end")


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "[1e999]", '{"a": -1e400}'])
def test_numbers_that_are_not_finite_are_refused_where_that_is_asked(text: str) -> None:
    strict.parse(text)
    with pytest.raises(ValueError, match="not finite"):
        strict.parse(text, finite=True)
    assert strict.parse("[1.5, 2, -1e300]", finite=True) == [1.5, 2, -1e300]
