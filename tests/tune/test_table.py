import math

import pytest
import torch
from torch import nn

from compressor.errors import ModelError, NumericError, RecipeError
from compressor.kernels import reference
from compressor.linear import packed_linears
from compressor.pipelines.methods import check_methods, check_names
from compressor.pipelines.run import Run
from compressor.pipelines.show import Show
from compressor.recipe import Recipe, Tune
from compressor.tune import TUNERS, resolved
from compressor.tune.batches import CausalLM
from compressor.tune.loop import train
from compressor.tune.table import LEAST_UNIT, EntryTuning, TableTuner, sizes
from tests.tune.helpers import Killed, backward, dense_backward, kill_at, same

STORED = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("relative", "absolute")


@pytest.fixture
def table_options(options):
    return lambda **keys: options(**{"method": "table", **keys})


def go(model, windows, options, folder=None, seed=5, **hooks):
    """Attach and train; returns (log, parameters)."""
    parameters = TableTuner(options).attach(model)
    return train(model, parameters, CausalLM(*windows), options, seed, folder, "a", **hooks), parameters


def bits_of(t):
    """The stored bits, so that the sign of a zero counts."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def random_table(dtype, seed=0):
    """[6, 3, 8] with zeros of both signs, subnormal numbers and rows of very different sizes."""
    table = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 2, 6).view(6, 1, 1)
    table[0, 0, :3] = torch.tensor([0.0, -0.0, 3e-8])
    table[1, 2] = 0
    table[2, 1, 0] = torch.finfo(dtype).max
    return table.to(dtype)


# --- what is trained -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, group", [(2, 32), (3, 40), (4, -1)])
def test_attach_frees_the_tables_and_nothing_else(sketched_llama, table_options, bits, group):
    model = sketched_llama(bits, group)
    model.requires_grad_(True)
    parameters = TableTuner(table_options()).attach(model)
    free = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert free.keys() == parameters.keys() and all(free[name] is p for name, p in parameters.items())
    assert len(parameters) == 14 and "model.layers.0.self_attn.q_proj.tuned.delta" in parameters
    assert all(p.dtype == torch.float32 for p in parameters.values())
    for name, layer in packed_linears(model).items():
        n, k = layer.out_features, layer.in_features
        count = n * (1 if group == -1 else math.ceil(k / group)) * 2**bits
        assert parameters[f"{name}.tuned.delta"].numel() == count
    assert not any("start" in key or "unit" in key for key in model.state_dict()), "what the tuner keeps is not part of the model"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group, k", [(32, 96), (64, 96), (40, 100), (-1, 96)])
def test_gradient_is_that_of_a_dense_gather(sketched_layer, kind, bits, group, k):
    layer = sketched_layer(bits, group, k=k)
    n = layer.out_features
    layer.tuned = tuning = EntryTuning(layer.learned, kind == "relative")
    _, parameter = tuning.parameter()
    x, wanted = backward(layer)

    values = layer.learned.double().requires_grad_(True)
    weight = values.reshape(n, -1).gather(1, reference.flat_codes(layer.words, bits, layer.group, n, k))
    dense_grad = dense_backward(x, weight, wanted)

    unit = layer.learned.double().square().mean(-1, keepdim=True).sqrt() if kind == "relative" else 1.0
    expected = values.grad * unit
    assert parameter.grad.dtype == torch.float32 and int((expected != 0).sum()) > 0.9 * expected.numel()
    torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(x.grad.double(), dense_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_stay_and_tables_learn(sketched_llama, table_options, windows, kind):
    model = sketched_llama()
    codes = {name: layer.words.clone() for name, layer in packed_linears(model).items()}
    tables = {name: layer.learned.clone() for name, layer in packed_linears(model).items()}
    tuner = TableTuner(table_options(parametrization=kind))
    ids = windows[0][:4]
    chosen = table_options(steps=20, lr=2e-2 if kind == "relative" else 2e-3, schedule="constant")
    log = train(model, tuner.attach(model), CausalLM(ids, ids), chosen, 0, None, "")
    assert log.curve[-1]["loss"] < log.curve[0]["loss"] - 0.3, log.curve
    tuner.detach(model)
    for name, layer in packed_linears(model).items():
        assert torch.equal(layer.words, codes[name]) and not torch.equal(layer.learned, tables[name])
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() < log.curve[0]["loss"] - 0.3


def test_backward_keeps_the_packed_buffers_and_x_but_no_dense_weight(sketched_layer):
    layer = sketched_layer()
    layer.tuned = tuning = EntryTuning(layer.learned)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        values = tuning()
    assert {t.data_ptr() for t in saved} == {tuning.delta.data_ptr(), tuning.start.data_ptr(), tuning.unit.data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(5, 96))
    assert not any(t.is_floating_point() and t.numel() > max(values.numel(), 5 * 96) for t in saved)


# --- start, rounding, limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_start_is_exact_to_the_sign_of_zero(relative, dtype):
    start = random_table(dtype)
    table = EntryTuning(start, relative)()
    assert table.dtype == torch.float32 and torch.equal(bits_of(table.to(dtype)), bits_of(start))
    assert torch.equal(bits_of(table), bits_of(start.float()))
    assert bool(torch.signbit(start)[0, 0, 1]), "the test must hold a negative zero to test anything"


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_unit_is_the_size_of_each_table(dtype):
    start = random_table(dtype)
    start[3, 0] = 0
    start[3, 0, 5] = torch.finfo(dtype).smallest_normal
    start[4, 1] = torch.finfo(dtype).max
    unit = sizes(start)
    expected = start.double().square().mean(-1, keepdim=True).sqrt()
    expected[1, 2] = LEAST_UNIT
    assert unit.shape == (6, 3, 1) and unit.dtype == torch.float32 and bool((unit > 0).all()) and bool(torch.isfinite(unit).all())
    torch.testing.assert_close(unit.double(), expected, rtol=1e-6, atol=0)
    tuning = EntryTuning(start)
    with torch.no_grad():
        tuning.delta.fill_(0.0)[5, 2, 3] = 0.125
    assert tuning()[5, 2, 3].item() == (start[5, 2, 3].float() + unit[5, 2, 0] * 0.125).to(dtype).item()
    assert torch.equal(tuning()[:5], start.float()[:5])


def test_a_table_of_zeros_learns(table_options):
    tuning = EntryTuning(torch.zeros(1, 1, 4, dtype=torch.float16))
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=TableTuner.rates["relative"], weight_decay=0.0)
    for _ in range(20):
        tuning().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bool((tuning() < 0).all()) and tuning().max().item() > -1e-5


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_entries_are_snapped_to_their_dtype_with_a_straight_gradient(dtype):
    start = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    tuning = EntryTuning(start, relative=False)
    with torch.no_grad():
        tuning.table.mul_(1 + 1e-5)
    table = tuning()
    assert table.dtype == torch.float32 and torch.equal(table, table.to(dtype).float())
    assert torch.equal(table, start.float() * (1 + 1e-5)) if dtype == torch.float32 else torch.equal(table, start.float())
    table.backward(weight := torch.rand(5, 3, 4) * 1e-9)  # too small for float16: the gradient must not pass through the stored dtype
    assert torch.equal(tuning.table.grad, weight)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_entries_stay_finite_and_return(relative, dtype):
    top = torch.finfo(dtype).max
    start = torch.tensor([[[top, -top, top / 2, -top / 2]]], dtype=dtype)
    tuning = EntryTuning(start, relative)
    _, parameter = tuning.parameter()
    wanted = torch.tensor([[[1.0, -1.0, -0.25, 0.25]]])  # beyond the ends by a unit; within
    with torch.no_grad():
        if relative:
            parameter.copy_(wanted)
        else:
            parameter.copy_(torch.tensor([[[float("inf"), -float("inf"), top / 4, -top / 4]]]))
    table = tuning()
    assert table[0, 0, :2].tolist() == [top, -top] and bool((table.abs() < top)[0, 0, 2:].all()) and bool(torch.isfinite(table.to(dtype)).all())
    for sign, passed in ((1, [True, False, True, True]), (-1, [False, True, True, True])):
        parameter.grad = None
        (tuning() * sign).sum().backward()
        assert (parameter.grad * sign > 0).tolist()[0][0] == passed, "beyond an end an entry gets the gradient that leads back, no other"


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_master_learns_where_bfloat16_parameters_would_stand(kind):
    """Steps of 1e-4 on entries from 1 to 2, which bfloat16 holds in steps of 2**-7: every update rounds to nothing, their sum does not."""
    start = (1 + torch.rand(4, 2, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    tuning, plain = EntryTuning(start, kind == "relative"), nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([*tuning.parameters(), plain], lr=1e-4, weight_decay=0.0)
    moved = []
    for _ in range(120):
        (tuning().sum() + plain.float().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(float((tuning() != start.float()).float().mean()))
    assert torch.equal(plain, start), "bfloat16 parameters would have to stand still for this to show anything"
    assert moved[9] == 0.0 and moved[-1] == 1.0 and bool((tuning() < start.float()).all())


def test_a_tuned_model_moves_devices(sketched_layer):
    tuning = EntryTuning(sketched_layer().learned).to("meta")
    assert tuning.start.device.type == tuning.delta.device.type == tuning.unit.device.type == "meta"
    assert tuning.start.dtype == torch.float16 and tuning.delta.dtype == tuning.unit.dtype == torch.float32


# --- the loop ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(sketched_llama, table_options, windows, tmp_path, kind):
    chosen = table_options(steps=7, checkpoint_every=2, parametrization=kind, lr=1e-3)
    unbroken, expected = go(sketched_llama(group=64), windows, chosen)
    with pytest.raises(Killed):
        go(sketched_llama(group=64), windows, chosen, tmp_path, on_step=kill_at(5))
    log, parameters = go(sketched_llama(group=64), windows, chosen, tmp_path)
    assert log.resumed_from == 4 and log.curve == unbroken.curve and log.notes == [] and same(parameters, expected)


def test_a_step_moves_every_row_by_the_same_share(sketched_llama, table_options, windows):
    """What `relative` is for: Adam's first step is lr for every entry, so tables move in proportion to their size, however rows differ."""
    model = sketched_llama(dtype=torch.float32)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    layer.learned[::2] *= 0.01
    start = layer.learned.clone()
    go(model, windows, table_options(steps=1, lr=1e-2, clip=0.0))
    share = ((layer.packed().learned - start).abs() / sizes(start)).amax((1, 2))
    torch.testing.assert_close(share, torch.full_like(share, 1e-2), rtol=0.02, atol=0)


