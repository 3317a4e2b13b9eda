"""Pieces that the table kernels share: packed words of tile64x256 (order `prmt`) and byte tables to numbers, in natural order of k.

One byte permute looks up four codes at once: the selector is the low half of a register of codes, the eight bytes it picks from are half a table.
So a table of 16-bit values is kept as words of low bytes and words of high bytes, four entries a word. 2 and 3 bits need one permute for each byte;
4 bits need two, and a third that picks by the top bit. Two more put low and high bytes side by side: two neighbouring weights in a register.
Values of 32 bits are looked up as two tables of 16 bits.

Price: two to three instructions a weight at 4 bits, half of that below; no shuffles, no memory. Limits: a slice starts at a multiple of 64 codes.
NVIDIA has `prmt`, AMD `v_perm_b32`, which wants a byte where `prmt` wants a nibble. ASM says which ("ptx", "gcn"); anything else spells the permute
out in shifts, which is what the interpreter runs. Source: ours; T-MAC (Wei et al. 2024) does the like with `pshufb` on CPUs.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from compressor.kernels.affine_decode import beside


@triton.jit
def load_nibbles(w_ptr, n, kb, blocks, tiles_n, BITS: tl.constexpr):
    """Codes of block kb of rows n, one a nibble: words 0..15 and 16..31, int32 [R, 16] each; nibble 2t + e of word j is code 64t + 2j + e."""
    tile = tl.minimum(n // 64, tiles_n - 1).to(tl.int64) * blocks + kb
    at = (tile * (64 * 8 * BITS) + (n % 64) * (8 * BITS))[:, None]
    if BITS == 4:
        words = tl.reshape(tl.load(w_ptr + at + tl.arange(0, 32)[None, :]), (at.shape[0], 2, 16))
        left, right = tl.split(tl.permute(words, (0, 2, 1)))
    else:
        low = tl.load(w_ptr + at + tl.arange(0, 16)[None, :])
        left, right = low & 0x33333333, (low >> 2) & 0x33333333
        if BITS == 3:
            high = tl.load(w_ptr + at + (16 + tl.arange(0, 8))[None, :])
            high = beside(high, high >> 2)
            left, right = left | ((high << 2) & 0x44444444), right | ((high << 1) & 0x44444444)
    return left, right


@triton.jit
def spread(selector):
    """The four low nibbles, a byte each."""
    low = selector & 0xFFFF
    pairs = (low | (low << 8)) & 0x00FF00FF
    return (pairs | (pairs << 4)) & 0x0F0F0F0F


@triton.jit
def permute(a, b, selector, ASM: tl.constexpr):
    """Byte i is byte (nibble i of the selector) of a and b, a's bytes counted 0..3, b's 4..7. Nibbles must be below 8; the high half is ignored."""
    if ASM == "ptx":
        out = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1)
    elif ASM == "gcn":
        out = tl.inline_asm_elementwise("v_perm_b32 $0, $1, $2, $3", "=v,v,v,v", [b, a, spread(selector)], dtype=tl.int32, is_pure=True, pack=1)
    else:
        i = tl.arange(0, 4)[None, None, :]
        nibbles = ((selector + tl.zeros((1, 1), tl.int32))[:, :, None] >> (4 * i)) & 7
        both = (a.to(tl.int64) & 0xFFFFFFFF) | (b.to(tl.int64) << 32)
        out = tl.sum(((both[:, :, None] >> (8 * nibbles)) & 255).to(tl.int32) << (8 * i), axis=2)
    return out


@triton.jit
def halves_of(a):
    """The left and the right half of [R, C]."""
    return tl.split(tl.permute(tl.reshape(a, (a.shape[0], 2, a.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def four_of(a):
    """The columns of [R, 4], each [R, 1]."""
    left, right = halves_of(a)
    b0, b1 = tl.split(left)
    b2, b3 = tl.split(right)
    return b0[:, None], b1[:, None], b2[:, None], b3[:, None]


@triton.jit
def load_tables(t_ptr, stride, BITS: tl.constexpr):
    """Low and high bytes of one table a row, four an int32: four and four of [R, 1], of which 2**BITS / 4 count."""
    words = tl.load(t_ptr + tl.arange(0, (1 << BITS) // 2)[None, :] * stride)
    if BITS == 4:
        low, high = halves_of(words)
        l0, l1, l2, l3 = four_of(low)
        h0, h1, h2, h3 = four_of(high)
    elif BITS == 3:
        l0, l1, h0, h1 = four_of(words)
        l2, l3, h2, h3 = l0, l1, h0, h1
    else:
        a, b = tl.split(words)
        l0, h0 = a[:, None], b[:, None]
        l1, l2, l3, h1, h2, h3 = l0, l0, l0, h0, h0, h0
    return l0, l1, l2, l3, h0, h1, h2, h3


@triton.jit
def look_up(b0, b1, b2, b3, selector, merge, BITS: tl.constexpr, ASM: tl.constexpr):
    """The bytes of four codes."""
    out = permute(b0, b1, selector, ASM)
    if BITS == 4:
        out = permute(out, permute(b2, b3, selector, ASM), merge, ASM)
    return out


@triton.jit
def quads_of(selector, merge, l0, l1, l2, l3, h0, h1, h2, h3, BITS: tl.constexpr, ASM: tl.constexpr):
    """16-bit values of the four codes in the low half of each selector: codes 0 and 1 in one int32, codes 2 and 3 in another."""
    low = look_up(l0, l1, l2, l3, selector, merge, BITS, ASM)
    high = look_up(h0, h1, h2, h3, selector, merge, BITS, ASM)
    return permute(low, high, 0x5140, ASM), permute(low, high, 0x7362, ASM)


@triton.jit
def pairs_of(left, right, start, t_ptr, stride, WIDTH: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """16-bit values of columns start .. start+WIDTH-1 of each row segment, in order, two an int32: [R, WIDTH/2]; WIDTH 64, 128 or 256.

    64 columns are one byte of each word: bytes of words j and j+16 make a selector. 128 columns are the half of each word, a selector as it is.
    """
    l0, l1, l2, l3, h0, h1, h2, h3 = load_tables(t_ptr, stride, BITS)
    if WIDTH == 64:
        both = permute(left, right, 0x40 + start // 64 * 0x11, ASM)
    else:
        both = beside(left, right) >> (start // 8)
    selector = both & 0x77777777 if BITS == 4 else both
    # byte i of the one half of a 4-bit table, or, if the code's top bit is set, of the other
    merge = ((both >> 1) & 0x44444444) | 0x32103210 if BITS == 4 else both
    first, second = quads_of(selector, merge, l0, l1, l2, l3, h0, h1, h2, h3, BITS, ASM)
    pairs = beside(first, second)
    if WIDTH == 256:
        first, second = quads_of(selector >> 16, merge >> 16, l0, l1, l2, l3, h0, h1, h2, h3, BITS, ASM)
        pairs = beside(pairs, beside(first, second))
    return pairs


@triton.jit
def weights_of(left, right, start, t_ptr, n, segment, rows, WIDTH: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr, ASM: tl.constexpr):
    """Columns start .. start+WIDTH-1 of each row segment, TYPE [R, WIDTH]; all lie in one segment; t_ptr: prepared tables (table_prepare.py)."""
    HALVES: tl.constexpr = TYPE.primitive_bitwidth // 16
    WORDS: tl.constexpr = (1 << BITS) // 2  # words of a table of 16 bits
    at = t_ptr + (segment.to(tl.int64) * (HALVES * WORDS * rows) + n)[:, None]
    pairs = pairs_of(left, right, start, at, rows, WIDTH, BITS, ASM)
    if HALVES == 1:
        even, odd = pairs.to(tl.int16).to(TYPE, bitcast=True), (pairs >> 16).to(tl.int16).to(TYPE, bitcast=True)
    else:
        above = pairs_of(left, right, start, at + WORDS * rows, rows, WIDTH, BITS, ASM)
        even, odd = (pairs & 0xFFFF) | (above << 16), ((pairs >> 16) & 0xFFFF) | (above & -65536)
        if HALVES == 4:  # float64, in the interpreter
            pairs = pairs_of(left, right, start, at + 2 * WORDS * rows, rows, WIDTH, BITS, ASM)
            above = pairs_of(left, right, start, at + 3 * WORDS * rows, rows, WIDTH, BITS, ASM)
            even = (even.to(tl.int64) & 0xFFFFFFFF) | (((pairs & 0xFFFF) | (above << 16)).to(tl.int64) << 32)
            odd = (odd.to(tl.int64) & 0xFFFFFFFF) | ((((pairs >> 16) & 0xFFFF) | (above & -65536)).to(tl.int64) << 32)
        even, odd = even.to(TYPE, bitcast=True), odd.to(TYPE, bitcast=True)
    return tl.reshape(tl.join(even, odd), (pairs.shape[0], WIDTH))
