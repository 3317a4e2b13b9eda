"""Inputs of the fuzzer that are made to hurt: small files that ask for much, wait, lead elsewhere or carry code.

Where fuzz_targets.py damages seeds at random, each case here is one attack with its size drawn anew. What must be refused and is not is `Silent`.
"""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutate as mutate
import torch
from fuzz_seeds import Files
from safetensors.torch import save

from compressor import strict
from compressor.errors import CompressorError
from compressor.pipelines import checkpoint, cli, data, estimate, load, sources
from compressor.pipelines.blockwise import opening
from compressor.pipelines.measure import protocols
from compressor.pipelines.sweeps import grid

Seeds = dict[str, Any]
COUNTS = (
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "head_dim",
    "num_key_value_heads",
    "num_labels",
)
MORE = ("max_position_embeddings", "num_local_experts", "n_layer", "num_experts", "sliding_window", "type_vocab_size", "max_window_layers")
MODELS = ("llama", "qwen2", "mixtral", "gpt_neox", "gemma2", "phi", "gpt2", "bert", "mamba", "opt", "t5", "qwen3_moe", "gpt_neo", "bloom", "falcon")


class Silent(AssertionError):
    """Something was taken that must be refused."""


def refused(call: Callable[[], object], why: str) -> None:
    """Silent if the call is no CompressorError."""
    try:
        call()
    except CompressorError:
        return
    raise Silent(why)


def _folder(content: Files, place: Path, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The files of a model folder, with keys of its config.json set; returns all keys."""
    for name, part in content.items():
        if name.endswith((".json", ".safetensors")) and "/" not in name:
            (place / name).write_bytes(part)
    told = json.loads(content["config.json"]) | (config or {})
    (place / "config.json").write_text(json.dumps(told))
    return told


def sizes(rng: Random, seeds: Seeds, place: Path) -> None:
    """A config.json that promises far more than the files hold, for architectures of all sorts."""
    names = rng.sample((*COUNTS, *MORE), rng.choice((1, 1, 2)))
    huge = {name: rng.choice((10**9, 2**40, 2**31 - 1, 2**63, 10**6, 65_535, 999, 3 * 10**4)) for name in names}
    kind = {"model_type": rng.choice(MODELS)} if rng.random() < 0.6 else {}
    _folder(seeds["folders"][rng.choice(("dense", "compressed-tensors", "sharded"))], place, huge | kind)
    build: tuple[Callable[[Path], object], ...] = (estimate.shell, load.empty_model, lambda folder: opening.load_blocks(str(folder), "cpu"))
    rng.choice(build)(place)


def shapes(rng: Random, seeds: Seeds, place: Path) -> None:
    """Safetensors headers of many tensors, of huge ones without data, and of shapes whose product overflows."""
    count = rng.choice((1, 1000, 20_000))
    entry = {
        "dtype": rng.choice(mutate.DTYPES),
        "shape": rng.choice(([0], [2**63, 0], [0, 2**62], [2**32, 2**32], [2**64, 0])),
        "data_offsets": [0, 0],
    }
    header = {f"model.layers.{i}.x": entry for i in range(count)}
    (place / "model.safetensors").write_bytes(mutate.join(json.dumps(header), b""))
    (place / "config.json").write_bytes(seeds["folders"]["dense"]["config.json"])
    if rng.random() < 0.5:
        load.read_packed(place, {})
    else:
        estimate.shell(place)


def large_files(rng: Random, seeds: Seeds, place: Path) -> None:
    """Files of many megabytes, most of them holes, where kilobytes are expected."""
    _folder(seeds["folders"]["dense"], place)
    name = rng.choice(("config.json", "model.safetensors.index.json", "quantize_config.json"))
    if name == checkpoint.INDEX:
        (place / "model.safetensors").unlink()
    with (place / name).open("wb") as file:
        file.write(rng.choice((b"{", b"[" * 100_000, b'{"a": "', b" ")))
        file.truncate(rng.choice((20 << 20, 200 << 20, 2 << 30)))
    if name == "quantize_config.json":
        weights = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 64, dtype=torch.int32)}
        (place / "model.safetensors").write_bytes(save(weights))
    refused(lambda: checkpoint.weight_files(place) if name == checkpoint.INDEX else checkpoint.any_config(place), f"{name} of many megabytes")


def _link(path: Path, target: str | Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def links(rng: Random, seeds: Seeds, place: Path) -> None:
    """Links out of the folder, round in circles, to pipes and devices; those of the hub's cache must work."""
    content = seeds["folders"][rng.choice(("dense", "sharded"))]
    folder = place / "snapshots" / "rev"
    folder.mkdir(parents=True)
    _folder(content, folder)
    name = rng.choice([path.name for path in sorted(folder.iterdir())])
    kind = rng.randrange(5)
    if kind == 0:  # as the hub's cache has them
        (place / "blobs").mkdir()
        for path in list(folder.iterdir()):
            path.rename(place / "blobs" / path.name)
            path.symlink_to(Path("..") / ".." / "blobs" / path.name)
        checkpoint.weight_files(folder)
        checkpoint.read_config(folder)
        return
    if kind == 1:
        (folder / name).unlink()
        os.mkfifo(folder / name)
    else:
        aims = ("/etc/passwd", "/dev/zero", "/dev/stdin", "../../x", str(folder / name), "/proc/self/mem", str(seeds["dense"] / "config.json"), "..")
        _link(folder / name, rng.choice(aims))
    refused(lambda: (checkpoint.read_config(folder), checkpoint.weight_files(folder)), f"{name} is no file of the folder")


def growing(rng: Random, seeds: Seeds, place: Path) -> None:
    """Compressed data that grow, lines without an end, and names of data that are devices."""
    kind = rng.randrange(4)
    if kind == 0:
        path = place / "c4.json.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(rng.choice((100, 200))):
                file.write(rng.choice((b" ", b"\n", b"[")) * (1 << 20))
        refused(lambda: protocols._rows(path), "a file that grows a thousand times")
    elif kind == 1:
        import pyarrow
        from pyarrow import parquet

        sink, text = io.BytesIO(), "x" * rng.choice((10, 10_000, 1_000_000))
        repeats = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rng.choice((10_000, 100_000)), pyarrow.int32()), pyarrow.array([text]))
        parquet.write_table(pyarrow.table({"text": repeats}), sink, compression="zstd")
        (place / "a.parquet").write_bytes(sink.getvalue())
        sources.load(str(place / "a.parquet"))
    elif kind == 2:
        os.mkfifo(place / "a.jsonl")
        refused(lambda: sources.load(str(place / "a.jsonl")), "a pipe")
    else:
        refused(lambda: sources.load(rng.choice(("/dev/zero", "/dev/stdin", "/proc/self/mem", "a\0b.txt", "x" * 5000 + ".txt"))), "a device")


