"""Packing a model block by block: each decoder block is visited once, calibrated on what its packed predecessors put out.

For packers that need statistics the calibration windows run through the blocks one at a time. Inside a block the linears that read the same
input (q/k/v, gate/up) share one set of statistics; which ones do is seen by running the block once, not known by name. Groups are packed in
the order they run, each on inputs that the already packed ones produced (GPTQ's "true sequential"). A finished block is written to the work
folder before the next one starts; on resume the finished blocks are read back and replayed, with the same result bit for bit.
Packers that need no data never run the model at all.

Where a low-rank path beside each packed weight is to start from the dense one (quant/starts.py), it is found here and lies in the block's file, for
the dense weight is gone afterwards. What comes after a layer is calibrated on what it puts out with its path.
"""

import contextlib
import math
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linear, world
from compressor.errors import ModelError, RecipeError
from compressor.integrations import experts
from compressor.kernels import layout
from compressor.packed import PackedWeight
from compressor.packing import joined, naming, relative_error
from compressor.pipelines import journal, parallel
from compressor.pipelines.blockwise.blocks import Blocks
from compressor.pipelines.calibrate import Calibration, collect_step, shared_inputs, steps
from compressor.pipelines.fisher import squared_gradients
from compressor.pipelines.packers import PACKERS, needs, trains
from compressor.pipelines.reconstruct import Reconstruction
from compressor.quant.starts import STARTS, check
from compressor.quant.starts import Path as LowRank
from compressor.recipe import Quant
from compressor.specs import means
from compressor.stats import LayerStats

PLAIN = ("FalconLinear",)  # classes of linears with a forward of their own that gives what nn.Linear's does


@dataclass
class Target:
    """A linear that will be packed, or the reason why it stays dense."""

    name: str  # dotted name in the model
    shape: tuple[int, ...]  # n, k; of fused experts three numbers
    group: int = 0
    note: str = ""
    reason: str = ""  # non-empty: left dense
    quant: Quant = field(default_factory=Quant)  # how this one is packed


@dataclass
class Plan:
    blocks_name: str
    targets: list[list[Target]] = field(default_factory=list)  # by block

    def packed(self) -> list[Target]:
        return [t for block in self.targets for t in block if not t.reason]


@dataclass(frozen=True)
class How:
    """How all layers are packed: `start`, zero or one of STARTS, of paths of `rank`; `keep_zeros`, pruned weights stay zero."""

    dtype: torch.dtype  # of scales and tables
    keep_zeros: bool = False
    start: str = "zero"
    rank: int = 8
    leaves: Collection[str] | None = None  # last parts of the names of linears that have a path; None: all
    rebuild: Reconstruction | None = None  # where a packer trains blocks

    def beside(self, name: str) -> bool:
        """Whether a path found here goes beside the linear of this name."""
        return self.start != "zero" and (self.leaves is None or name.rpartition(".")[2] in self.leaves)


def plan(model: nn.Module, quant: Quant) -> Plan:
    """What will be packed and how; raises before any work where a group size cannot be. Works on a model without weights (meta device)."""
    name, blocks = linear.find_blocks(model)
    out = Plan(name)
    for index, block in enumerate(blocks):
        row = []
        mixture = any(map(linear.expert_of, linear.linears(block))) or bool(experts.fused(block))
        for leaf, layer in linear.linears(block).items():
            full = f"{name}.{index}.{leaf}"
            target = Target(full, (layer.out_features, layer.in_features), quant=quant.of(full))
            if any(re.search(pattern, full) for pattern in quant.ignore):
                target.reason = "named by --ignore"
            elif mixture and experts.routes(leaf):
                target.reason = "a router stays dense: it chooses the experts, and servers read it so"
            elif type(layer).forward is not nn.Linear.forward and type(layer).__name__ not in PLAIN:
                target.reason = f"{type(layer).__name__} computes in a way of its own"
            else:
                target.group, target.note = PACKERS[target.quant.packer].resolve(layer.in_features, target.quant, full)
            row.append(target)
        out.targets.append(row)
        for leaf, parameter in block.named_parameters():
            if parameter.ndim == 3:
                held = block.get_submodule(leaf.rpartition(".")[0])
                row.append(Target(f"{name}.{index}.{leaf}", tuple(parameter.shape), reason=experts.reason(held)))
    if strange := [key for key in quant.layers if not any(means(key, t.name) for row in out.targets for t in row)]:
        raise RecipeError(f"quant.layers names {strange[0]!r}, and no linear of the decoder blocks is called so: give a whole name, or re:PATTERN")
    if not out.packed():
        raise ModelError("nothing is left to pack: every linear layer is named by --ignore")
    return out


