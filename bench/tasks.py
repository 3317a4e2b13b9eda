"""Two tasks tuned on one packed base: swapping against the folders that were tuned, and every merge against the single tasks.

The base is packed once. Every tuner is run on each text for the same number of steps, its values saved as a task file and its model as a folder; then
one model of the base loads the files in turn. `exact`: the logits of 4 windows with a file in it equal those of the folder that was tuned, bit for
bit, each way round. `swap_ms`: median of 20 later swaps. Merges are those of `compressor merge-tasks`; perplexities are of the held-out part of each
text, and `mean` is geometric. `gain`: the least mean of a single task over the merge's, less 1; above 0 the merge is the better one.

    python bench/tasks.py                          (python and wikitext2 on `tiny`, 3 bits, groups of 128)
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rows import write_rows

import compressor
from compressor import __version__
from compressor.export.merge import Options
from compressor.pipelines import data, merging, tasks

FIELDS = [
    "model", "bits", "group", "tune", "values", "lr", "steps", "ppl_a", "ppl_b", "mean", "gain", "exact", "swap_ms", "file_bytes", "text_a", "text_b",
    "window", "seed", "torch", "compressor",
]  # fmt: skip
BASES = {"peqa": {"packer": "gptq"}, "qalora": {"packer": "gptq"}, "table": {"packer": "sketch", "group": 128}}
MERGES: dict[str, Options] = {
    "sum": Options("sum"), "sum, 0.7 each": Options("sum", (0.7, 0.7)), "soup": Options("soup"), "greedy": Options("greedy"), "ties": Options("ties"),
    "ties, 0.5": Options("ties", density=0.5), "breadcrumbs": Options("breadcrumbs"), "breadcrumbs, 0.9": Options("breadcrumbs", density=0.9),
    "lines": Options("lines"),
}  # fmt: skip


class Pair:
    """Two texts on one base of a kind, in a folder of its own."""

    def __init__(self, a: argparse.Namespace, tune: str, folder: Path):
        self.a, self.tune, self.folder = a, tune, folder
        self.files = [folder / "a.safetensors", folder / "b.safetensors"]
        model = compressor.load(a.model, "cpu").compress(calib=a.texts[0], bits=a.bits, **({"group": a.group} | BASES[tune]))
        model.save(folder / "base")
        for text, file in zip(a.texts, self.files, strict=True):
            tuned = compressor.load(str(folder / "base"), "cpu")
            log = tuned.tune(text, method=tune, steps=a.steps, seed=a.seed)
            self.lr = max(step["lr"] for step in log.curve)
            tuned.save_task(file)
            tuned.save(folder / file.stem)

    def swaps(self) -> dict[str, Any]:
        """Swapping, a to b and back, against the folders that were tuned."""
        ids = torch.cat([data.windows(data.load(text).test, (model := self.base()).tokenizer, 256).ids[:4] for text in self.a.texts])
        whole = [logits(compressor.load(str(self.folder / file.stem), "cpu").model, ids) for file in self.files]
        exact = []
        for turn in (0, 1, 0, 1):
            model.load_task(self.files[turn])
            exact.append(torch.equal(logits(model.model, ids), whole[turn]))
        took = []
        for i in range(20):
            start = time.perf_counter()
            model.load_task(self.files[i % 2])
            took.append(time.perf_counter() - start)
        return {"exact": all(exact), "swap_ms": round(1000 * statistics.median(took), 2), "file_bytes": self.files[0].stat().st_size}

    def base(self) -> compressor.Model:
        return compressor.load(str(self.folder / "base"), "cpu")

    def merges(self) -> list[dict[str, Any]]:
        """One row for the base, each task and each merge."""
        rows: dict[str, dict[str, Any]] = {}
        texts = merging.Texts(tuple(self.a.texts), None, self.a.max_tokens)
        for i, (name, options) in enumerate(MERGES.items()):
            document, _ = merging.merge_tasks(str(self.folder / "base"), self.files, self.folder / f"{i}.safetensors", options, texts, "cpu")
            self.window = document["protocol"][0]["window"]
            for row in document["scores"]:
                rows.setdefault({"merged": name}.get(row["name"], row["name"]), row)
        singles = min(rows[tasks.short(file)]["mean"] for file in self.files)
        names = {tasks.short(file): f"task {which}" for file, which in zip(self.files, "ab", strict=True)}
        return [
            {"values": names.get(name, name), "ppl_a": round(row["perplexity"][0], 3), "ppl_b": round(row["perplexity"][1], 3),
             "mean": round(row["mean"], 3), "gain": round(singles / row["mean"] - 1, 4)} for name, row in rows.items()
        ]  # fmt: skip


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids).logits
    return found


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).parents[2] / "shared" / "data"
    ap.add_argument("--model", default="tiny")
    ap.add_argument("--texts", nargs=2, default=["python", str(shared / "wikitext2" / "wiki.valid.tokens")])
    ap.add_argument("--bits", type=int, default=3)
    ap.add_argument("--group", type=int, default=128)
    ap.add_argument("--tune", nargs="+", default=list(BASES))
    ap.add_argument("--steps", type=int, default=182)
    ap.add_argument("--seed", type=int, default=42)
    ap.add_argument("--max-tokens", type=int, default=65536)
    ap.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tasks.csv")
    a = ap.parse_args()
    rows: list[dict[str, Any]] = []
    for tune in a.tune:
        with tempfile.TemporaryDirectory() as place:
            pair = Pair(a, tune, Path(place))
            swaps, found = pair.swaps(), pair.merges()
        same = {
            "model": Path(a.model).name, "bits": a.bits, "group": BASES[tune].get("group", a.group), "tune": tune, "lr": pair.lr, "steps": a.steps,
            "text_a": Path(a.texts[0]).name, "text_b": Path(a.texts[1]).name, "window": pair.window, "seed": a.seed, "torch": torch.__version__,
            "compressor": __version__,
        }  # fmt: skip
        for row in found:
            rows.append(same | row | (swaps if row["values"].startswith("task") else {}))
            print({key: rows[-1].get(key) for key in ("tune", "values", "ppl_a", "ppl_b", "mean", "gain", "exact", "swap_ms")}, flush=True)
    write_rows(a.out, FIELDS, rows)


if __name__ == "__main__":
    main()
