"""llama.cpp, as the xllamacpp wheel brings it, on exported folders: the logits behind every position of reference.npz, and the greedy continuation.

    python bench/interop/read_llamacpp.py FOLDER...

Runs in an environment of its own (pip install xllamacpp numpy), without compressor. Every folder holds one .gguf file and reference.npz: ids int64
[T]; logits float32 [T, V]; greedy int64 [N]. One JSON line a folder. With --lines FILE, and the ids of its lines in FILE.npz (int64, -1 between
lines), it compares tokenisations instead.

What the server gives away are log-probabilities, so those are compared. It leaves out the ones of a token that is half a character, so each request
forces a printable token by a bias, which its log-probabilities do not see. llama.cpp rounds activations to 8 bits, in blocks of 32 (Q4_0, Q4_1, Q5_0,
Q8_0) or 256 (K types), and to float16 before float16 weights: errors of quantised types are those, and do not show one wrong group. The reader of
transformers (read_gguf_transformers.py) does.
"""

import argparse
import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp


class Server:
    """A llama.cpp server of this process, spoken to over HTTP."""

    def __init__(self, path: Path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.hostnames, params.port = ["127.0.0.1"], 0
        params.n_parallel, params.n_gpu_layers, params.warmup = 1, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body: Any) -> Any:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.server.listening_address.rstrip("/") + path, data, kind), timeout=300) as answer:
            return json.load(answer)

    def logprobs(self, ids: list[int], size: int, printable: int) -> np.ndarray:
        """float64 [V] of the token after ids; nan where the server gives none."""
        body = {"n_predict": 1, "temperature": 0, "n_probs": size, "cache_prompt": False, "logit_bias": [[printable, 1e6]]}
        found = self.post("/completion", prompt=ids, **body)["completion_probabilities"][0]["top_logprobs"]
        out = np.full(size, np.nan)
        for each in found:
            out[each["id"]] = each["logprob"]
        return out

    def greedy(self, ids: list[int], count: int) -> list[int]:
        return self.post("/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True, ignore_eos=False, cache_prompt=False)[
            "tokens"
        ]


def compare(folder: Path) -> dict[str, Any]:
    start, reference = time.time(), np.load(folder / "reference.npz")
    ids, logits = reference["ids"].tolist(), reference["logits"].astype(np.float64)
    server = Server(one_file(folder))
    printable = server.post("/tokenize", content="a", add_special=False)["tokens"][-1]
    seen = np.stack([server.logprobs(ids[: t + 1], logits.shape[1], printable) for t in range(len(ids))])
    top = logits.max(-1, keepdims=True)
    wanted = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    error = np.abs(seen - wanted)
    absent = int(np.isnan(error).sum())
    likeliest = np.where(np.isnan(seen), -np.inf, seen).argmax(-1)
    greedy = server.greedy(ids, len(reference["greedy"])) if "greedy" in reference else None
    return {
        "max_abs_error": float(np.nanmax(error)),
        "mean_abs_error": float(np.nanmean(error)),
        "logit_std": float(logits.std()),
        "argmax_agreement": float((likeliest == logits.argmax(-1)).mean()),
        "greedy_equal": None if greedy is None else greedy == reference["greedy"].tolist(),
        "seconds": round(time.time() - start, 2),
        "note": "log-probabilities" + (f", {absent} not given" if absent else ""),
    }


def tokenised(folder: Path, lines: Path) -> dict[str, Any]:
    """How many lines of a text llama.cpp tokenises as the reference."""
    server, ids = Server(one_file(folder)), np.load(f"{lines}.npz")["ids"]
    wanted = [part.tolist() for part in np.split(ids, np.flatnonzero(ids == -1))]
    texts = [text for text in lines.read_text("utf-8").split("\n") if text]
    wanted = [[i for i in part if i != -1] for part in wanted if part != [-1]]
    seen = [server.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in texts]
    same = sum(a == b for a, b in zip(seen, wanted, strict=True))
    return {"lines": len(texts), "same": same, "tokens": sum(map(len, wanted))}


def one_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(f"{len(found)} .gguf files, where there must be one")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--lines", type=Path)
    chosen = parser.parse_args()
    for folder in chosen.folders:
        line = {"consumer": "llama.cpp (xllamacpp)", "version": xllamacpp.__version__, "folder": folder.name}
        try:
            line |= tokenised(folder, chosen.lines) if chosen.lines else compare(folder)
        except Exception as error:  # whatever a consumer raises is its refusal
            line |= {"refused": (str(error).splitlines() or [type(error).__name__])[0]}
        print(json.dumps(line))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
