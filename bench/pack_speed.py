"""Seconds per thousand rows that packers take on a layer of a large model, statistics given; on a CPU, or on a GPU where there is one.

Rows are independent, so some of them tell the time of all; the part that every layer pays once (the factor of H) is listed apart. Weights and
inputs are random (normal; inputs share 64 directions), GPTQ has groups of 128, so the errors compare packers at long rows, nothing more.

    python bench/pack_speed.py --rows 512 --out bench/results/pack_speed.csv
"""

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rows import write_rows

from compressor import __version__
from compressor.hessian import factorise, living, rounding_order
from compressor.packing import relative_error
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Quant
from compressor.stats import LayerStats

FIELDS = [
    "packer", "bits", "gpr", "bits_per_weight", "k", "rows", "seconds", "once_seconds", "seconds_per_1000_rows", "to_gptq", "layer_error", "device",
    "threads", "torch", "compressor",
]  # fmt: skip
ARMS = [("gptq", b, None) for b in (2, 3, 4)] + [("sketch", b, 1) for b in (2, 3, 4)] + [("sketch", 3, 4)]


def timed(run: Any, device: torch.device) -> tuple[float, Any]:
    start = time.perf_counter()
    out = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--k", type=int, default=11008)
    ap.add_argument("--rows", type=int, default=512)
    ap.add_argument("--tokens", type=int, default=16384)
    ap.add_argument("--out", type=Path, default=Path("bench/results/pack_speed.csv"))
    a = ap.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    small = LayerStats(256)
    small.add(torch.randn(512, 256, device=device))
    for packer, bits, gpr in ARMS:  # libraries that load on their first call
        PACKERS[packer](torch.randn(64, 256, device=device), small, Quant(bits=bits, packer=packer, gpr=gpr), 256 // (gpr or 2), torch.float16)
    stats = LayerStats(a.k)
    shared = torch.randn(64, a.k, device=device)  # directions that inputs have in common
    for part in range(0, a.tokens, 2048):
        count = min(2048, a.tokens - part)
        stats.add(torch.randn(count, a.k, device=device) + torch.randn(count, 64, device=device) @ shared / 8)
    assert stats.hessian is not None
    w = torch.randn(a.rows, a.k, device=device) * 0.02
    hessian, _ = living(stats.hessian.clone())
    once, _ = timed(lambda: factorise(hessian, rounding_order(hessian, True), 0.01), device)
    rows: list[dict[str, Any]] = []
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else next(
            (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
            platform.machine(),
        )
    )
    for packer, bits, gpr in ARMS:
        options = Quant(bits=bits, packer=packer, gpr=gpr)
        group, _ = PACKERS[packer].resolve(a.k, options, "layer")
        seconds, (packed, _) = timed(lambda p=packer, o=options, g=group: PACKERS[p](w, stats, o, g, torch.float16), device)
        per = (seconds - once) / a.rows * 1000
        like = next((r["seconds_per_1000_rows"] for r in rows if r["packer"] == "gptq" and r["bits"] == bits), per)
        rows.append({
            "packer": packer, "bits": bits, "gpr": gpr or "", "bits_per_weight": round(packed.stored_bits() / w.numel(), 4), "k": a.k,
            "rows": a.rows, "seconds": round(seconds, 1), "once_seconds": round(once, 1), "seconds_per_1000_rows": round(per, 1),
            "to_gptq": round(per / like, 2), "layer_error": round(relative_error(w, packed, stats), 5), "device": name,
            "threads": torch.get_num_threads(), "torch": torch.__version__, "compressor": __version__,
        })  # fmt: skip
        print(rows[-1], flush=True)
    write_rows(a.out, FIELDS, rows)


if __name__ == "__main__":
    main()
