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
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch


def loaded(folder: Path, config: dict) -> tuple[torch.nn.Module, str]:
    """The model in float32, and how it was loaded."""
    if config.get("tie_word_embeddings") or "modules_in_block_to_quantize" in config["quantization_config"]:
        from transformers import AutoModelForCausalLM, GPTQConfig

        options = GPTQConfig(bits=config["quantization_config"]["bits"], use_exllama=False)
        return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, device_map="cpu", quantization_config=options), "transformers"
    from auto_gptq import AutoGPTQForCausalLM

    model = AutoGPTQForCausalLM.from_quantized(
        str(folder), device="cpu", use_safetensors=True, use_triton=False, disable_exllama=True, disable_exllamav2=True,
        inject_fused_attention=False, inject_fused_mlp=False, torch_dtype=torch.float32, model_basename="model",
    )  # fmt: skip
    return model.model, "auto_gptq"


def measure(folder: Path) -> dict:
    with np.load(folder / "reference.npz") as file:
        ids, wanted, greedy = torch.from_numpy(file["ids"])[None], torch.from_numpy(file["logits"]), file["greedy"].tolist()
    began = time.perf_counter()
    model, by = loaded(folder, json.loads((folder / "config.json").read_text("utf-8")))
    model.eval()
    with torch.no_grad():
        got, longer = model(ids).logits[0].float(), ids
        for _ in greedy:
            longer = torch.cat([longer, model(longer).logits[:, -1:].argmax(-1)], 1)
    error = (got - wanted).abs()
    return {
        "max_abs_error": float(error.max()), "mean_abs_error": float(error.mean()), "logit_std": float(wanted.std()),
        "argmax_agreement": float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
        "greedy_equal": longer[0, ids.shape[1] :].tolist() == greedy, "seconds": time.perf_counter() - began,
        "note": f"loaded by {by}, transformers {version('transformers')}",
    }  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for folder in map(Path, sys.argv[1:]):
        row = {"consumer": "auto-gptq", "version": version("auto-gptq"), "folder": folder.name}
        try:
            row |= measure(folder)
        except Exception as error:  # whatever the library raises
            row |= {"refused": next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]}
        print(json.dumps(row), file=rows, flush=True)


if __name__ == "__main__":
    main()
