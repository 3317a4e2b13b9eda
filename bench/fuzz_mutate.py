"""Mutators of the fuzzer: bytes, JSON values, safetensors files and lines of text, each damaged the way that files get damaged or are made to.

All draw from one random.Random, so that a case is known by its seed. Structure is kept where that goes deeper: a JSON file mostly stays JSON, and a
safetensors file mostly keeps a header whose length and offsets fit, with one entry, or the numbers behind it, changed.
"""

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)
NUMBERS = (0, 1, -1, 2, 3, 7, 5000, 10**9, *HUGE, *(-n for n in HUGE), 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), -float("inf"))
WORDS = (
    "", "x", "1", "-1", "nan", "true", "null", "\x00", "\ud800", "é" * 40, "a" * 5000, "../../../etc/passwd", "/etc/passwd", "..",
    "model.safetensors",
    "pytorch_model.bin", "re:(a+)+$", "re:(.*)*x", "(", "re:" + "(" * 200, "re:.*.*.*.*.*.*.*.*x", "Linear", "LlamaForCausalLM", "BertModel",
    "gptq", "awq",
    "hqq", "mlx", "compressor", "bitsandbytes", "fp8", "torchao", "meta", "cuda", "float16", "int4", "modeling_x.Model", "os.system",
    "{{ ''.__class__ }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "(a|a)*b",
)  # fmt: skip
KEYS = (
    "__metadata__", "auto_map", "quantization_config", "torch_dtype", "dtype", "trust_remote_code", "num_labels", "id2label", "architectures",
    "model_type", "tokenizer_class", "rope_scaling", "rope_parameters", "layer_types", "head_dim", "num_local_experts", "tie_word_embeddings",
    "sliding_window", "attn_implementation", "_attn_implementation", "custom_generate", "base_model_name_or_path", "transformers_weights", "",
    "__class__", "model.norm.weight",
)  # fmt: skip
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U16",
    "U32",
    "U64",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "C64",
    "F99",
    "",
    "f16",
)


def deep(levels: int, opening: str = "[", closing: str = "]") -> Any:
    """JSON text nested so deep, as a Raw that `dumps` puts in place."""
    return Raw(opening * levels + closing * levels)


class Raw(str):
    """Text that stands in the JSON as it is."""


def evil(rng: Random) -> Any:
    """A value that something is sure not to expect."""
    kind = rng.randrange(12)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 7:
        return rng.choice(WORDS)
    if kind == 7:
        return rng.choice(([], {}, None, True, False, [[]], [{}], {"": None}))
    if kind == 8:
        return [evil(rng) for _ in range(rng.randrange(4))]
    if kind == 9:
        return {rng.choice(KEYS): evil(rng) for _ in range(rng.randrange(4))}
    if kind == 10:
        return deep(rng.choice((50, 900, 10_000, 100_000)), *rng.choice((("[", "]"), ('{"a":', "1}"), ("[", ""))))
    return Raw(
        rng.choice(("1" * 5000, "NaN", "-Infinity", "1e999", "01", '"\\ud800"', "[1,]", "tru", "", '{"a":1,"a":2}', "[" + "0," * 20_000 + "0]"))
    )


def places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    found = [] if found is None else found
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        found.append((value, key))
        places(inner, found)
    return found


def change(value: Any, rng: Random) -> Any:
    """One change of a JSON value, in place where it can be."""
    spots = places(value)
    if not spots or rng.random() < 0.02:
        return evil(rng)
    box, key = rng.choice(spots)
    kind = rng.randrange(10)
    if kind < 5:
        box[key] = evil(rng)
    elif kind == 5:
        del box[key]
    elif kind == 6 and isinstance(box, dict):
        box[rng.choice(KEYS)] = evil(rng)
    elif kind == 7 and isinstance(box, dict):
        box[rng.choice((*KEYS, *WORDS[:12], *box))] = box.pop(key)
    elif kind == 8:
        other, name = rng.choice(spots)
        if key in box if isinstance(box, dict) else key < len(box):
            box[key] = other[name] if not isinstance(other[name], dict | list) else evil(rng)
    elif isinstance(box[key], int | float):
        box[key] = rng.choice((-box[key], box[key] + 1, box[key] - 1, box[key] * 2, box[key] * 2**20, str(box[key])))
    else:
        box[key] = [box[key]]
    return value