def check_finite(model: nn.Module) -> None:
    """Raise before any work if a parameter holds NaN or infinity, naming it."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{name} holds NaN or infinite weights; the checkpoint is damaged, fetch it again")


def check_keep_zeros(quant: Quant) -> None:
    """RecipeError if the packer cannot keep a pruned weight at exactly zero, or the format that stores these cannot hold its codes."""
    if wide := [kind.bits for kind in quant.kinds() if kind.bits not in layout.BITS]:
        raise RecipeError(f"{wide[0]} bits are not stored beside single weights that were pruned: use 2, 3 or 4 bits")
    if quant.rotate != "none":
        raise RecipeError(f"quant.rotate={quant.rotate} mixes pruned weights with others, and no zero stays: leave it out, or prune whole units")
    if tables := [kind for kind in quant.kinds() if PACKERS[kind.packer].table]:
        instead = f"--quant {tables[0].bits}bit:gptq or {tables[0].bits}bit:rtn"
        raise RecipeError(f"{tables[0].packer} makes tables, which have no exact zero, and would bring pruned weights back; use {instead}")


def check_trains(quant: Quant, start: str) -> None:
    """RecipeError if blocks are to be trained beside what cannot be beside it."""
    if trains(quant) and start != "zero":
        raise RecipeError(f"tune.start={start} finds paths beside weights as they are packed, and {quant.packer} goes on to change these: use gptq")
    if trains(quant) and world.size() > 1:
        raise RecipeError(f"{quant.packer} trains blocks in one process: start it without torchrun, or use gptq")


def compress(
    model: nn.Module,
    quant: Quant,
    scale_dtype: torch.dtype,
    ids: Tensor | None,
    work: Path | None = None,
    on_layer: Callable[[dict[str, Any]], None] | None = None,
    keep_zeros: bool = False,
    start: str = "zero",
    rank: int = 8,
    starts: dict[str, LowRank] | None = None,
    beside: Collection[str] | None = None,
    seed: int = 42,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Pack the model's decoder linears in place.

    ids: calibration windows int64 [count, seqlen], needed by packers with statistics. `work`: folder for finished blocks; blocks found there
    are taken as they are (the caller guards it by a fingerprint). `keep_zeros`: weights that are exactly zero were pruned, and their codes stay the
    zero's; RecipeError if the packer makes tables. `start`: with any of STARTS a path of `rank` is found beside each packed weight (`beside`:
    those whose last name is in it); A [rank, k] and B [n, rank], float32 in main memory, gamma not divided out, go into `starts` by the layer's
    name, and its row has "start_error", the error with the path. `seed`: of the order in which windows train blocks. Returns report rows
    of packed layers, rows of linears left dense, and the number of blocks that were taken from `work`.
    """
    if keep_zeros:
        check_keep_zeros(quant)
    check_trains(quant, start)
    todo, how = plan(model, quant), How(scale_dtype, keep_zeros, start, rank, beside)
    if start != "zero":
        shapes = {t.name: t.shape for t in todo.packed() if how.beside(t.name)}
        check(start, rank, needs(quant) if ids is not None else (), shapes)
    blocks, visits = model.get_submodule(todo.blocks_name), Blocks.of(model)
    assert isinstance(blocks, nn.ModuleList)
    fisher = _fisher(model, todo, ids, work) if ids is not None else {}
    calibration = None
    if needs(quant) and ids is not None:
        walk = partial(Calibration, model, blocks, ids) if visits is None else partial(visits.calibration, ids)
        calibration = walk(part=quant.windows if trains(quant) else None)
        unfinished = work is None or any(journal.kept_facts(_block_path(work, index)) is None for index in range(len(blocks)))
        how = replace(how, rebuild=Reconstruction.of(model, blocks, ids, walk(), quant, seed) if trains(quant) and unfinished else None)
    if visits is not None and work is not None:
        visits.packed = partial(_block_path, work)
    rows: list[dict[str, Any]] = []
    resumed = 0
    for index, block in enumerate(blocks):
        targets, prefix = [t for t in todo.targets[index] if not t.reason], f"{todo.blocks_name}.{index}."
        last = calibration is None or index + 1 == len(blocks)
        block_rows, paths, taken = _block(block, index, targets, how, calibration, prefix, fisher, work, last)
        resumed += taken
        if starts is not None:
            starts |= {prefix + leaf: path for leaf, path in paths.items()}
        for row in block_rows:
            rows.append(row)
            if on_layer is not None:
                on_layer(row)
    unpacked = [{"name": t.name, "shape": list(t.shape), "reason": t.reason} for block in todo.targets for t in block if t.reason]
    return rows, unpacked + _outside_blocks(model, todo.blocks_name), resumed


