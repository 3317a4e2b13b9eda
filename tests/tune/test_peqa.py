import pytest
import torch
from torch import nn

from compressor.errors import ModelError, NumericError
from compressor.linear import packed_linears
from compressor.tune import TUNERS
from compressor.tune.batches import CausalLM
from compressor.tune.dense import Dense
from compressor.tune.loop import train
from compressor.tune.peqa import Peqa, ScaleTuning
from compressor.tune.table import TableTuner
from tests.tune.helpers import backward, dense_backward

STORED = (torch.float16, torch.bfloat16, torch.float32)


def test_attach_freezes_all_but_what_it_returns(packed_llama, options):
    model = packed_llama()
    model.requires_grad_(True)
    parameters = Peqa(options()).attach(model)
    free = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert free.keys() == parameters.keys() and all(free[name] is p for name, p in parameters.items())
    assert len(parameters) == 14 and "model.layers.0.self_attn.q_proj.tuned.delta" in parameters
    assert all(p.dtype == torch.float32 and not p.any() for p in parameters.values())
    assert sum(p.numel() for p in parameters.values()) == sum(layer.learned.numel() for layer in packed_linears(model).values())


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize("bits, group, symmetric", [(2, 32, True), (3, 96, False), (4, 16, False)])
def test_gradient_is_that_of_the_dense_fake_quantised_layer(packed_layer, kind, bits, group, symmetric):
    layer = packed_layer(bits, group, symmetric)
    n, k = layer.out_features, layer.in_features
    layer.tuned = tuning = ScaleTuning(layer.learned, kind == "relative")
    _, parameter = tuning.parameter()
    x, wanted = backward(layer)

    scale = layer.learned.double().requires_grad_(True)
    zero = torch.tensor(float(1 << (bits - 1))) if symmetric else layer.zero.double().unsqueeze(-1)
    steps = layer.packed().codes().double().view(n, k // group, group) - zero
    dense_grad = dense_backward(x, (scale.unsqueeze(-1) * steps).view(n, k), wanted)

    expected = scale.grad * layer.learned.double() if kind == "relative" else scale.grad
    torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    torch.testing.assert_close(x.grad.double(), dense_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_scale_is_snapped_to_its_dtype_with_a_straight_gradient(dtype):
    start = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)).add(0.01).to(dtype)
    tuning = ScaleTuning(start, relative=False)
    with torch.no_grad():
        tuning.scale.mul_(1 + 1e-5)
    scale = tuning()
    assert scale.dtype == torch.float32 and torch.equal(scale, scale.to(dtype).float())
    assert torch.equal(scale, start.float() * (1 + 1e-5)) if dtype == torch.float32 else torch.equal(scale, start.float())
    scale.backward(weight := torch.rand(5, 3) * 1e-9)  # too small for float16: the gradient must not pass through the stored dtype
    assert torch.equal(tuning.scale.grad, weight)


@pytest.mark.parametrize("relative", [True, False])
def test_scale_stays_positive_and_finite(relative):
    start = torch.tensor([[1.0, 1.0, 1.0, 60000.0, 6e-8, 0.0]], dtype=torch.float16)
    tuning = ScaleTuning(start, relative)
    wanted = torch.tensor([[-3.0, 0.05, 0.5, 2.0, 0.01, 1.0]])  # times the start
    with torch.no_grad():
        _, parameter = tuning.parameter()
        parameter.copy_(wanted - 1 if relative else wanted * start.float())
    scale = tuning()
    tenth = torch.tensor(0.1).half().item()
    assert scale.tolist() == [[tenth, tenth, 0.5, 65504.0, start[0, 4].item(), 0.0]]
    for sign, passed in ((1, [False, False, True, True, False]), (-1, [True, True, True, False, True])):
        parameter.grad = None
        (tuning() * sign).sum().backward()
        assert (parameter.grad * sign > 0).tolist()[0][:5] == passed, "outside its limits a scale gets the gradient that leads back, no other"


@pytest.mark.parametrize("relative", [True, False])
def test_negative_scales_are_tuned_as_positive_ones_are(relative):
    """Values, limits and gradients are those of the positive scale with the sign turned."""
    start = torch.tensor([[1.0, 1.0, 60000.0, 6e-8]], dtype=torch.float16)
    wanted, found = torch.tensor([[-3.0, 0.5, 2.0, 0.01]]), []
    for sign in (1, -1):
        tuning = ScaleTuning(sign * start, relative)
        _, parameter = tuning.parameter()
        with torch.no_grad():
            parameter.copy_(wanted - 1 if relative else wanted * sign * start.float())
        scale = tuning()
        scale.sum().backward()
        found.append((sign * scale.detach(), parameter.grad * sign if relative else parameter.grad))
    assert torch.equal(found[0][0], found[1][0]) and bool((found[0][0] > 0).all())
    assert torch.equal(found[0][1][:, 1], found[1][1][:, 1])  # inside the limits; at a limit the gradient that leads back has the other sign


