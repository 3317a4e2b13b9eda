"""Peak memory of one tuning step on the shapes of TinyLlama-1.1B and LLaMA-7B: PEQA on 3 bits, QLoRA of bitsandbytes (NF4, double quantisation) by
peft, and LoRA beside dense bfloat16, each in a process of its own.

Weights are random and made block by block from a shell, as large as they lie there and never dense in float32 (no checkpoint is needed to measure
memory). Embeddings, norms and head are bfloat16 in every arm; adapters are float32 on all linears of the blocks; all arms compute blocks anew on the
way back. Ours trains in our own loop, good copy included; the rivals do what their users do: forward, backward, one step of the optimizer.

`weights` are the bytes of what is frozen, `training` of what is trained with its gradients, moments and good copy, both added up tensor by tensor;
`peak` is the largest resident size while a step runs, above that of the same process with all libraries loaded and a small step of the same kind
done; `rest` is peak less the two: activations, values in use, scratch. Ratios are to QLoRA of rank 16 and of rank 64 with AdamW, on weights +
training. An arm that fails is a row with what it said, its bytes by formula.

    python bench/tune_memory.py
    python bench/tune_memory.py --shapes 1.1b --only "peqa g128, adamw8bit" "qlora r16, adamw"
"""

import argparse
import copy
import csv
import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rows import write_rows

FIELDS = [
    "shape", "arm", "tokens", "linear_weights", "trainable", "weights_bytes", "training_bytes", "peak_bytes", "rest_bytes", "held_bytes",
    "to_qlora_r16", "to_qlora_r64", "peak_to_qlora_r16", "seconds", "note", "threads", "torch", "bitsandbytes", "peft", "compressor",
]  # fmt: skip
SHAPES = {
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
}
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}  # to warm up
OPTIMIZERS = ("adamw", "adamw8bit")
ARMS: dict[str, dict[str, Any]] = {
    **{f"peqa {name}, {o}": {"base": "packed", "group": g, "optimizer": o}
       for name, g in (("rows", -1), ("g128", 128), ("g64", 64)) for o in OPTIMIZERS},
    **{f"qlora r{r}, {o}": {"base": "nf4", "rank": r, "optimizer": o} for r in (16, 64) for o in OPTIMIZERS},
    "lora r16, adamw": {"base": "dense", "rank": 16, "optimizer": "adamw"},
}  # fmt: skip
BITS = 3


def shell(shape: dict[str, int], tokens: int) -> Any:
    """A LLaMA without weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, attn_implementation="sdpa")
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def fill(model: Any, linear: Any) -> None:
    """Random weights in place: each linear of the blocks is what `linear` makes of it, all else bfloat16."""
    import torch
    from torch import nn

    from compressor.linear import find_blocks, linears, swap

    _, blocks = find_blocks(model)
    for name, layer in linears(blocks).items():
        swap(blocks, name, linear(layer.out_features, layer.in_features))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                norm = parameter.dim() == 1
                made = (
                    torch.ones(parameter.shape, dtype=parameter.dtype)
                    if norm
                    else torch.empty(parameter.shape, dtype=parameter.dtype).normal_(0, 0.02)
                )
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:  # rotary frequencies
                module._buffers[name] = 10000.0 ** -(torch.arange(0, 2 * buffer.numel(), 2) / (2 * buffer.numel()))


def packed(group: int) -> Any:
    """Maker of packed linears of random codes."""
    import torch

    from compressor.kernels import layout
    from compressor.linear import PackedLinear
    from compressor.packed import Affine, PackedWeight

    def make(n: int, k: int) -> Any:
        size = k if group == -1 else group
        words = torch.randint(-(1 << 31), 1 << 31, (*layout.tiles(n, k), layout.ROWS, 8 * BITS), dtype=torch.int32)
        scale = torch.full((n, k // size), 0.02 / 2.3, dtype=torch.float16)
        return PackedLinear(PackedWeight(words, Affine(scale), BITS, size, (n, k)))

    return make


def nf4() -> Any:
    """Maker of bitsandbytes' linears, computing in bfloat16; one weight of a shape is quantised, the others are copies of it."""
    import bitsandbytes as bnb
    import torch

    made: dict[tuple[int, int], Any] = {}

    def make(n: int, k: int) -> Any:
        if (n, k) not in made:
            layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
            dense = torch.empty(n, k, dtype=torch.bfloat16).normal_(0, 0.02)
            layer.weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4", compress_statistics=True)
            made[n, k] = layer.to("cpu")
        new = copy.deepcopy(made[n, k])
        new.support_avx512bf16_for_cpu = False  # the kernel that it takes once evaluated in eval mode has no backward pass (bitsandbytes 0.50.2)
        return new

    return make


