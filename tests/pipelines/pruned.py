"""What the tests of pruning share: small models in folders, windows, and whole runs without sample texts."""

import contextlib
import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from compressor.pipelines import load, render
from compressor.pipelines.pruning import heeded
from compressor.pipelines.run import Run, run
from compressor.recipe import Prune, Recipe
from compressor.tune.batches import CausalLM
from tests.prune.helpers import causal

WORDS = "the def return import for in class of to self print value list"
QUICK = Recipe().with_(
    device="cpu", data__seqlen=32, data__nsamples=4, eval__max_tokens=128, tune__steps=3, tune__batch=4, quant__packer="none",
)  # fmt: skip
PRUNING = {"steps": 12, "batch": 4, "gradients": 6, "rank": 4, "start": "random", "begin": 0.1, "end": 0.9}
KEYS = {
    "method": "loraprune", "ratio": 0.4, "steps": 12, "batch": 2, "every": 2, "rank": 2, "alpha": 4.0, "multiple": 4, "gradients": 6,
    "begin": 0.1, "end": 0.9,
}  # fmt: skip


def options(**keys: Any) -> Prune:
    """KEYS, as far as the method reads them, and `keys`."""
    return Prune(**_read(KEYS, {"method": KEYS["method"], "ratio": KEYS["ratio"]} | keys))


def quick(**changes: Any) -> Recipe:
    """A recipe of a short run: QUICK, PRUNING as far as the method reads it, and `changes`."""
    recipe = QUICK.with_(**changes)
    if recipe.prune.method == "none":
        return recipe
    return recipe.with_(
        **{
            f"prune__{key}": value
            for key, value in _read(PRUNING, {"method": recipe.prune.method, "ratio": recipe.prune.ratio, "pattern": recipe.prune.pattern}).items()
        }
        | changes
    )


def _read(usual: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    known = heeded(Prune(**{key: given[key] for key in ("method", "ratio", "pattern") if key in given}))
    return {key: value for key, value in usual.items() if key in known} | given


def source(folder: Path, tokenizer: Any, kind: str = "llama", keys: int = 4, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A small random model as a folder."""
    causal(kind, keys, vocab_size=320, **config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def objective(count: int = 16, length: int = 12) -> CausalLM:
    ids = torch.randint(5, 320, (count, length), generator=torch.Generator().manual_seed(0))
    return CausalLM(ids, ids)


def text(count: int = 3, length: int = 20, vocabulary: int = 320) -> Tensor:
    return torch.randint(5, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def ours(folder: Path) -> Any:
    return load.load(str(folder), "cpu").model.float()


def theirs(folder: Path) -> Any:
    """The folder in stock transformers; every weight must be where it belongs."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def whole(folder: Path, page: bool = False, **changes: Any) -> dict[str, Any]:
    """A run of QUICK with changes on short texts, without samples and, unless asked for, the page: they take most of the time of such a run."""
    texts = {"data__data": folder.parent / "domain.txt", "data__outside": folder.parent / "outside.txt"}
    for seed, path in enumerate(texts.values()):
        words = random.Random(seed).choices(WORDS.split(), k=4000)
        path.write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, len(words), 10)))
    with patch.object(Run, "_samples", lambda self: False), contextlib.ExitStack() as stack:
        if not page:
            stack.enter_context(patch.object(render, "write_html", lambda report, path: path.write_text("")))
        return run(quick(**changes | {key: str(path) for key, path in texts.items()}), folder)
