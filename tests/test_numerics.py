"""Packers on weights and inputs that numbers break on: a reconstruction within a stated bound, or NumericError; never anything between.

The layer's name is added by whoever knows it; tests/pipelines/test_numerics.py sees that it is.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericError
from compressor.packed import PackedWeight, Table
from compressor.packing import relative_error
from compressor.pipelines.packers import PACKERS
from compressor.recipe import Quant
from compressor.stats import LayerStats

N, K, GROUP = 12, 64, 32
BOUND = {2: 0.62, 3: 0.35, 4: 0.2, 8: 0.02}  # ||W - packed|| / ||W||, of normal weights at these group sizes; squeezellm's, which weighs, x 1.5
KINDS = [(packer, bits, symmetric) for packer, kind in PACKERS.items() for bits in (2, 3, 4, 8) for symmetric in (True, False)
         if not (kind.table and (bits == 8 or not symmetric))]  # fmt: skip


def normal() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05


def changed(change: Callable[[Tensor], object]) -> Tensor:
    w = normal()
    change(w)
    return w


def inputs(x: Tensor | None = None) -> LayerStats:
    stats = LayerStats(K)
    stats.add(torch.randn(256, K, generator=torch.Generator().manual_seed(1)) if x is None else x)
    stats.fisher = normal().square()
    return stats


def pack(
    w: Tensor, stats: LayerStats | None, packer: str, bits: int, symmetric: bool, dtype: torch.dtype = torch.float16
) -> tuple[PackedWeight, dict]:
    options = Quant(bits=bits, packer=packer, symmetric=symmetric)
    return PACKERS[packer](w, stats, options, K if PACKERS[packer].table else GROUP, dtype)


def off(w: Tensor, packed: PackedWeight) -> float:
    dense = packed.dequantize().double()
    assert bool(torch.isfinite(dense).all()) and bool(torch.isfinite(packed.learned).all())
    return float((w.double() - dense).norm() / w.double().norm())


NEAR = {  # weights that every packer comes near to, values in float16
    "huge": lambda: normal() * 2e5,  # 1e4
    "row of zeros": lambda: changed(lambda w: w[3].zero_()),
    "group of zeros": lambda: changed(lambda w: w[:, :GROUP].zero_()),
    "rank one": lambda: torch.outer(normal()[:, 0], normal()[0]),
    "half of the rows tiny": lambda: changed(lambda w: w[: N // 2].mul_(1e-7)),
    "bf16 denormals among others": lambda: changed(lambda w: w[:, ::2].fill_(1e-39)),
    "outlier channel": lambda: changed(lambda w: w[:, 5].mul_(1000)),
    "outlier row": lambda: changed(lambda w: w[3].mul_(1000)),
    "duplicates": lambda: normal().sign().add(0.5),
}
EXACT = {  # weights that every packer holds exactly, or to the digits of float16
    "zeros": lambda: torch.zeros(N, K),
    "constant": lambda: torch.full((N, K), 0.25),
    "constant below zero": lambda: torch.full((N, K), -0.25),
}


@pytest.mark.parametrize(("packer", "bits", "symmetric"), KINDS)
def test_hard_weights_are_packed_within_a_bound(packer: str, bits: int, symmetric: bool) -> None:
    for name, make in NEAR.items():
        w, stats = make(), inputs()
        packed, row = pack(w, stats, packer, bits, symmetric)
        assert off(w, packed) < BOUND[bits] * (1.5 if packer == "squeezellm" else 1), name
        assert 0 <= relative_error(w, packed, stats) < math.inf and row["note"] == "", name
        if name == "row of zeros":
            assert not packed.dequantize()[3].any()
    for name, make in EXACT.items():
        w, stats = make(), inputs()
        packed, _ = pack(w, stats, packer, bits, symmetric)
        assert float((packed.dequantize() - w).abs().max()) <= 0.25 * 2**-6, name
        assert relative_error(w, packed, stats) < 2**-6 and relative_error(w, packed, None) < 2**-6, name


@pytest.mark.parametrize(("packer", "bits", "symmetric"), KINDS)
def test_small_groups_beside_large_ones_lose_no_more_than_a_step(packer: str, bits: int, symmetric: bool) -> None:
    w = changed(lambda w: w[::2].mul_(1e-7))
    packed, _ = pack(w, inputs(), packer, bits, symmetric)
    assert float((w - packed.dequantize())[::2].abs().max()) <= torch.finfo(torch.float16).tiny


@pytest.mark.parametrize(("packer", "bits", "symmetric"), KINDS)
@pytest.mark.parametrize(
    ("w", "dtype", "message"),
    [
        (1e-8, torch.float16, "below what float16 values resolve: use --scale-dtype float32, or leave"),
        (1e-39, torch.float16, "below what float16 values resolve: leave this layer dense with --ignore"),
        (1e-41, torch.bfloat16, "below what bfloat16 values resolve: leave this layer dense with --ignore"),
        (1e8, torch.float16, "beyond the range of float16: use --scale-dtype bfloat16, or leave"),
    ],
)
def test_what_the_dtype_cannot_hold_is_an_error(packer: str, bits: int, symmetric: bool, w: float, dtype: torch.dtype, message: str) -> None:
    for stats in (inputs(), None, inputs(torch.zeros(4, K))):
        with pytest.raises(NumericError, match=message):
            pack(normal() * (w / 0.05), stats, packer, bits, symmetric, dtype)


@pytest.mark.parametrize(("packer", "bits", "symmetric"), KINDS)
@pytest.mark.parametrize(("size", "dtype"), [(1e-8, torch.bfloat16), (1e-20, torch.float32), (1e9, torch.bfloat16), (1e30, torch.float32)])
def test_another_dtype_holds_it(packer: str, bits: int, symmetric: bool, size: float, dtype: torch.dtype) -> None:
    w, stats = normal() * size / 0.05, inputs()
    packed, _ = pack(w, stats, packer, bits, symmetric, dtype)
    assert off(w, packed) < BOUND[bits] * 1.5
    assert relative_error(w, packed, None) == pytest.approx(off(w, packed), rel=1e-3), "neither overflow nor underflow in the report"


@pytest.mark.parametrize(("packer", "bits", "symmetric"), KINDS)
def test_weights_that_are_not_finite_are_counted(packer: str, bits: int, symmetric: bool) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        w = changed(lambda w, bad=bad: w[3].__setitem__(5, bad))
        with pytest.raises(NumericError, match=f"1 of {N * K} weights are NaN or infinite"):
            pack(w, inputs(), packer, bits, symmetric)


X = torch.randn(256, K, generator=torch.Generator().manual_seed(1))
INPUTS = {
    "rank one": torch.outer(X[:, 0], X[0]), "one token": X[:1], "all alike": torch.ones(256, K), "large": X * 1e15, "faint": X * 1e-15,
    "outlier": X * torch.where(torch.arange(K) == 3, 1000.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize(("packer", "bits", "symmetric"), [kind for kind in KINDS if PACKERS[kind[0]].needs])
def test_hard_inputs(packer: str, bits: int, symmetric: bool) -> None:
    for name, x in INPUTS.items():
        for size in (1.0, 0.1, 2e5):
            w, stats = normal() * size, inputs(x)
            packed, row = pack(w, stats, packer, bits, symmetric)
            assert off(w, packed) < 1.5 * BOUND[bits], name
            assert 0 <= relative_error(w, packed, stats) < (1 if packer == "squeezellm" else BOUND[bits]) and row.get("damp", 0.01) == 0.01, name


@pytest.mark.parametrize("packer", ["gptq", "sketch"])
def test_inputs_that_were_always_zero_are_said(packer: str) -> None:
    w, dead = normal(), torch.arange(K) < 5
    _, row = pack(w, inputs(X * ~dead), packer, 3, True)
    assert row["note"] == "5 of 64 inputs were always zero in the calibration text" and "packer" not in row
    packed, row = pack(w, stats := inputs(X * 0), packer, 3, True)
    assert row["note"].startswith("all its calibration inputs were zero; ") and row["packer"] in ("rtn", "kmeans")
    assert off(w, packed) < BOUND[3] and relative_error(w, packed, stats) == relative_error(w, packed, None) > 0.1


@pytest.mark.parametrize("packer", ["gptq", "sketch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_second_moment_that_is_not_finite_is_not_used(packer: str, bad: float) -> None:
    stats = inputs()
    assert stats.hessian is not None
    stats.hessian[3, 4] = stats.hessian[4, 3] = bad
    packed, row = pack(normal(), stats, packer, 3, True)
    assert "not finite" in row["note"] and row["packer"] in ("rtn", "kmeans")
    assert off(normal(), packed) < BOUND[3]
    stats.hessian[3, 3] = bad
    with pytest.raises(NumericError, match=r"inputs of model\.layers\.0\.q"):
        stats.check("model.layers.0.q")


@pytest.mark.parametrize("packer", ["sketch", "squeezellm"])
@pytest.mark.parametrize("values", [1, 2, 5])
def test_sketches_of_few_different_values_are_exact(packer: str, values: int) -> None:
    w = torch.randint(0, values, (N, K), generator=torch.Generator().manual_seed(3)) * 0.5 - 0.75
    packed, _ = pack(w, inputs(), packer, 3, True)
    assert isinstance(packed.values, Table) and float((packed.dequantize() - w).abs().max()) < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_one_column_are_exact_to_the_digits_of_the_scale(bits: int, symmetric: bool) -> None:
    for packer in ("rtn", "gptq"):
        packed, _ = PACKERS[packer](normal(), inputs(), Quant(bits=bits, packer=packer, symmetric=symmetric), 1, torch.float16)
        assert off(normal(), packed) < 2**-9, packer


def test_an_error_where_only_zeros_were_is_infinite_and_of_zeros_is_none() -> None:
    packed, _ = pack(normal(), None, "rtn", 3, True)
    assert relative_error(torch.zeros(N, K), packed, None) == math.inf
    assert relative_error(packed.dequantize(), packed, None) == 0
