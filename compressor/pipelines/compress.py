"""Packing a model block by block: each decoder block is visited once, calibrated on what its packed predecessors put out.

For packers that need statistics the calibration windows run through the blocks one at a time. Inside a block the linears that read the same
input (q/k/v, gate/up) share one set of statistics; which ones do is seen by running the block once, not known by name. Groups are packed in
the order they run, each on inputs that the already packed ones produced (GPTQ's "true sequential"). A finished block is written to the work
folder before the next one starts; on resume the finished blocks are read back and replayed, with the same result bit for bit.
Packers that need no data never run the model at all.
"""

import contextlib
import inspect
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linear
from compressor.errors import ModelError, NumericError, RecipeError
from compressor.packed import PackedWeight
from compressor.packing import relative_error
from compressor.pipelines import journal
from compressor.pipelines.fisher import squared_gradients
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Quant
from compressor.stats import LayerStats

BATCH_TOKENS = 8192  # tokens of calibration that run through a block at once


@dataclass
class Target:
    """A linear that will be packed, or the reason why it stays dense."""

    name: str  # dotted name in the model
    shape: tuple[int, ...]  # n, k; of fused experts three numbers
    group: int = 0
    note: str = ""
    reason: str = ""  # non-empty: left dense


@dataclass
class Plan:
    blocks_name: str
    targets: list[list[Target]] = field(default_factory=list)  # by block

    def packed(self) -> list[Target]:
        return [t for block in self.targets for t in block if not t.reason]


def plan(model: nn.Module, quant: Quant) -> Plan:
    """What will be packed and how; raises before any work where a group size cannot be. Works on a model without weights (meta device)."""
    name, blocks = linear.find_blocks(model)
    out = Plan(name)
    for index, block in enumerate(blocks):
        row = []
        for leaf, layer in linear.linears(block).items():
            full = f"{name}.{index}.{leaf}"
            target = Target(full, (layer.out_features, layer.in_features))
            if any(re.search(pattern, full) for pattern in quant.ignore):
                target.reason = "named by --ignore"
            else:
                target.group, target.note = PACKERS[quant.packer].resolve(layer.in_features, quant, full)
            row.append(target)
        out.targets.append(row)
        for leaf, parameter in block.named_parameters():
            if parameter.ndim == 3:
                row.append(Target(f"{name}.{index}.{leaf}", tuple(parameter.shape), reason="fused experts are not packed yet"))
    if not out.packed():
        raise ModelError("nothing is left to pack: every linear layer is named by --ignore")
    return out


