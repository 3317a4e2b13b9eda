"""A served generation: a llama.cpp server process on an exported folder, an OpenAI-style request, and our own greedy text.

    python bench/interop/serve_llamacpp.py FOLDER --reference FILE

Runs in an environment of its own (pip install xllamacpp), without compressor. FILE is JSON: {"prompt": text, "text": what our greedy generation
appends to it, "tokens": how many tokens}. Prints one JSON line: whether the texts are equal, and the length of what they share from the start, since
near ties may fall the other way where llama.cpp rounds activations.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any


def serve(path: str) -> None:
    """The server process: prints its address, and serves until its standard input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_parallel, params.n_gpu_layers, params.warmup = 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    server = xllamacpp.Server(params)
    print(f"{xllamacpp.__version__} {server.listening_address}")
    sys.stdout.flush()
    sys.stdin.read()


def ask(address: str, reference: dict[str, Any]) -> str:
    """The text that /v1/completions appends at temperature 0."""
    body = json.dumps({"model": "exported", "prompt": reference["prompt"], "max_tokens": reference["tokens"], "temperature": 0}).encode()
    request = urllib.request.Request(f"{address.rstrip('/')}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def compare(folder: Path, reference: dict[str, Any]) -> dict[str, Any]:
    start, path = time.time(), sorted(folder.glob("*.gguf"))[0]
    command = [sys.executable, __file__, "--serve", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            version, address = process.stdout.readline().split()
            text = ask(address, reference)
        finally:
            process.stdin.close()  # ends the server
    shared = len(os.path.commonprefix([text, reference["text"]]))
    facts = {
        "consumer": "llama.cpp server (xllamacpp)",
        "version": version,
        "folder": folder.name,
        "file": path.name,
        "equal": text == reference["text"],
    }
    return facts | {"shared_characters": shared, "characters": len(reference["text"]), "text": text, "seconds": round(time.time() - start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--serve", metavar="FILE.gguf")
    chosen = parser.parse_args()
    if chosen.serve:
        serve(chosen.serve)
        return
    try:
        line = compare(chosen.folder, json.loads(chosen.reference.read_text("utf-8")))
    except Exception as error:  # whatever a consumer raises is its refusal
        line = {
            "consumer": "llama.cpp server (xllamacpp)",
            "folder": chosen.folder.name,
            "refused": (str(error).splitlines() or [type(error).__name__])[0],
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
