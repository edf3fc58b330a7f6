"""Sixteen elements at a time: the one loop body that touches every gradient element.

Everything the path does to a whole gradient is memory-bound, so it must read and write
each element once. LLVM does not fuse "add, compare, remember the rare hits" when it is
written as a scalar loop (2.5 to 4.5 times the addition, measured), so this file writes
that body as vector instructions, which LLVM lowers to whatever the processor has: the
result costs as much as the addition on AVX-512, AVX2 and plain SSE2 alike. `draw16`
hashes every index and is bound by the processor: a draw takes 2.5 times as long with
AVX-512, and 5 times with SSE2.

float16 and bfloat16 gradients arrive as their bit patterns, int16 and uint16 arrays
respectively, because Numba has neither type on the host. They are widened to float32 in
registers with integer arithmetic: hardware conversion (F16C) is not on every processor,
and LLVM's fallback is a library call that may be absent.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16

_BIT, _SHORT, _WORD, _LONG = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64: 2^64 over the golden ratio


class _VolatileLoad(ir.LoadInstr):  # type: ignore[misc]  # llvmlite has no types
    """A load that LLVM leaves alone.

    It would turn "load, choose, store to the same place" into a masked store, which
    takes AMD processors without AVX-512 twice as long as the whole loop (measured).
    """

    def descr(self, buf: list[str]) -> None:
        lines: list[str] = []
        super().descr(lines)
        buf.append("".join(lines).replace("load ", "load volatile ", 1))


def _splat(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    vector = ir.VectorType(scalar.type, LANES)
    empty = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(_WORD, 0))
    lanes = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
    return builder.shuffle_vector(first, empty, lanes)


def _constant(element: Any, value: float) -> Any:
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


def _load(builder: Any, pointer: Any, element: Any, size: int) -> Any:
    return builder.load(_vector_at(builder, pointer, element), align=size)


def _vector_at(builder: Any, pointer: Any, element: Any) -> Any:
    return builder.bitcast(pointer, ir.VectorType(element, LANES).as_pointer())


def _widen_bfloat16(builder: Any, bits: Any) -> Any:
    """A bfloat16 is the upper half of a float32."""
    words = builder.zext(bits, ir.VectorType(_WORD, LANES))
    return builder.bitcast(
        builder.shl(words, _constant(_WORD, 16)), ir.VectorType(_FLOAT, LANES)
    )


def _widen_float16(builder: Any, bits: Any) -> Any:
    """Exact, subnormals, infinities and NaN included.

    The magnitude moved to float32's place has an exponent that is 112 too small; one
    multiplication mends it, also for subnormals. An exponent of all ones must stay so.
    """
    words = builder.zext(bits, ir.VectorType(_WORD, LANES))
    sign = builder.shl(
        builder.and_(words, _constant(_WORD, 0x8000)), _constant(_WORD, 16)
    )
    moved = builder.shl(
        builder.and_(words, _constant(_WORD, 0x7FFF)), _constant(_WORD, 13)
    )
    floats = ir.VectorType(_FLOAT, LANES)
    scaled = builder.fmul(builder.bitcast(moved, floats), _constant(_FLOAT, 2.0**112))
    exponent = builder.and_(words, _constant(_WORD, 0x7C00))
    special = builder.icmp_unsigned("==", exponent, _constant(_WORD, 0x7C00))
    ones = builder.select(special, _constant(_WORD, 0x7F800000), _constant(_WORD, 0))
    magnitude = builder.bitcast(scaled, ir.VectorType(_WORD, LANES))
    return builder.bitcast(builder.or_(builder.or_(magnitude, ones), sign), floats)


def _gradient_lanes(builder: Any, pointer: Any, kind: Any, element: Any) -> Any:
    if kind == types.int16:
        return _widen_float16(builder, _load(builder, pointer, _SHORT, 2))
    if kind == types.uint16:
        return _widen_bfloat16(builder, _load(builder, pointer, _SHORT, 2))
    return _load(builder, pointer, element, kind.bitwidth // 8)


def _magnitude(builder: Any, total: Any, element: Any) -> Any:
    vector = ir.VectorType(element, LANES)
    suffix = "f32" if element == _FLOAT else "f64"
    name = f"llvm.fabs.v{LANES}{suffix}"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(vector, [vector]), name
    )
    return builder.call(function, [total])


def _mask(builder: Any, lanes: Any) -> Any:
    return builder.zext(builder.bitcast(lanes, _SHORT), _LONG)


@intrinsic
def accumulate16(
    typingctx: Any,
    out: Any,
    out_at: Any,
    residual: Any,
    at: Any,
    gradient: Any,
    gradient_at: Any,
    bound: Any,
) -> Any:
    """Overwrites 16 elements of out with residual + gradient where that is finite.

    Where it is not, with the residual. out may be the residual itself.

    Returns one uint64: bits 0-15 mark lanes whose new magnitude is >= bound, bits 16-31
    lanes whose sum was not finite.
    """
    signature = types.uint64(
        out, types.int64, residual, types.int64, gradient, types.int64, residual.dtype
    )

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, out_at, residual, at, gradient, gradient_at, bound = arguments
        residual_type, gradient_type = signature.args[2], signature.args[4]
        element = context.get_value_type(residual_type.dtype)
        size = residual_type.dtype.bitwidth // 8

        def pointer(array_type: Any, array: Any, offset: Any) -> Any:
            data = context.make_array(array_type)(context, builder, array).data
            return builder.gep(data, [offset])

        place = _vector_at(builder, pointer(residual_type, residual, at), element)
        old = _VolatileLoad(builder.block, place, "old")
        old.align = size
        builder._insert(old)
        added = _gradient_lanes(
            builder,
            pointer(gradient_type, gradient, gradient_at),
            gradient_type.dtype,
            element,
        )
        total = builder.fadd(old, added)
        # ordered: NaN < inf is false, so NaN and infinities both count as not finite
        finite = builder.fcmp_ordered(
            "<", _magnitude(builder, total, element), _constant(element, float("inf"))
        )
        kept = builder.select(finite, total, old)
        target = pointer(signature.args[0], out, out_at)
        builder.store(kept, builder.bitcast(target, kept.type.as_pointer()), align=size)
        hit = builder.fcmp_ordered(
            ">=", _magnitude(builder, kept, element), _splat(builder, bound)
        )
        wrong = builder.shl(
            _mask(builder, builder.not_(finite)), ir.Constant(_LONG, LANES)
        )
        return builder.or_(_mask(builder, hit), wrong)

    return signature, codegen


def _shifted(builder: Any, words: Any, by: int) -> Any:
    """words ^ (words >> by), of each lane."""
    return builder.xor(words, builder.lshr(words, _constant(_LONG, by)))


def _uniform_lanes(builder: Any, seed: Any, index: Any) -> Any:
    """Uniform in [0, 1), of 52 bits, for 16 indices from this one on: SplitMix64.

    Constants and shifts are Steele, Lea, Flood, 2014; the bits become the fraction of a
    number in [1, 2), since few processors convert 64-bit integers in lanes.
    """
    first = builder.add(seed, builder.mul(index, ir.Constant(_LONG, _GOLDEN)))
    steps = [(lane + 1) * _GOLDEN % 2**64 for lane in range(LANES)]
    steps = ir.Constant(ir.VectorType(_LONG, LANES), steps)
    words = builder.add(_splat(builder, first), steps)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = builder.mul(_shifted(builder, words, shift), _constant(_LONG, factor))
    fraction = builder.lshr(_shifted(builder, words, 31), _constant(_LONG, 12))
    pattern = builder.or_(fraction, _constant(_LONG, 0x3FF << 52))
    wide = builder.bitcast(pattern, ir.VectorType(_DOUBLE, LANES))
    return builder.fsub(wide, _constant(_DOUBLE, 1.0))


@intrinsic
def draw16(typingctx: Any, sums: Any, at: Any, rate: Any, seed: Any, index: Any) -> Any:
    """Which of 16 sums are drawn, with probability min(1, rate |sum|) each.

    The first is the tensor's element `index`: a draw depends on seed and index alone.

    Returns one uint64, of whose bits 0-15 those are set that are drawn.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, at, rate, seed, index = arguments
        array_type = signature.args[0]
        data = context.make_array(array_type)(context, builder, sums).data
        element = context.get_value_type(array_type.dtype)
        size = array_type.dtype.bitwidth // 8
        values = _load(builder, builder.gep(data, [at]), element, size)
        chances = builder.fmul(
            _magnitude(builder, values, element), _splat(builder, rate)
        )
        if element == _FLOAT:
            chances = builder.fpext(chances, ir.VectorType(_DOUBLE, LANES))
        uniform = _uniform_lanes(builder, seed, index)
        return _mask(builder, builder.fcmp_ordered("<", uniform, chances))

    signature = types.uint64(sums, types.int64, sums.dtype, types.uint64, types.int64)
    return signature, codegen


