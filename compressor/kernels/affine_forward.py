"""y = x W^T on packed weights: weights are decoded in registers and stand left in the dot, so they never pass through shared memory.

Two kernels. For few rows of x (`few_kernel`) decoding is the limit: each group's dot is taken on bias + code (affine_biased.py) and scaled in fp32,
and bias and zeros leave afterwards, 16 groups at once: acc -= (s (bias + z)) X^T, X the fp32 sums of x over each group. For many rows (`many_kernel`)
the tensor cores are the limit: each weight is multiplied by its scale, rounding it as the dense 16-bit weight is rounded. That is also the only way
for groups of 32.

Price: with few rows, the sums of x (one small kernel; a caller whose layers read the same x may take them once and hand them in, nothing in the
package does yet). With few programs the reduction is cut in parts, see finish.py. Numerics: with few rows weights are exact and never rounded; bias
and zeros raise the error of fp32 sums from 1e-7 to 6e-7, to 4e-6 where x has a mean of one deviation (measured on a CPU, 16 x 256 x 4096, groups of
128).

Limits: with few rows an infinite x makes NaN where a dense product may give infinity, as bias times x is added and taken away. Above a few hundred
rows a dense panel with cuBLAS should be faster (panels.py; not timed yet). Source: ours; the swapped operands follow Machete (vLLM), the group
accumulators Marlin (Frantar et al. 2024), the sums of x llama.cpp.
"""

# mypy: ignore-errors
# ruff: noqa: SIM300  (TYPE is no constant but a parameter)
import triton
import triton.language as tl

from compressor.kernels.affine_biased import biased, load_segment
from compressor.kernels.affine_decode import load_words, weights_of
from compressor.kernels.finish import add_low_rank, store_sum


@triton.jit
def load_excess(s_ptr, z_ptr, sums_ptr, n, m, start, last, M, N, G, BIAS: tl.constexpr, BITS: tl.constexpr, ACC: tl.constexpr):
    """For groups start .. start+15 below `last`: -s (bias + z) [BN, 16] and the sums of x [16, BM], whose product a dot on bias + code lacks."""
    g = start + tl.arange(0, 16)
    at, inside = n.to(tl.int64)[:, None] * G + g[None, :], (n[:, None] < N) & (g[None, :] < last)
    less = tl.load(s_ptr + at, mask=inside, other=0.0).to(ACC)
    if z_ptr is None:
        less *= -BIAS - (1 << (BITS - 1))
    else:
        less *= -BIAS - tl.load(z_ptr + at, mask=inside, other=0).to(ACC)
    sums = tl.load(sums_ptr + m.to(tl.int64)[None, :] * G + g[:, None], mask=(m[None, :] < M) & (g[:, None] < last), other=0.0)
    return less, sums.to(ACC)


