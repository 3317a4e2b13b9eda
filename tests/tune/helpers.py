"""What the tests of the training loop share."""

import torch

from compressor.tune.loop import train
from compressor.tune.peqa import Peqa


class Killed(Exception):
    """Stands for a crash."""


def run(make, windows, options, folder=None, fingerprint="a", model=None, seed=5, **hooks):
    """Attach and train a fresh model; returns (log, parameters)."""
    model = make() if model is None else model
    parameters = Peqa(options).attach(model)
    log = train(model, parameters, *windows, options, seed, folder, fingerprint, **hooks)
    return log, parameters


def kill_at(step):
    def on_step(record):
        if record["step"] == step:
            raise Killed

    return on_step


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
