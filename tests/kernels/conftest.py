"""The kernels as these tests run them: compiled on a GPU if there is one, else by Triton's interpreter on CPU tensors.

The interpreter is chosen by TRITON_INTERPRET when a kernel is decorated, also inside triton's own library, which other tests (through transformers)
may have imported long before. So the fixture, for one test module, makes triton's library functions interpreted, imports the kernels anew, and
afterwards puts everything back: no other test sees the variable or the interpreted kernels.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels(device: str) -> Iterator[None]:
    """Imports of the kernel modules give them ready to be called with tensors on `device`."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        _forget_kernels(patch)
        if device == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
            _interpret_library(patch)
        else:
            patch.delenv("TRITON_INTERPRET", raising=False)
        yield
        _forget_kernels(patch)


@pytest.fixture(scope="module")
def affine(kernels: None) -> ModuleType:
    return importlib.import_module("compressor.kernels.affine")


@pytest.fixture(scope="module")
def tables(kernels: None) -> ModuleType:
    return importlib.import_module("compressor.kernels.tables")


@pytest.fixture
def tuned(kernels: None, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Called with the content of a file of the user's own, which is then in force until the test ends."""
    from compressor.kernels import configs, launch

    mine = configs.Chip("mine", launch.chip(torch.empty(0, device=device).device).arch)

    def write(content: dict[str, Any]) -> None:
        (tmp_path / "mine.json").write_text(json.dumps(content))
        monkeypatch.setattr(launch, "chip", lambda _: mine)
        configs.use(tmp_path)

    yield write
    configs.use(None)


def between(t: torch.Tensor) -> torch.Tensor:
    """t, as a view between margins that no kernel may use: NaN, or integers that mean nothing."""
    margin = 4096  # more than a block of words
    wrong = float("nan") if t.is_floating_point() else 0x5A if t.dtype == torch.uint8 else 0x5A5A5A5A
    whole = torch.full((t.numel() + 2 * margin,), wrong, dtype=t.dtype, device=t.device)
    whole[margin : margin + t.numel()] = t.reshape(-1)
    return whole[margin : margin + t.numel()].view(t.shape)


# tiles unlike the shipped ones: fewer threads than rows, narrow slices, few rows of the weight, many of x; (bm, bn, width, warps, stages)
ODD_TILES = [(16, 128, 256, 4, 2), (16, 128, 64, 2, 1), (64, 16, 128, 8, 3), (64, 128, 128, 8, 2)]


def _forget_kernels(patch: pytest.MonkeyPatch) -> None:
    import compressor.kernels as package

    for name in [n for n in sys.modules if n.startswith(tuple(f"compressor.kernels.{kind}" for kind in ("affine", "table", "finish")))]:
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
