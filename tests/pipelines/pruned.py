"""What the tests of pruning share: small models in folders, windows, and whole runs without sample texts."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.pipelines import load
from compressor.pipelines.run import Run, run
from compressor.recipe import Prune, Recipe
from compressor.tune.batches import CausalLM
from tests.prune.helpers import causal

QUICK = Recipe().with_(
    device="cpu", data__seqlen=32, data__nsamples=4, eval__max_tokens=128, tune__steps=3, tune__batch=4, prune__steps=12, prune__batch=4,
    prune__gradients=6, quant__packer="none",
)  # fmt: skip
KEYS = {
    "method": "loraprune", "ratio": 0.4, "steps": 12, "batch": 2, "every": 2, "rank": 2, "alpha": 4.0, "multiple": 4, "gradients": 6,
}  # fmt: skip


def options(**keys: Any) -> Prune:
    return Prune(**KEYS | keys)


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


def whole(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of QUICK with changes, without sample texts (they take most of the time of such a run)."""
    real = Run._samples
    Run._samples = lambda self: False
    texts = {"data__data": folder.parent / "domain.txt", "data__outside": folder.parent / "outside.txt"}
    for seed, path in enumerate(texts.values()):  # short: reading the built-in ones takes longer than all the rest
        words = random.Random(seed).choices("the def return import for in class of to self print value list".split(), k=4000)
        path.write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, len(words), 10)))
    try:
        return run(QUICK.with_(**changes | {key: str(path) for key, path in texts.items()}), folder)
    finally:
        Run._samples = real
