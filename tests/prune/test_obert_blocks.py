"""Chunk by chunk: the same as all at once where it should be, and never more matrices alive than one chunk's."""

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import RecipeError
from compressor.prune.fisher import BlockFisher
from compressor.prune.masks import Pattern
from compressor.prune.obert import Settings
from compressor.prune.obert_blocks import prune_blocks
from tests.prune.helpers import prune_once


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Model:
    """A stack of residual blocks trained on a regression; mini-batch i of a collection is always the same."""

    def __init__(self, seed: int = 0, steps: int = 150):
        torch.manual_seed(seed)
        self.x = torch.randn(1024, 16) @ (torch.randn(16, 16) * torch.logspace(0, -1, 16))
        self.y = torch.tanh(self.x @ torch.randn(16, 8)) @ torch.randn(8, 16)
        self.net = nn.Sequential(*(Residual() for _ in range(4)))
        self.chunks = [{f"{i}.{n}.weight": block.get_parameter(f"{n}.weight") for n in ("up", "down")} for i, block in enumerate(self.net)]
        self.weights = {name: p for chunk in self.chunks for name, p in chunk.items()}
        optimizer = torch.optim.AdamW(self.net.parameters(), 3e-3)
        for i in range(steps):
            optimizer.zero_grad()
            self.loss(i, 64).backward()
            optimizer.step()
        optimizer.zero_grad()

    def loss(self, i: int, size: int) -> Tensor:
        rows = torch.randint(0, 1024, (size,), generator=torch.Generator().manual_seed(i))
        return nn.functional.mse_loss(self.net(self.x[rows]), self.y[rows])

    def gradients(self, count: int) -> Iterator[None]:
        for i in range(count):
            self.loss(10_000 + i, 8).backward()
            yield

    def whole_loss(self) -> float:
        with torch.no_grad():
            return float(nn.functional.mse_loss(self.net(self.x), self.y))


SETTINGS = Settings(gradients=64, block=16)


def test_one_global_threshold_is_that_of_all_at_once() -> None:
    for settings in (SETTINGS, Settings(Pattern(group=4), gradients=64), Settings(Pattern(keep=2, of=4), gradients=64)):
        model, other = Model(), Model()
        found = prune_blocks(model.net, model.chunks, model.gradients, 0.5, settings)
        assert found.sparsity == 0.5
        expected = prune_once(other.net, other.weights, other.gradients, 0.5, settings)
        assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
        assert torch.equal(model.weights["0.up.weight"], other.weights["0.up.weight"])  # the first chunk's replay sees what all saw
        assert model.whole_loss() < 1.1 * other.whole_loss()


def test_second_order_by_chunks_beats_magnitude_and_rounds_help() -> None:
    losses: dict[str, float] = {}
    for seed in range(2):
        for label, settings in {"once": SETTINGS, "four": Settings(gradients=64, block=16, rounds=4), "size": Settings(score="magnitude")}.items():
            model = Model(seed)
            dense = model.whole_loss()
            prune_blocks(model.net, model.chunks, model.gradients, 0.5, settings)
            losses[label] = losses.get(label, 0.0) + model.whole_loss() - dense
    assert losses["four"] < 0.8 * losses["once"] and losses["once"] < 0.7 * losses["size"], losses


def test_never_more_than_one_chunk_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[BlockFisher] = weakref.WeakSet()
    peak, init = [0], BlockFisher.__init__

    def counted(self: BlockFisher, *args: int, **options: int) -> None:
        init(self, *args, **options)
        alive.add(self)
        peak[0] = max(peak[0], sum(fisher.nbytes for fisher in alive))

    monkeypatch.setattr(BlockFisher, "__init__", counted)
    model = Model(steps=5)

    def gradients(count: int) -> Iterator[None]:
        for _ in model.gradients(count):
            having = {name for name, p in model.net.named_parameters() if p.grad is not None}
            assert having in [set(chunk) for chunk in model.chunks]
            yield

    prune_blocks(model.net, model.chunks, gradients, 0.5, Settings(gradients=20, block=16, rounds=2))
    chunk = sum(BlockFisher(w.numel(), 16, 1e-7, 20).nbytes for w in model.chunks[0].values())
    assert peak[0] == chunk


def test_flags_return() -> None:
    model = Model(steps=5)
    model.net[1].up.bias.requires_grad_(False)
    prune_blocks(model.net, model.chunks, model.gradients, 0.3, SETTINGS)
    flags = [name for name, p in model.net.named_parameters() if not p.requires_grad]
    assert flags == ["1.up.bias"] and all(p.grad is None for p in model.net.parameters())


def test_faults_are_noted_once_and_weights_must_be_in_one_chunk() -> None:
    model = Model(steps=5)

    def gradients(count: int) -> Iterator[None]:
        for _ in model.gradients(count):
            grad = model.weights["2.up.weight"].grad
            if grad is not None:
                grad[0] = float("nan")
            yield

    found = prune_blocks(model.net, model.chunks, gradients, 0.5, SETTINGS)
    assert found.notes == ["2.up.weight: of 32 blocks of its Fisher matrix 1 have no usable gradient and count by magnitude"]
    for chunks in ([], [model.chunks[0], model.chunks[0]]):
        with pytest.raises(RecipeError, match="each in one chunk only"):
            prune_blocks(model.net, chunks, model.gradients, 0.5)
