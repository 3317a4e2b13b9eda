"""What the dense model predicts on the training windows, kept on the disk for a model that learns from it later (tune/distill.py).

One pass over the windows that tuning will see, each once, before anything is packed or pruned, in whatever way the model is in memory; the likeliest
tokens of every prediction go into one file of the work folder, known by a digest of the model and the windows, so that a run that goes on does not
make it again. Price: a forward of those windows; 6 bytes a token and kept token on the disk, in memory while they are made, and mapped while they
are learnt from. Limits: a run that is stopped in the middle of the pass makes it anew.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.pipelines import data, estimate, evaluate, load
from compressor.pipelines.blockwise.blocks import Blocks
from compressor.pipelines.job import digest
from compressor.pipelines.journal import Journal, keep, kept
from compressor.pipelines.measure import divergence
from compressor.recipe import Tune
from compressor.tune.batches import Batches, CausalLM
from compressor.tune.distill import Distilled, Taught, top

if TYPE_CHECKING:
    from compressor.pipelines.run import Run


def objective(run: "Run", loaded: load.Loaded, windows: data.Windows, journal: Journal) -> CausalLM:
    """What a run tunes for: the text alone, or also what the model predicts now, before it is packed."""
    options, text = run.recipe.tune, CausalLM(windows.ids, windows.labels)
    if not (run.tunes and options.distill):
        return text
    used = Batches(text, options, run.recipe.seed).used()
    key = digest(run.key_dense, run.domain.train.sha256, run.seqlen, run.recipe.data.train_on_prompt, options.distill_top, used.tolist())
    found = ask(run, loaded, windows.ids[used], options.distill_top, journal.subfolder("taught", key))
    return Distilled(windows.ids, windows.labels, found, options.distill, used)


def ask(run: "Run", loaded: load.Loaded, ids: Tensor, count: int, folder: Path) -> Taught:
    """The `count` likeliest predictions of the model as it is now on windows ids int64 [rows, seqlen], kept in `folder`, which is of these alone."""
    with run.stage("teach"), run.show.task("teach", len(ids)) as advance, Blocks.telling(loaded.model, advance):
        return taught(loaded.model, ids, count, folder / "predictions.safetensors", advance)


def held_bytes(options: Tune, vocab: int, tokens: int) -> int:
    """Bytes of the predictions after so many tokens, in their file and in memory."""
    return 6 * min(options.distill_top, vocab) * tokens


def counted(run: "Run", found: dict[str, Any], dense: nn.Module, lessons: list[tuple[str, Tune, int]]) -> dict[str, Any]:
    """What a run costs, by stage as `estimate` has it, with what predictions add: their pass, and they themselves while one learns from them.

    lessons: (stage, options, windows) of the stages that learn from them.
    """
    for stage, options, windows in lessons:
        size, vocab, peaks = 4 if run.device.type == "cpu" else 2, run.config["vocab_size"], found["peak_bytes"]
        parameters = sum(p.numel() for p in {id(p): p for p in dense.parameters()}.values())
        held = held_bytes(options, vocab, windows * run.seqlen)
        near = min(divergence.SAMPLE_LOGITS, divergence.COMPARED * vocab) * size  # logits that wait for the packed model
        asking = held + max(peaks["evaluate"], estimate.BASE + parameters * size + near + working_bytes(run.seqlen, vocab, size))
        peaks["teach"] = max(peaks.get("teach", 0), asking)
        peaks[stage] += held
        seconds = estimate.forward_seconds(dense, run.device, windows * run.seqlen)
        found["seconds"]["teach"] = round(found["seconds"].get("teach", 0.0) + seconds, 1)
    return found


def working_bytes(window: int, vocab: int, size: int) -> int:
    """Bytes of two batches of logits, one of them about to go, and of the float32 probabilities of a window; size: bytes a logit."""
    one = window * vocab
    return 2 * max(one * size, min(evaluate.LOGIT_BYTES, evaluate.BATCH_TOKENS * vocab * size)) + 2 * 4 * one


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
        found = kept(path) or ({"tokens": tokens, "logs": logs}, {})  # mapped, so that pruning and packing have the memory
    return Taught(found[0]["tokens"], found[0]["logs"])
