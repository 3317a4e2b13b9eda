"""A served generation: a vLLM server process on a folder, OpenAI-style requests, and our own greedy text. One JSON line a folder and route.

    python serve_vllm.py [--routes own,plugin] [--dtype float32] [--compile] [--reference FILE] FOLDER...

Routes are those of read_vllm.py: vLLM without plug-ins in float16, and with `--quantization compressor` in float32. Without --routes a folder of
symmetric 4 bits is served by vLLM itself, and any other, where the plug-in is installed, with that.
/v1/completions at temperature 0 must give the tokens of reference.npz; the log-probabilities of its prompt are compared as in read_vllm.py. FILE is
JSON: {"prompt": text, "text": what our own greedy generation makes of it, less the prompt, "tokens": how many tokens}; it adds "text_equal".
`vllm serve` of the build for CPUs does not start, because it looks for a distribution named vllm: the module does.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from read_vllm import ENVIRONMENT, NONE, chosen, distribution, log_softmax, plugged, reason

SECONDS, END, NAME = 900, 30, "folder"  # for a start or an answer, and for an end
ROUTES = {"own": "vLLM server", "plugin": "vLLM server + compressor"}
OWN = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # the engine in a process of its own, as servers have it


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(folder: Path, vocab: int, options: list[str], route: str) -> Iterator[str]:
    """The address of a server that answers; RuntimeError with the reason if it does not come up."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", NAME]
    env = ENVIRONMENT | dict(os.environ) | OWN | ({"VLLM_PLUGINS": NONE} if route == "own" else {})
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--max-num-seqs", "2", "--max-num-batched-tokens", "256"]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(
        [*command, "--max-logprobs", str(vocab), *options], env=env, stdout=log, stderr=log, start_new_session=True
    ) as process:  # fmt: skip
        try:
            wait(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            process.terminate()
            try:
                process.wait(END)
            except subprocess.TimeoutExpired:  # it overheard that while it started; its engine is a process, too
                os.killpg(process.pid, signal.SIGKILL)


def wait(address: str, process: subprocess.Popen, log: Any) -> None:
    ends = time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(address, timeout=5):
            return
        if process.poll() is not None:
            break
        time.sleep(0.5)
    log.seek(0)
    errors = [line for line in log.read().splitlines() if "Error" in line]
    raise RuntimeError(errors[-1] if errors else f"no answer within {SECONDS} s")


def ask(address: str, **body: Any) -> dict[str, Any]:
    data = json.dumps({"model": NAME, "temperature": 0} | body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data, {"Content-Type": "application/json"}), timeout=SECONDS) as answer:
        return json.load(answer)["choices"][0]


def positions(entries: list[dict[str, Any] | None], vocab: int) -> np.ndarray:
    """The server's {token: {"logprob": …}} of each position of the prompt but the first, as an array [T - 1, V]."""
    return np.array([[entry[str(token)]["logprob"] for token in range(vocab)] for entry in entries if entry])


def measure(folder: Path, options: list[str], route: str, reference: dict[str, Any] | None) -> dict[str, Any]:
    with np.load(folder / "reference.npz") as file:
        ids, logits, greedy = file["ids"].tolist(), file["logits"], file["greedy"].tolist()
    began = time.perf_counter()
    with server(folder, logits.shape[1], options, route) as address:
        ready = time.perf_counter()
        choice = ask(address, prompt=ids, max_tokens=len(greedy), ignore_eos=True, return_token_ids=True)
        scored = ask(address, prompt=ids, max_tokens=1, prompt_logprobs=logits.shape[1])
        told = None if reference is None else ask(address, prompt=reference["prompt"], max_tokens=reference["tokens"], ignore_eos=True)
        start = time.perf_counter()
        ask(address, prompt=ids, max_tokens=64, ignore_eos=True)
        speed = 64 / (time.perf_counter() - start)
    got, wanted = positions(scored["prompt_logprobs"], logits.shape[1]), log_softmax(logits[:-1])
    error = np.abs(got - wanted)
    row: dict[str, Any] = {
        "max_abs_error": float(error.max()), "mean_abs_error": float(error.mean()), "logit_std": float(logits.std()),
        "argmax_agreement": float((got.argmax(-1) == wanted.argmax(-1)).mean()), "greedy_equal": choice["token_ids"] == greedy,
        "seconds": ready - began, "text": choice["text"], "tokens_per_second": round(speed, 1),
    }  # fmt: skip
    return row if told is None or reference is None else row | {"text": told["text"], "text_equal": told["text"] == reference["text"]}


def usual(folder: Path) -> str:
    """The route that a folder needs."""
    config = json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config") or {}
    grids = [(group["weights"]["num_bits"], group["weights"]["symmetric"]) for group in (config.get("config_groups") or {}).values()]
    grids = grids or [(config.get("bits"), config.get("sym"))]
    return "plugin" if plugged() and set(grids) != {(4, True)} else "own"


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folders", nargs="+", type=Path)
    ap.add_argument("--routes", default="")
    ap.add_argument("--dtype", default="")
    ap.add_argument("--compile", action="store_true")
    ap.add_argument("--reference", type=Path)
    a = ap.parse_args()
    for folder in a.folders:
        for route, dtype in chosen(a.routes or usual(folder), a.dtype):
            more = ["--quantization", "compressor"] if route == "plugin" else []
            options = ["--dtype", dtype, *more, *([] if a.compile else ["--enforce-eager"])]
            row = {"consumer": ROUTES[route], "version": distribution(), "folder": folder.name}
            try:
                row |= measure(folder, options, route, json.loads(a.reference.read_text("utf-8")) if a.reference else None)
            except Exception as error:  # whatever stands between us and an answer
                row["refused"] = reason(str(error)) or type(error).__name__
            print(json.dumps(row | {"note": f"log-probabilities, {dtype}, {'compiled' if a.compile else 'eager'}"}), flush=True)


if __name__ == "__main__":
    main()
