"""Widths for a ratio: which come nearest, which are even, which an architecture can have, and that the ratio is the one of the cut model."""

from typing import Any

import pytest
import torch

from compressor.errors import ModelError, RecipeError
from compressor.linear import find_blocks, linears
from compressor.pipelines.pruning import heads_fit
from compressor.prune import slicing
from compressor.prune.units import families
from compressor.prune.widths import TOLERANCE, Widths, choose, prunable
from tests.prune.helpers import bert, causal, pack

ANY = lambda queries, keys: True


def weights(model: Any) -> int:
    """Of the linears of the blocks."""
    return sum(layer.weight.numel() for layer in linears(find_blocks(model)[1]).values())


def test_prunable_counts_the_linears_of_the_blocks() -> None:
    assert prunable(causal(keys=2)) == 3 * (2 * 128 * 64 + 2 * 32 * 64 + 3 * 48 * 64) == weights(causal(keys=2))
    assert prunable(causal("qwen2", keys=2)) == prunable(causal(keys=2)), "biases do not count"
    assert prunable(pack(causal(keys=2))) == prunable(causal(keys=2))
    assert prunable(bert()) == 2 * (4 * 32 * 32 + 2 * 32 * 40) == weights(bert())


@pytest.mark.parametrize("keys", [2, 4, 8])
@pytest.mark.parametrize("unit", ["group", "query", "auto"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.37, 0.5, 0.8])
def test_the_ratio_is_that_of_the_cut_model(keys: int, unit: str, ratio: float) -> None:
    model = causal(keys=keys)
    widths = choose(model, ratio, unit, 4, ANY)
    dense, units = weights(model), families(model, widths.unit)
    masks = {f.key: torch.arange(f.count) % (f.within or f.count) < widths.kept(f) * (f.within or f.count) // f.count for f in units}
    assert all(int(masks[f.key].sum()) == widths.kept(f) for f in units)
    slicing.cut(model, units, masks, torch.float32)
    assert weights(model) == prunable(model) and 1 - weights(model) / dense == pytest.approx(widths.ratio, abs=1e-12)
    assert widths.ffn % 4 == 0 and unit in ("auto", widths.unit)


def every(model: Any, unit: str, multiple: int) -> list[Widths]:
    """All widths by loops over what may stay of a block of `causal`."""
    config, out = model.config, []
    queries, keys, size, hidden, ffn = config.num_attention_heads, config.num_key_value_heads, 16, 64, config.intermediate_size
    total = (2 * queries + 2 * keys) * size * hidden + 3 * ffn * hidden
    for left in range(1, keys + 1) if unit == "group" else range(keys, queries + 1, keys):
        gone = (2 * (queries // keys) + 2) * (keys - left) if unit == "group" else 2 * (queries - left)
        for width in [*range(multiple, ffn + 1, multiple)] + ([ffn] if ffn % multiple else []):
            out.append(Widths(unit, left, width, (gone * size * hidden + 3 * (ffn - width) * hidden) / total))
    return out


@pytest.mark.parametrize("unit", ["group", "query"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.66, 0.9])
@pytest.mark.parametrize("multiple", [1, 16, 20])
def test_the_most_even_of_the_nearest_wins(unit: str, ratio: float, multiple: int) -> None:
    model = causal(keys=4)
    all_of_them = [w for w in every(model, unit, multiple) if w.ratio > 0]
    heads, ffn = (4 if unit == "group" else 8), 48
    nearest = min(abs(w.ratio - ratio) for w in all_of_them)
    near = [w for w in all_of_them if abs(w.ratio - ratio) <= max(nearest, TOLERANCE) + 1e-12]
    found = choose(model, ratio, unit, multiple, ANY)
    assert any((w.heads, w.ffn) == (found.heads, found.ffn) and w.ratio == pytest.approx(found.ratio) for w in near)
    assert abs(found.heads / heads - found.ffn / ffn) == pytest.approx(min(abs(w.heads / heads - w.ffn / ffn) for w in near))


def test_an_even_cut_is_exact_where_steps_allow() -> None:
    assert choose(causal(keys=4), 0.5, "group", 8, ANY) == Widths("group", 2, 24, 0.5)
    assert choose(causal(keys=4), 0.25, "auto", 12, ANY) == Widths("group", 3, 36, 0.25)


def test_auto_takes_query_heads_where_groups_are_too_coarse() -> None:
    found = choose(causal(keys=2), 0.2, "auto", 2, ANY)
    assert found.unit == "query" and found.heads == 6 and abs(found.ratio - 0.2) <= TOLERANCE
    assert choose(causal(keys=2), 0.5, "auto", 4, ANY) == Widths("group", 1, 24, 0.5)


def test_heads_that_the_configuration_cannot_have_are_left_alone() -> None:
    model = causal(keys=4, num_attention_heads=4)
    assert [queries for queries in range(1, 5) if heads_fit(model, queries, queries)] == [1, 2, 4], "LLaMA wants a divisor of its 64 channels"
    asked: list[tuple[int, int]] = []

    def fits(queries: int, keys: int) -> bool:
        asked.append((queries, keys))
        return heads_fit(model, queries, keys)

    found = choose(model, 0.25, "group", 4, fits)
    assert found.heads == 4 and found.ffn == 16 and found.ratio == pytest.approx(0.24)
    assert set(asked) == {(1, 1), (2, 2), (3, 3)}
    asked.clear()
    choose(causal(keys=2), 0.2, "query", 4, lambda queries, keys: not asked.append((queries, keys)))
    assert set(asked) == {(2, 2), (4, 2), (6, 2)}
    qwen = causal("qwen2", keys=4, head_dim=8)
    del qwen.config.head_dim
    assert heads_fit(qwen, 4, 2), "a head size that the configuration does not have is written into it"
    assert not heads_fit(bert(), 2, 2), "BERT's heads are as wide as the model over their number"
    assert heads_fit(causal("qwen3", keys=4), 3, 3)


def test_multiples_hold_unless_the_ffn_stays_whole() -> None:
    model = causal(keys=4)
    assert {choose(model, ratio, "group", 20, ANY).ffn for ratio in (0.1, 0.3, 0.5, 0.7, 0.9)} <= {20, 40, 48}
    assert choose(model, 0.15, "group", 64, ANY).ffn == 48, "64 is more than there are"


def test_nothing_to_remove_is_one_sentence() -> None:
    with pytest.raises(RecipeError, match="nothing can be pruned: the FFN has 48 channels, which leaves no multiple of 64; use a smaller --multiple"):
        choose(causal(keys=2), 0.3, "group", 64, lambda queries, keys: False)


def test_blocks_that_differ_already_are_refused() -> None:
    model = causal(keys=2)
    units = families(model)
    slicing.cut(model, units, {f.key: torch.arange(f.count) < (20 if f.key == "1.ffn" else f.count) for f in units}, torch.float32)
    with pytest.raises(ModelError, match="its blocks differ in width"):
        choose(model, 0.3, "group", 4, ANY)
