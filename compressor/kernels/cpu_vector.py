"""One row segment of 256 packed codes on a CPU: LLVM instructions for vectors of 16 floats, emitted through numba.

Each function below is a numba intrinsic: called with addresses (bytes, as integers) and literal parameters, it writes straight-line vector code
for one block. The order of codes (layout.py) makes this short: the codes of 16 words at one bit position are 16 even or 16 odd columns of a slice
of 32, so a shift gives 16 indices, and one permute instruction turns indices into weights: the 16 entries of a table fill one AVX-512 register.
An affine weight takes the same way where AVX-512 is there, its "table" scale * (code - zero) being made once a group; elsewhere codes are converted
and multiplied. Three instructions for 16 weights: shift, permute, multiply-add.

Parameters: BITS 2, 3, 4; KIND of values (CONVERT, PERMUTE: affine; TABLE); SPAN, slices of 32 columns that share values (1, 2, 4, 8).
Limits: plain vector code is right on any CPU that LLVM knows; it is fast with AVX2, and faster with AVX-512. Source: ours; looking codes up in a
register goes back to T-MAC (Wei et al. 2024) and SqueezeLLM's kernels.
"""

# mypy: ignore-errors
from collections.abc import Iterator
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

LANES = 16
AHEAD = 8192  # bytes: how far ahead of the packed words in use the cache is asked for more; measured best of 0 to 16384 on Zen 5
CONVERT, PERMUTE, TABLE = 0, 1, 2
I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
INTS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)
HALF_INTS, HALF_FLOATS = ir.VectorType(I32, 8), ir.VectorType(F32, 8)


def features() -> set[str]:
    """Instruction sets that numba compiles for: those of this CPU, unless its settings say otherwise."""
    if numba.config.CPU_FEATURES is not None:
        text = numba.config.CPU_FEATURES
    elif numba.config.CPU_NAME not in (None, "host"):
        text = ""
    else:
        text = get_host_cpu_features()
    return {name[1:] for name in text.split(",") if name.startswith("+")}


class Emit:
    """An IR builder with the few vector operations that the blocks need."""

    def __init__(self, builder: Any):
        self.b = builder
        self.features = features()

    def at(self, address: Any, offset: int, ty: Any) -> Any:
        """Pointer to `ty` at address + offset bytes."""
        return self.b.inttoptr(self.b.add(address, ir.Constant(I64, offset)), ty.as_pointer())

    def load(self, address: Any, offset: int, ty: Any) -> Any:
        return self.b.load(self.at(address, offset, ty), align=4)

    def store(self, value: Any, address: Any, offset: int) -> None:
        self.b.store(value, self.at(address, offset, value.type), align=4)

    def ints(self, values: Any) -> Any:
        """A constant vector."""
        values = [values] * LANES if isinstance(values, int) else list(values)
        return ir.Constant(ir.VectorType(I32, len(values)), values)

    def splat(self, scalar: Any) -> Any:
        ty = ir.VectorType(scalar.type, LANES)
        one = self.b.insert_element(ir.Constant(ty, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, one, self.ints(0))

    def shift(self, value: Any, count: int) -> Any:
        return self.b.lshr(value, self.ints(count)) if count else value

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.call("llvm.fmuladd.v16f32", FLOATS, a, b, c)

    def call(self, name: str, result: Any, *args: Any) -> Any:
        function = get_or_insert_function(self.b.module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.b.call(function, args)

    def prefetch(self, address: Any, offset: int) -> None:
        """Ask for the cache line at address + offset, which may lie outside of any memory of ours."""
        pointer = self.b.inttoptr(self.b.add(address, ir.Constant(I64, offset)), ir.IntType(8).as_pointer())
        function = get_or_insert_function(self.b.module, ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32]), "llvm.prefetch.p0")
        self.b.call(function, [pointer, ir.Constant(I32, 0), ir.Constant(I32, 3), ir.Constant(I32, 1)])

    def number(self, codes: Any, bits: int) -> Any:
        """Indices (with other bits above) -> their codes as floats."""
        return self.b.sitofp(self.b.and_(codes, self.ints((1 << bits) - 1)), FLOATS)

    def total(self, start: Any, value: Any) -> Any:
        """start + the sum of the lanes."""
        name = "llvm.vector.reduce.fadd.v16f32"
        function = get_or_insert_function(self.b.module, ir.FunctionType(F32, [F32, FLOATS]), name)
        return self.b.call(function, [start, value], fastmath=("reassoc",))

    def lookup(self, table: Any, index: Any, bits: int) -> Any:
        """table[index & 15]; entries of tables of fewer than 16 are repeated."""
        if "avx512f" in self.features:
            return self.call("llvm.x86.avx512.permvar.sf.512", FLOATS, table, index)
        if "avx2" not in self.features:
            return self._choose(table, index, bits)
        low, high = self._halves(table)
        parts = []
        for half in self._halves(index):
            part = self.call("llvm.x86.avx2.permps", HALF_FLOATS, low, half)
            if bits == 4:
                upper = self.b.icmp_signed("<", self.b.shl(half, self.ints([28] * 8)), self.ints([0] * 8))
                part = self.b.select(upper, self.call("llvm.x86.avx2.permps", HALF_FLOATS, high, half), part)
            parts.append(part)
        return self.b.shuffle_vector(*parts, self.ints(range(LANES)))

    def _halves(self, value: Any) -> list[Any]:
        return [self.b.shuffle_vector(value, value, self.ints(range(start, start + 8))) for start in (0, 8)]

    def _choose(self, table: Any, index: Any, bits: int) -> Any:
        """lookup on other CPUs: a binary tree of selections."""
        level = [self.splat(self.b.extract_element(table, ir.Constant(I32, i))) for i in range(1 << bits)]
        for bit in range(bits):
            odd = self.b.icmp_signed("!=", self.b.and_(index, self.ints(1 << bit)), self.ints(0))
            level = [self.b.select(odd, level[i + 1], level[i]) for i in range(0, len(level), 2)]
        return level[0]


