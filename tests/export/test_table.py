"""The table folder: what is written reads back bit for bit, what is damaged gives one sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import ModelError
from compressor.export import compressed_tensors, table
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight, Table

CONFIG = {"quant_method": "compressor", "format": "table", "version": 1, "groups": [{"bits": 3, "segment": 48, "modules": ["a"]}], "ignore": []}


def weight(n: int, k: int, bits: int, segment: int, dtype: torch.dtype = torch.float16) -> PackedWeight:
    torch.manual_seed(n + k + bits)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    return PackedWeight.pack(codes, Table(torch.randn(n, -(-k // segment), 1 << bits).to(dtype)), bits, segment)


def write(folder: Path, weights: dict[str, PackedWeight], **options: int) -> None:
    folder.mkdir(exist_ok=True)
    dense = torch.arange(12.0).view(3, 4)
    table.write(folder, {"model_type": "x"}, iter([("norm.weight", dense), *weights.items()]), ["lm_head"], **options)


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, PackedWeight]]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return table.read(folder, sorted(folder.glob("*.safetensors")), config)


def same(a: PackedWeight, b: PackedWeight) -> bool:
    equal = torch.equal(a.words, b.words) and torch.equal(a.learned, b.learned) and a.learned.dtype == b.learned.dtype
    return equal and (a.bits, a.group, a.shape) == (b.bits, b.group, b.shape)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("k", "segment"), [(352, 352), (352, 128), (352, 32), (77, 20), (7, 7), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip(tmp_path: Path, bits: int, k: int, segment: int, dtype: torch.dtype) -> None:
    packed = weight(72, k, bits, segment, dtype)
    write(tmp_path, {"a": packed})
    dense, again = read(tmp_path)
    assert torch.equal(dense["norm.weight"], torch.arange(12.0).view(3, 4))
    assert list(again) == ["a"]
    assert same(again["a"], packed)


def test_shards_and_layers_that_differ(tmp_path: Path) -> None:
    weights = {f"layers.{i}.q_proj": weight(72, 352, 2 + i % 3, 352 if i < 3 else 128) for i in range(5)}
    write(tmp_path, weights, shard_bytes=10_000)
    _, again = read(tmp_path)
    assert list(again) == list(weights)
    assert all(same(again[name], packed) for name, packed in weights.items())
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {(g["bits"], g["segment"]): g["modules"] for g in config["groups"]} == {
        (2, 352): ["layers.0.q_proj"], (3, 352): ["layers.1.q_proj"], (4, 352): ["layers.2.q_proj"],
        (2, 128): ["layers.3.q_proj"], (3, 128): ["layers.4.q_proj"],
    }  # fmt: skip
    assert (config["quant_method"], config["format"], config["version"], config["ignore"]) == ("compressor", "table", 1, ["lm_head"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_bytes_are_what_the_documentation_says(tmp_path: Path) -> None:
    packed = weight(8, 100, 3, 48, torch.bfloat16)
    write(tmp_path, {"a": packed})
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items() if name.startswith("a.")} == {
        "a.weight_packed": ("torch.int32", (8, 10)),
        "a.weight_table": ("torch.bfloat16", (8, 3, 8)),
        "a.weight_shape": ("torch.int64", (2,)),
    }
    codes = layout.unpack_stream(tensors["a.weight_packed"], 3, 100)
    slow = torch.stack([torch.stack([tensors["a.weight_table"][i, j // 48, int(codes[i, j])] for j in range(100)]) for i in range(8)])
    assert torch.equal(slow.float(), packed.dequantize())


def test_tuned_tables_that_require_gradients_are_written(tmp_path: Path) -> None:
    packed = weight(8, 64, 2, 64, torch.float32)
    write(tmp_path, {"a": packed.with_learned(packed.learned.clone().requires_grad_())})
    assert same(read(tmp_path)[1]["a"], packed)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("a.weight_table"), "weight_table missing"),
        (lambda t: t.pop("a.weight_packed"), "weight_packed missing"),
        (lambda t: t.pop("a.weight_shape"), "two positive int64"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([8, 200])}), "no stream of 3-bit codes"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([-8, 128])}), "two positive int64"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([8, 1 << 60])}), "no stream of 3-bit codes"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([8, 128, 1])}), "two positive int64"),
        (lambda t: t.update({"a.weight_shape": torch.tensor([8.0, 128.0])}), "two positive int64"),
        (lambda t: t.update({"a.weight_packed": torch.zeros(8, 11, dtype=torch.int32)}), "no stream of 3-bit codes"),
        (lambda t: t.update({"a.weight_packed": torch.zeros(7, 12, dtype=torch.int32)}), "no stream of 3-bit codes"),
        (lambda t: t.update({"a.weight_packed": torch.zeros(8, 12, dtype=torch.int64)}), "int64, int64 and float16, and must be"),
        (lambda t: t.update({"a.weight_table": torch.zeros(8, 3, 16).half()}), "tables of shape"),
        (lambda t: t.update({"a.weight_table": torch.zeros(8, 2, 8).half()}), "tables of shape"),
        (lambda t: t.update({"a.weight_table": torch.zeros(8, 24).half()}), "tables of shape"),
        (lambda t: t.update({"a.weight_table": torch.zeros(8, 3, 8).double()}), "float64"),
        (lambda t: t.update({"a.weight_table": torch.zeros(8, 3, 8, dtype=torch.int32)}), "and int32, and must be"),
        (lambda t: t["a.weight_table"].view(-1)[5].fill_(float("nan")), "not finite"),
        (lambda t: t["a.weight_table"].view(-1)[5].fill_(float("-inf")), "not finite"),
        (lambda t: [t.pop(f"a.{part}") for part in table.PARTS], "lacks the packed weight of a"),
        (lambda t: t.update({"b.weight_packed": torch.zeros(8, 12, dtype=torch.int32)}), "a packed weight of b, which its config.json does not list"),
    ],
)
def test_damaged_tensors_give_one_sentence(tmp_path: Path, damage, words: str) -> None:
    write(tmp_path, {"a": weight(8, 128, 3, 48)})
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=words) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def group(**change: object) -> dict[str, object]:
    return {"groups": [CONFIG["groups"][0] | change]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "gptq"}, "gptq/table"),
        ({"format": "squeezellm"}, "compressor/squeezellm"),
        ({"version": 2}, "version 2 of the table format.*update compressor"),
        ({"version": None}, "version None"),
        ({"version": True}, "version True"),
        ({"groups": None}, "no list of mappings"),
        ({"groups": {"bits": 3}}, "no list of mappings"),
        ({"groups": [3]}, "no list of mappings"),
        ({"groups": []}, "lists no modules"),
        (group(bits=5), "weights of 5 bits"),
        (group(bits="3"), "weights of '3' bits"),
        (group(bits=None), "weights of None bits"),
        (group(bits=2), "no stream of 2-bit codes"),
        (group(segment=0), "segment 0 is no number"),
        (group(segment=-48), "segment -48 is no number"),
        (group(segment=48.0), "segment 48.0 is no number"),
        (group(segment=129), "segments of 129 columns do not fit"),
        (group(segment=64), "tables of shape"),
        (group(modules="a"), "no list of names"),
        (group(modules=[1]), "no list of names"),
        (group(modules=[]), "lists no modules"),
        (group(modules=["a", "a"]), "lists a twice"),
        (group(modules=["a", "b"]), "lacks the packed weight of b"),
        (group(modules=["b"]), "lacks the packed weight of b"),
        ({"groups": CONFIG["groups"] * 2}, "lists a twice"),
    ],
)
def test_damaged_configurations_give_one_sentence(tmp_path: Path, change: dict, words: str) -> None:
    write(tmp_path, {"a": weight(8, 128, 3, 48)})
    files = [tmp_path / "model.safetensors"]
    assert table.read(tmp_path, files, CONFIG)[1]
    with pytest.raises(ModelError, match=words) as error:
        table.read(tmp_path, files, CONFIG | change)
    assert "\n" not in str(error.value)


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="cannot be read"):
        table.read(tmp_path, [tmp_path / "model.safetensors"], CONFIG)


def test_each_format_says_what_it_cannot_hold() -> None:
    sketch = weight(8, 64, 2, 64)
    affine = PackedWeight.pack(torch.zeros(8, 64, dtype=torch.uint8), Affine(torch.ones(8, 2)), 2)
    assert table.fits({"a": sketch}) is None
    assert table.fits({}) == "no layer is packed"
    assert table.fits({"a": sketch, "b": affine}) == "1 of its 2 packed layers hold scales, which the format does not know"
    assert compressed_tensors.fits({"a": sketch, "b": affine}) == "1 of its 2 packed layers hold tables, which the format does not know"
    assert "tables of a are float64" in str(table.fits({"a": sketch.with_learned(sketch.learned.double())}))
    assert "tables of a are not finite" in str(table.fits({"a": sketch.with_learned(sketch.learned / 0)}))
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    assert "longer than its rows of 64" in str(table.fits({"a": PackedWeight.pack(codes, Table(torch.ones(8, 1, 4)), 2, 65)}))
