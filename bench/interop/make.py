"""Writes the folders of one step of run.py with our package: OUT/NAME/ with the export, cell.json (what it is) and reference.npz (what it computes).

reference.npz: ids int64 [T]; logits float32 [T, V] and greedy int64 [N] of our packed forward, in float32 on a CPU, on the weights that the format
holds; greedy ends before an end of text, where some readers stop. served.json, of models that write text: a prompt, and what our greedy generation
appends to it. Weights are packed by round-to-nearest, tables by k-means: what is checked is the way to other software, not the quality of grids.
Exports do not prove themselves by consumers that happen to be installed here, because the readers do.

    python bench/interop/make.py STEP OUT [--fast]
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from reading import greedy
from torch import Tensor, nn

from compressor import linear
from compressor.errors import CompressorError
from compressor.export import gptq as gptq_format
from compressor.integrations import consumers
from compressor.packed import Affine, PackedWeight
from compressor.pipelines import checkpoint, compress, load, projection, write, writers
from compressor.pipelines.export import export
from compressor.quant import rtn
from compressor.recipe import Quant
from compressor.sketch import learned

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"
NATIVE = ("compressed-tensors", "table", "sparse")
RANDOM, SHORT, IDS, GREEDY = "random256", "stories260K", 24, 12  # SHORT: rows of 64 and of 172
TOKENS = 2048  # that an export measures a loss on: not what is looked at here
PROMPTS = {"tiny": "The value of", "babyllama": "Once upon a time", SHORT: "Once upon a time"}
SHAPE = {  # rows of 256 and 768, as K-quants want them
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.08, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One folder. to: a target of our export, or of NATIVE; cannot: what our export must answer where it refuses."""

    model: str
    to: str
    bits: int
    group: int  # -1: whole rows
    symmetric: bool | None  # None: tables
    act_order: bool = False
    cannot: str = ""
    served: bool = True  # a text, too, of models that write some

    @property
    def name(self) -> str:
        grid = {True: "sym", False: "asym", None: "values"}[self.symmetric] + ("-act" if self.act_order else "")
        return f"{self.model}-{self.to.replace(':', '-')}-{self.bits}bit-g{self.group if self.group > 0 else 'row'}-{grid}"


def compressed_tensors(fast: bool) -> list[Cell]:
    grids = [(4, 32, True), (3, 32, True), (2, 32, True), (4, 32, False), (3, 32, False), (2, 32, False)]
    more = [] if fast else [(3, 128, True), (3, -1, True), (4, 128, False), (4, -1, True), (4, -1, False), (2, 4, True), (2, 4, False)]
    return [Cell(model, "compressed-tensors", *grid) for model in models(fast) for grid in grids + more if fits(model, grid[1])]


def gptq(fast: bool) -> list[Cell]:
    grids = [(4, 32, True), (3, 32, True), (2, 32, True), (4, 32, False), (3, 32, False), (2, 32, False)]
    more = [] if fast else [(3, -1, True), (4, 128, False), (8, 64, True), (8, 64, False)]
    cells = [Cell(model, "gptq", *grid) for model in models(fast) if model != SHORT for grid in grids + more if fits(model, grid[1])]
    acts = [Cell(RANDOM, "gptq", bits, 64, symmetric, True) for bits in (4, 3, 2) for symmetric in (True, False)]
    short = [Cell(SHORT, "gptq", 4, -1, True, cannot="172")] if SHORT in models(fast) else []
    return cells if fast else [*cells, *acts, *short]


def gptqmodel(fast: bool) -> list[Cell]:
    second = [Cell(RANDOM, "gptq_v2", bits, 32, False) for bits in (4, 3, 2)]
    return gptq(fast) + second + [Cell(RANDOM, "awq", 4, 64, False), Cell(RANDOM, "awq", 4, 128, True)]


def autogptq(fast: bool) -> list[Cell]:
    return [*gptq(fast), Cell(RANDOM, "gptq_v2", 2, 32, False)]


def gguf(fast: bool) -> list[Cell]:
    cells = [Cell(RANDOM, "gguf:q4_0", 4, 32, True), Cell(RANDOM, "gguf:q4_1", 4, 32, False), Cell(RANDOM, "gguf:q3_k", 3, 256, True)]
    cells += [Cell(RANDOM, "gguf:q2_k", 2, 256, False), Cell(RANDOM, "gguf:q4_k", 4, 32, False), Cell(RANDOM, "gguf:f16", 3, 128, True)]
    cells += [Cell("tiny", "gguf:f16", 3, 128, True), Cell("tiny", "gguf:q4_0", 4, 32, True)]
    if fast:
        return cells
    cells += [Cell(RANDOM, "gguf:q8_0", 4, 64, True), Cell(RANDOM, "gguf:auto", 3, 64, False), Cell(RANDOM, "gguf:q4_0", 3, 64, True)]
    cells += [Cell("tiny", "gguf:q8_0", 4, 32, True), Cell(SHORT, "gguf:q4_0", 4, -1, True)]
    cells += [Cell("babyllama", f"gguf:{kind}", 4, 32, kind != "q4_1") for kind in ("f16", "q8_0", "q4_0", "q4_1")]
    return [cell for cell in cells if cell.model in models(fast)]