def _block(
    block: nn.Module, index: int, targets: list[Target], how: How, calibration: Calibration | None, prefix: str, fisher: dict[str, Tensor],
    work: Path | None, last: bool,
) -> tuple[list[dict[str, Any]], dict[str, LowRank], bool]:  # fmt: skip
    """Rows and paths of one block, packed now or, which is the third, taken from `work`; unless it is the last, calibration goes on behind it."""
    stored, visits = None if work is None else journal.kept(_block_path(work, index)), Blocks.of(block)
    rows, paths = ([], {}) if stored is None else (stored[1], _paths_of(stored[0]))
    if stored is not None:
        if how.rebuild is not None and not last:
            with contextlib.nullcontext() if visits is None else visits.visit(index):
                how.rebuild.see(block, index)
        _apply_block(block, prefix, *stored)
    with contextlib.nullcontext() if visits is None or (stored is not None and last) else visits.visit(index):
        if stored is None:
            if how.rebuild is not None:
                how.rebuild.see(block, index)
            rows, paths = _pack_block(block, index, targets, how, calibration, prefix, fisher)
        if stored is None and work is not None:
            named = {f"{leaf}.{key}": t for leaf, path in paths.items() for key, t in zip("ab", path, strict=True)}
            journal.keep(_block_path(work, index), _packed_tensors(block) | named, rows)
        if calibration is not None and not last:
            with _beside(block, paths):
                calibration.run(block, index, keep=True)
    return rows, paths, stored is not None


def _fisher(model: nn.Module, todo: Plan, ids: Tensor, work: Path | None) -> dict[str, Tensor]:
    """Squared gradients of the linears whose packers want them and whose block is not in `work` yet."""
    open_rows = [row for i, row in enumerate(todo.targets) if work is None or journal.kept_facts(_block_path(work, i)) is None]
    missing = [t.name for row in open_rows for t in row if not t.reason and PACKERS[t.quant.packer].fisher]
    return squared_gradients(model, missing, ids) if missing else {}


def _outside_blocks(model: nn.Module, blocks_name: str) -> list[dict[str, Any]]:
    names = [(n, m) for n, m in linear.linears(model).items() if not n.startswith(blocks_name + ".")]
    return [{"name": n, "shape": list(m.weight.shape), "reason": "outside the decoder blocks"} for n, m in names]


