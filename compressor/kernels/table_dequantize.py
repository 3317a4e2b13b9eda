"""A panel of the dense weight in natural order, for matrix products with so many rows that a dense one is faster (panels.py).

Values are those of the table, rounded once to x's type, as in reference.dequantize, bit for bit. Price: the panel is written and read again.
Limits: a panel starts at a multiple of 64 rows and 256 columns. Source: ours.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from compressor.kernels.table_decode import load_nibbles, weights_of


@triton.jit(do_not_specialize=["first_row", "first_block"])
def table_dequantize_kernel(
    w_ptr, t_ptr, out_ptr,
    N, K, tiles_n, blocks, rows, first_row, first_block, stride_out,
    GROUP: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    TYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out[n - first_row, k - 256 first_block] = table[n, k // GROUP, code[n, k]] for n < N, k < K (the ends of the panel)

    words [tiles_n, blocks, 64, 8 BITS]; t: tables prepared for TYPE, of `rows` rows; out rows stride_out apart. A program takes BN x WIDTH.
    """
    local = tl.program_id(0) * BN + tl.arange(0, BN)
    n = first_row + local
    start = first_block * 256 + tl.program_id(1) * WIDTH
    left, right = load_nibbles(w_ptr, n, start // 256, blocks, tiles_n, BITS)
    w = weights_of(left, right, start % 256, t_ptr, tl.minimum(n, rows - 1), start // GROUP, rows, WIDTH, BITS, TYPE, ASM)
    k = start + tl.arange(0, WIDTH)
    at = local.to(tl.int64)[:, None] * stride_out + (k - first_block * 256)[None, :]
    tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))
