"""Bytes of task files, by formula and on disk: what one more task costs beside a base of 3 bits in groups of 128.

A safetensors file is 8 bytes of length, a header of JSON padded to a multiple of 8, and the numbers. `formula_bytes` counts the header from names,
shapes and metadata; `bytes` is a file that was written. Scales and zeros are [n, k/128] in float16, tables [n, 1, 8] in float16 (one a row), adapters
LoRA of rank 8 in float32 on every linear, as they are trained; QA-LoRA keeps zeros, whatever its rank. `tiny` is the embedded model with values that
moved at random; of LLaMA-7B all kinds are counted, and the scales written with values drawn at random to a temporary folder.
`base_share` is the file over the codes and values of the packed base.

    python bench/task_size.py
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import write_rows

from compressor import __version__
from compressor.export import task
from compressor.integrations import attach
from compressor.linear import linears, packed_linears, swap, to_packed
from compressor.packed import Affine, PackedWeight, Table
from compressor.pipelines import load, tasks, write
from compressor.pipelines.tuners import Tuning
from compressor.quant import rtn
from compressor.recipe import Quant, Tune

FIELDS = ["model", "kind", "tensors", "values", "formula_bytes", "bytes", "base_share", "torch", "compressor"]
BITS, GROUP, RANK, TOLERANCE = 3, 128, 8, 0.01
ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
BLOCK = {f"self_attn.{name}": (4096, 4096) for name in ATTENTION} | {f"mlp.{name}": shape for name, shape in FFN.items()}
LLAMA = {f"model.layers.{i}.{name}": shape for i in range(32) for name, shape in BLOCK.items()}  # [n, k] by module
KINDS = ("scale", "zero", "table", task.ADAPTER)
Shapes = dict[str, tuple[int, ...]]


def held(modules: dict[str, tuple[int, int]], kind: str) -> tuple[str, Shapes]:
    """The dtype and the shapes, by their names, of the tensors that a task of a kind holds for linears of these shapes [n, k]."""
    if kind == task.ADAPTER:
        paths = {name: {"lora_A": (RANK, k), "lora_B": (n, RANK)} for name, (n, k) in modules.items()}
        return "F32", {f"base_model.model.{name}.{part}.weight": shape for name, parts in paths.items() for part, shape in parts.items()}
    if kind == "table":
        return "F16", {f"{name}.table": (n, 1, 1 << BITS) for name, (n, _) in modules.items()}
    return "F16", {f"{name}.{kind}": (n, -(-k // min(GROUP, k))) for name, (n, k) in modules.items()}


def formula(dtype: str, shapes: Shapes, head: dict[str, Any]) -> int:
    """Bytes of a safetensors file of such tensors, with the task's header as metadata."""
    width, at = {"F16": 2, "F32": 4}[dtype], 0
    entries: dict[str, Any] = {"__metadata__": {task.ENTRY: json.dumps(head, sort_keys=True)}}
    for name, shape in sorted(shapes.items()):
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at := at + width * math.prod(shape)]}
    return 8 + 8 * math.ceil(len(json.dumps(entries, separators=(",", ":"))) / 8) + at


def base_bytes(modules: dict[str, tuple[int, int]], kind: str) -> float:
    """Codes of the packed linears with scales, or tables, in float16."""
    values = held(modules, "table" if kind == "table" else "scale")[1].values()
    return sum(n * k for n, k in modules.values()) * BITS / 8 + 2 * sum(map(math.prod, values))


def row(model: str, modules: dict[str, tuple[int, int]], kind: str, head: dict[str, Any], written: int | None) -> dict[str, Any]:
    dtype, shapes = held(modules, kind)
    size, base = formula(dtype, shapes, head), base_bytes(modules, kind)
    assert written is None or abs(size / written - 1) < TOLERANCE, (model, kind, size, written)
    out = {"model": model, "kind": kind, "tensors": len(shapes), "values": sum(map(math.prod, shapes.values())), "formula_bytes": size}
    return out | ({} if written is None else {"bytes": written}) | {"base_share": round((written or size) / base, 4)}


def packed_tiny(kind: str) -> load.Loaded:
    """`tiny` by round-to-nearest, its values moved; a table is the grid of a row."""
    loaded = load.load("tiny", "cpu")
    inner: Any = loaded.model
    names = linears(inner.model)
    write.round_to_folder(loaded, {f"model.{name}" for name in names})
    torch.manual_seed(0)
    for name, layer in names.items():
        weight, k = layer.weight.detach().float(), layer.in_features
        held, _ = rtn.pack(weight, None, Quant(), k if kind == "table" else min(GROUP, k), torch.float16)
        values: Affine | Table = Affine(held.learned, torch.randn(held.learned.shape).half() + 4) if kind == "zero" else Affine(held.learned)
        if kind == "table":
            values = Table((held.learned.float().unsqueeze(-1) * (torch.arange(8.0) - 4)).half())
        swap(inner.model, name, to_packed(layer, PackedWeight.pack(held.codes(), values, BITS, held.group)))
    return loaded


def tiny_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for kind in KINDS:
        loaded = packed_tiny(kind)
        modules = {name: (layer.out_features, layer.in_features) for name, layer in packed_linears(loaded.model).items()}
        if kind == task.ADAPTER:
            Tuning(loaded, Tune(method="lora", rank=RANK), 42, 1).finish()
        path = folder / kind
        tasks.save(loaded, path, {"model": "tiny"})
        yield row("tiny", modules, kind, task.read_header(path).header(), path.stat().st_size)


def llama_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The metadata of an adapter, its configuration, is that of peft for these modules."""
    for kind in KINDS:
        found = task.Task(kind, "0" * 64, {}, "llama-7b", config=configuration() if kind == task.ADAPTER else {})
        written = None
        if kind == "scale":
            draw = torch.Generator().manual_seed(0)
            values = {name.removesuffix(".scale"): torch.rand(shape, generator=draw).half() for name, shape in held(LLAMA, kind)[1].items()}
            bare = {name: PackedWeight(torch.empty(0, dtype=torch.int32), Affine(value), BITS, GROUP, LLAMA[name]) for name, value in values.items()}
            task.write(folder / "llama", task.Task(kind, found.base, values, found.model), bare)
            written = (folder / "llama").stat().st_size
            (folder / "llama").unlink()
        yield row("llama-7b", LLAMA, kind, found.header(), written)


def configuration() -> dict[str, Any]:
    """What peft says of a LoRA on the linears of LLaMA-7B, made beside a small model of the same names."""
    loaded = packed_tiny("scale")
    Tuning(loaded, Tune(method="lora", rank=RANK), 42, 1).finish()
    return attach.plain(loaded.adapter) | {"target_modules": sorted(LLAMA)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "task_size.csv")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for each in (*tiny_rows(Path(folder)), *llama_rows(Path(folder))):
            rows.append(each | {"torch": torch.__version__, "compressor": __version__})
            print({key: rows[-1].get(key) for key in FIELDS[:-2]}, flush=True)
    write_rows(args.output, FIELDS, rows)


if __name__ == "__main__":
    main()