def _pack_block(
    block: nn.Module, index: int, targets: list[Target], how: How, calibration: Calibration | None, prefix: str, fisher: dict[str, Tensor]
) -> tuple[list[dict[str, Any]], dict[str, LowRank]]:
    if not targets:
        return [], {}
    by_leaf = {t.name.removeprefix(prefix): t for t in targets}
    todo = [[[leaf] for leaf in by_leaf]]
    if calibration is not None:
        groups = shared_inputs(block, list(by_leaf), lambda: calibration.run(block, index, keep=False, batches=1))
        todo = steps(block, groups)
    rows: list[dict[str, Any]] = []
    paths: dict[str, LowRank] = {}
    trained = {leaf: linear.linears(block)[leaf] for leaf, target in by_leaf.items() if PACKERS[target.quant.packer].trains}
    for step in todo:
        start, found = time.perf_counter(), dict[str, LayerStats]()
        leaves = [leaf for group in step for leaf in group]
        sums = dict.fromkeys(each for leaf in leaves for each in PACKERS[by_leaf[leaf].quant.packer].needs)
        if calibration is not None and sums:
            with _beside(block, paths):
                seen = zip(step, collect_step(block, index, step, tuple(sums), calibration, prefix), strict=True)
                found = {leaf: stats for group, stats in seen for leaf in group}
        spent = (time.perf_counter() - start) / len(leaves)
        made: dict[str, dict[str, Any]] = {}
        whose = parallel.owners({leaf: _cost(by_leaf[leaf]) for leaf in leaves})
        with parallel.together():
            for leaf in (each for each in leaves if whose[each] == world.rank()):
                stats = found.pop(leaf, None)  # the last of a group frees its sums
                if stats is not None:
                    stats.fisher = fisher.get(by_leaf[leaf].name)
                    stats.keep = block.get_parameter(f"{leaf}.weight").detach() != 0 if how.keep_zeros else None
                made[leaf], path = _pack_layer(block, leaf, by_leaf[leaf], how, stats, spent)
                if path is not None:
                    paths[leaf] = (path[0].cpu(), path[1].cpu())
        for leaf in leaves:
            fisher.pop(by_leaf[leaf].name, None)
            rows.append(made[leaf] if world.size() == 1 else _exchange(block, prefix, leaf, whose[leaf], made, paths))
    if how.rebuild is not None and calibration is not None and trained:
        _rebuild(block, index, prefix, trained, by_leaf, how, calibration, rows)
    return rows, paths


