"""The numba kernels against a dense float64 weight: outputs, gradients of x and of the values, odd shapes, every width, both kinds of values."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.kernels import cpu, layout, reference
from tests.tolerances import RELATIVE, error

pytest.importorskip("numba")
pytestmark = pytest.mark.usefixtures("poison")

TOLERANCE = RELATIVE[torch.float32]
# m, n, k, group: few rows in every count of registers, and many; ragged; every span of columns that share values; several panels of rows
AFFINE = [(1, 100, 352, 32), (3, 70, 300, 300), (2, 128, 512, 128), (8, 65, 576, 64), (1, 192, 1024, 512), (20, 100, 352, 32), (40, 300, 512, 128)]
TABLE = [(1, 128, 512, 128), (3, 70, 300, 300), (8, 65, 576, 192), (20, 300, 512, 128), (13, 65, 576, 192)]


@dataclass
class Layer:
    x: Tensor
    dy: Tensor
    words: Tensor
    values: Tensor
    zero: Tensor | None
    bits: int
    group: int

    def run(self, ops: Any, wide: bool = False) -> list[Tensor]:
        """y, dx and the gradient of the values."""
        x, dy, values = (t.double() if wide else t for t in (self.x, self.dy, self.values))
        (k, n), rest = (x.shape[1], dy.shape[1]), (self.bits, self.group)
        y = ops.forward(x, self.words, values, self.zero, *rest, n)
        dx = ops.grad_input(dy, self.words, values, self.zero, *rest, k)
        if values.dim() == 3:
            return [y, dx, ops.grad_table(x, dy, self.words, *rest)]
        return [y, dx, ops.grad_scale(x, dy, self.words, self.zero, *rest)]


def layer(m: int, n: int, k: int, group: int, bits: int, kind: str, dtype: torch.dtype = torch.float32) -> Layer:
    torch.manual_seed(m + n + k + group + bits)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    groups = -(-k // group)
    zero = None
    if kind == "table":
        values = torch.randn(n, groups, 1 << bits)
    else:
        values = torch.rand(n, groups) + 0.5
        if kind != "symmetric":
            zero = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8)
        if kind == "float zero" and zero is not None:
            zero = zero + 0.3
    words = layout.pack_tiles(codes, bits, "prmt" if kind == "table" else "pair")
    return Layer(torch.randn(m, k), torch.randn(m, n), words, values.to(dtype), zero, bits, group)


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize(("shape", "kind"), [(s, "asymmetric") for s in AFFINE] + [(s, "table") for s in TABLE], ids=str)
def test_outputs_and_gradients(shape: tuple[int, int, int, int], kind: str, bits: int) -> None:
    one = layer(*shape, bits, kind)
    for ours, exact in zip(one.run(cpu), one.run(reference, wide=True), strict=True):
        assert error(ours, exact) <= TOLERANCE


@pytest.mark.parametrize("kind", ["symmetric", "float zero", "table"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_stored_types_of_values(kind: str, dtype: torch.dtype) -> None:
    one = layer(2, 70, 300, 300, 3, kind, dtype)
    for ours, exact in zip(one.run(cpu), one.run(reference, wide=True), strict=True):
        assert error(ours, exact) <= TOLERANCE


def test_every_half_is_read_as_torch_reads_it() -> None:
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    table = halves.view(-1, 1, 4).clone()
    n = table.shape[0]
    codes = torch.arange(256, dtype=torch.uint8).remainder(4).expand(n, 256)
    weight = cpu._Weight(layout.pack_tiles(codes, 2, "prmt"), table, None, 2, 256, n, 256)
    torch.set_flush_denormal(True)
    try:
        found = torch.cat([panel[:, :4].clone() for _, panel in cpu._panels(weight)])
    finally:
        torch.set_flush_denormal(False)
    expected = table[:, 0].float()
    assert expected.isnan().any() and expected.isinf().any() and (expected < 0).any()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "table"])
def test_a_unit_vector_reads_the_weight_itself(kind: str) -> None:
    one = layer(1, 128, 512, 128, 3, kind)
    one.x = torch.eye(8, 512)
    weight = reference.dequantize(one.words, one.values, one.zero, 3, 128, 128, 512, torch.float32)
    out = cpu.forward(one.x, one.words, one.values, one.zero, 3, 128, 128)
    torch.testing.assert_close(out, weight[:, :8].T, rtol=0 if kind == "table" else 1e-6, atol=0 if kind == "table" else 1e-6)


@pytest.mark.parametrize("kind", ["asymmetric", "table"])
@pytest.mark.parametrize("m", [2, 20])
def test_threads_change_no_bit(kind: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SERIAL", 0)
    one = layer(m, 300, 512, 128, 3, kind)
    alone = one.run(cpu)
    torch.set_num_threads(2)
    try:
        together = one.run(cpu)
        monkeypatch.setattr(cpu, "_gomp", lambda: None)
        threaded = one.run(cpu)
    finally:
        torch.set_num_threads(1)
    for a, b, c in zip(alone, together, threaded, strict=True):
        assert error(b, a) <= TOLERANCE  # products of panels are oneDNN's, which may cut sums by threads
        assert torch.equal(b, c)
    if m <= cpu.FEW:
        assert torch.equal(alone[0], together[0])


def test_strange_layouts_of_x() -> None:
    one = layer(3, 70, 300, 300, 3, "asymmetric")
    straight = one.run(cpu)
    wide = torch.randn(3, 2 * 300)
    wide[:, ::2] = one.x
    one.x, one.dy, one.words = wide[:, ::2], one.dy.T.contiguous().T, one.words.clone()
    for a, b in zip(one.run(cpu), straight, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["asymmetric", "table"])
def test_no_rows_at_all(kind: str) -> None:
    one = layer(3, 70, 300, 300, 3, kind)
    one.x, one.dy = one.x[:0], one.dy[:0]
    y, dx, dvalues = one.run(cpu)
    assert y.shape == (0, 70) and dx.shape == (0, 300)
    assert dvalues.shape == one.values.shape and not dvalues.any()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_default_types_of_others_do_not_matter(default: torch.dtype) -> None:
    one = layer(20, 70, 300, 300, 3, "asymmetric")
    exact = one.run(cpu)
    torch.set_default_dtype(default)
    try:
        found = one.run(cpu)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_kernels_of_different_parameters_have_different_names() -> None:
    """numba's cache on disk keeps functions of one name in one file, which two processes may spoil for each other."""
    from compressor.kernels import cpu_kernels

    kind = cpu_kernels.affine_kind()
    names = {kernel._pyfunc.__qualname__ for kernel in (cpu_kernels.panel(3, kind, 8), cpu_kernels.panel(3, kind, 1), cpu_kernels.panel(4, kind, 8))}
    assert len(names) == 3


@pytest.mark.parametrize("features", ["+avx2,+fma", "+sse2"])
def test_other_cpus(features: str) -> None:
    """Kernels compiled for lesser instruction sets give the same numbers; in a process of its own, as numba reads the setting once."""
    import os
    import platform
    import subprocess
    import sys

    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("instruction sets of x86")
    code = (
        "from tests.kernels.test_cpu import *\n"
        "from compressor.kernels import cpu_kernels\n"
        "assert cpu_kernels.affine_kind() == 0\n"
        "for bits, group, kind in ((3, 32, 'asymmetric'), (4, 512, 'table')):\n"
        "    one = layer(1, 70, 512, group, bits, kind)\n"
        "    for ours, exact in zip(one.run(cpu), one.run(reference, wide=True), strict=True):\n"
        "        assert error(ours, exact) <= TOLERANCE, (bits, kind)\n"
    )
    environment = os.environ | {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
