"""EfficientQAT's first stage, block-wise training of all parameters (Block-AP), as an arm of the headline table on our own packed weight.

Decoder block after decoder block, its linears are rounded to an asymmetric grid inside the forward pass, and all weights, scales and zeros are
trained to make the block put out what the dense block does: mean squared error, inputs from packed predecessors, targets from dense ones.

    weight = s * (clamp(round(w / s) + round(z), 0, 2**bits - 1) - round(z))          round: straight through; z stays a float while it is trained

Start: the grid from the least to the largest weight of a group. AdamW, cosine to a twentieth of the rates, 2 passes over the windows, 2 a batch.
Afterwards the codes are fixed and the weight is an ordinary packed one; EfficientQAT's second stage, scales end to end, is then our PEQA loop.

Price: the block's weights in float32 with gradient and moments. The published rates are for 4096 long windows; with 128 short ones little moves,
hence `factor`. Limits: decoders that Calibration knows; scales are rounded to the stored dtype only at the end.
Source: Chen et al., "EfficientQAT", arXiv 2407.11062; rates and schedule from its code, revision 78fd3fb.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linear
from compressor.packed import Affine, PackedWeight
from compressor.pipelines.calibrate import Calibration
from compressor.pipelines.compress import plan
from compressor.quant import grid
from compressor.quant.rtn import nearest
from compressor.recipe import Quant

BATCH, EPOCHS, LAST = 2, 2, 1 / 20  # windows a step, passes, last rate over the first
VALUES, WEIGHTS = 1e-4, {2: 2e-5, 3: 1e-5, 4: 1e-5}  # published rates: of scales and zeros; of weights, by bits


def straight(x: Tensor) -> Tensor:
    """round(x), with the gradient of x."""
    return x + (x.round() - x).detach()


class Rounded(nn.Linear):
    """A linear whose weight [n, k] is rounded in the forward pass; `scale` and `zero` are float32 [n, G]."""

    @classmethod
    def of(cls, layer: nn.Linear, bits: int, group: int) -> "Rounded":
        out = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        out.weight = nn.Parameter(layer.weight.detach().float().clone())
        out.bias = layer.bias
        start = grid.choose(out.weight.detach(), bits, group, symmetric=False, shrink=False, dtype=torch.float32)
        out.scale, out.zero = nn.Parameter(start.scale), nn.Parameter(start.zero.float())
        out.least = start.scale.abs() / 10  # a scale that crosses zero would flip its group
        out.bits, out.group = bits, group
        return out

    def rounded(self) -> Tensor:
        n, k = self.weight.shape
        top = (1 << self.bits) - 1
        scale = torch.maximum(self.scale, self.least).unsqueeze(-1)  # [n, G, 1]
        zero = straight(self.zero).clamp(0, top).unsqueeze(-1)
        code = (straight(self.weight.view(n, -1, self.group) / scale) + zero).clamp(0, top)
        return ((code - zero) * scale).view(n, k)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.rounded(), self.bias)

    @torch.no_grad()
    def packed(self, dtype: torch.dtype) -> PackedWeight:
        """Integer zeros, scales in the dtype they are stored in, and the codes that follow from them."""
        top = (1 << self.bits) - 1
        scale = grid.storable(torch.maximum(self.scale, self.least), dtype).to(dtype)
        values = Affine(scale, self.zero.round().clamp(0, top).to(torch.uint8))
        return PackedWeight.pack(nearest(self.weight.detach(), values, self.bits, self.group), values, self.bits)


class Stream:
    """Windows on their way through the blocks, BATCH at a time: hidden [count, tokens, width]."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, ids: Tensor):
        self.hidden = torch.cat(Calibration(model, blocks, ids).hidden)
        self.arguments = [seen[BATCH] for seen in Calibration(model, blocks, ids[:BATCH]).arguments]

    def put(self, block: nn.Module, index: int, rows: Tensor) -> Tensor:
        """What the block puts out for hidden states [BATCH, tokens, width]."""
        out: Any = block(rows, **self.arguments[index])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def through(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        return torch.cat([self.put(block, index, rows) for rows in hidden.split(BATCH)])


def compress(model: nn.Module, quant: Quant, dtype: torch.dtype, ids: Tensor, factor: float = 1.0, seed: int = 42) -> list[float]:
    """Packs the linears of the decoder blocks in place; ids int64 [count, tokens], count even. Returns each block's last mean squared error.

    factor: of all published rates.
    """
    name, blocks = linear.find_blocks(model)
    groups = {t.name: t.group for t in plan(model, quant).packed()}
    stream = Stream(model, blocks, ids)
    dense = stream.hidden
    errors = []
    for index, block in enumerate(blocks):
        dense = stream.through(block, index, dense)
        for leaf, layer in linear.linears(block).items():
            linear.swap(block, leaf, Rounded.of(layer, quant.bits, groups[f"{name}.{index}.{leaf}"]))
        errors.append(train(stream, block, index, dense, quant.bits, factor, seed))
        for leaf, layer in list(block.named_modules()):
            if isinstance(layer, Rounded):
                linear.swap(block, leaf, linear.to_packed(layer, layer.packed(dtype)))
        stream.hidden = stream.through(block, index, stream.hidden)
    return errors


def train(stream: Stream, block: nn.Module, index: int, targets: Tensor, bits: int, factor: float, seed: int) -> float:
    """Trains one block to put out `targets` [count, tokens, width] for the stream's hidden states; the mean squared error of its last pass."""
    block.requires_grad_(True)
    values = [p for m in block.modules() if isinstance(m, Rounded) for p in (m.scale, m.zero)]
    own = {id(p) for p in values}
    weights = [p for n, p in block.named_parameters() if n.endswith("weight") and id(p) not in own]  # those of the norms, too, as in its code
    rates = (factor * VALUES, factor * WEIGHTS[bits])
    optimizer = torch.optim.AdamW([{"params": values, "lr": rates[0]}, {"params": weights, "lr": rates[1]}], weight_decay=0.0)
    count, order = len(targets), torch.Generator().manual_seed(seed + index)
    total, step, seen = EPOCHS * (count // BATCH), 0, 0.0
    for _ in range(EPOCHS):
        seen = 0.0
        for rows in torch.randperm(count, generator=order).split(BATCH):
            share = LAST + (1 - LAST) * (1 + math.cos(math.pi * step / total)) / 2
            for part, rate in zip(optimizer.param_groups, rates, strict=True):
                part["lr"] = rate * share
            loss = nn.functional.mse_loss(stream.put(block, index, stream.hidden[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen, step = seen + float(loss.detach()) * len(rows), step + 1
    block.requires_grad_(False)
    return seen / count