def dumps(value: Any, rng: Random) -> str:
    """JSON text with Raw parts as they are, and now and then a key twice."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        parts = [f"{json.dumps(str(k))}: {dumps(v, rng)}" for k, v in value.items()]
        if parts and rng.random() < 0.01:
            parts.append(f"{json.dumps(str(rng.choice(list(value))))}: {dumps(evil(rng), rng)}")
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(dumps(each, rng) for each in value) + "]"
    return json.dumps(value)


def json_file(content: bytes, rng: Random) -> bytes:
    """A JSON file with one to three changes; one in eight times as bytes."""
    if rng.random() < 0.12:
        return raw(content, rng)
    try:
        value = json.loads(content)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            value = change(value, rng)
        return dumps(value, rng).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # damaged so already
        return raw(content, rng)


def lines_file(content: bytes, rng: Random) -> bytes:
    """A file of lines: JSON ones changed, others swapped, doubled, cut or damaged."""
    lines = content.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind < 3 and lines[at][:1] in (b"{", b"["):
            lines[at] = json_file(lines[at], rng)
        elif kind == 3:
            lines[at] = raw(lines[at], rng)
        elif kind == 4:
            lines.insert(at, rng.choice(lines))
        else:
            lines[at] = dumps(evil(rng), rng).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def raw(content: bytes, rng: Random) -> bytes:
    """Bytes with one to eight of them, or a stretch, changed."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(7)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at % len(out)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x5B, 0x7B))
        elif kind == 2:
            del out[at : at + rng.choice((1, 2, 8, 100, 10_000))]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 4:
            out[at:at] = out[at : at + rng.choice((1, 8, 64, 1000))]
        elif kind == 5:
            out = out[:at]
        else:
            out[at : at + 8] = struct.pack("<Q", rng.choice([n for n in HUGE if n < 2**64] + [0, 1]))
    return bytes(out)


def join(header: str | bytes, body: bytes, length: int | None = None) -> bytes:
    """A safetensors file; length: what it says of its header, by default the truth."""
    text = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + body


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a whole safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _entry(header: dict[str, Any], body: bytes, rng: Random) -> bytes:
    """One entry with another dtype, shape or place."""
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, kind = header[name], rng.randrange(9)
    begin, end = entry["data_offsets"]
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = [rng.choice((0, 1, -1, 3, 2**31, 2**32, 2**62, 2**63, 2**64, 1.0, "4", None)) for _ in range(rng.randrange(5))]
    elif kind == 2:
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1], [end - begin], [2**32, 2**32, *entry["shape"]])
        )
    elif kind == 3:
        moves = ((end, begin), (-1, end), (begin + 1, end + 1), (begin, end + 8), (0, len(body)), (begin, 2**63), (0, 0))
        entry["data_offsets"] = list(rng.choice(moves))
    elif kind == 4:
        header[rng.choice((*WORDS[:12], *KEYS, f"{name}.weight", name.rpartition(".")[0]))] = header.pop(name)
    elif kind == 5:
        header[f"{name}_2"] = dict(entry)  # the same bytes under two names
    elif kind == 6:
        del header[name]
    elif kind == 7:  # the same file with one tensor of another dtype of that size
        other = {"F16": "BF16", "BF16": "F16", "I32": "F32", "F32": "I32", "I64": "F64", "U8": "I8", "U32": "I32"}
        entry["dtype"] = other.get(entry["dtype"], "U8")
    else:
        text = json.dumps(header)
        return join(text[:-1] + f", {json.dumps(name)}: {json.dumps(entry | {'shape': [1]})}" + "}", body)
    return join(json.dumps(header), body)


