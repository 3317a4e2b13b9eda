"""The kernels as these tests run them: compiled on a GPU if there is one, else by Triton's interpreter on CPU tensors.

The interpreter is chosen by TRITON_INTERPRET when a kernel is decorated, also inside triton's own library, which other tests (through transformers)
may have imported long before. So the fixture, for one test module, makes triton's library functions interpreted, imports the kernels anew, and
afterwards puts everything back: no other test sees the variable or the interpreted kernels.
"""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def affine(device: str) -> Iterator[ModuleType]:
    """compressor.kernels.affine, ready to be called with tensors on `device`."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        _forget_kernels(patch)
        if device == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
            _interpret_library(patch)
        else:
            patch.delenv("TRITON_INTERPRET", raising=False)
        yield importlib.import_module("compressor.kernels.affine")
        _forget_kernels(patch)


def _forget_kernels(patch: pytest.MonkeyPatch) -> None:
    import compressor.kernels as package

    for name in [n for n in sys.modules if n.startswith("compressor.kernels.affine")]:
        patch.delitem(sys.modules, name)
        patch.delattr(package, name.rpartition(".")[2], raising=False)


def _interpret_library(patch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    made: dict[int, Any] = {}
    for module in (tl, tl.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                patch.setattr(module, name, made.setdefault(id(value), InterpretedFunction(value.fn)))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every float tensor from torch.empty is full of NaN and lies between margins that must be untouched at the end."""
    margin, mark = 512, 7.0
    whole: list[torch.Tensor] = []
    real = torch.empty

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        out = real(*size, **options)
        if not out.is_floating_point():
            return out
        flat = torch.full((out.numel() + 2 * margin,), mark, dtype=out.dtype, device=out.device)
        whole.append(flat)
        return flat[margin : margin + out.numel()].fill_(float("nan")).view(out.shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for flat in whole:
        assert (flat[:margin] == mark).all(), "a kernel wrote before its output"
        assert (flat[-margin:] == mark).all(), "a kernel wrote past its output"
