"""The table of docs/exports.md: whole and numbered rightly, and what it says of a kind of weight comes true in a file that is read back."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.export import conversions, dense
from compressor.packed import PackedWeight
from compressor.pipelines import capabilities, checkpoint, writers
from tests.pipelines.foreign_folders import dense_folder

pytest.importorskip("gguf")
NAME = "model.layers.0.mlp.up_proj"
WORDS = [words for words, _ in capabilities.cells()]
FOLDERS = [to for to in capabilities.SHOWN if to in writers.FOLDERS]


@cache
def verdicts(to: str) -> dict[str, writers.Verdict]:
    return capabilities.verdicts(to)


@cache
def weight(words: str) -> PackedWeight:
    return dict(capabilities.cells())[words]()


def writer_of(to: str) -> writers.Writer:
    found = writers.of(to)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return dense_folder(tmp_path_factory.mktemp("source") / "dense", tokenizer)


# --- the table -----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def section() -> tuple[list[list[str]], list[str]]:
    """(rows of the table as lists of cells, the lines below it)."""
    table, _, below = capabilities.section().strip().partition("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert all(line.startswith("|") and line.endswith("|") for line in table.splitlines())
    return rows, below.splitlines()


def test_every_format_has_a_word_on_every_kind(section: tuple[list[list[str]], list[str]]) -> None:
    rows, _ = section
    assert rows[0] == ["", *capabilities.SHOWN] and set("".join(rows[1])) == {"-"} and [row[0] for row in rows[2:]] == WORDS
    assert len(set(WORDS)) == len(WORDS) and set(writers.FOLDERS) <= set(capabilities.SHOWN)
    for row in rows:
        assert len(row) == 1 + len(capabilities.SHOWN)
    for row in rows[2:]:
        for to, cell in zip(capabilities.SHOWN, row[1:], strict=True):
            verdict = verdicts(to)[row[0]]
            wanted = {"exact": "exact", "lossy": f"{verdict.error:.2g}", "cannot": cell if re.fullmatch(r"no \[\d+\]", cell) else "a number"}
            assert cell == wanted[verdict.kind], (to, row[0])
            assert verdict.kind != "lossy" or 0 < float(cell) < 1


def test_every_reason_is_told_once_and_meant_where_it_stands(section: tuple[list[list[str]], list[str]]) -> None:
    rows, below = section
    reasons = {int(number): why for number, why in (line.split(". ", 1) for line in below)}
    assert list(reasons) == list(range(1, len(below) + 1)) and len(set(reasons.values())) == len(reasons)
    used = [(to, row[0], int(found[1])) for row in rows[2:] for to, cell in zip(capabilities.SHOWN, row[1:], strict=True)
            if (found := re.fullmatch(r"no \[(\d+)\]", cell))]  # fmt: skip
    assert list(dict.fromkeys(number for *_, number in used)) == list(reasons), "numbers do not follow the table, or a reason is meant nowhere"
    for to, words, number in used:
        assert reasons[number].replace("a layer", NAME) == verdicts(to)[words].why
    assert NAME not in "".join(below)


def test_kinds_are_what_their_words_say() -> None:
    for words in WORDS:
        made, bits = weight(words), int(words[0])
        assert made.bits == bits and made.shape == (capabilities.N, capabilities.K)
        assert (made.learned.dim() == 3) == ("table" in words) and made.float_zeros == ("tuned zeros" in words)
        assert (made.columns is not None) == ("act-order" in words)
        if group := re.search(r"groups of (\d+)", words):
            assert made.group == int(group[1])
        if "whole rows" in words:
            assert made.group == made.shape[1]
        if "symmetric" in words:
            assert (made.zero is None) == (" symmetric" in words)
        assert torch.equal(dense.dequantize(made), dense.dequantize(dict(capabilities.cells())[words]())), "another weight at every call"


# --- and what comes of it --------------------------------------------------------------------------------------------------------------------------


def written(to: str, made: PackedWeight, folder: Path, source: Path) -> torch.Tensor:
    """What is read back, float32 [n, k], after a weight was written as an export writes it."""
    writer = writer_of(to)
    if writer.bits is not None:
        made = conversions.widened(made, writer.bits)
    held = writer.held(made)
    stored = held if isinstance(held, PackedWeight) else made
    folder.mkdir(exist_ok=True)
    writer.write(folder, source, checkpoint.any_config(source) | capabilities.HEADS, iter([(NAME, stored)]), [])
    found = {name.removesuffix(".weight"): tensor for name, tensor in writer.back(folder)[1]}
    return found[NAME]


def assert_as_told(to: str, words: str, seen: torch.Tensor) -> None:
    """What was read back is the weight where the table says exact, else as far from it as it says."""
    exact, verdict = dense.dequantize(weight(words)), verdicts(to)[words]
    error = float((seen - exact).norm() / exact.norm())
    assert seen.dtype == torch.float32 and seen.shape == exact.shape
    if verdict.kind == "exact":
        assert torch.equal(seen, exact), f"{to} says exact of {words}, and loses {error:.2g}"
    else:
        assert error == pytest.approx(verdict.error, rel=1e-3) and error > 0, (to, words)


@pytest.mark.parametrize("to", FOLDERS)
def test_folders_hold_what_the_table_says(to: str, tmp_path: Path, source: Path) -> None:
    for index, words in enumerate(WORDS):
        if verdicts(to)[words].kind != "cannot":
            assert_as_told(to, words, written(to, weight(words), tmp_path / str(index), source))


@pytest.mark.parametrize("to", capabilities.GGUF)
def test_gguf_files_hold_what_the_table_says(to: str, tmp_path: Path, source: Path) -> None:
    kinds = [verdict.kind for verdict in verdicts(to).values()]
    assert "cannot" not in kinds
    for kind in ("exact", "lossy"):
        chosen = [words for words in WORDS if verdicts(to)[words].kind == kind]
        for index, words in enumerate(chosen[::5]):
            assert_as_told(to, words, written(to, weight(words), tmp_path / f"{kind}{index}", source))


@settings(max_examples=60, deadline=None)
@given(
    to=st.sampled_from(FOLDERS), bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans(), group=st.sampled_from([16, 32, 64, 128]),
    kind=st.sampled_from(["plain", "ordered", "floating", "table"]), rows=st.sampled_from([32, 64]),
)  # fmt: skip
def test_any_verdict_comes_true(
    tmp_path_factory: pytest.TempPathFactory, source: Path, to: str, bits: int, symmetric: bool, group: int, kind: str, rows: int
) -> None:
    """Exact is bit for bit after writing and reading, lossy as far off as measured; for shapes that are not in the table."""
    made = capabilities.weight(bits, symmetric and kind != "floating", group, rows, 128)
    if kind != "plain" and not (kind == "table" and bits == 8):
        made = getattr(capabilities, kind)(made)
    verdict = writers.verdict(writer_of(to), capabilities.CONFIG, {NAME: made})
    if verdict.kind == "cannot":
        assert verdict.why and "\n" not in verdict.why
        return
    exact, seen = dense.dequantize(made), written(to, made, tmp_path_factory.mktemp("f"), source)
    error = float((seen - exact).norm() / exact.norm())
    assert torch.equal(seen, exact) if verdict.kind == "exact" else error == pytest.approx(verdict.error, rel=1e-3)
