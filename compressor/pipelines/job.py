"""What every run shares: the output folder and the work folder beside it, stages with their times, a report that a stopped run leaves behind.

Also the stages that are the same for any model: packing, training from checkpoints, writing the folder.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from compressor import disk, world
from compressor.errors import OutputError
from compressor.integrations.peft import named
from compressor.pipelines import card, card_serving, checkpoint, compress, coverage, load, render, write
from compressor.pipelines.blockwise import writing
from compressor.pipelines.blockwise.blocks import Blocks
from compressor.pipelines.journal import WRITTEN, Journal, clear, remove
from compressor.pipelines.output import check_output, finished, place_of, publish
from compressor.pipelines.packers import PACKERS
from compressor.pipelines.report import Report, environment
from compressor.pipelines.show import Show
from compressor.pipelines.stages import Stage
from compressor.pipelines.tuners import optimizer
from compressor.recipe import KEPT, Quant, Recipe
from compressor.stopping import held
from compressor.tune.loop import OnStep


class Job:
    """One run of one recipe into one folder. `sparse`: whether single weights are pruned, whose zeros the packer and the folder keep."""

    sparse = False
    packed_bits, zero_bits = 0.0, 0  # as packed, before tuning: of a weight, and of all zeros
    origin = ""  # sha256 of the model that the run starts from

    def __init__(self, recipe: Recipe, output: Path, show: Show, command: str | None = None):
        self.recipe, self.output, self.show = recipe, output, show
        self.place, self.overwrite = place_of(output), False
        self.work = self.place.with_name(self.place.name + ".partial")
        self.device = load.pick_device(recipe.device)
        self.prunes, self.packs, self.tunes = recipe.prune.method != "none", recipe.quant.packer not in ("none", KEPT), recipe.tune.method != "none"
        if self.tunes:
            optimizer(recipe.tune, self.device)
        self.starts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # of adapters, found while packing
        self.report = Report(recipe=recipe.to_dict(), environment=environment(str(self.device)), command=command)

    def done(self, key: str, overwrite: bool) -> dict[str, Any] | None:
        """The contract document of an output folder that this very recipe has written, or None: it is to be written. OutputError if it cannot be."""
        found = None if overwrite else finished(self.place, key)
        self.overwrite = overwrite
        if found is not None:
            clear(self.work, key)
            self.show.say(f"{self.output} already holds the result of this recipe; nothing to do (--overwrite runs it again)")
            return found | {"output": str(self.output)}
        check_output(self.place, overwrite)
        return None

    @contextlib.contextmanager
    def safe_report(self) -> Iterator[None]:
        """A stopped run leaves its report, if anything was finished; a full disk becomes one sentence."""
        try:
            yield
        except BaseException as error:
            with held():
                self._leave()
            if disk.full(error):
                what = f"the disk is full: {self.work} could not be written"
                raise OutputError(f"{what}; free some space and run the same command again, finished work is kept") from None
            raise

    def _leave(self) -> None:
        """The report of a stopped run, or no folder at all if no stage was finished."""
        if not world.lead():
            return
        with contextlib.suppress(OSError, OutputError):
            if (self.work / "journal.json").exists() or any(self.work.glob("*/*.safetensors")):
                self.report.save(self.work / "report.json")
            else:
                remove(self.work)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with Stage(name, self.report.seconds, self.report.peak_bytes, str(self.device)):
            yield

    def pack(self, loaded: load.Loaded, ids: torch.Tensor | None, key: str, journal: Journal, chosen: Quant | None = None) -> None:
        """Pack the model's linears in place, as the recipe says or as was chosen; ids: windows to calibrate on, for packers that need them."""
        quant = chosen or self.recipe.quant
        targets = compress.plan(loaded.model, quant).packed()
        write.round_to_folder(loaded, {t.name for t in targets})
        folder = journal.subfolder("blocks", key)
        with self.stage("compress"), self.show.task("compress", len(targets)) as advance:
            dtype = load.scale_dtype(quant.scale_dtype, loaded.dtype)
            loaded.rows, loaded.unpacked, taken = compress.compress(
                loaded.model, quant, dtype, ids, folder, lambda row: advance(1, f"{row['name']} error {row['error']:.4f}"), self.sparse,
                self.recipe.tune.start, self.recipe.tune.rank, self.starts, named(self.recipe.tune.targets),
                self.recipe.seed,
            )  # fmt: skip
        journal.resumed |= taken > 0
        self.report.layers, self.report.unpacked, self.report.experts = loaded.rows, loaded.unpacked, coverage.coverage(loaded.rows)
        told = coverage.sentence(self.report.experts)
        if told and told not in self.report.notes:
            self.report.notes.append(told)
            self.show.say(told)
        packed = load.packed_weights(loaded.model)
        self.packed_bits = write.bits_per_weight(write.block_weights(loaded) if self.sparse else packed, self.sparse)
        self.zero_bits = sum(weight.zero_bits() for weight in packed.values())

    @contextlib.contextmanager
    def training(self, name: str, key: str, total: int, journal: Journal) -> Iterator[tuple[Path, OnStep]]:
        """A stage of `total` steps: the folder for its checkpoints, and what to call after each step."""
        with self.stage(name), self.show.task(name, total) as advance:
            yield journal.subfolder(name, key), follow(advance)

    def record(self, name: str, **values: Any) -> None:
        """Add to what the report says of the dense, pruned, packed or tuned model."""
        entry = (getattr(self.report, name) or {}) | values
        if "folder_bytes" in entry:
            entry["ratio"] = self.report.model["dense_bytes"] / entry["folder_bytes"]
        setattr(self.report, name, entry)

    def started(self) -> tuple[Any, ...]:
        """What the packed weights depend on where paths start beside them; part of a key, empty for paths that start at zero."""
        tune = self.recipe.tune
        return () if tune.start == "zero" else (tune.start, tune.rank, tune.targets)

    def write_out(self, loaded: load.Loaded, key: str, journal: Journal) -> None:
        """The output folder, still in the work folder: weights, report, page, card and recipe."""
        folder = self.work / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        with self.stage("export"):
            beside = write.write_adapter(loaded, folder, self.place.name)
            blocks = Blocks.of(loaded.model)
            facts = write.write_folder(loaded, folder, self.sparse) if blocks is None else writing.write_folder(loaded, blocks, folder)
            self.report.export = facts | ({"adapter_bytes": beside} if beside else {})
        size, bits = checkpoint.model_bytes(folder), self.report.export["bits_per_weight"]
        for name in ("packed", "tuned") if self.packs else ("pruned", "tuned"):
            if getattr(self.report, name):
                self.record(name, bits_per_weight=bits, folder_bytes=size + (beside if name == "tuned" else 0))
        more = sum(weight.zero_bits() for weight in load.packed_weights(loaded.model).values()) - self.zero_bits
        if self.packs and more:  # tuning made the zeros floats, which packing alone would not have stored
            self.record("packed", bits_per_weight=self.packed_bits, folder_bytes=size - more // 8)
        if self.report.choice:
            self.report.choice["reached"] |= {"bits_per_weight": bits, "folder_bytes": size + beside}
            self._compare_with_target(bits, size + beside)
        self.report.resumed, self.report.keys = journal.resumed, key
        self.report.save(folder / "report.json")
        render.write_html(self.report, folder / "report.html")
        card.write_card(self.report, folder / "README.md", card_serving.section(folder))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe.to_dict(), sort_keys=False), "utf-8")

    def publish(self, key: str, journal: Journal) -> str:
        """Give the written folder digests and its name, and take the work folder away; returns the root digest."""
        journal.put(WRITTEN, key, True)
        source = {"name": source_name(self.recipe.model), "sha256": self.origin}
        with held():
            root = publish(self.work / "folder", self.place, self.work, source, self.overwrite)
            remove(self.work)
        return root

    def _compare_with_target(self, bits: float, size: int) -> None:
        """A note where the folder is larger than was asked for, which tuned zeros can make it."""
        choose = self.recipe.choose
        if bits > (choose.target_bits or bits) or size > (choose.target_size or size):
            asked = f"{choose.target_bits:g} bits a weight" if choose.target_bits else f"{choose.target_size:,} bytes"
            self.report.notes.append(f"asked for were {asked}; what tuning added makes it {bits:.3f} bits a weight, {size:,} bytes")
            self.show.say(self.report.notes[-1])


