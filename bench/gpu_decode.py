"""Tokens a second of a whole model on a GPU: dense bf16 against packed 4, 3 and 2 bits, one prompt and sixteen.

    python bench/gpu_decode.py                what fits 90 s, the most telling first -> bench/results/gpu_decode.csv
    python bench/gpu_decode.py --check        no GPU: a tiny model on the CPU in seconds

The model is a LLaMA of TinyLlama-1.1B's shape with random weights; packed layers have random codes, for speed does not depend on them. Before an
arm is timed, the layers of a block are compared with products of their dequantised weights in float64 (`error`).

    dynamic     generate of transformers with its growing cache: launches by Python, the usual limit of small models
    static      cache_implementation="static": transformers compiles the step by torch.compile, which replays CUDA graphs

A prompt of 16 tokens, then 64 greedy ones. `tokens_per_s`: of all prompts together, steps after the first new token, median of the rounds; `ratio`:
to the dense row of the same batch and cache. `bytes_per_step`: all matrices of the blocks and the head, which a step must read; `share`: of them
at 4.8 TB/s (an H200). `setup_s`: the first call, which compiles.
"""

import argparse
import contextlib
import copy
import csv
import gc
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from cpu_decode import GROUP, NEW, PROMPT, SHAPES, Clock, random_weight, weight_bytes
from gpu_timing import about, first_line, relative

from compressor import linear

BANDWIDTH = 4.8e12
TOLERANCE = 6e-3
LEAST = {"dynamic": 5.0, "static": 15.0}  # seconds without which an arm is not begun
FIELDS = [
    "model", "arm", "bits", "group", "batch", "cache", "tokens_per_s", "tokens_per_s_best", "ms_per_step", "ratio", "prefill_ms", "new_tokens",
    "rounds", "bytes_per_step", "share", "error", "correct", "setup_s", "note", "gpu", "versions", "version", "date",
]  # fmt: skip


class OutOfTime(Exception):
    """The budget ended inside an arm."""


def arms(batches: tuple[int, int]) -> list[tuple[int, int, str]]:
    """(bits, batch, cache), the most telling first."""
    one, many = batches
    out = [(bits, one, "dynamic") for bits in (16, 4, 3, 2)] + [(bits, one, "static") for bits in (16, 4)]
    out += [(bits, many, "dynamic") for bits in (16, 4, 3, 2)] + [(bits, many, "static") for bits in (16, 4)]
    return out + [(bits, batch, "static") for batch in batches for bits in (3, 2)]


