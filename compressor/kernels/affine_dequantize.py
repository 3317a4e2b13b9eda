"""A panel of the dense weight in natural order, for matrix products with so many rows that a dense one is faster (panels.py).

Every weight is formed in fp32 and rounded once, as in reference.dequantize, bit for bit. Price: the panel is written and read again.
Limits: a panel starts at a multiple of 64 rows and 256 columns. Source: ours.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from compressor.kernels.affine_decode import load_words, weights_of


@triton.jit(do_not_specialize=["first_block"])
def dequantize_kernel(
    w_ptr, s_ptr, z_ptr, out_ptr,
    N, K, G, tiles_n, blocks, first_block, stride_out,
    GROUP: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    TYPE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out[n, k - 256 first_block] = round(s[n, g(k)] (code[n, k] - z[n, g(k)])) for n < N, k < K (the end of the panel)

    words [tiles_n, blocks, 64, 8 BITS]; s, z [N, G], z None for the midpoint; out rows stride_out apart. TYPE: the 16-bit type that decodes best.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    start = first_block * 256 + tl.program_id(1) * WIDTH
    low, high = load_words(w_ptr, n, start // 256, blocks, tiles_n, BITS)
    w = weights_of(low, high, start % 256, s_ptr, z_ptr, n, start // GROUP, N, G, WIDTH, COUNT, BITS, TYPE, DOT)
    k = start + tl.arange(0, WIDTH)
    at = n.to(tl.int64)[:, None] * stride_out + (k - first_block * 256)[None, :]
    tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))
