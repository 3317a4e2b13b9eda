"""PackedLinear, and the walk that finds the linears of a model's decoder blocks and swaps them."""

import re
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, RecipeError
from compressor.kernels import dispatch
from compressor.packed import Affine, PackedWeight, Table
from compressor.view import WeightView

EXPERT = re.compile(r"((?:.*\.)?experts)\.(\d+)\.(.+)")


def expert_of(name: str) -> tuple[str, int, str] | None:
    """(dotted name of the experts, which of them, name within it) of a linear of an expert of a mixture, else None."""
    match = EXPERT.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def same_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What nn.Module._apply does to a tensor, without changing its dtype: devices are followed, casts are not."""

    def moved(t: Tensor) -> Tensor:
        new = fn(t)
        return new if new.dtype == t.dtype else t.to(new.device)

    return moved


class PackedLinear(nn.Linear):
    """A linear layer on a packed weight; differentiable in x and in the values, never through a dense weight.

    It is an nn.Linear so that libraries that adapt linears, such as peft, take it for one; `weight` shows them the decoded weight (view.py).
    `learned` is what tuners move: the scale [n, G] of an affine weight or the table [n, S, 2**bits] of a sketch. `tuned`, when a tuner has
    attached one, is a module without inputs that returns the values to use in its place, and `tuned_zero` one that returns the zeros, float [n, G];
    `zero` then holds floats of the dtype that they are stored in. Codes are buffers and never change.
    """

    words: Tensor
    learned: Tensor
    zero: Tensor | None
    columns: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None):
        nn.Module.__init__(self)
        self.bits, self.group = weight.bits, weight.group
        self.out_features, self.in_features = weight.shape
        self.register_buffer("words", weight.words)
        self.register_buffer("learned", weight.learned)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("columns", weight.columns)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False))
        self.tuned: nn.Module | None = None
        self.tuned_zero: nn.Module | None = None

    def forward(self, input: Tensor, low: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """input [..., k] -> [..., n], in its dtype; low: (u [..., r], b [n, r]), whose product u b^T is added in the same pass."""
        if input.shape[-1] != self.in_features:
            raise ModelError(f"a packed linear of {self.in_features} inputs was given {input.shape[-1]}")
        learned = self.learned if self.tuned is None else self.tuned()
        zero = self.zero if self.tuned_zero is None else self.tuned_zero()
        if self.columns is not None:
            input = input.index_select(-1, self.columns)
        return dispatch.linear(input, self.words, learned, zero, self.bias, self.bits, self.group, self.out_features, low)

    def __getattr__(self, name: str) -> Any:
        """`weight` for who asks: [n, k], decoded when read, never written; float32 on CPUs, else in the dtype of the values."""
        if name != "weight":
            return super().__getattr__(name)
        dtype = torch.float32 if self.words.device.type == "cpu" else self.learned.dtype
        like = torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        return WeightView(lambda: self.packed().dequantize(dtype), like, self.words.device)

    def packed(self) -> PackedWeight:
        """The weight as it would be stored now, with the tuner's values or zeros if one is attached."""
        learned = self.learned if self.tuned is None else self.tuned().detach().to(self.learned.dtype)
        zero = self.zero if self.zero is None or self.tuned_zero is None else self.tuned_zero().detach().to(self.zero.dtype)
        values = Table(learned) if self.table else Affine(learned, zero)
        return PackedWeight(self.words, values, self.bits, self.group, (self.out_features, self.in_features), self.columns)

    @property
    def table(self) -> bool:
        """Whether the weight is a sketch."""
        return self.learned.dim() == 3

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves devices like any module, but `.half()`, `.bfloat16()` and `.float()` leave the stored values as they are."""
        values, moved = (self.learned, self.zero), same_dtype(fn)
        return super()._apply(lambda t: moved(t) if any(t is value for value in values) else fn(t), recurse)

    def extra_repr(self) -> str:
        kind = "table" if self.table else "symmetric" if self.zero is None else "asymmetric"
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}, {kind}"


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks: the longest nn.ModuleList of same-class modules that hold nn.Linear or PackedLinear layers.

    A list inside a list that qualifies, such as the experts of a block, does not count, however long.
    """
    best: tuple[str, nn.ModuleList] | None = None
    taken: list[str] = []  # prefixes of the lists that qualify; named_modules gives the outer one first
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in taken):
            continue
        if not isinstance(module, nn.ModuleList) or len({type(m) for m in module}) != 1:
            continue
        holds = any(isinstance(m, nn.Linear) for m in module[0].modules() if m is not module[0])
        if not holds:
            continue
        taken.append(f"{name}." if name else "")
        if best is None or len(module) > len(best[1]):
            best = (name, module)
    if best is None:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        hint = "its layers are Conv1D, which the readers of packed folders do not know" if "Conv1D" in kinds else "no list of decoder blocks found"
        raise ModelError(f"{type(model).__name__} cannot be compressed: {hint}; LLaMA-like models with nn.Linear layers can")
    return best


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """All dense nn.Linear layers inside `module` by dotted name, in definition order."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, PackedLinear)}


def block_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the nn.Linear layers of the blocks, by dotted name: what can be pruned. Embeddings, norms and head are not."""
    prefix, blocks = find_blocks(model)
    return {f"{prefix}.{name}.weight": layer.get_parameter("weight") for name, layer in linears(blocks).items()}


def packed_linears(module: nn.Module) -> dict[str, PackedLinear]:
    """All PackedLinear layers inside `module` by dotted name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, PackedLinear)}


def targeted(names: Iterable[str], targets: str | None) -> list[str]:
    """Of the names of packed linears those whose last part is in `targets`, by comma; None: all. RecipeError for a target that names none."""
    found = list(names)
    leaves = {name.rpartition(".")[2] for name in found}
    wanted = leaves if targets is None else {part.strip() for part in targets.split(",")}
    if strange := sorted(wanted - leaves):
        raise RecipeError(f"no packed linear is named {strange[0]}: choose targets among {', '.join(sorted(leaves))}")
    return [name for name in found if name.rpartition(".")[2] in wanted]


def swap(module: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule at dotted `name`; the old one is freed once nobody else holds it."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent) if parent else module, leaf, new)


def to_packed(layer: nn.Linear, weight: PackedWeight) -> PackedLinear:
    """A PackedLinear with this layer's bias and training flag."""
    packed = PackedLinear(weight, layer.bias)
    return packed.train(layer.training).to(torch.device(layer.weight.device))
