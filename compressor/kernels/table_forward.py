"""y = x W^T on packed weights with tables: weights are looked up in registers and stand left in the dot, so they never pass through shared memory.

Every weight is a value of the table and is used as it is, so one dot takes as many columns as share a table: 256, or 128 or 64 where segments end
inside a block.

Price: with few programs the reduction is cut in parts, see finish.py. Limits: above a few hundred rows a dense panel with cuBLAS is faster
(panels.py); on Hopper byte permutes and masks issue at half rate, which is the limit at 4 bits. Source: ours; see affine_forward.py.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from compressor.kernels.finish import add_low_rank, store_sum
from compressor.kernels.table_decode import load_nibbles, weights_of


@triton.jit(do_not_specialize=["M", "steps"])
def table_forward_kernel(
    x_ptr, w_ptr, t_ptr, u_ptr, b_ptr, y_ptr, part_ptr, count_ptr,
    M, N, K, R, stride_x, tiles_n, blocks, rows, steps,
    GROUP: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over k of x[m, k] table[n, k // GROUP, code[n, k]] (+ sum over r: u[m, r] b[n, r])

    x [M, K], rows stride_x apart; words [tiles_n, blocks, 64, 8 BITS]; t: prepared tables of `rows` rows; u [M, R], b [N, R] or None; y [M, N].
    A dot takes WIDTH columns; SPAN columns (a multiple of WIDTH, up to 256) share a table; SPAN 0: all columns of a part do. A part is `steps`
    blocks; EVEN: K is a multiple of 256.
    """
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    # rows outside are computed from the last row inside and not stored: no masks in the loop
    x_rows = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * stride_x  # [1, BM]
    column = tl.arange(0, WIDTH)
    acc = tl.zeros((BN, BM), ACC)
    segment = part * steps * 256 // GROUP
    for kb in range(part * steps, tl.minimum(part * steps + steps, blocks)):
        left, right = load_nibbles(w_ptr, n, kb, blocks, tiles_n, BITS)
        for i in tl.static_range(256 // WIDTH):
            k = kb * 256 + i * WIDTH + column
            if SPAN > 0:
                segment = tl.minimum(kb * 256 + i * WIDTH // SPAN * SPAN, K - 1) // GROUP
            if EVEN:
                x = tl.load(x_rows + k[:, None]).to(DOT)  # [WIDTH, BM]
            else:
                x = tl.load(x_rows + k[:, None], mask=k[:, None] < K, other=0.0).to(DOT)
            w = weights_of(left, right, i * WIDTH, t_ptr, n, segment, rows, WIDTH, BITS, TYPE, ASM).to(DOT)
            if not EVEN:
                w = tl.where(k[None, :] < K, w, 0.0)  # columns of padding have code 0, and entry 0 may be infinite
            acc = tl.dot(w, x, acc, input_precision=PRECISION, out_dtype=ACC)
    if u_ptr is not None:
        acc = add_low_rank(acc, u_ptr, b_ptr, m, n, M, N, R, part, DOT, PRECISION)
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    store_sum(acc, y_ptr, part_ptr, count_ptr, at, (m[None, :] < M) & (n[:, None] < N), M * N, SPLIT)
