"""A report that has every section, and the folder of a small sweep: numbers made up, shapes as the stages write them."""

import json
from pathlib import Path
from typing import Any

from compressor.pipelines.report import Report
from compressor.recipe import Recipe


def full(blocks: int = 3) -> Report:
    out = Report(created="2025-01-01T00:00:00+00:00", command="compressor run tiny")
    out.recipe = Recipe().with_(tune__method="peqa").to_dict()
    out.model = {"name": "some-model", "source": "org/some-model", "parameters": 1_000_000, "packed_parameters": 800_000, "dense_bytes": 2_000_000}
    out.model |= {"dense_dtype": "float16", "architecture": "LlamaForCausalLM"}
    text = {"name": "python", "data_sha256": "ab" * 32, "window": 512, "stride": 512, "tokens": 4096}
    out.protocol = {"domain": text, "outside": text | {"name": "other", "data_sha256": "cd" * 32}}
    for state, inside, outside, bits, folder in (
        ("dense", 5.68129, 3.2, 16.0, 2_000_000),
        ("pruned", 6.1, 3.5, 16.0, 1_500_000),
        ("packed", 6.4522, 3.7, 3.125, 450_000),
        ("tuned", 5.9, 3.75, 3.125, 450_000),
    ):
        texts = {"domain": {"perplexity": inside, "tokens": 4096, "tokens_per_second": 321.5}, "outside": {"perplexity": outside, "tokens": 4096}}
        setattr(out, state, texts | {"bits_per_weight": bits, "folder_bytes": folder, "ratio": 2_000_000 / folder})
    kinds = ("self_attn.q_proj", "mlp.down_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")
    row = {"shape": [64, 256], "bits": 3, "group": 128, "symmetric": True, "packer": "gptq", "damp": 0.01, "seconds": 0.5, "note": None}
    out.layers = [row | {"name": f"model.layers.{b}.{k}", "error": 0.01 * (b + i + 1)} for b in range(blocks) for i, k in enumerate(kinds)]
    out.unpacked = [{"name": "lm_head", "shape": [512, 64], "reason": "output embeddings stay dense"}]
    out.training = {
        "curve": [{"step": i, "loss": 2 - i / 100, "lr": 1e-3} for i in range(1, 41)],
        "evals": [{"step": 20, "perplexity": 6.0}],
        "notes": [],
    }
    out.pruning = {"method": "loraprune", "ratio": 0.25, "prunable": 800_000, "heads": 2, "ffn": 256, "curve": out.training["curve"]}
    out.seconds, out.peak_bytes = {"compress": 12.5, "tune": 400.0}, {"compress": 10_000_000, "tune": 20_000_000, "tune_gpu": 30_000_000}
    out.samples = [{"prompt": "def f", "dense": "(x):", "packed": "(y):", "tuned": "(z):"}]
    score = {"metric": "accuracy", "stderr": 0.015, "examples": 100, "shots": 0, "data_sha256": "ef" * 32, "engine": "lm-eval 0.4.13"}
    for state, value, mean in (("dense", 0.62, 0.0), ("packed", 0.55, 0.21), ("tuned", 0.6, 0.08)):
        getattr(out, state)["tasks"] = {"boolq": score | {"value": value}}
        if state != "dense":
            found = {"mean": mean, "stderr": 0.01, "median": mean / 2, "p90": 2 * mean, "p99": 4 * mean, "max": 9 * mean, "top1": 0.875}
            found |= {"loss_change": mean, "loss_change_stderr": 0.02, "tokens": 4096, "windows": 8}
            getattr(out, state)["divergence"] = found
    out.choice = {
        "target": {"bits": 3.2}, "measure": "kl", "predicted": {"bits_per_weight": 3.19, "folder_bytes": 455_000, "loss": 0.1},
        "reached": {"bits_per_weight": 3.19, "folder_bytes": 455_100, "loss": 0.12}, "solver": {"engine": "milp", "gap": 0.0},
        "uniform": [{"spec": f"w{b}g128", "bits_per_weight": b + 0.125, "folder_bytes": 100_000 * b + 140_000, "loss": 4 / 4**b} for b in (2, 3, 4)],
        "units": [{"layers": ["model.layers.0.self_attn.q_proj"], "chosen": "w3g128", "options": [{"spec": "w3g128", "bits": 3.1, "damage": 0.02}]}],
    }  # fmt: skip
    out.export = {"format": "compressed-tensors pack-quantized", "verified": True, "files": {"model.safetensors": 450_000}}
    return out


def sweep_rows() -> list[dict[str, Any]]:
    """Three packers at three widths, one of which failed; rtn at 2 bits is far off, gptq and sketch share the front."""
    quality = {"rtn": (900.0, 45.0, 31.5), "gptq": (120.0, 32.0, 30.2), "sketch": (40.0, 31.0, 29.9)}
    rows = []
    for packer, values in quality.items():
        for bits, perplexity in zip((2, 3, 4), values, strict=True):
            bpw = bits + (0.5 if packer == "sketch" else 0.125)
            dense = {"domain": 29.5, "outside": 43.5, "bits_per_weight": 16.0, "folder_bytes": 2_226_625, "tokens_per_second": 17_600.0, "tasks": {}}
            row: dict[str, Any] = {"id": f"w{bits}g128-{packer}-{len(rows):08x}", "label": f"w{bits}g128-{packer}", "status": "ok", "state": "packed"}
            row |= {"keys": {"quant.bits": bits, "quant.packer": packer}, "front": packer != "rtn", "dense": dense, "error": None, "attempts": 1}
            row |= {"perplexity": perplexity, "outside": 1.5 * perplexity, "bits_per_weight": bpw, "folder_bytes": int(590_000 + 98_304 * bpw)}
            row |= {
                "tasks": {"boolq": {"metric": "accuracy", "value": 0.7 - perplexity / 900, "stderr": 0.015}},
                "wall_seconds": 20.0 + bits,
                "host": "a",
            }
            row |= {
                "tokens_per_second": 14_000.0 - 500 * bits - 10 * len(rows),
                "peak_bytes": {"evaluate dense_gpu": 9e8, "evaluate packed": 7e9, "evaluate packed_gpu": 1e9 + 1e7 * bits},
            }
            rows.append(row | {"finished": "2026-01-31T12:00:00+00:00", "path": None, "pruned": None, "packed": None, "tuned": None})
    gone = dict.fromkeys(("perplexity", "outside", "bits_per_weight", "folder_bytes", "tokens_per_second", "dense", "state"))
    return rows + [rows[0] | gone | {"id": "broken", "status": "failed", "error": "the loss is not finite", "tasks": {}, "front": False}]


def write_sweep(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """The files of a sweep that its page reads; the first run's report stands."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    plan = {"model": "tiny", "axes": ["quant.bits", "quant.packer"], "experiments": len(rows) + 1, "command": "compressor sweep tiny --grid g.yaml"}
    (folder / "plan.json").write_text(json.dumps(plan), "utf-8")
    run = folder / "runs" / str(rows[0]["id"])
    run.mkdir(parents=True, exist_ok=True)
    full().save(run / "report.json")
    return folder
