"""Packed folders that other libraries make of a model here, and what perplexity their own library gives them, or folders that we tuned since.

python make_foreign.py make LIBRARY MODEL OUT --calibrate FILE --text FILE [--bits 4 3 2] [--group 32] [--asym] [--desc-act] [--form gptq_v2]
python make_foreign.py read LIBRARY FOLDER... --text FILE

LIBRARY is one of
    gptqmodel        GPTQ; pip install gptqmodel==7.6.0 optimum==2.3.0
    gptqmodel-awq    AWQ in AutoAWQ's layout, 4 bits, by the same; it computes in float16, and its search wants outputs in multiples of 64
    llmcompressor    compressed-tensors pack-quantized, by its GPTQ; pip install llmcompressor==0.14.0.1
    hqq              HQQ as hqq itself stores it, with config.json; no calibration; pip install hqq==0.2.8.post1
in a virtual environment of its own, with the torch that is there already; foreign.py makes such ones.

One JSON line a folder: library, version, folder, perplexity, tokens, window, seconds, for a made one also bits, group, sym, act_order; or failed, the
first line of the error. Every perplexity is that of the folder as the library loads it from disk, in float32. The protocol is that of
compressor/pipelines/evaluate.py: the text in one go through the tokenizer, windows that do not overlap, each token but a window's first predicted,
a short tail dropped. A few windows calibrate: what is checked is reading, not quality. It imports nothing of compressor; what the libraries print
goes to stderr.
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
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel's kernel would compile a dequantiser for every shape
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")  # the same words without a C++ compiler
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one its thread pool refuses to start

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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


def gptqmodel(args: argparse.Namespace, bits: int, rows: torch.Tensor, folder: Path, **options: Any) -> None:
    """Quantised and saved by GPTQModel."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    awq = "method" in options
    options |= {} if awq else {"desc_act": args.desc_act, "format": args.form, "act_group_aware": not args.desc_act}
    config = QuantizeConfig(bits=bits, group_size=args.group, sym=not args.asym, device="cpu", offload_to_disk=False, **options)
    model = GPTQModel.load(str(args.model), config, dtype=torch.float16 if awq else torch.float32)
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(data, batch_size=4, backend=BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH)
    model.save(str(folder))


def gptqmodel_awq(args: argparse.Namespace, bits: int, rows: torch.Tensor, folder: Path) -> None:
    """AWQ by GPTQModel, in the layout gemm."""
    gptqmodel(args, bits, rows, folder, method="awq", format="gemm")


