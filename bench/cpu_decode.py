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
import csv
import ctypes
import gc
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no torch on this level: llama.cpp's interpreter, which may lack it, runs this file, too

PROMPT, NEW, GROUP = 16, 64, 128
TYPES = {4: "Q4_0", 3: "Q3_K_M", 2: "Q2_K"}
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


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# llama.cpp's interpreter: convert, then serve

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def read_safetensors(folder: Path) -> dict[str, Any]:
    """Arrays by name; bfloat16, which numpy lacks, as float32."""
    import numpy as np

    out: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        size = int.from_bytes(path.open("rb").read(8), "little")
        header = json.loads(path.open("rb").read(8 + size)[8:])
        header.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, "r", offset=8 + size)
        for name, about in header.items():
            raw = data[slice(*about["data_offsets"])]
            if about["dtype"] == "BF16":
                array = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                array = raw.view({"F16": np.float16, "F32": np.float32}[about["dtype"]])
            out[name] = array.reshape(about["shape"])
    return out


def write_gguf(folder: Path, path: Path) -> str:
    """The model as GGUF with its matrices as they are stored (F16 or F32, the name returned) and a vocabulary that only has the right size."""
    import gguf
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    vocab = config["vocab_size"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10000.0))
    writer.add_vocab_size(vocab)
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256))]
    tokens += [b"<f%d>" % i for i in range(vocab - len(tokens))]
    kind = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256 + [kind.USER_DEFINED] * (vocab - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    stored = "F16"
    for name, array in read_safetensors(folder).items():
        part = name.split(".")
        turned = {"q_proj": heads, "k_proj": shared}.get(part[-2])
        if turned:  # rotary pairs: halves of a head in transformers, neighbours in llama.cpp
            array = array.reshape(turned, 2, array.shape[0] // turned // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if array.ndim > 1 and array.dtype == np.float32:
            stored = "F32"
        target = TOP.get(name) or f"blk.{part[2]}.{NAMES['.'.join(part[3:-1])]}.weight"
        writer.add_tensor(target, np.ascontiguousarray(array.astype(np.float32) if array.ndim == 1 else array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def describe(path: Path, kind: str) -> dict[str, Any]:
    """Bytes that a step reads, and what the matrices became."""
    import gguf

    tensors = gguf.GGUFReader(str(path)).tensors
    names = {t.name for t in tensors}
    tied = "output.weight" not in names
    size = sum(int(t.n_bytes) for t in tensors if tied or t.name != "token_embd.weight")
    matrices = [t for t in tensors if len(t.shape) > 1]
    types = Counter(t.tensor_type.name for t in matrices)
    note = "matrices: " + ", ".join(f"{count} {name}" for name, count in sorted(types.items()))
    odd = [t for t in matrices if kind.endswith(("_K", "_K_M")) and int(t.shape[0]) % 256]
    if odd:
        note += f"; {len(odd)} of {len(matrices)} fell back from {kind}, for their rows are no multiple of 256"
    return {"path": str(path), "bytes": size, "note": note}


def silence(library: Any) -> Any:
    """No log of llama.cpp; the callback must be kept alive."""
    callback = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def llama_convert(folder: Path, into: Path) -> None:
    """Prints {"files": {type: {path, bytes, note}}, "version": …}."""
    import llama_cpp

    kept = silence(llama_cpp)
    plain = into / "plain.gguf"
    stored = write_gguf(folder, plain)
    files = {stored: describe(plain, stored)}
    for kind in TYPES.values():
        path = into / f"{kind}.gguf"
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        options.nthread = len(os.sched_getaffinity(0))
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(options)):
            say(f"llama.cpp cannot quantise to {kind}")
            continue
        files[kind] = describe(path, kind)
    del kept
    print("\n" + json.dumps({"files": files, "version": f"llama-cpp-python {llama_cpp.__version__}"}), flush=True)


def llama_serve(path: Path, threads: int) -> None:
    """For each line {"ids": …, "new": …} on stdin one line {"prefill": s, "decode": s, "ids": …} on stdout."""
    import llama_cpp as c
    import numpy as np

    kept = silence(c)
    c.llama_backend_init()
    model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
    options = c.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 256
    options.n_threads = options.n_threads_batch = threads
    context = c.llama_init_from_model(model, options) if model else None
    if not context:
        raise SystemExit("llama.cpp cannot load the file")
    vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))

    def step(ids: list[int]) -> int:
        array = (c.llama_token * len(ids))(*ids)
        if c.llama_decode(context, c.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama_decode failed")
        return int(np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), shape=(vocab,)).argmax())

    for line in sys.stdin:
        asked = json.loads(line)
        c.llama_memory_clear(c.llama_get_memory(context), True)
        start = time.perf_counter()
        ids = [step(asked["ids"])]
        first = time.perf_counter()
        while len(ids) < asked["new"]:
            ids.append(step(ids[-1:]))
        end = time.perf_counter()
        print(json.dumps({"prefill": first - start, "decode": end - first, "ids": ids}), flush=True)
    del kept


