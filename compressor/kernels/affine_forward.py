"""y = x W^T on packed weights: weights are decoded in registers and stand left in the dot, so they never pass through shared memory.

Two ways to apply the scales. FOLD multiplies each weight, rounding it as the dense 16-bit weight is rounded: the choice for many rows of x, where
the tensor cores are the limit, and the only one for groups of 32. Otherwise each group's dot is taken on code - zero, exact in 16 bits, and the
small accumulator is scaled in fp32: the choice for few rows, where decoding is the limit.

Price: with few programs the reduction is cut in parts, which go through fp32 memory and are summed in order by a second kernel: no atomics, so
results repeat bit for bit. Limits: above a few hundred rows a dense panel with cuBLAS is expected to be faster. Source: ours; the swapped operands
follow Machete (vLLM), the group accumulators Marlin (Frantar et al. 2024).
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from compressor.kernels.affine_decode import load_groups, load_words, steps_of, weights_of


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, y_ptr,
    M, N, K, G, stride_x, tiles_n, blocks, steps,
    GROUP: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[part, m, n] = sum over the part's k of x[m, k] scale[n, g(k)] (code[n, k] - zero[n, g(k)])

    x [M, K], rows stride_x apart; words [tiles_n, blocks, 64, 8 BITS]; s, z [N, G], z None for the midpoint; y [parts, M, N].
    A dot takes WIDTH columns, which hold COUNT groups (one, unless FOLD); a part is `steps` blocks; EVEN: K is a multiple of 256.
    """
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    x_rows = x_ptr + m.to(tl.int64)[None, :] * stride_x  # [1, BM]
    column = tl.arange(0, WIDTH)
    acc = tl.zeros((BN, BM), ACC)
    for kb in range(part * steps, tl.minimum(part * steps + steps, blocks)):
        low, high = load_words(w_ptr, n, kb, blocks, tiles_n, BITS)
        for i in tl.static_range(256 // WIDTH):
            k = kb * 256 + i * WIDTH + column
            first = (kb * 256 + i * WIDTH) // GROUP
            inside = (m[None, :] < M) if EVEN else (m[None, :] < M) & (k[:, None] < K)
            x = tl.load(x_rows + k[:, None], mask=inside, other=0.0).to(DOT)  # [WIDTH, BM]
            if FOLD:
                w = weights_of(low, high, i * WIDTH, s_ptr, z_ptr, n, first, N, G, WIDTH, COUNT, BITS, TYPE, DOT)
                acc = tl.dot(w, x, acc, input_precision=PRECISION, out_dtype=ACC)
            else:
                q = steps_of(low, high, i * WIDTH, z_ptr, n, first, N, G, WIDTH, 1, BITS, TYPE, DOT)
                scale = load_groups(s_ptr, n, first, N, G, 1).to(ACC)  # [BN, 1]
                acc += tl.dot(q, x, input_precision=PRECISION, out_dtype=ACC) * scale
    at = (part.to(tl.int64) * M + m.to(tl.int64))[None, :] * N + n[:, None]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit
def sum_parts_kernel(part_ptr, y_ptr, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = part[0, i] + part[1, i] + ... in this order; part [PARTS, size] fp32, y [size]"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    acc = tl.load(part_ptr + i, mask=inside, other=0.0)
    for p in range(1, PARTS):
        acc += tl.load(part_ptr + p * size + i, mask=inside, other=0.0)
    tl.store(y_ptr + i, acc.to(y_ptr.dtype.element_ty), mask=inside)
