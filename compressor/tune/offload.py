"""Packed words of the decoder blocks in host memory, which visit the device when they are needed while a model trains.

A linear's words come when its forward pass begins, and the linear lets go of them when it ends. With gradient checkpointing the first pass saves
nothing for the way back, and the backward pass begins a block by computing it anew, which brings its words again; autograd holds those until the
block's gradients are done. So the device holds the words of one linear on the way forwards and of one block on the way back, whatever the depth;
without checkpointing autograd would hold all of them. Scales, tables, norms, embeddings and all that is trained stay on the device; results are the
same bit for bit. It hangs on the linears and not on the blocks, for whether the hooks of a block run when it is computed anew depends on the version
of transformers.

Price: all words cross the bus twice a micro-batch, from pinned pages where the system grants them, in the order of the stream, so that nothing is
computed meanwhile: 76 MB a block of LLaMA-7B at 3 bits, on paper 3 ms at 25 GB/s. Limit: while it is packed or loaded and measured, the model is on
the device as a whole; what this lowers is the peak of training, where gradients, moments and activations come on top.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from compressor.linear import PackedLinear, find_blocks, packed_linears

Fetch = Callable[[Tensor], Tensor]  # words in host memory -> on the device


@contextmanager
def words_on_host(model: nn.Module, device: torch.device, fetch: Fetch | None = None) -> Iterator[None]:
    """While inside, the words of packed linears in decoder blocks lie in host memory, but for the linear that runs; outside as before.

    fetch: how words come to the device, by default an asynchronous copy. The model trains with gradient checkpointing, or not at all.
    """
    bring = fetch or (lambda words: words.to(device, non_blocking=True))
    layers = list(packed_linears(find_blocks(model)[1]).values())
    handles = []
    try:
        for layer in layers:
            home = layer.words = _host(layer.words)
            handles.append(layer.register_forward_pre_hook(_set(home, bring)))
            handles.append(layer.register_forward_hook(_set(home, None), always_call=True))  # computing anew may end by an exception
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.words = layer.words.to(device)


def _host(words: Tensor) -> Tensor:
    """A copy in host memory, in pinned pages if they come from a GPU and the system grants them; words that are there already as they are."""
    with suppress(RuntimeError):
        return words.cpu().pin_memory() if words.is_cuda else words
    return words.cpu()


def _set(home: Tensor, bring: Fetch | None) -> Callable[..., None]:
    """A hook that gives a layer its words: those that are brought, or those at home."""

    def hook(layer: PackedLinear, *_: Any) -> None:
        layer.words = home if bring is None else bring(home)

    return hook
