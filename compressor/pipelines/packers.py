"""All packers by name: those that put weights on even grids, and those that learn tables."""

from dataclasses import replace

from compressor import quant, sketch
from compressor.packing import Packer
from compressor.recipe import Quant

PACKERS: dict[str, Packer] = quant.PACKERS | sketch.PACKERS


def trains(quant: Quant) -> bool:
    """Whether blocks are trained once some of their linears are packed."""
    return any(PACKERS[kind.packer].trains for kind in quant.kinds() if kind.packer in PACKERS)


def untrained(quant: Quant) -> Quant:
    """The same options without training: those that make the codes that training starts from."""
    return replace(quant, packer="gptq") if PACKERS[quant.packer].trains else quant


def needs(quant: Quant) -> tuple[str, ...]:
    """The sums of the inputs that packing by these options asks for; none if no linear's packer looks at data."""
    return tuple(dict.fromkeys(each for kind in quant.kinds() for each in PACKERS[kind.packer].needs))
