"""What holds for every tuner of values alike: what was trained is what is stored, in the dtype it is stored in."""

import pytest
import torch

from compressor.linear import packed_linears
from compressor.tune import TUNERS

STORED = (torch.float16, torch.bfloat16, torch.float32)
SCALES = [("peqa", {"symmetric": symmetric}) for symmetric in (True, False)]
TABLES = [("table", {"group": group}) for group in (40, 64, -1)]


@pytest.fixture
def make(packed_llama, sketched_llama):
    return {"peqa": packed_llama, "table": sketched_llama}


def move(parameters, by=0.05, seed=3):
    """Random relative changes, as training would make them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in parameters.items():
            noise = torch.randn(p.shape, generator=generator) * by
            p.add_(noise if name.endswith(".delta") else noise * p)


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize(("method", "layout"), SCALES + TABLES)
def test_detach_keeps_outputs_codes_and_dtype(make, options, windows, kind, dtype, method, layout):
    model, ids = make[method](dtype=dtype, **layout), windows[0]
    before = {name: {key: t.clone() for key, t in layer.packed().tensors().items()} for name, layer in packed_linears(model).items()}
    start = model(ids).logits
    tuner = TUNERS[method](options(method=method, parametrization=kind))
    parameters = tuner.attach(model)
    assert torch.equal(model(ids).logits, start), "attaching changed the model"
    move(parameters)
    tuned = model(ids).logits
    tuner.detach(model)
    assert torch.equal(model(ids).logits, tuned), "detaching changed the model"
    assert not torch.equal(tuned, start)
    moved = "scale" if method == "peqa" else "table"
    for name, layer in packed_linears(model).items():
        after = layer.packed().tensors()
        assert layer.tuned is None and layer.learned.dtype == dtype and layer.learned.is_contiguous()
        assert after.keys() == before[name].keys() and ("zero" in after) == (not layout.get("symmetric", True)) and moved in after
        assert all(torch.equal(after[key], t) == (key != moved) for key, t in before[name].items())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("cast", ["float", "half", "bfloat16", "double"])
@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize("method", ["peqa", "table"])
def test_casting_the_model_leaves_the_tuned_values(make, options, windows, kind, cast, method):
    model = make[method](dtype=torch.bfloat16 if cast == "half" else torch.float16)
    tuner = TUNERS[method](options(method=method, parametrization=kind))
    parameters = tuner.attach(model)
    move(parameters)
    for p in parameters.values():
        p.grad = torch.full_like(p, 1e-9)
    expected = {name: layer.packed().learned for name, layer in packed_linears(model).items()}
    getattr(model, cast)()
    assert all(model.get_parameter(name) is p and p.dtype == p.grad.dtype == torch.float32 and p.grad.all() for name, p in parameters.items())
    tuned = model(windows[0]).logits
    assert tuned.dtype == model.get_input_embeddings().weight.dtype
    tuner.detach(model)
    assert torch.equal(model(windows[0]).logits, tuned), "what was trained is not what is served"
    for name, layer in packed_linears(model).items():
        assert layer.learned.dtype == expected[name].dtype and torch.equal(layer.learned, expected[name])
