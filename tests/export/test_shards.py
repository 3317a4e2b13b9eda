"""Shards are written as their tensors come, and packed modules are read when they are asked for."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressor.errors import ModelError
from compressor.export import shards
from compressor.pipelines import checkpoint

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


def weights(count: int = 60) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {f"model.{i}.weight": torch.randn(7 + i, 5, generator=random).mul(9).to(DTYPES[i % 5]) for i in range(count)}


@pytest.mark.parametrize("held", [0, 1000, 1 << 20])
@pytest.mark.parametrize("most", [1, 9000, 1 << 30])
def test_whatever_waits_in_memory_the_tensors_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int, most: int) -> None:
    monkeypatch.setattr(shards, "HELD", held)
    given = weights()
    shards.write_weights(tmp_path, given.items(), lambda name, weight: {}, most)
    files = checkpoint.weight_files(tmp_path)  # whole, and their index right
    found = {key: tensor for path in files for key, tensor in load_file(path).items()}
    assert found.keys() == given.keys() and not list(tmp_path.glob("*.tmp"))
    assert all(torch.equal(found[key], given[key]) and found[key].dtype == given[key].dtype for key in given)
    assert (len(files) == 1) == (most == 1 << 30)
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert path.stat().st_mode & 0o777 == 0o644


def test_a_shard_is_closed_where_its_header_would_outgrow_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "HELD", 1)
    monkeypatch.setattr(shards, "ROOM", 1)
    given = weights(8) | {f"small.{'x' * 200}.{i}": torch.zeros(2) for i in range(20)}
    shards.write_weights(tmp_path, given.items(), lambda name, weight: {}, 2000)
    found = {key: tensor for path in checkpoint.weight_files(tmp_path) for key, tensor in load_file(path).items()}
    assert found.keys() == given.keys() and all(torch.equal(found[key], given[key]) for key in given)


def test_parts_are_read_when_they_are_asked_for_and_hold_no_file(tmp_path: Path) -> None:
    one, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"m.words": torch.arange(4), "n.words": torch.arange(5), "norm.weight": torch.ones(2)}, one)
    save_file({"m.scale": torch.ones(3)}, other)
    dense, parts = shards.read_weights(tmp_path, [one, other], ("words", "scale"))
    assert list(dense) == ["norm.weight"] and sorted(parts) == ["m", "n"] and parts.names("m") == ["words", "scale"]
    found = parts.pop("m")
    assert torch.equal(found["words"], torch.arange(4)) and torch.equal(found["scale"], torch.ones(3)) and len(parts) == 1
    assert found["words"].untyped_storage().nbytes() == 4 * 8  # its own, not the mapped file's
    assert parts.pop("n")["words"].numel() == 5 and not parts
    parts = shards.read_weights(tmp_path, [one, other], ("words", "scale"))[1]
    one.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        parts["n"]


def test_files_are_opened_once_for_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header is parsed for many modules, and mapped pages do not gather."""
    given = {f"m{i}.words": torch.full((100,), i) for i in range(40)}  # 800 bytes each
    save_file(dict(list(given.items())[:20]), tmp_path / "a")
    save_file(dict(list(given.items())[20:]), tmp_path / "b")
    parts = shards.read_weights(tmp_path, [tmp_path / "a", tmp_path / "b"], ("words",))[1]
    opened: list[str] = []
    monkeypatch.setattr(shards, "safe_open", lambda path, kind: opened.append(path.name) or safe_open(path, kind))
    assert all(torch.equal(parts[name]["words"], given[f"{name}.words"]) for name in parts)
    assert opened == ["a", "b"]
    monkeypatch.setattr(shards, "TOUCHED", 4000)
    opened.clear()
    parts = shards.read_weights(tmp_path, [], ())[1]
    for name in given:
        parts.add(name.removesuffix(".words"), "words", tmp_path / ("a" if int(name[1:].split(".")[0]) < 20 else "b"))
    assert all(torch.equal(parts.pop(name)["words"], given[f"{name}.words"]) for name in list(parts))
    assert opened == ["a"] * 4 + ["b"] * 4


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the kernel's list of mapped files")
def test_what_was_read_is_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "TOUCHED", 1 << 20)
    save_file({str(i): torch.zeros(1 << 18) for i in range(16)}, tmp_path / "a")  # 1 MiB each
    reader = shards.Reader()
    for i in range(16):
        reader.get(tmp_path / "a", str(i))
    assert str(tmp_path / "a") not in Path("/proc/self/maps").read_text()
    monkeypatch.setattr(shards, "TOUCHED", 1 << 30)
    reader.get(tmp_path / "a", "0")
    assert str(tmp_path / "a") in Path("/proc/self/maps").read_text()
    reader.close()
    assert str(tmp_path / "a") not in Path("/proc/self/maps").read_text()
