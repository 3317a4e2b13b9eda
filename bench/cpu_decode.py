"""Tokens a second of whole models on a CPU: dense, packed and llama.cpp in turns, at the same thread counts.

    python bench/cpu_decode.py --llama-python PATH       PATH: an interpreter with llama-cpp-python and gguf; without it llama.cpp is left out
    python bench/cpu_decode.py --check                   two tiny models in seconds, printed only

Models: `tiny`, and a LLaMA of TinyLlama-1.1B's shape with seeded random weights, saved in float16, from which every arm is made. The packed
layers of `tiny` are rounded to nearest; those of the other get random codes, for speed does not depend on them. llama.cpp reads a GGUF of the same
weights, quantised by its own tool. Per model and thread count one process holds the dense model and one packed model at a time; llama.cpp runs
beside it and waits while others run. After a warm-up the arms of one bit width take turns, in a new order each round: a prompt of 16
tokens, then 64 greedy ones with a KV cache, by `generate` of transformers or by llama_decode and argmax.

`tokens_per_s`: steps after the first new token over their time, median of the rounds; the prompt is `prefill_ms`. `ratio`: to the dense rows of the
same rounds. `bytes_per_token`: weights that a step must read: all matrices of the blocks and the output head (dense in our packed models, quantised
by llama.cpp), not the table of embeddings. `share`: those bytes a second of the read bandwidth measured in the same process. `agree`: how many of the
first new tokens equal the dense model's; a check of the conversion, empty where codes are random.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from cpu_timing import Row, Table, about, ceilings, first_line, hand_over, orders, rows_of_child, say, thread_counts
from llama_peer import TYPES
from torch import nn

from compressor import linear
from compressor.kernels import layout
from compressor.linear import PackedLinear
from compressor.packed import Affine, PackedWeight
from compressor.pipelines import checkpoint, load
from compressor.quant import rtn
from compressor.recipe import Quant

LLAMA = str(Path(__file__).with_name("llama_peer.py"))  # for another interpreter
PROMPT, NEW, GROUP = 16, 64, 128
SHAPES = {
    "llama-1.1b-random": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "check-random": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 512, "max_position_embeddings": 256,
    },
}  # fmt: skip
FIELDS = [
    "model", "arm", "bits", "group", "threads", "beside", "tokens_per_s", "tokens_per_s_best", "ratio", "prefill_ms", "new_tokens", "rounds",
    "bytes_per_token", "share", "agree", "engine", "read_gbs", "note", "cpu", "versions", "version", "date",
]  # fmt: skip
Turn = Callable[[int], tuple[float, float, list[int]]]  # number of new tokens -> seconds of the prompt, of the steps after it, the tokens


# one process: a model at a thread count


class Llama:
    """llama.cpp with one file, in a process of its own that waits for turns."""

    def __init__(self, python: str, path: str, threads: int, prompt: list[int]):
        command = [python, LLAMA, "serve", path, str(threads)]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        self.prompt = prompt

    def __call__(self, new: int) -> tuple[float, float, list[int]]:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"ids": self.prompt, "new": new}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("llama.cpp ended")
        found = json.loads(line)
        return found["prefill"], found["decode"], found["ids"]

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)


class Clock:
    """A streamer of transformers that notes when each token came; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generator(model: Any, prompt: list[int]) -> Turn:
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None  # random weights may say anything; every arm makes as many tokens
    model.generation_config.pad_token_id = 0

    def turn(new: int) -> tuple[float, float, list[int]]:
        clock = Clock()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=True, streamer=clock)
        return clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1], out[0, len(prompt) :].tolist()

    return turn


def packed_model(dense: Any, folder: Path, bits: int, rounded: bool) -> Any:
    """The decoder's linears packed (rounded to nearest, or random codes), everything else shared with the dense model."""
    model = load.empty_model(folder).eval()
    prefix, blocks = linear.find_blocks(model)
    for name in linear.linears(blocks):
        full = f"{prefix}.{name}"
        old = dense.get_submodule(full)
        if rounded:
            weight = rtn.pack(old.weight.detach(), None, Quant(bits=bits, group=GROUP, symmetric=False), GROUP, torch.float16)[0]
        else:
            weight = random_weight(old.out_features, old.in_features, bits)
        linear.swap(model, full, linear.PackedLinear(weight, old.bias))
    ours = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        if name in ours:
            ours[name].data = parameter.data
    model.tie_weights()
    return model


