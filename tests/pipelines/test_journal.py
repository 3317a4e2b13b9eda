"""The work folder: entries by fingerprint, stale files removed, one run at a time, damage counts as absence."""

import fcntl
import os
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import save_file

from compressor.errors import OutputError
from compressor.pipelines.journal import Journal, claimed, keep, kept, kept_facts, locked, open_work


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


@pytest.mark.parametrize("name", ["lock", "journal.json", "journal.tmp", "blocks-f/block.tmp", "more"])
def test_a_link_in_a_work_folder_is_refused_and_what_it_points_at_stays(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "mine"
    mine.write_text("my thesis")
    with open_work(tmp_path / "w") as journal:
        journal.put("dense", "a", 1)
        journal.subfolder("blocks", "f")
    path = tmp_path / "w" / name
    path.unlink(missing_ok=True)
    for aim in (mine, tmp_path / "nowhere", tmp_path, path):
        path.symlink_to(aim)
        with pytest.raises(OutputError, match=f"{name} is a link|not of a run"), open_work(tmp_path / "w"):  # a lock to nowhere is none
            pass
        path.unlink()
    assert mine.read_text() == "my thesis" and sorted(p.name for p in tmp_path.iterdir()) == ["mine", "w"]


def test_a_link_in_place_of_a_work_folder_is_refused_and_one_above_it_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for aim in ("elsewhere", "nowhere", "w"):
        (tmp_path / "w").symlink_to(aim)
        with pytest.raises(OutputError, match="w is a link"), open_work(tmp_path / "w"):
            pass
        (tmp_path / "w").unlink()
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "nowhere").exists()
    (tmp_path / "above").symlink_to("elsewhere")
    for _ in range(2):
        with open_work(tmp_path / "above" / "deep" / "w") as journal:
            journal.put("dense", "a", 1)
    assert (tmp_path / "elsewhere" / "deep" / "w" / "journal.json").exists()


def test_a_lock_that_is_a_link_or_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("my thesis")
    for path in (tmp_path / "s" / "lock", tmp_path / ".x.safetensors.lock"):
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(tmp_path / "mine")
        with pytest.raises(OutputError, match="symbolic links"), locked(path, "taken"):
            pass
        path.unlink()
        os.mkfifo(path)
        with locked(path, "taken"), pytest.raises(OutputError, match="taken"), locked(path, "taken"):
            pass
    assert (tmp_path / "mine").read_text() == "my thesis"
    os.link(tmp_path / "mine", tmp_path / "lock")
    with locked(tmp_path / "lock", "taken"):
        pass
    assert (tmp_path / "mine").read_text() == "my thesis", "another name of a file empties nothing"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_where_no_folder_can_be_made_attempts_end(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write /proc/xyz: No such file"), open_work(Path("/proc/xyz")):
        pass
    with pytest.raises(OutputError, match="cannot write /proc"), claimed(Path("/proc/xyz.safetensors")):
        pass


def test_a_lock_that_is_taken_away_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def gone(handle: IO[str], how: int) -> None:
        flock(handle, how)
        (tmp_path / "w" / "lock").unlink()

    monkeypatch.setattr(fcntl, "flock", gone)
    with pytest.raises(OutputError, match="No such file"), open_work(tmp_path / "w"):
        pass
    calls: list[int] = []
    monkeypatch.setattr(fcntl, "flock", lambda handle, how: gone(handle, how) if len(calls) < 3 and not calls.append(1) else flock(handle, how))
    with open_work(tmp_path / "w") as journal:
        journal.put("dense", "a", 1)
    assert len(calls) == 3


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
