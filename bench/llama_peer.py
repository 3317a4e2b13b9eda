"""llama.cpp's side of bench/cpu_decode.py, run by an interpreter that has llama-cpp-python and gguf; it may lack torch and this package.

    python bench/llama_peer.py convert FOLDER INTO       a LLaMA's folder as GGUF, plain and in every type of TYPES; prints what there is
    python bench/llama_peer.py serve FILE THREADS        decodes for each line on stdin, and waits for the next

Only cpu_decode.py calls it; of this folder it imports nothing.
"""

import argparse
import ctypes
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

TYPES = {4: "Q4_0", 3: "Q3_K_M", 2: "Q2_K"}
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


def convert(folder: Path, into: Path) -> None:
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
            print(f"llama.cpp cannot quantise to {kind}", file=sys.stderr)
            continue
        files[kind] = describe(path, kind)
    del kept
    print("\n" + json.dumps({"files": files, "version": f"llama-cpp-python {llama_cpp.__version__}"}), flush=True)


def serve(path: Path, threads: int) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description="llama.cpp's side of cpu_decode.py")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert")
    command.add_argument("folder", type=Path)
    command.add_argument("into", type=Path)
    command = commands.add_parser("serve")
    command.add_argument("file", type=Path)
    command.add_argument("threads", type=int)
    args = parser.parse_args()
    if args.command == "convert":
        convert(args.folder, args.into)
    else:
        serve(args.file, args.threads)


if __name__ == "__main__":
    main()
