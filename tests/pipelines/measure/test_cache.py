"""What is kept, what is found again, and what is not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from compressor.pipelines import checkpoint
from compressor.pipelines.measure import cache
from compressor.pipelines.show import Show

KEY: dict[str, Any] = {"kind": "perplexity", "model": "abc", "window": 16}


class Said(Show):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def one_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_found_again_by_an_equal_key(tmp_path: Path) -> None:
    known = cache.Cache(tmp_path / "new" / "eval", Show())
    assert known.get(KEY) is None
    fresh = known.put(KEY, {"perplexity": 2.5, "none": None})
    assert fresh == {"perplexity": 2.5, "none": None, "cached": False, "measured": fresh["measured"]}
    found = cache.Cache(tmp_path / "new" / "eval", Show()).get(dict(reversed(KEY.items())))
    assert found == fresh | {"cached": True}
    for other in (KEY | {"window": 17}, KEY | {"more": 1}, {"kind": "perplexity"}):
        assert known.get(other) is None
    assert one_file(tmp_path / "new" / "eval").name == f"{cache.digest(KEY)}.json"


def test_damage_counts_as_absent(tmp_path: Path) -> None:
    known = cache.Cache(tmp_path, Show())
    known.put(KEY, {"perplexity": 2.5})
    file = one_file(tmp_path)
    whole = file.read_text()
    entry = json.loads(whole)
    damaged = [
        whole[:-20], "", "[]", "null", whole.replace("2.5", "2.4"), json.dumps({k: v for k, v in entry.items() if k != "sha256"}),
        "[" * 200_000,
        json.dumps(entry | {"key": KEY | {"window": 17}}), json.dumps(entry | {"measured": "2000-01-01"}), json.dumps(entry | {"result": [1]}),
    ]  # fmt: skip
    for text in damaged:
        file.write_text(text)
        assert known.get(KEY) is None, text
    file.write_bytes(b"\xff\xfe")
    assert known.get(KEY) is None
    known.put(KEY, {"perplexity": 2.5})
    found = known.get(KEY)
    assert found is not None and found["perplexity"] == 2.5


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nothing = cache.Cache(None, Show())
    assert nothing.put(KEY, {"a": 1})["a"] == 1 and nothing.get(KEY) is None and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = Said()
    known = cache.Cache(tmp_path / "file" / "eval", said)
    assert known.put(KEY, {"a": 1})["a"] == 1 and known.put(KEY, {"a": 1})["a"] == 1
    assert said.lines == [f"measurements are not kept: {tmp_path / 'file' / 'eval'} cannot be written (Not a directory)"] and known.get(KEY) is None


def test_no_half_written_entry_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "no space left")

    said = Said()
    monkeypatch.setattr(os, "replace", full)
    cache.Cache(tmp_path, said).put(KEY, {"a": 1})
    assert not list(tmp_path.iterdir()) and "no space left)" in said.lines[0]


def test_two_containers_do_not_write_the_same_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    names, replace = list[Path](), os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (names.append(source), replace(source, target))[1])
    for _ in range(2):
        cache.Cache(tmp_path, Show()).put(KEY, {"a": 1})
    assert len(set(names)) == 2


def test_what_another_try_may_better_is_not_kept(tmp_path: Path) -> None:
    known = cache.Cache(tmp_path, Show())
    assert known.put(KEY, {"a": 1}, keep=False)["cached"] is False and known.get(KEY) is None


def test_older_entries_count_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.base_key("cpu")
    monkeypatch.setattr(cache, "SCHEMA", cache.SCHEMA + 1)
    assert cache.digest(cache.base_key("cpu")) != cache.digest(before)


def test_every_byte_of_model_and_adapter_counts(tmp_path: Path) -> None:
    for path in checkpoint.model_files(checkpoint.TINY):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = cache.model_digest(tmp_path)
    assert first == cache.model_digest(checkpoint.TINY)
    weights = tmp_path / "model.safetensors"
    seconds, whole = weights.stat(), bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    os.utime(weights, ns=(seconds.st_atime_ns, seconds.st_mtime_ns))  # same size, same time: the bytes alone tell
    second = cache.model_digest(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    third = cache.model_digest(tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "README.md").write_text("about")
    assert len({first, second, third, cache.model_digest(tmp_path)}) == 4
    (tmp_path / "README.md").write_text("more about")
    before = cache.size_digest(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"compressor": "1", "keys": "x", "model": {"dense_bytes": 5}}))
    assert cache.size_digest(tmp_path) != before
