"""Tables as the byte permutes want them: the low and the high bytes of four entries in a word each, row by row.

A table of 16-bit values takes as many bytes as before; 32-bit values count as two tables, of their low and high halves. Price: one pass over the
tables for each call, a small kernel; callers whose tables do not change may keep the result (nothing in the package does
yet). Source: ours.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def table_prepare_kernel(t_ptr, out_ptr, N, S, rows, BITS: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """out[s, half, byte, e, n] = bytes 2 half + byte of table[n, s, 4e .. 4e+3] as TYPE, the first lowest; t [N, S, 2**BITS], out [.., rows]"""
    WORDS: tl.constexpr = (1 << BITS) // 4
    HALVES: tl.constexpr = TYPE.primitive_bitwidth // 16
    INT: tl.constexpr = tl.int16 if HALVES == 1 else tl.int32 if HALVES == 2 else tl.int64
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None, None]
    segment = tl.program_id(1)
    word = tl.arange(0, WORDS)[None, :, None]
    i = tl.arange(0, 4)[None, None, :]
    at = (n.to(tl.int64) * S + segment) * (4 * WORDS) + 4 * word + i
    bits = tl.load(t_ptr + at, mask=n < N, other=0.0).to(TYPE).to(INT, bitcast=True)  # [BLOCK, WORDS, 4]
    for half in tl.static_range(2 * HALVES):
        value = tl.sum(((bits >> (8 * half)) & 255).to(tl.int32) << (8 * i), axis=2)  # [BLOCK, WORDS]
        row = (segment.to(tl.int64) * (2 * HALVES) + half) * WORDS + tl.arange(0, WORDS)[None, :]
        n_out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
        tl.store(out_ptr + row * rows + n_out, value, mask=n_out < rows)