def indices(e: Emit, words: Any, bits: int, kind: int) -> list[tuple[Any, Any]]:
    """For each of 8 slices of 32 columns the indices of even and of odd columns, with bits of other codes above the lowest `bits`."""
    low = [e.load(words, 64 * i, INTS) for i in range(2 if bits == 4 else 1)]
    if bits == 3:
        high = e.load(words, 64, HALF_INTS)
        high = e.b.shl(e.b.shuffle_vector(high, high, e.ints([i % 8 for i in range(LANES)])), e.ints([2] * 8 + [0] * 8))
        mask = e.ints(0x33333333)
        nibbles = [e.b.or_(e.b.and_(e.shift(low[0], 2 * o), mask), e.b.and_(e.shift(high, o), e.b.not_(mask))) for o in range(2)]
    out = []
    for s in range(8):
        p, o = divmod(s, 2)
        pair = []
        for h in range(2):
            nibble = 2 * (p % 2) + h + 4 * (p // 2) if kind == TABLE else p + 4 * h
            word = low[o] if bits == 4 else low[0] if bits == 2 else nibbles[o]
            pair.append(e.shift(word, 4 * nibble + (2 * o if bits == 2 else 0)))
        out.append((pair[0], pair[1]))
    return out


def weights(e: Emit, words: Any, values: Any, zeros: Any, index: Any, bits: int, kind: int, span: int) -> Iterator[tuple[Any, Any]]:
    """For each slice of 32 columns the weights of even and of odd columns.

    values and zeros: the row's scales and zeros (CONVERT: minus scale * zero), or its tables of 16, in float32; index: int32 [8/span], the
    positions of this block's values among them.
    """
    quads = indices(e, words, bits, kind)
    repeated = ir.Constant(FLOATS, [float(i % (1 << bits)) for i in range(LANES)])
    for s, pair in enumerate(quads):
        if s % span == 0:
            at = e.b.sext(e.load(index, 4 * (s // span), I32), I64)
            offset = e.b.mul(at, ir.Constant(I64, 64 if kind == TABLE else 4))
            place = e.b.add(values, offset)
            if kind == TABLE:
                table = e.load(place, 0, FLOATS)
            else:
                scale, zero = e.splat(e.load(place, 0, F32)), e.splat(e.load(e.b.add(zeros, offset), 0, F32))
                table = e.b.fmul(scale, e.b.fsub(repeated, zero)) if kind == PERMUTE else None
        if kind == CONVERT:
            yield tuple(e.fma(e.number(v, bits), scale, zero) for v in pair)
        else:
            yield tuple(e.lookup(table, v, bits) for v in pair)


def _literals(*args: Any) -> None:
    if not all(isinstance(a, types.Literal) for a in args):
        raise numba.errors.RequireLiteralValue("the parameters of a block are literals")


@intrinsic(prefer_literal=True)
def dot(context, words, values, zeros, index, x, stride, sums, BITS, KIND, SPAN, ROWS):
    """sums[m] += weights * x[m], lane by lane, for ROWS rows m of x: evens then odds of each slice, float32, rows `stride` bytes apart."""
    _literals(BITS, KIND, SPAN, ROWS)

    def generate(context, builder, signature, args):
        bits, kind, span, rows = (a.literal_value for a in signature.args[7:])
        words, values, zeros, index, x, stride, sums = args[:7]
        e = Emit(builder)
        for line in range(0, 32 * bits, 64):
            e.prefetch(words, AHEAD + line)
        at = [x]
        for _ in range(rows - 1):
            at.append(builder.add(at[-1], stride))
        acc = [[e.load(sums, 64 * m, FLOATS), None] for m in range(rows)]
        for s, pair in enumerate(weights(e, words, values, zeros, index, bits, kind, span)):
            for m in range(rows):
                for h in range(2):
                    part, weight = e.load(at[m], 128 * s + 64 * h, FLOATS), pair[h]
                    acc[m][h] = builder.fmul(weight, part) if acc[m][h] is None else e.fma(weight, part, acc[m][h])
        for m in range(rows):
            e.store(builder.fadd(*acc[m]), sums, 64 * m)

    return types.void(*[types.int64] * 7, BITS, KIND, SPAN, ROWS), generate


@intrinsic(prefer_literal=True)
def decode(context, words, values, zeros, index, out, BITS, KIND, SPAN):
    """out[0..255] = weights in the order of columns, float32."""
    _literals(BITS, KIND, SPAN)

    def generate(context, builder, signature, args):
        words, values, zeros, index, out = args[:5]
        e = Emit(builder)
        mix = ir.Constant(ir.VectorType(I32, 2 * LANES), [i // 2 + LANES * (i % 2) for i in range(2 * LANES)])
        for s, pair in enumerate(weights(e, words, values, zeros, index, *(a.literal_value for a in signature.args[5:]))):
            e.store(builder.shuffle_vector(*pair, mix), out, 128 * s)

    return types.void(*[types.int64] * 5, BITS, KIND, SPAN), generate


def _columns(e: Emit, address: Any, s: int) -> tuple[Any, Any]:
    """Even and odd columns of slice s of a row segment of floats."""
    both = [e.load(address, 128 * s + 64 * i, FLOATS) for i in range(2)]
    return tuple(e.b.shuffle_vector(*both, e.ints(range(h, 2 * LANES, 2))) for h in range(2))


@intrinsic(prefer_literal=True)
def sum_steps(context, words, zeros, index, grad, out, BITS, SPAN):
    """out[index[i]] += sum over the columns of group i of grad * (code - zero)."""
    _literals(BITS, SPAN)

    def generate(context, builder, signature, args):
        bits, span = (a.literal_value for a in signature.args[5:])
        words, zeros, index, grad, out = args[:5]
        e = Emit(builder)
        quads = indices(e, words, bits, CONVERT)
        for first in range(0, 8, span):
            place = builder.mul(builder.sext(e.load(index, 4 * (first // span), I32), I64), ir.Constant(I64, 4))
            zero = e.splat(e.load(builder.add(zeros, place), 0, F32))
            acc = e.splat(ir.Constant(F32, 0.0))
            for s in range(first, first + span):
                for v, g in zip(quads[s], _columns(e, grad, s), strict=True):
                    acc = e.fma(builder.fsub(e.number(v, bits), zero), g, acc)
            start = e.load(builder.add(out, place), 0, F32)
            e.store(e.total(start, acc), builder.add(out, place), 0)

    return types.void(*[types.int64] * 5, BITS, SPAN), generate


@intrinsic(prefer_literal=True)
def sum_codes(context, words, index, grad, out, BITS, SPAN):
    """out[index[i], c, lane] += grad where the code is c, lane by lane: out float32 [segments, 2**BITS, 16]."""
    _literals(BITS, SPAN)

    def generate(context, builder, signature, args):
        bits, span = (a.literal_value for a in signature.args[4:])
        words, index, grad, out = args[:4]
        e = Emit(builder)
        count = 1 << bits
        quads = indices(e, words, bits, TABLE)
        nothing = e.splat(ir.Constant(F32, 0.0))
        for first in range(0, 8, span):
            at = builder.mul(builder.sext(e.load(index, 4 * (first // span), I32), I64), ir.Constant(I64, 64 * count))
            place = builder.add(out, at)
            acc = [e.load(place, 64 * c, FLOATS) for c in range(count)]
            for s in range(first, first + span):
                for v, g in zip(quads[s], _columns(e, grad, s), strict=True):
                    code = builder.and_(v, e.ints(count - 1))
                    for c in range(count):
                        acc[c] = builder.fadd(acc[c], builder.select(builder.icmp_signed("==", code, e.ints(c)), g, nothing))
            for c in range(count):
                e.store(acc[c], place, 64 * c)

    return types.void(*[types.int64] * 4, BITS, SPAN), generate


@intrinsic
def total(context, address):
    """The sum of 16 floats."""

    def generate(context, builder, signature, args):
        e = Emit(builder)
        return e.total(ir.Constant(F32, 0.0), e.load(args[0], 0, FLOATS))

    return types.float32(types.int64), generate


def _numbers(stored: Any, widen: Any) -> tuple[Any, Any]:
    """Two intrinsics: load one stored number as float32, and copy 16 of them to float32."""

    @intrinsic
    def load(context, address):
        def generate(context, builder, signature, args):
            return widen(builder, builder.load(builder.inttoptr(args[0], stored.as_pointer())), I32, F32)

        return types.float32(types.int64), generate

    @intrinsic
    def copy(context, address, out):
        def generate(context, builder, signature, args):
            e = Emit(builder)
            value = builder.load(e.at(args[0], 0, ir.VectorType(stored, LANES)), align=1)
            e.store(widen(builder, value, INTS, FLOATS), args[1], 0)

        return types.void(types.int64, types.int64), generate

    return load, copy


def _from_bfloat(builder: Any, value: Any, ints: Any, floats: Any) -> Any:
    sixteen = ir.Constant(ints, 16 if ints == I32 else [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(value, ints), sixteen), floats)


def _from_half(builder: Any, value: Any, ints: Any, floats: Any) -> Any:
    """By integers, as not every CPU converts, and some are told to take subnormal floats for zero."""
    same = lambda number: ir.Constant(ints, number if ints == I32 else [number] * LANES)
    wide = builder.zext(value, ints)
    fraction = builder.shl(builder.and_(wide, same(0x7FFF)), same(13))
    exponent = builder.and_(wide, same(0x7C00))
    normal = builder.add(fraction, same(112 << 23))
    unit = ir.Constant(floats, 2.0**-24 if ints == I32 else [2.0**-24] * LANES)
    subnormal = builder.bitcast(builder.fmul(builder.sitofp(builder.and_(wide, same(0x3FF)), floats), unit), ints)
    number = builder.select(builder.icmp_signed("==", exponent, same(0)), subnormal, normal)
    number = builder.select(builder.icmp_signed("==", exponent, same(0x7C00)), builder.or_(fraction, same(0x7F800000)), number)
    return builder.bitcast(builder.or_(number, builder.shl(builder.and_(wide, same(0x8000)), same(16))), floats)


load_float, copy_floats = _numbers(F32, lambda builder, value, ints, floats: value)
load_half, copy_halves = _numbers(ir.IntType(16), _from_half)
load_byte, copy_bytes = _numbers(ir.IntType(8), lambda builder, value, ints, floats: builder.uitofp(value, floats))
load_bfloat, copy_bfloats = _numbers(ir.IntType(16), _from_bfloat)


@intrinsic
def part_columns(context, x, out):
    """32 floats -> their 16 evens, then their 16 odds."""

    def generate(context, builder, signature, args):
        e = Emit(builder)
        for h, part in enumerate(_columns(e, args[0], 0)):
            e.store(part, args[1], 64 * h)

    return types.void(types.int64, types.int64), generate


@intrinsic
def store_float(context, address, value):
    def generate(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], F32.as_pointer()))

    return types.void(types.int64, types.float32), generate


@intrinsic
def take(context, address):
    """The integer at the address, which is then one larger; safe between threads."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), ir.Constant(I64, 1), "monotonic")

    return types.int64(types.int64), generate
