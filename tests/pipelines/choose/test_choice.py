"""Targets become budgets, unreachable ones sentences; a target of loss is approached by what packing really lost."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import RecipeError
from compressor.pipelines.choose.choice import Choice, ways
from compressor.pipelines.choose.sensitivity import Option, Unit
from compressor.recipe import Choose, Quant

N = 1000


def units(damage: float = 1.0) -> list[Unit]:
    """Three units of N weights, the first the most sensitive."""
    return [
        Unit((f"layer{i}.q", f"layer{i}.k"), N, tuple(Option((f"{b}bit",), b * N, damage * 4.0 ** (2 - i - b)) for b in (2, 3, 4))) for i in range(3)
    ]


def choice(**target: float) -> Choice:
    return Choice(Choose(**target), Quant(), units(), 500)  # type checked by Choose's rules


def test_a_target_of_bits() -> None:
    found = choice(target_bits=3.0)
    quant = found.quant()
    assert quant.layers == {f"layer{i}.{leaf}": spec for i, spec in enumerate(("4bit", "3bit", "2bit")) for leaf in "qk"}
    assert found.predicted()["bits_per_weight"] == 3.0
    assert found.predicted()["folder_bytes"] == 500 + 3 * 3 * N // 8
    uniform = {row["spec"]: row["loss"] for row in found.facts()["uniform"]}
    assert found.predicted()["loss"] < uniform["3bit"]


def test_a_target_of_bytes_is_kept() -> None:
    found = choice(target_size=500 + 1000)
    found.quant()
    assert found.predicted()["folder_bytes"] <= 1500
    assert found.predicted()["bits_per_weight"] > 2.3


@pytest.mark.parametrize(
    ("target", "words"),
    [({"target_bits": 1.9}, "below the 2.000 bits"), ({"target_size": 600}, "below the 1,250")],
)
def test_what_cannot_be_reached_is_said(target: dict[str, float], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        choice(**target).quant()


@settings(max_examples=40, deadline=None)
@given(factor=st.floats(0.2, 5), power=st.floats(0.7, 1.4), wanted=st.floats(0.02, 0.5))
def test_a_target_of_loss_is_kept_where_it_can_be(factor: float, power: float, wanted: float) -> None:
    """Whatever the true loss of a mix is, as long as it grows with the predicted one: what stands in the end keeps to it if any try did."""
    many = [Unit((f"l{i}",), N, tuple(Option((f"{b}bit",), b * N, 0.05 * (1 + i % 5) * 4.0 ** (2 - b)) for b in (2, 3, 4, 8))) for i in range(30)]
    found = Choice(Choose(max_loss=wanted), Quant(), many, 0)
    packings = 0
    while True:
        found.quant()
        packings += 1
        reached = factor * found.predicted()["loss"] ** power
        if not found.learn(reached):
            break
    assert packings <= 6
    kept = [row for row in found.tried if row["reached_loss"] <= math.log1p(wanted)]
    assert not kept or reached <= math.log1p(wanted)


def test_a_loss_below_that_of_all_candidates_packs_the_best_of_them() -> None:
    found = choice(max_loss=1e-3)
    assert set(found.quant().layers.values()) == {"4bit"}
    assert not found.learn(0.08) or set(found.quant().layers.values()) == {"4bit"}
    assert not found.learn(0.08)


def test_a_mix_that_was_found_before_is_taken_up() -> None:
    found = choice(target_size=500 + 1000)
    found.schemes = 3
    layers = found.quant().layers
    again = choice(target_size=500 + 1000)
    assert again.settle(json.loads(json.dumps(found.state()))).layers == layers
    assert again.facts() == found.facts()  # sizes and the solver's word, too


def test_candidates() -> None:
    usual = ways(Quant(), Choose(target_bits=3.0))
    assert list(usual) == [f"w{b}g{g}" for b in (2, 3, 4) for g in (128, 64, 32)] + ["w8g128"]
    assert {way.packer for way in usual.values()} == {"gptq"}
    for group, sizes in ((32, (32, 64, 128)), (64, (64, 32, 128)), (256, (256, 128, 64)), (16, (16, 32, 64)), (96, (96, 48))):
        assert list(ways(Quant(group=group), Choose(target_bits=3.0))) == [f"w{b}g{g}" for b in (2, 3, 4) for g in sizes] + [f"w8g{group}"]
    assert list(ways(Quant(group=-1), Choose(target_bits=3.0))) == ["w2g-1", "w3g-1", "w4g-1", "w8g-1"]
    assert list(ways(Quant(packer="sketch"), Choose(target_bits=3.0))) == ["2bit", "3bit", "4bit"]
    mixed = ways(Quant(), Choose(target_bits=3.0, candidates=("2bit:rtn", "3bit:asym")))
    assert (mixed["2bit:rtn"].packer, mixed["3bit:asym"].symmetric) == ("rtn", False)


@pytest.mark.parametrize(
    ("quant", "candidates", "words"),
    [
        (Quant(), ("3bit", "sketch3"), "mixes grids with tables"), (Quant(), ("3bit:magic",), "unknown"),
        (Quant(), ("3bit:squeezellm",), "gradients"), (Quant(packer="sketch"), ("w3g64",), "says group, which means nothing to packer sketch"),
        (Quant(packer="sketch"), ("8bit",), "tables have 2, 3 or 4"),
    ],
)  # fmt: skip
def test_candidates_that_cannot_be(quant: Quant, candidates: tuple[str, ...], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        ways(quant, Choose(target_bits=3.0, candidates=candidates))