# our side, one process for a model at a thread count


class Llama:
    """llama.cpp with one file, in a process of its own that waits for turns."""

    def __init__(self, python: str, path: str, threads: int, prompt: list[int]):
        command = [python, __file__, "--llama-serve", path, str(threads)]
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
    import torch

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
    import torch

    from compressor import linear
    from compressor.pipelines import load
    from compressor.quant import rtn
    from compressor.recipe import Quant

    model = load.empty_model(folder).eval()
    prefix, blocks = linear.find_blocks(model)
    for name in linear.linears(blocks):
        full = f"{prefix}.{name}"
        old = dense.get_submodule(full)
        if rounded:
            weight = rtn.pack(old.weight.detach(), None, Quant(bits=bits, group=GROUP, symmetric=False), GROUP, torch.float16)[0]
        else:
            weight = random_weight(*old.weight.shape, bits)
        linear.swap(model, full, linear.PackedLinear(weight, old.bias))
    ours = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        if name in ours:
            ours[name].data = parameter.data
    model.tie_weights()
    return model


def random_weight(n: int, k: int, bits: int) -> Any:
    """Random codes with a standard deviation of 0.02; any words are codes."""
    import torch

    from compressor.kernels import layout
    from compressor.packed import Affine, PackedWeight

    words = torch.randint(-(1 << 31), (1 << 31) - 1, (*layout.tiles(n, k), layout.ROWS, 8 * bits), dtype=torch.int32)
    spread = (((1 << bits) ** 2 - 1) / 12) ** 0.5
    scale = (torch.rand(n, k // GROUP) * 0.2 + 0.9).mul(0.02 / spread).half()
    zero = torch.randint((1 << (bits - 1)) - 1, (1 << (bits - 1)) + 1, scale.shape, dtype=torch.uint8)
    return PackedWeight(words, Affine(scale, zero), bits, GROUP, (n, k))


def weight_bytes(model: Any) -> int:
    """Bytes of all linear layers, the output head with them."""
    from torch import nn

    from compressor.linear import PackedLinear

    dense = sum(m.weight.numel() * m.weight.element_size() for m in model.modules() if isinstance(m, nn.Linear))
    return dense + sum(m.packed().nbytes() for m in model.modules() if isinstance(m, PackedLinear))


def measure(args: argparse.Namespace) -> None:
    """The child: rows as JSON lines, appended as they come."""
    import torch
    from cpu_kernels import ceilings, first_line

    from compressor.pipelines import load

    job = json.loads(args.job.read_text())
    folder, threads = Path(job["folder"]), job["threads"]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    bandwidth = ceilings(args.check)[0]
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocab = load.read_config(folder)["vocab_size"]
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
            took = take_turns(turns, args.rounds, args.seconds, first_line)
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
            say(" ".join(f"{name}={row[name]}" for name in FIELDS[:18] if row.get(name) not in (None, "")))
        with args.rows.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        del packed, turns
        gc.collect()


def take_turns(turns: dict[str, Turn], rounds: int, seconds: float, first_line: Callable[[BaseException], str]) -> dict[str, list[Any]]:
    """What each arm returned, round by round, after two short calls; an arm too slow for 64 tokens in `seconds` makes fewer."""
    lengths = {}
    for arm, turn in turns.items():
        try:
            turn(4)
            lengths[arm] = max(4, min(NEW, int(seconds / max(turn(4)[1] / 3, 1e-9))))
        except Exception as error:  # an arm that breaks is a line, not the end of the run
            say(f"{arm} left out: {first_line(error)}")
    took: dict[str, list[Any]] = {arm: [] for arm in lengths}
    rng, order = random.Random(0), list(lengths)
    for _ in range(rounds):
        rng.shuffle(order)
        for arm in order:
            took[arm].append(turns[arm](lengths[arm]))
    return took


def summary(took: dict[str, list[Any]], read: dict[str, int], bandwidth: float, random_codes: bool) -> list[dict[str, Any]]:
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
    import torch
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
    command = [args.llama_python, __file__, "--llama-convert", str(folder), str(into)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])
    except OSError as error:
        say(f"llama.cpp left out: {error}")
    except (IndexError, ValueError):
        say(f"llama.cpp left out: {done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else f'status {done.returncode}'}")
    return none


def child(args: argparse.Namespace, job: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    from cpu_kernels import environment

    rows, path = work / "rows.jsonl", work / "job.json"
    rows.unlink(missing_ok=True)
    path.write_text(json.dumps(job))
    command = [sys.executable, __file__, "--rows", str(rows), "--job", str(path), "--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    done = subprocess.run(command + (["--check"] if args.check else []), env=environment(job["threads"]), check=False)
    if done.returncode:
        say(f"{job['name']} at {job['threads']} threads ended with status {done.returncode}; rows up to there are kept")
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def models(args: argparse.Namespace) -> list[tuple[str, bool]]:
    """(name, whether its packed layers are rounded from its weights)."""
    return [(name, name == "tiny") for name in args.models or ("tiny", "check-random" if args.check else "llama-1.1b-random")]


def run(args: argparse.Namespace, work: Path, add: Callable[[dict[str, Any], str], None]) -> None:
    from cpu_kernels import thread_counts

    from compressor.pipelines import load

    for name, rounded in models(args):
        folder = load.TINY if name == "tiny" else work / name
        if name != "tiny":
            subprocess.run([sys.executable, __file__, "--make-model", name, str(folder)], check=True)
        into = work / f"{name}-gguf"
        into.mkdir()
        peer = convert(args, folder, into)
        for threads in thread_counts(args.threads):
            job = {"name": name, "folder": str(folder), "threads": threads, "rounded": rounded}
            job |= {"files": peer["files"], "llama_python": args.llama_python}
            for row in child(args, job, work):
                add(row, peer["version"] if row["arm"].startswith("llama.cpp") else "")
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
    parser.add_argument("--llama-convert", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--llama-serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        args.rounds = 1
    if args.rows:
        measure(args)
    elif args.make_model:
        make_model(args.make_model[0], Path(args.make_model[1]))
    elif args.llama_convert:
        llama_convert(*args.llama_convert)
    elif args.llama_serve:
        llama_serve(Path(args.llama_serve[0]), int(args.llama_serve[1]))
    else:
        return table(args, write=not args.check or args.out != parser.get_default("out"))
    return 0


def table(args: argparse.Namespace, write: bool) -> int:
    from importlib.metadata import version

    from cpu_kernels import about

    if write:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".part") if write else Path(os.devnull)
    common, rows = about(), 0
    common["versions"] += f", transformers {version('transformers')}"
    with part.open("w", newline="", encoding="utf-8") as file, tempfile.TemporaryDirectory(dir=args.work) as work:
        writer = csv.DictWriter(file, FIELDS, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()

        def add(row: dict[str, Any], versions: str) -> None:
            nonlocal rows
            writer.writerow(row | common | ({"versions": versions} if versions else {}))
            file.flush()
            rows += 1

        run(args, Path(work), add)
    if not rows:
        say("nothing was measured")
        return 1
    if write:
        os.replace(part, args.out)
    say(f"{rows} rows{f' in {args.out}' if write else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
