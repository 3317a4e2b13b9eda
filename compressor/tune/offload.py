"""Packed words of the decoder blocks in host memory, which visit the device block by block while a model trains.

A block's words come when its forward pass begins and their copy on the device is dropped when it ends. With gradient checkpointing the first pass
saves nothing for the way back, and the backward pass begins a block by computing it anew, which brings its words again; autograd then holds them
until the block's gradients are done. So the device holds the words of one block at a time, whatever the depth, forwards and backwards: without
checkpointing it would hold all of them. Scales, tables, norms, embeddings and all that is trained stay on the device; results are the same bit for bit.

Price: the words of all blocks cross the bus twice a micro-batch (forwards, and when they are computed anew), from pinned pages where the system grants
them, in the order of the stream, which does not overlap with computing: 76 MB a block of LLaMA-7B at 3 bits, on paper 3 ms at 25 GB/s. Limit: while it packs, loads and measures before tuning, the model is on the
device as a whole; what this lowers is the peak of training, where gradients, moments and activations come on top.
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
    """While inside, the words of packed linears in decoder blocks lie in host memory whenever their block does not run; outside as before.

    fetch: how words come to the device, by default an asynchronous copy; the model trains with gradient checkpointing, or not at all.
    """
    bring = fetch or (lambda words: words.to(device, non_blocking=True))
    handles = []
    layers = [list(packed_linears(block).values()) for block in find_blocks(model)[1]]
    try:
        for block, inside in zip(find_blocks(model)[1], layers, strict=True):
            homes = [_aside(layer) for layer in inside]
            handles.append(block.register_forward_pre_hook(_come(inside, homes, bring)))
            handles.append(block.register_forward_hook(_go(inside, homes), always_call=True))  # recomputing ends by an exception
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in (layer for inside in layers for layer in inside):
            layer.words = layer.words.to(device)


def _aside(layer: PackedLinear) -> Tensor:
    """The layer's words in host memory, pinned if they came from a GPU and the system grants it; the layer holds these from now on."""
    words = layer.words.cpu()
    with suppress(RuntimeError):
        words = words.pin_memory() if layer.words.is_cuda else words
    layer.words = words
    return words


def _come(layers: list[PackedLinear], homes: list[Tensor], bring: Fetch) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        for layer, home in zip(layers, homes, strict=True):
            layer.words = bring(home)

    return hook


def _go(layers: list[PackedLinear], homes: list[Tensor]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        for layer, home in zip(layers, homes, strict=True):
            layer.words = home

    return hook
