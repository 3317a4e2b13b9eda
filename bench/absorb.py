"""Trained paths absorbed by the packed weights: LoRA by codes and values, which loses, and QA-LoRA by zeros, which must not.

LoRA of rank 8 trains beside a packed base, is measured, absorbed whatever it costs (`compressor run` would keep it above `--absorb-limit`) and
measured again. QA-LoRA trains low-rank changes of the zeros; then the model is saved, loaded, and measured again. `before` and `after` are
perplexities of the domain, `outside_*` of another text; `logit_change` is the largest change of a logit over 4 held-out windows, `share` its size
against the largest logit. Of QA-LoRA also the two passes of the paper, base plus pooled path, in float64, against our one pass: the largest
difference of an output of a linear over its largest output, `path_error` with the path as the zeros that are stored have it, which leaves float32
rounding, and `rounding` with A and B as they were trained, which adds that of zeros to float16.

    python bench/absorb.py
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from rows import write_rows
from torch import Tensor

import compressor
from compressor import __version__
from compressor.linear import packed_linears
from compressor.pipelines import adapters, data, evaluate, load
from compressor.pipelines.tuners import Tuning, resolved
from compressor.recipe import Recipe
from compressor.tune.batches import Batches, CausalLM
from compressor.tune.loop import train

FIELDS = [
    "model", "tune", "bits", "group", "rank", "lr", "steps", "untuned", "before", "after", "rise", "outside_before", "outside_after", "logit_change",
    "share", "path_error", "rounding", "ways", "seconds", "window", "seed", "torch", "compressor",
]  # fmt: skip


class Trained:
    """A base packed and tuned in memory."""

    def __init__(self, a: argparse.Namespace, bits: int, method: str):
        self.a = a
        self.recipe = Recipe(model=a.model, seed=a.seed).with_(quant__bits=bits, quant__group=a.group, tune__method=method, tune__epochs=a.epochs)
        self.recipe = self.recipe.with_(tune=resolved(self.recipe.tune))
        self.domain, self.outside = data.load(a.data), data.load_text(a.outside)
        self.model = compressor.load(a.model, "cpu").compress(calib=a.data, bits=bits, group=a.group, seed=a.seed)
        self.loaded: load.Loaded = self.model._loaded
        self.window = load.context(self.loaded.config)
        windows = data.windows(self.domain.train, self.loaded.tokenizer, self.window)
        self.held = data.windows(self.domain.test, self.loaded.tokenizer, self.window).ids[:4]
        self.untuned, objective = self.measure(self.loaded)["domain"], CausalLM(windows.ids, windows.labels)
        self.steps = Batches(objective, self.recipe.tune, a.seed).steps
        self.tuning = Tuning(self.loaded, self.recipe.tune, a.seed, self.steps)
        train(self.loaded.model, self.tuning.parameters, objective, self.recipe.tune, a.seed, None, "", None, None, self.tuning.pruner)

    def measure(self, loaded: load.Loaded) -> dict[str, float]:
        found = evaluate.measure(
            loaded.model, loaded.tokenizer, {"domain": self.domain.test, "outside": self.outside}, self.window, self.a.max_tokens
        )
        return {name: found[name]["perplexity"] for name in ("domain", "outside")}

    @torch.no_grad()
    def logits(self, loaded: load.Loaded) -> Tensor:
        model: Any = loaded.model
        found: Tensor = model(self.held).logits
        return found

    def row(self) -> dict[str, Any]:
        lora = self.recipe.tune.method == "lora"
        facts: dict[str, Any] = {} if lora else paths(self.loaded)
        before = self.logits(self.loaded)
        first = self.measure(self.loaded)
        self.tuning.finish()
        if lora:
            ids = data.calibration(self.domain.train, self.loaded.tokenizer, self.window, self.recipe.data.nsamples, self.a.seed)
            done = adapters.take_up(self.loaded, self.recipe.quant, ids, self.held, lambda: self.measure(self.loaded)["domain"], math.inf)
            facts |= {"ways": " ".join(f"{way} {count}" for way, count in sorted(done["ways"].items())), "seconds": round(done["seconds"], 1)}
            after, again = self.logits(self.loaded), self.measure(self.loaded)
        else:
            with tempfile.TemporaryDirectory() as place:
                self.model.save(Path(place) / "model")
                loaded = load.load(str(Path(place) / "model"), "cpu")
                after, again = self.logits(loaded), self.measure(loaded)
        change, tune = float((after - before).abs().max()), self.recipe.tune
        return facts | {
            "model": Path(self.a.model).name, "tune": tune.method, "bits": self.recipe.quant.bits, "group": self.a.group, "rank": tune.rank,
            "lr": tune.lr, "steps": self.steps, "untuned": round(self.untuned, 3), "before": round(first["domain"], 4),
            "after": round(again["domain"], 4), "rise": f"{again['domain'] / first['domain'] - 1:.2g}", "outside_before": round(first["outside"], 3),
            "outside_after": round(again["outside"], 3), "logit_change": f"{change:.3g}", "share": f"{change / float(before.abs().max()):.2g}",
            "window": self.window, "seed": self.a.seed, "torch": torch.__version__, "compressor": __version__,
        }  # fmt: skip


@torch.no_grad()
def paths(loaded: load.Loaded) -> dict[str, str]:
    """The two differences of a model that QA-LoRA is attached to, the worst of its linears, at random inputs."""
    worst = {"path_error": 0.0, "rounding": 0.0}
    for layer in packed_linears(loaded.model).values():
        path: Any = layer.tuned_zero
        x = torch.randn(16, layer.in_features, generator=torch.Generator().manual_seed(0))
        scale, start = layer.learned.double(), path.start.double()
        base = x.double() @ ((layer.packed().codes().double() - start.repeat_interleave(layer.group, 1)) * scale.repeat_interleave(layer.group, 1)).T
        pooled = x.double().view(16, -1, layer.group).sum(2)
        changes = {"path_error": path().double() - start, "rounding": path.unit.double() * (path.b.double() @ path.a.double())}
        found = layer(x).double() - (0 if layer.bias is None else layer.bias.double())
        for key, change in changes.items():
            wanted = base + pooled @ (-scale * change).T
            worst[key] = max(worst[key], float((found - wanted).abs().max() / wanted.abs().max()))
    return {key: f"{value:.2g}" for key, value in worst.items()}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="tiny")
    ap.add_argument("--data", default="python")
    ap.add_argument("--outside", default="python-source")
    ap.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    ap.add_argument("--group", type=int, default=128)
    ap.add_argument("--epochs", type=float, default=Recipe().tune.epochs)
    ap.add_argument("--seed", type=int, default=42)
    ap.add_argument("--max-tokens", type=int, default=65536)
    ap.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "absorb.csv")
    a = ap.parse_args()
    rows: list[dict[str, Any]] = []
    for bits in a.bits:
        for method in ("lora", "qalora"):
            rows.append(Trained(a, bits, method).row())
            print({key: rows[-1].get(key) for key in FIELDS[:19]}, flush=True)
    write_rows(a.out, FIELDS, rows)


if __name__ == "__main__":
    main()
