"""What other software computes from our folders: largest difference of logits to our packed forward, in float32 on a CPU.

Each row packs a model, writes the folder, and loads it with plain transformers + compressed-tensors. Asymmetric folders need
`CompressedTensorsConfig(dequantize=True)` with compressed-tensors 0.20 (its default route does not pack the zero points), which forms the
weights in the dtype of the scale.

    python bench/servers.py --out bench/results/servers.csv
"""

import argparse
import csv
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from compressor.pipelines import compress, load, write
from compressor.recipe import Quant


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", nargs="+", default=["tiny"])
    ap.add_argument("--out", type=Path, default=Path("bench/results/servers.csv"))
    a = ap.parse_args()
    rows = []
    for name in a.model:
        for bits, group, symmetric in [(2, 32, True), (3, 32, True), (3, 128, True), (3, -1, True), (4, 32, True), (3, 32, False), (4, 32, False)]:
            loaded = load.load(name, "cpu")
            quant = Quant(bits=bits, group=group, symmetric=symmetric, packer="rtn")
            write.round_to_folder(loaded, {t.name for t in compress.plan(loaded.model, quant).packed()})
            compress.compress(loaded.model, quant, load.scale_dtype("auto", loaded.dtype), None)
            ids = torch.randint(1, loaded.config["vocab_size"], (4, 128), generator=torch.Generator().manual_seed(0))
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                write.write_folder(loaded, Path(folder))
                ours = load.load(folder, "cpu").model(ids).logits
                options = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
                theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)(ids).logits
            rows.append({
                "model": Path(name).name, "reader": "transformers + compressed-tensors", "bits": bits, "group": group, "symmetric": symmetric,
                "max_abs_logit_error": float((ours - theirs).abs().max()), "logit_std": round(float(ours.std()), 3),
                "transformers": version("transformers"), "compressed_tensors": version("compressed-tensors"),
            })  # fmt: skip
            print(rows[-1], flush=True)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with a.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
