"""FSDP2 for what stays dense in a packed model: of embeddings and head each process keeps one part, and fetches the rest when they are used.

Packed weights stay whole everywhere, for every forward pass reads them; so do what is trained, and the blocks' norms (0.5 MB in LLaMA-7B) and
whatever else is dense inside blocks. While tuning lasts, each large module outside the blocks is replaced by a copy under PyTorch's `fully_shard`;
afterwards the module comes back with its values, bit for bit, as nothing of it is trained. Modules that share a parameter (tied embeddings) are
copied into one module for FSDP, which knows no groups without a root.

A micro-batch fetches the head once, however often its loss calls it, and gives it back after its backward pass (`release`): the exchanges are then
as many in every process, whatever its rows. Memory: of D bytes of such parameters D / N in each of N processes, and D while they are in use. Price:
one all-gather of them a micro-batch. FSDP: Zhao et al., 2023, arXiv 2304.11277.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from compressor import linear, world
from compressor.errors import NumericError

LEAST = 1 << 16  # numbers of a parameter that is worth an exchange


class _Together(nn.Module):
    """Modules of which FSDP makes one unit."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, which: int, *args: Any, **kwargs: Any) -> Any:
        return self.parts[which](*args, **kwargs)


class _Place(nn.Module):
    """Stands where one of them stood."""

    def __init__(self, all_of_them: nn.Module, which: int, module: nn.Module):
        super().__init__()
        self.all_of_them, self.which = all_of_them, which
        self.out_features = getattr(module, "out_features", 0)
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.all_of_them(self.which, *args, **kwargs)


@contextmanager
def sharded(model: nn.Module, wanted: bool) -> Iterator[int]:
    """Meanwhile the large parameters outside the blocks lie in parts; yields the bytes that each process was relieved of, 0 for one process.

    All processes enter and leave together. After an error other than NumericError, which all raise, the parameters stay where they are: others may
    be gone.
    """
    if not wanted or world.size() == 1:
        yield 0
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    taken: list[tuple[dict[str, nn.Module], _Together]] = []  # modules by name, and what works in their place
    away = 0
    for group in _groups(model):
        copies = _Together([_copy(module) for module in group.values()])
        whole = {p for module in group.values() for p in module.parameters(recurse=False)}
        mesh = init_device_mesh(next(iter(whole)).device.type, (world.size(),))
        fully_shard(copies, mesh=mesh, reshard_after_forward=False)
        assert isinstance(copies, FSDPModule)
        copies.set_reshard_after_backward(False)
        for which, (name, module) in enumerate(group.items()):
            linear.swap(model, name, _Place(copies, which, module))
        for p in whole:
            away += p.numel() * p.element_size() * (world.size() - 1) // world.size()
            p.data = p.data.new_empty(0)
        taken.append((group, copies))
    try:
        yield away
    except NumericError:  # which all raise
        _whole_again(model, taken)
        raise
    _whole_again(model, taken)


def _whole_again(model: nn.Module, taken: list[tuple[dict[str, nn.Module], _Together]]) -> None:
    """All processes put the modules back, with their values."""
    from torch.distributed.tensor import DTensor

    release(model)
    for group, copies in taken:
        for part_of, (name, module) in zip(copies.parts, group.items(), strict=True):
            for key, p in module.named_parameters(recurse=False):
                part = part_of.get_parameter(key)
                assert isinstance(part, DTensor)
                if not p.numel():
                    p.data = part.full_tensor().detach().clone()
            linear.swap(model, name, module)


def release(model: nn.Module) -> None:
    """Give back what was fetched; nothing to do where nothing is in parts."""
    if world.size() == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _groups(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Modules outside the blocks with large frozen parameters of their own, by name; those that share one together."""
    inside = linear.find_blocks(model)[0] + "."
    out: list[tuple[set[int], dict[str, nn.Module]]] = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if name.startswith(inside) or not own or any(p.requires_grad for p in own) or max(p.numel() for p in own) < LEAST:
            continue
        ids = {id(p) for p in own}
        group = next((group for seen, group in out if seen & ids), None)
        if group is None:
            out.append((ids, {name: module}))
        else:
            group[name] = module
    return [group for _, group in out]


def _copy(module: nn.Module) -> nn.Module:
    """The same parameters in a module whose registers are its own."""
    new = copy.copy(module)
    new.__dict__.update({key: copy.copy(value) for key, value in module.__dict__.items() if isinstance(value, dict)})
    return new