@pytest.mark.parametrize("relative, lr", [(True, 0.2), (False, 0.2)])
def test_a_master_below_the_floor_returns(relative, lr):
    tuning = ScaleTuning(torch.ones(1, 1, dtype=torch.float16), relative)
    _, parameter = tuning.parameter()
    with torch.no_grad():
        parameter.sub_(1.5)
    for _ in range(30):
        (grad,) = torch.autograd.grad((tuning() - 0.8).square().sum(), parameter)
        with torch.no_grad():
            parameter.sub_(lr * grad)
    assert tuning().item() == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("relative", [True, False])
def test_nothing_is_kept_for_backward_but_what_exists_anyway(relative):
    tuning = ScaleTuning(torch.rand(6, 4).add(0.1).half(), relative)
    _, parameter = tuning.parameter()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        tuning()
    assert saved and set(saved) <= {parameter.data_ptr(), tuning.start.data_ptr()}


@pytest.mark.parametrize("kind, lr", [("relative", 2e-2), ("absolute", 2e-3)])
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_both_parametrisations_learn(packed_llama, options, windows, kind, lr, dtype):
    model = packed_llama(dtype=dtype)
    ids, labels = windows[0][:4], windows[0][:4]
    tuner = Peqa(options(parametrization=kind))
    log = train(model, tuner.attach(model), CausalLM(ids, labels), options(steps=25, lr=lr, schedule="constant"), 0, None, "")
    losses = [row["loss"] for row in log.curve]
    assert losses[-1] < losses[0] - 0.3, losses
    tuner.detach(model)
    with torch.no_grad():
        assert model(ids, labels=labels).loss.item() < losses[0] - 0.3


def test_a_tuned_model_moves_devices(packed_layer):
    tuning = ScaleTuning(packed_layer().learned).to("meta")
    assert tuning.start.device.type == tuning.delta.device.type == "meta"
    assert tuning.start.dtype == torch.float16 and tuning.delta.dtype == torch.float32


def test_bad_models_are_refused_by_name(packed_llama, dense_model, options):
    with pytest.raises(ModelError, match="no packed linear"):
        Peqa(options()).attach(dense_model())
    model = packed_llama()
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.learned[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"model\.layers\.1\.mlp\.up_proj"):
        Peqa(options()).attach(model)
    assert all(m.tuned is None for m in packed_linears(model).values())
    layer.learned[0, 0] = 1.0
    parameters = Peqa(options()).attach(model)
    with pytest.raises(ModelError, match="already"):
        Peqa(options()).attach(model)
    stored = layer.learned.clone()
    with torch.no_grad():
        parameters["model.layers.1.mlp.up_proj.tuned.delta"][2, 0] = float("nan")
    with pytest.raises(NumericError, match=r"model\.layers\.1\.mlp\.up_proj"):
        Peqa(options()).detach(model)
    assert torch.equal(layer.learned, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_control_trains_and_detaches_exactly(dense_model, options, windows, dtype):
    model = dense_model().to(dtype)
    names = [name for name, _ in model.named_parameters()]
    tuner = Dense(options())
    parameters = tuner.attach(model)
    assert len(parameters) == 14 and all(p.dtype == torch.float32 for p in parameters.values())
    log = train(model, parameters, CausalLM(windows[0][:4], windows[0][:4]), options(steps=8, lr=3e-3), 0, None, "")
    assert log.curve[-1]["loss"] < log.curve[0]["loss"] - 0.3
    tuned = model(windows[0]).logits
    tuner.detach(model)
    assert torch.equal(model(windows[0]).logits, tuned)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(type(m) is nn.Linear and m.weight.dtype == dtype for m in model.modules() if isinstance(m, nn.Linear))


def test_dense_control_needs_dense_linears(packed_llama, options):
    with pytest.raises(ModelError, match="no dense linear"):
        Dense(options()).attach(packed_llama())


def test_the_control_is_not_offered():
    assert TUNERS["peqa"] is Peqa and TUNERS["table"] is TableTuner and Dense not in TUNERS.values()


def test_tables_are_refused(sketched_llama, options):
    model = sketched_llama()
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj holds tables.*--tune table"):
        Peqa(options()).attach(model)
    assert all(layer.tuned is None for layer in packed_linears(model).values())
