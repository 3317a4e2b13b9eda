"""Logits of compressed-tensors folders through transformers; asymmetric ones by both routes, as is and with dequantize=True. One JSON line a row.

python read_compressed_tensors.py FOLDER...
"""

import json
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def measure(folder: Path, options: dict) -> dict:
    with np.load(folder / "reference.npz") as file:
        ids, wanted, greedy = torch.from_numpy(file["ids"])[None], torch.from_numpy(file["logits"]), file["greedy"].tolist()
    began = time.perf_counter()
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    odd = [*info["missing_keys"], *info["mismatched_keys"]]
    if odd:
        raise RuntimeError(f"weights would be random: {odd[0]}")
    with torch.no_grad():
        got, longer = model.eval()(ids).logits[0].float(), ids
        for _ in greedy:
            longer = torch.cat([longer, model(longer).logits[:, -1:].argmax(-1)], 1)
    error = (got - wanted).abs()
    return {
        "max_abs_error": float(error.max()), "mean_abs_error": float(error.mean()), "logit_std": float(wanted.std()),
        "argmax_agreement": float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
        "greedy_equal": longer[0, ids.shape[1] :].tolist() == greedy, "seconds": time.perf_counter() - began,
        "note": f"transformers {version('transformers')}",
    }  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    for folder in map(Path, sys.argv[1:]):
        groups = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]["config_groups"].values()
        routes = {"compressed-tensors": {}}
        if not all(group["weights"]["symmetric"] for group in groups):
            routes["compressed-tensors, dequantize=True"] = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        for consumer, options in routes.items():
            row = {"consumer": consumer, "version": version("compressed-tensors"), "folder": folder.name}
            try:
                row |= measure(folder, options)
            except Exception as error:  # whatever the library raises
                row |= {"refused": next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
