"""Scores of whole units against explicit inverses, their compensation, the masks at the gates, and the pruner on a trained network."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError, NumericError, RecipeError
from compressor.prune.fisher import BlockFisher
from compressor.prune.masks import Pattern
from compressor.prune.obert import Settings
from compressor.prune.structured_obert import StructuredObert, block_of, cut, structure_scores
from compressor.prune.unit_masks import UnitMasks, select
from compressor.prune.units import Family, Part
from tests.prune.helpers import Regression

HEADS = Family(0, "heads", 4, (Part("query", 0, 4), Part("out", 1, 4)))
FFN = Family(0, "ffn", 24, (Part("up", 0, 1), Part("down", 1, 1)))


class Net(nn.Module):
    """Two families without attention between: the units are all that matters here."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(12, 16), nn.Linear(16, 12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(torch.tanh(self.query(x)))
        return self.down(nn.functional.gelu(self.up(x)))


def fishers(weights: dict[str, Tensor], limit: int = 64, count: int = 60) -> tuple[dict[str, BlockFisher], dict[str, Tensor]]:
    """Of random gradients: the matrices, and the dense inverse of each, [n k, n k] with zeros outside its blocks."""
    found, dense = {}, {}
    for family in (HEADS, FFN):
        for part in family.parts:
            w = weights[part.name]
            gradients, size = torch.randn(count, w.numel(), dtype=torch.float64), block_of(part, w.shape[1], limit)
            fisher = BlockFisher(w.numel(), size, 1e-3, count)
            for g in gradients.float():
                fisher.add(g)
            fisher.finish()
            full = gradients.T @ gradients / count
            index = torch.arange(w.numel()) // size
            found[part.name] = fisher
            dense[part.name] = torch.linalg.inv(full * (index.unsqueeze(0) == index.unsqueeze(1)) + 1e-3 * torch.eye(w.numel(), dtype=torch.float64))
    return found, dense


def owned(part: Part, unit: int, shape: torch.Size) -> Tensor:
    """Flat indices of the entries that a unit owns."""
    mask = torch.zeros(shape, dtype=torch.bool)
    span = slice(unit * part.width, (unit + 1) * part.width)
    if part.axis == 0:
        mask[span] = True
    else:
        mask[:, span] = True
    return mask.flatten().nonzero().flatten()


@pytest.mark.parametrize("limit", [64, 4, 2])
def test_scores_are_those_of_explicit_inverses(limit: int) -> None:
    torch.manual_seed(0)
    net = Net()
    weights = {name: net.get_submodule(name).get_parameter("weight").detach() for name in ("query", "out", "up", "down")}
    found, dense = fishers(weights, limit)
    for family, scores in zip((HEADS, FFN), structure_scores([HEADS, FFN], weights, found).values(), strict=True):
        for unit in range(family.count):
            cost = 0.0
            for part in family.parts:
                w, mine = weights[part.name].flatten().double(), owned(part, unit, weights[part.name].shape)
                runs = mine.split(found[part.name].block) if part.axis == 0 else mine.split(min(part.width, found[part.name].block))
                cost += sum(float(0.5 * w[r] @ torch.linalg.solve(dense[part.name][r][:, r], w[r])) for r in runs)
            assert float(scores[unit]) == pytest.approx(cost, rel=1e-4)


def test_blocks_never_straddle_rows_or_cut_units() -> None:
    columns, rows = Part("x", 1, 48), Part("x", 0, 48)
    assert (block_of(rows, 768), block_of(columns, 768), block_of(Part("x", 1, 128), 4096)) == (64, 48, 64)
    assert (block_of(Part("x", 1, 1), 11008), block_of(Part("x", 1, 24), 97), block_of(rows, 7), block_of(Part("x", 1, 64), 768, 16)) == (
        64,
        1,
        7,
        16,
    )