def dense() -> Any:
    """Maker of bfloat16 linears."""
    import torch
    from torch import nn

    def make(n: int, k: int) -> Any:
        layer = nn.Linear(k, n, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.empty(n, k, dtype=torch.bfloat16).normal_(0, 0.02), requires_grad=False)
        return layer

    return make


class Step:
    """One arm on one shape: the model is made, then `run` trains it for a step."""

    def __init__(self, shape: dict[str, int], arm: dict[str, Any], tokens: int):
        import torch

        torch.manual_seed(0)
        self.arm, self.ids = arm, torch.randint(0, 32000, (2, tokens))
        self.model = shell(shape, tokens)
        fill(self.model, {"packed": lambda: packed(arm.get("group", -1)), "nf4": nf4, "dense": dense}[arm["base"]]())
        self.frozen = held(tensors_of(self.model))

    def run(self) -> None:
        (self.ours if self.arm["base"] == "packed" else self.theirs)()

    def ours(self) -> None:
        """A step of our loop."""
        import torch

        from compressor.pipelines.tuners import optimizer
        from compressor.recipe import Tune
        from compressor.tune import loop
        from compressor.tune.batches import CausalLM
        from compressor.tune.peqa import Peqa

        options = Tune(
            method="peqa", optimizer=self.arm["optimizer"], gradient_checkpointing=True, batch=1, steps=1, lr=1e-3, warmup=0.0, eval_every=0
        )
        parameters, states = Peqa(options).attach(self.model), []

        class Watched(loop.State):
            def update(self, lr: float, clip: float) -> float:
                states.append(self)
                return super().update(lr, clip)

        plain, loop.State = loop.State, Watched
        try:
            make = optimizer(options, torch.device("cpu"))
            loop.train(self.model, parameters, CausalLM(self.ids, self.ids), options, 0, None, "", optimizer=make)
        finally:
            loop.State = plain
        state = states[0]
        self.trainable = sum(p.numel() for p in parameters.values())
        self.training = held([*state.tensors().values(), *state.good.values(), *(p.grad for p in parameters.values())])

    def theirs(self) -> None:
        """peft, and a plain loop."""
        import bitsandbytes as bnb
        import peft
        import torch

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = peft.LoraConfig(r=self.arm["rank"], lora_alpha=16, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM")
        model = peft.get_peft_model(self.model, config)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        eight = self.arm["optimizer"] == "adamw8bit"
        optimizer: Any = bnb.optim.AdamW8bit(trained, lr=1e-3) if eight else torch.optim.AdamW(trained, lr=1e-3)
        ids = self.ids[:1]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        self.trainable = sum(p.numel() for p in trained)
        moments = [t for p in trained for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
        self.training = held([*trained, *(p.grad for p in trained), *moments])


def tensors_of(model: Any) -> list[Any]:
    """Parameters, buffers, and what bitsandbytes keeps beside its codes."""
    out = [*model.parameters(), *model.buffers()]
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            out += [] if part is None else [part.absmax, part.code, part.offset]
    return out


def held(tensors: list[Any]) -> int:
    """Bytes of the storages behind some tensors, each once."""
    import torch

    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)}
    return sum(storages.values())


