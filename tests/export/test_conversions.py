"""The same weight in other terms: exact where it is said to be, on any weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import ModelError
from compressor.export import conversions
from compressor.packed import Affine, PackedWeight, Table

quick = settings(max_examples=40, deadline=None)


@st.composite
def weights(draw: st.DrawFn, negative: bool = False) -> PackedWeight:
    bits, group, groups, n = (
        draw(st.sampled_from((2, 3, 4, 8))),
        draw(st.sampled_from((4, 16, 32))),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 70)),
    )
    make = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    scale = (torch.rand(n, groups, generator=make) + 0.01).to(draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))))
    if negative:
        scale = torch.where(torch.rand(n, groups, generator=make) < 0.5, -scale, scale)
    kind = draw(st.sampled_from(("none", "integer", "float")))
    zero = torch.randint(1 << bits, (n, groups), generator=make, dtype=torch.uint8)
    zeros = None if kind == "none" else zero if kind == "integer" else zero.half() + torch.rand(n, groups, generator=make).half()
    columns = torch.randperm(group * groups, generator=make) if draw(st.booleans()) else None
    codes = torch.randint(1 << bits, (n, group * groups), generator=make, dtype=torch.uint8)
    return PackedWeight.pack(codes, Affine(scale, zeros), bits, columns=columns)


@quick
@given(weights(), st.sampled_from((2, 3, 4, 8)))
def test_wider_fields_hold_the_same_numbers(weight: PackedWeight, bits: int) -> None:
    if bits < weight.bits:
        with pytest.raises(ModelError, match=f"cannot be written in fields of {bits} bits"):
            conversions.widened(weight, bits)
        return
    wide = conversions.widened(weight, bits)
    assert wide.bits == bits and torch.equal(wide.dequantize(), weight.dequantize())
    assert (wide.zero is None) == (weight.zero is None)


@quick
@given(weights(negative=True))
def test_no_scale_is_negative_and_no_number_changes(weight: PackedWeight) -> None:
    found = conversions.positive(weight)
    assert found is weight if weight.float_zeros else bool((found.learned > 0).all())
    assert torch.equal(found.dequantize(torch.float64), weight.dequantize(torch.float64))


@quick
@given(weights())
def test_tables_hold_the_values_of_every_group(weight: PackedWeight) -> None:
    if weight.bits == 8 or weight.columns is not None:
        with pytest.raises(ModelError, match="columns are in order"):
            conversions.as_tables(weight)
        return
    assert torch.equal(conversions.as_tables(weight, torch.float32).dequantize(), weight.dequantize())
    stored = conversions.as_tables(weight)
    assert stored.learned.dtype == weight.learned.dtype and stored.group == weight.group
    assert torch.equal(stored.dequantize(), weight.dequantize().to(weight.learned.dtype).float())
    assert conversions.as_tables(stored) is stored


def test_tables_have_no_wider_fields_and_no_sign() -> None:
    table = PackedWeight.pack(torch.zeros(4, 32, dtype=torch.uint8), Table(-torch.ones(4, 1, 8)), 3, 32)
    assert conversions.positive(table) is table
    with pytest.raises(ModelError, match="a table cannot be written"):
        conversions.widened(table, 4)
