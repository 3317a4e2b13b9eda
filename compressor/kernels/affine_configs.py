"""Which tile sizes the affine kernels run with: small tables by chip and number of rows of x, read by the host side and by bench/aot.py.

A program's time goes to decoding at small m and to the tensor cores at large m, so tiles grow with m. Every row was compiled ahead of time for
its chip and has neither spills nor too much shared memory (bench/aot.py); the speeds are starting points, not tuned.
Shared memory sets the limits: 227 KiB on sm_90, 64 KiB on gfx942, and 99 KiB on sm_80, whose rows also serve its smaller siblings.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """bm rows of x, bn rows of the weight, `width` of the 256 columns of a block: the three sides of one matrix product."""

    bm: int
    bn: int
    width: int
    warps: int
    stages: int


SHARED = {"sm_90": 227 * 1024, "sm_80": 99 * 1024, "gfx942": 64 * 1024}
WAVE = 264  # programs to aim for when splitting the reduction: two for each multiprocessor of an H200
MAX_SPLIT = 16

_LAST = 1 << 62
# op -> chip -> ((largest m, tile), ...) for 16-bit inputs
_TABLE: dict[str, dict[str, tuple[tuple[int, Tile], ...]]] = {
    "forward": {
        "sm_90": ((16, Tile(16, 64, 256, 4, 4)), (32, Tile(32, 128, 256, 8, 3)), (64, Tile(64, 128, 256, 8, 3)), (_LAST, Tile(128, 128, 256, 8, 2))),
        "sm_80": ((16, Tile(16, 64, 256, 4, 3)), (32, Tile(32, 64, 128, 4, 3)), (64, Tile(64, 128, 128, 8, 3)), (_LAST, Tile(64, 128, 128, 8, 3))),
        "gfx942": ((16, Tile(16, 64, 256, 4, 2)), (32, Tile(32, 64, 256, 4, 2)), (64, Tile(64, 64, 256, 4, 2)), (_LAST, Tile(64, 64, 256, 4, 2))),
    },
    "grad_input": {
        "sm_90": ((16, Tile(16, 64, 256, 4, 3)), (64, Tile(64, 64, 256, 4, 3)), (_LAST, Tile(128, 64, 256, 8, 3))),
        "sm_80": ((16, Tile(16, 64, 256, 4, 3)), (_LAST, Tile(64, 64, 256, 8, 3))),
        "gfx942": ((16, Tile(16, 64, 256, 4, 2)), (_LAST, Tile(64, 64, 256, 8, 2))),
    },
    "grad_scale": {
        "sm_90": ((_LAST, Tile(64, 64, 128, 4, 3)),),
        "sm_80": ((_LAST, Tile(64, 64, 128, 4, 3)),),
        "gfx942": ((_LAST, Tile(64, 64, 128, 4, 2)),),
    },
}
# fp32 inputs take twice the shared memory and three passes of the tensor cores: one small tile an op, on every chip
_WIDE: dict[str, tuple[tuple[int, Tile], ...]] = {
    "forward": ((64, Tile(16, 64, 64, 8, 2)), (_LAST, Tile(16, 64, 64, 8, 2))),
    "grad_input": ((_LAST, Tile(32, 64, 64, 4, 2)),),
    "grad_scale": ((_LAST, Tile(32, 64, 64, 4, 2)),),
}


def chip(major: int, hip: bool) -> str:
    """The table's row for a device: AMD, Hopper and the data-centre part after it, or the rest."""
    return "gfx942" if hip else "sm_90" if major in (9, 10) else "sm_80"


def tile(op: str, where: str, m: int, itemsize: int) -> Tile:
    """The tile for `m` rows of x with elements of `itemsize` bytes."""
    return next(t for most, t in rows(op, where, itemsize) if m <= most)


def rows(op: str, where: str, itemsize: int) -> tuple[tuple[int, Tile], ...]:
    """(largest m, tile) of every tile the op can run with on that chip."""
    return _WIDE[op] if itemsize > 2 else _TABLE[op][where]


def split(programs: int, steps: int) -> int:
    """In how many parts to cut a reduction of `steps` steps so that a grid of `programs` fills the device; a power of two."""
    parts = 1
    while parts < MAX_SPLIT and programs * parts * 2 <= WAVE and parts * 4 <= steps:
        parts *= 2
    return parts
