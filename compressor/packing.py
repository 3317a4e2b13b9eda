"""What packers share: their interface, rows in panels that bound the memory, and the error of a packed weight as one number for the report."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError, NumericError
from compressor.kernels import layout, reference
from compressor.packed import PackedWeight
from compressor.recipe import Quant
from compressor.stats import LayerStats

PANEL = 1 << 22  # weights at a time
NOTED, LOST = 0.01, 0.1  # share of a layer's norm below what a dtype resolves that its row tells of, and that is an error
FAINT = 1e-30  # weights that no dtype has scales for

Pack = Callable[[Tensor, LayerStats | None, Quant, int, torch.dtype], tuple[PackedWeight, dict[str, Any]]]


@dataclass(frozen=True)
class Packer:
    """`packer(w [n, k] float32, stats, options, group, dtype)` -> packed weight with values stored in `dtype`, report row.

    `needs` are the sums its stats must hold; `resolve(k, options, name)` says which group size a layer of k in features gets, with a note for
    the report, and raises RecipeError where none fits; `reads` names the keys of Quant that it heeds, beside those of all packers (bits, packer,
    scale_dtype, ignore, rotate, end_to_end); `table` says that it makes sketches, `fisher` that it wants `stats.fisher`, `trains` that what it
    makes is the start of block-wise reconstruction (pipelines/reconstruct.py), with codes within `reach` steps of the dense weight if that is given.
    """

    pack: Pack
    resolve: Callable[[int, Quant, str], tuple[int, str]]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    table: bool = False
    fisher: bool = False
    trains: bool = False
    reach: float | None = None

    @property
    def heeds(self) -> set[str]:
        """All keys of Quant that say something to this packer."""
        return {"bits", "packer", "scale_dtype", "ignore", "layers", "rotate", "end_to_end", *self.reads}

    def __call__(self, w: Tensor, stats: LayerStats | None, options: Quant, group: int, dtype: torch.dtype) -> tuple[PackedWeight, dict[str, Any]]:
        return self.pack(w, stats, options, group, dtype)


def require_finite(w: Tensor) -> None:
    """Raises NumericError when w has NaN or infinite values; the caller knows, and adds, the layer's name."""
    bad = w.numel() - int(torch.isfinite(w).sum())
    if bad:
        raise NumericError(f"{bad} of {w.numel()} weights are NaN or infinite")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts the name of a layer before what an error says of its weight."""
    try:
        yield
    except (ModelError, NumericError) as error:
        raise type(error)(f"{name}: {error}") from None


def check_range(w: Tensor, group: int, steps: int, dtype: torch.dtype, finest: float) -> str:
    """A note for the report, mostly empty, about values of `dtype` for the groups of w float32 [n, k]: one of size max |w| / steps each.

    NumericError where they would be beyond the range of `dtype`, or below its normal numbers at the price of more than LOST of the norm of w:
    there a weight moves by up to half of `finest`. So an absolute error of that size is all that small groups beside large ones suffer.
    """
    limits, unit, kind = torch.finfo(dtype), _unit(w), str(dtype).removeprefix("torch.")
    lost, whole, largest = (torch.zeros((), dtype=torch.float64, device=w.device) for _ in range(3))
    for rows in panels(*w.shape):
        part = torch.nn.functional.pad(w[rows], (0, -w.shape[1] % group)).unflatten(1, (-1, group))  # [r, G, group]
        size, energy = part.abs().amax(-1) / steps, (part / unit).square_().sum(-1, dtype=torch.float64)  # [r, G]
        lost += energy.clamp(max=group * (finest / unit) ** 2 / 12)[size < limits.tiny].sum()
        whole += energy.sum()
        largest = torch.maximum(largest, size.max())
    if float(largest) > limits.max:
        what = f"weights up to {float(largest) * steps:.3g} need values beyond the range of {kind}"
        raise NumericError(f"{what}: {_instead(dtype, 'bfloat16')}")
    share = math.sqrt(float(lost) / float(whole)) if float(whole) > 0 else 0.0
    if share > LOST:
        most = float(largest) * steps
        raise NumericError(
            f"weights of at most {most:.3g} are below what {kind} values resolve: {_instead(dtype, 'float32' if most > FAINT else '')}"
        )
    return f"{share:.1%} of its norm is below what {kind} values resolve" if share > NOTED else ""


def joined(*notes: str) -> str:
    """Those that say something, as one."""
    return "; ".join(filter(None, notes))


def _instead(dtype: torch.dtype, other: str) -> str:
    wider = f"use --scale-dtype {other}, or " if dtype == torch.float16 and other else ""
    return f"{wider}leave this layer dense with --ignore"


def _unit(w: Tensor) -> float:
    """A power of two near the largest number of w, 1 for zeros: squares of w over it neither overflow nor vanish."""
    low, high = map(float, torch.aminmax(w)) if w.numel() else (0.0, 0.0)  # no copy of w
    largest = max(-low, high)
    return math.ldexp(1.0, max(math.frexp(largest)[1], -126)) if largest > 0 else 1.0


def panels(n: int, k: int, size: int | None = None, multiple: int = 1) -> list[slice]:
    """Row slices that cover n rows of k columns, each of at most `size` weights (PANEL if None), but at least of `multiple` rows.

    Each slice starts at a multiple of `multiple`.
    """
    rows = max(1, (PANEL if size is None else size) // max(k, 1) // multiple) * multiple
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def relative_error(w: Tensor, packed: PackedWeight, stats: LayerStats | None, path: tuple[Tensor, Tensor] | None = None) -> float:
    """sqrt(tr(E H ET) / tr(W H WT)) with E = W - packed and H the mean of x xT; without a Hessian, or with one of zeros, the norm of E over
    the norm of W.

    w float32 [n, k]. With a Hessian this is the relative root-mean-square error of the layer's outputs on the calibration inputs: the square
    *root* of the error ratio. 0 for a perfect copy, also of zeros; inf when something stands where only zeros were. With a path A [r, k],
    B [n, r] beside the packed weight E = W - packed - B A.
    """
    hessian = None if stats is None or stats.hessian is None else _whole(stats.hessian.to(w.device, torch.float32))
    wrong, whole, unit = 0.0, 0.0, _unit(w)
    for rows in panels(w.shape[0], w.shape[1], multiple=layout.ROWS):
        wrong += _energy(_difference(w, packed, rows, path) / unit, hessian)
        whole += _energy(w[rows] / unit, hessian)
    if wrong <= 0.0:
        return 0.0
    return math.sqrt(wrong / whole) if whole > 0 and math.isfinite(wrong) else math.inf


def _whole(hessian: Tensor) -> Tensor | None:
    """H [k, k] over a power of two, so that its products neither overflow nor vanish; None where all inputs were zero."""
    return hessian / _unit(hessian) if bool(hessian.any()) else None


def dense_rows(packed: PackedWeight, rows: slice) -> Tensor:
    """The rows [start, stop) of the dense weight, float32; start is a multiple of a tile's rows."""
    words = packed.words[rows.start // layout.ROWS : -(-rows.stop // layout.ROWS)]
    learned, zero = packed.learned[rows], None if packed.zero is None else packed.zero[rows]
    stored = reference.dequantize(words, learned, zero, packed.bits, packed.group, rows.stop - rows.start, packed.shape[1], torch.float32)
    return packed.in_order(stored)


def _difference(w: Tensor, packed: PackedWeight, rows: slice, path: tuple[Tensor, Tensor] | None) -> Tensor:
    e = w[rows] - dense_rows(packed, rows)
    return e if path is None else torch.addmm(e, path[1][rows], path[0], alpha=-1)


def _energy(e: Tensor, hessian: Tensor | None) -> float:
    """tr(e H eT), or the squared norm of e [n, k]."""
    seen = e if hessian is None else e @ hessian
    return float((seen * e).sum(dtype=torch.float64))
