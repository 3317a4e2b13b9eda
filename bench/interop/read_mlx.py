"""Logits of MLX folders through mlx_lm, in float32 on a CPU. One JSON line a folder.

python read_mlx.py FOLDER...
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model


def measure(folder: Path) -> dict:
    with np.load(folder / "reference.npz") as file:
        ids, wanted, greedy = file["ids"].tolist(), file["logits"], file["greedy"].tolist()
    began = time.perf_counter()
    model, _ = load_model(folder)  # strict: a tensor that lacks or is left over is an error
    model.set_dtype(mx.float32)
    got, longer = np.array(model(mx.array([ids]))[0].astype(mx.float32)), list(ids)
    for _ in greedy:
        longer.append(int(mx.argmax(model(mx.array([longer]))[0, -1])))
    error = np.abs(got - wanted)
    return {
        "max_abs_error": float(error.max()), "mean_abs_error": float(error.mean()), "logit_std": float(wanted.std()),
        "argmax_agreement": float((got.argmax(-1) == wanted.argmax(-1)).mean()), "greedy_equal": longer[len(ids) :] == greedy,
        "seconds": time.perf_counter() - began, "note": f"mlx {version('mlx')}, {type(model.layers[0].mlp.up_proj).__name__}",
    }  # fmt: skip


def main() -> None:
    mx.set_default_device(mx.cpu)
    for folder in map(Path, sys.argv[1:]):
        row = {"consumer": "mlx-lm", "version": version("mlx-lm"), "folder": folder.name}
        try:
            row |= measure(folder)
        except Exception as error:  # whatever the library raises
            row |= {"refused": next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