def _store_zeros(
    context: Any, builder: Any, array_type: Any, arguments: Any, align: int
) -> Any:
    """The store of 16 zeros into an array at an index: arguments are both."""
    array, at = arguments
    data = context.make_array(array_type)(context, builder, array).data
    element = context.get_value_type(array_type.dtype)
    target = _vector_at(builder, builder.gep(data, [at]), element)
    return builder.store(ir.Constant(target.type.pointee, None), target, align=align)


@intrinsic
def clear16(typingctx: Any, out: Any, at: Any) -> Any:
    """Overwrites 16 elements of out with 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        align = signature.args[0].dtype.bitwidth // 8
        _store_zeros(context, builder, signature.args[0], arguments, align)
        return context.get_dummy_value()

    return types.void(out, types.int64), codegen


@intrinsic
def stream_zeros16(typingctx: Any, out: Any, at: Any) -> Any:
    """Overwrites 16 elements of out with 0, past the caches.

    An ordinary store reads the cache line first, which takes as long as to write it.
    The first element is at a multiple of 64 bytes; `fence` must follow before another
    thread reads them.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        store = _store_zeros(context, builder, signature.args[0], arguments, 64)
        mark = builder.module.add_metadata([ir.Constant(_WORD, 1)])
        store.set_metadata("nontemporal", mark)
        return context.get_dummy_value()

    return types.void(out, types.int64), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """What was streamed is in memory before anything that follows."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typingctx: Any, out: Any, at: Any) -> Any:
    """An element of out will be written soon: fetch its cache line meanwhile."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at = arguments
        data = context.make_array(signature.args[0])(context, builder, array).data
        byte = ir.IntType(8).as_pointer()
        name = "llvm.prefetch.p0i8"
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte] + 3 * [_WORD]), name
        )
        place = builder.bitcast(builder.gep(data, [at]), byte)
        to_write, keep, data_cache = (ir.Constant(_WORD, i) for i in (1, 3, 1))
        builder.call(function, [place, to_write, keep, data_cache])
        return context.get_dummy_value()

    return types.void(out, types.int64), codegen


