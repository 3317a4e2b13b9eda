"""The gradient of the scales without a dense gradient of W: the tile dy^T x stays in registers and is reduced with the codes before any store.

A program owns a tile of dy^T x (64 x 128), loops over the rows of x, then multiplies by code - zero and sums over each group. Only
[n, k/group] numbers are stored, in fp32; where a group is longer than the tile its partial sums are stored side by side and summed in order by the
host. Price: the multiplications of a dense weight gradient, without its memory. Limits: the accumulator meets the codes in another register
layout, one exchange through shared memory a program. Source: ours; the formula is PEQA's (Kim et al. 2023, eq. 2).
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from compressor.kernels.affine_decode import load_words, steps_of


@triton.jit(do_not_specialize=["M"])
def grad_scale_kernel(
    x_ptr, dy_ptr, w_ptr, z_ptr, out_ptr,
    M, N, K, G, stride_x, stride_dy, tiles_n, blocks, columns,
    GROUP: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[n, c] = sum over the columns k of group (or part of a group) c, over m: dy[m, n] x[m, k] (code[n, k] - zero[n, g(k)])

    x [M, K], dy [M, N]; words [tiles_n, blocks, 64, 8 BITS]; z [N, G] or None for the midpoint; out [N, columns].
    A program takes WIDTH columns, which give COUNT sums.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * WIDTH
    k = first + tl.arange(0, WIDTH)
    acc = tl.zeros((BN, WIDTH), ACC)
    for start in range(0, M, BM):
        m = (start + tl.arange(0, BM)).to(tl.int64)
        x = tl.load(x_ptr + m[:, None] * stride_x + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0).to(DOT)
        dy = tl.load(dy_ptr + m[:, None] * stride_dy + n[None, :], mask=(m[:, None] < M) & (n[None, :] < N), other=0.0).to(DOT)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION, out_dtype=ACC)
    low, high = load_words(w_ptr, n, first // 256, blocks, tiles_n, BITS)
    q = steps_of(low, high, first % 256, z_ptr, n, first // GROUP, N, G, WIDTH, COUNT, BITS, ACC, ACC)
    sums = tl.sum(tl.reshape(acc * q, (BN, COUNT, WIDTH // COUNT)), axis=2)  # [BN, COUNT]
    c = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    tl.store(out_ptr + n.to(tl.int64)[:, None] * columns + c[None, :], sums, mask=(n[:, None] < N) & (c[None, :] < columns))
