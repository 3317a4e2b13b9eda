"""What the fuzzer calls: for everything that is read, a case is a damaged copy of a seed, written to `place` and handed to the public entry.

A target returns if the input was taken, and raises what the entry raised. `Silent` is raised for what was taken and must not be: this file checks
again, in its own plain way, what a reader let through. Attacks that are no damage are in fuzz_bombs.py.
"""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import fuzz_bombs
import fuzz_mutate as mutate
import torch
from fuzz_bombs import Silent
from fuzz_seeds import GRIDS, Files

from compressor import specs
from compressor.errors import CompressorError
from compressor.export import shards, task
from compressor.integrations import attach, peft
from compressor.kernels import configs
from compressor.packed import Affine, PackedWeight
from compressor.pipelines import checkpoint, cli, data, encoder_data, estimate, folder_facts, journal, load, sources, tools, verify
from compressor.pipelines import tasks as task_tools
from compressor.pipelines.measure import cache, task_files
from compressor.pipelines.output import read_report
from compressor.pipelines.report import Report
from compressor.pipelines.show import Show
from compressor.pipelines.sweeps import grid, page, rows

Seeds = dict[str, Any]
Target = Callable[[Random, Seeds, Path], None]


def put(place: Path, content: Files) -> Path:
    """The files in a folder."""
    for name, data_ in content.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data_)
    return place


def only(content: Files, *names: str) -> Files:
    return {name: content[name] for name in content if name in names or name.endswith(names)}


