"""Logits of GPTQ and AWQ folders through transformers and GPTQModel, on its plain torch kernel. One JSON line a folder.

python read_gptqmodel.py FOLDER...

The kernel is asked for by name: on a CPU the automatic choice is int4pack at 4 bits, which rounds scales to bfloat16 (errors of 6e-2). Folders whose
layers have different bits (`dynamic`) are loaded by GPTQModel itself, because the way through transformers does not know them; it takes no float32.
What the libraries print goes to stderr.
"""

import json
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the kernel compiles its dequantiser otherwise, for minutes

import torch
from reading import Loaded, compare, refusal
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

BACKENDS = {"gptq": "gptq_torch", "awq": "torch_awq"}


def loaded(folder: Path, config: dict) -> Loaded:
    """The model in float32, and how it was loaded."""
    if any(key.startswith("+:") for key in config.get("dynamic") or {}):
        from gptqmodel import BACKEND, GPTQModel

        return told(GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model, "GPTQModel.load in float16")
    kind = GPTQConfig if config["quant_method"] == "gptq" else AwqConfig
    options = kind(bits=config["bits"], group_size=config["group_size"], backend=BACKENDS[config["quant_method"]])
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=options, output_loading_info=True
    )
    odd = [*info["missing_keys"], *info["mismatched_keys"]]
    if odd:
        raise RuntimeError(f"weights would be random: {odd[0]}")
    return told(model, f"transformers {version('transformers')}")


def told(model: torch.nn.Module, note: str) -> Loaded:
    """The model with a note that names its kernels, too."""
    return model, f"{note}; {', '.join(sorted({type(m).__name__ for m in model.modules() if hasattr(m, 'qweight')}))}"


def main() -> None:
    warnings.simplefilter("ignore")
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for folder in map(Path, sys.argv[1:]):
        config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
        row = {"consumer": "gptqmodel", "version": version("gptqmodel"), "folder": folder.name}
        try:
            row |= compare(folder, lambda folder=folder, config=config: loaded(folder, config))
        except Exception as error:  # whatever the libraries raise
            row |= refusal(error)
        print(json.dumps(row), file=rows, flush=True)


if __name__ == "__main__":
    main()