@intrinsic
def lowest_bit(typingctx: Any, mask: Any) -> Any:
    """Position of the lowest set bit of a uint64 that is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(_BIT, 1))

    return types.int64(types.uint64), codegen


@intrinsic
def bit_count(typingctx: Any, mask: Any) -> Any:
    """How many bits of a uint64 are set."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), codegen


@intrinsic
def magnitude_bits(typingctx: Any, value: Any) -> Any:
    """The bit pattern of |value| as a uint64; ordered as finite magnitudes are."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width = signature.args[0].bitwidth
        pattern = builder.bitcast(arguments[0], ir.IntType(width))
        mask = ir.Constant(ir.IntType(width), (1 << (width - 1)) - 1)
        magnitude = builder.and_(pattern, mask)
        return magnitude if width == 64 else builder.zext(magnitude, _LONG)

    return types.uint64(value), codegen


@intrinsic
def from_bits(typingctx: Any, pattern: Any, like: Any) -> Any:
    """The magnitude with this uint64 bit pattern, as a float like the array's."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        float_type = signature.return_type
        bits = arguments[0]
        if float_type.bitwidth < 64:
            bits = builder.trunc(bits, ir.IntType(float_type.bitwidth))
        return builder.bitcast(bits, context.get_value_type(float_type))

    return like.dtype(types.uint64, like), codegen


@intrinsic
def pointer_to(typingctx: Any, address: Any, like: Any) -> Any:
    """The address (an int64) as a pointer to elements of the array `like`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(
            arguments[0], context.get_value_type(signature.return_type)
        )

    return types.CPointer(like.dtype)(types.int64, like), codegen
