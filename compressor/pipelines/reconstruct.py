"""Block-wise reconstruction: all codes, scales and zeros of a decoder block trained together until it puts out what the dense block does.

A packer sees one linear at a time; here the packed linears of a block are trained on the block's own output by straight-through rounding
(quant/latent.py). The loss is the squared error of a token relative to its size, half of it in the metric of what the end loss feels (curvature.py).
Inputs are what the packed blocks before put out, targets what the dense model has in that place: so a block also makes up for what was lost before
it. It starts from GPTQ's codes, and ends in the same packed weight.

    block: codes move anywhere on the grid            (Block-AP of EfficientQAT, Chen et al., 2024, arXiv 2407.11062, section 3.2)
    round: each weight takes one of its two neighbours  (as in AdaRound, arXiv 2004.10568, and auto-round, arXiv 2309.05516)

Rates are in steps of the grid and shares of a scale, so that one holds for all models; AdamW with a cosine to LAST of them. The loss is summed over
tokens: gradients of their mean would be as small as Adam's epsilon in layers of thousands of inputs, and zero in float16. A block that came out no
better on the first windows keeps what it started from. Norms and biases stay as they are.
Price: `quant.passes` times forward and backward of every calibration window through every block, and one forward for the targets; the block's
weights in float32 with gradient and two moments; the dense model's hidden states, waiting where those of the packed one do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from compressor import linear
from compressor.pipelines.blockwise.blocks import Blocks
from compressor.pipelines.blockwise.hidden import Hidden
from compressor.pipelines.calibrate import Calibration
from compressor.pipelines.curvature import Curvature, sampled
from compressor.quant.latent import RoundedLinear
from compressor.recipe import Quant

FELT = 0.5  # share of the error that is counted by what the end loss feels of it; the rest counts all directions alike
LAST = 1 / 20  # the last rate, as a share of the first
BETAS = (0.9, 0.95)


@dataclass
class Reconstruction:
    """The dense model's hidden states on their way through the blocks, beside those of the packed one."""

    targets: Calibration
    quant: Quant
    seed: int
    felt: Curvature

    @classmethod
    def of(cls, model: nn.Module, blocks: nn.ModuleList, ids: Tensor, targets: Calibration, quant: Quant, seed: int) -> "Reconstruction":
        """targets: windows `ids` int64 [count, seqlen] before the first block of the model, which is dense."""
        visits = Blocks.of(model)
        waiting: Callable[[str], Hidden] = (lambda name: []) if visits is None else visits.waiting
        return cls(targets, quant, seed, Curvature(model, blocks, sampled(ids), quant.windows, seed, waiting))

    def see(self, block: nn.Module, index: int) -> None:
        """The dense block's outputs are the targets from now on; every block is seen once, in order."""
        self.targets.run(block, index, keep=True)

    def train(
        self,
        block: nn.Module,
        index: int,
        dense: dict[str, nn.Linear],
        reach: dict[str, float | None],
        keep: dict[str, Tensor | None],
        inputs: Calibration,
    ) -> tuple[float, float]:
        """Trains the packed linears that stand in place of `dense`, by name, on all windows.

        reach: how far from the dense weight codes may go, in steps; None: anywhere. keep: bool [n, k], false where a
        weight was pruned and stays zero; None: nowhere. Returns the error of the block's outputs before and after, a
        share of their size, in the metric that they are trained by, on the first windows; where it did not fall, all stays as it was.
        """
        packed = {leaf: block.get_submodule(leaf) for leaf in dense}
        metric = self._metric(block, index)
        before = self._error(block, index, inputs, metric)
        layers = {leaf: RoundedLinear(layer, _packed(packed[leaf]).packed(), reach[leaf], keep[leaf]) for leaf, layer in dense.items()}
        for leaf, layer in layers.items():
            linear.swap(block, leaf, layer)
        after = math.inf
        if self._steps(block, index, layers, inputs, metric):
            for leaf, layer in layers.items():
                linear.swap(block, leaf, linear.PackedLinear(layer.packed(), layer.bias).train(layer.training))
            after = self._error(block, index, inputs, metric)
        if not after < before:
            for leaf, old in packed.items():
                linear.swap(block, leaf, old)
        return before, after

    @torch.enable_grad()
    def _steps(self, block: nn.Module, index: int, layers: dict[str, RoundedLinear], inputs: Calibration, metric: Tensor) -> bool:
        """Whether all went well: false, at once, where a loss is not finite."""
        quant, order = self.quant, torch.Generator().manual_seed(self.seed + index)
        values = [p for layer in layers.values() for name, p in layer.named_parameters() if name in ("stretch", "zero")]
        groups = [([layer.position for layer in layers.values()], quant.rate), (values, quant.value_rate)]
        optimizer = torch.optim.AdamW([{"params": part, "lr": rate} for part, rate in groups], weight_decay=0.0, betas=BETAS)
        total = quant.passes * sum(-(-len(batch) // quant.windows) for batch in inputs.batches)
        done = 0
        for _ in range(quant.passes):
            for at in torch.randperm(len(inputs.batches), generator=order).tolist():
                given, wanted = inputs.hidden[at], self.targets.hidden[at]
                for rows in torch.randperm(len(given), generator=order).split(quant.windows):
                    done += 1
                    for part, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
                        part["lr"] = rate * (LAST + (1 - LAST) * (1 + math.cos(math.pi * (done - 1) / total)) / 2)
                    wrong, _ = _compare(block, given[rows], wanted[rows], inputs.arguments[index][len(rows)], metric)
                    if not bool(torch.isfinite(wrong)):
                        return False
                    moving = [parameter for part, _ in groups for parameter in part]
                    if not wrong.requires_grad:  # no token reached any of them
                        continue
                    slopes = torch.autograd.grad(wrong, moving, allow_unused=True)  # experts that none of these tokens reached have none
                    for parameter, slope in zip(moving, slopes, strict=True):
                        parameter.grad = slope
                    optimizer.step()
                    optimizer.zero_grad()
                    for layer in layers.values():
                        layer.settle()
        return True

    @torch.no_grad()
    def _error(self, block: nn.Module, index: int, inputs: Calibration, metric: Tensor) -> float:
        """Of the first windows: the root of the mean squared error of a token in this metric, a share of its size."""
        given = inputs.hidden[0]
        wrong, size = _compare(block, given, self.targets.hidden[0], inputs.arguments[index][len(given)], metric)
        return math.sqrt(float(wrong) / size)

    def _metric(self, block: nn.Module, index: int) -> Tensor:
        """[d, d], on the block's device: what squared errors of its outputs are measured by."""
        felt = self.felt[index].to(_device(block))
        return FELT * felt + (1 - FELT) * torch.eye(len(felt), device=felt.device)


def _packed(layer: nn.Module) -> linear.PackedLinear:
    assert isinstance(layer, linear.PackedLinear)
    return layer


def _device(block: nn.Module) -> torch.device:
    return next(chain(block.parameters(), block.buffers())).device


def _compare(block: nn.Module, given: Tensor, wanted: Tensor, arguments: dict[str, object], metric: Tensor) -> tuple[Tensor, int]:
    """Squared error of what the block puts out for hidden states [windows, tokens, width], over the squared size of what it should;
    summed over tokens, and their number. Each token counts the same: what reads it divides by its size, and a few are far larger than the rest."""
    device = _device(block)
    out = block(given.to(device), **arguments)
    out, target = (out[0] if isinstance(out, tuple) else out).float(), wanted.to(device).float()
    wrong = out - target
    errors = (wrong @ metric * wrong).sum(-1) / target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)  # [windows, tokens]
    return errors.sum(), errors.numel()
