"""A packed weight as others see it: a tensor [n, k] that holds nothing, is decoded by whatever reads its numbers, and cannot be changed.

Libraries around nn.Linear look at `layer.weight`: mostly at its shape, dtype and device, which costs nothing here, sometimes at its numbers (DoRA's
norms), and some write into it. What would be written into a decoded copy is lost in silence: peft's merge would drop an adapter, and its PiSSA would
train beside a weight that it believes it has reduced. So a write raises, into a slice or another shape of the weight too.

Price: each operation decodes the whole weight anew, 4 n k bytes while it runs. Limits: no gradient reaches the values through it, and an operation
that returns several views (split, unbind) returns ordinary tensors of their own.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from compressor.errors import ModelError

REFUSED = (
    "a packed weight cannot be changed in place, and what was to be written would be lost: adapters stay beside it, or are absorbed by packing anew"
)


class WeightView(Tensor):
    """A tensor like `like`, a tensor of the meta device, on a device, whose numbers are `decode()`."""

    decode: Callable[[], Tensor]
    like: Tensor

    @staticmethod
    def __new__(cls, decode: Callable[[], Tensor], like: Tensor, device: torch.device) -> "WeightView":
        made = Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device)
        assert isinstance(made, WeightView)
        made.decode, made.like = decode, like
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.__setitem__ or (getattr(func, "__self__", None) is Tensor.data and func.__name__ == "__set__"):
            raise ModelError(REFUSED)  # the operators that these end in would write into a copy
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})


def _dispatch(cls: type, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    """What an operator gives on the decoded weight; a view again from one that only looks at the tensor otherwise."""
    named = kwargs or {}
    given = [*zip(func._schema.arguments, args, strict=False), *((a, named[a.name]) for a in func._schema.arguments if a.name in named)]
    written = [value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write]
    if any(isinstance(value, WeightView) for value in tree_leaves(written)):
        raise ModelError(REFUSED)
    (first, *_), returns = [*args, None], func._schema.returns
    if isinstance(first, WeightView) and len(returns) == 1 and returns[0].alias_info is not None and str(returns[0].type) == "Tensor":
        return WeightView(lambda: func(first.decode(), *args[1:], **named), func(first.like, *args[1:], **named), first.device)
    plain = lambda value: value.decode() if isinstance(value, WeightView) else value
    return func(*tree_map(plain, args), **tree_map(plain, named))


setattr(WeightView, "__torch_dispatch__", classmethod(_dispatch))  # noqa: B010  (torch types it as an attribute)