def check_finite(model: nn.Module) -> None:
    """Raise before any work if a parameter holds NaN or infinity, naming it."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{name} holds NaN or infinite weights; the checkpoint is damaged, fetch it again")


class _Stop(Exception):
    """Raised in a hook: the rest of this forward pass is of no use."""


class Calibration:
    """Calibration windows on their way through the blocks: hidden states in main memory, block arguments seen once a batch size."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, ids: Tensor):
        count, seqlen = ids.shape
        size = max(1, min(count, BATCH_TOKENS // seqlen))
        device = next(model.parameters()).device
        self.batches = [part.to(device) for part in ids.split(size)]  # equal ones, and perhaps a smaller last one
        self.hidden: list[Tensor] = []
        self.arguments: list[dict[int, dict[str, Any]]] = [{} for _ in blocks]  # by the size of the batch: masks have its shape
        self._record(model, blocks)

    @torch.no_grad()
    def _record(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        """The first batch of each size records every block's keyword arguments and stops at the last block; the others stop at the first."""
        size = 0

        def first(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.hidden.append((args[0] if args else kwargs["hidden_states"]).detach().cpu())
            if size in self.arguments[0]:
                raise _Stop

        def keep(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                names = list(inspect.signature(blocks[index].forward).parameters)[1 : len(args)]  # of what encoders pass by position
                if any(value is not None and not isinstance(value, Tensor) for value in args[1:]):
                    kind = type(blocks[index]).__name__
                    raise ModelError(f"{kind} takes positional arguments; this architecture cannot be calibrated, use --quant 3bit:rtn")
                given = kwargs | dict(zip(names, args[1:], strict=True))
                kept = {k: v for k, v in given.items() if k not in ("hidden_states", "past_key_values", "past_key_value")}
                self.arguments[index][size] = kept
                if index + 1 == len(blocks):
                    raise _Stop  # logits of thousands of tokens take gigabytes

            return hook

        hooks = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]  # before the one that may stop
        hooks += [block.register_forward_pre_hook(keep(i), with_kwargs=True) for i, block in enumerate(blocks)]
        try:
            for batch in self.batches:
                size = len(batch)
                with contextlib.suppress(_Stop):
                    model(input_ids=batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, keep: bool, batches: int | None = None) -> None:
        """All hidden states (or the first few batches) through one block; `keep` makes the outputs the next block's inputs.

        A hook inside the block may raise _Stop to end the pass of its batch.
        """
        device = next(block.parameters()).device
        for i, hidden in enumerate(self.hidden[:batches]):
            with contextlib.suppress(_Stop):
                out = block(hidden.to(device), **self.arguments[index][len(hidden)])
                if keep:
                    self.hidden[i] = (out[0] if isinstance(out, tuple) else out).cpu()


def shared_inputs(block: nn.Module, names: list[str], run: Callable[[], None]) -> list[list[str]]:
    """The block's linears in the order they run, those that read the same tensor together; layers that did not run come last, alone."""
    order: list[list[str]] = []
    seen: list[Tensor] = []  # kept alive, so that identity cannot be reused
    last: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_m: nn.Module, args: tuple[Any, ...]) -> None:
            if name in last:
                return
            place = next((i for i, t in enumerate(seen) if t is args[0]), None)
            if place is None:
                place = len(seen)
                seen.append(args[0])
                order.append([])
            order[place].append(name)
            last[name] = place

        return record

    hooks = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        run()
    finally:
        for h in hooks:
            h.remove()
    return order + [[name] for name in names if name not in last]


def check_keep_zeros(quant: Quant) -> None:
    """RecipeError if the packer cannot keep a pruned weight at exactly zero."""
    if PACKERS[quant.packer].table:
        instead = f"--quant {quant.bits}bit:gptq or {quant.bits}bit:rtn"
        raise RecipeError(f"{quant.packer} makes tables, which have no exact zero, and would bring pruned weights back; use {instead}")


def compress(
    model: nn.Module,
    quant: Quant,
    scale_dtype: torch.dtype,
    ids: Tensor | None,
    work: Path | None = None,
    on_layer: Callable[[dict[str, Any]], None] | None = None,
    keep_zeros: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Pack the model's decoder linears in place.

    ids: calibration windows int64 [count, seqlen], needed by packers with statistics. `work`: folder for finished blocks; blocks found there
    are taken as they are (the caller guards it by a fingerprint). `keep_zeros`: weights that are exactly zero were pruned, and their codes stay the
    zero's; RecipeError if the packer makes tables. Returns report rows of packed layers, rows of linears left dense, and the
    number of blocks that were taken from `work`.
    """
    if keep_zeros:
        check_keep_zeros(quant)
    todo = plan(model, quant)
    blocks = model.get_submodule(todo.blocks_name)
    assert isinstance(blocks, nn.ModuleList)
    packer = PACKERS[quant.packer]
    fisher: dict[str, Tensor] = {}
    if packer.fisher and ids is not None:
        open_rows = [row for i, row in enumerate(todo.targets) if work is None or journal.kept_facts(_block_path(work, i)) is None]
        missing = [t.name for row in open_rows for t in row if not t.reason]
        fisher = squared_gradients(model, missing, ids) if missing else {}
    calibration = Calibration(model, blocks, ids) if packer.needs and ids is not None else None
    rows: list[dict[str, Any]] = []
    resumed = 0
    for index, block in enumerate(blocks):
        targets = [t for t in todo.targets[index] if not t.reason]
        stored = None if work is None else journal.kept(_block_path(work, index))
        if stored is not None:
            _apply_block(block, f"{todo.blocks_name}.{index}.", *stored)
            block_rows = stored[1]
            resumed += 1
        else:
            prefix = f"{todo.blocks_name}.{index}."
            block_rows = _pack_block(block, index, targets, quant, scale_dtype, calibration, prefix, fisher, keep_zeros)
            if work is not None:
                journal.keep(_block_path(work, index), _packed_tensors(block), block_rows)
        if calibration is not None and index + 1 < len(blocks):
            calibration.run(block, index, keep=True)
        for row in block_rows:
            rows.append(row)
            if on_layer is not None:
                on_layer(row)
    unpacked = [{"name": t.name, "shape": list(t.shape), "reason": t.reason} for block in todo.targets for t in block if t.reason]
    return rows, unpacked + _outside_blocks(model, todo.blocks_name), resumed


def _outside_blocks(model: nn.Module, blocks_name: str) -> list[dict[str, Any]]:
    names = [(n, m) for n, m in linear.linears(model).items() if not n.startswith(blocks_name + ".")]
    return [{"name": n, "shape": list(m.weight.shape), "reason": "outside the decoder blocks"} for n, m in names]


def _pack_block(
    block: nn.Module, index: int, targets: list[Target], quant: Quant, scale_dtype: torch.dtype, calibration: Calibration | None, prefix: str,
    fisher: dict[str, Tensor], keep_zeros: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    by_leaf = {t.name.removeprefix(prefix): t for t in targets}
    groups = [[leaf] for leaf in by_leaf]
    if calibration is not None:
        groups = shared_inputs(block, list(by_leaf), lambda: calibration.run(block, index, keep=False, batches=1))
    rows = []
    for leaves in groups:
        start = time.perf_counter()
        stats = None if calibration is None else _collect(block, index, leaves, quant, calibration, by_leaf)
        spent = (time.perf_counter() - start) / len(leaves)
        for leaf in leaves:
            if stats is not None:
                stats.fisher = fisher.pop(by_leaf[leaf].name, None)
                stats.keep = block.get_parameter(f"{leaf}.weight").detach() != 0 if keep_zeros else None
            rows.append(_pack_layer(block, leaf, by_leaf[leaf], quant, scale_dtype, stats, spent))
    return rows


def _collect(block: nn.Module, index: int, leaves: list[str], quant: Quant, calibration: Calibration, by_leaf: dict[str, Target]) -> LayerStats:
    """Statistics of the input that `leaves` share, over all calibration windows; a layer is taken to run once in a pass through its block."""
    layer = block.get_submodule(leaves[0])
    stats = LayerStats(by_leaf[leaves[0]].shape[1], PACKERS[quant.packer].needs)

    def add(_m: nn.Module, args: tuple[Any, ...]) -> None:
        stats.add(args[0])
        raise _Stop  # what comes after this layer is not needed

    hook = layer.register_forward_pre_hook(add)
    try:
        calibration.run(block, index, keep=False)
    finally:
        hook.remove()
    stats.check(by_leaf[leaves[0]].name)
    return stats


def _pack_layer(
    block: nn.Module, leaf: str, target: Target, quant: Quant, scale_dtype: torch.dtype, stats: LayerStats | None, spent: float
) -> dict[str, Any]:
    start = time.perf_counter()
    layer = block.get_submodule(leaf)
    assert isinstance(layer, nn.Linear)
    weight, packer = layer.weight.detach().float(), PACKERS[quant.packer]  # [n, k]
    try:
        packed, facts = packer(weight, stats, quant, target.group, scale_dtype)
    except NumericError as error:
        raise NumericError(f"{target.name}: {error}") from None
    linear.swap(block, leaf, linear.to_packed(layer, packed))
    notes = "; ".join(n for n in (target.note, facts.get("note", "")) if n)
    return {
        "name": target.name, "shape": list(target.shape), "bits": quant.bits, "group": target.group,
        "symmetric": None if packer.table else packed.zero is None,
        "packer": facts.get("packer", quant.packer), "error": relative_error(weight, packed, stats), "damp": facts.get("damp"),
        "seconds": round(spent + time.perf_counter() - start, 4), "note": notes,
    }  # fmt: skip


def _block_path(work: Path, index: int) -> Path:
    return work / f"block-{index:05d}.safetensors"


def _packed_tensors(block: nn.Module) -> dict[str, Tensor]:
    return {f"{leaf}.{key}": t for leaf, layer in linear.packed_linears(block).items() for key, t in layer.packed().tensors().items()}


def _apply_block(block: nn.Module, prefix: str, tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
    for row in rows:
        leaf = row["name"].removeprefix(prefix)
        layer = block.get_submodule(leaf)
        assert isinstance(layer, nn.Linear)
        parts = {key: tensors[f"{leaf}.{key}"] for key in ("words", "scale", "zero", "table") if f"{leaf}.{key}" in tensors}
        weight = PackedWeight.from_tensors(parts, row["bits"], row["group"], (row["shape"][0], row["shape"][1]))
        linear.swap(block, leaf, linear.to_packed(layer, weight))
