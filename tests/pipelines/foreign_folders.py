"""A random two-layer LLaMA, packed and written in every format that is read, and short tunings of such folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.export import conversions, foreign, gptq
from compressor.linear import linears, packed_linears, swap, to_packed
from compressor.packed import PackedWeight
from compressor.pipelines import checkpoint, load, write
from compressor.pipelines.formats import FORMATS, NATIVE
from compressor.pipelines.run import run
from compressor.quant import rtn
from compressor.recipe import KEPT, Quant, Recipe

FORMS: dict[str, Any] = {**FORMATS, "gptq_v2": gptq.V2}
QUICK = ["--seqlen", "32", "--steps", "3", "--batch", "2", "--lr", "0.02", "--max-tokens", "256", "--device", "cpu"]
Edit = Callable[[PackedWeight], PackedWeight]


def dense_folder(folder: Path, tokenizer: Any, dtype: torch.dtype = torch.float16, **config: Any) -> Path:
    """A random LLaMA of two blocks of width 64, and a text of 60 sentences beside it: notes.txt."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape | config)).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sentences = (f"Statement {i} of the language is run in order, and the ship left the harbour at dawn." for i in range(60))
    (folder / "notes.txt").write_text("\n\n".join(sentences))
    return folder


def packed_folder(dense: Path, folder: Path, form: str, bits: int = 4, symmetric: bool = False, group: int = 32, edit: Edit | None = None) -> Path:
    """The dense folder packed by round-to-nearest, each weight then changed by `edit`, as a folder of a format."""
    loaded, quant = load.load(str(dense), "cpu"), Quant(packer="rtn", bits=bits, group=group, symmetric=symmetric, shrink=False)
    model: Any = loaded.model
    for name, layer in linears(model.model).items():
        weight = rtn.pack(layer.weight.detach().float(), None, quant, group, torch.float16)[0]
        weight = conversions.as_tables(weight) if form == "compressor" else weight
        swap(model.model, name, to_packed(layer, edit(weight) if edit else weight))
    packed, writer = load.packed_weights(loaded.model), FORMS[form]
    assert writer.fits(packed) is None
    packed = packed if form in (*NATIVE, "mlx") else {name: writer.held(weight) for name, weight in packed.items()}
    folder.mkdir()
    others = [(name, tensor.to(loaded.dtype)) for name, tensor in write.dense_tensors(loaded).items()]
    writer.write(folder, loaded.config, iter([*others, *packed.items()]), ["lm_head"])
    write.copy_companions(dense, folder)
    return folder


def maker(place: Path, tokenizer: Any) -> Callable[..., Path]:
    """Makes each packed folder once, in `place`, and the dense one beside them."""
    dense_folder(place / "dense", tokenizer)

    def make(form: str, bits: int = 4, symmetric: bool = False, group: int = 32, edit: Edit | None = None) -> Path:
        folder = place / f"{form}{bits}{symmetric}{group}{edit.__name__ if edit else ''}"
        return folder if folder.exists() else packed_folder(place / "dense", folder, form, bits, symmetric, group, edit)

    return make


def copier(make: Callable[..., Path], place: Path) -> Callable[..., Path]:
    """Makes copies, place/source, which a test may spoil."""

    def copy(*args: Any, **keys: Any) -> Path:
        source = make(*args, **keys)
        shutil.copytree(source.parent / "dense", place / "dense")
        return shutil.copytree(source, place / "source")

    return copy


def quantization(folder: Path) -> dict[str, Any]:
    """The quantization_config of a folder, wherever it lies."""
    config: dict[str, Any] = checkpoint.any_config(folder)["quantization_config"]
    return config


def permuted(weight: PackedWeight) -> PackedWeight:
    """The same codes for columns in another order."""
    columns = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    return PackedWeight.pack(weight.codes(), weight.values, weight.bits, weight.group, columns)


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "config.json") -> None:
    """Edit a JSON file of a folder in place."""
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any], name: str = "model.safetensors") -> None:
    """Edit the weights of a folder in place."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def like_efficientqat(folder: Path) -> None:
    """Makes a gptq_v2 folder EfficientQAT's own: no quantization_config, and at 3 bits ten codes a word."""
    packed = {name: weight for name, weight in read(folder).items() if weight.bits == 3}
    change_config(folder, lambda config: config.pop("quantization_config"))
    (folder / "quantize_config.json").unlink()

    def words(codes: Tensor) -> Tensor:
        return foreign.pack_fields(torch.nn.functional.pad(codes, (0, -codes.shape[1] % 10)), 3)

    def change(tensors: dict[str, Tensor]) -> None:
        for name, weight in packed.items():
            tensors[f"{name}.qweight"] = words(weight.codes()).T.contiguous()
            tensors[f"{name}.qzeros"] = words(foreign.zeros_of(weight).T.contiguous())

    change_tensors(folder, change)


def read(folder: Path) -> dict[str, PackedWeight]:
    """The packed weights of a folder, as its format stores them."""
    return load.read_packed(folder, checkpoint.any_config(folder))[1]


def recipe(folder: Path, method: str = "peqa", **keys: Any) -> Recipe:
    """Three steps on the text beside the dense folder; as `QUICK`."""
    text = str(folder.parent / "dense" / "notes.txt")
    quick = {"data__data": text, "data__outside": text, "data__seqlen": 32, "tune__steps": 3, "tune__batch": 2, "eval__max_tokens": 256}
    quick |= {"tune__lr": 0.02, "tune__method": method, "device": "cpu"}
    return Recipe(model=str(folder), quant=Quant(packer=KEPT)).with_(**quick | keys)


def tune(folder: Path, output: Path, method: str = "peqa", **keys: Any) -> dict[str, Any]:
    """The document of `compressor tune`."""
    return run(recipe(folder, method, **keys), output)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(64).view(2, 32)).logits


def assert_only_values_moved(before: Path, after: Path) -> None:
    """The same codes under the same groups in both folders, scales that moved, zeros that did not, and dense tensors to the last bit."""
    old, new, mlx_folder = read(before), read(after), (after / "config.json").read_text().count("affine") > 1
    assert old.keys() == new.keys() and old
    for name, weight in old.items():
        other = new[name]
        assert (weight.bits, weight.group, weight.shape) == (other.bits, other.group, other.shape), name
        assert torch.equal(weight.codes(), other.codes()) and torch.equal(weight.g_idx(), other.g_idx()), name
        assert weight.learned.dtype == other.learned.dtype and not torch.equal(weight.learned, other.learned), name
        assert (weight.zero is None) == (other.zero is None), name
        if weight.zero is not None and other.zero is not None:  # what MLX stores of a zero is rounded with its scale
            limit = 1e-3 * weight.zero.float() if mlx_folder else 0.0
            assert weight.zero.dtype == other.zero.dtype and bool(((weight.zero.float() - other.zero.float()).abs() <= limit).all()), name
    was, now = (load.read_packed(folder, checkpoint.any_config(folder))[0] for folder in (before, after))
    assert was.keys() == now.keys() and all(torch.equal(tensor, now[name]) and tensor.dtype == now[name].dtype for name, tensor in was.items())


def same_weights(one: Any, other: Any) -> bool:
    """Whether the packed layers of two models hold the same numbers."""
    mine, others = packed_linears(one), packed_linears(other)
    return mine.keys() == others.keys() and all(torch.equal(layer.weight[:], others[name].weight[:]) for name, layer in mine.items())