@triton.jit(do_not_specialize=["M", "steps"])
def few_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, sums_ptr, mask_ptr, u_ptr, b_ptr, y_ptr, part_ptr, count_ptr,
    M, N, K, G, R, stride_x, tiles_n, blocks, steps,
    GROUP: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over g: s[n, g] (sum over k in g: x[m, k] (bias + code[n, k])) - s[n, g] (bias + z[n, g]) X[m, g] (+ sum over r: u[m, r] b[n, r])

    x [M, K], rows stride_x apart; words [tiles_n, blocks, 64, 8 BITS]; s, z [N, G], z integer, float, or None for the midpoint; X fp32 [M, G];
    mask int32 [1]; u [M, R], b [N, R] or None. A dot takes WIDTH columns of one group; a part is `steps` blocks; EVEN: K is a multiple of 256.
    GROUP is 0 for one group a row.
    """
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    BIAS: tl.constexpr = 1 << BITS if TYPE == tl.bfloat16 or TYPE == tl.float16 else 0
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    mask = tl.load(mask_ptr + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :])
    # rows outside are computed from the last row inside and not stored: no masks in the loop
    x_rows = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * stride_x  # [1, BM]
    s_rows = s_ptr + tl.minimum(n, N - 1).to(tl.int64) * G
    words_at = tl.minimum(n // 64, tiles_n - 1).to(tl.int64) * blocks * (64 * 8 * BITS) + (n % 64) * (8 * BITS)
    column = tl.arange(0, WIDTH)
    acc = tl.zeros((BN, BM), ACC)
    for kb in range(part * steps, tl.minimum(part * steps + steps, blocks)):
        a, b, c = load_segment(w_ptr + (words_at + kb * (64 * 8 * BITS))[:, None], BITS)
        for i in tl.static_range(256 // WIDTH):
            k = kb * 256 + i * WIDTH + column
            if EVEN:
                x = tl.load(x_rows + k[:, None]).to(DOT)  # [WIDTH, BM]
            else:
                x = tl.load(x_rows + k[:, None], mask=k[:, None] < K, other=0.0).to(DOT)
            q = biased(a, b, c, mask, i * WIDTH, WIDTH, BITS, TYPE, DOT)
            if GROUP == 0:
                scale = tl.load(s_rows)
            elif GROUP < 256:
                g = kb * (256 // GROUP) + i * WIDTH // GROUP
                scale = tl.load(s_rows + (g if EVEN else tl.minimum(g, G - 1)))  # beyond K x is 0, but the scale must be a number
            else:
                scale = tl.load(s_rows + kb // (GROUP // 256))
            acc += tl.dot(q, x, input_precision=PRECISION, out_dtype=ACC) * scale.to(ACC)[:, None]
    # after the loop: the scales are in the caches by now, and loaded before it their change of layout would hold up the first words
    share = tl.cdiv(G, tl.num_programs(2))
    last = tl.minimum(part * share + share, G)
    for start in range(part * share, last, 16):
        less, sums = load_excess(s_ptr, z_ptr, sums_ptr, n, m, start, last, M, N, G, BIAS, BITS, ACC)
        acc = tl.dot(less, sums, acc, input_precision=PRECISION, out_dtype=ACC)
    if u_ptr is not None:
        acc = add_low_rank(acc, u_ptr, b_ptr, m, n, M, N, R, part, DOT, PRECISION)
    at, inside = m.to(tl.int64)[None, :] * N + n[:, None], (m[None, :] < M) & (n[:, None] < N)
    store_sum(acc, y_ptr, part_ptr, count_ptr, at, inside, M * N, SPLIT)


@triton.jit(do_not_specialize=["M", "steps"])
def many_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, u_ptr, b_ptr, y_ptr, part_ptr, count_ptr,
    M, N, K, G, R, stride_x, tiles_n, blocks, steps,
    GROUP: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over k: x[m, k] round(s[n, g(k)] (code[n, k] - z[n, g(k)])) (+ sum over r: u[m, r] b[n, r])

    Arguments as above. A dot takes WIDTH columns, which hold COUNT groups.
    """
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    x_rows = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * stride_x  # [1, BM]
    column = tl.arange(0, WIDTH)
    acc = tl.zeros((BN, BM), ACC)
    for kb in range(part * steps, tl.minimum(part * steps + steps, blocks)):
        low, high = load_words(w_ptr, n, kb, blocks, tiles_n, BITS)
        for i in tl.static_range(256 // WIDTH):
            k = kb * 256 + i * WIDTH + column
            if EVEN:
                x = tl.load(x_rows + k[:, None]).to(DOT)  # [WIDTH, BM]
            else:
                x = tl.load(x_rows + k[:, None], mask=k[:, None] < K, other=0.0).to(DOT)
            w = weights_of(low, high, i * WIDTH, s_ptr, z_ptr, n, (kb * 256 + i * WIDTH) // GROUP, N, G, WIDTH, COUNT, BITS, TYPE, DOT)
            acc = tl.dot(w, x, acc, input_precision=PRECISION, out_dtype=ACC)
    if u_ptr is not None:
        acc = add_low_rank(acc, u_ptr, b_ptr, m, n, M, N, R, part, DOT, PRECISION)
    at, inside = m.to(tl.int64)[None, :] * N + n[:, None], (m[None, :] < M) & (n[:, None] < N)
    store_sum(acc, y_ptr, part_ptr, count_ptr, at, inside, M * N, SPLIT)


@triton.jit
def sums_kernel(x_ptr, out_ptr, G, stride_x, GROUP: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """out[m, g] = sum over the columns of group g of x[m, k]; a program takes COUNT groups of one row, WIDTH columns of each at a time"""
    m = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    acc = tl.zeros((COUNT, WIDTH), ACC)
    for start in range(0, GROUP, WIDTH):
        inside = start + tl.arange(0, WIDTH)
        k = g[:, None] * GROUP + inside[None, :]
        acc += tl.load(x_ptr + m * stride_x + k, mask=(g[:, None] < G) & (inside[None, :] < GROUP), other=0.0).to(ACC)
    tl.store(out_ptr + m * G + g, tl.sum(acc, axis=1), mask=g < G)
