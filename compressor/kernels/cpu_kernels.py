"""Whole-layer loops over packed blocks on a CPU: multiply a few rows of x, decode rows to a panel, reduce the gradient of a panel to its values.

Every kernel is a C function of one argument, the address of an array of int64 (unpacked at its head), so that any thread pool can call it.
Threads share the work by taking tiles of 64 rows off a counter in that array; each takes a piece of the scratch buffer the same way. Tiles
are visited block by block over their 64 rows, in the order of memory; the sums of the rows wait in the first-level cache.

Price: each kernel is compiled at its first use for its bits, kind and span (one to two seconds; kept on disk for later processes).
Limits: float32 sums. Source: ours.
"""

# mypy: ignore-errors
import functools
import zlib
from pathlib import Path

import numba
from numba import types

from compressor.kernels import cpu_vector
from compressor.kernels.cpu_vector import (
    CONVERT,
    PERMUTE,
    TABLE,
    copy_bfloats,
    copy_bytes,
    copy_floats,
    copy_halves,
    decode,
    dot,
    load_bfloat,
    load_byte,
    load_float,
    load_half,
    part_columns,
    store_float,
    sum_codes,
    sum_steps,
    take,
    total,
)

NEXT, SLOT = 0, 1  # in the array: counters of the next tile and the next piece of scratch
FLOAT, BFLOAT, HALF, BYTE, MIDDLE = range(5)  # how a number is stored; MIDDLE: not at all, it is 2**(bits-1)

_inline = numba.njit(inline="always")


@_inline
def _number(address, i, how):
    if how == FLOAT:
        return load_float(address + 4 * i)
    if how == BFLOAT:
        return load_bfloat(address + 2 * i)
    if how == HALF:
        return load_half(address + 2 * i)
    return load_byte(address + i)


@_inline
def _numbers(address, first, count, how, BITS, out):
    """Stored numbers first .. first+count-1 as float32."""
    whole = count // 16 * 16
    if how == MIDDLE:
        for i in range(count):
            store_float(out + 4 * i, numba.float32(1 << (BITS - 1)))
        return
    if how == FLOAT:
        for i in range(0, whole, 16):
            copy_floats(address + 4 * (first + i), out + 4 * i)
    elif how == BFLOAT:
        for i in range(0, whole, 16):
            copy_bfloats(address + 2 * (first + i), out + 4 * i)
    elif how == HALF:
        for i in range(0, whole, 16):
            copy_halves(address + 2 * (first + i), out + 4 * i)
    else:
        for i in range(0, whole, 16):
            copy_bytes(address + first + i, out + 4 * i)
    for i in range(whole, count):
        store_float(out + 4 * i, _number(address, first + i, how))


@_inline
def _prepare(tile, rows, width, values, value_type, zeros, zero_type, out_values, out_zeros, BITS, KIND):
    """The values of a tile's rows as the blocks want them: tables of 16 floats, or scales and zeros (CONVERT: minus scale * zero)."""
    first, count = tile * 64 * width, rows * width
    if KIND == TABLE:
        _numbers(values, first << BITS, count << BITS, value_type, BITS, out_values)
        if BITS < 4:  # spread from the end: entries of a table are repeated to 16
            for i in range(count - 1, -1, -1):
                for c in range(15, -1, -1):
                    store_float(out_values + 4 * (16 * i + c), load_float(out_values + 4 * ((i << BITS) + (c & ((1 << BITS) - 1)))))
    else:
        _numbers(values, first, count, value_type, BITS, out_values)
        _numbers(zeros, first, count, zero_type, BITS, out_zeros)
        if KIND == CONVERT:
            for i in range(count):
                store_float(out_zeros + 4 * i, -load_float(out_values + 4 * i) * load_float(out_zeros + 4 * i))


@functools.cache
def _made_from() -> str:
    """Stands for the sources and the instruction sets."""
    sources = Path(cpu_vector.__file__).read_bytes() + Path(__file__).read_bytes()
    return f"{zlib.crc32(sources + ','.join(sorted(cpu_vector.features())).encode()):08x}"


def _compile(kernel, *parameters):
    """A C function. Its name is unique, as numba's cache on disk watches only the file that a function stands in, and is safe against two
    processes at once only if they write the same function."""
    stem = kernel.__qualname__.partition(".")[0]
    kernel.__name__ = kernel.__qualname__ = "_".join([stem, *map(str, parameters), _made_from()])
    signature = types.void(types.CPointer(types.int64))
    options = {"nopython": True, "error_model": "numpy", "boundscheck": False}
    try:
        return numba.cfunc(signature, cache=True, **options)(kernel)
    except RuntimeError:  # no folder for the cache
        return numba.cfunc(signature, **options)(kernel)


@functools.cache
def affine_kind() -> int:
    """How affine weights are decoded on this CPU."""
    return PERMUTE if "avx512f" in cpu_vector.features() else CONVERT


