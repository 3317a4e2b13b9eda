"""The dense folder: rounded like a plain cast, losses like a plain quotient, and a proof that notices one changed bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor import packing
from compressor.errors import CompressorError, ModelError
from compressor.export import dense
from compressor.packed import Affine, PackedWeight, Table


def affine(n: int, k: int, bits: int, groups: int, asymmetric: bool = False) -> PackedWeight:
    torch.manual_seed(n + k + bits)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    zero = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8) if asymmetric else None
    return PackedWeight.pack(codes, Affine(torch.rand(n, groups).half() + 0.1, zero), bits)


def sketch(n: int, k: int, bits: int, segment: int) -> PackedWeight:
    torch.manual_seed(n + k + bits)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    return PackedWeight.pack(codes, Table(torch.randn(n, -(-k // segment), 1 << bits).half()), bits, segment)


@pytest.fixture(params=["one panel", "many panels"])
def _panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many panels":
        monkeypatch.setattr(packing, "PANEL", 64 * 77)


@pytest.mark.usefixtures("_panels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [sketch(200, 77, 3, 20), sketch(64, 352, 2, 352), affine(200, 96, 4, 3), affine(130, 96, 3, 3, asymmetric=True)])
def test_rounding_and_its_loss_are_those_of_a_cast(weight: PackedWeight, dtype: torch.dtype) -> None:
    exact = weight.dequantize()
    assert torch.equal(dense.dequantize(weight), exact)
    new, loss = dense.rounded(weight, dtype)
    assert new.dtype == dtype
    assert torch.equal(new, exact.to(dtype))
    errors = ((new.double() - exact.double()) / exact.double()).abs()[exact != 0]
    assert loss["largest"] == pytest.approx(float(errors.max()), rel=1e-5)
    assert loss["mean"] == pytest.approx(float(errors.mean()), rel=1e-5)
    if dtype == torch.bfloat16:
        assert 0 < loss["mean"] < loss["largest"] <= 2**-8


def test_zeros_are_exact_and_infinities_are_refused() -> None:
    zeros = sketch(64, 64, 2, 64)
    zeros = zeros.with_learned(torch.zeros_like(zeros.learned))
    assert dense.rounded(zeros, torch.bfloat16)[1] == {"largest": 0.0, "mean": 0.0}
    large = sketch(64, 64, 2, 64)
    large = large.with_learned(large.learned.float() * 1e6)
    with pytest.raises(ModelError, match="layer.a holds values beyond the range of float16"):
        dense.rounded(large, torch.float16, "layer.a")
    dense.rounded(large, torch.bfloat16)


def written(folder: Path, **options: int) -> tuple[dict[str, torch.Tensor | PackedWeight], list[dict]]:
    torch.manual_seed(0)
    weights = {"norm.weight": torch.randn(64), "half.weight": torch.randn(8).bfloat16(), "ids": torch.arange(9)}
    weights |= {f"layers.{i}.proj": sketch(72, 96, 2 + i % 3, 96) for i in range(4)}
    rows = dense.write(folder, {"model_type": "x"}, iter(weights.items()), torch.bfloat16, **options)
    return weights, rows


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_folder_holds_ordinary_tensors(tmp_path: Path, shard_bytes: int) -> None:
    weights, rows = written(tmp_path, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 20_000)
    tensors = {key: tensor for path in files for key, tensor in load_file(path).items()}
    assert set(tensors) == {"norm.weight", "half.weight", "ids", *(f"layers.{i}.proj.weight" for i in range(4))}
    assert torch.equal(tensors["layers.2.proj.weight"], weights["layers.2.proj"].dequantize().bfloat16())
    assert torch.equal(tensors["norm.weight"], weights["norm.weight"].bfloat16())
    assert tensors["ids"].dtype == torch.int64
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "x", "dtype": "bfloat16"}
    assert [row["name"] for row in rows] == ["norm.weight", *(f"layers.{i}.proj" for i in range(4))], "what was not rounded has no loss"
    assert [row["packed"] for row in rows] == [False, True, True, True, True]
    dense.prove(tmp_path, files, weights.items(), torch.bfloat16)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t["layers.1.proj.weight"].view(torch.int16).view(-1)[7].add_(1), "layers.1.proj.weight reads back with other values"),
        (lambda t: t.update({"norm.weight": t["norm.weight"].float()}), "norm.weight reads back with other values"),
        (lambda t: t.pop("ids"), "ids is not in it"),
        (lambda t: t.update({"more": torch.ones(1)}), "more in it belongs to nothing"),
    ],
)
def test_the_proof_notices(tmp_path: Path, damage, words: str) -> None:
    weights, _ = written(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CompressorError, match=words):
        dense.prove(tmp_path, [tmp_path / "model.safetensors"], weights.items(), torch.bfloat16)


def test_unpacked_leaves_the_parts_of_packed_modules_out(tmp_path: Path) -> None:
    save_file({"a.weight_packed": torch.ones(1), "a.bias": torch.ones(2), "norm": torch.ones(3)}, tmp_path / "m.safetensors")
    assert {name for name, _ in dense.unpacked(tmp_path, [tmp_path / "m.safetensors"], ("weight_packed",))} == {"a.bias", "norm"}
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="cannot be read"):
        list(dense.unpacked(tmp_path, [tmp_path / "bad.safetensors"], ()))
