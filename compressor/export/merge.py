"""Arithmetic on the tasks of one base: several tunings of the same codes become one, without training.

A task vector is what a tuning moved: values of the task - values of the base. Every method here gives each task t a coefficient c_t, one number a
value, and the merged values are

    merged = base + sum_t c_t (task_t - base) = (1 - sum_t c_t) base + sum_t c_t task_t

    sum          c_t = weight_t                                   task arithmetic, Ilharco et al. 2023, arXiv 2212.04089
    ties         trim, elect, disjoint mean: the largest `density` of each task vector stay; every value takes the sign of the larger total;
                 c_t = weight_t / sum of |weight| over the tasks of that sign, 0 for the others      Yadav et al. 2023, arXiv 2306.01708
    breadcrumbs  c_t = weight_t for the share `density` of a layer's changes that follows its largest, a share `outliers`; 0 for these and for the
                 small ones                                       Davari and Belilovsky 2023, arXiv 2312.06795
    soup         c_t = 1 / tasks                                  uniform soup, Wortsman et al. 2022, arXiv 2203.05482
    greedy       the same over the tasks that earn their place: best first, each stays if the average with it is no worse     (same paper)
    lines        `sum`, then layer-increasing scaling: all c_t of block l of L times alpha + beta (l - 1) / (L - 1), beta >= 0
                                                                  LiNeS, Wang et al. 2024, arXiv 2410.17146

`scale` multiplies all coefficients, and alpha and beta may follow any method. The second form of the formula is the one computed, in float64, and
rounded once to the stored dtype: weights (1, 0) give the first task bit for bit, whatever the base and the dtype, which float32 does not.

Choice. Sums need no decision between absolute and relative change: base (1 + sum_t c_t delta_t) with delta_t = task_t / base - 1 is the same number.
Where changes are ranked, by ties and breadcrumbs, they are relative, a share of the base's scale or of the root mean square of its table, as tuners
measure them (tune/peqa.py, tune/table.py): scales of one model differ more than tenfold between rows, and the largest absolute changes are those of
the largest rows. Zeros are in steps of the grid already. Ties trims the whole task vector at once, breadcrumbs layer by layer, as published; equal
changes rank in the order of the values. A value whose total is exactly zero elects no sign and stays as it is in the base; the authors' script gives
it the commonest sign. Without alpha, LiNeS takes the paper's 1 / tasks * |sum of weighted task vectors| / |merged vector| (norms of absolute
values); the paper searches beta, here it is 1 - alpha unless given, or 0 where alpha is above 1, which leaves the last block as it was merged.
Weights of ties are a share of the vote and of the mean: only their ratios count.

Limits of what comes out: a scale's size falls below a tenth of the base's, the floor of tuning, only where a task that counts is that low, its sign
stays, and no number leaves the finite range of its dtype. Whether the base was itself tuned nobody can see: a digest knows codes, not values, and
task vectors count from whatever the base holds.

Price: values, their sum and one coefficient a task in float64, layer by layer; ties also ranks every task vector as a whole, some 20 bytes a value.
Nothing here knows a model: what a merge is worth shows only in a measurement.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import RecipeError

Values = Mapping[str, Tensor]  # by module: scales [n, G], tables [n, S, 2**bits] or zeros [n, G]
Quality = Callable[[dict[str, Tensor]], float]  # of merged values, on held-out data; less is better
Coefficient = Tensor | float  # of a task: float64 of the values' shape, or one number for all of a layer
METHODS = ("sum", "ties", "breadcrumbs", "lines", "soup", "greedy")
DENSITY = {"ties": 0.2, "breadcrumbs": 0.1}  # the first as published
OUTLIERS = 0.01
FLOOR = 0.1  # of the base's scale


@dataclass(frozen=True)
class Options:
    """How to merge. None is the method's own: weights of 1, DENSITY, OUTLIERS, no scaling by depth.

    `lines` holds alpha and beta, each None for its default.
    """

    method: str = "sum"
    weights: tuple[float, ...] | None = None
    density: float | None = None
    outliers: float | None = None
    scale: float = 1.0
    lines: tuple[float | None, float | None] | None = None

    def check(self, tasks: int) -> None:
        """RecipeError for a value that cannot work for this number of tasks, or that the method would ignore."""
        if self.method not in METHODS:
            raise RecipeError(f"--method {self.method!r} is unknown; choose {', '.join(METHODS)}")
        if not tasks:
            raise RecipeError("no task is given: name at least one task file")
        if self.weights is not None and self.method in ("soup", "greedy"):
            raise RecipeError(f"--weights means nothing to {self.method}, which averages: leave it out, or take --method sum")
        if self.weights is not None and len(self.weights) != tasks:
            raise RecipeError(f"--weights has {len(self.weights)} numbers for {tasks} tasks: give one for each, in their order")
        if not all(math.isfinite(x) for x in (*(self.weights or ()), self.scale, *(self.lines or ())) if x is not None):
            raise RecipeError("--weights, --scale and --lines must be finite numbers")
        if self.lines is not None and (self.lines[1] or 0) < 0:
            raise RecipeError(f"--lines: beta={self.lines[1]} is what the factor grows by up to the last block, 0 or more")
        if self.density is not None and self.method not in DENSITY:
            raise RecipeError(f"--density means nothing to {self.method}, which drops no change: leave it out, or take {' or '.join(DENSITY)}")
        if self.outliers is not None and self.method != "breadcrumbs":
            raise RecipeError(f"--outliers means nothing to {self.method}: leave it out, or take --method breadcrumbs")
        if not (0 < self.kept() <= 1 and 0 <= self.dropped() < 1):
            raise RecipeError(f"density={self.kept()} is a share above 0 and at most 1, and outliers={self.dropped()} one from 0 to below 1")
        if self.method == "breadcrumbs" and self.kept() + self.dropped() > 1:
            raise RecipeError(f"density={self.kept()} and outliers={self.dropped()} are shares of the same changes, and add up to at most 1")
        if self.method == "lines" and tasks == 1 and (self.lines is None or self.lines[0] is None):
            raise RecipeError("lines leaves a single task as it is unless it is told how much the first block keeps: add --lines, for example 0.3")

    def kept(self) -> float:
        """The share of the changes that stays."""
        return DENSITY.get(self.method, 1.0) if self.density is None else self.density

    def dropped(self) -> float:
        """The share of the largest changes that goes."""
        return OUTLIERS if self.outliers is None else self.outliers


def merge(
    base: Values, tasks: Sequence[Values], kind: str, options: Options, quality: Quality | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The merged values, in the shapes and dtypes of the base's, and what was done, for a record.

    All tasks hold the modules of `base`, in its shapes; `kind` is scale, table or zero. `quality` is for greedy alone, which asks it for every task
    and every candidate average. RecipeError for options that cannot work.
    """
    options.check(len(tasks))
    found: dict[str, Any] = {"method": options.method}
    weights = list(options.weights or [1.0] * len(tasks))
    if options.method in ("soup", "greedy"):
        chosen = list(range(len(tasks))) if options.method == "soup" else greedy(base, tasks, kind, quality)
        weights = [1 / len(chosen) if t in chosen else 0.0 for t in range(len(tasks))]
        found |= {"chosen": chosen} if options.method == "greedy" else {}
    found |= {"weights": weights} | ({"scale": options.scale} if options.scale != 1 else {})
    masks: list[dict[str, Tensor]] = []
    if options.method == "ties":
        found["density"] = options.kept()
        masks = [trimmed(base, task, kind, options.kept()) for task in tasks]
    if options.method == "breadcrumbs":
        found |= {"density": options.kept(), "outliers": options.dropped()}
        masks = [crumbs(base, task, kind, options.kept(), options.dropped()) for task in tasks]

    def coefficients(name: str) -> list[Coefficient]:
        if options.method == "ties":
            return elected(base[name], [t[name] for t in tasks], [m[name] for m in masks], weights)
        return [w * m[name].double() for w, m in zip(weights, masks, strict=True)] if masks else list(weights)

    factors = dict.fromkeys(base, options.scale)
    if options.lines is not None or options.method == "lines":
        alpha, beta = slope(base, tasks, weights, coefficients, options.lines or (None, None))
        found["lines"] = [alpha, beta]
        factors = {name: options.scale * (alpha + beta * depth) for name, depth in depths(base).items()}
    out = {}
    for name, start in base.items():
        out[name] = combined(start, [t[name] for t in tasks], [factors[name] * c for c in coefficients(name)], kind)
    return out, found


