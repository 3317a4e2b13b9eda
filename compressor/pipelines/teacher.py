"""What the dense model predicts on the training windows, kept on the disk for a model that learns from it later (tune/distill.py).

One pass over the windows, before anything is packed or pruned, in whatever way the model is in memory; the likeliest tokens of every prediction go
into one file of the work folder, known by a digest of the model and the windows, so that a run that goes on does not make it again. Price: a forward
of all windows; 6 bytes a token and kept token, on the disk and in memory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.pipelines import data, evaluate, load
from compressor.pipelines.job import digest
from compressor.pipelines.journal import Journal, keep, kept
from compressor.tune.batches import CausalLM
from compressor.tune.distill import Distilled, Taught, top

if TYPE_CHECKING:
    from compressor.pipelines.run import Run


def objective(run: "Run", loaded: load.Loaded, windows: data.Windows, journal: Journal) -> CausalLM:
    """What a run tunes for: the text alone, or also what the model predicts now, before it is packed."""
    options = run.recipe.tune
    if not (run.tunes and options.distill):
        return CausalLM(windows.ids, windows.labels)
    key = digest(run.key_dense, run.domain.train.sha256, run.seqlen, run.recipe.data.train_on_prompt, options.distill_top)
    path = journal.subfolder("taught", key) / "predictions.safetensors"
    with run.stage("teach"), run.show.task("teach", len(windows.ids)) as advance:
        found = taught(loaded.model, windows.ids, options.distill_top, path, advance)
    return Distilled(windows.ids, windows.labels, found, options.distill)


def taught(model: Any, ids: Tensor, count: int, path: Path, advance: Callable[[int, str], None]) -> Taught:
    """The predictions of `model` on windows ids int64 [rows, seqlen], of `count` tokens each; those in the file at `path` if it is whole."""
    found = kept(path)
    if found is None:
        count = min(count, model.config.vocab_size)
        tokens, logs = torch.empty(*ids.shape, count, dtype=torch.int32), torch.empty(*ids.shape, count, dtype=torch.float16)
        device = next(p.device for p in model.parameters() if not p.is_meta)
        with evaluate.evaluating(model):
            for part, logits in evaluate.each_logits(model, ids, device):  # [batch, seqlen, vocab]
                for row, each in zip(range(len(ids))[part], logits, strict=True):  # a window at a time, for its probabilities are float32
                    best = top(each, count)
                    tokens[row], logs[row] = best[0].cpu(), best[1].cpu()
                advance(len(logits), f"{min(part.stop, len(ids))} of {len(ids)} windows")
        keep(path, {"tokens": tokens, "logs": logs}, {})
        return Taught(tokens, logs)
    return Taught(found[0]["tokens"], found[0]["logs"])
