"""The gradient of the tables without a dense gradient of W: the tile dy^T x stays in registers and is summed by code before any store.

A program owns a tile of dy^T x (64 x 128), loops over the rows of x, then goes over the 2**bits codes: the entries with that code are summed along
each row. Only [n, tiles across, 2**bits] numbers are stored, in fp32; the
host sums the tiles of a segment, in order.

Price: the multiplications of a dense weight gradient, and 2**bits passes over the tile. Sums over sign patterns (Walsh-Hadamard) would need fewer
instructions, but an entry that no code uses must get exactly zero, or Adam moves it. Source: ours; the formula is SketchTune's (Zhang et al. 2025).
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from compressor.kernels.affine_decode import beside
from compressor.kernels.table_decode import halves_of, load_nibbles


@triton.jit
def codes_of(left, right, start, WIDTH: tl.constexpr):
    """Codes start .. start+WIDTH-1 of each row segment, in order: int32 [R, WIDTH]; WIDTH 64 or 128."""
    nibbles = beside(left, right) >> (start // 8)
    codes = tl.reshape(tl.join(nibbles & 15, (nibbles >> 4) & 15), (left.shape[0], 64))
    if WIDTH == 128:
        codes = beside(codes, tl.reshape(tl.join((nibbles >> 8) & 15, (nibbles >> 12) & 15), (left.shape[0], 64)))
    return codes


@triton.jit
def four_sums(code, c0, c1, c2, c3, a0, a1, a2, a3, ASM: tl.constexpr):
    """a0 where c0 == code, plus a1 where c1 == code, and so on: four compares, a select, three predicated additions."""
    if ASM == "ptx":
        out = tl.inline_asm_elementwise(
            """{
            .reg .pred p0, p1, p2, p3;
            setp.eq.s32 p0, $1, $5;
            setp.eq.s32 p1, $2, $5;
            setp.eq.s32 p2, $3, $5;
            setp.eq.s32 p3, $4, $5;
            selp.f32 $0, $6, 0f00000000, p0;
            @p1 add.f32 $0, $0, $7;
            @p2 add.f32 $0, $0, $8;
            @p3 add.f32 $0, $0, $9;
            }""",
            "=&f,r,r,r,r,r,f,f,f,f", [c0, c1, c2, c3, code, a0, a1, a2, a3], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        out = tl.where(c0 == code, a0, 0.0) + tl.where(c1 == code, a1, 0.0)
        out += tl.where(c2 == code, a2, 0.0) + tl.where(c3 == code, a3, 0.0)
    return out


@triton.jit(do_not_specialize=["M"])
def grad_table_kernel(
    x_ptr, dy_ptr, w_ptr, out_ptr,
    M, N, K, stride_x, stride_dy, tiles_n, blocks, columns,
    BITS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out[n, t, c] = sum over the columns k of tile t with code[n, k] = c, over m: dy[m, n] x[m, k]

    x [M, K], dy [M, N]; words [tiles_n, blocks, 64, 8 BITS]; out [N, columns, 2**BITS]. A tile is WIDTH columns, 64 or 128. EVEN: M
    is a multiple of BM.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    tile = tl.program_id(1)
    k = tile * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros((BN, WIDTH), ACC)
    m = tl.arange(0, BM)
    x_at = x_ptr + m.to(tl.int64)[:, None] * stride_x + k[None, :]
    dy_at = dy_ptr + m.to(tl.int64)[:, None] * stride_dy + n[None, :]
    for start in range(0, M, BM):
        inside = m[:, None] < (BM if EVEN else M - start)
        x = tl.load(x_at, mask=inside & (k[None, :] < K), other=0.0).to(DOT)
        dy = tl.load(dy_at, mask=inside & (n[None, :] < N), other=0.0).to(DOT)
        x_at += BM * stride_x
        dy_at += BM * stride_dy
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION, out_dtype=ACC)
    left, right = load_nibbles(w_ptr, n, tl.minimum(tile * WIDTH // 256, blocks - 1), blocks, tiles_n, BITS)
    codes = codes_of(left, right, tile * WIDTH % 256, WIDTH)
    at = out_ptr + (n.to(tl.int64) * columns + tile) * (1 << BITS)
    if ASM == "ptx":
        # does nothing, but its operands must share a register layout: codes change theirs here, once, and not in the loop
        acc, codes = tl.inline_asm_elementwise("", "=f,=r,0,1", [acc, codes], dtype=(tl.float32, tl.int32), is_pure=False, pack=1)
    a01, a23 = halves_of(acc)
    c01, c23 = halves_of(codes)
    a0, a1 = halves_of(a01)
    a2, a3 = halves_of(a23)
    c0, c1 = halves_of(c01)
    c2, c3 = halves_of(c23)
    for code in range(1 << BITS):
        tl.store(at + code, tl.sum(four_sums(code, c0, c1, c2, c3, a0, a1, a2, a3, ASM), axis=1), mask=n < N)
