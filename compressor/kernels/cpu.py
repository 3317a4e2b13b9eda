"""Host side of the CPU kernels: the same functions as reference.py, for float32 on packed weights, through numba.

Few rows of x: one pass over the packed words. More rows: panels of the weight are decoded to float32 and multiplied by oneDNN (faster than the
BLAS behind torch's float32 linear on some CPUs, equal on others). The gradient of the values reduces dy.T @ x panel by panel. A panel has few
rows, so that it stays in cache between the two steps; that is all the extra memory there is.

Threads: torch's own OpenMP pool where it can be reached (a second pool would fight with the first, whose idle threads spin), else Python threads;
as many as torch.get_num_threads().

Limits: groups in multiples of 32 columns, or whole rows; segments of tables likewise; scales in fp32, bf16, fp16, zeros uint8 or float.
"""

import array
import contextlib
import ctypes
import functools
import os
import threading
from typing import Any

import torch
from torch import Tensor

from compressor.kernels import layout

FEW = 16  # rows of x up to which the product runs on the packed words, measured: panels win from about 20
AT_ONCE = 8  # of them in one pass: what the registers hold
PANEL = 256  # rows of the weight that are decoded at a time
SERIAL = 1 << 19  # weights below which threads do not pay

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}  # as in cpu_kernels
_MIDDLE = 4


@functools.cache
def why_not() -> str:
    """Why the kernels cannot run here; empty if they can."""
    try:
        from compressor.kernels import cpu_kernels

        cpu_kernels.affine_kind()
    except ImportError as error:
        return "numba is not installed" if getattr(error, "name", None) == "numba" else f"numba cannot be imported ({error})"
    except Exception as error:  # broken installations raise what they like; plain torch still works
        return f"numba cannot be used ({type(error).__name__}: {error})"
    return ""


def available() -> bool:
    """Whether numba is there."""
    return not why_not()


def instructions() -> str:
    """The vector instructions that the kernels are compiled for."""
    from compressor.kernels.cpu_vector import features

    return next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in features()), "portable vectors")


def fits(group: int, k: int) -> bool:
    """Whether the kernels know this group size."""
    return group >= k or group % 32 == 0


def span(group: int, k: int) -> int:
    """Slices of 32 columns that surely share their values: 1, 2, 4 or 8."""
    if group >= k:
        return 8
    return next(s for s in (8, 4, 2, 1) if group % (32 * s) == 0)


