"""The small commands: eval, generate, inspect, doctor. Each returns the JSON document that the CLI prints."""

import importlib.util
import json
import time
from typing import Any

import torch
from rich.table import Table

from compressor.errors import RecipeError
from compressor.export import sparse
from compressor.integrations import peft
from compressor.kernels import dispatch
from compressor.packed import Table as TableValues
from compressor.pipelines import adapters, checkpoint, digests, load, write
from compressor.pipelines.generate import generate
from compressor.pipelines.output import read_report
from compressor.pipelines.report import environment, size
from compressor.pipelines.show import Show


def evaluate_folder(model: str, source: str | None, window: int | None, max_tokens: int, device: str, show: Show) -> dict[str, Any]:
    """One model on one text, or an encoder on its task, measured anew: what `compressor eval` prints. source None: builtin text."""
    from compressor.pipelines.measure import compare

    data = () if source is None else (source,)
    return compare.evaluate_all(compare.Asked((model,), data, window=window, max_tokens=max_tokens, device=device), show)


def sizes_of(loaded: load.Loaded) -> dict[str, Any]:
    """bits_per_weight, folder_bytes, and ratio to the dense folder (from report.json; for foreign folders to 16 bits a parameter).

    Bits are those of the base alone, bytes those of an adapter too.
    """
    total = checkpoint.model_bytes(loaded.folder) + adapters.stored_bytes(loaded.folder)
    with peft.set_aside(loaded):
        packed = load.packed_weights(loaded.model)
        if (loaded.config.get("quantization_config") or {}).get("quant_method") == sparse.METHOD:
            bits = write.bits_per_weight(write.block_weights(loaded), sparse=True)
        elif packed:
            bits = write.folder_bits(loaded.folder, packed)
        else:
            return {"bits_per_weight": float(torch.finfo(checkpoint.stored_dtype(loaded.folder)).bits), "folder_bytes": total, "ratio": 1.0}
        return {"bits_per_weight": bits, "folder_bytes": total, "ratio": dense_bytes(loaded) / total}


def dense_bytes(loaded: load.Loaded) -> int:
    try:
        return int(read_report(loaded.folder)["model"]["dense_bytes"])
    except (KeyError, TypeError, ValueError):
        rest = sum(p.numel() for p in loaded.model.parameters())
        return 2 * (rest + sum(w.shape[0] * w.shape[1] for w in load.packed_weights(loaded.model).values()))


def generate_text(
    model: str, prompts: list[str], max_new_tokens: int, temperature: float, seed: int, device: str, compiled: bool = False
) -> dict[str, Any]:
    """Greedy (temperature 0) or sampled continuations of one or several prompts, decoded together, through transformers' generate with its KV cache.

    `compiled` lays the cache out once and has transformers compile the decoding step, which on a GPU becomes a replayed CUDA graph.
    """
    if not temperature >= 0 or max_new_tokens < 1 or not prompts or not all(prompts):
        raise RecipeError("temperature must be 0 or more, max-new-tokens at least 1, and the prompt not empty")
    if compiled and load.pick_device(device).type != "cuda":
        raise RecipeError("--compile pays on a GPU only; leave it out here")
    loaded = load.load(model, device)
    torch.manual_seed(seed)
    options: dict[str, Any] = {} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    if compiled:
        options["cache_implementation"] = "static"
    start = time.perf_counter()
    fresh = generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens, **options)
    seconds = time.perf_counter() - start
    texts = [loaded.tokenizer.decode(row, skip_special_tokens=True) for row in fresh]
    tokens = sum(map(len, fresh))
    document = {"model": model, "prompt": prompts[0], "text": texts[0]} if len(prompts) == 1 else {"model": model, "prompts": prompts, "texts": texts}
    return document | {"tokens": tokens, "tokens_per_second": tokens / seconds}


def inspect_folder(model: str) -> tuple[dict[str, Any], Table]:
    """Sizes, the adapter if there is one, and one row per packed layer with the error that report.json recorded when it was packed."""
    loaded = load.load(model, "cpu")
    with peft.set_aside(loaded):
        packed = load.packed_weights(loaded.model)
    errors = {row["name"]: row for row in read_report(loaded.folder).get("layers", [])}
    table = Table("layer", "shape", "bits", "group", "grid", "error", "note", title=f"{model}: {len(packed)} packed linears")
    rows = []
    for name, weight in packed.items():
        row = {
            "name": name, "shape": list(weight.shape), "bits": weight.bits, "group": weight.group,
            "symmetric": None if isinstance(weight.values, TableValues) else weight.zero is None, "float_zeros": weight.float_zeros,
            "error": errors.get(name, {}).get("error"), "note": errors.get(name, {}).get("note", ""),
        }  # fmt: skip
        rows.append(row)
        error = "" if row["error"] is None else f"{row['error']:.4f}"
        grid = "float zeros" if weight.float_zeros else {None: "table", True: "sym", False: "asym"}[row["symmetric"]]
        table.add_row(name, "×".join(map(str, weight.shape)), str(weight.bits), str(weight.group), grid, error, row["note"])
    document = {"model": model, "architecture": loaded.config["architectures"][0]} | sizes_of(loaded) | {"digests": digests.recorded(loaded.folder)}
    captions = [digests.mention(document["digests"])]
    if loaded.adapter is not None:
        document["adapter"] = told = _adapter(loaded)
        rank = "" if told["rank"] is None else f" of rank {told['rank']}"
        numbers = f"{told['parameters']:,} numbers, {size(told['bytes'])}"
        captions.insert(0, f"adapter: {told['kind']}{rank} beside {told['linears']} of {len(packed)} linears, {numbers}")
    table.caption = "\n".join(captions)
    return document | {"layers": rows}, table


def _adapter(loaded: load.Loaded) -> dict[str, Any]:
    """kind, as `--tune` calls it; rank, if it has one; linears beside which it is; numbers that were trained; bytes of its folder."""
    config, kind = loaded.adapter.peft_config[peft.NAME], adapters.kind(loaded)
    return {
        "kind": kind, "rank": getattr(config, "target_r" if kind == "adalora" else "r", None),
        "linears": sum(hasattr(module, "base_layer") for module in loaded.model.modules()),
        "parameters": sum(t.numel() for t in peft.state(loaded.adapter).values()), "bytes": adapters.stored_bytes(loaded.folder),
    }  # fmt: skip


def diagnose() -> tuple[dict[str, Any], Table]:
    """Versions, device, kernels, and the extras that are there or not."""
    extras = {name: importlib.util.find_spec(name) is not None for name in ("triton", "numba", "datasets")}
    gpu = torch.cuda.is_available()
    document = environment("cuda" if gpu else "cpu")
    document |= {"gpu": torch.cuda.get_device_name() if gpu else None, "kernels": dispatch.describe(), "extras": extras}
    table = Table("", "", show_header=False)
    for key, value in document.items():
        table.add_row(key, json.dumps(value) if isinstance(value, dict) else str(value))
    return document, table
