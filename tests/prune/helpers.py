"""Tiny random models of several architectures, windows to learn from, and low-rank paths that say something."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from compressor.linear import find_blocks, linears, swap, to_packed
from compressor.prune import lowrank
from compressor.prune.fisher import Gradients
from compressor.prune.obert import Obert, Settings
from compressor.tune.loss import loss_function
from tests.tune.conftest import round_to_nearest, sketch

VOCAB = 48
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 16,
    "max_position_embeddings": 64, "initializer_range": 0.1, "tie_word_embeddings": True,
}  # fmt: skip


def causal(kind: str = "llama", keys: int = 2, seed: int = 0, **config: Any) -> Any:
    """A model of the family `kind` with 8 query heads of 16 channels (wider than its residual stream) and `keys` key heads."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | {"num_key_value_heads": keys} | config)).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.3)  # fresh ones are zero, and would hide a wrong cut
    return model


def bert() -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)
    ).eval()


def windows(count: int = 6, length: int = 12, seed: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def pack(model: nn.Module, bits: int = 4, table: bool = False) -> nn.Module:
    """All linears of the blocks packed by plain rounding, in groups of 16."""
    blocks = find_blocks(model)[1]
    for name, layer in linears(blocks).items():
        make = sketch(layer.weight, bits, 16, torch.float16) if table else round_to_nearest(layer.weight, bits, 16, False, torch.float16)
        swap(blocks, name, to_packed(layer, make))
    return model


def paths_of(model: nn.Module, rank: int = 4, size: float = 0.3, seed: int = 1) -> dict[str, lowrank.LowRank]:
    """Attached paths whose B is not zero."""
    paths = lowrank.attach(model, rank, 8.0, seed)
    generator = torch.Generator().manual_seed(seed)
    for path in paths.values():
        path.b.data = size * torch.randn(path.b.shape, generator=generator) / rank
    return paths


def backward(model: nn.Module, ids: Tensor) -> Tensor:
    """The summed loss of the windows, with gradients."""
    loss = loss_function(model, ids[:1])(ids, ids)
    loss.backward()
    return loss.detach()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


class Regression:
    """A small network that learns inputs `x` to outputs `y`; mini-batches of the first half follow a generator of their own.

    batch: rows of a step; single: rows of a mini-batch gradient.
    """

    batch, single, rate = 64, 8, 5e-3

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, seed: int, steps: int):
        self.net, self.x, self.y, self.rng = net, x, y, torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(net.parameters(), self.rate)
        for _ in range(steps):
            self.train_step()

    def loss(self, size: int) -> Tensor:
        rows = torch.randint(0, len(self.x) // 2, (size,), generator=self.rng)
        return nn.functional.mse_loss(self.net(self.x[rows]), self.y[rows])

    def train_step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.batch).backward()
        self.optimizer.step()

    def gradients(self, count: int) -> Iterator[None]:
        for _ in range(count):
            self.loss(self.single).backward()
            yield

    def test_loss(self) -> float:
        """Of the second half, which nobody learns from."""
        half = len(self.x) // 2
        with torch.no_grad():
            return float(nn.functional.mse_loss(self.net(self.x[half:]), self.y[half:]))


def prune_once(model: nn.Module, weights: Mapping[str, nn.Parameter], gradients: Gradients, ratio: float, settings: Settings) -> Obert:
    """Prune to the ratio at once; the masks and notes are in what is returned."""
    pruner = Obert(model, weights, gradients, ((0, ratio),), settings)
    pruner.prune(0)
    return pruner
