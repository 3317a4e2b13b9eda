"""Peers of the headline table: one folder packed by another library, in that library's own virtual environment, for bench/quality.py.

    python bench/quality_peers.py JOB.json

The job says model, library, bits, group, `ids` (a safetensors file of the calibration windows, those that our packers get) and `folder`. Symmetric
grids where the library allows; all else is the library's default unless the arm's `options` say otherwise. Seconds are processor seconds of loading,
quantising and saving, without imports; the peak is VmHWM. The last line of stdout is JSON; what the libraries print goes to stderr. Nothing of
compressor is imported: bench/quality_arms.py then loads the folder and measures it as ours.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "interop"))

import make_foreign
import torch
from make_foreign import TOKENIZER
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Job = dict[str, Any]


def asked(job: Job) -> argparse.Namespace:
    """What the functions of make_foreign.py want to know."""
    return argparse.Namespace(model=Path(job["model"]), group=job["group"], asym=False, desc_act=False, form="gptq")


def gptqmodel(job: Job, rows: torch.Tensor, folder: Path) -> str:
    make_foreign.gptqmodel(asked(job), job["bits"], rows, folder, **job["options"])
    return "symmetric, " + ("its scale search on squared errors" if job["options"] else "defaults: columns ordered inside groups, no scale search")


def hqq(job: Job, rows: torch.Tensor, folder: Path) -> str:
    """Scales and zeros are stored in float16, the dtype that it computes in by default."""
    make_foreign.hqq(asked(job), job["bits"], rows, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    metadata = {name: t.half() for name, t in tensors.items() if name.endswith((".scale", ".zero")) and t.is_floating_point()}
    save_file(tensors | metadata, path, metadata={"format": "pt"})
    return "defaults: asymmetric, no calibration; scales and zeros in float16"


def llmcompressor(job: Job, rows: torch.Tensor, folder: Path) -> str:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {"num_bits": job["bits"], "type": "int", "symmetric": True, "strategy": "group", "group_size": job["group"]} | job["options"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": [[1] * rows.shape[1]] * len(rows)})
    recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=rows.shape[1], num_calibration_samples=len(data))
    model.save_pretrained(folder, save_compressed=True)
    return "symmetric, static act-order by default, " + ("observer mse" if job["options"] else "defaults")


def autoround(job: Job, rows: torch.Tensor, folder: Path) -> str:
    from auto_round import AutoRound

    model, tokenizer = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32), AutoTokenizer.from_pretrained(job["model"])
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    sizes = {"seqlen": rows.shape[1], "nsamples": len(rows), "dataset": data}
    rounding = AutoRound(
        model, tokenizer, bits=job["bits"], group_size=job["group"], sym=True, device_map="cpu", enable_torch_compile=False, **sizes, **job["options"]
    )
    rounding.quantize_and_save(str(folder), format="auto_gptq")
    return f"symmetric, {job['options'].get('iters', 200)} steps a block, else defaults; saved as auto_gptq"


LIBRARIES: dict[str, tuple[Callable[[Job, torch.Tensor, Path], str], str, str]] = {  # how they make a folder, what python and pip call them
    "gptqmodel": (gptqmodel, "gptqmodel", "gptqmodel"), "hqq": (hqq, "hqq.core.quantize", "hqq"),
    "llmcompressor": (llmcompressor, "llmcompressor", "llmcompressor"), "autoround": (autoround, "auto_round", "auto-round"),
}  # fmt: skip


def peak_mb() -> float:
    """Peak resident size of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6, 1)


def main() -> None:
    job, lines = json.loads(Path(sys.argv[1]).read_text("utf-8")), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    make, module, package = LIBRARIES[job["library"]]
    rows, model, folder = load_file(job["ids"])["ids"], Path(job["model"]), Path(job["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    importlib.import_module(module)
    imports, start = peak_mb(), time.process_time()
    told = make(job, rows, folder)
    seconds, peak = time.process_time() - start, peak_mb()
    inner = [path for path in folder.glob("*/config.json") if not (folder / "config.json").exists()]
    for found in inner:  # auto-round makes a folder in the folder
        for path in found.parent.iterdir():
            path.rename(folder / path.name)
        found.parent.rmdir()
    for path in (path for pattern in TOKENIZER for path in model.glob(pattern)):
        shutil.copyfile(path, folder / path.name)
    symmetric = job["library"] != "hqq"
    row = {"seconds": seconds, "peak_mb": peak, "imports_mb": imports, "symmetric": symmetric, "settings": told}
    print(json.dumps(row | {"version": version(package)}), file=lines, flush=True)


if __name__ == "__main__":
    main()
