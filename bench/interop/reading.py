"""What the reader scripts share: comparing a torch model with a folder's reference, its greedy continuation, and refusals as one line."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Loaded = tuple[torch.nn.Module, str]  # a model that computes float32 logits, and a note on how it was loaded


def greedy(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """ids [1, T] with the `count` likeliest next tokens appended one by one."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def compare(folder: Path, load: Callable[[], Loaded]) -> dict[str, Any]:
    """The row of a folder: its reference.npz beside what the model that `load` gives computes; seconds count loading, too."""
    with np.load(folder / "reference.npz") as file:
        ids, wanted, after = torch.from_numpy(file["ids"])[None], torch.from_numpy(file["logits"]), file["greedy"].tolist()
    began = time.perf_counter()
    model, note = load()
    model.eval()
    with torch.no_grad():
        got = model(ids).logits[0].float()
    error = (got - wanted).abs()
    return {
        "max_abs_error": float(error.max()), "mean_abs_error": float(error.mean()), "logit_std": float(wanted.std()),
        "argmax_agreement": float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
        "greedy_equal": greedy(model, ids, len(after))[0, ids.shape[1] :].tolist() == after,
        "seconds": time.perf_counter() - began, "note": note,
    }  # fmt: skip


def refusal(error: BaseException) -> dict[str, str]:
    """Whatever a library raised, as the first line that says something."""
    return {"refused": next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]}