def patterns(rng: Random, seeds: Seeds, place: Path) -> None:
    """Regular expressions that try for ever, in folders, recipes and grids."""
    names = ["model.layers.0.self_attn.q_proj", "a" * 60, "a" * 5000, "0" * 100 + "!"]
    atoms = (
        "a",
        ".",
        r"\w",
        "[a-z.]",
        "(a|a)",
        "(a|b|ab)",
        r"\d",
        "a?",
        ".?",
        "(.*)",
        "(?:a+)",
        "(a+) ",
        "(?x: ",
        "(?#[)",
        "(?#])",
        "(?-i:",
        ")",
        r"\[",
        "]",
        r"\\",
    )
    pattern = "".join(rng.choice(atoms) + rng.choice(("", "*", "+", "?", "{2,}", "{0,30}")) for _ in range(rng.randrange(1, 9))) + rng.choice("!$x")
    pattern = rng.choice(("", "", "", "(?x)", "(?ix)", "(?s)")) + pattern
    kind = rng.randrange(3)
    if kind == 0:
        from compressor.export import compressed_tensors

        groups = [compressed_tensors.Group(bits, 32, True, (f"re:{pattern}",)) for bits in (2, 3)]
        for name in names:
            try:
                compressed_tensors._bits(1, 10, name, groups, "x")
            except CompressorError:
                continue
    elif kind == 1:
        path = place / "r.yaml"
        path.write_text(json.dumps({"quant": {"ignore": [pattern], "layers": {f"re:{pattern}": "w4g64"}}}))
        quant = cli.read_recipe(path).quant
        for name in names[:2]:
            quant.of(name)
    else:
        (place / "g.yaml").write_text(json.dumps({"quant": ["3bit"], "layer": [f"re:{pattern}=w4g64"]}))
        grid.Grid(str(seeds["dense"]), cli.read_yaml(place / "g.yaml", "grid")).experiments()
    if strict.tame("(a+)+$") is None:
        raise Silent("(a+)+$")


def tokenizers(rng: Random, seeds: Seeds, place: Path) -> None:
    """Tokenizers whose parts try for ever, grow without end or are of another kind than they say."""
    content = seeds["folders"]["dense"]
    told = json.loads(content["tokenizer.json"])
    pattern = rng.choice(("(a+)+$", "(a|a)*b", "(.*)*x", "(?:x+x+)+y", "", "(", "a{1000000}", r"\p{L}+|\p{N}", "(a{1,99}){1,99}"))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    kind = rng.randrange(5)
    if kind == 0:
        told["pre_tokenizer"] = split
    elif kind == 1:
        told["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "y" * rng.choice((1, 10_000))}
    elif kind == 2:
        told["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": rng.choice(("", "AAAA", "/////w==", "A" * 4000))}
    elif kind == 3:
        inner: Any = split
        for _ in range(rng.choice((10, 60))):
            inner = {"type": "Sequence", "pretokenizers": [inner]}
        told["pre_tokenizer"] = inner
    else:
        told["model"] = {
            "type": rng.choice(("Unigram", "WordPiece", "WordLevel", "BPE", "x")),
            "vocab": rng.choice(({}, [], [["a", 0.0]])),
            "unk_id": 2**40,
        }
    (place / "tokenizer.json").write_text(json.dumps(told))
    (place / "tokenizer_config.json").write_bytes(content["tokenizer_config.json"])
    (place / "config.json").write_bytes(content["config.json"])
    text = "The ship left " + "a" * 40 + "x" * 40
    data.token_stream(sources.Corpus.of("text", [sources.Document(text)]), load.load_tokenizer(place))


ALL: tuple[Callable[[Random, Seeds, Path], None], ...] = (sizes, sizes, shapes, large_files, links, links, growing, patterns, patterns, tokenizers)


def target(rng: Random, seeds: Seeds, place: Path) -> None:
    """One attack."""
    rng.choice(ALL)(rng, seeds, place)