def trim() -> None:
    """What is free goes back to the system, or the next peak would begin there."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(shape: str, arm: str, tokens: int) -> dict[str, Any]:
    """The row of one arm, in this process."""
    import importlib.metadata

    import torch

    from compressor import __version__
    from compressor.pipelines.stages import peak_bytes, reset_peak

    Step(SMALL, ARMS[arm], tokens).run()
    trim()
    reset_peak()
    base = peak_bytes()[""]
    step = Step(SHAPES[shape], ARMS[arm], tokens)
    trim()
    reset_peak()
    resident, start = peak_bytes()[""] - base, time.perf_counter()
    step.run()
    peak = peak_bytes()[""] - base
    return {
        "shape": shape, "arm": arm, "tokens": tokens, "linear_weights": linear_weights(shape), "trainable": step.trainable,
        "weights_bytes": step.frozen, "training_bytes": step.training, "peak_bytes": peak, "rest_bytes": peak - step.frozen - step.training,
        "held_bytes": resident, "seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "bitsandbytes": importlib.metadata.version("bitsandbytes"), "peft": importlib.metadata.version("peft"), "compressor": __version__,
    }  # fmt: skip


def matrices(shape: str) -> list[tuple[int, int]]:
    """[n, k] of the linears of a block."""
    s = SHAPES[shape]
    hidden, inner = s["hidden_size"], s["intermediate_size"]
    keys = hidden // s["num_attention_heads"] * s["num_key_value_heads"]
    return [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)]


def linear_weights(shape: str) -> int:
    return SHAPES[shape]["num_hidden_layers"] * sum(n * k for n, k in matrices(shape))


def formula(shape: str, arm: str, tokens: int, note: str) -> dict[str, Any]:
    """The row of an arm that did not run: its bytes by formula."""
    from compressor.tune.optimizers import moment_bytes

    keys, layers, moments = ARMS[arm], SHAPES[shape]["num_hidden_layers"], moment_bytes(ARMS[arm]["optimizer"])
    if keys["base"] == "packed":
        trainable = layers * sum(n * (1 if keys["group"] == -1 else k // keys["group"]) for n, k in matrices(shape))
        bits, training, values = BITS, trainable * (12 + 2 * moments), 2 * trainable
    else:
        trainable = layers * sum(keys["rank"] * (n + k) for n, k in matrices(shape))
        bits, training, values = {"nf4": 4 + 8 / 64 + 32 / 64 / 256, "dense": 16}[keys["base"]], trainable * (8 + moments), 0
    hidden = SHAPES[shape]["hidden_size"]
    other = 2 * (2 * 32000 * hidden + (2 * layers + 1) * hidden)
    return {
        "shape": shape, "arm": arm, "tokens": tokens, "linear_weights": linear_weights(shape), "trainable": trainable,
        "weights_bytes": round(linear_weights(shape) * bits / 8 + values + other), "training_bytes": round(training), "note": f"by formula: {note}",
    }  # fmt: skip


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their ratios, in the order of SHAPES and ARMS."""
    order = {(shape, arm): i for i, (shape, arm) in enumerate((s, a) for s in SHAPES for a in ARMS)}
    for row in rows:
        for rank in (16, 64):
            other = next((r for r in rows if (r["shape"], r["arm"]) == (row["shape"], f"qlora r{rank}, adamw")), None)
            if other is None:
                continue
            mine, its = (int(r["weights_bytes"]) + int(r["training_bytes"]) for r in (row, other))
            row[f"to_qlora_r{rank}"] = round(mine / its, 3)
            if rank == 16 and row.get("peak_bytes") and other.get("peak_bytes"):
                row["peak_to_qlora_r16"] = round(int(row["peak_bytes"]) / int(other["peak_bytes"]), 3)
    return sorted(rows, key=lambda r: order[r["shape"], r["arm"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--only", nargs="+", help="these arms", choices=list(ARMS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--count", action="store_true", help="by formula only: for arms that take too long here")
    parser.add_argument("--here", action="store_true", help="measure the one arm in this process and print its row as JSON")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tune_memory.csv")
    a = parser.parse_args()
    if a.here:
        print(json.dumps(measure(a.shapes[0], a.only[0], a.tokens)))
        return
    rows: list[dict[str, Any]] = []
    if a.out.exists():
        with a.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    for shape in a.shapes:
        for arm in a.only or ARMS:
            if a.count:
                rows = [*rows, formula(shape, arm, a.tokens, "not run")] if not any((r["shape"], r["arm"]) == (shape, arm) for r in rows) else rows
                continue
            command = [sys.executable, __file__, "--here", "--shapes", shape, "--only", arm, "--tokens", str(a.tokens)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                row = formula(shape, arm, a.tokens, said[:200])
            else:
                row = json.loads(done.stdout.splitlines()[-1])
            rows = compared([r for r in rows if (r["shape"], r["arm"]) != (shape, arm)] + [row])
            write_rows(a.out, FIELDS, rows)
            parts = {key: f"{row[key] / 1e6:.0f}" for key in ("weights_bytes", "training_bytes", "peak_bytes", "rest_bytes") if row.get(key)}
            print(shape, arm, parts, row.get("note", ""), row.get("seconds", ""), flush=True)
    write_rows(a.out, FIELDS, compared(rows))


if __name__ == "__main__":
    main()
