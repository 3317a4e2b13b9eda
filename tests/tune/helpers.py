"""What the tests of the training loop share."""

import torch

from compressor.tune.batches import CausalLM
from compressor.tune.loop import train
from compressor.tune.peqa import Peqa


class Killed(Exception):
    """Stands for a crash."""


def run(make, windows, options, folder=None, fingerprint="a", model=None, seed=5, **hooks):
    """Attach and train a fresh model; returns (log, parameters)."""
    model = make() if model is None else model
    parameters = Peqa(options).attach(model)
    log = train(model, parameters, CausalLM(*windows), options, seed, folder, fingerprint, **hooks)
    return log, parameters


def kill_at(step):
    def on_step(record):
        if record["step"] == step:
            raise Killed

    return on_step


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def backward(layer):
    """Run a layer forward and back once; returns x [5, 7, k], with its gradient, and the gradient of the outputs [5, 7, n]."""
    x = torch.randn(5, 7, layer.in_features, generator=torch.Generator().manual_seed(2), requires_grad=True)
    wanted = torch.randn(5, 7, layer.out_features, generator=torch.Generator().manual_seed(4))
    (layer(x) * wanted).sum().backward()
    return x, wanted


def dense_backward(x, weight, wanted):
    """The gradient of x by autograd of the dense float64 weight [n, k], whose own leaves get theirs."""
    dense = x.detach().double().requires_grad_(True)
    (torch.nn.functional.linear(dense, weight) * wanted.double()).sum().backward()
    return dense.grad
