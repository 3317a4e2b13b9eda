"""What one of two processes does in tests/test_world.py: prints one JSON document of what it saw. Arguments: its number, the port, a folder."""

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor import world
from compressor.errors import NumericError, OutputError
from compressor.recipe import Tune
from compressor.stats import LayerStats
from compressor.tune.loop import train


class Rows:
    """A regression; `spoilt`: (process, call) at which its loss is NaN, and later on too if `on`."""

    def __init__(self, spoilt: tuple[int, int] = (-1, -1), on: bool = False):
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = (torch.randn(24, 4, generator=generator) for _ in range(2))
        self.counts, self.spoilt, self.on, self.calls = torch.ones(24, dtype=torch.int64), spoilt, on, 0

    def rows(self, which: Tensor) -> tuple[Tensor, ...]:
        return self.x[which], self.y[which]

    def loss(self, model: nn.Module):
        def loss(x: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            process, first = self.spoilt
            spoil = world.rank() == process and (self.calls == first or (self.on and self.calls > first))
            return ((model(x) - y) ** 2).mean(1).sum() * (math.nan if spoil else 1.0)

        return loss


def tuned(steps: int, folder: Path | None, spoilt: tuple[int, int] = (-1, -1), on: bool = False):
    """The log and the weight after a few steps, of 6 rows in micro-batches of 2."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    options = Tune(steps=steps, lr=0.1, batch=2, accumulate=3, checkpoint_every=3, eval_every=0, schedule="constant", warmup=0.0)
    log = train(model, dict(model.named_parameters()), Rows(spoilt, on), options, 1, folder, "same")
    return log, model.weight.detach()


def statistics() -> tuple[LayerStats, Tensor]:
    """Sums over this process's rows, reduced, and the mean of x xT over all rows."""
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    stats = LayerStats(6)
    stats.add(x[:3] if world.rank() == 0 else x[3:])
    stats.reduce(x.device)
    return stats, x.T @ x / 10


def refusal() -> None:
    raise OutputError("no room")


def main() -> None:
    rank, port, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    world.join(rank, 2, torch.device("cpu"), "127.0.0.1", port)
    stats, full = statistics()
    tensors = world.send({"a": torch.arange(6).view(2, 3).half()} if rank else None, 1, torch.device("cpu"))
    found = {"stats": float((stats.hessian - full).abs().max()), "tokens": stats.tokens, "sent": tensors["a"].tolist(), "all": world.gather(rank)}
    try:
        world.first(refusal)
    except OutputError as error:
        found["refused"] = str(error)
    log, weight = tuned(7, folder)
    found |= {"weight": weight.tolist(), "losses": [row["loss"] for row in log.curve], "bytes": log.curve[0]["reduced_bytes"]}
    log, weight = tuned(4, None, spoilt=(1, 4))  # two calls a step: its step 2
    found |= {"notes": log.notes, "spoilt": weight.tolist()}
    try:
        tuned(9, None, spoilt=(0, 1), on=True)
    except NumericError as error:
        found["ended"] = str(error)
    sys.stdout.write(json.dumps(found) + "\n")
    world.leave()


if __name__ == "__main__":
    main()
