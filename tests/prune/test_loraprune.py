"""The pruner of units: when, how many, which, and what a step that cannot be scored does."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.prune import loraprune
from compressor.prune.importance import Magnitude, unit_scores
from compressor.prune.loraprune import UnitPruner, allocate
from compressor.prune.schedule import Ramp, cubic, events
from compressor.prune.unit_masks import UnitMasks
from compressor.prune.units import Family, families
from tests.prune.helpers import causal, paths_of

RAMP = Ramp(4, 20, 2)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Maker of a pruner whose scores come from `pruner.table`, by family key."""

    def build(kept: Mapping[str, int], ramp: Ramp = RAMP, unit: str = "group", **keys: Any) -> Any:
        model = causal(keys=4)
        paths, units = paths_of(model), families(model, unit)
        masks = UnitMasks(model, units)
        wanted = {f.key: kept[f.kind] for f in units}
        pruner = UnitPruner(paths, units, masks, wanted, Magnitude(paths), ramp, **keys)
        generator = torch.Generator().manual_seed(0)
        pruner.table = {f.key: torch.rand(f.count, generator=generator) for f in units}
        monkeypatch.setattr(loraprune, "unit_scores", lambda family, *_rest: pruner.table[family.key].clone())
        return pruner

    return build


def left(pruner: Any) -> dict[str, int]:
    return pruner.masks.kept()


# --- schedule ------------------------------------------------------------------------------------------------------------------------------


def test_the_cubic_ramp_is_that_of_the_paper() -> None:
    assert [cubic(p, 0.0, 0.8) for p in (-1.0, 0.0, 1.0, 2.0)] == [0.0, 0.0, 0.8, 0.8]
    assert cubic(0.25, 0.1, 0.8) == pytest.approx(0.8 - 0.7 * 0.75**3)
    assert events(2, 10, 5) == (2, 4, 6, 8, 10) and events(2, 10, 1) == (10,) and events(3, 3, 4) == (3,) and events(0, 2, 9) == (0, 1, 2)


def test_prunes_happen_every_few_steps_between_begin_and_end() -> None:
    shares = [RAMP.share(step) for step in range(24)]
    assert shares[:4] == [0.0] * 4 and shares[4] == 0.0 and shares[20:] == [1.0] * 4
    assert all(shares[step] == 0 for step in range(5, 20, 2))
    assert shares[6:20:2] == pytest.approx([1 - (1 - i / 16) ** 3 for i in range(2, 16, 2)])
    assert Ramp(4, 21, 2).share(21) == 1.0, "the last prune keeps to `end`, not to `every`"
    assert Ramp(10, 5, 1).share(5) == 1.0 and Ramp(10, 5, 1).share(4) == 0.0