@functools.lru_cache(maxsize=256)
def _index(group: int, k: int) -> "array.array[int]":
    """For each span of columns of the padded row the group that it lies in."""
    padded, width = -(-k // layout.COLS) * layout.COLS, 32 * span(group, k)
    return array.array("i", [min(start, k - 1) // group for start in range(0, padded, width)])


@functools.cache
def _compiled() -> tuple[Any, int]:
    """The module with the kernels, and its mark of tables."""
    from compressor.kernels import cpu_kernels, cpu_vector

    return cpu_kernels, cpu_vector.TABLE


class _Weight:
    """Addresses and types of a packed weight, for the kernels' argument array; keeps the tensors alive."""

    def __init__(self, words: Tensor, values: Tensor | None, zero: Tensor | None, bits: int, group: int, n: int, k: int, table: bool = False):
        kernels, mark = _compiled()
        self.words, self.bits, self.n, self.k = words.contiguous(), bits, n, k
        self.values = None if values is None else _plain(values)
        self.zero = None if zero is None else _plain(zero)
        self.table = table or (values is not None and values.dim() == 3)
        self.kind = mark if self.table else kernels.affine_kind()
        self.group, self.span, self.width = group, span(group, k), -(-k // group)
        self.down, self.across = layout.tiles(n, k)
        self.index = _index(group, k)

    def value_bytes(self) -> int:
        """Scratch for the values of one tile of rows."""
        return 64 * self.width * (64 if self.table else 8)

    def run(self, kernel: Any, scratch: int, x: Tensor | None, out: Tensor, first: int, tiles: int, rows: int = 1) -> None:
        """Call a kernel of cpu_kernels on `tiles` tiles from `first` on, which meet `rows` rows of x each; `scratch` bytes a thread."""
        threads = min(torch.get_num_threads(), tiles) if tiles * 64 * self.k * rows > SERIAL else 1
        size = -(-scratch // 64) * 64
        buffer = _empty((threads * size + 64) // 4)
        zero_type = _MIDDLE if self.zero is None else _TYPES[self.zero.dtype]
        values, value_type = (0, 0) if self.values is None else (self.values.data_ptr(), _TYPES[self.values.dtype])
        arguments = (ctypes.c_int64 * 19)(
            0, 0, tiles, self.n, self.k, self.across, self.width, rows,
            self.words.data_ptr(), values, value_type, 0 if self.zero is None else self.zero.data_ptr(), zero_type, self.index.buffer_info()[0],
            0 if x is None else x.data_ptr(), out.data_ptr(), -(-buffer.data_ptr() // 64) * 64, size, first,
        )  # fmt: skip
        _parallel(kernel.address, ctypes.addressof(arguments), threads)


def _empty(*shape: int) -> Tensor:
    """Whatever default type and device are in force, the kernels write float32 in this machine's memory."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def _plain(t: Tensor) -> Tensor:
    return (t if t.dtype in _TYPES else t.float()).contiguous()


def forward(x: Tensor, words: Tensor, values: Tensor, zero: Tensor | None, bits: int, group: int, n: int) -> Tensor:
    """y = x @ weight.T; x float32 [m, k] -> y [m, n]."""
    kernels, _ = _compiled()
    m, k = x.shape
    w = _Weight(words, values, zero, bits, group, n, k)
    y = _empty(m, n)
    if m == 0:
        return y
    if m <= FEW:
        x = x.contiguous()
        passes = [(x, y)] if m <= AT_ONCE else zip(x.split(AT_ONCE), y.split(AT_ONCE), strict=True)
        for part, out in passes:
            rows = 1 << (part.shape[0] - 1).bit_length()
            scratch = 1024 * w.across * rows + 4096 * rows + w.value_bytes()
            w.run(kernels.gemv(bits, w.kind, w.span, rows), scratch, part, out, 0, w.down, part.shape[0])
        return y
    x = _padded(x, w.across)
    for panel_rows, panel in _panels(w):
        y[:, panel_rows] = product(x, panel)
    return y


def grad_input(dy: Tensor, words: Tensor, values: Tensor, zero: Tensor | None, bits: int, group: int, k: int) -> Tensor:
    """dx = dy @ weight; dy float32 [m, n] -> dx [m, k]."""
    m, n = dy.shape
    w = _Weight(words, values, zero, bits, group, n, k)
    dx = _empty(m, w.across * layout.COLS).zero_()
    if m:
        for rows, panel in _panels(w):
            dx += product(dy[:, rows], panel.T)
    return dx[:, :k].contiguous()


def grad_scale(x: Tensor, dy: Tensor, words: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    """dscale[i, g] = sum over the group's columns j of (dy.T @ x)[i, j] * (code - zero)[i, j]; float32 [n, k/group]."""
    w = _Weight(words, None, zero, bits, group, dy.shape[1], x.shape[1])
    return _reduce(w, x, dy, _empty(w.n, w.width), _compiled()[0].reduce_scale(bits, w.span), 4 * 64 * w.width)


def grad_table(x: Tensor, dy: Tensor, words: Tensor, bits: int, group: int) -> Tensor:
    """dtable[i, s, c] = sum over the segment's columns j with code[i, j] = c of (dy.T @ x)[i, j]; float32 [n, S, 2**bits]."""
    w = _Weight(words, None, None, bits, group, dy.shape[1], x.shape[1], table=True)
    return _reduce(w, x, dy, _empty(w.n, w.width, 1 << bits), _compiled()[0].reduce_table(bits, w.span), (64 * w.width) << bits)


def _reduce(w: _Weight, x: Tensor, dy: Tensor, out: Tensor, kernel: Any, scratch: int) -> Tensor:
    if not x.shape[0]:
        return out.zero_()
    x = _padded(x, w.across)
    for start in range(0, w.n, PANEL):
        rows = slice(start, min(start + PANEL, w.n))
        grad = product(dy[:, rows].T, x.T)
        w.run(kernel, scratch, grad, out, start // 64, -(-(rows.stop - start) // 64))
    return out


def _panels(w: _Weight) -> Any:
    """(rows, those rows of the weight in float32, padded to whole blocks) down the weight; each panel overwrites the one before."""
    buffer = _empty(min(PANEL, w.n), w.across * layout.COLS)
    kernel = _compiled()[0].panel(w.bits, w.kind, w.span)
    for start in range(0, w.n, PANEL):
        rows = slice(start, min(start + PANEL, w.n))
        w.run(kernel, w.value_bytes(), None, buffer, start // 64, -(-(rows.stop - start) // 64))
        yield rows, buffer[: rows.stop - start]


def _padded(x: Tensor, across: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, across * layout.COLS - x.shape[1])) if x.shape[1] % layout.COLS else x


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in float32."""
    op = _onednn()
    return a @ b.T if op is None else op(a, b, None, "none", [], "")


@functools.cache
def _onednn() -> Any:
    """oneDNN's linear, which torch keeps for its compiler, or None."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        op = torch.ops.mkldnn._linear_pointwise.default
        a, b = (torch.ones(rows, 4, dtype=torch.float32, device="cpu") for rows in (3, 2))
        return op if torch.equal(op(a, b, None, "none", [], ""), a @ b.T) else None
    except (AttributeError, RuntimeError):
        return None


_function = functools.cache(ctypes.CFUNCTYPE(None, ctypes.c_void_p))  # address -> what Python calls; it lets go of the interpreter lock


def _parallel(address: int, arguments: int, threads: int) -> None:
    """Call the C function on `threads` threads at once; they share the work among themselves."""
    if threads == 1:
        _function(address)(arguments)
        return
    gomp = _gomp()
    if gomp is not None:
        gomp(address, arguments, threads, 0)
        return
    others = [threading.Thread(target=_function(address), args=(arguments,)) for _ in range(threads - 1)]
    started = []
    try:
        for thread in others:
            thread.start()
            started.append(thread)
        _function(address)(arguments)
    finally:  # the memory they write must outlive them, whatever happens here
        while any(thread.is_alive() for thread in started):
            with contextlib.suppress(KeyboardInterrupt):
                for thread in started:
                    thread.join()


def pool() -> str:
    """Whose threads do the work."""
    return "threads of torch's OpenMP" if _gomp() else "Python threads"


@functools.cache
def _gomp() -> Any:
    """GOMP_parallel of the OpenMP library that torch has loaded, or None."""
    try:
        with open("/proc/self/maps") as maps:
            path = next(line.split(maxsplit=5)[-1].strip() for line in maps if "libgomp" in line and os.path.dirname(torch.__file__) in line)
        function = ctypes.CDLL(path).GOMP_parallel
    except (OSError, StopIteration, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function
