"""What packing one group of linears by each of several options costs: bits, and damage to the model when only this group is packed.

A unit is the linears of a block that read the same input (q/k/v, gate/up), or all linears of its experts: they get one option together, so that
servers can fuse them. One pass of the calibration windows through the dense model's blocks collects their inputs; every unit is packed by every
option, on inputs of the dense model.

    kl      damage = mean over tokens of KL(p_dense || p_now), nats, logits of a few windows that do not calibrate, with only this unit packed
    error   damage = sum over the unit's linears of the relative squared error of their outputs on the calibration inputs; runs no model

To second order both add up over units as long as errors are small and independent (Dong et al., HAWQ-V2, 2020, arXiv 1911.03852; Li et al., BRECQ,
2021, arXiv 2102.05426); what they really come to together is measured after packing. KL is the rise of the loss on text that the dense model itself
would write, and near to it on other text; error knows nothing of how much a layer matters.

Packers that train blocks are measured by the codes that they start from; the mix that was chosen is trained as it is packed.

Price: options times the packing of the model; for kl a forward pass of the sample for every unit and option, and its dense logits in memory.
Finished blocks are kept in the work folder.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import NumericError
from compressor.linear import expert_of
from compressor.packed import PackedWeight
from compressor.packing import relative_error
from compressor.pipelines import journal
from compressor.pipelines.calibrate import Calibration, Step, collect_step, in_memory, places, shared_inputs
from compressor.pipelines.compress import Plan
from compressor.pipelines.measure import divergence
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Choose, Quant
from compressor.stats import LayerStats


@dataclass(frozen=True)
class Option:
    """One way to pack a unit: the candidates that come to it here, the bits that it stores, and what it costs."""

    specs: tuple[str, ...]
    bits: int
    damage: float


@dataclass(frozen=True)
class Unit:
    """Linears that are packed alike, by dotted name; `weights` is how many they have."""

    layers: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Unit":
        """The inverse of dataclasses.asdict, also after JSON."""
        options = tuple(Option(tuple(row["specs"]), row["bits"], row["damage"]) for row in values["options"])
        return cls(tuple(values["layers"]), values["weights"], options)


def kl(model: nn.Module, dense: divergence.Sample) -> float:
    """KL(p_dense || p_now) a token, in nats; infinite where the model no longer predicts."""
    try:
        return float(dense.compare(model)["mean"])
    except NumericError:
        return math.inf


def windows(options: Choose, seqlen: int, vocabulary: int) -> int:
    """How many windows kl is measured on: those asked for, or as many as a Sample keeps."""
    return max(1, min(options.windows, divergence.SAMPLE_LOGITS // (seqlen * max(vocabulary, 1))))


def sample(text: Tensor, ids: Tensor, count: int) -> Tensor:
    """Up to `count` windows [count, seqlen] spread over a text's windows [all, seqlen] that are not among the calibration windows `ids`.

    Packing was fitted to those, and would look better on them than it is. A text that has no others gives them.
    """
    seen = {row.numpy().tobytes() for row in ids}
    rest = [row for row in text if row.numpy().tobytes() not in seen]
    found = torch.stack(rest) if rest else ids
    count = min(count, len(found))
    return found[:: len(found) // count][:count]


@torch.no_grad()
def measure(
    model: nn.Module,
    todo: Plan,
    ways: dict[str, Quant],
    scale_dtype: torch.dtype,
    ids: Tensor,
    damage: Callable[[], float] | None,
    work: Path,
    on_option: Callable[[int, str], None],
    keep_zeros: bool = False,
) -> list[Unit]:
    """All units of the linears that `todo` packs, with an option for every one of `ways` (those that come to the same are one option).

    ids: calibration windows int64 [count, seqlen]. `damage`: of the model as it is now, such as kl; None: error. on_option(linears times candidates
    done, which unit). The model is left as it was.
    """
    blocks = model.get_submodule(todo.blocks_name)
    assert isinstance(blocks, nn.ModuleList)
    calibration = Calibration(model, blocks, ids)
    units: list[Unit] = []
    for index, block in enumerate(blocks):
        path, prefix = work / f"damage-{index:05d}.safetensors", f"{todo.blocks_name}.{index}."
        found = journal.kept_facts(path)
        if found is None:
            leaves = [t.name.removeprefix(prefix) for t in todo.targets[index] if not t.reason]
            found = []
            sums = tuple(dict.fromkeys(each for quant in ways.values() for each in (*PACKERS[quant.packer].needs, "hessian")))
            groups = shared_inputs(block, leaves, partial(calibration.run, block, index, keep=False, batches=1))
            for steps in _alike(block, places(groups)):
                seen = (zip(step, collect_step(block, index, step, sums, calibration, prefix), strict=True) for step in steps)
                shared = [group for step in steps for group in step]
                found.append(asdict(_unit(block, prefix, shared, ways, scale_dtype, seen, damage, on_option, keep_zeros)))
            journal.keep(path, {}, found)
        units += [Unit.from_dict(row) for row in found]
        if index + 1 < len(blocks):
            calibration.run(block, index, keep=True)
    return units


def _alike(block: nn.Module, found: list[Step]) -> list[list[Step]]:
    """The steps of each unit: those of a block's experts are one unit, for servers run all of them as one layer."""
    units: dict[tuple[str, ...], list[Step]] = {}
    for place in found:
        expert = expert_of(place[0][0])
        units.setdefault(tuple(place[0]) if expert is None else (expert[0],), []).extend(in_memory(block, place))
    return list(units.values())


