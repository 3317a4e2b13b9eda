"""QA-LoRA: zeros are its path, absorbed or not; codes stay, what was trained is what is stored, and folders hold it exactly."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import CompressorError, ModelError, NumericError, RecipeError
from compressor.export import compressed_tensors, integers
from compressor.linear import PackedLinear, linears, packed_linears
from compressor.packed import Affine, PackedWeight
from compressor.pipelines import formats, load, write
from compressor.pipelines.export import Target, export
from compressor.pipelines.run import Run
from compressor.pipelines.show import Show
from compressor.recipe import Quant, Recipe
from compressor.tune import TUNERS
from compressor.tune.batches import CausalLM
from compressor.tune.loop import train
from compressor.tune.peqa import Peqa
from compressor.tune.qalora import QaLora, ZeroTuning, float_zeros
from tests.integrations.damaged import refuses
from tests.tolerances import RELATIVE, error
from tests.tune.helpers import Killed, backward, kill_at, same

SHAPES = [(2, 32, True), (3, 96, False), (4, 16, False)]
STORED = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture
def chosen(options):
    return lambda **keys: options(**{"method": "qalora", "lr": 1e-2, **keys})


def tuned(layer: PackedLinear, rank: int = 2, relative: bool = True, moved: float = 0.3) -> ZeroTuning:
    """Attach to one layer, B moved away from zero."""
    draw = torch.Generator().manual_seed(3)
    layer.zero = float_zeros(layer)
    layer.tuned_zero = tuning = ZeroTuning(layer.zero, layer.learned, rank, 4.0, relative, draw)
    with torch.no_grad():
        size = layer.learned.float().mean() if not relative else 1.0
        tuning.b.normal_(0, moved, generator=draw).mul_(size)
    return tuning


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("bits", "group", "symmetric"), SHAPES)
@pytest.mark.parametrize("rank", [2, 5])
def test_gradients_are_those_of_the_path(packed_layer, relative: bool, bits: int, group: int, symmetric: bool, rank: int) -> None:
    layer = packed_layer(bits, group, symmetric, torch.float32)
    base = layer.packed().dequantize().double()
    tuning = tuned(layer, rank, relative)
    x, wanted = backward(layer)
    y = layer(x)

    a, b, wide = (t.detach().double().requires_grad_() for t in (tuning.a, tuning.b, x))
    assert a.shape == (min(rank, 96 // group), 96 // group)
    rows = layer.learned.double().mean(1, keepdim=True) if relative else 1.0
    pooled = wide.unflatten(-1, (-1, group)).sum(-1)  # [5, 7, G]
    dense = wide @ base.T + 4.0 / rank * (pooled @ a.T) @ (rows * b).T
    assert error(y, dense) < RELATIVE[torch.float32]
    (dense * wanted.double()).sum().backward()
    for mine, exact in ((tuning.a, a), (tuning.b, b), (x, wide)):
        assert error(mine.grad, exact.grad) < RELATIVE[torch.float32]


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_absorbed_is_what_the_path_was(packed_layer, dtype: torch.dtype, symmetric: bool) -> None:
    layer = packed_layer(3, 32, symmetric, dtype)
    before = layer.packed()
    tuned(layer)
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(9))
    y, packed = layer(x), layer.packed()
    assert packed.zero.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
    assert torch.equal(packed.codes(), before.codes())
    assert torch.equal(packed.learned, before.learned)
    assert packed.float_zeros
    assert not before.float_zeros
    assert error(y, x @ packed.dequantize().T) < RELATIVE[torch.float32]
    assert torch.equal(PackedLinear(packed)(x), y)
    assert packed.stored_bits() == before.stored_bits() + packed.zero.numel() * (8 * packed.zero.element_size() - (0 if symmetric else 3))


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_zeros_are_snapped_with_a_straight_gradient(packed_layer, dtype: torch.dtype) -> None:
    layer = packed_layer(3, 32, False)
    layer.zero = layer.zero.to(dtype)  # floats keep their dtype
    tuning = tuned(layer, moved=1e-6)
    zero = tuning()
    assert zero.dtype == torch.float32
    assert torch.equal(zero, zero.to(dtype).float())
    assert torch.equal(zero, layer.zero.float()) == (dtype != torch.float32)
    zero.backward(weight := torch.rand(zero.shape))
    ratio = layer.learned.float().mean(1, keepdim=True) / layer.learned.float()
    assert error(tuning.b.grad, (-2.0 * ratio * weight) @ tuning.a.T) < RELATIVE[torch.float32]


def test_scales_of_zero_and_far_zeros_stay_finite() -> None:
    scale = torch.tensor([[0.0, 1.0, 6e-8]], dtype=torch.float16)
    tuning = ZeroTuning(torch.full((1, 3), 4.0, dtype=torch.float16), scale, 8, 8.0, True, torch.Generator())
    with torch.no_grad():
        tuning.a.copy_(torch.eye(3))
        tuning.b.copy_(torch.tensor([[1.0, 3.0, 1.0]]))
    assert tuning()[0, 0] == 4.0
    assert tuning()[0, 1] == 3.0
    assert tuning()[0, 2] == -65504.0
    for sign, passed in ((1, False), (-1, True)):
        tuning.b.grad = None
        (tuning() * sign).sum().backward()
        assert bool(torch.isfinite(tuning.b.grad).all())
        assert bool(tuning.b.grad[0, 2] != 0) == passed, "beyond the range of its dtype a zero gets the gradient that leads back, no other"
    moved = tuning.to("meta").bfloat16()
    assert moved.a.dtype == torch.float32 and moved.start.dtype == torch.float16 and moved.a.device.type == "meta"


@pytest.mark.parametrize("parametrization", ["relative", "absolute"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_learns_and_detaches_exactly(packed_llama, chosen, windows, parametrization: str, symmetric: bool) -> None:
    model = packed_llama(symmetric=symmetric)
    before = {name: layer.packed() for name, layer in packed_linears(model).items()}
    ids = windows[0][:4]
    was = model(ids).logits
    tuner = QaLora(chosen(parametrization=parametrization))
    parameters = tuner.attach(model)
    assert len(parameters) == 28
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(parameters)
    assert torch.equal(model(ids).logits, was)
    log = train(model, parameters, CausalLM(ids, ids), chosen(steps=25, lr=2e-2, schedule="constant"), 0, None, "")
    assert log.curve[-1]["loss"] < log.curve[0]["loss"] - 0.3
    model.eval()
    now = model(ids).logits
    tuner.detach(model)
    assert torch.equal(model(ids).logits, now)
    for name, layer in packed_linears(model).items():
        assert layer.tuned_zero is None
        assert torch.equal(layer.words, before[name].words)
        assert torch.equal(layer.learned, before[name].learned)
        assert not torch.equal(layer.zero, layer.zero.round())
    again = QaLora(chosen()).attach(model)  # from float zeros, and after it other tuners
    assert torch.equal(model(ids).logits, now)
    QaLora(chosen()).detach(model)
    assert again and Peqa(chosen()).attach(model)


def test_an_interrupted_training_ends_alike(packed_llama, chosen, windows, tmp_path: Path) -> None:
    keys = chosen(checkpoint_every=2)

    def go(folder: Path | None, **hooks: Any) -> dict[str, torch.Tensor]:
        model = packed_llama()
        parameters = QaLora(keys).attach(model)
        train(model, parameters, CausalLM(*windows), keys, 5, folder, "a", **hooks)
        QaLora(keys).detach(model)
        return {name: layer.zero for name, layer in packed_linears(model).items()}

    with pytest.raises(Killed):
        go(tmp_path, on_step=kill_at(5))
    assert same(go(tmp_path), go(None))


def test_targets(packed_llama, chosen) -> None:
    model = packed_llama()
    parameters = QaLora(chosen(targets="q_proj, down_proj", rank=1)).attach(model)
    assert {name.split(".")[-3] for name in parameters} == {"q_proj", "down_proj"}
    QaLora(chosen()).detach(model)
    zeros = {name: layer.zero is not None for name, layer in packed_linears(model).items()}
    assert all(held == name.endswith(("q_proj", "down_proj")) for name, held in zeros.items())
    with pytest.raises(RecipeError, match="no packed linear is named w1: choose targets among down_proj"):
        QaLora(chosen(targets="w1")).attach(model)


def test_bad_models_and_options_are_refused(packed_llama, sketched_llama, dense_model, chosen, tmp_path: Path) -> None:
    assert TUNERS["qalora"] is QaLora
    with pytest.raises(ModelError, match="no packed linear"):
        QaLora(chosen()).attach(dense_model())
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj holds tables.*--tune table"):
        QaLora(chosen()).attach(sketched_llama())
    with pytest.raises(RecipeError, match="dropout"):
        QaLora(chosen(dropout=0.1))
    with pytest.raises(RecipeError, match="rank=0"):
        QaLora(chosen(rank=0))
    recipe = Recipe().with_(quant__packer="rtn", prune__method="obert", prune__ratio=0.5, tune__method="qalora", tune__steps=1)
    with pytest.raises(RecipeError, match="would bring pruned weights back: use --tune peqa"):
        Run(recipe, tmp_path / "x", Show())
    model = packed_llama(symmetric=False)
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.learned[0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"model\.layers\.1\.mlp\.up_proj"):
        QaLora(chosen()).attach(model)
    assert all(layer.tuned_zero is None and layer.zero.dtype == torch.uint8 for layer in packed_linears(model).values())
    layer.learned[0, 0] = 1.0
    parameters = QaLora(chosen()).attach(model)
    for other in (QaLora, Peqa):
        with pytest.raises(ModelError, match="already"):
            other(chosen()).attach(model)
    stored = layer.zero.clone()
    with torch.no_grad():
        parameters["model.layers.1.mlp.up_proj.tuned_zero.b"][2, 0] = float("nan")
    with pytest.raises(NumericError, match=r"zeros of model\.layers\.1\.mlp\.up_proj"):
        QaLora(chosen()).detach(model)
    assert torch.equal(layer.zero, stored)


# --- folders ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> load.Loaded:
    """`tiny`, packed, half of its layers asymmetric, and its zeros moved at random in all layers but the output projections."""
    from compressor.linear import find_blocks, swap, to_packed
    from compressor.quant import PACKERS

    found = load.load("tiny", "cpu")
    write.round_to_folder(found, set())
    _, blocks = find_blocks(found.model)
    for index, (name, layer) in enumerate(linears(blocks).items()):
        weight = PACKERS["rtn"](layer.weight.detach(), None, Quant(bits=3, symmetric=index % 2 > 0), 32, torch.float16)[0]
        packed = to_packed(layer, weight)
        if not name.endswith("o_proj"):
            tuned(packed, moved=0.02)
            packed.zero, packed.tuned_zero = packed.packed().zero, None
        swap(blocks, name, packed)
    return found


@pytest.fixture(scope="module")
def folder(loaded: load.Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("qalora") / "one"
    facts = write.write_folder(loaded, place)
    assert facts["format"] == "compressor sparse" and facts["verified"]
    return place


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(66).view(2, 33)).logits


def equal(a: PackedWeight, b: PackedWeight) -> bool:
    left, right = a.tensors(), b.tensors()
    return same(left, right) and all(left[key].dtype == right[key].dtype for key in left)


def test_folders_hold_float_zeros_exactly(loaded: load.Loaded, folder: Path) -> None:
    again = load.load(str(folder), "cpu")
    mine, back = load.packed_weights(loaded.model), load.packed_weights(again.model)
    assert all(equal(weight, back[name]) for name, weight in mine.items())
    assert torch.equal(logits(again.model), logits(loaded.model))
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["groups"]
    assert {(g["block"], g["symmetric"], g.get("zeros")) for g in groups} == {(0, False, "float16"), (0, True, None), (0, False, None)}
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.weight_zero"].shape == (128, 4)
    assert tensors["model.layers.0.self_attn.q_proj.weight_zero"].dtype == torch.float16
    assert "model.layers.0.self_attn.o_proj.weight_zero" not in tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_reads_and_writes_them(loaded: load.Loaded, folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    mine, back = load.packed_weights(loaded.model), load.packed_weights(theirs)
    assert all(type(layer) is PackedLinear for layer in packed_linears(theirs).values())
    assert all(equal(weight, back[name]) for name, weight in mine.items())
    theirs.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(logits(again), logits(theirs))
    if dtype == torch.float32:
        assert torch.equal(logits(theirs), logits(loaded.model))


Q = "model.layers.0.self_attn.q_proj"
DAMAGE = [
    (lambda t: t.pop(f"{Q}.weight_zero"), f"{Q} is incomplete: weight_zero missing"),
    (lambda t: t.update({f"{Q}.weight_zero": t[f"{Q}.weight_zero"].float()}), "weight_zero is float32, and must be float16"),
    (lambda t: t.update({f"{Q}.weight_zero": t[f"{Q}.weight_zero"].to(torch.uint8)}), "weight_zero is uint8"),
    (lambda t: t.update({f"{Q}.weight_zero": t[f"{Q}.weight_zero"][:, :2].clone()}), "weight_zero of shape"),
    (lambda t: t.update({f"{Q}.weight_zero": t[f"{Q}.weight_zero"].flatten()}), "weight_zero of shape"),
    (lambda t: t[f"{Q}.weight_zero"][3].fill_(float("nan")), "weight_zero holds numbers that are not finite"),
    (lambda t: t[f"{Q}.weight_zero"][3].fill_(float("inf")), "weight_zero holds numbers that are not finite"),
    (lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(192, dtype=torch.uint8)}), "says nothing of its weight_zero_point"),
    (lambda t: t.update({"model.layers.0.self_attn.o_proj.weight_zero": torch.zeros(128, 4).half()}), "says nothing of its weight_zero"),
    (lambda t: t.update({"model.norm.weight_zero": torch.zeros(3)}), "codes of model.norm, which"),
]


@pytest.mark.parametrize("reader", ["ours", "transformers"])
@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damaged_folders_give_one_sentence(folder: Path, tmp_path: Path, damage, words: str, reader: str) -> None:
    from transformers import AutoModelForCausalLM

    ours = lambda place: load.load(str(place), "cpu")
    refuses(ours if reader == "ours" else AutoModelForCausalLM.from_pretrained, folder, tmp_path / "x", damage, words)


@pytest.mark.parametrize("change", [{"zeros": "float64"}, {"zeros": 16}, {"zeros": ""}, {"zeros": ["float16"]}, {"block": 1}, {"symmetric": True}])
def test_damaged_configurations_give_one_sentence(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "x"))
    config = json.loads((broken / "config.json").read_text())
    group = next(g for g in config["quantization_config"]["groups"] if "zeros" in g)
    group |= change
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="zeros .* of a group are none of float16, bfloat16, float32, or it has a mask or is symmetric") as caught:
        load.load(str(broken), "cpu")
    assert "\n" not in str(caught.value)


def test_a_folder_of_changed_zeros_is_not_proven(loaded: load.Loaded, folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "x"))
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{Q}.weight_zero"][0, 0] += 0.5
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressorError, match=rf"{Q} reads back with other weights"):
        write.prove(broken, write.dense_tensors(loaded), load.packed_weights(loaded.model))


def test_formats_of_integers_refuse_them(loaded: load.Loaded) -> None:
    packed = load.packed_weights(loaded.model)
    assert "24 of its 28 packed layers have tuned zeros, and the format's are integers" in str(compressed_tensors.fits(packed))
    broken = PackedWeight.pack(torch.zeros(8, 64, dtype=torch.uint8), Affine(torch.ones(8, 2), torch.full((8, 2), float("nan"))), 3)
    with pytest.raises(CompressorError, match="zeros of a are not finite"):
        formats.pick({"a": broken})


# --- integer zeros ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("far", [False, True])
def test_integer_zeros_are_the_best_with_these_codes(packed_layer, bits: int, far: bool) -> None:
    layer = packed_layer(bits, 32, False, torch.float32)
    tuned(layer, moved=5.0 if far else 0.3)
    exact = layer.packed()
    fitted, plain = integers.with_integers(exact), integers.with_integers(exact, refit=False)
    assert fitted.zero.dtype == plain.zero.dtype == torch.uint8
    assert torch.equal(fitted.codes(), exact.codes())
    assert torch.equal(plain.learned, exact.learned)
    wrong = lambda weight: (weight.dequantize() - exact.dequantize()).double().square().view(37, 3, 32).sum(-1)
    least = wrong(fitted)
    assert bool((least <= wrong(plain) + 1e-9).all())
    steps = exact.codes().double().view(37, 3, 1, 32) - torch.arange(1 << bits).view(1, 1, -1, 1)
    target = exact.dequantize().double().view(37, 3, 1, 32)
    scale = ((target * steps).sum(-1) / steps.square().sum(-1).clamp(min=1e-30)).clamp(min=0).unsqueeze(-1)  # of every zero
    torch.testing.assert_close(least, (target - scale * steps).square().sum(-1).amin(-1), rtol=1e-4, atol=1e-6)
    assert integers.with_integers(fitted) is fitted


def test_export_to_integers_says_what_it_costs(loaded: load.Loaded, folder: Path, tmp_path: Path) -> None:
    target = Target("compressed-tensors", max_tokens=2048, device="cpu")
    document, _ = export(str(folder), tmp_path / "ct", target)
    assert not document["exact"] and document["format"] == compressed_tensors.NAME
    assert document["perplexity"]["before"] != document["perplexity"]["after"]
    again = load.packed_weights(load.load(str(tmp_path / "ct"), "cpu").model)
    for name, weight in load.packed_weights(loaded.model).items():
        assert torch.equal(again[name].codes(), weight.codes())
        assert equal(again[name], integers.with_integers(weight))
        assert equal(again[name], weight) == name.endswith("o_proj")
    document, _ = export(str(folder), tmp_path / "wide", replace(target, bits=4, symmetric=True))
    assert document["perplexity"]["growth"] < 0.5
    assert all(weight.bits == 4 and weight.zero is None for weight in load.packed_weights(load.load(str(tmp_path / "wide"), "cpu").model).values())
    export(str(folder), tmp_path / "f16", Target("float16", device="cpu"))
    dense = load.load(str(tmp_path / "f16"), "cpu").model
    assert all(
        torch.equal(dense.get_submodule(name).weight, w.dequantize(torch.float16).float()) for name, w in load.packed_weights(loaded.model).items()
    )
