"""Scales on the grid of GGUF's K types: snapping is a projection, and what is tuned on it is exact in the file."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import ModelError, RecipeError
from compressor.export import gguf_blocks
from compressor.linear import packed_linears
from compressor.tune.batches import CausalLM
from compressor.tune.kgrid import GRIDS, GridPeqa, snap
from compressor.tune.loop import train

WIDE = {"hidden_size": 256, "intermediate_size": 512}
STORED = (torch.float16, torch.bfloat16, torch.float32)
BITS = {"q4_k": 4, "q3_k": 3, "q2_k": 2}


def scales(n: int, count: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    """Scales around 0.01, log-normal."""
    return torch.exp(torch.randn(n, count, generator=torch.Generator().manual_seed(seed)) * spread) * 0.01


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(list(GRIDS)),
    dtype=st.sampled_from(STORED),
    group=st.sampled_from([32, 64, 128, 256, 512]),
    exponent=st.integers(-14, 10),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    seed=st.integers(0, 999),
)
def test_snapping_is_idempotent_positive_and_on_the_grid(kind, dtype, group, exponent, spread, seed):
    start = (scales(5, 1024 // group, seed, spread) * 2.0**exponent).clamp(2.0**-20, 1000).to(dtype)
    once = snap(start, group, 1024, kind)
    assert once.dtype == dtype and bool((once > 0).all())
    assert torch.equal(snap(once, group, 1024, kind), once)
    codes = torch.randint(0, 1 << BITS[kind], (5, 1024), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    weight = gguf_blocks.PackedWeight.pack(codes, gguf_blocks.Affine(once), BITS[kind], group)
    assert gguf_blocks.exact(weight, kind)


@pytest.mark.parametrize(("kind", "group", "limit"), [("q4_k", 128, 0.012), ("q4_k", 32, 0.02), ("q3_k", 128, 0.012), ("q3_k", 32, 0.03)])
def test_what_snapping_costs(kind, group, limit):
    """Scales that differ as those of trained layers do, by some 15 percent: the relative error of snapping, and so of the weights."""
    start = scales(64, 1024 // group, 1, 0.15).half()
    found = float((snap(start, group, 1024, kind).float() - start.float()).norm() / start.float().norm())
    assert 0 < found < limit


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("parametrization", ["relative", "absolute"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_was_tuned_is_exact_in_the_file(packed_llama, options, windows, kind, parametrization, dtype):
    model = packed_llama(bits=BITS[kind], group=64, dtype=dtype, **WIDE)
    chosen = options(parametrization=parametrization, steps=4, lr=2e-2 if parametrization == "relative" else 2e-3)
    tuner = GridPeqa(chosen, kind)
    parameters = tuner.attach(model)
    start = {name: layer.packed() for name, layer in packed_linears(model).items()}
    assert all(torch.equal(weight.learned, snap(weight.learned, 64, weight.shape[1], kind)) for weight in start.values())
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    train(model, parameters, CausalLM(*windows), chosen, 5, None, "a")
    tuned = model(windows[0]).logits
    tuner.detach(model)
    assert torch.equal(model(windows[0]).logits, tuned)
    for name, layer in packed_linears(model).items():
        weight = layer.packed()
        assert layer.tuned is None and weight.learned.dtype == dtype
        assert not torch.equal(weight.learned, start[name].learned)
        assert gguf_blocks.exact(weight, kind)
        data = gguf_blocks.encode(weight, kind)
        assert torch.equal(gguf_blocks.decode(data, kind, weight.shape), weight.dequantize())


def test_without_a_grid_the_file_is_not_exact(packed_llama, options):
    layer = next(iter(packed_linears(packed_llama(bits=4, group=64, **WIDE)).values()))
    assert not gguf_blocks.exact(layer.packed(), "q4_k")


def test_the_gradient_passes_the_rounding(packed_llama, options):
    model = packed_llama(bits=4, group=64, **WIDE)
    GridPeqa(options(), "q4_k").attach(model)
    layer = next(iter(packed_linears(model).values()))
    wanted = torch.randn(layer.learned.shape, generator=torch.Generator().manual_seed(3))
    (layer.tuned() * wanted).sum().backward()
    assert torch.allclose(layer.tuned.delta.grad, wanted * layer.learned.float())


def test_layers_beside_the_grid_are_tuned_as_ever(packed_llama, options):
    """Rows of 288 columns hold no blocks of 256."""
    model = packed_llama(bits=4, group=32, hidden_size=256, intermediate_size=288)
    before = {name: layer.learned.clone() for name, layer in packed_linears(model).items()}
    tuner = GridPeqa(options(), "q4_k")
    parameters = tuner.attach(model)
    tuner.detach(model)
    for name, layer in packed_linears(model).items():
        assert torch.equal(layer.learned, before[name]) == (layer.in_features == 288)
    assert len(parameters) == len(before)


@pytest.mark.parametrize("kind", GRIDS)
def test_dead_groups_stay_dead(packed_llama, options, windows, kind):
    """Scales of 0 next to others: in the snapped scales, while they are tuned, and in the file."""
    start = scales(3, 8, 1).half()
    start[1, 2], start[2] = 0, 0
    once = snap(start, 32, 256, kind)
    assert torch.equal(once == 0, start == 0) and torch.equal(snap(once, 32, 256, kind), once)
    model = packed_llama(bits=BITS[kind], group=64, **WIDE)
    first = next(iter(packed_linears(model).values()))
    first.learned[0, 0] = 0
    chosen, tuner = options(steps=3, lr=2e-2), GridPeqa(options(), kind)
    train(model, tuner.attach(model), CausalLM(*windows), chosen, 5, None, "a")
    tuner.detach(model)
    assert first.learned[0, 0] == 0 and int((first.learned == 0).sum()) == 1
    assert gguf_blocks.exact(first.packed(), kind)


@pytest.mark.parametrize(("group", "scale"), [(64, -0.01), (64, 4e4), (64, 1e-9), (256, 600.0)])
def test_scales_beyond_the_grid_are_refused(packed_llama, options, group, scale):
    """The grid would turn them into others without a word; layers beside it may hold any."""
    model = packed_llama(bits=4, group=group, dtype=torch.float32, **WIDE)
    next(iter(packed_linears(model).values())).learned[0, 0] = scale
    with pytest.raises(ModelError, match="scale"):
        GridPeqa(options(), "q4_k").attach(model)


def test_a_model_without_a_place_on_the_grid_is_left_alone(packed_llama, options):
    model = packed_llama(bits=4)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(before.values())
    with pytest.raises(ModelError, match="no packed layer"):
        GridPeqa(options(), "q4_k").attach(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_zeros_stay_and_what_does_not_go(packed_llama, options):
    assert not snap(torch.zeros(2, 4).half(), 64, 256, "q4_k").any()
    with pytest.raises(RecipeError, match="q5_k"):
        snap(torch.ones(2, 4), 64, 256, "q5_k")
    with pytest.raises(RecipeError, match="q5_k"):
        GridPeqa(options(), "q5_k")
    for group, k in ((96, 768), (16, 256), (32, 288)):
        with pytest.raises(RecipeError, match="no place"):
            snap(torch.ones(2, k // group), group, k, "q4_k")
    narrow = packed_llama(bits=4)
    with pytest.raises(ModelError, match="no packed layer"):
        GridPeqa(options(), "q4_k").attach(narrow)
    assert all(layer.tuned is None for layer in packed_linears(narrow).values())
    for layout in ({"symmetric": False}, {"bits": 4}):
        with pytest.raises(ModelError, match="symmetric"):
            GridPeqa(options(), "q3_k").attach(packed_llama(group=64, **WIDE, **layout))
