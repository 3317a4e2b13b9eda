"""Peak memory of one pruning step: LoRAPrune's score on a dense and on a packed base beside a score that needs every weight's gradient.

A random LLaMA (no checkpoint is needed to measure memory) does one step of the pruning loop: forward, backward, scores of all units, update of the
low-rank paths. Each arm runs in a process of its own; what is counted is the peak resident size above that of the same process before the model was
made. Models in float32, as a CPU computes; batch and window are small, so that weights and gradients decide and not activations.

    python bench/prune_memory.py
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rows import write_rows

FIELDS = [
    "arm", "hidden", "layers", "ffn", "heads", "key_heads", "parameters", "rank", "batch", "seqlen", "peak_bytes", "ratio", "torch", "compressor",
]  # fmt: skip
ARMS = {"loraprune": ("loraprune", 0), "loraprune, packed 4 bits": ("loraprune", 4), "full gradient": ("taylor", 0)}
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 8}


def step(method: str, bits: int, batch: int, seqlen: int) -> dict[str, Any]:
    """One step in this process; returns its peak bytes above what it started with."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from compressor import __version__, linear
    from compressor.pipelines import compress, load, pruning
    from compressor.pipelines.stages import peak_bytes, reset_peak
    from compressor.recipe import Prune, Quant
    from compressor.tune.batches import CausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(0, 4096, (2 * batch, seqlen))
    reset_peak()
    start = peak_bytes()[""]
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=4096, max_position_embeddings=seqlen, tie_word_embeddings=True))
    parameters = sum(p.numel() for p in model.parameters())
    if bits:
        compress.compress(model, Quant(bits=bits, packer="rtn", shrink=False), torch.float16, None)
        assert linear.packed_linears(model)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what packing has freed goes back to the system, or the peak would begin there
    reset_peak()
    options = Prune(method=method, ratio=0.2, steps=2, batch=batch, start="random", one_shot=True)
    loaded = load.Loaded(model.eval(), None, Path("."), "random", dict(model.config.to_dict()), torch.float32)
    loaded.follow_config()
    peaks: list[int] = []  # before the cut at the end, which is no part of a step
    pruning.prune(loaded, options, CausalLM(ids, ids), 0, on_step=lambda _row: peaks.append(peak_bytes()[""]))
    facts = {"parameters": parameters, "rank": options.rank, "torch": torch.__version__, "compressor": __version__}
    return facts | {"peak_bytes": max(peaks) - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", help="run this arm here and print its row as JSON")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prune_memory.csv")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(step(*ARMS[options.arm], options.batch, options.seqlen)))
        return
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        command = [sys.executable, __file__, "--arm", arm, "--batch", str(options.batch), "--seqlen", str(options.seqlen)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        names = {"hidden": "hidden_size", "layers": "num_hidden_layers", "ffn": "intermediate_size", "heads": "num_attention_heads"}
        shape = {key: SHAPE[name] for key, name in (names | {"key_heads": "num_key_value_heads"}).items()}
        rows.append({"arm": arm} | shape | found | {"batch": options.batch, "seqlen": options.seqlen})
    full = next(row["peak_bytes"] for row in rows if row["arm"] == "full gradient")
    for row in rows:
        row["ratio"] = round(row["peak_bytes"] / full, 3)
        print(f"{row['arm']:26s} {row['peak_bytes'] / 1e6:8.0f} MB, {row['ratio']:.3f} of the full gradient's")
    write_rows(options.out, FIELDS, rows)


if __name__ == "__main__":
    main()
