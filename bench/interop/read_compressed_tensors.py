"""Logits of compressed-tensors folders through transformers; asymmetric ones by both routes, as is and with dequantize=True. One JSON line a row.

python read_compressed_tensors.py FOLDER...
"""

import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from reading import Loaded, compare, refusal
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def loaded(folder: Path, options: dict) -> Loaded:
    """The model in float32; RuntimeError where weights would be random."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    odd = [*info["missing_keys"], *info["mismatched_keys"]]
    if odd:
        raise RuntimeError(f"weights would be random: {odd[0]}")
    return model, f"transformers {version('transformers')}"


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
                row |= compare(folder, lambda folder=folder, options=options: loaded(folder, options))
            except Exception as error:  # whatever the library raises
                row |= refusal(error)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
