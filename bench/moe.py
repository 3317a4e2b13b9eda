"""How many calibration tokens an expert needs, and what toy mixtures with random weights come to.

`share` rows: a layer of `tiny` is packed at 3 bits on T = share x inputs tokens drawn at random, and on none; `error` is the relative error of its
outputs on 4096 other tokens over that of packing without data. Below 1 the tokens helped. `toy` rows: Mixtral and Qwen2-MoE with random weights,
3-bit GPTQ: bytes, tokens of experts, seconds.

    python bench/moe.py
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rows import write_rows

from compressor import __version__
from compressor.integrations import experts
from compressor.linear import linears
from compressor.packing import relative_error
from compressor.pipelines import compress, coverage, data, load
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Quant
from compressor.stats import LayerStats

FIELDS = ["kind", "model", "layer", "packer", "share", "error", "experts", "least_tokens", "median_tokens", "most_tokens", "unseen", "few"]
FIELDS += ["dense_bytes", "packed_bits", "seconds", "torch", "compressor"]
SHARES = (0.25, 1, 2, 3, 4, 8)
LAYERS = [f"model.layers.{i}.{leaf}" for i in (0, 1, 3) for leaf in ("mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj")]
SHAPE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
HELD = 4096
VERSIONS = {"torch": torch.__version__, "compressor": __version__}


def inputs() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """`tiny`, and what the layers read [tokens, k]."""
    loaded, seen = load.load("tiny", "cpu"), {name: list[torch.Tensor]() for name in LAYERS}
    ids = data.calibration(data.load("python").train, loaded.tokenizer, 256, 64, 0)
    for name in LAYERS:
        loaded.model.get_submodule(name).register_forward_pre_hook(lambda _m, args, n=name: seen[n].append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for part in ids.split(8):
            loaded.model(part)
    return loaded.model, {name: torch.cat(parts) for name, parts in seen.items()}


def shares() -> list[dict[str, Any]]:
    model, seen = inputs()
    rows = []
    for name, x in seen.items():
        w = model.get_submodule(name).get_parameter("weight").detach().float()
        order, held = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)), LayerStats(w.shape[1])
        held.add(x[order[-HELD:]])
        for packer in ("gptq", "sketch"):
            quant, group = Quant(packer=packer), PACKERS[packer].resolve(w.shape[1], Quant(packer=packer), name)[0]
            blind = relative_error(w, PACKERS[packer](w, None, quant, group, torch.float16)[0], held)
            for share in SHARES:
                stats = LayerStats(w.shape[1])
                stats.add(x[order[: int(share * w.shape[1])]])
                error = relative_error(w, PACKERS[packer](w, stats, quant, group, torch.float16)[0], held) / blind
                rows.append({"kind": "share", "model": "tiny", "layer": name, "packer": packer, "share": share, "error": round(error, 4)} | VERSIONS)
                print(rows[-1], flush=True)
    return rows


def toys() -> list[dict[str, Any]]:
    kinds = {
        "mixtral": transformers.MixtralConfig(**SHAPE, num_local_experts=8),
        "qwen2_moe": transformers.Qwen2MoeConfig(**SHAPE, num_experts=32, moe_intermediate_size=64, shared_expert_intermediate_size=128),
    }
    rows = []
    for name, config in kinds.items():
        torch.manual_seed(0)
        model = experts.unfuse(transformers.AutoModelForCausalLM.from_config(config).eval())
        ids = torch.randint(0, 512, (64, 256), generator=torch.Generator().manual_seed(0))
        size = 2 * sum(layer.weight.numel() for layer in linears(model.get_submodule("model")).values())  # of 16 bits
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            found = compress.compress(model, Quant(group=64), torch.float16, ids, Path(place))[0]
        facts = {key: value for key, value in coverage.coverage(found).items() if key in FIELDS}
        bits = sum(r["shape"][0] * r["shape"][1] * (r["bits"] + 16 / r["group"]) for r in found) / sum(r["shape"][0] * r["shape"][1] for r in found)
        more = {"dense_bytes": size, "packed_bits": round(bits, 3), "seconds": round(time.perf_counter() - start, 1)}
        rows.append({"kind": "toy", "model": name, "packer": "gptq"} | facts | more | VERSIONS)
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_rows(Path(__file__).parent / "results" / "moe.csv", FIELDS, toys() + shares())
