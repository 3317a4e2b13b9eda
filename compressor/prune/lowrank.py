"""Low-rank paths beside frozen linears: what trains while a model is pruned, and what its importance is read from.

    y = x Wᵀ + bias + gamma (x Aᵀ) Bᵀ        gamma = alpha / rank

Source: LoRA, Hu et al., 2021, arXiv 2106.09685. A starts uniform as torch starts linears, B at zero, so nothing changes at first. W is a dense or
a packed weight and never gets a gradient; `merged` gives rows of W + gamma B A, of a packed weight decoded, so that the paths can be folded in
when the pruned linears are written anew. Price: 4 (n + k) rank bytes a path, sevenfold while it trains. No dropout.

`align` turns A to the directions in which the inputs are strongest (the start of EVA, Paischer et al., 2024, arXiv 2410.07170). It matters for
scores: with B = 0 the gradient of B is G Aᵀ, so g_B A is the gradient G of W seen through AᵀA. G is a sum of outer products with inputs, and where A
spans most of their energy, g_B A is most of G; a random A of the same rank leaves mostly noise. The directions are found by orthogonal iteration
on a few windows, which holds no matrix of k x k.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compressor.kernels import layout
from compressor.linear import PackedLinear, find_blocks, linears, packed_linears, swap
from compressor.packing import dense_rows, panels

WINDOWS, ROUNDS = 16, 4  # of text, and passes over it, that directions are found with
TINY = 1e-30


class LowRank(nn.Module):
    """A frozen linear [n, k] with a trainable path: a [r, k], b [n, r], float32."""

    def __init__(self, base: nn.Linear | PackedLinear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.gamma = base, alpha / rank
        self.in_features, self.out_features = base.in_features, base.out_features
        bound = 1 / math.sqrt(self.in_features)  # Kaiming uniform with slope sqrt(5)
        device = next(t for t in (*base.parameters(), *base.buffers()) if t is not None).device
        start = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(start.to(device))
        self.b = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x.float(), self.a) * self.gamma  # [..., r]
        return self.base(x) + nn.functional.linear(low, self.b).to(x.dtype)

    @torch.no_grad()
    def merged(self, rows: slice) -> Tensor:
        """Rows of W + gamma B A, float32 [rows, k]; rows start at a multiple of a tile's rows."""
        return torch.addmm(weight_rows(self.base, rows), self.b[rows], self.a, alpha=self.gamma)

    def tiles(self) -> list[slice]:
        """Row slices that bound the memory of whatever is formed from `merged`."""
        return panels(self.out_features, self.in_features, multiple=layout.ROWS)


def weight_rows(layer: nn.Linear | PackedLinear, rows: slice) -> Tensor:
    """Rows of a dense or packed weight, float32 [rows, k]; rows start at a multiple of a tile's rows."""
    return dense_rows(layer.packed(), rows) if isinstance(layer, PackedLinear) else layer.weight[rows].detach().float()


def attach(model: nn.Module, rank: int, alpha: float, seed: int) -> dict[str, LowRank]:
    """Freeze the model and put a path beside every linear of its blocks; returns them by the name of the linear. `dissolve` ends it."""
    prefix, blocks = find_blocks(model)
    model.requires_grad_(False)
    generator, out = torch.Generator().manual_seed(seed), {}
    found: dict[str, nn.Linear | PackedLinear] = {**linears(blocks), **packed_linears(blocks)}
    for name, layer in found.items():
        path = LowRank(layer, rank, alpha, generator).train(layer.training)
        swap(blocks, name, path)
        out[f"{prefix}.{name}"] = path
    return out


@torch.no_grad()
def align(model: nn.Module, paths: dict[str, LowRank], ids: Tensor) -> None:
    """Turn every A to the strongest directions of its linear's inputs on windows ids [count, t]; the size of its rows stays what it was.

    A path that sees no inputs, or not finite ones, or has more rows than there are directions, keeps its start.
    """
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()  # [tokens, k]
            grown = (x @ paths[name].a.T).T @ x  # [r, k]
            sums[name] = grown if name not in sums else sums[name] + grown

        return add

    hooks = [path.register_forward_pre_hook(hook(name)) for name, path in paths.items()]
    was = model.training
    model.eval()
    try:
        for _ in range(ROUNDS):
            sums.clear()
            for part in ids[:WINDOWS].split(1):
                model(input_ids=part.to(next(model.parameters()).device), use_cache=False)
            for name, grown in sums.items():
                path = paths[name]
                if bool(torch.isfinite(grown).all()) and grown.shape[0] <= grown.shape[1]:
                    path.a.copy_(torch.linalg.qr(grown.T / grown.norm().clamp(min=TINY)).Q.T * math.sqrt(1 / 3))
    finally:
        model.train(was)
        for handle in hooks:
            handle.remove()


def parameters(paths: dict[str, LowRank]) -> dict[str, nn.Parameter]:
    """What is trained, by its name in the model."""
    return {f"{name}.{leaf}": p for name, path in paths.items() for leaf, p in (("a", path.a), ("b", path.b))}
