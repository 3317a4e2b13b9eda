"""Seeds of the fuzzer: a small whole folder or file of everything that the package reads, as {file name: bytes}, made on the spot.

Models are random LLaMAs of one block of width 64 and a BERT of one, so that a case takes a millisecond to write; the tokenizer is that of `tiny`.
Every model folder also holds what must never run: code that `auto_map` names, a pickle, a template: each would leave a file behind (CANARY).
"""

import io
import json
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from compressor.export import task
from compressor.integrations import attach, peft
from compressor.packed import Affine, PackedWeight, zeros_as_floats
from compressor.pipelines import checkpoint, load, write
from compressor.recipe import Recipe, Tune

Files = dict[str, bytes]
CANARY = "canary.ran"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
CODE = f"open({CANARY!r}, 'w').close()\nclass Model:\n    pass\nclass Tokenizer:\n    pass\n"


PICKLED = f"cbuiltins\nopen\n(V{CANARY}\nVw\ntR.".encode()  # whoever unpickles it calls open(CANARY, "w")


def baits() -> Files:
    """What lies in a stranger's folder and must not run."""
    return {"modeling_x.py": CODE.encode(), "pytorch_model.bin": PICKLED, "training_args.bin": PICKLED}


def files(folder: Path) -> Files:
    """All files of a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _float_zeros(weight: PackedWeight) -> PackedWeight:
    """The same weight with its zeros as floats, as tuning leaves them."""
    values = Affine(weight.learned, zeros_as_floats(weight.learned, weight.zero, weight.bits))
    return PackedWeight.pack(weight.codes(), values, weight.bits)


FORMS: dict[str, tuple[str, int, bool, bool]] = {  # seed: format, bits, symmetric, zeros as floats
    "compressed-tensors": ("compressed-tensors", 3, True, False),
    "compressed-tensors asymmetric": ("compressed-tensors", 4, False, False),
    "table": ("compressor", 2, True, False),
    "sparse": ("compressor_sparse", 4, True, False),
    "sparse, float zeros": ("compressor_sparse", 3, False, True),
    "gptq": ("gptq", 4, True, False),
    "gptq v2": ("gptq_v2", 3, False, False),
    "awq": ("awq", 4, False, False),
    "hqq": ("hqq", 3, False, False),
    "mlx": ("mlx", 4, False, False),
}


def folders() -> dict[str, Files]:
    """Model folders: dense, sharded, encoder, every packed format, and one with an adapter beside it."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from tests.pipelines.foreign_folders import packed_folder

    out: dict[str, Files] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).half().save_pretrained(place / "dense")
        for companion in TOKENIZER:
            (place / "dense" / companion).write_bytes((checkpoint.TINY / companion).read_bytes())
        LlamaForCausalLM(LlamaConfig(**SHAPE)).half().save_pretrained(place / "sharded", max_shard_size="60KB")
        write.copy_companions(place / "dense", place / "sharded")
        bert = BertConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3)
        BertForSequenceClassification(bert).save_pretrained(place / "encoder")
        write.copy_companions(place / "dense", place / "encoder")
        for seed, (form, bits, symmetric, floats) in FORMS.items():
            packed_folder(place / "dense", place / seed, form, bits, symmetric, edit=_float_zeros if floats else None)
        _adapter(place / "compressed-tensors", place / "adapter")
        for folder in sorted(place.iterdir()):
            out[folder.name] = files(folder) | baits()
    return out


def _adapter(base: Path, folder: Path) -> None:
    """A copy of a packed folder with a LoRA adapter in it."""
    for name, content in files(base).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    config, tensors = adapter_of(base)
    attach.write(folder / "adapter", config, tensors)