def by_gptqmodel(folder: Path) -> torch.nn.Module:
    """A GPTQ or AWQ folder through transformers and GPTQModel's plain kernel."""
    from read_gptqmodel import loaded

    return loaded(folder, json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"])[0]


def llmcompressor(args: argparse.Namespace, bits: int, rows: torch.Tensor, folder: Path) -> None:
    """Quantised and saved by llm-compressor."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {"num_bits": bits, "type": "int", "symmetric": not args.asym, "strategy": "group", "group_size": args.group}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": [[1] * rows.shape[1]] * len(rows)})
    recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=rows.shape[1], num_calibration_samples=len(data))
    model.save_pretrained(folder, save_compressed=True)


def by_compressed_tensors(folder: Path) -> torch.nn.Module:
    """Through transformers and compressed-tensors, as both do it by default."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    odd = [*info["missing_keys"], *info["mismatched_keys"]]
    if odd:
        raise RuntimeError(f"weights would be random: {odd[0]}")
    return model


def hqq(args: argparse.Namespace, bits: int, rows: torch.Tensor, folder: Path) -> None:
    """Every linear of the blocks by hqq, stored with its own state_dict."""
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


def by_hqq(folder: Path) -> torch.nn.Module:
    """Linear by linear through HQQLinear's own load_state_dict: transformers 5 loads no HQQ folder."""
    from hqq.core.quantize import HQQLinear
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in [key.removesuffix(".W_q") for key in tensors if key.endswith(".W_q")]:
        layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
        layer.load_state_dict({key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")})
        model.set_submodule(name, layer)
    dense = {name: parameter for name, parameter in model.named_parameters() if not name.endswith(".W_q")}
    if lost := dense.keys() - tensors:
        raise RuntimeError(f"weights would be random: {min(lost)}")
    for name, parameter in dense.items():
        parameter.data.copy_(tensors[name])
    model.tie_weights()
    return model


LIBRARIES = {  # how they make a folder, how they load one, what pip calls them
    "gptqmodel": (gptqmodel, by_gptqmodel, "gptqmodel"),
    "gptqmodel-awq": (gptqmodel_awq, by_gptqmodel, "gptqmodel"),
    "llmcompressor": (llmcompressor, by_compressed_tensors, "llmcompressor"),
    "hqq": (hqq, by_hqq, "hqq"),
}


def make(args: argparse.Namespace, bits: int) -> Path:
    """One folder, as the library writes it, with the tokenizer of the model and made.json; one with made.json is not made again."""
    grid = f"{bits}bit-g{args.group}-{'asym' if args.asym else 'sym'}{'-act' * args.desc_act}{'-v2' * (args.form == 'gptq_v2')}"
    folder = args.out / f"{args.model.name}-{args.library}-{grid}"
    if (folder / "made.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    LIBRARIES[args.library][0](args, bits, windows(args.model, args.calibrate, args.window, CALIBRATION * args.window), folder)
    for path in (path for pattern in TOKENIZER for path in args.model.glob(pattern)):
        shutil.copyfile(path, folder / path.name)
    (folder / "made.json").write_text(json.dumps({key: str(value) for key, value in vars(args).items()} | {"bits": bits}))
    return folder


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The perplexity of a folder as its library loads it."""
    rows = windows(folder, args.text, args.window, args.max_tokens)
    model = LIBRARIES[args.library][1](folder).eval()
    return {"folder": folder.name, "perplexity": perplexity(model, rows), "tokens": rows.numel() - len(rows), "window": args.window}


def parsed() -> argparse.Namespace:
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("library", choices=LIBRARIES)
    after = argparse.ArgumentParser(add_help=False)
    after.add_argument("--text", type=Path, required=True, help="a text to measure on")
    after.add_argument("--window", type=int, default=256)
    after.add_argument("--max-tokens", type=int, default=16384, help="of the text; 0: all of it")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", parents=[both, after])
    making.add_argument("model", type=Path, help="a dense model folder")
    making.add_argument("out", type=Path)
    making.add_argument("--calibrate", type=Path, required=True, help="a text to calibrate on")
    making.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    making.add_argument("--group", type=int, default=32)
    making.add_argument("--asym", action="store_true", help="always so of hqq: its zeros are floats")
    making.add_argument("--desc-act", action="store_true", help="of gptqmodel: llm-compressor's GPTQ has no actorder=group any more")
    making.add_argument("--form", default="gptq", choices=("gptq", "gptq_v2"), help="of gptqmodel, too")
    reading = commands.add_parser("read", parents=[both, after])
    reading.add_argument("folders", type=Path, nargs="+")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    warnings.simplefilter("ignore")
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for each in args.bits if args.command == "make" else args.folders:
        began = time.perf_counter()
        row = {"library": args.library, "version": version(LIBRARIES[args.library][2]), "transformers": version("transformers")}
        try:
            if args.command == "make":
                args.asym |= args.library == "hqq"
                row |= {"bits": each, "group": args.group, "sym": not args.asym, "act_order": args.desc_act}
                row |= measured(args, make(args, each))
            else:
                row |= {"folder": each.name} | measured(args, each)
        except Exception as error:  # whatever the library raises
            row |= {"failed": next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]}
        print(json.dumps(row | {"seconds": time.perf_counter() - began}), file=lines, flush=True)


if __name__ == "__main__":
    sys.exit(main())
