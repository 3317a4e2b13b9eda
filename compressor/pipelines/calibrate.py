"""Calibration windows on their way through a model's blocks, one block at a time, and the sums that packers ask for of what each linear reads.

Hidden states wait in main memory, or where blockwise/hidden.py keeps them; a block is run as often as there are groups of linears that read the
same input, and once more for its outputs. Which linears share an input is seen by running the block once, not known by name.

Experts of a mixture read the tokens that are routed to them, and one pass serves all that stand in the same place (`steps`): the gates and ups of all
experts, then the downs, in as many passes as SUMS bytes of sums need. What an expert's linears share is seen where any expert of the block ran. An
expert that fewer tokens than LEAST for each of its inputs reach is packed without data: H of so few is far from that of the text, and GPTQ and
sketches lose more by it than they gain (bench/moe.py; docs/moe.md).
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor import world
from compressor.errors import ModelError
from compressor.linear import expert_of
from compressor.pipelines.blockwise.hidden import Hidden, Recomputed, Stop
from compressor.stats import LayerStats

BATCH_TOKENS = 8192  # tokens of calibration that run through a block at once
SUMS = 2 << 30  # bytes of sums of experts that one pass gathers
LEAST = 4  # tokens for each input of an expert, below which it is packed without data


class Calibration:
    """Calibration windows on their way through the blocks: hidden states in main memory, block arguments seen once a batch size."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, ids: Tensor, hidden: Hidden | Recomputed | None = None, part: int | None = None):
        """ids int64 [count, seqlen]; hidden: what hidden states wait in, a list unless something else is given.

        part: so many windows of a batch, and what is left over, can be run too: `arguments` has what blocks get with them.
        """
        ids = world.dealt(ids)  # each process runs its own windows; `collect` adds up their sums
        count, seqlen = ids.shape
        size = max(1, min(count, BATCH_TOKENS // seqlen))
        device = next(model.parameters()).device
        self.batches = [rows.to(device) for rows in ids.split(size)]  # equal ones, and perhaps a smaller last one
        self.hidden: Hidden | Recomputed = [] if hidden is None else hidden
        self.arguments: list[dict[int, dict[str, Any]]] = [{} for _ in blocks]  # by the size of the batch: masks have its shape
        pieces = [] if part is None else [piece for batch in self.batches for piece in batch.split(part)]
        self._record(model, blocks, list({len(piece): piece for piece in pieces}.values()))

    @torch.no_grad()
    def _record(self, model: nn.Module, blocks: nn.ModuleList, parts: list[Tensor]) -> None:
        """The first batch of each size records every block's keyword arguments and stops at the last block; the others stop at the first."""
        size = 0

        def first(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(self.hidden) < len(self.batches):
                self.hidden.append((args[0] if args else kwargs["hidden_states"]).detach().cpu())
            if size in self.arguments[0]:
                raise Stop

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
                    raise Stop  # logits of thousands of tokens take gigabytes

            return hook

        hooks = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]  # before the one that may stop
        hooks += [block.register_forward_pre_hook(keep(i), with_kwargs=True) for i, block in enumerate(blocks)]
        try:
            for batch in (*self.batches, *parts):
                size = len(batch)
                with contextlib.suppress(Stop):
                    model(input_ids=batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, keep: bool, batches: int | None = None) -> None:
        """All hidden states (or the first few batches) through one block; `keep` makes the outputs the next block's inputs.

        A hook inside the block may raise Stop to end the pass of its batch.
        """
        device, waiting = next(block.parameters()).device, self.hidden
        if keep and isinstance(waiting, Recomputed):
            waiting.advance()
            return
        for i in range(len(waiting))[:batches]:
            hidden = waiting[i]
            with contextlib.suppress(Stop):
                out = block(hidden.to(device), **self.arguments[index][len(hidden)])
                if keep and not isinstance(waiting, Recomputed):
                    waiting[i] = (out[0] if isinstance(out, tuple) else out).cpu()


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
    return world.share(order + [[name] for name in names if name not in last])  # one order for all processes: other windows may reach other experts


def collect(block: nn.Module, index: int, leaves: list[str], needs: tuple[str, ...], calibration: Calibration, name: str) -> LayerStats:
    """Sums `needs` over the input that `leaves` share, of all calibration windows; a layer is taken to run once in a pass through its block.

    name: what an error about them calls the layer.
    """
    layer = block.get_submodule(leaves[0])
    assert isinstance(layer, nn.Linear)
    stats = LayerStats(layer.in_features, needs)

    def add(_m: nn.Module, args: tuple[Any, ...]) -> None:
        stats.add(args[0])
        raise Stop  # what comes after this layer is not needed

    hook = layer.register_forward_pre_hook(add)
    try:
        calibration.run(block, index, keep=False)
    finally:
        hook.remove()
    stats.reduce(layer.weight.device)
    stats.check(name)
    return stats


Step = list[list[str]]  # groups of linears that share an input, whose sums one pass gathers


def steps(block: nn.Module, groups: Sequence[list[str]]) -> list[Step]:
    """The groups that `shared_inputs` found, in order, with those of experts that stand in the same place together.

    An expert that did not run is grouped as those that did; a step of experts holds at most SUMS bytes of second moments, or one expert's.
    """
    return [step for place in places(groups) for step in in_memory(block, place)]


def places(groups: Sequence[list[str]]) -> list[Step]:
    """As `steps`, whatever the sums take."""
    known: dict[tuple[str, str], tuple[str, ...]] = {}  # (experts, a linear's name in one) -> all names of its group
    for parts in map(_same_expert, groups):
        for name in parts[1]:
            if len(parts[1]) > len(known.get((parts[0], name), ())):
                known[parts[0], name] = parts[1]
    found_at: dict[tuple[str, ...], dict[int, list[str]]] = {}  # (experts, names of a group) -> groups by expert; or (names,) of no expert's group
    for group in groups:
        for leaf in group:
            found = expert_of(leaf)
            key = (leaf,) if found is None else (found[0], *known.get((found[0], found[2]), (found[2],)))
            found_at.setdefault(tuple(group) if found is None else key, {}).setdefault(-1 if found is None else found[1], []).append(leaf)
    return [[place[index] for index in sorted(place)] for place in found_at.values()]


def _same_expert(group: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """(experts, names within one of them) of a group that is one expert's, else ("", ())."""
    found = [expert_of(leaf) for leaf in group]
    ours = [each for each in found if each is not None]
    if len(ours) < len(found) or len({each[:2] for each in ours}) != 1:
        return "", ()
    return ours[0][0], tuple(each[2] for each in ours)


def in_memory(block: nn.Module, groups: list[list[str]]) -> list[Step]:
    """The groups of a place, cut so that the sums of each part take at most SUMS bytes."""
    out: list[Step] = []
    room = 0
    for group in groups:
        layer = block.get_submodule(group[0])
        assert isinstance(layer, nn.Linear)
        need = 4 * layer.in_features**2
        if not out or need > room:
            out.append([])
            room = SUMS
        out[-1].append(group)
        room -= need
    return out


def collect_step(block: nn.Module, index: int, step: Step, needs: tuple[str, ...], calibration: Calibration, prefix: str) -> list[LayerStats]:
    """`collect` for every group of a step, in one pass; those of experts without the sums if too few tokens reached them."""
    experts = expert_of(step[0][0])
    if experts is None:
        return [collect(block, index, group, needs, calibration, prefix + group[0]) for group in step]
    found = []
    handles = []

    def add(stats: LayerStats) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _m, args: stats.add(args[0])

    def stop(*_: object) -> None:
        raise Stop  # what comes after the experts is not needed

    for group in step:
        layer = block.get_submodule(group[0])
        assert isinstance(layer, nn.Linear)
        found.append(LayerStats(layer.in_features, needs))
        handles.append(layer.register_forward_pre_hook(add(found[-1])))
    handles.append(block.get_submodule(experts[0]).register_forward_hook(stop))
    try:
        calibration.run(block, index, keep=False)
    finally:
        for handle in handles:
            handle.remove()
    for group, stats in zip(step, found, strict=True):
        stats.reduce(block.get_submodule(group[0]).get_parameter("weight").device)
        stats.check(prefix + group[0])
        stats.require(LEAST * stats.width)
    return found
