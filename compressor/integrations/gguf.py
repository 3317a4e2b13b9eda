"""A whole .gguf file, which llama.cpp runs: tensors, metadata, tokenizer and chat template by the gguf package's own names and constants.

Packed linears become blocks of the type asked for; rows whose length no block divides fall back to a smaller block, then to float16. `auto` takes, of
each layer for itself, the smallest type that holds it exactly; where none does, the smallest whose relative error is at most NEAR / 2**bits, and
where none is as near, the nearest. To a uniform quantiser, which leaves 1.7 / 2**bits of a normal weight (measured at groups of 128), that adds at
most a quarter, and so 3 percent to the whole error where the two are independent. 3 bits in groups of 16 become Q3_K by that (error 0.012), 2 bits
in order of activations Q3_K (0.09), 3 bits so Q5_0 (0.03) and 4 bits Q8_0 (0.005).

Everything else of two dimensions is float16, or `embeddings`; norms and biases are float32. Rows of q and k are laid as llama.cpp rotates them.

Price: the tensors pass through a nameless file beside the output, since their types, which stand before them, follow from their values; a weight is
fitted once where `held` is asked, and once when it is written. Limits: the families of gguf_families.py and the tokenizers of gguf_vocab.py. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import MissingExtra, ModelError
from compressor.export import gguf_blocks
from compressor.export.gguf_blocks import BLOCKS, FLOATS
from compressor.packed import PackedWeight

try:
    import gguf

    from compressor.integrations import gguf_families as families
    from compressor.integrations import gguf_vocab
except ImportError:
    raise MissingExtra("GGUF files are written with the gguf package, which is not installed: pip install 'compressor[gguf]'") from None

NAME = "GGUF"
KINDS = ("auto", *FLOATS, *BLOCKS)
NEAR = 0.4  # of 2**-bits
LAYERS = 512  # more of them llama.cpp does not load
SHORT = tuple(name for name in BLOCKS if gguf_blocks.columns(name) == 32)
FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q5_0": "MOSTLY_Q5_0", "q4_0": "MOSTLY_Q4_0",
    "q4_1": "MOSTLY_Q4_1", "q4_k": "MOSTLY_Q4_K_S", "q3_k": "MOSTLY_Q3_K_S", "q2_k": "MOSTLY_Q2_K",
}  # fmt: skip


def fits(config: Mapping[str, Any], packed: Mapping[str, PackedWeight], kind: str) -> str | None:
    """Why this model cannot become a GGUF file of this kind, or None; what it loses is for `held` to say."""
    if kind not in KINDS:
        return f"{kind!r} is no type that compressor writes; choose one of {', '.join(KINDS)}"
    damaged = next((name for name, weight in packed.items() if not gguf_blocks.finite(weight)), None)
    if damaged is not None:
        return f"{damaged} holds NaN or infinite values: compress the model again"
    try:
        return families.why_not(families.settings(config))
    except ModelError as error:
        return str(error)


def held(weight: PackedWeight, kind: str) -> tuple[PackedWeight | Tensor, str, str]:
    """What the file will hold of one weight, the type it gets, and a note where that is not the one asked for.

    The same object where it is exact, else float32 [n, k] as readers see it, on the weight's device. ModelError as of `encode` in gguf_blocks.
    """
    found = _fitted(weight, kind)
    if not found.error:
        return weight, found.name, found.note
    return gguf_blocks.decode(found.data, found.name, weight.shape).to(weight.words.device), found.name, found.note


def choose(weight: PackedWeight, kind: str) -> tuple[str, str]:
    """The type of one packed weight, and a note where it is not the one asked for, or where `auto` found none that is exact."""
    found = _fitted(weight, kind)
    return found.name, found.note


@dataclass(frozen=True)
class _Fitted:
    """A packed weight as it goes into the file: uint8 [n, bytes], its type, its relative error, and the note for the report."""

    data: Tensor
    name: str
    error: float
    note: str


def _fitted(weight: PackedWeight, kind: str) -> _Fitted:
    k = weight.shape[1]
    if kind != "auto" and k % gguf_blocks.columns(kind) == 0:
        data, error = gguf_blocks.fitted(weight, kind)
        return _Fitted(data, kind, error, "")
    names = [name for name in (BLOCKS if kind == "auto" else SHORT) if k % gguf_blocks.columns(name) == 0]
    if not names:
        data, error = gguf_blocks.fitted(weight, "f16")
        return _Fitted(data, "f16", error, f"rows of {k} are no multiple of 32")
    why = "" if kind == "auto" else f"rows of {k} are no multiple of {gguf_blocks.columns(kind)}"
    for name in names:
        if (whole := gguf_blocks.fitted_exactly(weight, name)) is not None:
            return _Fitted(whole, name, 0.0, why)
    found = _near(weight, names)
    told = f"not exact, relative error {found.error:.2g}" if found.error else ""
    return replace(found, note="; ".join(part for part in (why, told) if part))


def _near(weight: PackedWeight, names: list[str]) -> _Fitted:
    """The first, which is the smallest, of the types within the bound, else the nearest; those with fewer bits than the weight never are."""
    best = None
    for name in names:
        if gguf_blocks.kind_of(name).top.bit_length() < weight.bits:
            continue
        data, error = gguf_blocks.fitted(weight, name)
        if best is None or error < best.error:
            best = _Fitted(data, name, error, "")
        if error <= NEAR / 2**weight.bits:
            break
    assert best is not None  # q8_0 goes wherever any type goes
    return best


def write(
    path: Path,
    config: Mapping[str, Any],
    weights: Iterable[tuple[str, Tensor | PackedWeight]],
    tokenizer_folder: Path,
    kind: str = "auto",
    embeddings: str | None = None,
    name: str | None = None,
) -> list[dict[str, str]]:
    """Write the file, under a temporary name until it is whole; returns one row per tensor, and one of the tokenizer: name, type, note.

    weights: as of the model, dotted tensor names with tensors and dotted module names with packed weights, consumed as a stream. embeddings: the type
    of dense matrices, f16 unless `kind` is a float type or this says otherwise. ModelError for what cannot be written.
    """
    config = families.settings(config)
    family = families.family_of(config)
    if kind not in KINDS:
        raise ModelError(f"{kind!r} is no type of GGUF that compressor writes; choose one of {', '.join(KINDS)}")
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, family.arch, use_temp_file=True)
    with tempfile.SpooledTemporaryFile(1, dir=str(path.parent)) as spool:  # the writer's own would lie in the system's folder, often in memory
        writer.temp_file = spool
        try:
            note = families.add_metadata(writer, config, family, name or path.stem)
            called, told = gguf_vocab.add(writer, tokenizer_folder, config["vocab_size"])
            rows = [{"name": "tokenizer", "type": called, "note": "; ".join(part for part in (told, note) if part)}]
            if (factors := families.rope_factors(config)) is not None:
                writer.add_tensor("rope_freqs.weight", factors.numpy())
            rows += _add_tensors(writer, config, weights, kind, embeddings or (kind if kind in FLOATS else "f16"))
            most = Counter(row["type"] for row in rows[1:] if row["type"] != "f32").most_common(1) or [("f32", 0)]
            writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind if kind != "auto" else most[0][0]]])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            os.replace(temporary, path)
        finally:
            writer.close()
            temporary.unlink(missing_ok=True)
    return rows


def _add_tensors(
    writer: gguf.GGUFWriter, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor | PackedWeight]], kind: str, embeddings: str
) -> list[dict[str, str]]:
    family = families.family_of(config)
    names, rows = families.names_of(family, config), []
    for name, value in weights:
        full = f"{name}.weight" if isinstance(value, PackedWeight) else name
        if full.endswith("rotary_emb.inv_freq") or (full == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        if full not in names:
            raise ModelError(f"this model cannot become a GGUF file: llama.cpp knows no {full} in models of the family {family.arch}")
        if full == "model.embed_tokens.weight" and value.shape[0] != config["vocab_size"]:
            raise ModelError(f"config.json speaks of {config['vocab_size']} tokens, and the embedding has {value.shape[0]} rows")
        if isinstance(value, Tensor) and value.dim() == 1:
            value = value.detach().float().cpu() + (family.shift if full.endswith("norm.weight") else 0.0)
        try:
            data, chosen, note = _stored(value, kind, embeddings)
        except ModelError as error:
            raise ModelError(f"{full} cannot be written: {error}") from None
        if heads := families.heads_turned(family, config, full):
            data = families.turn(data, heads)
        raw = data.contiguous().numpy() if len(value.shape) == 2 else data.flatten().numpy()
        writer.add_tensor(names[full], raw, raw_dtype=gguf.GGMLQuantizationType[chosen.upper()])
        rows.append({"name": full, "type": chosen, "note": note})
    return rows


def _stored(value: Tensor | PackedWeight, kind: str, embeddings: str) -> tuple[Tensor, str, str]:
    """uint8, a row of bytes per row of a weight, or per number of a vector; its type, and a note."""
    if isinstance(value, PackedWeight):
        found = _fitted(value, kind)
        return found.data, found.name, found.note
    if value.dim() == 1:
        return gguf_blocks.encode(value.unsqueeze(1), "f32"), "f32", ""
    chosen, note = _float_type(value, embeddings)
    return gguf_blocks.encode(value, chosen), chosen, note


def _float_type(value: Tensor, asked: str) -> tuple[str, str]:
    """The type of a dense matrix [n, k]: the one asked for, unless its rows or values forbid that; and a note where it changes them."""
    value, k = value.detach(), value.shape[1]
    short = k % gguf_blocks.columns(asked) != 0
    note = f"rows of {k} are no multiple of {gguf_blocks.columns(asked)}" if short else ""
    chosen = "f16" if short else asked
    if chosen not in ("f32", "bf16") and float(value.abs().max()) > torch.finfo(torch.float16).max:
        return "f32", "beyond the range of float16"
    if chosen in FLOATS and not torch.equal(value.to(FLOATS[chosen]).to(value.dtype), value):
        note = f"{note}; rounded" if note else "rounded"
    return chosen, note


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file of ours as readers see it, float32, under its name in a transformers model; errors as of `tensors`."""
    return dict(tensors(path))


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The same one by one, so that only one is dense at a time; ModelError for a damaged file, or one of a family that we do not write."""
    try:
        reader = gguf.GGUFReader(path)
        found = {key: field.contents() for key, field in reader.fields.items() if key.partition(".")[0] not in ("tokenizer", "GGUF")}
    except (ValueError, IndexError, KeyError, AttributeError, OSError) as error:
        raise ModelError(f"{path} is no GGUF file that can be read: {error}") from None
    arch = found.get("general.architecture")
    family = next((each for each in families.FAMILIES.values() if each.arch == arch), None)
    if family is None:
        raise ModelError(f"{path} holds a model of the family {arch!r}, which compressor does not know")
    keys = {"num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv"}
    keys["head_dim"] = "attention.key_length"
    config: dict[str, Any] = {key: found.get(f"{arch}.{name}") for key, name in keys.items()}
    if not all(type(number) is int and number > 0 for number in config.values()):
        raise ModelError(f"{path} is damaged: it does not say how many layers and heads the model has")
    if config["num_hidden_layers"] > LAYERS or config["num_attention_heads"] % config["num_key_value_heads"]:
        raise ModelError(f"{path} is damaged: it speaks of {config['num_hidden_layers']} layers, and of heads in groups that do not come out even")
    names = {there: here for here, there in families.names_of(family, config).items()}
    for tensor in reader.tensors:
        if (name := names.get(tensor.name)) is not None:
            heads = families.heads_turned(family, config, name)
            if heads and tensor.shape[-1] != heads * config["head_dim"]:
                raise ModelError(f"{path} is damaged: {name} has {tensor.shape[-1]} rows, and there are {heads} heads of {config['head_dim']}")
            yield name, _decoded(tensor, family, heads, name)


def _decoded(tensor: Any, family: "families.Family", heads: int, name: str) -> Tensor:
    kind = tensor.tensor_type.name.lower()
    shape = tuple(int(size) for size in reversed(tensor.shape))
    n, k = shape if len(shape) == 2 else (1, shape[0])
    data = torch.from_numpy(tensor.data.copy()).view(torch.uint8).view(n, -1)
    value = gguf_blocks.decode(data, kind, (n, k)).view(shape)
    value = families.turn_back(value, heads) if heads else value
    return value - family.shift if name.endswith("norm.weight") else value
