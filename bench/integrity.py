"""What digests cost: processor seconds a gigabyte to write digests.json and to verify a folder, packed codes at random, one thread.

python bench/integrity.py --gigabytes 1 --out bench/results/integrity.csv
"""

import argparse
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import write_rows
from safetensors.torch import save_file

from compressor import __version__
from compressor.pipelines import digests
from compressor.pipelines.verify import WHOLE, verify

FIELDS = ["op", "gigabytes", "tensors", "cpu_seconds_per_gb", "list_bytes", "peak_mb_more", "sha_instructions", "machine", "python", "compressor"]
SHARD = 8  # tensors of 64 MiB


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Processor seconds, the least of three, and MB by which the process grew."""
    before, least = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, float("inf")
    for _ in range(3):
        start = time.process_time()
        work()
        least = min(least, time.process_time() - start)
    return least, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    asked, rows = parser.parse_args(), []
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    about = {"sha_instructions": " sha_ni" in flags, "machine": platform.machine(), "python": platform.python_version(), "compressor": __version__}
    with tempfile.TemporaryDirectory() as place:
        folder, shards = Path(place), max(1, round(asked.gigabytes * 1e9 / (SHARD << 26)))
        for shard in range(shards):
            codes = {f"l{shard}.{i}.weight_packed": torch.randint(-(2**31), 2**31, (4096, 4096), dtype=torch.int32) for i in range(SHARD)}
            save_file(codes, folder / f"model-{shard}.safetensors")
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
        for op, work in (("seal", lambda: digests.seal(folder, None)), ("verify", lambda: verify(folder))):
            seconds, more = timed(work)
            row = {"op": op, "gigabytes": round(size, 2), "tensors": shards * SHARD, "cpu_seconds_per_gb": round(seconds / size, 2)}
            rows.append(row | {"list_bytes": (folder / digests.NAME).stat().st_size, "peak_mb_more": round(more, 1)} | about)
            print(rows[-1])
        assert verify(folder)[0]["verdict"] == WHOLE
    if asked.out is not None:
        write_rows(asked.out, FIELDS, rows)


if __name__ == "__main__":
    main()