def _without(header: dict[str, Any], body: bytes, rng: Random) -> bytes:
    """A tensor taken out, renamed or cut, the rest whole: what only a reader of the format can notice."""
    names = [key for key in header if key != "__metadata__"]
    gone, kind, parts, at = rng.choice(names), rng.randrange(4), bytearray(), 0
    out: dict[str, Any] = {key: header[key] for key in header if key == "__metadata__"}
    for name in sorted(names, key=lambda key: header[key]["data_offsets"][0]):
        entry, (begin, end) = header[name], header[name]["data_offsets"]
        shape, data, key = list(entry["shape"]), body[begin:end], name
        if name == gone:
            if kind == 0:
                continue
            if kind == 1:
                key = rng.choice(names).rpartition(".")[0] + "." + name.rpartition(".")[2] + "x" * rng.randrange(2)
            elif kind == 2 and shape and shape[0] > 1:
                step = len(data) // shape[0]
                keep = rng.choice((0, 1, shape[0] // 2, shape[0] - 1))
                shape[0], data = keep, data[: step * keep]
            else:
                shape = shape[::-1]
        parts += data
        out[key] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [at, at := at + len(data)]}
    return join(json.dumps(out), bytes(parts))


def _values(header: dict[str, Any], body: bytes, rng: Random) -> bytes:
    """Numbers of one tensor changed, as a disk or a stranger would."""
    out = bytearray(body)
    begin, end = header[rng.choice([key for key in header if key != "__metadata__"])]["data_offsets"]
    for _ in range(rng.choice((1, 1, 4, 64))):
        if end > begin:
            at = rng.randrange(begin, end)
            if rng.random() < 0.5:
                out[at] ^= 1 << rng.randrange(8)
            else:
                new = rng.choice((b"\x00\x7c", b"\x00\x7e", b"\x80\x7f", b"\xff" * 8, b"\x00" * 8, struct.pack("<q", -1), struct.pack("<q", 2**62)))
                out[at : min(at + len(new), end)] = new[: min(len(new), end - at)]
    if rng.random() < 0.05:
        out[begin:end] = bytes(end - begin)
    return join(json.dumps(header), bytes(out))


def tensors_file(content: bytes, rng: Random) -> bytes:
    """A safetensors file with one change: of its bytes, its header's text, one entry, one tensor or its numbers."""
    kind = rng.randrange(12)
    if kind == 0:
        return raw(content, rng)
    header, body = split(content)
    if kind == 1:
        return join(json.dumps(header), body, rng.choice((*HUGE, 0, 1, len(content), -1)))
    if kind == 2:
        return join(dumps(change(header, rng), rng), body)
    if kind == 3 and "__metadata__" in header and header["__metadata__"]:
        box = header["__metadata__"]
        key = rng.choice(list(box))
        box[key] = json_file(box[key].encode(), rng).decode("utf-8", "replace") if rng.random() < 0.9 else evil(rng)
        return join(dumps(header, rng), body)
    deeper: tuple[Callable[[dict[str, Any], bytes, Random], bytes], ...] = (_entry, _without, _values)
    return deeper[kind % 3](header, body, rng)


def _merges(key: bytes) -> bytes:
    """Mappings that each merge nine of the one before: 9**9 copies in some hundred bytes."""
    steps = (b"%c: &%c {%b: [%b]}\n" % (b, b, key, b",".join([b"*%c" % a] * 9)) for a, b in zip(b"abcdefghi", b"bcdefghij", strict=True))
    return b"a: &a {x: 1}\n" + b"".join(steps)


EVIL_YAML = (
    b"a: !!python/object/apply:os.system ['touch canary.ran']\n", b"a: !!python/name:os.system\n", b"&a [*a]\n", b"x: &a [*a, *a]\n",
    b"a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
    b"e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\nquant: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nignore: [*g,*g,*g,*g,*g,*g]\n",
    b"a: " + b"[" * 3000, b"? [a, b]\n: 1\n", b"? {a: b}\n: 1\n", b"a: 1\na: 2\n", b"seed: " + b"9" * 5000 + b"\n", b"seed: " + b"1:" * 2000 + b"1\n",
    b"seed: 2001-99-99\n", b"seed: 0x" + b"f" * 5000 + b"\n", b"!!binary x: 1\n", b"seed: .nan\n", b"---\na: 1\n---\nb: 2\n", b"<<: [1]\n",
    b"<<: &a\n  <<: *a\n",
    b"\xff\xfe", b"%YAML 9.9\n---\n", b"a: |\n  " + b"x" * 50_000 + b"\n", b"quant: {ignore: ['(a+)+$', '(.*)*x']}\n", b"lr: 1e400\n",
    b"a: !!int ''\n", b"a: !!float ''\n", b"a: !!bool x\n", b"a: !!timestamp x\n", b"a: " + b"1:" * 199 + b"1.5\n", b"a: !!int {=: ''}\n",
    _merges(b"<<"), _merges(b"!!merge x"), b"a: {<<: {b: 1}}\n",
    b"quant: {layers: {'re:(.*a)*$': w4g64}}\n", b"tune.lr: [" + b"1e-3," * 9000 + b"]\nlr: [" + b"1e-3," * 9000 + b"]\n",
)  # fmt: skip


def yaml_file(content: bytes, rng: Random) -> bytes:
    """A YAML file with a value changed, a line of its own added, or its bytes damaged."""
    kind = rng.randrange(8)
    if kind == 0:
        return raw(content, rng)
    if kind == 1:
        return rng.choice(EVIL_YAML)
    if kind == 2:
        return content + rng.choice(EVIL_YAML)
    lines = content.split(b"\n")
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(b": ")
        if colon:
            lines[at] = key + colon + dumps(evil(rng), rng).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)