def mlx_cells(fast: bool) -> list[Cell]:
    grids = [(4, 64, True), (3, 32, False), (2, 64, True), (4, 32, False), (3, 64, True), (2, 32, False)]
    more = [] if fast else [(3, 128, True), (2, 128, False), (3, -1, True), (4, 256, False), (8, 64, False)]
    cells = [Cell(model, "mlx", *grid) for model in models(fast) for grid in grids + more if fits(model, grid[1])]
    cannot = [Cell(RANDOM, "mlx", 4, 16, True, cannot="groups of 16 columns")]
    cannot += [] if SHORT not in models(fast) else [Cell(SHORT, "mlx", 4, -1, True, cannot="groups of 172 columns")]
    return [cell for cell in cells if cell.model != SHORT] + cannot


def vllm(fast: bool) -> list[Cell]:
    grids = [("table", 3, -1, None), (NATIVE[0], 4, 128, True), (NATIVE[0], 3, 128, True), ("gptq", 4, 128, True), ("gptq", 3, 128, True)]
    more = [("table", 2, -1, None), ("table", 4, -1, None), ("sparse", 3, 64, False), ("gptq", 4, 128, False), ("gptq", 2, 64, False)]
    more += [(NATIVE[0], bits, group, symmetric) for bits, group, symmetric in ((4, 32, False), (3, 32, False), (2, 32, True), (2, 64, False))]
    cells = [Cell(model, *grid, served=grid[0] != "gptq") for model in (RANDOM, "tiny") for grid in grids] + [Cell(RANDOM, *grid) for grid in more]
    cells += [Cell("tiny", NATIVE[0], 2, 32, False, served=False)]
    narrow = [Cell("babyllama", *grid, served=False) for grid in (("table", 3, -1, None), (NATIVE[0], 4, 32, True))]
    return [*cells, *(narrow if "babyllama" in models(fast) else [])]


CELLS = {
    "compressed-tensors": compressed_tensors, "compressed-tensors-0.17": lambda fast: [c for c in compressed_tensors(True) if c.model == RANDOM],
    "gptqmodel": gptqmodel, "autogptq": autogptq, "gguf": gguf, "mlx": mlx_cells, "vllm": vllm,
}  # fmt: skip


def models(fast: bool) -> list[str]:
    """The models that are here, by name."""
    return [RANDOM, "tiny"] if fast else [RANDOM, "tiny", *(name for name in ("babyllama", SHORT) if (MODELS / name).is_dir())]


def fits(model: str, group: int) -> bool:
    """Whether groups of this many columns divide the rows of a model."""
    return group < 0 or {RANDOM: 256, "tiny": 128, "babyllama": 32, SHORT: 4}[model] % group == 0