# --- masks over a run ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [{"heads": 3, "ffn": 31}, {"heads": 1, "ffn": 1}, {"heads": 4, "ffn": 47}, {"heads": 2, "ffn": 24}])
def test_masks_only_shrink_follow_the_ramp_and_end_exactly(make: Callable[..., Any], kept: dict[str, int]) -> None:
    pruner = make(kept)
    before = {key: mask.clone() for key, mask in pruner.masks.masks.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(24):
        pruner.prune(step)
        for key, mask in pruner.masks.masks.items():
            assert bool((mask <= before[key]).all()) and set(mask.unique().tolist()) <= {0.0, 1.0}
            full = len(mask)
            last = max((s for s in range(step + 1) if s <= 20 and (s == 20 or s % 2 == 0) and s >= 4), default=0)
            gone = int((full - kept[key[2:]]) * (RAMP.share(last) if last else 0.0) + 1e-9)
            assert int(mask.count_nonzero()) == full - gone, (step, key)
            before[key] = mask.clone()
        pruner.table = {key: torch.rand(t.shape, generator=generator) for key, t in pruner.table.items()}  # what was best is no longer
        pruner.observe(step)
    assert left(pruner) == {f"{b}.{kind}": n for b in range(3) for kind, n in kept.items()}


def test_the_lowest_averages_go(make: Callable[..., Any]) -> None:
    pruner = make({"heads": 2, "ffn": 40}, Ramp(1, 1, 1))
    pruner.observe(0)
    pruner.prune(1)
    for key, mask in pruner.masks.masks.items():
        order = pruner.scores[key].argsort()
        gone = 2 if key.endswith("heads") else 8
        assert not mask[order[:gone]].any() and bool(mask[order[gone:]].all()), key
    same = {key: mask.clone() for key, mask in pruner.masks.masks.items()}
    pruner.table = {key: 1 - t for key, t in pruner.table.items()}
    for step in range(1, 30):
        pruner.observe(step)
        pruner.prune(step)
    assert all(torch.equal(same[key], mask) for key, mask in pruner.masks.masks.items()), "after the end nothing comes back or goes"


def test_scores_are_averages_that_remember_nine_tenths(make: Callable[..., Any]) -> None:
    pruner = make({"heads": 2, "ffn": 40})
    expected = {key: torch.zeros_like(t) for key, t in pruner.table.items()}
    for step in range(3):
        pruner.table = {key: t + step for key, t in pruner.table.items()}
        pruner.observe(step)
        expected = {key: 0.9 * expected[key] + 0.1 * t for key, t in pruner.table.items()}
        for key, score in pruner.scores.items():
            torch.testing.assert_close(score, expected[key])
    assert pruner.tensors().keys() == {*pruner.masks.masks, *(f"score.{key}" for key in pruner.scores)}
    assert all(pruner.tensors()[key] is mask for key, mask in pruner.masks.masks.items()), "live, so that the loop can restore them"
    assert all(pruner.tensors()[f"score.{key}"] is score for key, score in pruner.scores.items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_leave_the_averages_of_their_family(make: Callable[..., Any], bad: float) -> None:
    pruner = make({"heads": 2, "ffn": 40})
    pruner.observe(0)
    before = {key: score.clone() for key, score in pruner.scores.items()}
    pruner.table["1.ffn"][3] = bad
    pruner.observe(1)
    assert torch.equal(pruner.scores["1.ffn"], before["1.ffn"])
    assert not any(torch.equal(pruner.scores[key], before[key]) for key in before if key != "1.ffn")


def test_query_heads_leave_every_group_alike(make: Callable[..., Any]) -> None:
    pruner = make({"heads": 4, "ffn": 48}, unit="query")
    pruner.table = {key: torch.arange(float(len(t))) for key, t in pruner.table.items()}  # the first group is the worst by far
    for step in range(21):
        pruner.observe(step)
        pruner.prune(step)
        for block in range(3):
            counts = pruner.masks.masks[f"{block}.heads"].view(4, 2).sum(1).tolist()
            assert len(set(counts)) == 1, counts
    assert pruner.masks.masks["0.heads"].tolist() == [0.0, 1.0] * 4 and left(pruner)["0.ffn"] == 48


def test_what_a_step_left_behind_is_forgotten_before_the_next(make: Callable[..., Any]) -> None:
    pruner, cleared = make({"heads": 2, "ffn": 40}), []
    pruner.importance.clear = lambda: cleared.append(1)
    for step in range(3):
        pruner.prune(step)
        pruner.observe(step)
    assert len(cleared) == 3


@pytest.mark.parametrize("gate", [True, False])
def test_importance_reaches_the_scores(gate: bool) -> None:
    model = causal()
    paths, units = paths_of(model), families(model)
    pruner = UnitPruner(paths, units, UnitMasks(model, units), {f.key: 1 for f in units}, Magnitude(paths), RAMP, gate=gate)
    pruner.observe(0)
    for f in units:
        torch.testing.assert_close(pruner.scores[f.key], 0.1 * unit_scores(f, paths, Magnitude(paths), gate))


# --- widths that differ between blocks -----------------------------------------------------------------------------------------------------


def spread(counts: list[int], kind: str = "ffn", seed: int = 0) -> tuple[list[Family], dict[str, Tensor], dict[str, Tensor]]:
    """Families of these counts, random scores with block b on the whole better by b, and masks of ones."""
    generator = torch.Generator().manual_seed(seed)
    units = [Family(b, kind, count, ()) for b, count in enumerate(counts)]
    return units, {f.key: torch.rand(f.count, generator=generator) + 0.4 * f.block for f in units}, {f.key: torch.ones(f.count) for f in units}


@pytest.mark.parametrize("wanted", range(3, 31))
def test_single_units_are_ranked_over_all_blocks(wanted: int) -> None:
    units, scores, masks = spread([10, 10, 10], "heads")
    found = allocate(units, scores, masks, {"0.heads": wanted, "1.heads": 0, "2.heads": 0}, {"ffn": 5})
    assert sum(found.values()) == wanted and min(found.values()) >= 1
    best = {f.key: float(scores[f.key].max()) for f in units}
    ranked = sorted((float(s), f.key) for f in units for s in scores[f.key] if float(s) != best[f.key])[::-1]
    expected = {f.key: 1 for f in units}
    for _score, key in ranked[: wanted - 3]:
        expected[key] += 1
    assert found == expected


@pytest.mark.parametrize("chunk", [4, 8, 16])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("counts", [[48, 48, 48], [40, 40, 40], [52, 52, 52, 52]])
def test_chunks_stay_whole_and_totals_exact(counts: list[int], chunk: int, seed: int) -> None:
    units, scores, masks = spread(counts, seed=seed)
    for chunks in range(len(counts), len(counts) * (counts[0] // chunk) + 1):
        wanted = {f.key: 0 for f in units} | {"0.ffn": chunks * chunk}
        found = allocate(units, scores, masks, wanted, {"ffn": chunk})
        assert sum(found.values()) == chunks * chunk
        assert all(n % chunk == 0 and n >= chunk for n in found.values())


def test_kinds_are_ranked_apart_and_nothing_to_remove_keeps_all() -> None:
    units, scores, masks = spread([52, 52])
    heads, head_scores, head_masks = spread([4, 4], "heads")
    both = {f.key: f.count for f in (*units, *heads)}
    assert allocate([*units, *heads], scores | head_scores, masks | head_masks, both, {"ffn": 16}) == both
    fewer = allocate([*units, *heads], scores | head_scores, masks | head_masks, both | {"0.ffn": 12}, {"ffn": 16})
    assert (fewer["0.heads"], fewer["1.heads"], fewer["0.ffn"] + fewer["1.ffn"]) == (4, 4, 64)


@pytest.mark.parametrize("multiple", [8, 5])
def test_a_run_with_ranked_blocks_ends_with_whole_chunks_and_the_exact_total(make: Callable[..., Any], multiple: int) -> None:
    wanted = 4 * multiple
    pruner = make({"heads": 2, "ffn": wanted}, uniform=False, chunk={"ffn": multiple})
    for block in range(3):
        pruner.table[f"{block}.ffn"] += 0.3 * block
    before = {key: mask.clone() for key, mask in pruner.masks.masks.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(22):
        pruner.prune(step)
        once = left(pruner)
        pruner.prune(step)
        assert left(pruner) == once, "a step that was done already changes nothing"
        assert all(bool((mask <= before[key]).all()) for key, mask in pruner.masks.masks.items())
        before = {key: mask.clone() for key, mask in pruner.masks.masks.items()}
        pruner.observe(step)
        pruner.table = {key: t + 0.2 * torch.rand(t.shape, generator=generator) for key, t in pruner.table.items()}
    ffn = [left(pruner)[f"{block}.ffn"] for block in range(3)]
    assert sum(ffn) == 3 * wanted and all(n % multiple == 0 and n > 0 for n in ffn) and ffn[0] < wanted < ffn[2]
    assert sum(left(pruner)[f"{block}.heads"] for block in range(3)) == 6
