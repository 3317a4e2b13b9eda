"""What the host sides of the Triton kernels (affine.py, tables.py) share: types and options of a launch, cut reductions, low-rank terms.

Limits: fp64 on a GPU is foreign to the kernels and goes to the reference.
"""

import contextlib
import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from compressor.kernels import configs, reference, workspace
from compressor.kernels.configs import Chip, Tile

Low = tuple[Tensor, Tensor]  # u [m, r], b [n, r]
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}
_OFFSETS = 1 << 31  # where 32-bit offsets end


def types(x: Tensor) -> dict[str, Any]:
    """Types of dot operands and accumulator, and how fp32 dots are taken (three tf32 products agree with fp32 to about 1e-6)."""
    wide = TYPES[reference.wide(x.dtype)]
    if not x.is_cuda:  # the interpreter: 16-bit arithmetic there is wrong (bf16) or slow
        return {"DOT": wide, "ACC": wide, "PRECISION": "ieee"}
    return {"DOT": TYPES[x.dtype], "ACC": wide, "PRECISION": "ieee" if torch.version.hip else "tf32x3"}


def options(tile: Tile) -> dict[str, Any]:
    return {"BM": tile.bm, "BN": tile.bn, "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def parts(out: Tensor, grid: tuple[int, int], steps: int) -> tuple[int, Tensor | None, Tensor | None]:
    """In how many parts to cut the reduction, memory for them, and counters of arrivals (see finish.py)."""
    tiles = grid[0] * grid[1]
    count = configs.split(chip(out.device), tiles, steps)
    if count == 1 or count * out.numel() >= _OFFSETS:
        return 1, None, None
    part = torch.empty(count, *out.shape, dtype=reference.wide(out.dtype), device=out.device)
    return count, part, workspace.counters(out.device, tiles)


def padded(low: Low | None, dtype: torch.dtype) -> Low | tuple[None, None]:
    """u and b in `dtype`, their columns filled with zeros to a multiple of 16, as finish.add_low_rank takes them."""
    if low is None or low[0].shape[1] == 0:
        return None, None
    return _padded(low[0].to(dtype)), _padded(low[1].to(dtype))


def _padded(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (0, -t.shape[1] % 16)) if t.shape[1] % 16 else t.contiguous()


def rank(b: Tensor | None) -> int:
    """Columns of what `padded` gave."""
    return 0 if b is None else b.shape[1]


def add_low(y: Tensor, low: Low | None) -> Tensor:
    """y + u @ b.T, in place."""
    return y if low is None else y.addmm_(low[0].to(y.dtype), low[1].to(y.dtype).T)


def foreign(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.float64


def rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def on(device: torch.device) -> Any:
    """The device, current while kernels are launched on it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.lru_cache
def supported(device: torch.device) -> bool:
    """Whether the kernels were made for this device: NVIDIA from Ampere on, AMD's CDNA 3 and 4; on a CPU, Triton's interpreter."""
    if device.type != "cuda":
        return device.type == "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(("gfx94", "gfx95"))
    return torch.cuda.get_device_capability(device)[0] >= 8


@functools.lru_cache
def chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip("", "sm_90")
    return configs.chip(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)[0], torch.version.hip is not None)
