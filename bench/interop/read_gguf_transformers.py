"""transformers' own reader of GGUF files on exported folders: the same blocks decoded by the gguf package, float32 arithmetic.

    python bench/interop/read_gguf_transformers.py FOLDER...

Runs in an environment of its own (pip install transformers gguf accelerate torch), without compressor. Every folder holds one .gguf file and
reference.npz: ids int64 [T]; logits float32 [T, V] of the packed forward; greedy int64 [N]; and, if the file holds other numbers than the packed
model (float16 embeddings, re-fitted scales), `held`, float32 [T, V], the logits of those: `held_max_abs_error` must then be 0 but for rounding. One
JSON line a folder.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from reading import refusal


def compare(folder: Path) -> dict[str, Any]:
    start, reference = time.time(), np.load(folder / "reference.npz")
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(f"{len(found)} .gguf files, where there must be one")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=found[0].name, dtype=torch.float32).eval()
    ids, logits = torch.from_numpy(reference["ids"]), reference["logits"]
    with torch.no_grad():
        seen = model(ids[None]).logits[0].float().numpy()
        greedy = None
        if "greedy" in reference:
            made = model.generate(ids[None], max_new_tokens=len(reference["greedy"]), do_sample=False)[0, len(ids) :]
            greedy = made.tolist() == reference["greedy"].tolist()
    error = np.abs(seen - logits)
    held = {"held_max_abs_error": float(np.abs(seen - reference["held"]).max())} if "held" in reference else {}
    return {
        "max_abs_error": float(error.max()),
        "mean_abs_error": float(error.mean()),
        "logit_std": float(logits.std()),
        "argmax_agreement": float((seen.argmax(-1) == logits.argmax(-1)).mean()),
        "greedy_equal": greedy,
        "seconds": round(time.time() - start, 2),
        "note": "",
    } | held


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        line = {"consumer": "transformers GGUF", "version": transformers.__version__, "folder": folder.name}
        try:
            line |= compare(folder)
        except Exception as error:  # whatever a consumer raises is its refusal
            line |= refusal(error)
        print(json.dumps(line))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