def adapter_of(base: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of a LoRA adapter beside the linears of a folder."""
    model = load.load(str(base), "cpu").model
    tuner = peft.KINDS["lora"](Tune(method="lora", rank=2))
    tuner.attach(model)
    return attach.plain(tuner.model), peft.state(tuner.model)


def tasks(base: Files) -> dict[str, bytes]:
    """Task files of scales, float zeros and an adapter for the packed seed `base`."""
    out = {}
    with tempfile.TemporaryDirectory() as name:
        for file, content in base.items():
            Path(name, file).write_bytes(content)
        packed = load.packed_weights(load.load(name, "cpu").model)
        scales = {module: weight.learned for module, weight in packed.items()}
        zeros = {module: zeros_as_floats(weight.learned, weight.zero, weight.bits) for module, weight in packed.items()}
        config, tensors = adapter_of(Path(name))
        found = [task.Task("scale", "0" * 64, scales), task.Task("zero", "0" * 64, zeros), task.Task(task.ADAPTER, "0" * 64, tensors, config=config)]
        for each in found:
            task.write(Path(name) / "task.safetensors", each, packed)
            out[each.kind] = (Path(name) / "task.safetensors").read_bytes()
    return out


def gguf() -> bytes:
    """A GGUF file with three tensors that it only names."""
    text = lambda value: struct.pack("<Q", len(value)) + value.encode()
    pairs = text("general.architecture") + struct.pack("<I", 8) + text("llama") + text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    pairs += text("numbers") + struct.pack("<IIQ", 9, 5, 3) + bytes(12) + text("scale") + struct.pack("<If", 6, 0.5)
    infos = b"".join(text(f"t{i}") + struct.pack("<IQQIQ", 2, 256, 64, i, 0) for i in (2, 8, 0))
    return b"GGUF" + struct.pack("<IQQ", 3, 3, 4) + pairs + infos + bytes(64)


GRIDS = (
    b"base: {nsamples: 32, eval.max_tokens: 16384}\nquant: [3bit, w2g64, sketch3]\ntune.method: [none, peqa]\n",
    b"quant: [4bit]\npoints: [{quant: 4bit, tune: lora}]\nexclude: [{quant.bits: 2, tune: none}]\nlr: [1e-3, 2e-3]\n",
)


def recipe() -> bytes:
    import yaml

    return yaml.safe_dump(Recipe().with_(quant__ignore=("lm_head",), quant__layers={"re:down_proj": "w4g64"}).to_dict()).encode()


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def data() -> Files:
    """Texts and labelled examples in every form, by file name."""
    text = [{"text": f"Sentence {i} of the text."} for i in range(24)]
    chat = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(12)]
    alpaca = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(12)]
    labelled = [{"sentence": f"word {i}", "label": i % 2} for i in range(20)]
    squad = {
        "data": [{"paragraphs": [{"context": "the ship left", "qas": [{"question": "who?", "answers": [{"text": "ship", "answer_start": 4}]}]}]}]
    }
    table = "sentence\tlabel\n" + "".join(f"word {i}\t{i % 2}\n" for i in range(20))
    out = {
        "a.jsonl": _lines(text), "chat.jsonl": _lines(chat), "alpaca.json": json.dumps(alpaca).encode(), "labels.jsonl": _lines(labelled),
        "squad.json": json.dumps(squad).encode(), "t.tsv": table.encode(), "t.csv": table.replace("\t", ",").encode(),
        "notes.txt": "\n\n".join(row["text"] for row in text).encode(), "tags.conll": b"EU B-ORG\nrejects O\n\nPeter B-PER\n" * 8,
    }  # fmt: skip
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return out
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(text * 4), sink, compression="zstd")
    return out | {"a.parquet": sink.getvalue()}


def questions() -> Files:
    """Task files of questions in every shape."""
    rows: dict[str, list[Any]] = {
        "choices": [{"question": f"{i} + 1?", "choices": ["1", "2", "3"], "answer": 1} for i in range(6)],
        "match": [{"question": f"{i} + 1?", "answer": f"so #### {i + 1}"} for i in range(6)],
        "passage": [{"question": "is it", "passage": "It is.", "answer": True}] * 4,
        "format": [{"instruction": "Yes?\nAnswer format: yes/no", "output": "the correct answer is yes", "answer": "yes"}] * 4,
    }
    return {f"{name}.jsonl": _lines(value) for name, value in rows.items()}


def records() -> Iterator[tuple[str, bytes]]:
    """What runs and sweeps keep: (file name, bytes)."""
    report = {"compressor": "1", "keys": "k", "recipe": Recipe().to_dict(), "model": {"name": "tiny", "dense_bytes": 1}, "layers": [{"name": "a"}]}
    row = {"id": "a", "status": "ok", "attempts": 1, "folder_bytes": 1, "keys": {}, "tasks": {}, "seconds": {}, "peak_bytes": {}, "error": None}
    tiles = {"tiles": {"forward 16 3": [[None, 16, 64, 64, 4, 2]]}}
    yield "journal.json", json.dumps({"pack": {"fingerprint": "f", "value": {"a": 1}}}).encode()
    yield "report.json", json.dumps(report).encode()
    yield "rows.jsonl", _lines([row, row | {"id": "b"}])
    yield "tiles.json", json.dumps(tiles).encode()
    yield "export.json", json.dumps({"to": "apply", "tasks": [{"file": "a"}]}).encode()
    yield "kept.safetensors", save({"a": torch.zeros(4)}, metadata={"facts": "{}"})


TEMPLATES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('touch canary.ran') }}",
    "{{ self.__init__.__globals__ }}", "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}", "{{ 9 ** 9 ** 9 }}", "{{ raise_exception('no') }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{",
    "{{ range(10 ** 9) | list }}", "{{ '%1000000000d' % 1 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | tojson }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
)  # fmt: skip
