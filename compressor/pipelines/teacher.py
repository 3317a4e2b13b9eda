"""What the dense model predicts on the training windows, kept on the disk for a model that learns from it later (tune/distill.py).

One pass over the windows, before anything is packed or pruned, in whatever way the model is in memory; the likeliest tokens of every prediction go
into one file of the work folder, known by a digest of the model and the windows, so that a run that goes on does not make it again. Price: a forward
of all windows; 6 bytes a token and kept token, on the disk and, as mapped pages, in memory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.pipelines import data, evaluate, journal, load
from compressor.pipelines.job import digest
from compressor.tune.batches import CausalLM
from compressor.tune.distill import Distilled, Taught, top

if TYPE_CHECKING:
    from compressor.pipelines.run import Run


def objective(run: "Run", loaded: load.Loaded, windows: data.Windows) -> CausalLM:
    """What a run tunes for: the text alone, or also what the model predicts now, before it is packed."""
    options = run.recipe.tune
    if not (run.tunes and options.distill):
        return CausalLM(windows.ids, windows.labels)
    key = digest(run.key_dense, run.domain.train.sha256, run.seqlen, run.recipe.data.train_on_prompt, options.distill_top)
    with run.stage("teach"), run.show.task("teach", len(windows.ids)) as advance:
        found = taught(loaded.model, windows.ids, options.distill_top, run.work / f"taught-{key}.safetensors", advance)
    return Distilled(windows.ids, windows.labels, found, options.distill)


def taught(model: Any, ids: Tensor, count: int, path: Path, advance: Callable[[int, str], None]) -> Taught:
    """The predictions of `model` on windows ids int64 [rows, seqlen], of `count` tokens each; those in the file at `path` if it is whole."""
    found = journal.kept(path)
    if found is None:
        parts: list[tuple[Tensor, Tensor]] = []
        device = next(p.device for p in model.parameters() if not p.is_meta)
        with evaluate.evaluating(model):
            for part, logits in evaluate.each_logits(model, ids, device):  # [batch, seqlen, vocab]
                best = top(logits, count)  # [batch, seqlen, count] each
                parts.append((best[0].cpu(), best[1].cpu()))
                advance(len(best[0]), f"{min(part.stop, len(ids))} of {len(ids)} windows")
        tokens, logs = (torch.cat(each) for each in zip(*parts, strict=True))
        journal.keep(path, {"tokens": tokens, "logs": logs}, {})
        return Taught(tokens, logs)
    return Taught(found[0]["tokens"], found[0]["logs"])
