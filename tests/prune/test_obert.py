"""The pruner on small networks that were really trained: quality, exactness, faults, and its place in a training loop."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError, RecipeError
from compressor.prune.masks import Pattern, parse_pattern
from compressor.prune.obert import Obert, Settings, portions
from tests.prune.helpers import Regression, prune_once


class Task(Regression):
    """A regression with correlated inputs and a network trained on it."""

    batch, single, rate = 128, 16, 3e-3

    def __init__(self, seed: int, steps: int = 250):
        torch.manual_seed(seed)
        mix = torch.randn(32, 32) * torch.logspace(0, -1.5, 32)
        x = torch.randn(2048, 32) @ mix.T
        teacher = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 8))
        y = (teacher(x) * 1.5 + 0.1 * torch.randn(2048, 8)).detach()
        self.model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 8))
        self.weights = {name: p for name, p in self.model.named_parameters() if p.dim() == 2}
        super().__init__(self.model, x, y, seed, steps)

    def pruner(self, *schedule: tuple[int, float], **options: object) -> Obert:
        return Obert(self.model, self.weights, self.gradients, schedule, Settings(**{"gradients": 32, "block": 16, **options}))


def one_shot(seeds: int, ratio: float, **options: object) -> float:
    total = 0.0
    for seed in range(seeds):
        task = Task(seed)
        prune_once(task.model, task.weights, task.gradients, ratio, Settings(**{"gradients": 128, "block": 32, **options}))
        total += task.test_loss() / seeds
    return total


def test_one_shot_recomputation_helps_and_magnitude_is_behind() -> None:
    once, four = one_shot(4, 0.7), one_shot(4, 0.7, rounds=4)
    assert four < 0.85 * once
    assert once < 0.7 * one_shot(4, 0.7, score="magnitude")
    assert once < one_shot(4, 0.7, joint=False)


def test_correlated_inputs_of_a_linear_regression() -> None:
    """On a quadratic loss the second order is exact: it beats magnitude by far, and so does its move of the survivors alone."""
    results: dict[str, float] = {}
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(4096, 24) @ (torch.randn(24, 24) * torch.logspace(0, -1, 24))
        y = x @ torch.randn(24, 6) + 0.5 * torch.randn(4096, 6)
        best = torch.linalg.lstsq(x, y).solution.T
        for label, settings in {
            "obert": Settings(gradients=1024, block=24),
            "magnitude": Settings(score="magnitude"),
            "4block": Settings(Pattern(group=4), gradients=1024, block=24),
            "4magnitude": Settings(Pattern(group=4), score="magnitude"),
        }.items():
            layer = nn.Linear(24, 6, bias=False)
            layer.weight.data.copy_(best)

            def gradients(count: int, layer: nn.Linear = layer, x: Tensor = x, y: Tensor = y) -> Iterator[None]:
                for i in range(count):
                    nn.functional.mse_loss(layer(x[4 * i : 4 * i + 4]), y[4 * i : 4 * i + 4]).backward()
                    yield

            prune_once(layer, {"weight": layer.weight}, gradients, 0.5, settings)
            results[label] = results.get(label, 0.0) + float(nn.functional.mse_loss(layer(x), y).detach())
    assert results["obert"] < 0.5 * results["magnitude"] and results["4block"] < 0.7 * results["4magnitude"], results


@pytest.mark.parametrize("score", ["obert", "magnitude"])
@pytest.mark.parametrize("text", ["unstructured", "4block", "8block", "2:4"])
def test_patterns_are_legal_sparsity_exact_and_masks_monotone(text: str, score: str) -> None:
    task = Task(0, steps=30)
    pruner = task.pruner((0, 0.3), (5, 0.45), (9, 0.5), pattern=parse_pattern(text), score=score, rounds=2, gradients=8)
    total, before = sum(w.numel() for w in task.weights.values()), {name: mask.clone() for name, mask in pruner.masks.items()}
    for step in range(10):
        pruner.prune(step)
        units = total // pruner.settings.pattern.group
        ratio = 0.3 if step < 5 else 0.45 if step < 9 else 0.5
        gone = sum(int((~mask).sum()) for mask in pruner.masks.values())
        assert gone == round(ratio * units) * pruner.settings.pattern.group and pruner.sparsity == gone / total
        for name, mask in pruner.masks.items():
            assert not (mask & ~before[name]).any()
            assert int((task.weights[name][~mask] != 0).sum()) == 0
            if text.endswith("block"):
                assert set(mask.unflatten(1, (-1, int(text[0]))).sum(2).flatten().tolist()) <= {0, int(text[0])}
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
    if text == "2:4":
        assert all(bool((mask.unflatten(1, (-1, 4)).sum(2) == 2).all()) for mask in pruner.masks.values())


def test_zeros_stay_zero_under_adamw() -> None:
    task = Task(1, steps=50)
    pruner = task.pruner((0, 0.6), gradients=16, block=0)
    pruner.prune(0)
    revived = 0
    for _ in range(20):
        task.train_step()
        revived += sum(int((w[~pruner.masks[name]] != 0).sum()) for name, w in task.weights.items())
        pruner.hold()
        for name, w in task.weights.items():
            gone = ~pruner.masks[name]
            assert not w[gone].any() and w.grad is not None and not w.grad[gone].any()
    assert revived > 0  # by momentum alone, so that holding is what kept them


def test_training_recovers_between_prunes() -> None:
    task = Task(2)
    pruner = task.pruner((0, 0.5), (60, 0.7), (120, 0.8))
    pruner.prune(0)
    for step in range(200):
        pruner.prune(step)
        task.train_step()
        pruner.hold()
    assert pruner.restarts == (0, 60, 120)
    assert task.test_loss() < 0.5 * one_shot(1, 0.8)


def run(task: Task, pruner: Obert, steps: range) -> None:
    for step in steps:
        task.rng.manual_seed(1000 + step)
        pruner.prune(step)
        pruner.observe(step)
        task.train_step()
        pruner.hold()


def saved(task: Task, pruner: Obert) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {k: v.clone() for k, v in task.model.state_dict().items()}, {k: v.clone() for k, v in pruner.tensors().items()}


def test_resumed_through_tensors_equals_unbroken() -> None:
    schedule = ((2, 0.3), (6, 0.5), (8, 0.6))
    for cut in (1, 3, 6, 7):
        whole = Task(3, steps=20)
        pruner = whole.pruner(*schedule, rounds=2, gradients=8)
        run(whole, pruner, range(cut))
        values, masks = saved(whole, pruner)
        other = Task(3, steps=0)
        other.model.load_state_dict(values)
        other.optimizer.load_state_dict(deepcopy(whole.optimizer.state_dict()))
        again = other.pruner(*schedule, rounds=2, gradients=8)
        for name, mask in again.tensors().items():
            mask.copy_(masks[name])
        run(whole, pruner, range(cut, 10))
        run(other, again, range(cut, 10))
        assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), other.model.parameters(), strict=True))
        assert all(torch.equal(mask, again.masks[name]) for name, mask in pruner.masks.items()) and again.sparsity == pytest.approx(0.6, abs=1e-3)


def test_a_prune_that_was_undone_is_due_again() -> None:
    task = Task(4, steps=20)
    pruner = task.pruner((0, 0.5))
    values, masks = saved(task, pruner)
    pruner.prune(0)
    task.model.load_state_dict(values)
    for name, mask in pruner.tensors().items():
        mask.copy_(masks[name])
    pruner.prune(1)
    assert pruner.sparsity == 0.5
    state = saved(task, pruner)
    pruner.prune(2)  # nothing is due: no mini-batch is run and nothing moves
    assert all(torch.equal(a, b) for a, b in zip(state[0].values(), task.model.state_dict().values(), strict=True))


def test_gradients_that_are_not_finite_are_noted_and_not_fatal() -> None:
    task = Task(5, steps=20)

    def gradients(count: int) -> Iterator[None]:
        for i, _ in enumerate(task.gradients(count)):
            grads = {name: w.grad for name, w in task.weights.items() if w.grad is not None}
            grads["2.weight"][0] = float("nan")
            if i == 3:
                grads["0.weight"][:] = float("inf")
            yield

    pruner = prune_once(task.model, task.weights, gradients, 0.6, Settings(gradients=16, block=16))
    assert pruner.sparsity == pytest.approx(0.6, abs=1e-3)
    assert all(bool(torch.isfinite(w).all()) for w in task.weights.values())
    assert pruner.notes == [
        "step 0: 0.weight: of 96 blocks of its Fisher matrix 96 had gradients that are not finite, which were left out",
        "step 0: 2.weight: of 144 blocks of its Fisher matrix 3 have no usable gradient and count by magnitude",
    ]


def test_large_damping_is_magnitude_pruning() -> None:
    task, other = Task(6, steps=20), Task(6, steps=20)
    prune_once(task.model, task.weights, task.gradients, 0.5, Settings(gradients=8, damp=1e6))
    prune_once(other.model, other.weights, other.gradients, 0.5, Settings(score="magnitude"))
    same = [torch.equal(w == 0, other.weights[name] == 0) for name, w in task.weights.items()]
    assert all(same)


def test_what_cannot_work_is_refused() -> None:
    task = Task(0, steps=0)
    for options in ({"score": "random"}, {"damp": 0.0}, {"rounds": 0}, {"gradients": 0}, {"block": 50, "pattern": Pattern(group=4)}):
        with pytest.raises(RecipeError):
            Settings(**options)
    for schedule in ((), ((0, 0.5), (0, 0.6)), ((4, 0.5), (2, 0.6)), ((0, 0.6), (2, 0.5)), ((0, 1.5),)):
        with pytest.raises(RecipeError):
            task.pruner(*schedule)
    with pytest.raises(RecipeError, match="the pattern 2:4 goes to 50%"):
        task.pruner((0, 0.6), pattern=parse_pattern("2:4"))
    with pytest.raises(ModelError, match="odd: a weight of shape"):
        Obert(task.model, {"odd": nn.Parameter(torch.zeros(4, 6))}, task.gradients, ((0, 0.5),), Settings(Pattern(group=4)))
    assert (Settings().size, Settings(Pattern(group=4)).size, Settings(Pattern(group=12)).size, Settings(block=16).size) == (50, 32, 24, 16)
    assert (portions(7, 3), portions(2, 4), portions(0, 2), portions(-5, 2)) == ([2, 2, 3], [1, 1], [], [])
