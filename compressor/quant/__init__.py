"""Quantizers: packers that put a weight on an even grid per group. Adding one is a file with a `pack` function and a line in PACKERS."""

from compressor.packing import Packer
from compressor.quant import gptq, rtn
from compressor.quant.groups import resolve_group

GRID = ("group", "gpr", "symmetric", "shrink")
PACKERS: dict[str, Packer] = {
    "rtn": Packer(rtn.pack, resolve_group, reads=GRID),
    "gptq": Packer(gptq.pack, resolve_group, needs=("hessian",), reads=(*GRID, "damp", "act_order")),
}

__all__ = ["PACKERS", "resolve_group"]