@functools.cache
def gemv(BITS, KIND, SPAN, ROWS):
    """y [m, n] = x [m, k] @ weight.T for m <= ROWS."""

    def kernel(pointer):
        a = numba.carray(pointer, (19,))
        tiles, n, k, across, width, m = a[2], a[3], a[4], a[5], a[6], a[7]
        words, values, value_type, zeros, zero_type, index, x, y, scratch, size = a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17]
        here = a.ctypes.data
        row_bytes = 32 * BITS
        steps = 8 // SPAN
        xs = scratch + take(here + 8 * SLOT) * size  # x with evens before odds in each slice, padded with zeros
        stride = 1024 * across
        sums = xs + ROWS * stride
        tile_values = sums + 64 * 64 * ROWS
        tile_zeros = tile_values + 4 * 64 * width
        for i in range(ROWS):
            whole = k // 32 * 32 if i < m else 0
            for j in range(0, whole, 32):
                part_columns(x + 4 * (i * k + j), xs + i * stride + 4 * j)
            for j in range(whole, 256 * across):
                store_float(xs + i * stride + 4 * j, numba.float32(0))
            for j in range(whole, k if i < m else 0):
                store_float(xs + i * stride + 4 * (whole + (j % 2) * 16 + (j % 32) // 2), load_float(x + 4 * (i * k + j)))
        while True:
            tile = take(here + 8 * NEXT)
            if tile >= tiles:
                break
            rows = min(64, n - 64 * tile)
            _prepare(tile, rows, width, values, value_type, zeros, zero_type, tile_values, tile_zeros, BITS, KIND)
            for i in range(rows * ROWS * 16):
                store_float(sums + 4 * i, numba.float32(0))
            step = (64 if KIND == TABLE else 4) * width
            for block in range(across):
                at = words + (tile * across + block) * 64 * row_bytes
                for r in range(rows):
                    dot(
                        at + r * row_bytes, tile_values + r * step, tile_zeros + r * step, index + 4 * steps * block,
                        xs + 1024 * block, stride, sums + 64 * ROWS * r, BITS, KIND, SPAN, ROWS,
                    )  # fmt: skip
            for i in range(m):
                for r in range(rows):
                    store_float(y + 4 * (i * n + 64 * tile + r), total(sums + 64 * (ROWS * r + i)))

    return _compile(kernel, BITS, KIND, SPAN, ROWS)


@functools.cache
def panel(BITS, KIND, SPAN):
    """Rows of the weight, from the tile a[18] on, decoded to out [rows, 256 * across] in float32."""

    def kernel(pointer):
        a = numba.carray(pointer, (19,))
        tiles, n, across, width = a[2], a[3], a[5], a[6]
        words, values, value_type, zeros, zero_type, index, out, scratch, size, first = (
            a[8],
            a[9],
            a[10],
            a[11],
            a[12],
            a[13],
            a[15],
            a[16],
            a[17],
            a[18],
        )
        here = a.ctypes.data
        row_bytes = 32 * BITS
        steps = 8 // SPAN
        tile_values = scratch + take(here + 8 * SLOT) * size
        tile_zeros = tile_values + 4 * 64 * width
        step = (64 if KIND == TABLE else 4) * width
        while True:
            t = take(here + 8 * NEXT)
            if t >= tiles:
                break
            tile = first + t
            rows = min(64, n - 64 * tile)
            _prepare(tile, rows, width, values, value_type, zeros, zero_type, tile_values, tile_zeros, BITS, KIND)
            for block in range(across):
                at = words + (tile * across + block) * 64 * row_bytes
                for r in range(rows):
                    decode(
                        at + r * row_bytes, tile_values + r * step, tile_zeros + r * step, index + 4 * steps * block,
                        out + 1024 * ((t * 64 + r) * across + block), BITS, KIND, SPAN,
                    )  # fmt: skip

    return _compile(kernel, BITS, KIND, SPAN)


@functools.cache
def reduce_scale(BITS, SPAN):
    """out [n, width] = sums of grad * (code - zero) over groups, for the rows from the tile a[18] on, whose gradient is x [rows, 256 * across]."""

    def kernel(pointer):
        a = numba.carray(pointer, (19,))
        tiles, n, across, width = a[2], a[3], a[5], a[6]
        words, zeros, zero_type, index, grad, out, scratch, size, first = a[8], a[11], a[12], a[13], a[14], a[15], a[16], a[17], a[18]
        here = a.ctypes.data
        row_bytes = 32 * BITS
        tile_zeros = scratch + take(here + 8 * SLOT) * size
        while True:
            t = take(here + 8 * NEXT)
            if t >= tiles:
                break
            tile = first + t
            rows = min(64, n - 64 * tile)
            _numbers(zeros, tile * 64 * width, rows * width, zero_type, BITS, tile_zeros)
            for i in range(rows * width):
                store_float(out + 4 * (tile * 64 * width + i), numba.float32(0))
            for block in range(across):
                at = words + (tile * across + block) * 64 * row_bytes
                for r in range(rows):
                    sum_steps(
                        at + r * row_bytes, tile_zeros + 4 * width * r, index + 4 * (8 // SPAN) * block,
                        grad + 1024 * ((t * 64 + r) * across + block), out + 4 * width * (tile * 64 + r), BITS, SPAN,
                    )  # fmt: skip

    return _compile(kernel, BITS, SPAN)


@functools.cache
def reduce_table(BITS, SPAN):
    """out [n, width, 2**BITS] = sums of grad over the columns of each code, for the rows from the tile a[18] on."""

    def kernel(pointer):
        a = numba.carray(pointer, (19,))
        tiles, n, across, width = a[2], a[3], a[5], a[6]
        words, index, grad, out, scratch, size, first = a[8], a[13], a[14], a[15], a[16], a[17], a[18]
        here = a.ctypes.data
        row_bytes = 32 * BITS
        entries = width << BITS
        sums = scratch + take(here + 8 * SLOT) * size
        while True:
            t = take(here + 8 * NEXT)
            if t >= tiles:
                break
            tile = first + t
            for r in range(min(64, n - 64 * tile)):
                for i in range(16 * entries):
                    store_float(sums + 4 * i, numba.float32(0))
                for block in range(across):
                    at = words + ((tile * across + block) * 64 + r) * row_bytes
                    sum_codes(at, index + 4 * (8 // SPAN) * block, grad + 1024 * ((t * 64 + r) * across + block), sums, BITS, SPAN)
                for i in range(entries):
                    store_float(out + 4 * ((tile * 64 + r) * entries + i), total(sums + 64 * i))

    return _compile(kernel, BITS, SPAN)
