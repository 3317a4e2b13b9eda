"""Task files: values come back bit for bit, bases are told apart by everything else, and hostile files end in one sentence."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressor.errors import ModelError
from compressor.export import task
from compressor.kernels import layout
from compressor.packed import Affine, PackedWeight, Table

DENSE = {"norm.weight": torch.arange(12.0).half(), "embed.weight": torch.arange(8).bfloat16().view(2, 4), "step": torch.tensor(3)}


def tables(seed: int = 0, n: int = 72, segment: int = 48) -> dict[str, PackedWeight]:
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name in ("layers.0.q", "layers.1.q"):
        codes = torch.randint(0, 8, (n, 100), dtype=torch.uint8, generator=generator)
        values = torch.randn(n, -(-100 // segment), 8, generator=torch.Generator().manual_seed(seed)).half()
        out[name] = PackedWeight.pack(codes, Table(values), 3, segment)
    return out


def scales(seed: int = 0, asymmetric: bool = True) -> dict[str, PackedWeight]:
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name in ("layers.0.q", "layers.1.q"):
        codes = torch.randint(0, 8, (72, 96), dtype=torch.uint8, generator=generator)
        zero = torch.randint(0, 8, (72, 3), dtype=torch.uint8, generator=generator) if asymmetric else None
        scale = torch.rand(72, 3, generator=torch.Generator().manual_seed(seed)).half() + 0.1
        out[name] = PackedWeight.pack(codes, Affine(scale, zero), 3)
    return out


def saved(path: Path, packed: dict[str, PackedWeight], **told: Any) -> str:
    base = task.digest(DENSE, packed)
    task.write(path, task.Task(task.kind_of(packed, "m"), base, {name: w.learned for name, w in packed.items()}, **told), packed)
    return base


@pytest.mark.parametrize("make", [tables, scales])
def test_values_come_back_for_every_model_of_the_base(tmp_path: Path, make) -> None:
    path, tuned, base = tmp_path / "t.safetensors", make(1), make(0)
    saved(path, tuned, model="tiny", recipe={"method": "peqa", "lr": 0.005}, metrics={"domain": 29.5})
    assert not torch.equal(tuned["layers.0.q"].learned, base["layers.0.q"].learned)
    again = task.read(path, base, task.digest(DENSE, base))
    for name, weight in base.items():
        assert torch.equal(weight.with_learned(again.values[name]).dequantize(), tuned[name].dequantize())
        assert again.values[name].dtype == torch.float16
    assert (again.model, again.recipe, again.metrics) == ("tiny", {"method": "peqa", "lr": 0.005}, {"domain": 29.5})
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_bytes_are_what_the_documentation_says(tmp_path: Path) -> None:
    base = saved(tmp_path / "t", tables(), model="m")
    with safe_open(tmp_path / "t", "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"compressor"}
    assert json.loads(metadata["compressor"]) == {"format": "task", "version": 1, "kind": "table", "base": base, "model": "m"}
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / "t").items()} == {
        "layers.0.q.table": (72, 3, 8),
        "layers.1.q.table": (72, 3, 8),
    }
    saved(tmp_path / "s", scales())
    assert set(load_file(tmp_path / "s")) == {"layers.0.q.scale", "layers.1.q.scale"}


def test_size_is_that_of_the_tables(tmp_path: Path) -> None:
    saved(tmp_path / "t", tables(n=4096), model="m")
    bare = 2 * 4096 * 3 * 8 * 2
    assert bare <= (tmp_path / "t").stat().st_size <= 1.01 * bare


@pytest.mark.parametrize("make", [tables, scales])
def test_digest_knows_everything_but_the_values(make) -> None:
    packed = make(0)
    base, weight = task.digest(DENSE, packed), packed["layers.1.q"]
    assert task.digest(DENSE, make(1)) == base
    assert task.digest(dict(reversed(DENSE.items())), dict(reversed(packed.items()))) == base
    codes = weight.codes()
    codes[5, 7] ^= 1
    other = {
        "codes": packed | {"layers.1.q": PackedWeight.pack(codes, weight.values, 3, weight.group)},
        "names": {"layers.0.q": packed["layers.0.q"], "layers.2.q": weight},
        "fewer": {"layers.0.q": packed["layers.0.q"]},
        "swapped": {"layers.0.q": weight, "layers.1.q": packed["layers.0.q"]},
        "group": packed | {"layers.1.q": replace(weight, group=weight.group // 2)},
    }
    if weight.zero is not None:
        zero = weight.zero.clone()
        zero[3, 1] ^= 1
        other["zero"] = packed | {"layers.1.q": replace(weight, values=Affine(weight.learned, zero))}
        other["symmetric"] = scales(asymmetric=False)
    found = {key: task.digest(DENSE, change) for key, change in other.items()}
    norm = DENSE["norm.weight"].clone()
    norm[3] += 1
    found["dense"] = task.digest(DENSE | {"norm.weight": norm}, packed)
    found["dtype"] = task.digest(DENSE | {"norm.weight": DENSE["norm.weight"].view(torch.bfloat16)}, packed)
    found["shape"] = task.digest(DENSE | {"embed.weight": DENSE["embed.weight"].view(4, 2)}, packed)
    found["more bits"] = task.digest(DENSE | {"norm.weight": DENSE["norm.weight"].float() * (1 + 2**-20)}, packed)
    found["config"] = task.digest(DENSE, packed, None, {"rope_theta": 1.0})
    assert task.digest({name: t.float() if t.is_floating_point() else t for name, t in DENSE.items()}, packed) == base, "a CPU's copy of it"
    found["absent"] = task.digest({k: v for k, v in DENSE.items() if k != "step"}, packed)
    assert len({base, *found.values()}) == 1 + len(found)


def test_digest_does_not_know_the_layout() -> None:
    """The same codes and shapes, once in the order of affine weights and once moved there and back."""
    weight = scales()["layers.0.q"]
    moved = layout.reorder(layout.reorder(weight.words, "pair", "prmt"), "prmt", "pair")
    assert task.digest({}, {"a": replace(weight, words=moved.clone())}) == task.digest({}, {"a": weight})
    padded = torch.nn.functional.pad(weight.codes(), (0, 0, 0, 56))  # garbage in the rows that only pad the tile
    padded[72:] = 7
    assert task.digest({}, {"a": replace(weight, words=layout.pack_tiles(padded, 3))}) == task.digest({}, {"a": weight})


def zeros(seed: int = 0) -> dict[str, PackedWeight]:
    """The scales of `scales()` with zeros in floats."""
    draw = torch.Generator().manual_seed(seed)
    return {name: replace(weight, values=Affine(weight.learned, 4 + torch.randn(72, 3, generator=draw).half())) for name, weight in scales().items()}


def test_zeros_come_back_for_integer_float_and_symmetric_bases(tmp_path: Path) -> None:
    tuned, path = zeros(1), tmp_path / "z"
    assert task.kind_of(tuned, "m") == "zero"
    base = task.digest(DENSE, tuned, "zero")
    task.write(path, task.Task("zero", base, {name: w.zero for name, w in tuned.items()}), tuned)
    assert {name: tuple(t.shape) for name, t in load_file(path).items()} == {"layers.0.q.zero": (72, 3), "layers.1.q.zero": (72, 3)}
    symmetric = {name: replace(weight, values=Affine(weight.learned)) for name, weight in scales().items()}
    for other in (scales(), symmetric, zeros(2)):
        assert task.digest(DENSE, other, "zero") == base
        again = task.read(path, other, base)
        assert all(torch.equal(again.values[name], weight.zero) for name, weight in tuned.items())
    assert task.digest(DENSE, scales(1), "zero") != base, "scales are of the base"
    assert task.digest(DENSE, zeros(1)) != task.digest(DENSE, zeros(2)) != task.digest(DENSE, scales())
    with pytest.raises(ModelError, match="holds zeros, but the base holds tables"):
        task.read(path, tables(), base)
    wide = {name: replace(w, values=Affine(w.learned.float(), None)) for name, w in scales().items()}
    with pytest.raises(ModelError, match="float16.*and the base wants float32"):
        task.read(path, wide, base)


def test_digests_of_zeros_and_adapters_are_the_documented_ones() -> None:
    for packed, kind in (
        (zeros(), "zero"),
        (zeros(), "adapter"),
        (scales(), "adapter"),
        (tables(), "adapter"),
        (scales(asymmetric=False), "adapter"),
    ):
        config = {"hidden_act": "silu", "rope_theta": 1e4}
        found = hashlib.sha256(json.dumps({"config": config}, sort_keys=True).encode() + b"\n")
        for name, weight in sorted(packed.items()):
            line = {"bits": 3, "group": weight.group, "kind": kind, "module": name, "shape": list(weight.shape), "values": "float16"}
            if kind == "adapter":
                kept = False if weight.zero is None else "float16" if weight.zero.is_floating_point() else True
                line |= {"of": "table" if weight.learned.dim() == 3 else "scale", "zeros": kept}
            found.update(json.dumps(line, sort_keys=True).encode() + b"\n" + weight.codes().numpy().tobytes() + weight.learned.numpy().tobytes())
            if kind == "adapter" and weight.zero is not None:
                found.update(weight.zero.numpy().tobytes())
        for name, tensor in sorted(DENSE.items()):
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            line = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "tensor": name}
            found.update(json.dumps(line).encode() + b"\n" + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        assert task.digest(DENSE, packed, kind, config) == found.hexdigest()


def test_digest_for_an_adapter_knows_everything() -> None:
    some = [tables(0), tables(1), scales(0), scales(1), scales(asymmetric=False), zeros(0), zeros(1)]
    assert len({task.digest(DENSE, packed, "adapter") for packed in some}) == len(some)


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({}, {"a": torch.ones(2)}, "an adapter has a configuration"),
        ({"r": 1}, {}, "holds no tensors of an adapter"),
        ({"r": 1}, {"a": torch.ones(2, dtype=torch.int8)}, "which is no tensor of an adapter"),
        ({"r": 1}, {"a": torch.tensor([1.0, float("nan")])}, "holds values that are not finite"),
    ],
)
def test_hostile_files_of_adapters(tmp_path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], words: str) -> None:
    told = task.Task("adapter", "0" * 64, {}, config=config).header()
    save_file(tensors, tmp_path / "a", metadata={"compressor": json.dumps(told)})
    for read in (task.read_alone, lambda path: task.read(path, tables(), "0" * 64)):
        with pytest.raises(ModelError, match=words):
            read(tmp_path / "a")
    with pytest.raises(ModelError, match="an adapter has a configuration"):
        saved(tmp_path / "s", scales(), config={"r": 1})


def test_a_configuration_counts_by_what_computes() -> None:
    kept = {"hidden_act": "silu", "rope_parameters": {"rope_theta": 1e4}, "architectures": ["LlamaForCausalLM"]}
    idle = {"dtype": "float16", "torch_dtype": "float32", "_name_or_path": "/me", "transformers_version": "5", "quantization_config": {"a": 1}}
    assert task.computing(kept | idle | {"rope_scaling": None, "use_cache": True, "eos_token_id": 2}) == kept


def head(**change: Any):
    """A damage that changes keys of the header."""
    return lambda tensors, metadata: metadata.update(compressor=json.dumps(json.loads(metadata["compressor"]) | change))


def raw(text: str):
    return lambda tensors, metadata: metadata.update(compressor=text)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t, m: m.pop("compressor"), "no entry 'compressor'"),
        (raw("{"), "no JSON"),
        (raw(""), "no JSON"),
        (raw("[" * 100_000), "nests deeper than 64 levels"),
        (raw('{"format": "task", "version": NaN}'), "the number NaN, which is not finite"),
        (raw("[1]"), "another format"),
        (raw("null"), "another format"),
        (head(format="adapter"), "another format"),
        (head(version=2), "version 2 of the task format.*update compressor"),
        (head(version=True), "version True"),
        (head(version="1\n" * 100), "version '1"),
        (head(kind="lora"), "names no kind"),
        (head(kind=["table"]), "names no kind"),
        (head(kind="scale"), "holds scales, but the base holds tables"),
        (head(base="0" * 64), "made for another base"),
        (head(base="../../etc"), "no digest of its base"),
        (head(base=None), "no digest of its base"),
        (head(model=3), "must be a name and two mappings"),
        (raw('{"a":' * 900 + "1" + "}" * 900), "nests deeper than 64 levels"),
        (lambda t, m: m.update(compressor=m["compressor"].replace("{", '{"metrics": {"a": 1e999}, ', 1)), "1e999, which is not finite"),
        (lambda t, m: m.update(compressor=m["compressor"].replace("{", '{"metrics": {"a": -1%s}, ' % ("0" * 400), 1)), "a number of 402 digits"),
        (lambda t, m: m.update(compressor=m["compressor"].replace("{", '{"kind": "table", ', 1)), "names 'kind' twice"),
        (lambda t, m: m.update(compressor=m["compressor"] + " " * (1 << 22)), "longer than 4194304 characters"),
        (head(recipe=[1]), "must be a name and two mappings"),
        (head(metrics="good"), "must be a name and two mappings"),
        (lambda t, m: t.pop("layers.1.q.table"), "layers.1.q.table is missing"),
        (lambda t, m: t.update({"layers.2.q.table": torch.ones(1)}), "layers.2.q.table.*belongs to no packed layer"),
        (lambda t, m: t.update({"a\nb": torch.ones(1)}), "belongs to no packed layer"),
        (lambda t, m: t.update({"layers.1.q.table": torch.zeros(72, 3, 16).half()}), r"float16 \(72, 3, 16\), and the base wants"),
        (lambda t, m: t.update({"layers.1.q.table": torch.zeros(71, 3, 8).half()}), "and the base wants"),
        (lambda t, m: t.update({"layers.1.q.table": torch.zeros(72, 24).half()}), "and the base wants"),
        (lambda t, m: t.update({"layers.1.q.table": torch.zeros(72, 3, 8)}), "float32.*and the base wants float16"),
        (lambda t, m: t.update({"layers.1.q.table": torch.zeros(72, 3, 8, dtype=torch.int16)}), "and the base wants"),
        (lambda t, m: t["layers.1.q.table"].view(-1)[5].fill_(float("nan")), "layers.1.q holds values that are not finite"),
        (lambda t, m: t["layers.1.q.table"].view(-1)[5].fill_(float("-inf")), "not finite"),
    ],
)
def test_hostile_files_give_one_sentence(tmp_path: Path, damage, words: str) -> None:
    path, packed = tmp_path / "t.safetensors", tables()
    base = saved(path, packed)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    damage(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ModelError, match=words) as error:
        task.read(path, packed, base)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\x00\x00\x00\x00\x00\x00\x00{}", None])
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read" if content is not None else "is a folder"):
        task.read(path, tables(), "0" * 64)
    with pytest.raises(ModelError, match="there is no task file"):
        task.read_header(tmp_path / "nothing")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (task.read_header, task.read_alone, lambda path: task.read(path, tables(), "0" * 64)):
        with pytest.raises(ModelError, match="is no regular file"):
            read(tmp_path / "pipe")


def test_a_file_that_changes_meanwhile_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, packed = tmp_path / "t", tables()
    base = saved(path, packed)
    check = task._check

    def late(*args: Any) -> None:
        check(*args)
        path.write_bytes(b"changed")

    monkeypatch.setattr(task, "_check", late)
    assert all(torch.equal(value, packed[name].learned) for name, value in task.read(path, packed, base).values.items())
    assert path.read_bytes() == b"changed"


@pytest.mark.parametrize("change", [torch.zeros_like, torch.neg])
def test_scales_that_no_tuning_makes_are_refused(tmp_path: Path, change: Any) -> None:
    packed = scales()
    base, path = saved(tmp_path / "s", packed), tmp_path / "s"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["layers.1.q.scale"][3, 1] = change(tensors["layers.1.q.scale"][3, 1])
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ModelError, match=r"the scale of layers.1.q is 0, or of another sign than the base's"):
        task.read(path, packed, base)
    negative = {name: weight.with_learned(-weight.learned) for name, weight in packed.items()}
    saved(tmp_path / "n", negative)
    assert bool((task.read(tmp_path / "n", negative, base).values["layers.0.q"] < 0).all()), "what others write is taken as it is"
    with pytest.raises(ModelError, match="of another sign"):
        task.read(tmp_path / "n", packed, base)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "t", tables())
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        task.read(tmp_path / "t", tables(), base)


def test_models_that_no_task_can_hold(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="m holds no packed weights"):
        task.kind_of({}, "m")
    with pytest.raises(ModelError, match="m mixes scales and tables"):
        task.kind_of({"a": tables()["layers.0.q"], "b": scales()["layers.0.q"]}, "m")
    packed = scales()
    packed["layers.0.q"] = replace(packed["layers.0.q"], values=Affine(packed["layers.0.q"].learned, torch.zeros(72, 3)))
    with pytest.raises(ModelError, match="m holds tuned zeros in some layers and others in the rest"):
        task.kind_of(packed, "m")
    packed = tables()
    packed["layers.0.q"] = packed["layers.0.q"].with_learned(packed["layers.0.q"].learned / 0)
    with pytest.raises(ModelError, match="not finite"):
        saved(tmp_path / "t", packed)
    assert not list(tmp_path.iterdir())


def test_only_what_json_can_hold_is_told() -> None:
    assert task.finite({"a": 1.5, "b": float("nan"), "c": None, "d": "x", "e": [1], 3: 4, "f": True}) == {"a": 1.5, "c": None, "d": "x", "f": True}
    assert task.finite([1]) == task.finite(None) == {}


@pytest.mark.parametrize("make", [tables, scales])
def test_a_file_read_alone(tmp_path: Path, make) -> None:
    path, packed = tmp_path / "t.safetensors", make(1)
    base = saved(path, packed, model="m", recipe={"lr": 1.0})
    found = task.read_alone(path)
    assert (found.kind, found.base, found.model, found.recipe) == (task.kind_of(packed, "m"), base, "m", {"lr": 1.0})
    assert all(torch.equal(found.values[name], weight.learned) for name, weight in packed.items())
    assert found.values.keys() == packed.keys()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t, m: t.update({"layers.0.q.words": torch.ones(1)}), "which is no table"),
        (lambda t, m: t.update({"layers.0.q.table": torch.ones(3, 2)}), r"float32 \(3, 2\), which is no table"),
        (lambda t, m: t.update({"layers.0.q.table": torch.ones(3, 2, 8, dtype=torch.int16)}), "which is no table"),
        (lambda t, m: t["layers.1.q.table"].view(-1)[5].fill_(float("nan")), "layers.1.q holds values that are not finite"),
        (head(kind="lora"), "names no kind"),
    ],
)
def test_hostile_files_read_alone(tmp_path: Path, damage, words: str) -> None:
    path = tmp_path / "t.safetensors"
    saved(path, tables())
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    damage(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ModelError, match=words):
        task.read_alone(path)
