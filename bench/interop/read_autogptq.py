"""Logits of GPTQ folders through auto-gptq 0.7.1, in float32 on a CPU. One JSON line a folder.

python read_autogptq.py FOLDER...

It knows the first version of the format only and misreads the second without a word: such folders are read like others, and their errors show it.
Its loader leaves tied embeddings unset (NaN logits, no error) and takes every linear of a block for packed (errors of 5): such models are loaded
by transformers, which runs auto-gptq's layers.
What the libraries print goes to stderr.
"""

import json
import logging
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from reading import Loaded, compare, refusal


def loaded(folder: Path) -> Loaded:
    """The model in float32, and how it was loaded."""
    config, used = json.loads((folder / "config.json").read_text("utf-8")), f"transformers {version('transformers')}"
    if config.get("tie_word_embeddings") or "modules_in_block_to_quantize" in config["quantization_config"]:
        from transformers import AutoModelForCausalLM, GPTQConfig

        options = GPTQConfig(bits=config["quantization_config"]["bits"], use_exllama=False)
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, device_map="cpu", quantization_config=options)
        return model, f"loaded by transformers, {used}"
    from auto_gptq import AutoGPTQForCausalLM

    model = AutoGPTQForCausalLM.from_quantized(
        str(folder), device="cpu", use_safetensors=True, use_triton=False, disable_exllama=True, disable_exllamav2=True,
        inject_fused_attention=False, inject_fused_mlp=False, torch_dtype=torch.float32, model_basename="model",
    )  # fmt: skip
    return model.model, f"loaded by auto_gptq, {used}"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for folder in map(Path, sys.argv[1:]):
        row = {"consumer": "auto-gptq", "version": version("auto-gptq"), "folder": folder.name}
        try:
            row |= compare(folder, lambda folder=folder: loaded(folder))
        except Exception as error:  # whatever the library raises
            row |= refusal(error)
        print(json.dumps(row), file=rows, flush=True)


if __name__ == "__main__":
    main()
