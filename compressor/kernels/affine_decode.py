"""Pieces that the affine kernels share: packed words of tile64x256 to numbers, in registers and in natural order of k.

A masked shift of a word leaves two neighbouring codes in the halves of 32 bits. Setting the exponent bits of both halves turns them into two
16-bit floats, a constant plus the code, with no conversion instruction; subtracting the constant is exact. Planes are joined and permuted so that
one dot sees up to 256 columns in order; the compiler moves no data for that.

Limits: a slice of a block starts at a multiple of 64 codes; integer zeros lie in 0 .. 64, as bf16 counts by ones only from 128. Triton's
interpreter computes garbage in bf16, so the callers pass the type of the dot operands (DOT) apart from the type of the memory; there it is fp32
(fp64). Source: Kim et al. 2022, "Who says elephants can't run", section 3.1, for the exponent trick; the planar order is ours (layout.py).
"""

# mypy: ignore-errors
# ruff: noqa: SIM300  (TYPE is no constant but a parameter)
import triton
import triton.language as tl


@triton.jit
def load_words(w_ptr, n, kb, blocks, tiles_n, BITS: tl.constexpr):
    """words of block kb of rows n: (int32 [R, 32 | 16], for 3 bits the high words repeated to [R, 16], else the same again)."""
    tile = tl.minimum(n // 64, tiles_n - 1).to(tl.int64) * blocks + kb
    at = tile * (64 * 8 * BITS) + (n % 64) * (8 * BITS)
    if BITS == 4:
        low = tl.load(w_ptr + at[:, None] + tl.arange(0, 32)[None, :])
        high = low
    else:
        j = tl.arange(0, 16)
        low = tl.load(w_ptr + at[:, None] + j[None, :])
        if BITS == 3:
            high = tl.load(w_ptr + at[:, None] + (16 + j % 8)[None, :])
        else:
            high = low
    return low, high


@triton.jit
def plane(low, high, shift, INDEX: tl.constexpr, BITS: tl.constexpr):
    """Pairs of codes (in the two halves of an int32) of plane INDEX, counted from the plane at bit `shift`."""
    if BITS == 4:
        pairs = (low >> (shift + 4 * INDEX)) & 0x000F000F
    elif BITS == 2:
        pairs = (low >> (shift + 2 * INDEX)) & 0x00030003
    else:
        c = (tl.arange(0, 16) // 8)[None, :]
        nibbles = ((low >> (shift + 2 * (INDEX % 2))) & 0x33333333) | (((high >> (2 * c + shift + INDEX % 2)) & 0x11111111) << 2)
        pairs = (nibbles >> (4 * (INDEX // 2))) & 0x000F000F
    return pairs


@triton.jit
def beside(a, b):
    """[R, C], [R, C] -> [R, 2C]: a's columns, then b's."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def two_planes(low, high, shift, INDEX: tl.constexpr, BITS: tl.constexpr):
    return beside(plane(low, high, shift, INDEX, BITS), plane(low, high, shift, INDEX + 1, BITS))


@triton.jit
def four_planes(low, high, shift, INDEX: tl.constexpr, BITS: tl.constexpr):
    return beside(two_planes(low, high, shift, INDEX, BITS), two_planes(low, high, shift, INDEX + 2, BITS))


@triton.jit
def pairs_of(low, high, start, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Codes start .. start+WIDTH-1 of each row segment, in order, two in an int32 [R, WIDTH/2]; WIDTH 64, 128 or 256."""
    shift = start // 16
    PLANES: tl.constexpr = WIDTH // 64 if BITS == 4 else WIDTH // 32
    if PLANES == 1:
        pairs = plane(low, high, shift, 0, BITS)
    elif PLANES == 2:
        pairs = two_planes(low, high, shift, 0, BITS)
    elif PLANES == 4:
        pairs = four_planes(low, high, shift, 0, BITS)
    else:
        pairs = beside(four_planes(low, high, shift, 0, BITS), four_planes(low, high, shift, 4, BITS))
    return pairs


@triton.jit
def load_groups(ptr, n, first, N, G, COUNT: tl.constexpr):
    """ptr[n, first .. first+COUNT-1] of an array [N, G]: [R, COUNT], 0 outside."""
    g = first + tl.arange(0, COUNT)
    return tl.load(ptr + n.to(tl.int64)[:, None] * G + g[None, :], mask=(n[:, None] < N) & (g[None, :] < G), other=0)


@triton.jit
def steps_of(
    low, high, start, z_ptr, n, first, N, G, WIDTH: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr, DOT: tl.constexpr
):
    """code - zero of columns start .. start+WIDTH-1, [R, WIDTH]; the COUNT groups there begin with group `first`.

    Exactly, as DOT, with integer zeros: bits(192 + q) = 0x4340 + q in bf16 and bits(1536 + q) = 0x6600 + q in fp16 for small q of either sign, so
    zeros are subtracted from both halves by one integer subtraction, and the constant by one 16-bit float subtraction. With float zeros in fp32
    (fp64).
    """
    REAL: tl.constexpr = z_ptr is not None and z_ptr.dtype.element_ty.is_floating()
    BASE: tl.constexpr = 0x43404340 if TYPE == tl.bfloat16 else 0x66006600 if TYPE == tl.float16 else 0x01000100
    LESS: tl.constexpr = 192 if TYPE == tl.bfloat16 else 1536 if TYPE == tl.float16 else 256
    pairs = pairs_of(low, high, start, WIDTH, BITS)
    if z_ptr is None:
        pairs = pairs | BASE
        middle = tl.full((1, 1), LESS + (1 << (BITS - 1)), DOT)
    elif REAL:
        pairs = pairs | BASE
        middle = tl.full((1, 1), LESS, DOT)
    else:
        base = BASE - load_groups(z_ptr, n, first, N, G, COUNT).to(tl.int32) * 0x00010001
        grouped = tl.reshape(pairs, (pairs.shape[0], COUNT, WIDTH // 2 // COUNT)) + base[:, :, None]
        pairs = tl.reshape(grouped, (pairs.shape[0], WIDTH // 2))
        middle = tl.full((1, 1), LESS, DOT)
    if TYPE == tl.bfloat16 or TYPE == tl.float16:
        even, odd = pairs.to(tl.int16).to(TYPE, bitcast=True), (pairs >> 16).to(tl.int16).to(TYPE, bitcast=True)
    else:
        even, odd = (pairs & 0xFFFF).to(TYPE), (pairs >> 16).to(TYPE)
    codes = tl.reshape(tl.join(even, odd), (pairs.shape[0], WIDTH)).to(DOT) - middle
    if REAL:
        WIDE: tl.constexpr = tl.float64 if DOT == tl.float64 else tl.float32
        zeros = load_groups(z_ptr, n, first, N, G, COUNT).to(WIDE)[:, :, None]
        codes = tl.reshape(tl.reshape(codes.to(WIDE), (codes.shape[0], COUNT, WIDTH // COUNT)) - zeros, (codes.shape[0], WIDTH))
    return codes


@triton.jit
def weights_of(
    low, high, start, s_ptr, z_ptr, n, first, N, G,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """scale * (code - zero) of columns start .. start+WIDTH-1, DOT [R, WIDTH]: the product is rounded once, as in a dense weight of that type."""
    steps = steps_of(low, high, start, z_ptr, n, first, N, G, WIDTH, COUNT, BITS, TYPE, DOT)
    steps = tl.reshape(steps, (steps.shape[0], COUNT, WIDTH // COUNT))
    scale = load_groups(s_ptr, n, first, N, G, COUNT)[:, :, None]
    if DOT == tl.float64 or (scale.dtype == DOT and steps.dtype == DOT):
        w = steps * scale.to(DOT)
    else:
        w = (steps.to(tl.float32) * scale.to(tl.float32)).to(DOT)
    return tl.reshape(w, (steps.shape[0], WIDTH))
