"""A LoRA path beside a packed linear in two passes, as peft computes it, and in one, inside the packed matmul (`dispatch.linear(low=…)`).

    two   y = packed(x) + gamma B (A x), five operations and two more matrices of the size of y
    one   y = packed(x, low=(gamma A x, B)): added where the outputs are stored

Square linears, random codes, rank 16, float32 on a CPU, one thread; the least of several turns, of processor time. `step` is forward and backward
to x, A and B. `to_base` is the time over that of the packed linear without a path (of `step`: forward, and backward to x).

    python bench/fused_lora.py
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from rows import write_rows
from torch import Tensor, nn

from compressor import __version__
from compressor.kernels import dispatch
from compressor.linear import PackedLinear
from compressor.packed import Affine, PackedWeight

FIELDS = ["n", "bits", "group", "rank", "rows", "what", "way", "ms", "to_base", "one_to_two", "threads", "torch", "compressor"]
TURNS, SECONDS = 5, 0.4


class Arms:
    """The three ways to compute one layer on x [rows, n]."""

    def __init__(self, n: int, bits: int, rank: int, rows: int):
        torch.manual_seed(0)
        codes = torch.randint(0, 1 << bits, (n, n), dtype=torch.uint8)
        self.layer = PackedLinear(PackedWeight.pack(codes, Affine(torch.rand(n, n // 128).half() / 64), bits))
        wrapped = nn.ModuleDict({"linear": PackedLinear(self.layer.packed()), "a model has parameters": nn.Linear(1, 1)})
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["linear"]), wrapped)
        self.path: Any = wrapped["linear"]
        nn.init.normal_(self.path.lora_B["default"].weight)
        self.a, self.b = self.path.lora_A["default"].weight, self.path.lora_B["default"].weight
        self.gamma, self.x = self.path.scaling["default"], torch.randn(rows, n)

    def one(self, x: Tensor) -> Tensor:
        held = self.layer
        low = (self.gamma * (x @ self.a.T), self.b)
        return dispatch.linear(x, held.words, held.learned, held.zero, None, held.bits, held.group, held.out_features, low=low)

    def call(self, way: str, step: bool) -> Callable[[], Any]:
        run = {"base": self.layer, "two": self.path, "one": self.one}[way]
        if not step:
            return lambda: run(self.x)
        x = self.x.clone().requires_grad_()
        inputs = [x] if way == "base" else [x, self.a, self.b]
        dy = torch.randn_like(self.x)
        return lambda: torch.autograd.grad(run(x), inputs, dy)


def took(calls: dict[str, Callable[[], Any]], step: bool) -> dict[str, float]:
    """Milliseconds of processor time of each call, in turns."""
    best = dict.fromkeys(calls, float("inf"))
    with torch.set_grad_enabled(step):
        for call in calls.values():
            call()
        for _ in range(TURNS):
            for name, call in calls.items():
                start, count = time.process_time(), 0
                while time.process_time() - start < SECONDS:
                    call()
                    count += 1
                best[name] = min(best[name], 1000 * (time.process_time() - start) / count)
    return best


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--n", type=int, nargs="+", default=[1024, 4096])
    ap.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    ap.add_argument("--rows", type=int, nargs="+", default=[1, 16, 512])
    ap.add_argument("--rank", type=int, default=16)
    ap.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fused_lora.csv")
    a = ap.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for n, bits, count in ((n, bits, count) for n in a.n for bits in a.bits for count in a.rows):
        arms = Arms(n, bits, a.rank, count)
        torch.testing.assert_close(arms.one(arms.x), arms.path(arms.x), rtol=1e-3, atol=1e-2)
        for what in ("forward", "step") if count > 1 else ("forward",):
            found = took({way: arms.call(way, what == "step") for way in ("base", "two", "one")}, what == "step")
            for way, ms in found.items():
                rows.append({"n": n, "bits": bits, "group": 128, "rank": a.rank, "rows": count, "what": what, "way": way, "ms": round(ms, 4),
                             "to_base": round(ms / found["base"], 3), "one_to_two": round(found["one"] / found["two"], 3) if way == "one" else "",
                             "threads": 1, "torch": torch.__version__, "compressor": __version__})  # fmt: skip
            print(n, bits, count, what, {way: round(ms, 3) for way, ms in found.items()}, "one to two", rows[-1]["one_to_two"], flush=True)
    write_rows(a.out, FIELDS, rows)


if __name__ == "__main__":
    main()