def combined(base: Tensor, tasks: Sequence[Tensor], coefficients: Sequence[Coefficient], kind: str) -> Tensor:
    """(1 - sum c) base + sum c task of one layer, within the limits, in the base's shape and dtype."""
    wide, limits = base.double(), torch.finfo(base.dtype)
    merged = (1 - sum(coefficients)) * wide
    for task, c in zip(tasks, coefficients, strict=True):
        merged += c * task.double()
    if kind == "scale":  # below the smallest normal number a tenth may round to zero: there the floor is the base's scale itself
        sign, size = torch.where(wide < 0, -1.0, 1.0).double(), wide.abs()
        floor = torch.maximum(FLOOR * size, size.clamp(max=limits.tiny))
        for task, c in zip(tasks, coefficients, strict=True):
            counts = torch.as_tensor(c, device=wide.device) != 0
            floor = torch.where(counts, torch.minimum(floor, sign * task.double()), floor)
        merged = sign * torch.maximum(sign * merged, floor)
    return merged.clamp_(-limits.max, limits.max).to(base.dtype)


def units(base: Tensor, kind: str) -> Tensor:
    """What changes are shares of, float64: the scale's size [n, G], the root mean square of each table [n, S, 1], a step of zeros; never zero."""
    wide = base.double()
    if kind == "zero":
        return torch.ones_like(wide)
    size = wide.square().mean(-1, keepdim=True).sqrt() if kind == "table" else wide.abs()
    return size.masked_fill(size == 0, torch.finfo(torch.float16).tiny)