def random_weight(n: int, k: int, bits: int) -> PackedWeight:
    """Random codes with a standard deviation of 0.02; any words are codes."""
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (*layout.tiles(n, k), layout.ROWS, 8 * bits), dtype=torch.int32)
    spread = (((1 << bits) ** 2 - 1) / 12) ** 0.5
    scale = (torch.rand(n, k // GROUP) * 0.2 + 0.9).mul(0.02 / spread).half()
    zero = torch.randint((1 << (bits - 1)) - 1, (1 << (bits - 1)) + 1, scale.shape, dtype=torch.uint8)
    return PackedWeight(words, Affine(scale, zero), bits, GROUP, (n, k))


def weight_bytes(model: Any) -> int:
    """Bytes of all linear layers, the output head with them."""
    dense = sum(m.weight.numel() * m.weight.element_size() for m in model.modules() if isinstance(m, nn.Linear))
    return dense + sum(m.packed().nbytes() for m in model.modules() if isinstance(m, PackedLinear))


def measure(args: argparse.Namespace) -> None:
    """The child: rows as JSON lines, appended as they come."""
    job = json.loads(args.job.read_text())
    folder, threads = Path(job["folder"]), job["threads"]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    bandwidth = ceilings(args.check)[0]
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocab = checkpoint.read_config(folder)["vocab_size"]
    prompt = torch.randint(3, vocab, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    plain = next((kind for kind in job["files"] if kind not in TYPES.values()), None)
    for bits, kind in TYPES.items():
        wanted = [k for k in ((plain, kind) if bits == 4 else (kind,)) if k in job["files"]]
        packed = packed_model(dense, folder, bits, job["rounded"])
        turns: dict[str, Turn] = {"dense": generator(dense, prompt), "ours": generator(packed, prompt)}
        turns |= {f"llama.cpp {k}": Llama(job["llama_python"], job["files"][k]["path"], threads, prompt) for k in wanted}
        read = {"dense": weight_bytes(dense), "ours": weight_bytes(packed)} | {f"llama.cpp {k}": job["files"][k]["bytes"] for k in wanted}
        notes = {f"llama.cpp {k}": job["files"][k]["note"] for k in wanted}
        notes["ours"] = ("rounded to nearest" if job["rounded"] else "random codes") + ", head dense fp32"
        try:
            took = take_turns(turns, args.rounds, args.seconds)
        finally:
            for turn in turns.values():
                if isinstance(turn, Llama):
                    turn.close()
        engine = "numba" if "numba" in sys.modules else "torch"
        rows = summary(took, read, bandwidth, random_codes=not job["rounded"])
        widths = {"dense": 32, "ours": bits, f"llama.cpp {plain}": 16 if plain == "F16" else 32}
        for row in rows:
            row |= {"model": job["name"], "threads": threads, "beside": bits, "bits": widths.get(row["arm"], bits), "note": notes.get(row["arm"], "")}
            row |= {"group": GROUP, "engine": engine} if row["arm"] == "ours" else {}
            row["read_gbs"] = f"{bandwidth / 1e9:.1f}"
        hand_over(args.rows, rows, FIELDS[:18])
        del packed, turns
        gc.collect()


def take_turns(turns: dict[str, Turn], rounds: int, seconds: float) -> dict[str, list[Any]]:
    """What each arm returned, round by round, after two short calls; an arm too slow for 64 tokens in `seconds` makes fewer."""
    lengths = {}
    for arm, turn in turns.items():
        try:
            turn(4)
            lengths[arm] = max(4, min(NEW, int(seconds / max(turn(4)[1] / 3, 1e-9))))
        except Exception as error:  # an arm that breaks is a line, not the end of the run
            say(f"{arm} left out: {first_line(error)}")
    took: dict[str, list[Any]] = {arm: [] for arm in lengths}
    for order in itertools.islice(orders(lengths), rounds):
        for arm in order:
            took[arm].append(turns[arm](lengths[arm]))
    return took


def summary(took: dict[str, list[Any]], read: dict[str, int], bandwidth: float, random_codes: bool) -> list[Row]:
    speeds = {arm: [(len(ids) - 1) / decode for _, decode, ids in found] for arm, found in took.items()}
    dense = took["dense"][0][2] if "dense" in took else []
    rows = []
    for arm, found in took.items():
        speed, ids = statistics.median(speeds[arm]), found[0][2]
        equal = next((i for i, (a, b) in enumerate(zip(ids, dense, strict=False)) if a != b), min(len(ids), len(dense)))
        rows.append({
            "arm": arm, "tokens_per_s": f"{speed:.3f}", "tokens_per_s_best": f"{max(speeds[arm]):.3f}",
            "ratio": f"{speed / statistics.median(speeds['dense']):.3f}" if "dense" in speeds else "",
            "prefill_ms": f"{1e3 * statistics.median(prefill for prefill, _, _ in found):.1f}", "new_tokens": len(ids), "rounds": len(found),
            "bytes_per_token": read[arm], "share": f"{read[arm] * speed / bandwidth:.3f}",
            "agree": "" if arm == "ours" and random_codes else f"{equal}/{min(len(ids), len(dense))}",
        })  # fmt: skip
    return rows


# parent


def make_model(name: str, folder: Path) -> None:
    """A LLaMA with seeded random weights, std 0.02 (norms 1), saved in float16."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(**SHAPES[name], tie_word_embeddings=False, rms_norm_eps=1e-5)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with no_init_weights():
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(0, 0.02, generator=generator)
    model.half().save_pretrained(folder)


def convert(args: argparse.Namespace, folder: Path, into: Path) -> dict[str, Any]:
    """{"files": …, "version": …} of llama.cpp, or no files and one line saying why."""
    none: dict[str, Any] = {"files": {}, "version": ""}
    if not args.llama_python:
        say("llama.cpp left out: no --llama-python")
        return none
    command = [args.llama_python, LLAMA, "convert", str(folder), str(into)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])
    except OSError as error:
        say(f"llama.cpp left out: {error}")
    except (IndexError, ValueError):
        say(f"llama.cpp left out: {done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else f'status {done.returncode}'}")
    return none


def child(args: argparse.Namespace, job: dict[str, Any], work: Path) -> list[Row]:
    path = work / "job.json"
    path.write_text(json.dumps(job))
    command = [__file__, "--job", str(path), "--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    return rows_of_child(job["name"], command + (["--check"] if args.check else []), job["threads"])


def models(args: argparse.Namespace) -> list[tuple[str, bool]]:
    """(name, whether its packed layers are rounded from its weights)."""
    return [(name, name == "tiny") for name in args.models or ("tiny", "check-random" if args.check else "llama-1.1b-random")]


def run(args: argparse.Namespace, work: Path, table: Table) -> None:
    for name, rounded in models(args):
        folder = checkpoint.TINY if name == "tiny" else work / name
        if name != "tiny":
            subprocess.run([sys.executable, __file__, "--make-model", name, str(folder)], check=True)
        into = work / f"{name}-gguf"
        into.mkdir()
        peer = convert(args, folder, into)
        for threads in thread_counts(args.threads):
            job = {"name": name, "folder": str(folder), "threads": threads, "rounded": rounded}
            job |= {"files": peer["files"], "llama_python": args.llama_python}
            for row in child(args, job, work):
                table.add(row, **({"versions": peer["version"]} if row["arm"].startswith("llama.cpp") else {}))
        shutil.rmtree(into)


def main() -> int:
    parser = argparse.ArgumentParser(description="tokens a second of whole models on a CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_decode.csv")
    parser.add_argument("--check", action="store_true", help="tiny models, one round; writes nothing unless --out is given")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=("tiny", *SHAPES), help="default: tiny and llama-1.1b-random")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python and gguf")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one turn; slower arms make fewer tokens")
    parser.add_argument("--work", type=Path, help="where models are put for the run (4 GB); default: a temporary folder")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make-model", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        args.rounds = 1
    if args.rows:
        measure(args)
    elif args.make_model:
        make_model(args.make_model[0], Path(args.make_model[1]))
    else:
        write = not args.check or args.out != parser.get_default("out")
        table = Table(args.out if write else None, FIELDS, about("transformers"))
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            run(args, Path(work), table)
        return table.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