def test_the_columns_that_stay_make_up_for_those_that_go() -> None:
    torch.manual_seed(0)
    net = Net()
    weights = {name: net.get_submodule(name).get_parameter("weight") for name in ("query", "out", "up", "down")}
    found, dense = fishers({name: w.detach() for name, w in weights.items()})
    before, alive = weights["out"].detach().clone(), torch.tensor([True, False, True, False])
    cut(HEADS, alive, weights, found)
    gone = torch.cat([owned(HEADS.gate, unit, before.shape) for unit in (1, 3)])
    inverse, w = dense["out"], before.flatten().double()
    expected = (w - inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], w[gone])).view_as(before)
    torch.testing.assert_close(weights["out"].detach().double(), expected, rtol=1e-4, atol=1e-5)
    assert not weights["out"][:, 4:8].any() and not weights["query"][4:8].any() and weights["query"][:4].all()


def test_masked_units_are_cut_off_and_come_back() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 5, 12)
    dense = net(x)
    masks = UnitMasks(net, [HEADS, FFN])
    torch.testing.assert_close(net(x), dense)
    masks.tensors()["0.heads"][2] = 0.0
    masks.tensors()["0.ffn"][::2] = 0.0
    assert masks.kept() == {"0.heads": 3, "0.ffn": 12} and masks.alive("0.heads").tolist() == [True, True, False, True]
    masked = net(x)
    masked.square().sum().backward()
    assert net.query.weight.grad is not None and net.down.weight.grad is not None
    assert not net.query.weight.grad[8:12].any() and not net.down.weight.grad[:, ::2].any()
    masks.remove()
    torch.testing.assert_close(net(x), dense)
    net.out.weight.data[:, 8:12] = 0.0
    net.down.weight.data[:, ::2] = 0.0
    torch.testing.assert_close(net(x), masked)


