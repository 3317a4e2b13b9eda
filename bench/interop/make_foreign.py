"""Packed folders that other libraries make of a model here, each with its perplexity in its own library: what `compressor eval` must say, too.

python make_foreign.py LIBRARY MODEL OUT --text FILE [--bits 4 3 2] [--group 32] [--asym] [--desc-act] [--form gptq_v2] [--window 256]

LIBRARY is one of
    gptqmodel        GPTQ; pip install gptqmodel==7.6.0 optimum torch==2.13.0, in a venv of its own (it pins numpy)
    llmcompressor    compressed-tensors pack-quantized, by its GPTQ; pip install llmcompressor torch==2.13.0, in a venv of its own
    hqq              HQQ as hqq itself stores it, with config.json; no calibration; pip install hqq torch==2.13.0

Every run prints one JSON line a folder: library, version, folder, bits, group, sym, perplexity, tokens, window, seconds. The protocol is that of
compressor/pipelines/evaluate.py: the text in one go through the tokenizer, windows that do not overlap, each token but a window's first predicted,
a short tail dropped, float32 arithmetic. The first windows also calibrate, few of them: what is checked is reading, not quality.
It imports nothing of compressor; what the libraries print goes to stderr.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel's kernel would compile a dequantiser for every shape
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")  # the same words without a C++ compiler
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one its thread pool refuses to start

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CALIBRATION = 16  # windows
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "*.model", "vocab*", "merges*")


def windows(folder: Path, text: Path, window: int, most: int) -> torch.Tensor:
    """Token ids [count, window] of a text."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text("utf-8"), verbose=False)["input_ids"])
    ids = ids[:most] if most else ids
    return ids[: len(ids) // window * window].view(-1, window)


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """exp of the mean loss of rows [count, window]."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").double().sum())
    return math.exp(total / (rows.numel() - len(rows)))


def gptqmodel(args: argparse.Namespace, bits: int, rows: torch.Tensor, folder: Path) -> torch.nn.Module:
    """Quantised and saved by GPTQModel; read back by it through transformers."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from transformers import GPTQConfig

    config = QuantizeConfig(
        bits=bits, group_size=args.group, sym=not args.asym, desc_act=args.desc_act, format=args.form, device="cpu", offload_to_disk=False,
        act_group_aware=not args.desc_act,
    )  # fmt: skip
    model = GPTQModel.load(str(args.model), config, dtype=torch.float32)
    model.quantize(
        [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows[:CALIBRATION]], batch_size=4, backend=BACKEND.GPTQ_TORCH
    )
    model.save(str(folder))
    options = GPTQConfig(bits=bits, group_size=args.group, sym=not args.asym, desc_act=args.desc_act, backend="gptq_torch", format=args.form)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", quantization_config=options)


def llmcompressor(args: argparse.Namespace, bits: int, rows: torch.Tensor, folder: Path) -> torch.nn.Module:
    """Quantised and saved by llm-compressor; read back through transformers and compressed-tensors."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {"num_bits": bits, "type": "int", "symmetric": not args.asym, "strategy": "group", "group_size": args.group}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": rows[:CALIBRATION].tolist(), "attention_mask": [[1] * rows.shape[1]] * min(CALIBRATION, len(rows))})
    order = {"actorder": "group"} if args.desc_act else {}
    recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"], **order)
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=rows.shape[1], num_calibration_samples=len(data))
    model.save_pretrained(folder, save_compressed=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def hqq(args: argparse.Namespace, bits: int, rows: torch.Tensor, folder: Path) -> torch.nn.Module:
    """Every linear of the blocks by hqq, stored with its own state_dict; measured as it stands in memory."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from safetensors.torch import save_file

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = BaseQuantizeConfig(nbits=bits, group_size=args.group, axis=1)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    for name in names:
        model.set_submodule(name, HQQLinear(model.get_submodule(name), config, compute_dtype=torch.float32, device="cpu"))
    tensors = {f"{name}.{key}": tensor for name in names for key, tensor in model.get_submodule(name).state_dict().items()}
    inside = tuple(f"{name}." for name in names)
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((args.model / "config.json").read_text("utf-8"))
    saved["quantization_config"] = {"quant_method": "hqq", "quant_config": config, "skip_modules": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(saved, indent=2))
    return model


LIBRARIES = {"gptqmodel": gptqmodel, "llmcompressor": llmcompressor, "hqq": hqq}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("model", type=Path, help="a dense model folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="a text that calibrates and measures")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--form", default="gptq", choices=("gptq", "gptq_v2"), help="of GPTQModel")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16384, help="0: the whole text")
    args = parser.parse_args()
    args.asym |= args.library == "hqq"  # its zeros are floats
    warnings.simplefilter("ignore")
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rows = windows(args.model, args.text, args.window, args.max_tokens)
    for bits in args.bits:
        grid = f"{bits}bit-g{args.group}-{'asym' if args.asym else 'sym'}{'-act' * args.desc_act}{'-v2' * (args.form == 'gptq_v2')}"
        folder, began = args.out / f"{args.model.name}-{args.library}-{grid}", time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        row = {"library": args.library, "version": version(args.library), "folder": folder.name, "bits": bits, "group": args.group}
        try:
            model = LIBRARIES[args.library](args, bits, rows, folder).eval()
            beside = [path for pattern in TOKENIZER for path in args.model.glob(pattern)]
            for path in beside:
                shutil.copyfile(path, folder / path.name)
            row |= {"sym": not args.asym, "perplexity": perplexity(model, rows), "tokens": rows.numel() - len(rows), "window": args.window}
        except Exception as error:  # whatever the library raises
            row |= {"failed": next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]}
        print(json.dumps(row | {"seconds": time.perf_counter() - began}), file=lines, flush=True)


if __name__ == "__main__":
    sys.exit(main())
