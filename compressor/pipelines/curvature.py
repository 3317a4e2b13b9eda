"""What the end loss feels of an error in a decoder block's output: the Fisher information of block outputs, to second order.

For outputs h [tokens, d] of the dense model and gradients g of -log p(y), y drawn from the model's own predictions p, an error D of a token raises
the loss by about (g.D)**2 / 2 in the mean over y. Errors are counted as shares of the token's size here, u = D / |h|, so that

    F = mean over tokens of (|h| g) (|h| g)T, scaled to trace d         [d, d]

and uT F u says how much of an error matters; the identity would take all directions for alike. The step from a block's output to the loss is
BRECQ's (Li et al., 2021, arXiv 2102.05426, section 3.3, with the diagonal of this matrix for each sample). Whole matrices, one a block, know which
sums of channels matter, and no sample has to be kept.

One block at a time is needed, forwards and then backwards. Price: two forward and one backward pass of SAMPLE tokens, hidden states of all blocks for
these, and 4 d**2 bytes a block, waiting where hidden states do. Encoders that do not predict every token feel all
directions alike.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from compressor.pipelines.blockwise.blocks import Blocks
from compressor.pipelines.blockwise.hidden import Hidden
from compressor.pipelines.calibrate import Calibration

SAMPLE = 16384  # tokens that F is estimated from, at most, but at least one window


def sampled(ids: Tensor) -> Tensor:
    """The first of the windows [count, seqlen], as many as make SAMPLE tokens."""
    return ids[: max(1, SAMPLE // ids.shape[1])]


def waiting_bytes(tokens: int, seqlen: int, hidden: int, blocks: int, size: int) -> int:
    """What waits at most while F is estimated, of `tokens` in windows of `seqlen`, hidden states having `size` bytes a number: those before all
    blocks and behind the last, the gradients, and all the F."""
    sample = min(tokens, max(1, SAMPLE // seqlen) * seqlen)
    return (blocks + 2) * sample * hidden * size + blocks * 4 * hidden**2


def logit_bytes(seqlen: int, vocabulary: int, size: int) -> int:
    """What predictions of one window take, and their gradient: logits of `size` bytes a number, and in float32 their softmax and a copy."""
    return seqlen * vocabulary * (2 * size + 8)


class Curvature:
    """F of the output of each block of `model`, float32 [d, d] in main memory with trace d: `curvature[index]`.

    ids: windows int64 [count, seqlen] to estimate it from, `part` of them a pass. waiting(name): what tensors wait in until they are asked for. Where
    a matrix is not finite, or zero, the identity is in its place. The model's parameters come out as they went in.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, ids: Tensor, part: int, seed: int, waiting: Callable[[str], Hidden]) -> None:
        self.model, self.blocks, self.part, self.waiting = model, blocks, part, waiting
        self.visits, self.found = Blocks.of(model), waiting("fisher")
        flags = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(False)
        try:
            self._estimate(ids, torch.Generator(next(model.parameters()).device).manual_seed(seed))
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def __getitem__(self, index: int) -> Tensor:
        return self.found[len(self.blocks) - 1 - index]  # found from the last to the first

    def _visited(self, index: int) -> AbstractContextManager[object]:
        return nullcontext() if self.visits is None else self.visits.visit(index)

    def _estimate(self, ids: Tensor, draw: torch.Generator) -> None:
        walk = Calibration(self.model, self.blocks, ids, part=self.part) if self.visits is None else self.visits.calibration(ids, self.part)
        inputs: list[Hidden] = []
        for index, block in enumerate(self.blocks):
            inputs.append(self.waiting(f"inputs-{index}"))
            for at in range(len(walk.hidden)):
                inputs[index].append(walk.hidden[at])
            with self._visited(index):
                walk.run(block, index, keep=True)
        slopes = self.waiting("slopes")
        for at, rows in enumerate(walk.batches):
            slopes.append(torch.cat([self._slope(*each, draw) for each in zip(rows.split(1), walk.hidden[at].split(1), strict=True)]))
        for index in reversed(range(len(self.blocks))):
            with self._visited(index):
                self.found.append(self._back(index, inputs.pop(), walk.arguments[index], slopes))

    @torch.enable_grad()
    def _slope(self, rows: Tensor, states: Tensor, draw: torch.Generator) -> Tensor:
        """Gradient [1, seqlen, d] of the summed -log p(y) with respect to the last block's outputs `states`, of one window; zero where the model
        makes no finite prediction for each token."""
        last = states.to(rows.device).requires_grad_(True)
        hook = self.blocks[-1].register_forward_hook(lambda _m, _args, out: (last, *out[1:]) if isinstance(out, tuple) else last)
        try:
            with nullcontext() if self.visits is None else self.visits.skipping():
                out: Any = self.model(input_ids=rows)
        finally:
            hook.remove()
        logits = getattr(out, "logits", None)
        if logits is None or logits.shape[:-1] != rows.shape or not bool(torch.isfinite(logits).all()):
            return torch.zeros_like(states)
        change = logits.detach().float().softmax(-1)  # and less one at y: the gradient with respect to the logits
        y = torch.multinomial(change.flatten(0, -2), 1, generator=draw).view(*rows.shape, 1)
        change.scatter_add_(-1, y, torch.full_like(y, -1, dtype=change.dtype))
        return torch.autograd.grad(logits, last, change.to(logits.dtype))[0].cpu()

    @torch.enable_grad()
    def _back(self, index: int, inputs: Hidden, arguments: dict[int, dict[str, Any]], slopes: Hidden) -> Tensor:
        """F of one block, from `slopes` with respect to its outputs, which become those with respect to its inputs."""
        block, total = self.blocks[index], torch.zeros(())
        for at in range(len(inputs)):
            before = []
            for states, slope in zip(inputs[at].split(self.part), slopes[at].split(self.part), strict=True):
                given = states.to(next(block.parameters()).device).requires_grad_(True)
                out = block(given, **arguments[len(given)])
                out = out[0] if isinstance(out, tuple) else out
                felt = (slope.to(out.device).float() * out.detach().float().norm(dim=-1, keepdim=True)).flatten(0, -2)  # [tokens, d]
                total = total + (felt.T @ felt).cpu()
                (back,) = torch.autograd.grad(out, given, slope.to(out))
                before.append(back.cpu())
            slopes[at] = torch.cat(before)
        trace = float(total.trace())
        return total * (len(total) / trace) if 0 < trace < torch.inf else torch.eye(len(total))
