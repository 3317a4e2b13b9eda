"""The one file that knows lm-evaluation-harness: our models as its language model, our task files as its tasks, both run by its evaluator.

The model is lm-eval's own HFLM around the model in memory, packed as it is: how texts become tokens, BOS and prefix tokens, rolling windows, stop
sequences and truncation on the left are HFLM's. Only the scoring of (context, continuation) pairs is written here, because HFLM keeps the logits
of whole padded batches twice, in the model's dtype. Here a batch holds at most BATCH_TOKENS tokens, rows sorted by length; the head runs over the
last positions only (transformers' `logits_to_keep`), its log-softmax is float32; and requests of the same input (single-token choices) run once.

A task file becomes a ConfigurableTask with its rows in memory, so that acc, acc_norm, exact_match, their standard errors and few-shot sampling
are lm-eval's. `evaluate` is called and not `simple_evaluate`, which seeds every global generator and asks git, the system and the hub for facts.

Price: a row's logits over its last positions, at least; importing lm-eval takes a second or two, its index of hub tasks six. Texts are written
GENERATED at once. Source: EleutherAI, lm-evaluation-harness, lm_eval/models/huggingface.py, version 0.4.13.
"""

# lm-eval is not typed for mypy: its classes are Any here, and one of them is a base
# mypy: allow-subclassing-any

import contextlib
import copy
import inspect
import io
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import GenerationConfig

from compressor.errors import DataError, ModelError, NumericError
from compressor.pipelines.load import Loaded
from compressor.pipelines.measure.task_files import SHORT, WORKED, TaskFile, matches

BATCH_TOKENS = 8192
LOGIT_BYTES = 256 << 20  # of a batch, in float32
GENERATED = 16  # texts written at once
BOOTSTRAP = 1000  # draws for standard errors that have no formula
STOPS = {False: ["\n", "Question:"], True: ["Question:", "### Instruction:"]}  # worked or not
METRICS = {
    True: [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm", "acc_bytes")],
    False: [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}

Progress = Callable[[int, int], None]  # requests answered, requests in all
Pair = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation), and their tokens


class LoadedLM(HFLM):
    """HFLM on a model in memory whose log-likelihoods need the logits of continuations only."""

    def __init__(self, loaded: Loaded, progress: Progress | None = None) -> None:
        """Raises ModelError for a tokenizer without BOS and EOS, which leaves nothing to put before a text."""
        tokenizer = copy.deepcopy(loaded.tokenizer)  # HFLM gives it a padding token
        ends = [i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None]
        if not ends:
            raise ModelError(f"the tokenizer of {loaded.name} has neither BOS nor EOS, one of which tasks put before a text")
        self.end = ends[0]
        super().__init__(pretrained=loaded.model, tokenizer=tokenizer, batch_size=GENERATED)
        self.keeps = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters
        self.report = progress

    @property
    def eot_token_id(self) -> int:
        return self.end

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """HFLM's, a part at a time, so that progress shows."""
        order = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]), -len(requests[i].args[0])))
        out = [""] * len(requests)
        for start in range(0, len(order), GENERATED):
            part = order[start : start + GENERATED]
            for place, text in zip(part, super().generate_until([requests[i] for i in part], disable_tqdm=True), strict=True):
                out[place] = text
            self._tell(start + len(part), len(order))
        return out

    def _loglikelihood_tokens(self, requests: list[Pair], disable_tqdm: bool = True, override_bs: int | None = None) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether greedy decoding writes it) of every pair; what does not fit the model is cut on the left."""
        rows: dict[tuple[int, ...], list[int]] = {}  # input tokens -> requests that ask about it
        for place, (texts, context, continuation) in enumerate(requests):
            self._check(texts[1] if texts else "", continuation)
            ids = (context + continuation)[-(self.max_length + 1) :][:-1]
            rows.setdefault(tuple(ids), []).append(place)
        out, done = [(0.0, False)] * len(requests), 0
        for batch in self._batches({row: max(len(requests[i][2]) for i in places) for row, places in rows.items()}):
            for row, logits in zip(batch, self._tails(batch), strict=True):
                for place in rows[row]:
                    out[place] = _score(logits, requests[place][2])
                done += len(rows[row])
            self._tell(done, len(requests))
        return out

    def _check(self, text: str, continuation: list[int]) -> None:
        if not continuation:
            raise DataError(f"the choice {text[:50]!r} has no tokens of its own after its prompt; give choices that begin with a letter")
        if len(continuation) > self.max_length:
            raise DataError(f"the choice {text[:50]!r}… has {len(continuation)} tokens, more than the {self.max_length} that the model was made for")

    def _batches(self, needed: dict[tuple[int, ...], int]) -> Iterator[dict[tuple[int, ...], int]]:
        """Input rows with the positions needed at their ends, longest first, as many together as the limits let."""
        batch: dict[tuple[int, ...], int] = {}
        for ids in sorted(needed, key=lambda ids: (-len(ids), ids)):
            grown = batch | {ids: needed[ids]}
            width = len(next(iter(grown)))
            logits = 4 * len(grown) * _kept(grown) * self.model.config.get_text_config().vocab_size
            if batch and (len(grown) * width > BATCH_TOKENS or logits > LOGIT_BYTES):
                yield batch
                batch = {}
            batch[ids] = needed[ids]
        if batch:
            yield batch

    def _tails(self, batch: dict[tuple[int, ...], int]) -> list[Tensor]:
        """Log-probabilities float32 [needed, vocab] at every row's last positions; padding is on the right, where causal models see none."""
        width, kept = max(map(len, batch)), _kept(batch)
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=self.device)  # [rows, width]
        options = {"logits_to_keep": kept} if self.keeps else {}
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False, **options).logits[:, -kept:]  # [rows, kept, vocab]
        ends = [kept - (width - len(row)) for row in batch]
        return [logits[i, end - count : end].float().log_softmax(-1) for i, (end, count) in enumerate(zip(ends, batch.values(), strict=True))]

    def _tell(self, done: int, total: int) -> None:
        if self.report:
            self.report(done, total)