def digest(*parts: Any) -> str:
    """Hex fingerprint of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def default_output(recipe: Recipe) -> Path:
    """model-w3g128-gptq-peqa in the current folder."""
    name, quant, prune = source_name(recipe.model).rpartition("/")[2].lower(), recipe.quant, recipe.prune
    if prune.method != "none":
        name += f"-{prune.method}{100 * prune.ratio:.3g}" + (f"-{prune.pattern.replace(':', 'of')}" if prune.pattern else "")
    if quant.packer in ("none", KEPT):
        return Path(name if recipe.tune.method == "none" else f"{name}-{recipe.tune.method}")
    table, choose = quant.packer in PACKERS and PACKERS[quant.packer].table, recipe.choose
    name += ("-mixed" if quant.layers else "") + ("" if quant.rotate == "none" else f"-{quant.rotate}")
    name += "-mix" if choose.equal else ""
    if choose.active and not choose.equal:
        bits, loss = f"{choose.target_bits:.4g}bit" if choose.target_bits else f"{choose.target_size}", f"loss{100 * (choose.max_loss or 0):g}"
        tune = "" if recipe.tune.method == "none" else f"-{recipe.tune.method}"
        return Path(f"{name}-{loss if choose.max_loss else bits}-{quant.packer}{tune}" + ("-task" if recipe.save == "task" else ""))
    group = f"gpr{quant.gpr or 1}" if table or quant.gpr else "channel" if quant.group == -1 else f"g{quant.group}"
    tune = "" if recipe.tune.method == "none" else f"-{recipe.tune.method}"
    return Path(f"{name}-w{quant.bits}{group}-{quant.packer}{tune}" + ("-task" if recipe.save == "task" else ""))


def source_name(model: str) -> str:
    """The hub id behind a name, or the last part of a local folder (no paths of this machine in a folder that others will read)."""
    return Path(model).resolve().name if Path(model).is_dir() else checkpoint.ALIASES.get(model.lower(), model)


def follow(advance: Callable[[int, str], None]) -> OnStep:
    """What a training loop calls after each step, to move a progress bar that says the loss."""
    done = 0

    def on_step(row: dict[str, Any]) -> None:
        nonlocal done
        advance(row["step"] - done, row.get("note") or f"loss {row['loss']:.4f}")
        done = row["step"]

    return on_step


def plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
