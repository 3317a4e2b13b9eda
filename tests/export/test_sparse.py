"""The sparse folder: what is written reads back bit for bit with exact zeros, bytes are what the formula says, what is damaged gives one sentence."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor import linear
from compressor.errors import ModelError, RecipeError
from compressor.export import bitmask, sparse
from compressor.packed import Affine, PackedWeight, Table
from compressor.pipelines import compress, load, tools, write
from compressor.pipelines.export import Target, export
from compressor.recipe import Quant

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
GRIDS = [(bits, symmetric) for bits in (2, 3, 4) for symmetric in (True, False)]


def mask(n: int, k: int, sparsity: float, block: int = 1, seed: int = 0) -> torch.Tensor:
    """True where a weight stays; exactly `sparsity` of the blocks go."""
    count = n * k // block
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed)).argsort()
    return (draw >= round(count * sparsity)).repeat_interleave(block).view(n, k)


def dense(n: int, k: int, sparsity: float, block: int = 1, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)).to(dtype) * mask(n, k, sparsity, block)


def affine(n: int, k: int, sparsity: float, bits: int, group: int, symmetric: bool = True, block: int = 1, dtype: torch.dtype = torch.float16):
    """A packed weight whose kept codes are never the zero's, so that exactly `sparsity` of it is zero."""
    draw = torch.Generator().manual_seed(bits)
    top = 1 << bits
    zero = None if symmetric else torch.randint(0, top, (n, k // group), dtype=torch.uint8, generator=draw)
    zeros = torch.full((n, k), top // 2, dtype=torch.uint8) if zero is None else zero.repeat_interleave(group, 1)
    moved = (zeros + torch.randint(1, top, (n, k), dtype=torch.uint8, generator=draw)) % top
    scale = (torch.rand(n, k // group, generator=draw) + 0.1).to(dtype)
    return PackedWeight.pack(torch.where(mask(n, k, sparsity, block), moved, zeros), Affine(scale, zero), bits)


def same(a: PackedWeight, b: PackedWeight) -> bool:
    left, right = a.tensors(), b.tensors()
    equal = left.keys() == right.keys() and all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)
    return equal and (a.bits, a.group, a.shape) == (b.bits, b.group, b.shape)


def put(folder: Path, weights: dict, linears: tuple[str, ...] = ("d",), **options: int) -> dict[str, torch.Tensor]:
    """Writes; returns the tensors of a folder of one file."""
    folder.mkdir(exist_ok=True)
    sparse.write(folder, {"model_type": "x"}, iter(weights.items()), list(linears), **options)
    files = sorted(folder.glob("*.safetensors"))
    return load_file(files[0]) if len(files) == 1 else {}


def get(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, PackedWeight]]:
    return sparse.read(folder, sorted(folder.glob("*.safetensors")), settings(folder))


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def data_bytes(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - struct.unpack("<Q", file.read(8))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(72, 352), (7, 5), (1, 1), (3, 4), (65, 12)])
@pytest.mark.parametrize(("sparsity", "block"), [(0.9, 1), (0.8, 4), (0.5, 1), (1.0, 1), (0.99, 1)])
def test_dense_weights_come_back_with_their_zeros(tmp_path: Path, dtype: torch.dtype, n: int, k: int, sparsity: float, block: int) -> None:
    w = dense(n, k, sparsity, block if k % block == 0 else 1, dtype)
    put(tmp_path, {"d.weight": w, "norm.weight": torch.zeros(9), "d.bias": torch.zeros(n)})
    tensors, packed = get(tmp_path)
    assert not packed
    assert sorted(tensors) == ["d.bias", "d.weight", "norm.weight"]
    assert tensors["d.weight"].dtype == dtype
    assert torch.equal(tensors["d.weight"], w)
    if settings(tmp_path)["groups"]:
        assert not bool(torch.signbit(tensors["d.weight"][w == 0]).any())  # masking by a product leaves -0.0


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize(("n", "k", "group"), [(72, 352, 32), (7, 5, 5), (65, 12, 4)])
@pytest.mark.parametrize(("sparsity", "block"), [(0.9, 1), (0.8, 4), (0.02, 1), (1.0, 1)])
def test_packed_weights_come_back_bit_for_bit(
    tmp_path: Path, bits: int, symmetric: bool, n: int, k: int, group: int, sparsity: float, block: int
) -> None:
    weight = affine(n, k, sparsity, bits, group, symmetric, block if k % block == 0 else 1)
    put(tmp_path, {"p": weight})
    again = get(tmp_path)[1]["p"]
    assert same(again, weight)
    assert torch.equal(again.dequantize() == 0, ~mask(n, k, sparsity, block if k % block == 0 else 1))
    assert settings(tmp_path)["groups"][0]["symmetric"] is symmetric


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = affine(8, 64, 0.9, 3, 32, dtype=dtype)
    put(tmp_path, {"p": weight.with_learned(weight.learned.clone().requires_grad_())})
    assert same(get(tmp_path)[1]["p"], weight)


def test_the_smallest_form_is_taken() -> None:
    form = lambda value: None if (found := bitmask.encode(value)) is None else found[1].block
    assert form(dense(64, 64, 0.0)) is None
    assert form(dense(64, 64, 0.05)) is None  # 1/16 of the bits is the price of the mask
    assert form(dense(64, 64, 0.10)) == 1
    assert form(dense(64, 64, 0.5, 4)) == 4
    assert form(dense(64, 64, 0.5, 16)) == 16
    assert form(torch.randn(64, 64).half() * torch.tensor([1, 1, 0, 0]).repeat(64, 16)) == 2  # this 2:4 comes in pairs
    assert form(affine(64, 64, 0.2, 4, 64)) == 0
    assert form(affine(64, 64, 0.5, 4, 64)) == 1
    assert form(affine(64, 64, 0.9, 2, 64)) > 1  # some zeros stored cost less than a bit for each weight
    broken = dense(64, 64, 0.9)
    broken[3, 3] = float("nan")
    assert form(broken) is None
    assert form(dense(64, 64, 0.9).double()) is None
    assert form(torch.zeros(8, 16, dtype=torch.float16)) == 16
    assert form(torch.zeros(8, 24, dtype=torch.float16)) == 8


@pytest.mark.parametrize("value", [dense(40, 96, s, b, d) for s, b, d in [(0.9, 1, torch.float16), (0.8, 4, torch.float32), (0, 1, torch.float16)]]
                         + [affine(40, 96, s, b, g, y) for s, b, g, y in [(0.9, 4, 32, False), (0.5, 3, 96, True), (0.0, 3, 48, False)]])  # fmt: skip
def test_file_bytes_are_the_formula(tmp_path: Path, value: torch.Tensor | PackedWeight) -> None:
    name = "p" if isinstance(value, PackedWeight) else "d.weight"
    tensors = put(tmp_path, {name: value})
    assert 8 * data_bytes(tmp_path / "model.safetensors") == sparse.stored_bits(value)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) * 8 == sparse.stored_bits(value)


@pytest.mark.parametrize("pattern", ["unstructured", "4block", "8block", "2:4", "1:4", "2:8"])
@pytest.mark.parametrize("bits", [None, 2, 3, 4])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_estimate_is_the_size(pattern: str, bits: int | None, sparsity: float, symmetric: bool) -> None:
    n, k, group = 96, 384, 128
    if ":" in pattern:
        keep, of = map(int, pattern.split(":"))
        kept = (torch.rand(n, k // of, of, generator=torch.Generator().manual_seed(0)).argsort(-1).argsort(-1) < keep).view(n, k)
    else:
        kept = mask(n, k, sparsity, 1 if pattern == "unstructured" else int(pattern[0]))
    if bits is None:
        value: torch.Tensor | PackedWeight = dense(n, k, 0.0).abs().add(1) * kept
    else:
        whole = affine(n, k, 0.0, bits, group, symmetric)
        zeros = torch.full((n, k), 1 << (bits - 1), dtype=torch.uint8) if whole.zero is None else whole.zero.repeat_interleave(group, 1)
        value = PackedWeight.pack(torch.where(kept, whole.codes(), zeros), whole.values, bits)
    guess = sparse.estimate_bytes(n, k, sparsity, pattern, bits, group, symmetric=symmetric)
    block = bitmask.best(value)[0]
    exact = block == 0 or block == 1 or not pattern.startswith(("un", "2:8")) and block <= int(pattern[-1] if ":" in pattern else pattern[0])
    assert guess == pytest.approx(sparse.stored_bits(value) / 8, abs=1 if exact else 0, rel=0 if exact else 0.03)


def test_estimates_refuse_what_cannot_be() -> None:
    for pattern, k, sparsity in [("3:2", 8, 0.5), ("2:4", 6, 0.5), ("4block", 6, 0.5), ("banana", 8, 0.5), ("0:4", 8, 0.5), ("unstructured", 8, 1.5)]:
        with pytest.raises(RecipeError, match="choose unstructured|from 0 to 1"):
            sparse.estimate_bytes(8, k, sparsity, pattern)


def test_shards_and_layers_that_differ(tmp_path: Path) -> None:
    weights: dict = {f"l.{i}.weight": dense(40, 96, 0.1 * i) for i in range(6)}
    weights |= {f"q.{i}": affine(40, 96, 0.2 * i, 2 + i % 3, 96 if i < 3 else 32, i % 2 == 0) for i in range(5)}
    put(tmp_path, weights, tuple(f"l.{i}" for i in range(6)), shard_bytes=6_000)
    tensors, packed = get(tmp_path)
    assert all(torch.equal(tensors[name], w) if name in tensors else same(packed[name], w) for name, w in weights.items())
    assert settings(tmp_path)["ignore"] == ["l.0"]  # not sparse: as it is
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_bytes_are_what_the_documentation_says(tmp_path: Path) -> None:
    packed = affine(3, 40, 0.8, 3, 20, symmetric=False)
    tensors = put(tmp_path, {"d.weight": torch.tensor([[0, 1.5, 0, 0, 0, 0, 0, 0, 0, 0, -2.0, 0]]).half(), "p": packed})
    assert tensors["d.weight_mask"].tolist() == [0b00000010, 0b00000100]
    assert tensors["d.weight_values"].tolist() == [1.5, -2.0]
    assert tensors["d.weight_shape"].tolist() == [1, 12]
    plain, scheme = settings(tmp_path)["groups"]
    assert plain == {"kind": "dense", "block": 1, "modules": ["d"]}
    assert scheme == {"kind": "affine", "block": scheme["block"], "bits": 3, "group": 20, "symmetric": False, "modules": ["p"]}
    bit = lambda name, i: int(tensors[f"p.{name}"][i // 8]) >> (i % 8) & 1
    code = lambda name, i: sum(bit(name, 3 * i + b) << b for b in range(3))
    stored, slow = 0, torch.zeros(3, 40)
    for place in range(120 // scheme["block"]):
        for within in range(scheme["block"] if bit("weight_mask", place) else 0):
            i, j = divmod(place * scheme["block"] + within, 40)
            slow[i, j] = float(tensors["p.weight_scale"][i, j // 20]) * (code("weight_codes", stored) - code("weight_zero_point", 2 * i + j // 20))
            stored += 1
    assert torch.equal(slow, packed.dequantize())


DAMAGE = [
    (lambda t: t.pop("p.weight_mask"), "weight_mask missing"),
    (lambda t: t.pop("p.weight_scale"), "weight_scale missing"),
    (lambda t: t.pop("p.weight_zero_point"), "weight_zero_point missing"),
    (lambda t: t.pop("d.weight_values"), "weight_values missing"),
    (lambda t: t.pop("d.weight_shape"), "two positive int64"),
    (lambda t: t.update({"d.weight_shape": torch.tensor([-8, 64])}), "two positive int64"),
    (lambda t: t.update({"d.weight_shape": torch.tensor([8, 0])}), "two positive int64"),
    (lambda t: t.update({"d.weight_shape": torch.tensor([8.0, 64.0])}), "two positive int64"),
    (lambda t: t.update({"d.weight_shape": torch.tensor([8, 64, 1])}), "two positive int64"),
    (lambda t: t.update({"d.weight_shape": torch.tensor([1 << 40, 1 << 40])}), "weight_mask of shape .* does not fit"),
    (lambda t: t.update({"p.weight_shape": torch.tensor([8, 65])}), "do not fit a weight of shape"),
    (lambda t: t.update({"d.weight_mask": t["d.weight_mask"][1:].clone()}), "weight_mask of shape .* does not fit"),
    (lambda t: t.update({"d.weight_mask": t["d.weight_mask"].int()}), "weight_mask is int32"),
    (lambda t: t.update({"d.weight_mask": t["d.weight_mask"].view(2, -1).clone()}), "weight_mask of shape .* does not fit"),
    (lambda t: t["d.weight_mask"].fill_(255), "keeps 512 weights, and .* are stored"),
    (lambda t: t["d.weight_mask"].fill_(0), "keeps 0 weights, and .* are stored"),
    (lambda t: t["d.weight_mask"][0].bitwise_xor_(1), "weights, and .* are stored"),
    (lambda t: t["p.weight_mask"].fill_(255), "are no stream of 512 codes"),
    (lambda t: t.update({"d.weight_values": t["d.weight_values"][:-1].clone()}), "are stored"),
    (lambda t: t.update({"d.weight_values": t["d.weight_values"].double()}), "float64"),
    (lambda t: t.update({"d.weight_values": torch.zeros(600).half()}), "no stream for a weight"),
    (lambda t: t.update({"d.weight_values": t["d.weight_values"].view(1, -1).clone()}), "no stream for a weight"),
    (lambda t: t["d.weight_values"][3].fill_(float("nan")), "not finite"),
    (lambda t: t["d.weight_values"][3].fill_(float("inf")), "not finite"),
    (lambda t: t["p.weight_scale"].view(-1)[3].fill_(float("nan")), "not finite"),
    (lambda t: t.update({"p.weight_scale": t["p.weight_scale"][:, :1].clone()}), "weight_scale of shape"),
    (lambda t: t.update({"p.weight_scale": t["p.weight_scale"].int()}), "weight_scale is int32"),
    (lambda t: t.update({"p.weight_codes": t["p.weight_codes"][:-1].clone()}), "are no stream of"),
    (lambda t: t.update({"p.weight_codes": torch.cat([t["p.weight_codes"], torch.zeros(1, dtype=torch.uint8)])}), "are no stream of"),
    (lambda t: t.update({"p.weight_codes": t["p.weight_codes"].int()}), "weight_codes is int32"),
    (lambda t: t.update({"p.weight_zero_point": t["p.weight_zero_point"][:-1].clone()}), "weight_zero_point of shape"),
    (lambda t: t.update({"d.weight_codes": t["p.weight_codes"].clone()}), "says nothing of its weight_codes"),
    (lambda t: t.update({"d.weight": torch.zeros(8, 64)}), "holds d twice"),
    (lambda t: [t.pop(f"d.{part}") for part in bitmask.DENSE], "lacks the weight of d"),
    (lambda t: t.update({"e.weight_mask": torch.zeros(8, dtype=torch.uint8)}), "a mask or codes of e, which"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damaged_tensors_give_one_sentence(tmp_path: Path, damage, words: str) -> None:
    tensors = put(tmp_path, {"d.weight": dense(8, 64, 0.8), "p": affine(8, 64, 0.6, 3, 32, symmetric=False)})
    assert "p.weight_mask" in tensors
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=words) as error:
        get(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_bits_beyond_the_end(tmp_path: Path) -> None:
    for name, value in {"weight_mask": dense(3, 35, 0.8), "weight_codes": affine(3, 35, 0.6, 3, 35)}.items():
        tensors = put(tmp_path, {"p" if isinstance(value, PackedWeight) else "d.weight": value})
        part = next(t for key, t in tensors.items() if key.endswith(name))
        assert int(part[-1]) < 128
        part[-1] += 128
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match="bits beyond"):
            get(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "gptq"}, "gptq/bitmask"),
        ({"format": "csr"}, "compressor_sparse/csr"),
        ({"version": 2}, "version 2 of the sparse format.*update compressor"),
        ({"version": True}, "version True"),
        ({"groups": None}, "no list of mappings"),
        ({"groups": [3]}, "no list of mappings"),
        ({"groups": []}, "a mask or codes of"),
        ({"kind": "csr"}, "kind 'csr'"),
        ({"block": 3}, "block 3"),
        ({"block": -1}, "block -1"),
        ({"block": True}, "block True"),
        ({"block": None}, "block None"),
        ({"kind": "dense"}, "weight_values missing"),
        ({"kind": "dense", "block": 0}, "block 0 of a group of kind dense"),
        ({"block": 0}, "says nothing of its weight_mask"),
        ({"block": 16}, "weight_mask of shape"),
        ({"bits": 5}, "weights of 5 bits"),
        ({"bits": "3"}, "weights of '3' bits"),
        ({"bits": 4}, "are no stream of"),
        ({"group": 0}, "group 0 is no number"),
        ({"group": 32.0}, "group 32.0 is no number"),
        ({"group": 48}, "groups of 48 columns do not fit"),
        ({"group": 64}, "weight_scale of shape"),
        ({"symmetric": None}, "neither true nor false"),
        ({"symmetric": False}, "weight_zero_point missing"),
        ({"modules": "p"}, "no list of names"),
        ({"modules": [1]}, "no list of names"),
        ({"modules": ["p", "p"]}, "lists p twice"),
        ({"modules": ["p", "q"]}, "lacks the weight of q"),
    ],
)
def test_damaged_configurations_give_one_sentence(tmp_path: Path, change: dict, words: str) -> None:
    put(tmp_path, {"p": affine(8, 64, 0.6, 3, 32)})
    config = settings(tmp_path)
    first = config["groups"][0]
    config = config | change if set(change) & set(config) else config | {"groups": [first | change]}
    with pytest.raises(ModelError, match=words) as error:
        sparse.read(tmp_path, [tmp_path / "model.safetensors"], config)
    assert "\n" not in str(error.value)


def test_what_cannot_be_stored() -> None:
    sketch = PackedWeight.pack(torch.zeros(8, 64, dtype=torch.uint8), Table(torch.ones(8, 1, 4)), 2, 64)
    good = affine(8, 64, 0.6, 3, 32)
    assert sparse.fits({}) is None
    assert sparse.fits({"a": good}) is None
    assert sparse.fits({"a": good, "b": sketch}) == "1 of its 2 packed layers hold tables, of which no entry is exactly zero"
    assert "scales of a are not finite" in str(sparse.fits({"a": good.with_learned(good.learned / 0)}))
    with pytest.raises(ModelError, match="no entry that is exactly zero"):
        sparse.stored_bits(sketch)


def pruned(name: str = "tiny", sparsity: float = 0.9) -> load.Loaded:
    """A model whose block linears are masked at random."""
    loaded = load.load(name, "cpu")
    write.round_to_folder(loaded, set())
    with torch.no_grad():
        for index, layer in enumerate(linear.linears(linear.find_blocks(loaded.model)[1]).values()):
            layer.weight.mul_(mask(*layer.weight.shape, sparsity, seed=index))
    return loaded


def test_a_model_without_packed_layers(tmp_path: Path) -> None:
    loaded = pruned()
    facts = write.write_folder(loaded, tmp_path / "x", sparse=True)
    weights = write.block_weights(loaded)
    assert facts == {"format": "compressor sparse", "verified": True, "layers": 0, "bits_per_weight": write.bits_per_weight(weights, sparse=True)}
    assert 1 + 0.1 * 16 < facts["bits_per_weight"] < 1 + 0.1 * 16 + 0.02
    rest = sum(t.numel() for name, t in write.dense_tensors(loaded).items() if name.removesuffix(".weight") not in weights)
    stored = sum(sparse.stored_bits(w) for w in weights.values()) // 8
    assert data_bytes(tmp_path / "x" / "model.safetensors") == rest * loaded.dtype.itemsize + stored
    again = load.load(str(tmp_path / "x"), "cpu")
    mine, back = loaded.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(mine[name], back[name]) for name in mine)
    assert again.dtype == loaded.dtype
    assert tools.sizes_of(again)["bits_per_weight"] == facts["bits_per_weight"]


def test_a_packed_model_and_its_exports(tmp_path: Path) -> None:
    loaded = pruned()
    names = set(linear.linears(linear.find_blocks(loaded.model)[1]))
    compress.compress(loaded.model, Quant(bits=4, packer="rtn"), torch.float16, None, keep_zeros=True)
    facts = write.write_folder(loaded, tmp_path / "x", sparse=True)
    assert facts["layers"] == len(names)
    plain = write.bits_per_weight(load.packed_weights(loaded.model))
    assert facts["bits_per_weight"] < 1.6 < 4.1 < plain
    again = load.load(str(tmp_path / "x"), "cpu")
    assert all(same(w, load.packed_weights(again.model)[name]) for name, w in load.packed_weights(loaded.model).items())
    export(str(tmp_path / "x"), tmp_path / "ct", Target("compressed-tensors", device="cpu"))
    export(str(tmp_path / "x"), tmp_path / "bf16", Target("bf16", device="cpu"))
    native, rounded = load.load(str(tmp_path / "ct"), "cpu"), load.load(str(tmp_path / "bf16"), "cpu")
    assert all(same(w, load.packed_weights(native.model)[name]) for name, w in load.packed_weights(loaded.model).items())
    zeros = {name: w.dequantize() == 0 for name, w in load.packed_weights(loaded.model).items()}
    assert all(torch.equal(rounded.model.get_submodule(name).weight == 0, where) for name, where in zeros.items())


def test_a_sparse_dense_folder_exports_to_an_ordinary_one(tmp_path: Path) -> None:
    loaded = pruned()
    write.write_folder(loaded, tmp_path / "x", sparse=True)
    export(str(tmp_path / "x"), tmp_path / "f16", Target("float16", device="cpu"))
    again = load.load(str(tmp_path / "f16"), "cpu")
    assert not again.config.get("quantization_config")
    assert all(torch.equal(t, again.model.state_dict()[name]) for name, t in loaded.model.state_dict().items())


def test_a_folder_that_lost_a_mask_is_refused(tmp_path: Path) -> None:
    write.write_folder(pruned(), tmp_path / "x", sparse=True)
    broken = Path(shutil.copytree(tmp_path / "x", tmp_path / "y"))
    tensors = load_file(broken / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.endswith("weight_mask")))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="weight_mask missing"):
        load.load(str(broken), "cpu")