def random_model(folder: Path) -> None:
    """A random LLaMA with the tokenizer of `tiny`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocab = json.loads((checkpoint.TINY / "config.json").read_text("utf-8"))["vocab_size"]
    LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=vocab)).half().save_pretrained(folder)
    write.copy_companions(checkpoint.TINY, folder)


def packed(cell: Cell, source: Path) -> load.Loaded:
    """The model with its linears packed as the cell says."""
    loaded = load.load(str(source) if cell.model != "tiny" else "tiny", "cpu")
    quant = Quant(bits=min(cell.bits, 4), group=cell.group, symmetric=cell.symmetric, packer="rtn")
    names = {target.name for target in compress.plan(loaded.model, quant).packed()}
    write.round_to_folder(loaded, names)
    dtype, random = load.scale_dtype("auto", loaded.dtype), torch.Generator().manual_seed(7)
    for name in sorted(names):
        layer = loaded.model.get_submodule(name)
        w = layer.weight.detach().float()
        k = w.shape[1]
        group = k if cell.group < 0 else cell.group
        columns = torch.randperm(k, generator=random) if cell.act_order else None
        if cell.to == "table":
            weight, _ = learned.pack(w, None, dataclasses.replace(quant, packer="sketch"), group, dtype)
        else:
            weight, _ = rtn.pack(w if columns is None else w[:, columns], None, dataclasses.replace(quant, bits=cell.bits), group, dtype)
        if cell.to == "sparse":  # zeros between the integers, as tuning leaves them
            weight = dataclasses.replace(weight, values=Affine(weight.learned, (weight.zero + 0.25).to(dtype)))
        linear.swap(loaded.model, name, linear.to_packed(layer, dataclasses.replace(weight, columns=columns)))
    return loaded


def exported(loaded: load.Loaded, cell: Cell, work: Path, out: Path) -> None:
    """The packed model as a folder of ours, act-order as one of GPTQ, and that exported."""
    if cell.to in NATIVE:
        write.write_folder(loaded, out)
        return
    source = work / "packed"
    shutil.rmtree(source, ignore_errors=True)
    if cell.act_order:
        foreign(loaded, source)
    else:
        write.write_folder(loaded, source)
    with patch.object(consumers, "installed", return_value=False):
        export(str(source), out, projection.Target(to=cell.to, max_tokens=TOKENS, device="cpu"))


def foreign(loaded: load.Loaded, folder: Path) -> None:
    """A GPTQ folder, which holds columns in another order."""
    folder.mkdir()
    dense = {name: t.to(loaded.dtype) if t.is_floating_point() else t for name, t in write.dense_tensors(loaded).items()}
    config = {key: value for key, value in loaded.config.items() if key not in ("torch_dtype", "quantization_config")}
    stream = [*dense.items(), *load.packed_weights(loaded.model).items()]
    gptq_format.V2.write(folder, config | {"dtype": str(loaded.dtype).removeprefix("torch.")}, stream, sorted(linear.linears(loaded.model)))
    write.copy_companions(loaded.folder, folder)


def held(weight: PackedWeight, to: str) -> PackedWeight | Tensor:
    """What a format holds of a weight."""
    found = None if to in NATIVE else writers.of(to)
    return weight if found is None else found.held(weight)


def hold(loaded: load.Loaded, to: str) -> None:
    """Give every packed layer the weight that the format holds of it."""
    for name, layer in linear.packed_linears(loaded.model).items():
        value = held(layer.packed(), to)
        if isinstance(value, PackedWeight):
            linear.swap(loaded.model, name, linear.PackedLinear(value, layer.bias))
        else:
            dense = nn.Linear(value.shape[1], value.shape[0], bias=layer.bias is not None)
            dense.weight, dense.bias = nn.Parameter(value, requires_grad=False), layer.bias
            linear.swap(loaded.model, name, dense)


def reference(model: Any, vocab: int) -> dict[str, np.ndarray]:
    """What our forward computes: ids [T], logits [T, V], and the greedy continuation [N] of ids, up to an end of text."""
    ids = torch.randint(1, vocab, (1, IDS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits[0].float()
    after, ends = greedy(model, ids, GREEDY)[0, IDS:], model.config.eos_token_id
    stops = torch.isin(after, torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends])).nonzero()
    return {"ids": ids[0].numpy(), "logits": logits.numpy(), "greedy": after[: int(stops[0]) if len(stops) else None].numpy()}


def served(model: Any, tokenizer: Any, name: str) -> dict[str, Any]:
    """A prompt, and the text that our greedy generation appends to it."""
    ids = tokenizer(PROMPTS[name], return_tensors="pt").input_ids
    longer = greedy(model, ids, 2 * GREEDY)
    before, after = (tokenizer.decode(row[0], skip_special_tokens=True) for row in (ids, longer))
    return {"prompt": PROMPTS[name], "text": after.removeprefix(before), "tokens": 2 * GREEDY}


def make(cell: Cell, source: Path, work: Path, out: Path) -> None:
    """One folder, or what our export says where it refuses."""
    facts = dataclasses.asdict(cell)
    shutil.rmtree(out, ignore_errors=True)
    try:
        loaded = packed(cell, source)
        exported(loaded, cell, work, out)
    except Exception as error:  # a refusal, which is one sentence, or a fault of ours: a row that is as nobody expects
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / "cell.json").write_text(
            json.dumps(facts | {"refused": str(error) if isinstance(error, CompressorError) else f"{type(error).__name__}: {error}"}), "utf-8"
        )
        return
    hold(loaded, cell.to)
    np.savez(out / "reference.npz", **reference(loaded.model.eval(), loaded.config["vocab_size"]))
    if cell.served and cell.model in PROMPTS:
        (out / "served.json").write_text(json.dumps(served(loaded.model, loaded.tokenizer, cell.model)), "utf-8")
    (out / "cell.json").write_text(json.dumps(facts), "utf-8")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("step", choices=list(CELLS))
    ap.add_argument("out", type=Path)
    ap.add_argument("--fast", action="store_true")
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        random_model(work / RANDOM)
        for cell in CELLS[a.step](a.fast):
            make(cell, work / RANDOM if cell.model == RANDOM else MODELS / cell.model, work, a.out / cell.name)
            print(cell.name, flush=True)


if __name__ == "__main__":
    main()
