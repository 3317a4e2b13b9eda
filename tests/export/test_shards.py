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
    one.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        parts["n"]
