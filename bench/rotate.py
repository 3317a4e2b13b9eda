"""What rotations before packing are worth: perplexities of a model as it is, and of the same function written down in a worse basis.

Every row packs the model anew, with the calibration windows of its seed, and measures it as runs do. `planted` says how the model was changed first,
exactly, so that its dense perplexity stays (`dense_ppl` is that of the changed model):

    gains   four channels of every norm's gain are 30 times larger, and the columns of who reads them 30 times smaller: outliers of activations
    basis   the residual stream turned to the principal axes of its readers' weights, so that few columns hold most of their size

`layer_error` is the geometric mean of the layers' relative output errors (of packers that train blocks, of the blocks'), `more_bytes` what the folder
holds more (a head that was tied).

    python bench/rotate.py --model tiny --packer gptq --bits 3 2 --seeds 42 1 2
    python bench/rotate.py --model ../shared/models/babyllama --data ../shared/data/tinystories/stories.txt --group 32 --planted gains basis
"""

import argparse
import csv
import math
import time
from pathlib import Path
from typing import Any

import torch
from rows import write_rows

from compressor import __version__, linear
from compressor.pipelines import compress, data, evaluate, load, rotating, write
from compressor.recipe import ROTATIONS, Quant
from compressor.rotate import learned, merge
from compressor.rotate import roles as role

FIELDS = [
    "model", "planted", "packer", "bits", "group", "rotate", "seed", "domain_ppl", "outside_ppl", "dense_ppl", "layer_error", "logits_moved",
    "rotate_seconds", "pack_seconds", "more_bytes", "nsamples", "window", "domain_sha256", "outside_sha256", "threads", "torch", "compressor",
]  # fmt: skip
KEY = ("model", "planted", "packer", "bits", "group", "rotate", "seed")
CHANNELS, FACTOR = 4, 30.0


@torch.no_grad()
def plant(model: Any, how: str) -> None:
    """Write the model's function down in a worse basis, in place."""
    blocks = linear.find_blocks(model)[1]
    if how == "gains":
        channels = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(0))[:CHANNELS]
        for block in blocks:
            for name, readers in zip(role.NORMS, (role.FIRST, role.SECOND), strict=True):
                block.get_submodule(name).weight[channels] *= FACTOR
                for layer in filter(None, (role.child(block, each) for each in readers)):
                    layer.weight[:, channels] /= FACTOR
    if how == "basis":
        start = merge.planned(model, "hadamard", 0)
        assert start.roles is not None
        total = torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64)
        for block in blocks:
            for name, readers in zip(role.NORMS, (role.FIRST, role.SECOND), strict=True):
                gain = role.gain(block.get_submodule(name), start.roles.offset)
                for layer in filter(None, (role.child(block, each) for each in readers)):
                    weight = layer.weight.double() * gain
                    total += weight.T @ weight
        size = blocks[0].self_attn.head_dim
        matrices = {"residual": torch.linalg.eigh(total).eigenvectors} | {str(i): torch.eye(size, dtype=torch.float64) for i in range(len(blocks))}
        found = learned.merged(start, matrices)
        found.outside(model, torch.float32)
        for index, block in enumerate(blocks):
            found.block(index, block)


def measured(loaded: load.Loaded, texts: dict[str, data.Corpus], a: argparse.Namespace) -> tuple[float, float]:
    found = evaluate.measure(loaded.model, loaded.tokenizer, texts, a.window, 65536)
    return found["domain"]["perplexity"], found["outside"]["perplexity"]


def row(a: argparse.Namespace, planted: str, packer: str, bits: int, method: str, seed: int, dense: dict[str, float]) -> dict[str, Any]:
    loaded, domain, outside = load.load(a.model, "cpu"), data.load(a.data), data.load_text("python-source")
    texts = {"domain": domain.test, "outside": outside}
    plant(loaded.model, planted)
    if planted not in dense:
        dense[planted] = measured(loaded, texts, a)[0]
    ids = data.calibration(domain.train, loaded.tokenizer, a.window, a.nsamples, seed)
    quant, more = Quant(bits=bits, packer=packer, group=a.group, rotate=method), merge.added(loaded.model, method) * loaded.dtype.itemsize
    begin = time.perf_counter()
    moved = rotating.apply(loaded, quant, seed)
    turned = time.perf_counter()
    write.round_to_folder(loaded, {t.name for t in compress.plan(loaded.model, quant).packed()})
    layers, _, _ = compress.compress(loaded.model, quant, load.scale_dtype("auto", loaded.dtype), ids, seed=seed)
    packed = time.perf_counter()
    ppl = measured(loaded, texts, a)
    return {
        "model": Path(a.model).name, "planted": planted, "packer": packer, "bits": bits, "group": a.group, "rotate": method, "seed": seed,
        "domain_ppl": round(ppl[0], 4), "outside_ppl": round(ppl[1], 4), "dense_ppl": round(dense[planted], 4),
        "layer_error": round(math.exp(sum(math.log(max(each["error"], 1e-9)) for each in layers) / len(layers)), 5),
        "logits_moved": f"{moved:.1e}", "rotate_seconds": round(turned - begin, 1), "pack_seconds": round(packed - turned, 1), "more_bytes": more,
        "nsamples": a.nsamples, "window": a.window, "domain_sha256": domain.test.sha256[:16], "outside_sha256": outside.sha256[:16],
        "threads": torch.get_num_threads(), "torch": torch.__version__, "compressor": __version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default="python")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--packer", nargs="+", default=["gptq"])
    parser.add_argument("--rotate", nargs="+", default=list(ROTATIONS))
    parser.add_argument("--planted", nargs="+", default=["none"], choices=["none", "gains", "basis"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rotate.csv")
    a = parser.parse_args()
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    if a.out.exists():
        with a.out.open(encoding="utf-8") as file:
            rows = {tuple(each[key] for key in KEY): each for each in csv.DictReader(file)}
    dense: dict[str, float] = {}
    wanted = [(p, k, b, m, s) for p in a.planted for k in a.packer for b in a.bits for m in a.rotate for s in a.seeds]
    for each in wanted:
        found = row(a, *each, dense)
        rows[tuple(str(found[key]) for key in KEY)] = found
        print({key: found[key] for key in FIELDS[:15]}, flush=True)
        write_rows(a.out, FIELDS, list(rows.values()))


if __name__ == "__main__":
    main()
