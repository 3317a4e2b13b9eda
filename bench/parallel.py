"""Runs by several processes (`torchrun`, gloo) beside the same run by one: codes, scales, perplexity, bytes that a step reduces, seconds.

Every arm is a process group of its own. `codes_differ` counts the packed words that are not those of the run by one process, `scale_difference` is
the largest difference of a stored scale as a share of the largest scale of its tensor, `loss_difference` the largest of any step's loss, and
`perplexity_difference` that of the tuned model, as shares. The arm "killed" ends one process by kill -9 after the first checkpoint, notes how
long the others live and what they say, and goes on with another number of processes. Seconds are the wall clock of stages on a machine that others
may use; processes beyond its cores gain nothing.

The arm "other batches" is one process that calibrates GPTQ on the same windows in two batches instead of one: how far the order of sums alone goes.
Its `codes_differ` are words by block, and it trains nothing.

    python bench/parallel.py
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rows import write_rows
from safetensors.torch import load_file

from compressor import __version__
from compressor.linear import packed_linears
from compressor.pipelines import calibrate, compress, data, load
from compressor.recipe import Quant

FIELDS = [
    "arm", "packer", "processes", "resumed_with", "shard", "codes_differ", "words", "scale_difference", "loss_difference", "perplexity_difference",
    "tuned_ppl", "reduced_bytes", "seconds_load", "seconds_compress", "seconds_tune", "seconds_evaluate", "seconds_to_end", "exit_code", "said",
    "steps", "cores", "torch", "compressor",
]  # fmt: skip
RECIPE: dict[str, Any] = {
    "model": "tiny", "device": "cpu", "quant": {"bits": 3}, "data": {"nsamples": 32, "seqlen": 128},
    "tune": {"method": "peqa", "batch": 8, "accumulate": 2, "checkpoint_every": 4, "eval_every": 0}, "eval": {"max_tokens": 8192},
}  # fmt: skip


def recipe(place: Path, packer: str, steps: int, shard: bool) -> Path:
    """The recipe of an arm, as a file."""
    path = place / f"{packer}-{shard}.yaml"
    tune = RECIPE["tune"] | {"steps": steps, "shard": shard}
    path.write_text(yaml.safe_dump(RECIPE | {"quant": RECIPE["quant"] | {"packer": packer}, "tune": tune}), "utf-8")
    return path


def command(processes: int, file: Path, out: Path) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *torchrun, "-m", "compressor", "run", str(file), "-o", str(out)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(processes: int, file: Path, out: Path) -> None:
    subprocess.run(command(processes, file, out), env=environment(), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed(processes: int, file: Path, out: Path, victim: int) -> dict[str, Any]:
    """End process `victim` once there is a checkpoint; seconds until the command ends, its exit code, and what the survivors say."""
    work, log = out.with_name(out.name + ".partial"), out.with_suffix(".err")
    with log.open("w") as err:
        started = subprocess.Popen(command(processes, file, out), env=environment(), stdout=subprocess.DEVNULL, stderr=err)
        while not list(work.glob("tune-*/tune-*.dcp/record.json")):
            assert started.poll() is None, log.read_text("utf-8")
            time.sleep(0.05)
        sys.path.append(str(Path(__file__).resolve().parents[1]))
        from tests.launched import member

        os.kill(member(started.pid, victim), signal.SIGKILL)
        begun = time.perf_counter()
        code = started.wait(timeout=120)
    said = [line for line in log.read_text("utf-8").splitlines() if " was lost (" in line]
    return {"seconds_to_end": round(time.perf_counter() - begun, 1), "exit_code": code, "said": " | ".join(said)}


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Columns of a finished folder beside that of one process."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    before, after = (json.loads((folder / "report.json").read_text("utf-8")) for folder in (one, other))
    assert first.keys() == second.keys()
    codes = [key for key, t in first.items() if not t.is_floating_point()]
    scales = [key for key in first if key.endswith("weight_scale")]
    losses = [[row["loss"] for row in report["training"]["curve"]] for report in (before, after)]
    perplexity = [report["tuned"]["domain"]["perplexity"] for report in (before, after)]
    seconds = after["seconds"]
    return {
        "codes_differ": sum(int((first[key] != second[key]).sum()) for key in codes), "words": sum(first[key].numel() for key in codes),
        "scale_difference": max(share(first[key], second[key]) for key in scales),
        "loss_difference": max(abs(a - b) / a for a, b in zip(*losses, strict=True)),
        "perplexity_difference": abs(perplexity[1] - perplexity[0]) / perplexity[0], "tuned_ppl": round(perplexity[1], 6),
        "reduced_bytes": after["training"]["curve"][-1].get("reduced_bytes", 0), "seconds_load": round(seconds["load"], 2),
        "seconds_compress": round(seconds.get("compress", 0.0), 2), "seconds_tune": round(seconds["tune"], 2),
        "seconds_evaluate": round(sum(v for k, v in seconds.items() if k.startswith("evaluate")), 2),
    }  # fmt: skip


def share(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / a.float().abs().max())


def batches(count: int, seqlen: int) -> dict[str, Any]:
    """GPTQ of tiny in this process on `count` windows in one batch and in two: packed words that differ, by block."""
    ids, words = None, []
    for tokens in (count * seqlen, -(-count // 2) * seqlen):
        calibrate.BATCH_TOKENS = tokens
        loaded = load.load("tiny", "cpu")
        if ids is None:
            ids = data.calibration(data.load("python").train, loaded.tokenizer, seqlen, count, 42)
        compress.compress(loaded.model, Quant(bits=3, packer="gptq"), torch.float16, ids)
        words.append({name: layer.words for name, layer in packed_linears(loaded.model).items()})
    by_block: dict[str, int] = {}
    for name, held in words[0].items():
        block = name.split(".")[2]
        by_block[block] = by_block.get(block, 0) + int((held != words[1][name]).sum())
    total = sum(held.numel() for held in words[0].values())
    return {"codes_differ": " ".join(map(str, by_block.values())), "words": total, "said": f"{count} windows of {seqlen} tokens"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default=Path(__file__).parent / "results" / "parallel.csv", type=Path)
    args = parser.parse_args()
    about = {"steps": args.steps, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__, "compressor": __version__}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for packer, arms in {"gptq": ((2, False), (2, True), (4, False)), "rtn": ((2, False), (4, True))}.items():
            one = place / f"{packer}-1"
            for processes, shard in ((1, False), *arms):
                out = place / f"{packer}-{processes}{'-shard' * shard}"
                run(processes, recipe(place, packer, args.steps, shard), out)
                rows.append({"arm": "whole", "packer": packer, "processes": processes, "shard": shard} | compare(one, out) | about)
                print({key: rows[-1].get(key) for key in FIELDS[:14]}, flush=True)
                write_rows(args.out, FIELDS, rows)
        for count, seqlen in ((32, 128), (17, 64), (3, 32)):
            rows.append({"arm": "other batches", "packer": "gptq", "processes": 1} | batches(count, seqlen) | about)
            print({key: rows[-1].get(key) for key in FIELDS}, flush=True)
        for processes, victim, resumed in ((2, 1, 2), (2, 0, 1), (4, 2, 2)):
            out, file = place / f"killed-{processes}-{victim}", recipe(place, "rtn", args.steps, False)
            found = killed(processes, file, out, victim)
            run(resumed, file, out)
            row = {"arm": f"killed process {victim}", "packer": "rtn", "processes": processes, "resumed_with": resumed, "shard": False}
            rows.append(row | found | compare(place / "rtn-1", out) | about)
            print(rows[-1], flush=True)
            write_rows(args.out, FIELDS, rows)
    with args.out.open(encoding="utf-8") as file:
        print(len(list(csv.DictReader(file))), "rows")


if __name__ == "__main__":
    main()
