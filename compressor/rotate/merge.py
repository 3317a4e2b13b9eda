"""Rotations merged into the weights of a dense model in place: the same function, in another basis.

R1 turns the residual stream: what writes it (embedding, o_proj, down_proj) gives x R1 in place of x, and what reads it (q, k, v, gate, up and head)
undoes that. Norms by the root mean square let a rotation pass once their gains, which do not, are multiplied into who reads them. R2 turns the values
inside each head: rows of v_proj, and the columns of o_proj of every query head that reads these values; attention only adds them up, so that
nothing else changes. (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406.)

Weight [n, k], y = W x + b:  reader W <- W diag(g) R1;  writer W <- R1^T W, b <- b R1;  values of a head W <- R2^T W, b <- b R2;
o_proj of a head W <- W R2.  Packed linears, whose codes were chosen in this basis already, are left alone but for their biases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linear
from compressor.rotate import roles as role
from compressor.rotate.hadamard import Rotation, randomised, turn
from compressor.rotate.roles import FIRST, NORMS, SECOND, WRITERS, Roles

RESIDUAL = ("hadamard", "learned")  # methods that turn the residual stream, too
HEADS = 1 << 20  # seeds of blocks begin here


@dataclass(frozen=True)
class Merge:
    """What is merged: `residual`, R1, with who it passes outside the blocks; `heads`, R2 of a block by its number and the size of its heads."""

    roles: Roles | None
    residual: Rotation | None
    heads: Callable[[int, int], Rotation]

    @torch.no_grad()
    def block(self, index: int, block: nn.Module) -> None:
        """One block, in place."""
        if self.roles is not None:
            for name, readers in zip(NORMS, (FIRST, SECOND), strict=True):
                norm = block.get_submodule(name)
                gain = role.gain(norm, self.roles.offset)
                for each in readers:
                    if (weight := _weight(block, each)) is not None:
                        turn(weight, self.residual, gain)
                norm.get_parameter("weight").fill_(1 - self.roles.offset)
            for each in WRITERS:
                if (weight := _weight(block, each)) is not None:
                    turn(weight.T, self.residual)
                _bias(block, each, self.residual)
        found = role.heads(block)
        if not isinstance(found, str):
            self._values(block, found, self.heads(index, found.size))

    def _values(self, block: nn.Module, found: role.Heads, rotation: Rotation) -> None:
        made, out, size = _weight(block, found.values), _weight(block, "self_attn.o_proj"), found.size
        for head in range(found.groups):
            rows = slice(found.start + head * size, found.start + (head + 1) * size)
            if made is not None:
                turn(made[rows].T, rotation)
            _bias(block, found.values, rotation, rows)
        for head in range(found.groups * found.times):
            if out is not None:
                turn(out[:, head * size : (head + 1) * size], rotation)

    @torch.no_grad()
    def outside(self, model: nn.Module, stored: torch.dtype) -> None:
        """What lies outside the blocks, in place, the head with a weight of its own.

        Weights that wait in 16 bits (compressor/stored.py) are from then on `stored`, the dtype that they will have in the folder.
        """
        if self.roles is None or self.residual is None:
            return
        table, head = (model.get_submodule(name) for name in (self.roles.embedding, self.roles.head))
        norm = model.get_submodule(self.roles.norm)
        gain = role.gain(norm, self.roles.offset)
        for module, scaled in ((head, gain), (table, None)):
            old = module.get_parameter("weight")
            dtype = old.dtype if old.dtype == norm.get_parameter("weight").dtype else stored
            new = torch.empty_like(old, dtype=dtype)
            turn(old, self.residual, scaled, new)
            module.register_parameter("weight", nn.Parameter(new, requires_grad=old.requires_grad))
        norm.get_parameter("weight").fill_(1 - self.roles.offset)
        this: Any = model
        this.config.tie_word_embeddings = False


def added(model: nn.Module, method: str) -> int:
    """How many numbers a method adds to a model (or a shell): those of the head, where it shares them with the embedding and R1 parts them."""
    this: Any = model
    head, table = this.get_output_embeddings(), this.get_input_embeddings()
    shared = method in RESIDUAL and head is not None and table is not None and head.weight is table.weight
    return int(table.weight.numel()) if shared else 0


def sentence(size: int) -> str:
    """What a user should know where a head of so many bytes is parted from the embedding."""
    return f"rotating parts the head from the embedding that it was tied to: the folder holds {size:,} bytes more (quant.rotate=heads adds none)"


def why_not(model: nn.Module, method: str) -> str:
    """Why a method cannot be, in words; empty if it can. Works on the meta device."""
    found = {why for block in linear.find_blocks(model)[1] if isinstance(why := role.heads(block), str)}
    whole = role.roles(model) if method in RESIDUAL else ""
    return whole if isinstance(whole, str) and whole else min(found, default="")


def planned(model: nn.Module, method: str, seed: int) -> Merge:
    """The rotations of a model for which `why_not` says nothing; the same ones for the same seed."""
    found = role.roles(model) if method in RESIDUAL else ""
    this: Any = model

    def generator(more: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 2 * HEADS + more)

    whole = found if isinstance(found, Roles) else None
    residual = None if whole is None else randomised(this.get_input_embeddings().weight.shape[1], generator(0))
    return Merge(whole, residual, lambda index, size: randomised(size, generator(HEADS + index)))


def _weight(block: nn.Module, name: str) -> Tensor | None:
    """The weight of a dense linear; None if the block has none of that name, or it is packed."""
    layer = role.child(block, name)
    return None if layer is None or isinstance(layer, linear.PackedLinear) else layer.get_parameter("weight").detach()


def _bias(block: nn.Module, name: str, rotation: Rotation | None, rows: slice = slice(None)) -> None:
    """b <- b Q, of some rows."""
    layer = role.child(block, name)
    if layer is not None and layer.bias is not None:
        turn(layer.bias.detach()[rows].unsqueeze(0), rotation)
