"""dx = dy W on packed weights with tables: each weight tile is looked up once for all rows of dy that a program owns.

A program owns up to 256 columns of one block, which lie in one segment. Price: the tile passes through shared memory, as the reduction's side must
be the rows; weights are looked up again for each BM rows of dy. Limits: as in forward, for many rows a dense panel with cuBLAS is expected to be
faster. Source: ours.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from compressor.kernels.finish import store_sum
from compressor.kernels.table_decode import load_nibbles, weights_of


@triton.jit(do_not_specialize=["M", "steps"])
def table_grad_input_kernel(
    dy_ptr, w_ptr, t_ptr, dx_ptr, part_ptr, count_ptr,
    M, N, K, stride_dy, tiles_n, blocks, rows, steps,
    GROUP: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """dx[m, k] = sum over n of dy[m, n] table[n, k // GROUP, code[n, k]]

    dy [M, N], rows stride_dy apart; words [tiles_n, blocks, 64, 8 BITS]; t: prepared tables of `rows` rows; dx [M, K].
    A program takes WIDTH columns; a part is `steps` steps of BN rows.
    """
    TYPE: tl.constexpr = dy_ptr.dtype.element_ty
    start = tl.program_id(0) * WIDTH
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    dy_rows = dy_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_dy
    segment = start // GROUP
    acc = tl.zeros((BM, WIDTH), ACC)
    for step in range(part * steps, tl.minimum(part * steps + steps, tl.cdiv(N, BN))):
        n = step * BN + tl.arange(0, BN)
        left, right = load_nibbles(w_ptr, n, start // 256, blocks, tiles_n, BITS)
        w = weights_of(left, right, start % 256, t_ptr, n, segment, rows, WIDTH, BITS, TYPE, ASM).to(DOT)  # [BN, WIDTH]
        dy = tl.load(dy_rows + n[None, :], mask=n[None, :] < N, other=0.0).to(DOT)  # [BM, BN]
        acc = tl.dot(dy, w, acc, input_precision=PRECISION, out_dtype=ACC)
    k = start + tl.arange(0, WIDTH)
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    store_sum(acc, dx_ptr, part_ptr, count_ptr, at, (m[:, None] < M) & (k[None, :] < K), M * K, SPLIT)