Seen = Iterable[Iterable[tuple[list[str], LayerStats]]]  # by step: linears that share an input, and what is known of it


def _unit(
    block: nn.Module, prefix: str, groups: Step, ways: dict[str, Quant], dtype: torch.dtype, seen: Seen,
    damage: Callable[[], float] | None, on_option: Callable[[int, str], None], keep_zeros: bool,
) -> Unit:  # fmt: skip
    """All packed weights of the unit, by every option, wait in memory until the last of its sums is gathered."""
    leaves = [leaf for group in groups for leaf in group]
    weights = {leaf: block.get_submodule(leaf).get_parameter("weight") for leaf in leaves}
    distinct = _distinct(ways, dict.fromkeys(w.shape[1] for w in weights.values()), prefix + leaves[0])
    packed: list[dict[str, PackedWeight]] = [{} for _ in distinct]
    errors = [0.0] * len(distinct)
    for leaf, stats in ((leaf, stats) for step in seen for group, stats in step for leaf in group):
        exact = weights[leaf].detach().float()
        stats.keep = exact != 0 if keep_zeros else None
        for i, (quant, sizes, _) in enumerate(distinct):
            try:
                packed[i][leaf] = PACKERS[quant.packer](exact, stats, quant, sizes[exact.shape[1]], dtype)[0]
                errors[i] += relative_error(exact, packed[i][leaf], stats) ** 2
            except NumericError:  # its scales are beyond what the dtype holds
                errors[i] = math.inf
    options = []
    for (_, _, specs), mine, error in zip(distinct, packed, errors, strict=True):
        cost = error if damage is None or error == math.inf else _with(weights, mine, damage)
        if math.isfinite(cost):
            options.append(Option(tuple(specs), sum(w.stored_bits() for w in mine.values()), cost))
        on_option(len(specs) * len(leaves), f"{prefix}{leaves[0]} {specs[0]}")
    if not options:
        raise NumericError(
            f"{prefix}{leaves[0]}: packed by none of the candidates does the model give finite numbers: try others, or --scale-dtype float32"
        )
    return Unit(tuple(prefix + leaf for leaf in leaves), sum(w.numel() for w in weights.values()), tuple(options))


def _with(weights: dict[str, nn.Parameter], packed: dict[str, PackedWeight], damage: Callable[[], float]) -> float:
    """The damage while the weights are what they are when packed."""
    kept = {leaf: weight.detach().clone() for leaf, weight in weights.items()}
    for leaf, weight in weights.items():
        weight.copy_(packed[leaf].dequantize(weight.dtype))
    found = damage()
    for leaf, weight in weights.items():
        weight.copy_(kept[leaf])
    return found


def _distinct(ways: dict[str, Quant], widths: Iterable[int], name: str) -> list[tuple[Quant, dict[int, int], list[str]]]:
    """The ways that differ for linears of so many inputs, each with the group size by width and all candidates that come to it."""
    found: list[tuple[dict[str, Any], Quant, dict[int, int], list[str]]] = []
    for spec, quant in ways.items():
        sizes = {k: PACKERS[quant.packer].resolve(k, quant, name)[0] for k in widths}
        key = asdict(quant) | {"group": sizes, "gpr": None}
        same = next((row for row in found if row[0] == key), None)
        if same is None:
            found.append((key, quant, sizes, [spec]))
        else:
            same[3].append(spec)
    return [row[1:] for row in found]