def dense_model(shape: str, device: str) -> Any:
    """A LLaMA with seeded random weights, std 0.02 (norms 1), in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, rms_norm_eps=1e-5))
    finally:
        torch.set_default_dtype(default)
    model = model.to(device).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(0, 0.02)
    model.generation_config.eos_token_id = None  # random weights may say anything; every arm makes as many tokens
    model.generation_config.pad_token_id = 0
    return model


def packed_model(dense: Any, bits: int, device: str) -> Any:
    """The same with random packed weights in the linears of its blocks."""
    model = copy.deepcopy(dense)
    model.__dict__.pop("_compiled_call", None)  # of the dense model
    prefix, blocks = linear.find_blocks(model)
    for name, old in linear.linears(blocks).items():
        weight = random_weight(old.out_features, old.in_features, bits)
        linear.swap(model, f"{prefix}.{name}", linear.PackedLinear(weight, old.bias).to(device))
    return model.eval()


def layer_error(model: Any, batch: int, device: str) -> float | None:
    """Worst relative error of the packed layers of the first block; None if there are none."""
    _, blocks = linear.find_blocks(model)
    errors = []
    with torch.no_grad():
        for layer in linear.packed_linears(blocks[0]).values():
            x = torch.randn(batch, layer.in_features, device=device).to(torch.bfloat16)
            errors.append(relative(layer(x), x.double() @ layer.packed().dequantize(torch.float64).T))
    return max(errors, default=None)


def generate(model: Any, ids: torch.Tensor, new: int, cache: str) -> tuple[float, float]:
    """Seconds of the prompt with the first token, and of the others."""
    clock = Clock()
    options = {"cache_implementation": "static"} if cache == "static" else {}
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=True, streamer=clock, **options)
    assert len(clock.times) == new + 1, "fewer tokens than asked for"
    return clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]


def measure(model: Any, batch: int, cache: str, new: int, rounds: int, device: str, vocab: int) -> dict[str, Any]:
    error = layer_error(model, batch, device)
    row: dict[str, Any] = {"error": "" if error is None else f"{error:.1e}", "correct": "yes" if error is None or error <= TOLERANCE else "NO"}
    if cache == "static":
        torch.compiler.reset()  # else the next model counts as another version of the last, and shapes become dynamic
    ids = torch.randint(3, vocab, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    start = time.perf_counter()
    generate(model, ids, new, cache)
    row["setup_s"] = f"{time.perf_counter() - start:.1f}"
    generate(model, ids, new, cache)
    took = [generate(model, ids, new, cache) for _ in range(rounds)]
    steps = [decode / (new - 1) for _, decode in took]
    step, size = statistics.median(steps), weight_bytes(model)
    return row | {
        "tokens_per_s": f"{batch / step:.1f}", "tokens_per_s_best": f"{batch / min(steps):.1f}", "ms_per_step": f"{1e3 * step:.4f}",
        "prefill_ms": f"{1e3 * statistics.median(prefill for prefill, _ in took):.2f}", "new_tokens": new, "rounds": rounds,
        "bytes_per_step": size, "share": f"{size / BANDWIDTH / step:.3f}",
    }  # fmt: skip


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the body after `seconds`."""

    def ring(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(args: argparse.Namespace, writer: Any, file: Any) -> int:
    device, shape = ("cpu", "check-random") if args.check else ("cuda", "llama-1.1b-random")
    new, batches = (6, (1, 2)) if args.check else (NEW, (1, 16))
    stop, failed, dense_speed = time.monotonic() + args.seconds, 0, {}
    common = about(device)
    models = {16: dense_model(shape, device)}
    for bits, batch, cache in arms(batches):
        arm = "dense" if bits == 16 else "packed"
        row: dict[str, Any] = {"model": shape, "arm": arm, "bits": bits, "group": "" if bits == 16 else GROUP, "batch": batch, "cache": cache}
        left = stop - time.monotonic()
        if left < LEAST[cache] and not args.check:
            row["note"] = "not reached"
        else:
            try:
                with limit(left):
                    if bits not in models:
                        models[bits] = packed_model(models[16], bits, device)
                    row |= measure(models[bits], batch, cache, new, args.rounds, device, SHAPES[shape]["vocab_size"])
                speed = float(row["tokens_per_s"])
                if bits == 16:
                    dense_speed[batch, cache] = speed
                row["ratio"] = f"{speed / dense_speed[batch, cache]:.3f}" if (batch, cache) in dense_speed else ""
                failed += row["correct"] == "NO"
            except OutOfTime:
                row["note"] = "out of time"
            except Exception as error:  # an arm that breaks is a line, not the end of the run
                failed += 1
                row["note"] = first_line(error)
        writer.writerow(common | row)
        file.flush()
        print(" ".join(f"{name}={row[name]}" for name in FIELDS if row.get(name) not in (None, "")), flush=True)
        gc.collect()
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="tokens a second of a whole model on a GPU")
    parser.add_argument("--out", type=Path, help="default: results/gpu_decode.csv beside this file; with --check a temporary file")
    parser.add_argument("--seconds", type=float, default=90.0, help="of the whole run; what does not fit is written as not reached")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="no GPU: a tiny model on the CPU")
    args = parser.parse_args()
    if not args.check and not torch.cuda.is_available():
        print("no GPU; try --check", file=sys.stderr)
        return 2
    from transformers.utils import logging

    logging.disable_progress_bar()
    out = args.out or (Path(tempfile.mkdtemp()) if args.check else Path(__file__).parent / "results") / "gpu_decode.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        return run(args, writer, file)


if __name__ == "__main__":
    sys.exit(main())