def test_masks_follow_the_dtype_of_inputs() -> None:
    net = Net().to(torch.bfloat16)
    masks = UnitMasks(net, [FFN])
    assert net(torch.randn(2, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16 and masks.tensors()["0.ffn"].dtype == torch.float32


def test_selection_is_exact_monotone_and_even() -> None:
    scores = torch.tensor([5.0, 1.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0])
    assert select(scores, 3).tolist() == [False, False, False, False, True, True, True, False]
    assert select(scores, 4, within=4).tolist() == [True, False, True, False, True, True, False, False]
    alive = torch.tensor([False, True, True, True, True, True, True, False])
    assert select(scores, 4, 4, alive).tolist() == [False, False, True, True, True, True, False, False]
    assert select(torch.ones(4), 2).tolist() == [False, False, True, True]
    assert select(torch.tensor([float("-inf"), 1.0, float("inf"), 0.0]), 3, 0, torch.tensor([True, True, True, False])).tolist() == [
        True,
        True,
        True,
        False,
    ]
    assert int(select(scores, 0).sum()) == 0 and bool(select(scores, 8, within=2).all())


@pytest.mark.parametrize(("kept", "within"), [(9, 0), (-1, 0), (3, 4), (8, 4), (7, 0)])
def test_selections_that_cannot_be_met_are_refused(kept: int, within: int) -> None:
    alive = torch.tensor([True] * 6 + [False] * 2)
    with pytest.raises(RecipeError, match=f"{kept} of 8 units cannot be kept"):
        select(torch.rand(8), kept, within, alive)


def test_scores_that_are_not_numbers_matter_only_for_the_living() -> None:
    scores, alive = torch.tensor([float("nan"), 1.0, 2.0]), torch.tensor([False, True, True])
    assert select(scores, 1, 0, alive).tolist() == [False, False, True]
    with pytest.raises(NumericError, match="are not numbers"):
        select(scores, 1)


class Trained(Regression):
    """The network after learning a task with fewer hidden directions than it has units."""

    def __init__(self, seed: int, steps: int = 200):
        torch.manual_seed(seed)
        x = torch.randn(2048, 12) @ (torch.randn(12, 12) * torch.logspace(0, -1, 12))
        y = torch.tanh(x @ torch.randn(12, 5)) @ torch.randn(5, 12)
        super().__init__(Net(), x, y, seed, steps)
        self.masks = UnitMasks(self.net, [HEADS, FFN])

    def pruner(self, *schedule: tuple[int, float], widths: Callable[[float], dict[str, int]] | None = None, **options: object) -> StructuredObert:
        settings = Settings(**{"gradients": 128, **options})
        return StructuredObert(self.net, self.masks, self.gradients, schedule, widths or half, settings)


def half(ratio: float) -> dict[str, int]:
    return {"0.heads": 4 - round(4 * ratio), "0.ffn": 24 - round(24 * ratio)}


def test_pruned_by_curvature_beats_magnitude_and_the_move_helps() -> None:
    losses: dict[str, float] = {}
    for seed in range(4):
        for label, options in {"obert": {}, "rounds": {"rounds": 4}, "magnitude": {"score": "magnitude"}}.items():
            task = Trained(seed)
            task.pruner((0, 0.5), **options).prune(0)
            assert task.masks.kept() == {"0.heads": 2, "0.ffn": 12}
            losses[label] = losses.get(label, 0.0) + task.test_loss() / 4
    assert losses["obert"] < 0.8 * losses["magnitude"] and losses["rounds"] < losses["obert"], losses


def test_widths_are_met_at_each_step_masks_monotone_and_nothing_is_due_twice() -> None:
    task = Trained(0, steps=20)
    pruner = task.pruner((2, 0.25), (4, 0.25001), (5, 0.5), gradients=8, rounds=3)
    before = {key: mask.clone() for key, mask in pruner.tensors().items()}
    for step in range(8):
        state = [p.detach().clone() for p in task.net.parameters()]
        pruner.prune(step)
        moved = any(not torch.equal(a, b) for a, b in zip(state, task.net.parameters(), strict=True))
        assert moved == (step in (2, 5)) and task.masks.kept() == half(0.0 if step < 2 else 0.25 if step < 5 else 0.5)
        assert all(bool((mask <= before[key]).all()) for key, mask in pruner.tensors().items())
        before = {key: mask.clone() for key, mask in pruner.tensors().items()}
        task.train_step()
        pruner.hold()
    assert pruner.restarts == (2, 4, 5)


def test_resumed_through_tensors_equals_unbroken() -> None:
    ends = []
    for cut_at in (None, 3):
        task = Trained(1, steps=20)
        pruner = task.pruner((1, 0.25), (5, 0.5), gradients=8)
        for step in range(8):
            if step == cut_at:
                saved = {key: mask.clone() for key, mask in pruner.tensors().items()}
                task.masks.remove()
                task.masks = UnitMasks(task.net, [HEADS, FFN])
                pruner = task.pruner((1, 0.25), (5, 0.5), gradients=8)
                for key, mask in pruner.tensors().items():
                    mask.copy_(saved[key])
            task.rng.manual_seed(step)
            pruner.prune(step)
            task.train_step()
        ends.append([p.detach() for p in task.net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_query_heads_leave_their_groups_evenly_in_rounds() -> None:
    task = Trained(2, steps=20)
    task.masks.remove()
    family = Family(0, "heads", 4, HEADS.parts, within=2)
    task.masks = UnitMasks(task.net, [family])
    task.pruner((0, 0.5), rounds=4, gradients=8, widths=lambda ratio: {"0.heads": 2}).prune(0)
    assert task.masks.alive("0.heads").view(2, 2).sum(1).tolist() == [1, 1]
    with pytest.raises(RecipeError, match="0.heads cannot keep 1 of 4"):
        task.pruner((0, 0.5), widths=lambda ratio: {"0.heads": 1}).prune(0)


def test_faulty_gradients_are_noted() -> None:
    task = Trained(3, steps=20)

    def gradients(count: int) -> Iterator[None]:
        for _ in task.gradients(count):
            assert task.net.up.weight.grad is not None
            task.net.up.weight.grad[0] = float("nan")
            yield

    pruner = StructuredObert(task.net, task.masks, gradients, ((0, 0.5),), half, Settings(gradients=8))
    pruner.prune(0)
    assert pruner.notes == ["step 0: up: of 24 blocks of its Fisher matrix 1 have no usable gradient and count by magnitude"]
    assert task.masks.kept() == half(0.5)


def test_what_cannot_work_is_refused() -> None:
    task = Trained(0, steps=0)
    with pytest.raises(RecipeError, match="4block has no meaning"):
        task.pruner((0, 0.5), pattern=Pattern(group=4))
    with pytest.raises(RecipeError, match="ascend"):
        task.pruner((2, 0.5), (1, 0.6))
    task.net.up = nn.Sequential(task.net.up)
    with pytest.raises(ModelError, match="up is a Sequential"):
        task.pruner((0, 0.5))