# --- errors --------------------------------------------------------------------------------------------------------------------------------


def test_bad_models_are_refused_by_name(sketched_llama, packed_llama, dense_model, table_options):
    tuner = TableTuner(table_options())
    with pytest.raises(ModelError, match="no packed linear"):
        tuner.attach(dense_model())
    scales = packed_llama()
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj holds scales.*--tune peqa") as caught:
        tuner.attach(scales)
    assert "\n" not in str(caught.value) and all(m.tuned is None for m in packed_linears(scales).values())
    model = sketched_llama()
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    kept, layer.learned[0, 0, 0] = layer.learned[0, 0, 0].item(), float("nan")
    with pytest.raises(NumericError, match=r"table of model\.layers\.1\.mlp\.up_proj"):
        tuner.attach(model)
    assert all(m.tuned is None for m in packed_linears(model).values())
    layer.learned[0, 0, 0] = kept
    parameters = tuner.attach(model)
    with pytest.raises(ModelError, match="already"):
        tuner.attach(model)
    stored = layer.learned.clone()
    with torch.no_grad():
        parameters["model.layers.1.mlp.up_proj.tuned.delta"][2, 0, 1] = float("nan")
    with pytest.raises(NumericError, match=r"model\.layers\.1\.mlp\.up_proj"):
        tuner.detach(model)
    assert torch.equal(layer.learned, stored)


