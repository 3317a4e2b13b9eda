"""Patterns and the exact global threshold."""

import pytest
import torch
from torch import Tensor

from compressor.errors import ModelError, NumericError, RecipeError
from compressor.prune import masks
from compressor.prune.masks import Pattern, candidates, lowest, parse_pattern, pruned, sparsity


def alive(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()}


@pytest.mark.parametrize("piece", [7, 1 << 24])
def test_the_threshold_is_that_of_a_stable_sort_over_everything(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "PIECE", piece)
    torch.manual_seed(0)
    scores = {"a": torch.rand(6, 10) * 1e-8, "b": torch.rand(4, 5) ** 8, "c": torch.randint(0, 3, (5, 8)).float()}
    free = {name: torch.rand_like(s) > 0.3 for name, s in scores.items()}
    total = sum(int(f.sum()) for f in free.values())
    flat, usable = torch.cat([s.flatten() for s in scores.values()]), torch.cat([f.flatten() for f in free.values()])
    order = flat.masked_fill(~usable, float("inf")).argsort(stable=True)
    for count in (0, 1, 17, total // 2, total - 1, total):
        gone = torch.cat([g.flatten() for g in lowest(scores, free, count).values()])
        assert sorted(gone.nonzero().flatten().tolist()) == sorted(order[:count].tolist())


def test_ties_go_in_index_order_over_names() -> None:
    scores = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    gone = lowest(scores, alive(scores), 8)
    assert bool(gone["a"].all()) and gone["b"].flatten().tolist() == [True, True, False, False, False, False]
    assert lowest({"a": torch.tensor([[0.0, -0.0, 0.0]])}, {"a": torch.ones(1, 3, dtype=torch.bool)}, 2)["a"].tolist() == [[True, True, False]]


def test_extreme_scores_and_bad_ones() -> None:
    scores = {"a": torch.tensor([[float("inf"), 1e-45, 3e38, 0.0]])}
    assert lowest(scores, alive(scores), 3)["a"].tolist() == [[False, True, True, True]]
    for bad in (float("nan"), -1.0):
        with pytest.raises(NumericError, match="layer.weight: its pruning scores"):
            lowest({"layer.weight": torch.tensor([[1.0, bad]])}, {"layer.weight": torch.ones(1, 2, dtype=torch.bool)}, 1)
    with pytest.raises(RecipeError, match="only 4 can"):
        lowest(scores, alive(scores), 5)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8), (3, 5)])
def test_n_of_m_groups_keep_their_best_on_the_way_and_at_the_end(keep: int, of: int) -> None:
    torch.manual_seed(0)
    pattern, mask = Pattern(keep=keep, of=of), torch.ones(6, of * 4, dtype=torch.bool)
    total = mask.numel() * (of - keep) // of
    for count in (total // 3, total // 3, total - 2 * (total // 3)):
        scores = torch.rand(mask.shape)
        before = mask.clone()
        mask &= ~lowest({"w": scores}, {"w": candidates(scores, mask, pattern)}, count)["w"]
        assert not (mask & ~before).any() and int((~mask).sum()) == int((~before).sum()) + count
        assert int(mask.unflatten(1, (-1, of)).sum(2).min()) >= keep
    assert bool((mask.unflatten(1, (-1, of)).sum(2) == keep).all())
    assert not candidates(torch.rand(mask.shape), mask, pattern).any()


def test_n_of_m_in_one_step_keeps_the_largest() -> None:
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    mask = torch.ones(1, 8, dtype=torch.bool)
    gone = lowest({"w": scores}, {"w": candidates(scores, mask, Pattern(keep=2, of=4))}, 4)["w"]
    assert gone.tolist() == [[True, False, False, True, True, True, False, False]]


def test_patterns_are_parsed_printed_and_refused() -> None:
    for text in ("unstructured", "4block", "32block", "2:4", "1:8"):
        assert str(parse_pattern(text)) == text
    assert parse_pattern("2:4").limit == 0.5 and parse_pattern("4block") == Pattern(group=4)
    for text in ("dense", "4:2", "2:2", "0:4", "0:0", "0block", "block", "2:4:8", ""):
        with pytest.raises(RecipeError):
            parse_pattern(text)


@pytest.mark.parametrize("text", ["4block", "2:4"])
def test_a_width_that_does_not_divide_names_the_layer(text: str) -> None:
    with pytest.raises(ModelError, match=r"encoder.0.query: a weight of shape \(8, 6\) does not divide into groups of 4"):
        parse_pattern(text).check("encoder.0.query", torch.Size((8, 6)))
    parse_pattern(text).check("encoder.0.query", torch.Size((6, 8)))


def test_counts_of_what_is_gone() -> None:
    keep = {"a": torch.tensor([[True, False]]), "b": torch.tensor([[False, False]])}
    assert pruned(keep) == (3, 4) and sparsity(keep) == 0.75