def _kept(batch: dict[tuple[int, ...], int]) -> int:
    """Positions from the right end of the padded batch that hold every row's needed ones."""
    width = max(map(len, batch))
    return max(width - len(row) + count for row, count in batch.items())


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Log-probabilities [needed, vocab], whose last rows are the continuation's. Raises NumericError for NaN, of which argmax makes a choice."""
    wanted = torch.tensor(continuation, device=logits.device)  # [tokens]
    logits = logits[-len(continuation) :]
    total = float(logits.gather(1, wanted[:, None]).sum())
    if math.isnan(total):
        raise NumericError("the log-likelihood of a choice is not a number: the model does not predict")
    return total, bool((logits.argmax(-1) == wanted).all())


@contextlib.contextmanager
def serving(loaded: Loaded, progress: Progress | None = None) -> Iterator[LoadedLM]:
    """The model as lm-eval wants it, in eval mode and with the folder's own generation settings; both come back as they were."""
    model: Any = loaded.model
    training, settings = model.training, model.generation_config
    try:
        if (loaded.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(loaded.folder, local_files_only=True)
        with quiet():
            lm = LoadedLM(loaded, progress)
        yield lm
    finally:
        model.train(training)
        model.generation_config = settings


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of lm-eval reaches stdout, and its loggers and those of the libraries under it say only what is an error."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def local_task(name: str, file: TaskFile, shown: TaskFile | None, shots: int, most: int) -> Any:
    """The rows of a file as a task of lm-eval; `shown` gives the examples of `shots`, `most` bounds the tokens written for an answer."""
    parts = {"test": datasets.Dataset.from_list(file.rows)} | ({} if shown is None else {"train": datasets.Dataset.from_list(shown.rows)})
    config = {
        "task": name,
        "custom_dataset": lambda **_: parts,
        "test_split": "test",
        "doc_to_text": "text",
        "doc_to_target": "gold" if file.choice else "target",
        "target_delimiter": file.join,
        "num_fewshot": shots,
        "metric_list": METRICS[file.choice],
        "output_type": "multiple_choice" if file.choice else "generate_until",
    }
    if shown is not None:
        config |= {"training_split": "train", "fewshot_split": "train"}
    if file.choice:
        return ConfigurableTask(config=config | {"doc_to_choice": "choices"})
    tokens = min(WORKED if file.worked else SHORT, most)
    settings = {"until": STOPS[file.worked], "max_gen_toks": tokens, "do_sample": False, "temperature": 0.0}
    score = lambda doc, written: {"exact_match": float(matches(written[0], doc["answers"], file.worked))}
    return ConfigurableTask(config=config | {"generation_kwargs": settings, "process_results": score})


def run(lm: Any, tasks: dict[str, Any], limit: int, seed: int, samples: bool = False) -> dict[str, Any]:
    """What lm-eval's evaluate returns for loaded tasks ({"tasks": {name: task}, "groups": …}); the first `limit` questions of each (0: all).

    `samples` adds every question with its log-likelihoods or text. Few-shot examples are drawn by `seed`.
    """
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed)
        task.build_all_requests = _silently(task.build_all_requests)
    with quiet():
        found = evaluate(lm=lm, task_dict=tasks, limit=limit or None, bootstrap_iters=BOOTSTRAP, log_samples=samples)
    return dict(found)


def _silently(call: Callable[..., None]) -> Callable[..., None]:
    """Without the bar that lm-eval draws on stderr while it builds requests, for which it has no switch."""

    def silent(**options: Any) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            call(**options)

    return silent
