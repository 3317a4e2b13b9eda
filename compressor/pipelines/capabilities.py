"""What every format of `export --to` makes of every kind of weight: the table of docs/exports.md, from the writers' own `fits` and `held`.

Weights are random, of a LLaMA's shapes; a loss is that of the weights, the norm of the change over the norm. What a format has no place for, an
export projects first, with a loss of its own (pipelines/projection.py), so "no" here is what a format says of the weight as it is.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from compressor.packed import Affine, PackedWeight
from compressor.pipelines import writers
from compressor.quant import rtn
from compressor.recipe import Quant

N, K = 256, 512
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "hidden_size": K}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | HEADS
GGUF = tuple(f"gguf:{kind}" for kind in ("q4_0", "q4_1", "q8_0", "q4_k", "q3_k", "q2_k"))
SHOWN = ("compressed-tensors", "gptq", "gptq_v2", "awq", "mlx", "table", *GGUF)
Cell = tuple[str, Callable[[], PackedWeight]]


def cells() -> Iterator[Cell]:
    """Kinds of weights in words, and how to make one."""
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for group in (32, 128, K):
                words = f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}, {f'groups of {group}' if group < K else 'whole rows'}"
                yield words, partial(weight, bits, symmetric, group)
    yield "3 bits, groups of 16", lambda: weight(3, True, 16)
    yield "4 bits, asymmetric, act-order", lambda: ordered(weight(4, False, 128))
    yield "3 bits, tuned zeros", lambda: floating(weight(3, False, 128))
    yield "3 bits, one table a row", lambda: table(weight(3, True, K))


def weight(bits: int, symmetric: bool, group: int, n: int = N, k: int = K) -> PackedWeight:
    """A random weight on a grid, the same at every call."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.05
    return rtn.pack(w, None, Quant(bits=bits, group=group, symmetric=symmetric, packer="rtn", shrink=False), group, torch.float16)[0]


def ordered(held: PackedWeight) -> PackedWeight:
    """The same codes for columns in another order."""
    columns = torch.randperm(held.shape[1], generator=torch.Generator().manual_seed(1))
    return PackedWeight.pack(held.codes(), held.values, held.bits, held.group, columns)


def floating(held: PackedWeight) -> PackedWeight:
    """The same codes with zeros between the integers."""
    assert held.zero is not None
    moved = held.zero.half() + 0.3 * torch.rand(held.zero.shape, generator=torch.Generator().manual_seed(1)).half()
    return PackedWeight.pack(held.codes(), Affine(held.learned, moved), held.bits)


def table(held: PackedWeight) -> PackedWeight:
    """A table a row that is no even grid."""
    even = writers.AsTables.held(held)
    noise = torch.randn(even.learned.shape, generator=torch.Generator().manual_seed(1))
    return even.with_learned((even.learned.float() + 0.1 * held.learned.float().unsqueeze(-1) * noise).half())


def verdicts(to: str) -> dict[str, writers.Verdict]:
    """What one format says of every kind."""
    writer = writers.of(to)
    assert writer is not None
    return {words: writers.verdict(writer, CONFIG, {"model.layers.0.mlp.up_proj": make()}) for words, make in cells()}


def section() -> str:
    """The table as Markdown, with the reasons below it, each once."""
    found = {to: verdicts(to) for to in SHOWN}
    reasons: dict[str, int] = {}
    lines = [f"| | {' | '.join(SHOWN)} |", f"|---|{'---|' * len(SHOWN)}"]
    for words, _ in cells():
        row = []
        for to in SHOWN:
            verdict = found[to][words]
            if verdict.kind == "cannot":
                why = verdict.why.replace("model.layers.0.mlp.up_proj", "a layer")
                row.append(f"no [{reasons.setdefault(why, len(reasons) + 1)}]")
            else:
                row.append("exact" if verdict.kind == "exact" else f"{verdict.error:.2g}")
        lines.append(f"| {words} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n\n" + "\n".join(f"{number}. {why}" for why, number in reasons.items()) + "\n"
