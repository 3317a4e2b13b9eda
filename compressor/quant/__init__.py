"""Quantizers: packers that put a weight on an even grid per group. Adding one is a file with a `pack` function and a line in PACKERS."""

from compressor.packing import Packer
from compressor.quant import gptq, rtn
from compressor.quant.groups import resolve_group

GRID = ("group", "gpr", "symmetric", "shrink")
GPTQ = (*GRID, "damp", "act_order", "sweeps")
TRAINED = ("passes", "windows", "rate", "value_rate")
PACKERS: dict[str, Packer] = {
    "rtn": Packer(rtn.pack, resolve_group, reads=GRID),
    "gptq": Packer(gptq.pack, resolve_group, needs=("hessian",), reads=GPTQ),
    "block": Packer(gptq.pack, resolve_group, needs=("hessian",), reads=(*GPTQ, *TRAINED), trains=True),
    "round": Packer(gptq.pack, resolve_group, needs=("hessian",), reads=(*GPTQ, *TRAINED), trains=True, reach=0.5),
}

__all__ = ["PACKERS", "resolve_group"]