def _rebuild(
    block: nn.Module, index: int, prefix: str, dense: dict[str, nn.Linear], targets: dict[str, Target], how: How, calibration: Calibration,
    rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Block-wise reconstruction of the linears `dense`, and what it did in their rows: "error" is that of the whole block from then on."""
    assert how.rebuild is not None
    start = time.perf_counter()
    kept = {leaf: layer.weight.detach() != 0 if how.keep_zeros else None for leaf, layer in dense.items()}
    before, after = how.rebuild.train(block, index, dense, {leaf: PACKERS[targets[leaf].quant.packer].reach for leaf in dense}, kept, calibration)
    spent = (time.perf_counter() - start) / len(dense)
    told = f"outputs of the block, as the end loss feels them: error {before:.4f} before it was trained, {after:.4f} after"
    told += "" if after < before else ", and keeps the start"
    for row in rows:
        if row["name"].removeprefix(prefix) in dense:
            row |= {"error": min(before, after), "seconds": round(row["seconds"] + spent, 4), "note": joined(row["note"], told)}


def _cost(target: Target) -> int:
    """Of packing a linear [n, k], beside others: n k**2 with statistics, as of GPTQ, n k without."""
    return math.prod(target.shape) * (target.shape[-1] if PACKERS[target.quant.packer].needs else 1)


def _exchange(block: nn.Module, prefix: str, leaf: str, owner: int, made: dict[str, dict[str, Any]], paths: dict[str, LowRank]) -> dict[str, Any]:
    """What process `owner` packed, row, weight and path, in all processes; returns the row."""
    own = {}
    if owner == world.rank():
        layer = block.get_submodule(leaf)
        assert isinstance(layer, linear.PackedLinear)
        own = _tensors_of(leaf, layer)
        own |= {f"{leaf}.{key}": t for key, t in zip("ab", paths.get(leaf, ()), strict=False)}
    row: dict[str, Any] = world.gather(made.get(leaf))[owner]
    tensors = world.send(own, owner, next(block.parameters()).device)
    if owner != world.rank():
        _apply_block(block, prefix, tensors, [row])
        paths.update({key: (a.cpu(), b.cpu()) for key, (a, b) in _paths_of(tensors).items()})
    return row


@contextlib.contextmanager
def _beside(block: nn.Module, paths: dict[str, LowRank]) -> Iterator[None]:
    """While it lasts the block's packed linears put out x WT + (x AT) BT, as they will with the path that starts there."""

    def hook(a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        return lambda _m, args, out: out + (args[0].float() @ a.T @ b.T).to(out.dtype)

    handles = []
    try:
        for leaf, (a, b) in paths.items():
            layer = block.get_submodule(leaf)
            device = next(layer.buffers()).device
            handles.append(layer.register_forward_hook(hook(a.to(device), b.to(device))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pack_layer(
    block: nn.Module, leaf: str, target: Target, how: How, stats: LayerStats | None, spent: float
) -> tuple[dict[str, Any], LowRank | None]:
    start, quant, path = time.perf_counter(), target.quant, None
    layer = block.get_submodule(leaf)
    assert isinstance(layer, nn.Linear)
    weight, packer = layer.weight.detach().float(), PACKERS[quant.packer]  # [n, k]

    def pack(rest: Tensor) -> tuple[PackedWeight, dict[str, Any]]:
        """Of a weight from which a path was taken; pruned weights stay out of it."""
        return packer(rest.masked_fill(weight == 0, 0) if how.keep_zeros else rest, stats, quant, target.group, how.dtype)

    with naming(target.name):
        if not how.beside(target.name):
            packed, facts = packer(weight, stats, quant, target.group, how.dtype)
        else:
            packed, facts, path = STARTS[how.start](weight, pack, stats, how.rank)
    linear.swap(block, leaf, linear.to_packed(layer, packed))
    notes = "; ".join(n for n in (target.note, facts.get("note", "")) if n)
    row = {
        "name": target.name, "shape": list(target.shape), "bits": quant.bits, "group": target.group,
        "symmetric": None if packer.table else packed.zero is None,
        "packer": facts.get("packer", quant.packer), "error": relative_error(weight, packed, stats), "damp": facts.get("damp"),
    }  # fmt: skip
    if how.beside(target.name):
        row["start_error"] = relative_error(weight, packed, stats, path)
    if stats is not None and linear.expert_of(leaf):
        row["tokens"] = stats.tokens
    return row | {"seconds": round(spent + time.perf_counter() - start, 4), "note": notes}, path


def _block_path(work: Path, index: int) -> Path:
    return work / f"block-{index:05d}.safetensors"


def _packed_tensors(block: nn.Module) -> dict[str, Tensor]:
    return {key: t for leaf, layer in linear.packed_linears(block).items() for key, t in _tensors_of(leaf, layer).items()}


def _tensors_of(leaf: str, layer: linear.PackedLinear) -> dict[str, Tensor]:
    return {f"{leaf}.{key}": t for key, t in layer.packed().tensors().items()}


def _paths_of(tensors: dict[str, Tensor]) -> dict[str, LowRank]:
    return {key.removesuffix(".a"): (t, tensors[key.removesuffix("a") + "b"]) for key, t in tensors.items() if key.endswith(".a")}


def _apply_block(block: nn.Module, prefix: str, tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
    for row in rows:
        leaf = row["name"].removeprefix(prefix)
        layer = block.get_submodule(leaf)
        assert isinstance(layer, nn.Linear)
        weight = PackedWeight.from_tensors(journal.under(tensors, leaf), row["bits"], row["group"], (row["shape"][0], row["shape"][1]))
        linear.swap(block, leaf, linear.to_packed(layer, weight))
