"""dx = dy W on packed weights: each weight tile is decoded once for all rows of dy that a program owns.

The reduction runs over the rows of W, whose scales differ, so scales are always multiplied into the decoded tile (rounded once, like a dense
weight). A program owns one block of 256 columns, or a slice of it.

Price: the tile passes through shared memory, as the reduction's side must be the rows; the words are decoded again for each BM rows of dy.
Limits: as in forward, for many rows a dense panel with cuBLAS is expected to be faster. Source: ours.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from compressor.kernels.affine_decode import load_words, weights_of
from compressor.kernels.finish import store_sum


@triton.jit(do_not_specialize=["M", "G", "steps"])  # knowing that 16 divides G costs registers: groups of 32 would spill
def grad_input_kernel(
    dy_ptr, w_ptr, s_ptr, z_ptr, dx_ptr, part_ptr, count_ptr,
    M, N, K, G, stride_dy, tiles_n, blocks, steps,
    GROUP: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx[m, k] = sum over n: dy[m, n] scale[n, g(k)] (code[n, k] - zero[n, g(k)])

    dy [M, N], rows stride_dy apart; words [tiles_n, blocks, 64, 8 BITS]; s, z [N, G], z None for the midpoint; dx [M, K].
    A program takes WIDTH columns, which hold COUNT groups; a part is `steps` steps of BN rows.
    """
    TYPE: tl.constexpr = dy_ptr.dtype.element_ty
    start = tl.program_id(0) * WIDTH
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    dy_rows = dy_ptr + m.to(tl.int64)[:, None] * stride_dy
    first = start // GROUP
    acc = tl.zeros((BM, WIDTH), ACC)
    for step in range(part * steps, tl.minimum(part * steps + steps, tl.cdiv(N, BN))):
        n = step * BN + tl.arange(0, BN)
        low, high = load_words(w_ptr, n, start // 256, blocks, tiles_n, BITS)
        w = weights_of(low, high, start % 256, s_ptr, z_ptr, n, first, N, G, WIDTH, COUNT, BITS, TYPE, DOT)  # [BN, WIDTH]
        dy = tl.load(dy_rows + n[None, :], mask=(m[:, None] < M) & (n[None, :] < N), other=0.0).to(DOT)  # [BM, BN]
        acc = tl.dot(dy, w, acc, input_precision=PRECISION, out_dtype=ACC)
    k = start + tl.arange(0, WIDTH)
    at, inside = m.to(tl.int64)[:, None] * K + k[None, :], (m[:, None] < M) & (k[None, :] < K)
    store_sum(acc, dx_ptr, part_ptr, count_ptr, at, inside, M * K, SPLIT)
