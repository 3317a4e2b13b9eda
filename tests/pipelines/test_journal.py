"""The work folder: entries by fingerprint, stale files removed, one run at a time, damage counts as absence."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.errors import OutputError
from compressor.pipelines.journal import Journal, keep, kept, kept_facts, open_work


def test_entries_survive_and_follow_their_fingerprint(tmp_path: Path) -> None:
    with open_work(tmp_path / "w") as journal:
        assert journal.get("dense", "a") is None
        journal.put("dense", "a", {"perplexity": 3.5})
        assert not journal.resumed
    with open_work(tmp_path / "w") as journal:
        assert journal.get("dense", "b") is None
        assert not journal.resumed
        assert journal.get("dense", "a") == {"perplexity": 3.5}
        assert journal.resumed


def test_a_damaged_journal_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "journal.json").write_text('{"dense": {"finger')
    assert Journal(tmp_path).get("dense", "a") is None


def test_subfolders_of_other_fingerprints_are_removed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    old = journal.subfolder("blocks", "a")
    (old / "block").write_text("x")
    assert journal.subfolder("blocks", "a") == old
    assert (old / "block").exists()
    new = journal.subfolder("blocks", "b")
    assert new.is_dir()
    assert not old.exists()


def test_a_second_run_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with open_work(tmp_path / "w"), pytest.raises(OutputError, match="another run is writing"), open_work(tmp_path / "w"):
        pass
    with open_work(tmp_path / "w"):
        pass  # free again


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another output folder"), open_work(tmp_path / "file" / "w"):
        pass
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(OutputError, match="Permission denied"), open_work(tmp_path / "closed" / "w"):
            pass


# --- tensors -------------------------------------------------------------------------------------------------------------------------------


def test_kept_tensors_come_back_with_their_facts(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.safetensors"
    assert kept(path) is None and kept_facts(path) is None
    keep(path, {"x": torch.arange(6.0).view(2, 3).T}, ["n", {"a": 1}])
    tensors, facts = kept(path) or ({}, None)
    assert torch.equal(tensors["x"], torch.arange(6.0).view(2, 3).T) and facts == kept_facts(path) == ["n", {"a": 1}]
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_a_file_that_cannot_be_read_is_as_good_as_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for damage in (b"", b"noise" * 100):
        path.write_bytes(damage)
        assert kept(path) is None
    save_file({"x": torch.ones(2)}, path)
    assert kept(path) is None
    save_file({"x": torch.ones(2)}, path, metadata={"facts": "{"})
    assert kept(path) is None
    keep(path, {"x": torch.ones(200)}, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert kept(path) is None
