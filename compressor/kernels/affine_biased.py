"""Packed words to 16-bit numbers 2**bits + code, for the forward kernel with few rows of x, where decoding is the limit.

A code shifted to the top of the mantissa, with a fixed exponent, *is* the float 2**bits + code: one shift and one AND-OR give two weights. Nothing is
subtracted here; the constant leaves the result with the zeros, once for each group (affine_forward.py). At the top of the mantissa the constant is
16, 8 or 4, at its bottom it would be 128 (bf16) or 1024 (fp16), and what is added and taken away again costs accuracy: in fp32 sums 6e-7 against
1e-5 and 1e-4 at 2 bits, 3e-6 against 7e-5 and 6e-4 where x has a mean of one deviation (measured on a CPU).

The mask comes from memory (`mask`): a constant is moved to a register again before each use, 49 instructions of 351 in the loop (4 bits, sm_90, ptxas
13.4). It must be loaded as a block, [1, 1]: the compiler moves the step to the registers of the tensor cores above the decoding only if all that the
decoding starts from are loads. At 3 bits the 16 low and 8 high words of a row are loaded as three blocks of 8, which share a layout, so nothing moves
there either.

Limits: inputs of 32 bits and more have no such trick and take the plain code, constant 0. Source: Kim et al. 2022, "Who says elephants can't run",
section 3.1, for the exponent trick.
"""

# mypy: ignore-errors
# ruff: noqa: SIM300  (TYPE is no constant but a parameter)
import torch
import triton
import triton.language as tl

from compressor.kernels.affine_decode import beside


def mask(dtype: torch.dtype, bits: int) -> int:
    """Where the two codes stand in the two 16-bit floats; for wider types where they stand in two halves."""
    at = {torch.bfloat16: 7 - bits, torch.float16: 10 - bits}.get(dtype, 0)
    return ((1 << bits) - 1 << at) * 0x10001


@triton.jit
def load_segment(w_rows, BITS: tl.constexpr):
    """The words of one block, w_rows [R, 1]: ([R, 32] or [R, 16], the same, the same), at 3 bits ([R, 8] low, [R, 8] low, [R, 8] high)."""
    if BITS == 3:
        j = tl.arange(0, 8)[None, :]
        first = tl.load(w_rows + j, eviction_policy="evict_first")
        second = tl.load(w_rows + 8 + j, eviction_policy="evict_first")
        third = tl.load(w_rows + 16 + j, eviction_policy="evict_first")
    else:
        first = tl.load(w_rows + tl.arange(0, 8 * BITS)[None, :], eviction_policy="evict_first")
        second = first
        third = first
    return first, second, third


@triton.jit
def moved(w, BY: tl.constexpr):
    """w shifted right by BY bits, left if negative."""
    return w << -BY if BY < 0 else w >> BY


@triton.jit
def exponent(w, mask, INDEX: tl.constexpr, SLOT: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    """The codes in slot INDEX (SLOT bits each) of both halves of w as two TYPE numbers 2**BITS + code in an int32; plain codes for wide types."""
    if TYPE == tl.bfloat16:
        pairs = (moved(w, SLOT * INDEX - (7 - BITS)) & mask) | (((127 + BITS) << 7) * 0x10001)
    elif TYPE == tl.float16:
        pairs = (moved(w, SLOT * INDEX - (10 - BITS)) & mask) | (((15 + BITS) << 10) * 0x10001)
    else:
        pairs = (w >> (SLOT * INDEX)) & mask
    return pairs


@triton.jit
def one_plane(a, b, c, mask, INDEX: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    """Plane INDEX of a block in order: [R, 32] at 4 bits, [R, 16] at 3 and 2."""
    if BITS == 3:  # the high bit joins the two low ones in nibbles; the fourth bit of a nibble is not clean
        H: tl.constexpr = INDEX % 2
        left = (moved(a, 2 * H) & 0x33333333) | (moved(c, H - 2) & 0x44444444)
        right = (moved(b, 2 * H) & 0x33333333) | (moved(c, H) & 0x44444444)
        pairs = beside(exponent(left, mask, INDEX // 2, 4, 3, TYPE), exponent(right, mask, INDEX // 2, 4, 3, TYPE))
    else:
        pairs = exponent(a, mask, INDEX, BITS, BITS, TYPE)
    return pairs


@triton.jit
def two_planes(a, b, c, mask, INDEX: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    return beside(one_plane(a, b, c, mask, INDEX, BITS, TYPE), one_plane(a, b, c, mask, INDEX + 1, BITS, TYPE))


@triton.jit
def four_planes(a, b, c, mask, INDEX: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    return beside(two_planes(a, b, c, mask, INDEX, BITS, TYPE), two_planes(a, b, c, mask, INDEX + 2, BITS, TYPE))


@triton.jit
def biased(a, b, c, mask, START: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr, DOT: tl.constexpr):
    """bias + code of columns START .. START+WIDTH-1 of a block, DOT [R, WIDTH]; bias 2**BITS for 16-bit types, else 0; WIDTH 64, 128 or 256."""
    SIZE: tl.constexpr = 64 if BITS == 4 else 32  # of a plane
    FIRST: tl.constexpr = START // SIZE
    if WIDTH == SIZE:
        pairs = one_plane(a, b, c, mask, FIRST, BITS, TYPE)
    elif WIDTH == 2 * SIZE:
        pairs = two_planes(a, b, c, mask, FIRST, BITS, TYPE)
    elif WIDTH == 4 * SIZE:
        pairs = four_planes(a, b, c, mask, FIRST, BITS, TYPE)
    else:
        pairs = beside(four_planes(a, b, c, mask, 0, BITS, TYPE), four_planes(a, b, c, mask, 4, BITS, TYPE))
    if TYPE == tl.bfloat16 or TYPE == tl.float16:
        even, odd = pairs.to(tl.int16).to(TYPE, bitcast=True), (pairs >> 16).to(tl.int16).to(TYPE, bitcast=True)
    else:
        even, odd = (pairs & 0xFFFF).to(TYPE), (pairs >> 16).to(TYPE)
    return tl.reshape(tl.join(even, odd), (pairs.shape[0], WIDTH)).to(DOT)
