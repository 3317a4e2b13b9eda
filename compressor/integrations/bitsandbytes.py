"""AdamW of bitsandbytes behind the face of our training loop: moments of 8 bits, in memory that the driver pages, or both.

8 bits: moments are codes of a table of 256 values, scaled by the largest of each block of 256 (Dettmers et al., arXiv 2110.02861); tensors of fewer
than 4096 numbers keep float32. Paged: CUDA's unified memory, which moves to the host when the GPU runs short (Dettmers et al., arXiv 2305.14314).

Why this library: from 0.50 on its kernels run on CPUs as well as on GPUs and its state is plain tensors, so that what is checkpointed is what it
steps on, bit for bit. torchao's AdamW8bit (0.18) compiles a kernel for every shape, on a CPU by a C++ compiler that must be there.

Limits: paged needs a GPU; paged buffers live as long as the process. What a device can do is found out by trying one step on it.
"""

import importlib.util
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import MissingExtra, RecipeError
from compressor.recipe import OPTIMIZERS
from compressor.tune.optimizers import LEAST, Maker

EXTRA = "pip install 'compressor[optim]'"
PAGED = 392 * 256  # numbers of a tensor that is paged: the library leaves those of fewer than 100,000 where they are
TABLES = ("qmap1", "qmap2")  # the values of codes, the same for all


class Adam:
    """bitsandbytes' AdamW with moments of 8 or 32 bits, paged or not."""

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float, bits: int, paged: bool):
        self.parameters = list(parameters)
        self.inner = _library().optim.AdamW(self.parameters, lr=0.0, weight_decay=weight_decay, optim_bits=bits, min_8bit_size=LEAST, is_paged=paged)
        for index, p in enumerate(self.parameters):
            self.inner.init_state(self.inner.param_groups[0], p, 0, index)
        self.counts = {p: torch.zeros((), dtype=torch.int64) for p in self.parameters}  # the library counts steps in plain numbers

    def zero_grad(self, set_to_none: bool) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, lr: float) -> None:
        self.inner.param_groups[0]["lr"] = lr
        for p, count in self.counts.items():
            self.inner.state[p]["step"] = int(count)
        self.inner.step()
        for p, count in self.counts.items():
            count.fill_(self.inner.state[p]["step"])

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        held = {key: t for key, t in self.inner.state[parameter].items() if isinstance(t, Tensor) and key not in TABLES}
        return {"step": self.counts[parameter]} | held


def maker(name: str, device: torch.device) -> Maker:
    """What makes the optimizer of this name for parameters on this device, tried there.

    MissingExtra where bitsandbytes is not installed; RecipeError where it cannot do this on the device.
    """
    paged, bits = name.startswith("paged-"), 8 if name.endswith("8bit") else 32
    if name not in OPTIMIZERS or name == "adamw":
        raise RecipeError(f"optimizer {name!r} is none of bitsandbytes: choose {', '.join(OPTIMIZERS[1:])}")
    if paged and device.type != "cuda":
        raise RecipeError(f"optimizer {name} pages its moments between a GPU and the host, and this run is on the CPU: use {name[6:]}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(f"optimizer {name} is that of bitsandbytes, which is not installed: {EXTRA}")
    make = partial(Adam, bits=bits, paged=paged)
    _try(make, name, device)
    return make


def _try(make: Maker, name: str, device: torch.device) -> None:
    """RecipeError where one small step fails."""
    p = nn.Parameter(torch.zeros(PAGED if name.startswith("paged-") else 2 * LEAST, device=device))
    p.grad = torch.ones_like(p)
    try:
        make([p], 0.0).step(0.5)
        moved = bool(torch.isclose(p.detach(), p.new_tensor(-0.5), rtol=1e-2).all())
    except Exception as error:  # builds without kernels for a device raise what they like
        raise RecipeError(f"optimizer {name} does not run on {device} ({_said(error)}): use adamw, or install another build, {EXTRA}") from None
    if not moved:
        raise RecipeError(f"optimizer {name} does not move parameters on {device}: use adamw, or install another build, {EXTRA}")


def _said(error: Exception) -> str:
    return " ".join(f"bitsandbytes: {type(error).__name__} {error}".split())[:200]


def _library() -> Any:
    """bitsandbytes, without its remarks on kernels that it looks for while it is imported."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    finally:
        logger.setLevel(level)
    return bitsandbytes
