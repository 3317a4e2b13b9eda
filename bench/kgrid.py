"""Scales tuned on the grid of GGUF's K types, beside scales tuned freely: perplexity packed, tuned, and as the exported file holds it.

K types want rows of multiples of 256, which none of the real models here has, so a LLaMA of hidden size 256 is trained first on the text of `tiny`
(train_tiny.py), for minutes and not for hours: it feels compression less than a saturated model does. Its folder stays in --work.

    python bench/kgrid.py --work /tmp/kgrid [--train 600] [--steps 120] [--out bench/results/kgrid.csv]
"""

import argparse
import csv
import shutil
import sys
import time
from pathlib import Path

import torch
from train_tiny import SEQ, VOCAB, batch, corpus, encode, loss_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import compressor
from compressor.pipelines import checkpoint
from compressor.pipelines.export import Target, export

KINDS = {4: "q4_k", 3: "q3_k", 2: "q2_k"}


def train(folder: Path, steps: int) -> None:
    """A LLaMA of two layers, 256 wide, on the prose of the standard library."""
    tokenizer, began = AutoTokenizer.from_pretrained(checkpoint.TINY), time.perf_counter()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=SEQ,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
    )
    stream, optimizer = encode(tokenizer, corpus()), torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        loss = loss_of(model, batch(stream, step, 16, 0))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} loss {float(loss):.3f} {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def arm(source: Path, bits: int, grid: str, steps: int, work: Path) -> dict[str, object]:
    """One packed model, tuned freely or on the grid, and exported as the K type of its width."""
    model = compressor.load(str(source), "cpu").compress(bits=bits, group=128)
    packed = model.evaluate()["perplexity"]
    if steps:
        model.tune(method="peqa", steps=steps, grid=grid)
    tuned = model.evaluate()["perplexity"]
    for name in ("packed", "out"):
        shutil.rmtree(work / name, ignore_errors=True)
    model.save(work / "packed")
    document, _ = export(str(work / "packed"), work / "out", Target(f"gguf:{KINDS[bits]}", data="python", device="cpu"))
    seen = document.get("perplexity", {"before": 1.0, "after": 1.0})
    return {
        "bits": bits, "type": KINDS[bits], "grid": grid, "steps": steps, "packed": round(packed, 3), "tuned": round(tuned, 3),
        "exact": document["exact"],
        "growth_of_export": round(seen["after"] / seen["before"] - 1, 5), "largest_layer_error": document["error"]["largest"],
        "bits_per_weight": document["bits_per_weight"],
    }  # fmt: skip


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--work", type=Path, required=True)
    ap.add_argument("--train", type=int, default=600)
    ap.add_argument("--steps", type=int, default=120)
    ap.add_argument("--out", type=Path, default=Path("bench/results/kgrid.csv"))
    a = ap.parse_args()
    source = a.work / f"llama256-{a.train}"
    if not (source / "config.json").exists():
        train(source, a.train)
    dense = compressor.load(str(source), "cpu").evaluate()["perplexity"]
    rows = []
    for bits, kind in KINDS.items():
        for grid in ("none", kind):
            rows.append({"dense": round(dense, 3)} | arm(source, bits, grid, a.steps, a.work))
            print(rows[-1], flush=True)
    with a.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
