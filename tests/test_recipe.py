"""Recipes: round trip, strictness, fingerprints, and the --quant grammar."""

from collections.abc import Callable

import pytest

from compressor.errors import RecipeError
from compressor.recipe import Quant, Recipe
from compressor.specs import parse_prune, parse_quant, parse_share, parse_size


def test_round_trip_and_yaml_numbers() -> None:
    recipe = Recipe().with_(quant__bits=2, quant__ignore=("k_proj",), tune__method="peqa", seed=7)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict({"tune": {"lr": "1e-3"}}).tune.lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert Recipe.from_dict({"tune": {"epochs": 2}}).tune.epochs == 2.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quant": {"bits": 5}}, "choose 2, 3 or 4"),
        ({"quant": {"bit": 3}}, "did you mean 'bits'"),
        ({"quant": {"group": 0}}, "group=0"),
        ({"quant": {"bits": "three"}}, "quant.bits must be int"),
        ({"quant": {"symmetric": 1}}, "quant.symmetric must be bool"),
        ({"quant": {"bits": True}}, "quant.bits must be int"),
        ({"quant": 3}, "must be a mapping"),
        ({"quant": {"ignore": ["("]}}, "not a regular expression"),
        ({"tune": {"lr": -1.0}}, "lr=-1.0 must be positive"),
        ({"tune": {"schedule": "step"}}, "choose cosine"),
        ({"eval": {"window": 1}}, "window=1"),
    ],
)
def test_bad_values_name_the_key(values: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace("(", r"\(")):
        Recipe.from_dict(values)


def test_digest_follows_only_what_a_stage_depends_on() -> None:
    base = Recipe()
    assert base.digest("compress") == base.with_(tune__lr=0.5).digest("compress")
    assert base.digest("tune") != base.with_(tune__lr=0.5).digest("tune")
    assert base.digest("compress") != base.with_(quant__bits=2).digest("compress")
    assert base.digest("tune") == base.with_(eval__window=64, tune__checkpoint_every=3, device="cpu").digest("tune")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("3bit", {"bits": 3}),
        ("2bit:RTN", {"bits": 2, "packer": "rtn"}),
        ("4-bit", {"bits": 4}),
        ("w3g64", {"bits": 3, "group": 64}),
        ("sketch3", {"bits": 3, "packer": "sketch"}),
        ("Sketch-2bit", {"bits": 2, "packer": "sketch"}),
        ("4bit:squeezellm", {"bits": 4, "packer": "squeezellm"}),
        ("W3A16", {"bits": 3}),
        ("w2g-1:gptq", {"bits": 2, "group": -1, "packer": "gptq"}),
    ],
)
def test_quant_grammar(text: str, values: dict) -> None:
    assert parse_quant(text) == values


@pytest.mark.parametrize("text", ["", "three", "3", "3bit:", "w3g", "int4", "sketch", "3sketch"])
def test_quant_grammar_refuses(text: str) -> None:
    with pytest.raises(RecipeError, match="not understood"):
        parse_quant(text)


LONG = ["9" * 5000 + "bit", "w3g" + "9" * 5000, "3bit" + ":sym" * 3000, "obert:" + "1" * 5000 + ":" + "2" * 5000]


@pytest.mark.parametrize("text", LONG, ids=["bits", "group", "suffixes", "pattern"])
@pytest.mark.parametrize("parse", [parse_quant, parse_prune, parse_size, parse_share])
def test_short_forms_that_are_long_are_one_sentence(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(RecipeError) as found:
        parse(text)
    assert len(str(found.value)) <= 500
    with pytest.raises(RecipeError):
        Recipe.from_dict({"quant": {"layers": {"a": text}}})


def test_targets_in_words_and_in_files() -> None:
    assert [parse_size(text) for text in ("2.6GB", "700 mb", "1.5GiB", "1200000")] == [2_600_000_000, 700_000_000, 1_610_612_736, 1_200_000]
    assert [parse_share(text) for text in ("2%", "0.02", "250%")] == [0.02, 0.02, 2.5]
    for text in ("", "2.6 litres", "-1GB", "0", "9" * 400):
        with pytest.raises(RecipeError, match="not understood"):
            parse_size(text)
    for text in ("", "2", "-1%", "0%", "nan"):
        with pytest.raises(RecipeError, match="not understood"):
            parse_share(text)
    assert Recipe.from_dict({"choose": {"target_size": "2.6GB"}}).choose.target_size == 2_600_000_000
    assert Recipe.from_dict({"choose": {"max_loss": "2%"}}).choose.max_loss == 0.02


def test_what_layers_say() -> None:
    quant = Quant(gpr=2, layers={"a.down": "w4g64:asym", "re:^b": "2bit:rtn"})
    assert (quant.of("a.down").bits, quant.of("a.down").group, quant.of("a.down").gpr, quant.of("a.down").symmetric) == (4, 64, None, False)
    assert (quant.of("b.q").packer, quant.of("b.q").gpr, quant.of("a.q").bits, quant.of("a.q").layers) == ("rtn", 2, 3, {})
    assert Recipe.from_dict(Recipe(quant=quant).to_dict()).quant == quant
    for layers in ({"a": 3}, {"re:[": "3bit"}, {"a": "magic"}, ["a"]):
        with pytest.raises(RecipeError):
            Recipe.from_dict({"quant": {"layers": layers}})
