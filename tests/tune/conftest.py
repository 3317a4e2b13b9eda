"""A tiny random LLaMA whose decoder linears are packed by plain rounding, and windows of tokens to tune it on."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.linear import PackedLinear, find_blocks, linears, swap, to_packed
from compressor.packed import Affine, PackedWeight, Table
from compressor.recipe import Tune

VOCAB = 64


def dense_llama(seed: int = 0, **config: float) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2} | config
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCAB, max_position_embeddings=64, initializer_range=0.1)).eval()


def round_to_nearest(weight: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> PackedWeight:
    """weight [n, k]; one scale per row for group -1."""
    n, k = weight.shape
    parts = weight.detach().float().view(n, -1, k if group == -1 else group)
    top = (1 << bits) - 1
    if symmetric:
        scale = (parts.abs().amax(-1) / (1 << (bits - 1))).to(dtype)
        zero, shift = None, torch.tensor(float(1 << (bits - 1)))
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = ((high - low) / top).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, top).to(torch.uint8)
        shift = zero.float().unsqueeze(-1)
    codes = ((parts / scale.float().unsqueeze(-1)).round() + shift).clamp(0, top).to(torch.uint8)
    return PackedWeight.pack(codes.view(n, k), Affine(scale, zero), bits)


def sketch(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> PackedWeight:
    """weight [n, k]; each segment's table is its evenly spaced quantiles, each code the nearest entry. The last segment may be shorter."""
    levels = (torch.arange(1 << bits) + 0.5) / (1 << bits)
    tables, codes = [], []
    for part in weight.detach().float().split(weight.shape[1] if group == -1 else group, 1):
        table = part.quantile(levels, 1).T.contiguous().to(dtype)
        codes.append((part.unsqueeze(-1) - table.float().unsqueeze(1)).abs().argmin(-1).to(torch.uint8))
        tables.append(table)
    return PackedWeight.pack(torch.cat(codes, 1), Table(torch.stack(tables, 1)), bits, None if group == -1 else group)


@pytest.fixture
def packed_llama() -> Callable[..., nn.Module]:
    """Maker of models; the same arguments give the same model."""

    def make(bits: int = 3, group: int = 32, symmetric: bool = True, dtype: torch.dtype = torch.float16, **config: float) -> nn.Module:
        model = dense_llama(**config)
        _, blocks = find_blocks(model)
        for name, layer in linears(blocks).items():
            swap(blocks, name, to_packed(layer, round_to_nearest(layer.weight, bits, group, symmetric, dtype)))
        return model

    return make


@pytest.fixture
def sketched_llama() -> Callable[..., nn.Module]:
    """Maker of models with tables; segments of 40 of the 64 or 96 columns by default, so the last one of a row is shorter."""

    def make(bits: int = 3, group: int = 40, dtype: torch.dtype = torch.float16, **config: float) -> nn.Module:
        model = dense_llama(**config)
        _, blocks = find_blocks(model)
        for name, layer in linears(blocks).items():
            swap(blocks, name, to_packed(layer, sketch(layer.weight, bits, group, dtype)))
        return model

    return make


@pytest.fixture
def dense_model() -> Callable[..., nn.Module]:
    return dense_llama


@pytest.fixture
def packed_layer() -> Callable[..., PackedLinear]:
    """Maker of one PackedLinear of odd shape: 37 x 96 by default."""

    def make(bits: int = 3, group: int = 32, symmetric: bool = True, dtype: torch.dtype = torch.float16, n: int = 37, k: int = 96) -> PackedLinear:
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
        return PackedLinear(round_to_nearest(weight, bits, group, symmetric, dtype))

    return make


@pytest.fixture
def sketched_layer() -> Callable[..., PackedLinear]:
    """Maker of one PackedLinear with tables, of odd shape: 37 x 96 by default."""

    def make(bits: int = 3, group: int = 40, dtype: torch.dtype = torch.float16, n: int = 37, k: int = 96) -> PackedLinear:
        return PackedLinear(sketch(torch.randn(n, k, generator=torch.Generator().manual_seed(1)), bits, group, dtype))

    return make


@pytest.fixture
def windows() -> tuple[Tensor, Tensor]:
    """ids, labels [20, 16]; the prompts, masked in the labels, have uneven lengths."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCAB - 1, (20, 16), generator=generator)  # token 63 never occurs
    lengths = torch.randint(0, 14, (20, 1), generator=generator)
    return ids, ids.masked_fill(torch.arange(16) < lengths, -100)


@pytest.fixture
def options() -> Callable[..., Tune]:
    """Tune options, small and without warm-up unless told otherwise."""
    return lambda **keys: Tune(**{"method": "peqa", "batch": 4, "steps": 6, "lr": 1e-2, "warmup": 0.0, "eval_every": 0, **keys})
