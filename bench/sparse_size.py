"""Bytes of sparse folders: models masked by magnitude, in float16 and in 4 bits, counted on disk and by the formula.

Nothing is measured of quality here: magnitude masks only give zeros to count. `unstructured` takes the smallest weights of each linear of the blocks,
`4block` the blocks of four with the least norm, `2:4` the two smallest of four. 4 bits are round-to-nearest, symmetric, groups of 128. `bytes` are
those of the blocks' linears in the file, `plain_bytes` of the same model in the plain format of its kind (float16 tensors, or compressed-tensors),
`file_bytes` of the whole weight file. The last rows are by formula alone: BERT-base, whose blocks hold 84.9 million prunable weights.

    python bench/sparse_size.py
    python bench/sparse_size.py --models tiny
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import write_rows
from torch import Tensor

from compressor import __version__, linear
from compressor.export import sparse
from compressor.packed import PackedWeight
from compressor.pipelines import checkpoint, compress, load, write
from compressor.recipe import Quant

FIELDS = [
    "model", "pattern", "sparsity", "values", "weights", "zeros", "bytes", "formula_bytes", "plain_bytes", "ratio", "bits_per_weight", "file_bytes",
    "torch", "compressor",
]  # fmt: skip
ARMS = [("unstructured", 0.5), ("unstructured", 0.8), ("unstructured", 0.9), ("unstructured", 0.97), ("4block", 0.8), ("2:4", 0.5)]
GROUP = 128
BERT = {"query": (768, 768), "key": (768, 768), "value": (768, 768), "attention": (768, 768), "up": (3072, 768), "down": (768, 3072)}
BERT_LAYERS = 12


def keep(w: Tensor, pattern: str, sparsity: float) -> Tensor:
    """Which weights of w [n, k] stay, bool [n, k]."""
    if ":" in pattern:
        most, of = map(int, pattern.split(":"))
        groups = w.abs().view(len(w), -1, of)
        return (groups.argsort(-1, descending=True).argsort(-1) < most).view_as(w)
    block = 4 if pattern == "4block" else 1
    norms = w.reshape(-1, block).square().sum(1)
    kept = torch.ones_like(norms, dtype=torch.bool)
    kept[norms.argsort()[: round(len(norms) * sparsity)]] = False
    return kept.repeat_interleave(block).view_as(w)


def masked(name: str, pattern: str, sparsity: float) -> load.Loaded:
    """The model in float16, its blocks' linears masked."""
    loaded = load.load(name, "cpu")
    loaded.dtype = torch.float16
    write.round_to_folder(loaded, set())
    with torch.no_grad():
        for layer in linear.linears(linear.find_blocks(loaded.model)[1]).values():
            layer.weight.mul_(keep(layer.weight, pattern, sparsity))
    return loaded


def folder_rows(name: str) -> Iterator[dict[str, Any]]:
    for pattern, sparsity in ARMS:
        for values in ("float16", "4 bits"):
            loaded = masked(name, pattern, sparsity)
            if values == "4 bits":
                compress.compress(loaded.model, Quant(bits=4, packer="rtn", group=GROUP), torch.float16, None, keep_zeros=True)
            yield {"model": Path(name).name, "pattern": pattern, "sparsity": sparsity, "values": values} | sizes(loaded, pattern, sparsity)


def sizes(loaded: load.Loaded, pattern: str, sparsity: float) -> dict[str, Any]:
    weights = write.block_weights(loaded)
    guess = 0
    for weight in weights.values():
        bits, group = (weight.bits, weight.group) if isinstance(weight, PackedWeight) else (None, -1)
        guess += sparse.estimate_bytes(weight.shape[0], weight.shape[1], sparsity, pattern, bits, group)
    with tempfile.TemporaryDirectory() as folder:
        facts = write.write_folder(loaded, Path(folder), sparse=True)
        file = sum(path.stat().st_size for path in checkpoint.weight_files(Path(folder)))
    zeros = sum(int((w.dequantize() if isinstance(w, PackedWeight) else w).eq(0).sum()) for w in weights.values())
    count = sum(w.shape[0] * w.shape[1] for w in weights.values())
    plain = round(write.bits_per_weight(weights) * count / 8)
    stored = round(facts["bits_per_weight"] * count / 8)
    return {"weights": count, "zeros": round(zeros / count, 4), "formula_bytes": guess, "file_bytes": file} | shares(count, stored, plain)


def shares(count: int, stored: int, plain: int) -> dict[str, Any]:
    return {
        "weights": count,
        "bytes": stored,
        "plain_bytes": plain,
        "ratio": round(plain / stored, 3),
        "bits_per_weight": round(8 * stored / count, 4),
    }


def bert_rows() -> Iterator[dict[str, Any]]:
    """BERT-base at 90 %, by formula."""
    forms = (("float32", None, 4), ("float16", None, 2), ("4 bits", 4, 2))
    for pattern in ("unstructured", "4block"):
        for values, bits, size in forms:
            stored = plain = count = 0
            for n, k in BERT.values():
                options = {"bits": bits, "group": GROUP, "value_bytes": size}
                stored += BERT_LAYERS * sparse.estimate_bytes(n, k, 0.9, pattern, **options)
                plain += BERT_LAYERS * sparse.estimate_bytes(n, k, 0.0, pattern, **options)
                count += BERT_LAYERS * n * k
            row = {"model": "BERT-base, by formula", "pattern": pattern, "sparsity": 0.9, "values": values, "formula_bytes": stored}
            yield row | shares(count, stored, plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "../shared/models/babyllama"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sparse_size.csv")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for row in [row for name in args.models for row in folder_rows(name)] + list(bert_rows()):
        rows.append(row | {"torch": torch.__version__, "compressor": __version__})
        print({key: row.get(key) for key in FIELDS[:-2]}, flush=True)
    write_rows(args.output, FIELDS, rows)


if __name__ == "__main__":
    main()