@pytest.mark.parametrize(
    ("packer", "tuner", "words"),
    [("sketch", "peqa", "packer sketch makes tables: use --tune table"), ("gptq", "table", "packer gptq makes scales: use --tune peqa")],
)
def test_a_tuner_that_does_not_fit_its_packer_is_refused_before_any_work(tmp_path, packer, tuner, words):
    recipe = Recipe().with_(quant__packer=packer, tune__method=tuner, device="cpu")
    with pytest.raises(RecipeError, match=words):
        Run(recipe, tmp_path / "out", Show())
    check_names(recipe)  # both exist: a model that is packed already may hold either kind of values
    for fine in (recipe.with_(tune__method="none"), recipe.with_(tune__method="table" if packer == "sketch" else "peqa")):
        check_methods(fine)


# --- learning rates ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind", "lr"),
    [("peqa", "relative", 5e-3), ("peqa", "absolute", 2e-5), ("table", "absolute", 8e-5), ("table", "relative", TableTuner.rates["relative"])],
)
def test_each_tuner_has_its_own_learning_rate(method, kind, lr):
    options = Tune(method=method, parametrization=kind)
    assert options.lr is None and resolved(options) == Tune(method=method, parametrization=kind, lr=lr)
    assert resolved(Tune(method=method, parametrization=kind, lr=0.3)).lr == 0.3
    assert set(TUNERS[method].rates) == set(KINDS) and all(0 < rate < 0.1 for rate in TUNERS[method].rates.values())


def test_what_has_no_learning_rate_of_its_own():
    assert resolved(Tune()) == Tune()
    with pytest.raises(RecipeError, match="give one"):
        resolved(Tune(method="full"))


def test_the_loop_wants_a_learning_rate(sketched_llama, table_options, windows):
    with pytest.raises(RecipeError, match="no learning rate"):
        go(sketched_llama(), windows, table_options(lr=None))


@pytest.mark.parametrize("method", ["peqa", "table"])
def test_an_explicit_default_and_none_are_one_run(tmp_path, method):
    packer = "sketch" if method == "table" else "rtn"
    recipe = Recipe().with_(quant__packer=packer, tune__method=method, device="cpu")
    silent, explicit, other = (
        Run(recipe.with_(tune__lr=lr), tmp_path / "out", Show()) for lr in (None, TUNERS[method].rates["relative"], TUNERS[method].rates["absolute"])
    )
    assert silent.recipe == explicit.recipe and silent.report.recipe["tune"]["lr"] == TUNERS[method].rates["relative"]
    assert silent.key_tuned == explicit.key_tuned != other.key_tuned
