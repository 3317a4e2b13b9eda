"""What is measured of every unit and option: bits as they are stored, damage as it is, and a model that is left as it was."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor import linear
from compressor.errors import NumericError
from compressor.pipelines import compress, load
from compressor.pipelines.choose import sensitivity
from compressor.pipelines.measure import divergence
from compressor.recipe import Choose, Quant

IDS = torch.randint(1, 2000, (4, 32), generator=torch.Generator().manual_seed(0))
WAYS = {
    "2bit": Quant(bits=2),
    "w3g64": Quant(bits=3, group=64),
    "w3g64:rtn": Quant(bits=3, group=64, packer="rtn"),
    "w3g60": Quant(bits=3, group=100),
}


@pytest.fixture
def model() -> nn.Module:
    return load.load("tiny", "cpu").model


def near(model: nn.Module) -> Callable[[], float]:
    return partial(sensitivity.kl, model, divergence.Sample(model, IDS))


def measured(model: nn.Module, work: Path, damage: Any, ways: dict[str, Quant] = WAYS) -> list[sensitivity.Unit]:
    todo = compress.plan(model, Quant())
    return sensitivity.measure(model, todo, ways, torch.float16, IDS, damage, work, lambda count, note: None)


def test_units_bits_and_damage(model: nn.Module, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        dense = model(IDS).logits.log_softmax(-1)
    units = measured(model, tmp_path, near(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    leaves = [tuple(name.rpartition(".")[2] for name in unit.layers) for unit in units]
    assert leaves == 4 * [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    specs = [option.specs for option in units[1].options]
    assert specs == [("2bit",), ("w3g64", "w3g60"), ("w3g64:rtn",)]  # groups of 100 do not divide 128: 64 is used
    # the first unit, packed alone by its first option, does what was measured
    bits = 0
    for name in units[0].layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        path = tmp_path / "again"
        path.mkdir(exist_ok=True)
        packed = compress.PACKERS["rtn"](layer.weight.detach(), None, WAYS["w3g64:rtn"], 64, torch.float16)[0]
        bits += packed.stored_bits()
        linear.swap(model, name, linear.to_packed(layer, packed))
    with torch.no_grad():
        now = model(IDS).logits.log_softmax(-1)
    damage = float((dense.exp() * (dense - now)).sum(-1)[:, :-1].mean())  # the last token of a window predicts nothing
    option = units[0].options[2]
    assert option.bits == bits
    assert option.damage == pytest.approx(damage, rel=1e-3)


def test_fewer_bits_do_more_damage_by_either_measure(model: nn.Module, tmp_path: Path) -> None:
    ways = {f"{bits}bit": Quant(bits=bits) for bits in (2, 3, 4)}
    for name, damage in (("kl", near(model)), ("error", None)):
        (tmp_path / name).mkdir()
        for unit in measured(model, tmp_path / name, damage, ways):
            damages = [option.damage for option in unit.options]
            assert damages[0] > damages[1] > damages[2] > 0


def test_finished_blocks_are_not_measured_again(model: nn.Module, tmp_path: Path) -> None:
    first = measured(model, tmp_path, near(model))
    (tmp_path / "damage-00002.safetensors").unlink()
    runs = []

    damage = near(model)

    def counted() -> float:
        runs.append(1)
        return damage()

    assert measured(model, tmp_path, counted) == first
    assert len(runs) == sum(len(unit.options) for unit in first) // 4


def test_the_sample_is_spread_bounded_and_not_what_calibrates() -> None:
    text = torch.arange(24).reshape(12, 2)
    assert sensitivity.sample(text, text[1:3], 5)[:, 0].tolist() == [0, 8, 12, 16, 20]
    rest = {tuple(row.tolist()) for row in sensitivity.sample(text, text[1:3], 50)}
    assert rest == {tuple(row.tolist()) for i, row in enumerate(text) if i not in (1, 2)}
    assert torch.equal(sensitivity.sample(text, text, 3), text[::4])  # a text that has no others
    assert sensitivity.windows(Choose(target_bits=3, windows=8), 2048, 32000) == 4
    assert sensitivity.windows(Choose(target_bits=3, windows=8), 2048, divergence.SAMPLE_LOGITS) == 1


def test_a_model_that_no_longer_predicts_is_no_choice(model: nn.Module, tmp_path: Path) -> None:
    whole = near(model)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = torch.nan
    assert whole() == math.inf
    with pytest.raises(NumericError, match=r"model\.layers\.0\.self_attn\.q_proj: packed by none of the candidates"):
        measured(model, tmp_path, whole)