def whole(path: Path) -> None:
    """Silent unless a safetensors file is one by the letter of its specification."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length], object_pairs_hook=_once)
    at = 0
    header.pop("__metadata__", None)
    for entry in sorted(header.values(), key=lambda each: each["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != at or end < begin or any(type(size) is not int or size < 0 for size in entry["shape"]):
            raise Silent(f"{path.name} was taken with a hole, an overlap or a strange shape: {entry}")
        at = end
    if at != len(content) - 8 - length:
        raise Silent(f"{path.name} was taken with {len(content) - 8 - length - at} bytes more than its tensors")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise Silent("a header with a key twice was taken")
    return dict(pairs)


def header(rng: Random, seeds: Seeds, place: Path) -> None:
    """Safetensors files, up to their headers."""
    content = seeds["folders"][rng.choice(("dense", "compressed-tensors", "hqq"))]
    (place / "model.safetensors").write_bytes(mutate.tensors_file(content["model.safetensors"], rng))
    files = checkpoint.weight_files(place)
    found = shards.read_headers(place, files)
    checkpoint.stored_dtype(place)
    whole(place / "model.safetensors")
    if any(math.prod(tensor.shape) > 1 << 40 for tensor in found.values()):
        raise Silent("a tensor of more than 2**40 elements was taken")


def config(rng: Random, seeds: Seeds, place: Path) -> None:
    """config.json of every kind of folder, as it is read before anything else."""
    content = seeds["folders"][rng.choice(sorted(seeds["folders"]))]
    (place / "config.json").write_bytes(mutate.json_file(content["config.json"], rng))
    found = checkpoint.any_config(place)
    if type(found.get("vocab_size", 1)) is bool or found.get("hidden_size", 1) > 1 << 31:
        raise Silent(f"vocab_size {found.get('vocab_size')!r}, hidden_size {found.get('hidden_size')!r} were taken")


def shell(rng: Random, seeds: Seeds, place: Path) -> None:
    """The architecture that a config.json asks for, built for a dry run or for packed weights."""
    name = rng.choice(("dense", "dense", "encoder", "sharded", "compressed-tensors"))
    content = dict(seeds["folders"][name])
    content["config.json"] = mutate.json_file(content["config.json"], rng)
    put(place, only(content, "config.json", ".safetensors", ".index.json", ".py", ".bin"))
    if rng.random() < 0.5:
        estimate.shell(place)
    else:
        load.empty_model(place)


def index(rng: Random, seeds: Seeds, place: Path) -> None:
    """model.safetensors.index.json, and shards that are links or missing."""
    content = dict(seeds["folders"]["sharded"])
    content[checkpoint.INDEX] = mutate.json_file(content[checkpoint.INDEX], rng)
    put(place, only(content, "config.json", ".safetensors", ".index.json"))
    shard = rng.choice(sorted(place.glob("model-*.safetensors")))
    kind = rng.randrange(6)
    if kind == 0:
        shard.unlink()
        shard.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "../x", str(shard), "/proc/self/mem", str(place.parent / "outside.safetensors"))))
    elif kind == 1:
        shard.write_bytes(mutate.tensors_file(shard.read_bytes(), rng))
    for path in checkpoint.weight_files(place):
        if not path.resolve().is_relative_to(place.resolve()):
            raise Silent(f"{path.name} leads out of the folder")
        whole(path)
    load.read_packed(place, {})


def sound(packed: dict[str, PackedWeight]) -> None:
    """Silent for packed weights that cannot be."""
    for name, weight in packed.items():
        n, k = weight.shape
        if min(n, k, weight.group) < 1 or not bool(torch.isfinite(weight.learned).all()):
            raise Silent(f"{name}: shape {weight.shape}, groups of {weight.group}, or values that are not finite were taken")
        if isinstance(weight.values, Affine) and weight.learned.shape[1] * weight.group != k:
            raise Silent(f"{name}: {weight.learned.shape[1]} groups of {weight.group} for {k} columns were taken")
        if weight.zero is not None and weight.zero.is_floating_point() and not bool(torch.isfinite(weight.zero).all()):
            raise Silent(f"{name}: zeros that are not finite were taken")
        if not bool(torch.isfinite(weight.dequantize()).all()):
            raise Silent(f"{name}: weights that are not finite were taken")


def spoil(content: Files, rng: Random) -> Files:
    """A packed folder with its weights or its config.json, or both, damaged."""
    out, kind = dict(content), rng.randrange(5)
    if kind != 0:
        name = rng.choice([name for name in content if name.endswith(".safetensors") and not name.startswith("adapter/")])
        out[name] = mutate.tensors_file(content[name], rng)
    if kind in (0, 1):
        found = json.loads(content["config.json"])
        key = next((key for key in ("quantization_config", "quantization") if key in found), None)
        if key is None or rng.random() < 0.2:
            out["config.json"] = mutate.json_file(content["config.json"], rng)
        else:
            for one in [name for name in ("quantization_config", "quantization") if name in found]:
                found[one] = mutate.change(found[one], rng)
            out["config.json"] = mutate.dumps(found, rng).encode("utf-8", "surrogatepass")
    return out


def packed_of(*names: str) -> Target:
    """A target of packed folders of a format: config.json, weights and values, read as packed weights."""

    def target(rng: Random, seeds: Seeds, place: Path) -> None:
        content = spoil(seeds["folders"][rng.choice(names)], rng)
        put(place, only(content, "config.json", "model.safetensors", "quantize_config.json"))
        sound(load.read_packed(place, checkpoint.read_config(place))[1])

    return target


def facts(rng: Random, seeds: Seeds, place: Path) -> None:
    """What `doctor FOLDER` reads: config.json and headers of any folder, or a GGUF file."""
    if rng.random() < 0.3:
        (place / "m.gguf").write_bytes(mutate.raw(seeds["gguf"], rng))
        folder_facts.describe(folder_facts.facts(place / "m.gguf"))
        return
    content = spoil(seeds["folders"][rng.choice(sorted(seeds["folders"]))], rng) if rng.random() < 0.8 else seeds["folders"]["adapter"]
    if "adapter/adapter_config.json" in content:
        content = content | {"adapter/adapter_config.json": mutate.json_file(content["adapter/adapter_config.json"], rng)}
    put(place, only(content, ".json", ".safetensors"))
    found = folder_facts.facts(place)
    folder_facts.describe(found), folder_facts.document(found), found.split()


def folder(rng: Random, seeds: Seeds, place: Path) -> None:
    """Whole folders through `load` and `inspect`: with code that auto_map names, pickles beside the weights, and an adapter."""
    name = rng.choice([name for name in sorted(seeds["folders"]) if name != "encoder"])
    content = spoil(seeds["folders"][name], rng) if rng.random() < 0.7 else dict(seeds["folders"][name])
    if rng.random() < 0.3:
        tampered = mutate.json_file(content["config.json"], rng)
    else:
        try:
            told = json.loads(content["config.json"])
            told = told | {"auto_map": {"AutoModelForCausalLM": "modeling_x.Model", "AutoConfig": "modeling_x.Model"}} if type(told) is dict else told
            tampered = json.dumps(told | ({"model_type": "x"} if rng.random() < 0.3 else {}) if type(told) is dict else told).encode()
        except (ValueError, RecursionError):
            tampered = content["config.json"]
    content["config.json"] = tampered
    if rng.random() < 0.2:
        content["adapter_config.json"] = json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(place / "other")}).encode()
    if rng.random() < 0.2:
        content["gptq_model.safetensors"] = content.pop("model.safetensors", b"")
    put(place, content)
    with torch.no_grad():
        loaded = load.load(str(place), "cpu") if rng.random() < 0.7 else None
        if loaded is None:
            tools.inspect_folder(str(place))
        else:
            sound(load.packed_weights(loaded.model))


def tokenizer(rng: Random, seeds: Seeds, place: Path) -> None:
    """Tokenizer files and chat templates, and a text through what loads."""
    content = only(seeds["folders"]["dense"], *seeds["tokenizer"], "config.json", ".py")
    told = json.loads(content["tokenizer_config.json"])
    if rng.random() < 0.4:
        told |= {"tokenizer_class": rng.choice(("Tokenizer", "LlamaTokenizer", "BertTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer", "x"))}
        told |= {"auto_map": {"AutoTokenizer": ["modeling_x.Tokenizer", "modeling_x.Tokenizer"]}}
    if rng.random() < 0.3:
        told["chat_template"] = rng.choice(seeds["templates"])
    content["tokenizer_config.json"] = json.dumps(told).encode()
    name = rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", ""))
    if name:
        content[name] = mutate.json_file(content.get(name, b'{"a": 1, "b": {"content": "x"}}'), rng)
    if rng.random() < 0.1:
        del content["tokenizer.json"]
        content["tokenizer.model"] = rng.randbytes(200)
        content["vocab.txt"] = b"[UNK]\n[CLS]\na\n"
    put(place, content)
    found = load.load_tokenizer(place)
    chat = [sources.Document("x", "y", (("user", "hello there"), ("assistant", "the ship left")))]
    data.token_stream(sources.Corpus.of("text", [sources.Document("The ship left the harbour at dawn, 12 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!")]), found)
    list(data.encode(sources.Corpus.of("chat", chat), found))


def recipe(rng: Random, seeds: Seeds, place: Path) -> None:
    """recipe.yaml."""
    (place / "recipe.yaml").write_bytes(mutate.yaml_file(seeds["recipe"], rng))
    found = cli.read_recipe(place / "recipe.yaml")
    found.digest("tune"), json.dumps(found.to_dict(), allow_nan=False)
    name = "model.layers.11.self_attn.q_proj.and.some.more.of.it"
    specs.means("re:" + next(iter(found.quant.ignore), "x"), name), found.quant.of(name)


def sweep_grid(rng: Random, seeds: Seeds, place: Path) -> None:
    """Grids of sweeps."""
    (place / "grid.yaml").write_bytes(mutate.yaml_file(rng.choice(GRIDS), rng))
    grid.Grid(str(seeds["dense"]), cli.read_yaml(place / "grid.yaml", "grid")).experiments()


def flags(rng: Random, seeds: Seeds, place: Path) -> None:
    """The short forms of flags."""
    text = "".join(rng.choice("0123456789.:-_%wgbitsketchasymGMB \x00é²") for _ in range(rng.randrange(12)))
    text = rng.choice((text, mutate.raw(rng.choice((b"w3g64:asym", b"obert:80%:4block", b"2.6GB", b"2%")), rng).decode("latin-1"), "9" * 5000))
    if rng.random() < 0.1:
        long = rng.choice(("9", "1:", ":sym", ":asym", ":4block", "g", "%", "0", "٣")) * rng.choice((1, 2, 3000))
        text = (
            rng.choice(("", "w", "w3g", "3bit", "sketch", "obert:", "obert:1:", text)) + long + rng.choice(("", "bit", "GB", "%", ":sym", ":2", text))
        )
    for parse in (specs.parse_quant, specs.parse_size, specs.parse_share, specs.parse_prune):
        try:
            parse(text)
        except CompressorError:
            continue
    grid.parse_set([f"a={text}"])


def texts(rng: Random, seeds: Seeds, place: Path) -> None:
    """Data of every form, as text and as labelled examples."""
    names = [name for name in sorted(seeds["data"]) if name != "a.parquet"]
    name = rng.choice(names)
    change = mutate.json_file if name.endswith(".json") else mutate.lines_file
    (place / name).write_bytes(change(seeds["data"][name], rng))
    if rng.random() < 0.5 or name.endswith(".conll"):
        encoder_data.load(str(place / name))
    else:
        found = sources.load(str(place / name))
        if not found.train.documents or not found.test.documents:
            raise Silent("a split without documents")


def parquet(rng: Random, seeds: Seeds, place: Path) -> None:
    """Parquet files."""
    (place / "a.parquet").write_bytes(mutate.raw(seeds["data"]["a.parquet"], rng))
    sources.load(str(place / "a.parquet"))


def questions(rng: Random, seeds: Seeds, place: Path) -> None:
    """Files of questions."""
    name = rng.choice(sorted(seeds["questions"]))
    (place / name).write_bytes(mutate.lines_file(seeds["questions"][name], rng))
    found = task_files.read(place / name)
    for row in found.rows:
        if found.choice and not 0 <= row["gold"] < len(row["choices"]):
            raise Silent("an answer that is none of the choices")
        if not found.choice:
            task_files.matches("so it is #### 12", row["answers"], found.worked)


def task_file(rng: Random, seeds: Seeds, place: Path) -> None:
    """Task files: of scales, of zeros, of an adapter, alone and for their base."""
    kind = rng.choice(sorted(seeds["tasks"]))
    path = place / "t.safetensors"
    path.write_bytes(mutate.tensors_file(seeds["tasks"][kind], rng))
    task.read_header(path)
    found = task.read_alone(path) if rng.random() < 0.3 else task.read(path, seeds["packed"], "0" * 64)
    if not all(bool(torch.isfinite(value).all()) for value in found.values.values()):
        raise Silent("values that are not finite")
    if found.kind == task.ADAPTER:
        attach.check(found.config, found.values, "t.safetensors")


def adapter(rng: Random, seeds: Seeds, place: Path) -> None:
    """Folders of adapters, beside a model."""
    content = dict(seeds["folders"]["adapter"])
    if rng.random() < 0.6:
        content["adapter/adapter_config.json"] = mutate.json_file(content["adapter/adapter_config.json"], rng)
    else:
        content["adapter/adapter_model.safetensors"] = mutate.tensors_file(content["adapter/adapter_model.safetensors"], rng)
    put(place, {name.removeprefix("adapter/"): part for name, part in content.items() if name.startswith("adapter/")})
    model = seeds["model"]()
    made = attach.load(model, place)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in peft.state(made).values()):
        raise Silent("an adapter that is not finite")


def record(rng: Random, seeds: Seeds, place: Path) -> None:
    """Journals, reports, rows of sweeps, kept measurements, tables of tile sizes."""
    name = rng.choice(sorted(seeds["records"]))
    content = seeds["records"][name]
    change = mutate.tensors_file if name.endswith(".safetensors") else mutate.lines_file if name.endswith(".jsonl") else mutate.json_file
    (place / name).write_bytes(change(content, rng))
    if name == "journal.json":
        journal.Journal(place).get("pack", "f")
    elif name == "report.json":
        read_report(place), task_tools.about(place, "x")
        Report.load(place / name).to_dict()
    elif name == "rows.jsonl":
        page.read(place)
        rows.read(place / name)
    elif name == "tiles.json":
        configs.load(place / name)
    elif name == "export.json":
        task_tools.applied(place)
    else:
        journal.kept(place / name)


def sealed(rng: Random, seeds: Seeds, place: Path) -> None:
    """Folders with digests, one of whose files is damaged, through `verify`."""
    content = dict(seeds["sealed"])
    name = rng.choice((*content, "digests.json", "digests.json", "recipe.yaml"))
    change = mutate.tensors_file if name.endswith(".safetensors") else mutate.yaml_file if name.endswith(".yaml") else mutate.json_file
    content[name] = change(content[name], rng)
    put(place, content)
    document, _ = verify.verify(place)
    if content[name] != seeds["sealed"][name] and document["verdict"] == "whole":
        raise Silent(f"{name} is not what it was, and the folder is whole")


def measurement(rng: Random, seeds: Seeds, place: Path) -> None:
    """Kept measurements."""
    key = {"a": 1}
    store = cache.Cache(place, Show())
    store.put(key, {"perplexity": 2.0})
    path = next(place.glob("*.json"))
    path.write_bytes(mutate.json_file(path.read_bytes(), rng))
    found = store.get(key)
    if found is not None and found["perplexity"] != 2.0:
        raise Silent("a measurement that nobody made")


TARGETS: dict[str, tuple[Target, int]] = {  # name: its function, share of a campaign in thousandths
    "safetensors header": (header, 300),
    "config.json": (config, 255),
    "index and links": (index, 60),
    "folder facts": (facts, 80),
    "compressed-tensors": (packed_of("compressed-tensors", "compressed-tensors asymmetric"), 10),
    "table": (packed_of("table"), 8),
    "sparse": (packed_of("sparse", "sparse, float zeros"), 8),
    "gptq": (packed_of("gptq", "gptq v2"), 8),
    "awq": (packed_of("awq"), 6),
    "hqq": (packed_of("hqq"), 6),
    "mlx": (packed_of("mlx"), 6),
    "architecture": (shell, 6),
    "folder": (folder, 4),
    "adapters": (adapter, 3),
    "tokenizer": (tokenizer, 3),
    "recipe.yaml": (recipe, 10),
    "grid.yaml": (sweep_grid, 8),
    "flags": (flags, 40),
    "texts and examples": (texts, 60),
    "parquet": (parquet, 8),
    "questions": (questions, 35),
    "task files": (task_file, 25),
    "records": (record, 45),
    "measurements": (measurement, 10),
    "digests": (sealed, 5),
    "attacks": (fuzz_bombs.target, 6),
}
