"""Memory and speed of runs of which one decoder block at a time is in memory, on models of real shapes with random weights (bench/synthetic.py).

    python bench/scale.py WORK [--arms rtn-7b gptq-1.1b eval-7b]          WORK: a folder with 25 GB free

Arms: rtn-7b and gptq-1.1b run `compressor run --memory blocks` in a process of its own; eval-7b measures the packed folder that rtn-7b left.
Peaks are those that the kernel counts, mapped pages included: the larger of ru_maxrss and of the stages of the report, which start the count
anew. Linux hands the high-water mark of a process on to what it starts, through fork and exec: so whatever takes memory here, making a model and
packing a block, runs in a process of its own, and this one stays as small as its libraries. The limit of the packing stage is the longer of two
times: reading the weights from the disk, as fast as a shard that is in no cache is read, and packing them, as fast as the linears of one block
that are in memory already are packed.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from rows import write_rows
from safetensors import safe_open
from synthetic import make

from compressor.pipelines import checkpoint
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Quant

OUT = Path(__file__).parent / "results" / "scale.csv"
FIELDS = [
    "arm", "model", "parameters", "dense_bytes", "folder_bytes", "peak_bytes", "expected_bytes", "seconds", "packing_seconds", "disk_seconds",
    "compute_seconds", "share_of_limit", "perplexity", "threads", "torch",
]  # fmt: skip
ARMS = {
    "rtn-7b": ("llama-7b", {"packer": "rtn", "bits": 3}, {"seqlen": 256}),
    "gptq-1.1b": ("tinyllama-1.1b", {"packer": "gptq", "bits": 3}, {"seqlen": 256, "nsamples": 8}),
}


def child(*argv: str) -> tuple[dict[str, Any], int, float]:
    """(the JSON document, peak bytes, seconds) of a command of ours in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "compressor", *argv], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(argv)} ended with {os.waitstatus_to_exitcode(status)}")
    return json.loads(out.strip().splitlines()[-1]), usage.ru_maxrss * 1024, time.perf_counter() - start


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """What a function returns that runs in a process of its own, whose memory the children of this one do not inherit as theirs."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def disk_rate(folder: Path) -> float:
    """Bytes a second of a shard that is in no cache."""
    path = checkpoint.weight_files(folder)[0]
    os.sync()  # pages that are not on the disk yet stay in the cache
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, buffer = time.perf_counter(), bytearray(8 << 20)
        while file.readinto(buffer):
            pass
        return path.stat().st_size / (time.perf_counter() - start)


def compute_seconds(folder: Path, quant: Quant) -> float:
    """Of packing the linears of the first block, in memory already."""
    weights = []
    for path in checkpoint.weight_files(folder):
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if ".layers.0." in key and "norm" not in key]  # noqa: SIM118
            weights += [file.get_tensor(key).float() for key in keys]
    packer = PACKERS[quant.packer]
    start = time.perf_counter()
    for weight in weights:
        packer(weight, None, quant, packer.resolve(weight.shape[1], quant, "a linear")[0], torch.float16)
    return time.perf_counter() - start


def run_arm(name: str, work: Path) -> dict[str, Any]:
    model, quant, data = ARMS[name]
    folder = work / model
    if not (folder / "config.json").exists():
        apart(make, model, folder)
    recipe = work / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(folder), "memory": "blocks", "quant": quant, "data": data, "eval": {"max_tokens": 256}}))
    document, peak, seconds = child("run", str(recipe), "-o", str(work / name), "--overwrite")
    report = json.loads((work / name / "report.json").read_text())
    row = {
        "arm": name, "model": model, "parameters": report["model"]["parameters"], "dense_bytes": report["model"]["dense_bytes"],
        "folder_bytes": document["packed"]["folder_bytes"], "peak_bytes": max(peak, *report["peak_bytes"].values()),
        "expected_bytes": max(report["expected"].values()),
        "seconds": round(seconds, 1), "packing_seconds": round(report["seconds"]["compress"], 1),
        "perplexity": document["packed"]["domain"]["perplexity"],
    }  # fmt: skip
    if quant["packer"] == "rtn":
        blocks = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        row |= {"disk_seconds": round(report["model"]["dense_bytes"] / disk_rate(folder), 1)}
        row |= {"compute_seconds": round(blocks * apart(compute_seconds, folder, Quant(**quant)), 1)}
        row |= {"share_of_limit": round(max(row["disk_seconds"], row["compute_seconds"]) / row["packing_seconds"], 3)}
    return row


def eval_arm(work: Path) -> dict[str, Any]:
    folder = work / "rtn-7b"
    shutil.rmtree(work / "cache", ignore_errors=True)  # or nothing would be measured
    document, peak, seconds = child("eval", str(folder), "--max-tokens", "256", "--window", "256", "--cache", str(work / "cache"))
    report = json.loads((folder / "report.json").read_text())
    size = checkpoint.model_bytes(folder)
    row = {"arm": "eval-7b", "model": "llama-7b", "parameters": report["model"]["parameters"], "folder_bytes": size, "peak_bytes": peak}
    return row | {"seconds": round(seconds, 1), "perplexity": document["perplexity"]}  # of one text, beside the model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "eval-7b"], default=[*ARMS, "eval-7b"])
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in asked.arms:
        row = eval_arm(asked.work) if name == "eval-7b" else run_arm(name, asked.work)
        rows.append(row | {"threads": torch.get_num_threads(), "torch": torch.__version__})
        print(json.dumps(rows[-1]), flush=True)
        write_rows(asked.out, FIELDS, rows)


if __name__ == "__main__":
    main()
