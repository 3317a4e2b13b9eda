"""Learned rotations: their error is that of rounding, it falls, what comes out is orthogonal and merges exactly, also from samples of the weights."""

from typing import Any

import pytest
import torch

from compressor import linear
from compressor.rotate import learned, merge
from compressor.rotate.learned import Grid, cayley, error
from tests.rotate.test_merge import build, logits


def grids(model: Any, bits: int = 3, group: int = 16, leave: str = "-") -> dict[str, Grid]:
    prefix, blocks = linear.find_blocks(model)
    return {f"{prefix}.{name}": Grid(bits, group, True) for name in linear.linears(blocks) if leave not in name}


def loss(model: Any, given: dict[str, Grid]) -> float:
    """The mean relative squared error of rounding, weights as they are."""
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in given}
    found = [float(error(w, given[name]).square().sum() / w.square().sum()) for name, w in weights.items()]
    return sum(found) / len(found)


def rotated(model: Any, found: merge.Merge) -> Any:
    found.outside(model, torch.float16)
    for index, block in enumerate(linear.find_blocks(model)[1]):
        found.block(index, block)
    return model


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_error_is_that_of_the_nearest_point_of_the_grid(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    w, found = torch.randn(3, 40), torch.empty(3, 40)
    for row in range(3):
        for start in range(0, 40, 16):  # the last group is shorter
            x = w[row, start : start + 16]
            top, middle = 2**bits - 1, 2 ** (bits - 1)
            low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
            scale = max(high / (top - middle), -low / middle) if symmetric else (high - low) / top
            scale *= learned.SHRINK.get(bits, 1.0)
            zero = middle if symmetric else min(max(round(-low / scale), 0), top)
            found[row, start : start + 16] = torch.stack([(scale * (torch.arange(top + 1) - zero) - each).abs().min() for each in x])
    torch.testing.assert_close(error(w, Grid(bits, 16, symmetric)).abs(), found, rtol=1e-4, atol=1e-5)


def test_rounding_has_a_gradient_through_its_scales_alone() -> None:
    w = torch.tensor([[0.1, -0.3, 0.8, 1.0]], requires_grad=True)
    error(w, Grid(3, 4, True)).square().sum().backward()
    assert w.grad is not None and float(w.grad[0, 3].abs()) > 10 * float(w.grad[0, :3].abs().max())


def test_cayley_gives_orthogonal_matrices() -> None:
    free = torch.randn(12, 12, dtype=torch.float64)
    torch.testing.assert_close(cayley(free) @ cayley(free).T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(cayley(torch.zeros(5, 5)), torch.eye(5))


@pytest.mark.parametrize(
    ("family", "most"), [("llama", 1 << 24), ("qwen2", 1 << 24), ("phi3", 1 << 24), ("gemma", 1 << 24), ("llama", 3000), ("phi3", 500)]
)
def test_weights_lose_less_and_the_model_stays(family: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "NUMBERS", most)
    model, drawn, before = (build(family, tie_word_embeddings=True) for _ in range(3))
    start, told = merge.planned(model, "learned", 1), list[int]()
    matrices, curve = learned.learn(model, start, grids(model), 1, told.append)
    assert told == list(range(1, learned.STEPS + 1)) and len(curve) == learned.STEPS
    for matrix in matrices.values():
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=1e-12)
    rotated(model, learned.merged(start, matrices))
    torch.testing.assert_close(logits(model), logits(before), rtol=1e-4, atol=1e-4 * float(logits(before).abs().max()))
    assert loss(model, grids(model)) < (0.95 if most > 4000 else 0.99) * loss(rotated(drawn, merge.planned(drawn, "hadamard", 1)), grids(model))
    if most > 4000:  # what it minimised is what was left, but for the last step
        assert curve[-1] == pytest.approx(loss(model, grids(model)), rel=1e-3)


def test_the_seed_decides_and_dense_linears_do_not_count() -> None:
    model = build("llama")
    start = merge.planned(model, "learned", 1)
    found = [learned.learn(model, start, given, 1)[0]["residual"] for given in (grids(model), grids(model), grids(model, leave="mlp"))]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    without = learned.learn(model, start, grids(model, leave="v_proj"), 1)[0]
    assert set(without) == {"residual", "0", "1", "2"}  # o_proj alone is reason enough to turn heads
    alone = learned.learn(model, start, {n: g for n, g in grids(model).items() if "mlp" in n}, 1)[0]
    assert set(alone) == {"residual"}
    assert torch.equal(learned.merged(start, alone).heads(1, 8).signs, start.heads(1, 8).signs)