def changes(base: Tensor, task: Tensor, kind: str) -> Tensor:
    """(task - base) / unit, float64 of their shape."""
    return (task.double() - base.double()) / units(base, kind)


def trimmed(base: Values, task: Values, kind: str, density: float) -> dict[str, Tensor]:
    """By module, which values are among the largest changes of the whole task vector, a share `density` of them; at least one."""
    sizes = torch.cat([changes(start, task[name], kind).abs().float().flatten() for name, start in base.items()])
    mask = _ranked(sizes, 0, density)
    parts = mask.split([start.numel() for start in base.values()])
    return {name: part.view_as(start) for (name, start), part in zip(base.items(), parts, strict=True)}


def crumbs(base: Values, task: Values, kind: str, density: float, outliers: float) -> dict[str, Tensor]:
    """By module, which values are among the share `density` of the layer's changes that follows its largest, a share `outliers`."""
    sizes = {name: changes(start, task[name], kind).abs().float().flatten() for name, start in base.items()}
    return {name: _ranked(size, outliers, density).view_as(base[name]) for name, size in sizes.items()}


def elected(base: Tensor, tasks: Sequence[Tensor], masks: Sequence[Tensor], weights: Sequence[float]) -> list[Coefficient]:
    """Coefficients of one layer after the vote: of the tasks whose trimmed, weighted change has the sign of the total, sizes summing to 1."""
    moved = [w * m * (t.double() - base.double()) for w, m, t in zip(weights, masks, tasks, strict=True)]
    sign = torch.stack(moved).sum(0).sign()
    agree = [((change.sign() == sign) & (sign != 0)).double() for change in moved]
    mass = torch.stack([abs(w) * a for w, a in zip(weights, agree, strict=True)]).sum(0)
    mass = mass.masked_fill(mass == 0, 1)
    return [w * a / mass for w, a in zip(weights, agree, strict=True)]


def greedy(base: Values, tasks: Sequence[Values], kind: str, quality: Quality | None) -> list[int]:
    """The tasks of a greedy soup, in the order in which they joined. RecipeError without a way to measure."""
    if quality is None:
        raise RecipeError("greedy measures every candidate: give a text for each task with --data")
    ask = lambda values: math.inf if math.isnan(found := quality(values)) else found
    single = [ask(dict(task)) for task in tasks]
    first, *rest = sorted(range(len(tasks)), key=single.__getitem__)
    chosen, best = [first], single[first]
    for t in rest:
        members = [*chosen, t]
        share: list[Coefficient] = [1 / len(members)] * len(members)
        found = ask({name: combined(start, [tasks[m][name] for m in members], share, kind) for name, start in base.items()})
        if found <= best and found < math.inf:
            chosen, best = members, found
    return chosen


def slope(
    base: Values, tasks: Sequence[Values], weights: Sequence[float], coefficients: Callable[[str], list[Coefficient]], given: Sequence[float | None]
) -> tuple[float, float]:
    """alpha and beta of LiNeS: as given, or by the defaults above."""
    alpha, beta = given
    if alpha is None:
        total = merged = 0.0
        for name, start in base.items():
            moved = torch.stack([task[name].double() - start.double() for task in tasks])
            total += float(torch.stack([w * m for w, m in zip(weights, moved, strict=True)]).sum(0).abs().sum())
            merged += float(torch.stack([c * m for c, m in zip(coefficients(name), moved, strict=True)]).sum(0).abs().sum())
        alpha = (total / merged if merged else 1.0) / len(tasks)
    return alpha, max(0.0, 1 - alpha) if beta is None else beta


def depths(names: Iterable[str]) -> dict[str, float]:
    """(l - 1) / (L - 1) by module: 0 in the first block, 1 in the last; a block's number is the first in a name, and what has none counts as last."""
    blocks = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in names}
    last = max((at for at in blocks.values() if at is not None), default=0)
    return {name: 1.0 if at is None or last == 0 else at / last for name, at in blocks.items()}


def _ranked(sizes: Tensor, skip: float, keep: float) -> Tensor:
    """Which of the sizes [m] are, from the largest down, in the share `keep` that follows the share `skip`; at least one, first come first ranked."""
    first = round(skip * len(sizes))
    order = sizes.argsort(descending=True, stable=True)[first : first + max(1, round(keep * len(sizes)))]
    return torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device).index_fill_(0, order, True)
