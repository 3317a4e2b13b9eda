"""Sketchers: packers that learn a table of 2**bits values per row segment. Adding one is a file with a `pack` function and a line in PACKERS."""

from compressor.packing import Packer
from compressor.sketch import learned, squeeze
from compressor.sketch.segments import resolve_segment

LEARNED = ("gpr", "start", "exponent", "feedback", "refit", "damp", "act_order")
PACKERS: dict[str, Packer] = {
    "sketch": Packer(learned.pack, resolve_segment, needs=("hessian",), reads=LEARNED, table=True),
    "squeezellm": Packer(squeeze.pack, resolve_segment, needs=("hessian",), reads=("gpr", "start"), table=True, fisher=True),
}

__all__ = ["PACKERS", "resolve_segment"]
