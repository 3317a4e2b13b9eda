"""Where hidden states wait between two blocks: in memory, on disk, or nowhere, being computed again from the tokens each time.

Calibration asks for `hidden[i]`, the input of the next block for batch i, and puts its output there. On disk a batch is a file that is read and
written as a whole: a mapped one would count as memory of this process. Computed again, the work grows with the square of the number of blocks, and
a block is read once for every batch of every pass over a later block; that is for machines on which neither memory nor disk holds the states.
"""

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Stop(Exception):
    """Raise it in a hook: the rest of this forward pass is of no use."""


class Hidden(Protocol):
    """What Calibration keeps its hidden states in; a list is one."""

    def append(self, value: Tensor, /) -> None: ...

    def __getitem__(self, index: int, /) -> Tensor: ...

    def __setitem__(self, index: int, value: Tensor, /) -> None: ...

    def __len__(self) -> int: ...


class Spool:
    """One file a batch in `folder`, which is made, and goes with the object; raises OSError where it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        self.folder.mkdir(parents=True)
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []

    def append(self, value: Tensor) -> None:
        self._kinds.append((value.shape, value.dtype))
        self[len(self._kinds) - 1] = value

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._kinds[index] = (value.shape, value.dtype)
        with self._path(index).open("wb") as file:
            file.write(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __getitem__(self, index: int) -> Tensor:
        shape, dtype = self._kinds[index]
        out = torch.empty(shape, dtype=dtype)
        with self._path(index).open("rb") as file:
            if file.readinto(out.view(-1).view(torch.uint8).numpy().data) != out.numel() * out.element_size():
                raise OSError(f"{self._path(index)} is shorter than it was written")
        return out

    def __len__(self) -> int:
        return len(self._kinds)

    def _path(self, index: int) -> Path:
        return self.folder / f"batch-{index:05d}"


class Recomputed:
    """Nothing is kept: the input of block `at` is made from the tokens of its batch, through all blocks before it, whenever it is asked for.

    forward(i, stop): runs the model on batch i; the hook on block `at` takes what reaches it and raises stop. Nothing is put here: `advance` says
    that the next block is meant from now on.
    """

    def __init__(self, blocks: nn.ModuleList, forward: Callable[[int, type[Exception]], None]) -> None:
        self.blocks, self.forward = blocks, forward
        self.at = self._count = 0

    def append(self, value: Tensor) -> None:
        self._count += 1

    def advance(self) -> None:
        self.at += 1

    def __getitem__(self, index: int) -> Tensor:
        found: list[Tensor] = []

        def take(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args[0] if args else kwargs["hidden_states"]).detach().cpu())
            raise Stop

        hook = self.blocks[self.at].register_forward_pre_hook(take, with_kwargs=True, prepend=True)
        try:
            self.forward(index, Stop)
        finally:
            hook.remove()
        return found[0]

    def __len__(self) -> int:
        return self._count
