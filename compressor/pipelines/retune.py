"""`compressor tune`: a model that is packed already, by us or by others, tuned as it is and written back in its own format.

Codes stay, whoever chose them; scales, zeros, or what is put beside them learn. A GPTQ folder comes out as a GPTQ folder that the same software
loads. With `--tune table` every group of an affine weight gets a table of its own values (export/conversions.py), which no format but ours holds. The
model before tuning takes the place of the dense one as what the result is compared with. What a format rounds (MLX's biases, scales and dense tensors
that are wider than it stores them) is rounded before it is measured, and a model that leaves its format says so in a note. Limits: causal
language models; zeros that `qalora` tuned fit our sparse format, and HQQ's and MLX's.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

from compressor import linear
from compressor.errors import CompressorError, ModelError
from compressor.export import conversions, shards, table
from compressor.integrations.peft import FOLDER as ADAPTER
from compressor.packed import Affine, PackedWeight, zeros_as_floats
from compressor.pipelines import checkpoint, compress, estimate, formats, load, tools, write
from compressor.pipelines.blockwise import stage as blockwise
from compressor.pipelines.job import plain, source_name
from compressor.pipelines.journal import Journal
from compressor.pipelines.methods import check_zeros_stay
from compressor.pipelines.run import Run
from compressor.pipelines.tuners import TUNERS, check_layers
from compressor.recipe import Quant

ENTRIES = 16  # of a table that takes the place of a scale, at most
VALUES = ("weight_scale", "scales", "scale", "weight_table")  # what formats call their scales and tables


class Retune(Run):
    """One run that tunes a packed model."""

    def check_source(self) -> None:
        """ModelError for a model that is not packed, or in no format that is read, or has an adapter already."""
        if not self.config.get("quantization_config"):
            raise ModelError(f"{self.source} is not packed: `compressor run` packs and tunes a dense model")
        formats.of(self.config, self.source)
        if (self.source / ADAPTER).is_dir():
            raise ModelError(f"{self.source} has an adapter beside its packed weights: export it with --to compressed-tensors, and tune that")

    def read(self) -> load.Loaded:
        blockwise.wanted(self)  # which says so where it is asked for
        with self.stage("load"):
            loaded = load.load(self.recipe.model, self.recipe.device)
        write.round_to_folder(loaded, set())
        self.sparse = write.is_sparse(loaded)
        settle(loaded)
        if not linear.packed_linears(loaded.model):
            raise ModelError(f"{self.source} has no packed linears, of which values could be tuned")
        self.packed_bits = self._bits(loaded)
        if self.sparse:
            check_zeros_stay(self.recipe.tune.method)
        if self.recipe.tune.method == "table":
            to_tables(loaded)
        packed = load.packed_weights(loaded.model)
        self._check_kind(any(weight.learned.dim() == 3 for weight in packed.values()))
        check_layers(self.recipe.tune, {name: weight.shape for name, weight in packed.items()}, ())
        self._destine(packed)
        method = str(self.config["quantization_config"]["quant_method"])
        loaded.rows = [
            {
                "name": name, "shape": list(weight.shape), "bits": weight.bits, "group": weight.group, "packer": method,
                "symmetric": None if weight.learned.dim() == 3 else weight.zero is None, "note": "act-order" if weight.columns is not None else "",
            }
            for name, weight in packed.items()
        ]  # fmt: skip
        size = sum(n * k for n, k in (weight.shape for weight in packed.values()))
        self.report.layers = loaded.rows
        self.report.model = {
            "name": source_name(self.recipe.model).rpartition("/")[2], "source": source_name(self.recipe.model),
            "architecture": self.config["architectures"][0], "parameters": size + sum(p.numel() for p in loaded.model.parameters()),
            "packed_parameters": size, "dense_bytes": tools.dense_bytes(loaded), "dense_dtype": plain(loaded.dtype),
            "folder_dtype": plain(loaded.dtype), "scale_dtype": plain(next(iter(packed.values())).learned.dtype),
        }  # fmt: skip
        return loaded

    def _check_kind(self, tables: bool) -> None:
        """ModelError for a tuner of scales or zeros and a model of tables."""
        if tables and TUNERS[self.recipe.tune.method].table is False:
            raise ModelError(f"{self.source} holds tables, which {self.recipe.tune.method} cannot train: use --tune table")

    def _destine(self, packed: dict[str, PackedWeight]) -> None:
        """A note if the tuned model will not fit the format it came in; ModelError, before any work, if it will fit none."""
        if self.recipe.tune.method == "qalora":
            chosen = linear.targeted(packed, self.recipe.tune.targets)
            zeros = {name: zeros_as_floats(packed[name].learned, packed[name].zero, packed[name].bits) for name in chosen}
            packed = packed | {name: replace(packed[name], values=Affine(packed[name].learned, zero)) for name, zero in zeros.items()}
        was = formats.of(self.config, self.source)
        try:
            now = formats.home(self.config, packed) or formats.pick(packed, self.sparse)
        except CompressorError as error:
            raise ModelError(f"{self.source} cannot be written once it is tuned: {error}") from None
        if now is not was:
            self.report.notes.append(f"the folder came as {was.NAME} and is written as {now.NAME}, which holds what {self.recipe.tune.method} tunes")
            self.show.say(self.report.notes[-1])

    def dense(self, loaded: load.Loaded, journal: Journal) -> None:
        """Measures the model as it came, which is all that there is to compare with."""
        found = self.measured("packed", self.key_dense, loaded, journal)
        self.report.protocol = found["protocol"]
        self.report.protocol["domain"]["split"] = self.domain.rule
        self.record("packed", bits_per_weight=self.packed_bits, folder_bytes=checkpoint.model_bytes(self.source))

    def measured(self, name: str, key: str, loaded: load.Loaded, journal: Journal) -> dict[str, Any]:
        """As any run; what was tuned is first made what the folder will hold. An adapter leaves its base as it was."""
        if name == "tuned" and loaded.adapter is None:
            settle(loaded)
        return super().measured(name, key, loaded, journal)

    def _bits(self, loaded: load.Loaded) -> float:
        """Bits a weight of the folder as it came."""
        if self.sparse:
            return write.bits_per_weight(write.block_weights(loaded), sparse=True)
        return write.folder_bits(self.source, load.packed_weights(loaded.model))

    def absorber(self) -> Quant:
        """GPTQ: how the linears were packed is not known."""
        return Quant(packer="gptq")

    def cost(self, model: torch.nn.Module, counts: estimate.Counts, before: torch.nn.Module | None) -> dict[str, Any]:
        packed, values, stored = self._stored(model)
        check_layers(self.recipe.tune, {t.name: t.shape for t in packed}, ())
        size = checkpoint.model_bytes(self.source) + estimate.added(self.recipe.tune, packed).bytes
        found = estimate.retuning(self.recipe, model, packed, values, stored, counts, self.source)
        note = "" if self.recipe.tune.method not in ("table", "qalora") else "tables or tuned zeros take more than the values that they replace"
        return found | {"folder_bytes": size, "notes": [note] if note else []}

    def stored(self, model: torch.nn.Module, folder: torch.dtype) -> tuple[list[compress.Target], int, int]:
        packed, values, size = self._stored(model)
        tables = self.recipe.tune.method == "table" and self.config["quantization_config"].get("quant_method") != table.METHOD
        return packed, values * ENTRIES if tables else values, size

    def _stored(self, model: torch.nn.Module) -> tuple[list[compress.Target], int, int]:
        """(packed linears, their values, the bytes that they take) from the headers of the folder, whatever its format."""
        headers = shards.read_headers(self.source, checkpoint.weight_files(self.source))
        parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, tensor in headers.items():
            module, _, leaf = key.rpartition(".")
            parts[module][leaf] = tensor
        found, values, stored = [], 0, 0
        for name, layer in linear.linears(model).items():
            held = next((parts[name][leaf] for leaf in VALUES if leaf in parts[name]), None)
            if held is not None:
                self._check_kind(held.dim() == 3)
                count = held.numel() // (layer.out_features * (held.shape[2] if held.dim() == 3 else 1))
                found.append(compress.Target(name, (layer.out_features, layer.in_features), layer.in_features // max(count, 1)))
                values, stored = values + held.numel(), stored + sum(t.numel() * t.element_size() for t in parts[name].values())
        if not found:
            raise ModelError(f"{self.source} has no packed linears, of which values could be tuned")
        return found, values, stored


def settle(loaded: load.Loaded) -> None:
    """Every weight as the format of somebody else's that it came in will hold it, in place; nothing where that has no place for it."""
    packed = load.packed_weights(loaded.model)
    form = formats.home(loaded.config, packed)
    if form is not None:
        replace_all(loaded, {name: formats.nearest(form, weight) for name, weight in packed.items()})


def to_tables(loaded: load.Loaded) -> None:
    """Every affine layer with a table for each of its groups, in place. ModelError for act-order and 8 bits."""
    found = {}
    for name, weight in load.packed_weights(loaded.model).items():
        try:
            found[name] = conversions.as_tables(weight)
        except ModelError as error:
            raise ModelError(f"{loaded.name}: {name} cannot get tables: {error}") from None
    replace_all(loaded, found)


def replace_all(loaded: load.Loaded, packed: dict[str, PackedWeight]) -> None:
    """Other weights for the packed linears of these names, in place."""
    for name, layer in linear.packed_linears(loaded.model).items():
        linear.swap(loaded.model, name, linear.PackedLinear(packed[name], layer.bias).train(layer.training))
