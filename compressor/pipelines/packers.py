"""All packers by name: those that put weights on even grids, and those that learn tables."""

from compressor import quant, sketch
from compressor.packing import Packer

PACKERS: dict[str, Packer] = quant.PACKERS | sketch.PACKERS
