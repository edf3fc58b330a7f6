"""Values as they travel, rounded: see `hvd_sparse.kernels.coding` for the bytes.

`sent` is what a receiver reads. It is finite, and no farther from the value than 0 is,
but for `SIGN`; value - sent is exact, but for `SIGN`: nothing is lost by rounding.
"""

import math
from typing import Any

import numpy as np

from hvd_sparse.kernels.coding import BFLOAT16, CHUNK, FLOAT16, SIGN, integer_bits
from hvd_sparse.kernels.host.bits import bits_at, set_bits
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.simd import from_bits, magnitude_bits

_DOUBLE = np.empty(0)  # like which `from_bits` makes a float
_HALF_EXPONENT = 15  # largest magnitudes become 2^14 to 2^15, below the largest half
_HALF_MOST, _BFLOAT16_MOST = 0x7BFF, 0x7F7F  # patterns of the largest finite ones
_HALF_LEAST, _BFLOAT16_LEAST = 2.0**-24, 2.0**-133


@jit
def _narrow(value: float, mantissa: int, bias: int, least: float, most: int) -> Any:
    """The pattern of a float of 16 bits next to the value, ties to even.

    Args:
        value: finite.
        mantissa: bits that are written.
        bias: of the exponent.
        least: the smallest such float.
        most: the pattern of the largest that may be made.
    """
    pattern: Any = np.int64(magnitude_bits(value))
    cut = 52 - mantissa
    if (pattern >> 52) - 1023 + bias >= 1:
        pattern += (1 << (cut - 1)) - 1 + ((pattern >> cut) & 1)
        bits = (pattern >> cut) - ((1023 - bias) << mantissa)
    else:  # subnormal: a multiple of the smallest; adding 2^52 rounds to one
        bits = np.int64((abs(value) / least + 2.0**52) - 2.0**52)
    return min(bits, most) | (0x8000 if math.copysign(1.0, value) < 0 else 0)


@jit
def _wide(bits: int, mantissa: int, bias: int, least: float) -> Any:
    """The value of such a pattern, as float64, where it is finite whatever it is."""
    magnitude = bits & 0x7FFF
    if magnitude >> mantissa:
        shifted = (magnitude << (52 - mantissa)) + ((1023 - bias) << 52)
        value = from_bits(np.uint64(shifted), _DOUBLE)
    else:
        value = magnitude * least
    return -value if bits & 0x8000 else value


@jit
def _put16(data: Any, at: int, bits: int) -> None:
    data[at] = bits & 255
    data[at + 1] = (bits >> 8) & 255


@jit
def _take16(data: Any, at: int) -> Any:
    return np.int64(data[at]) | np.int64(data[at + 1]) << 8


# --------------------------------------------------------------------- floats


@jit
def _two_factors(exponent: int) -> Any:
    """2^exponent as a product, since it may be out of range itself."""
    first = exponent // 2
    return math.ldexp(1.0, first), math.ldexp(1.0, exponent - first)


@jit
def _write_halves(data: Any, values: Any, sent: Any) -> None:
    largest: Any = 0.0
    for value in values:
        largest = max(largest, abs(np.float64(value)))
    exponent = math.frexp(largest)[1] - _HALF_EXPONENT if largest else 0
    _put16(data, 0, exponent)
    one, other = _two_factors(-exponent)
    back, again = _two_factors(exponent)
    for i in range(values.size):
        scaled = np.float64(values[i]) * one * other
        bits = _narrow(scaled, 10, 15, _HALF_LEAST, _HALF_MOST)
        sent[i] = _wide(bits, 10, 15, _HALF_LEAST) * back * again
        if not math.isfinite(sent[i]):  # it was rounded up to what has no float
            bits -= 1
            sent[i] = _wide(bits, 10, 15, _HALF_LEAST) * back * again
        _put16(data, 2 + 2 * i, bits)


@jit
def _read_halves(data: Any, first: int, values: Any) -> None:
    exponent = np.int64(np.int16(np.uint16(_take16(data, 0))))
    back, again = _two_factors(exponent)
    for i in range(values.size):
        half = _wide(_take16(data, 2 + 2 * (first + i)), 10, 15, _HALF_LEAST)
        values[i] = half * back * again


@jit
def _write_bfloat16(data: Any, values: Any, sent: Any) -> None:
    for i in range(values.size):
        value = np.float64(values[i])
        bits = _narrow(value, 7, 127, _BFLOAT16_LEAST, _BFLOAT16_MOST)
        sent[i] = _wide(bits, 7, 127, _BFLOAT16_LEAST)
        if values[i] - (values[i] - sent[i]) != sent[i]:  # far beyond: it would be lost
            bits, sent[i] = 0, 0
        _put16(data, 2 * i, bits)


@jit
def _read_bfloat16(data: Any, first: int, values: Any) -> None:
    for i in range(values.size):
        bits = _take16(data, 2 * (first + i))
        values[i] = _wide(bits, 7, 127, _BFLOAT16_LEAST)


# ------------------------------------------------------------------- integers


@jit
def _scale(values: Any, most: int) -> Any:
    """The pattern, and the float, of the scale of a chunk.

    The largest magnitude becomes `most`; where that is 1, the mean magnitude does, or
    nearly all would be 0. Rounded up: a product with an integer of 8 bits is exact.
    """
    size = np.int64(values.itemsize)
    total: Any = 0.0
    largest: Any = 0.0
    for value in values:
        magnitude = abs(np.float64(value))
        total += magnitude / values.size
        largest = max(largest, magnitude)
    exact = total if most == 1 else largest / most
    half = np.int64(size * 4)
    step = values.dtype.type(exact)
    pattern = np.int64(magnitude_bits(step))
    upper = (pattern + (np.int64(1) << half) - 1) >> half
    if not math.isfinite(_of_upper(upper, values)):
        upper -= 1
    return upper, np.float64(_of_upper(upper, values))


@jit
def _of_upper(upper: int, like: Any) -> Any:
    return from_bits(np.uint64(upper) << np.uint64(4 * like.itemsize), like)


@jit
def _write_integers(data: Any, kind: int, values: Any, sent: Any) -> None:
    data[:] = 0
    bits, size = integer_bits(kind), values.itemsize // 2
    most = (1 << (bits - 1)) - 1
    start = -(-values.size // CHUNK) * size
    for low in range(0, values.size, CHUNK):
        high = min(low + CHUNK, values.size)
        upper, step = _scale(values[low:high], most)
        set_bits(data, 8 * size * (low // CHUNK), upper)
        for i in range(low, high):
            sent[i] = 0
            whole: Any = 0
            if step > 0:
                quotient = np.rint(np.float64(values[i]) / step)
                whole = np.int64(max(-most, min(most, quotient)))
                sent[i] = whole * step
                if not math.isfinite(sent[i]):
                    whole -= 1 if whole > 0 else -1
                    sent[i] = whole * step
            pattern = whole & ((1 << bits) - 1)
            data[start + (bits * i >> 3)] |= np.uint8(pattern << (bits * i & 7))


@jit
def _read_integers(data: Any, kind: int, k: int, first: int, values: Any) -> None:
    bits, size = integer_bits(kind), values.itemsize // 2
    start = -(-k // CHUNK) * size
    entry, stop = first, first + values.size
    while entry < stop:
        upper = bits_at(data, 8 * size * (entry // CHUNK), 8 * size)
        step = np.float64(_of_upper(upper, values))
        end = min(stop, (entry // CHUNK + 1) * CHUNK)
        for i in range(entry, end):
            byte = start + (bits * i >> 3)
            whole = np.int64(data[byte]) >> (bits * i & 7) & ((1 << bits) - 1)
            whole -= (whole >> (bits - 1)) << bits
            values[i - first] = whole * step
        entry = end


# ---------------------------------------------------------------------- signs


@jit
def _mean_magnitude(values: Any) -> Any:
    """Of all scales it leaves the least squares; sums beyond range are fine."""
    largest: Any = 0.0
    for value in values:
        largest = max(largest, abs(np.float64(value)))
    if largest == 0:
        return 0.0
    power = math.ldexp(1.0, max(-1022, min(1023, math.frexp(largest)[1])))
    total: Any = 0.0
    for value in values:
        total += abs(np.float64(value)) / power
    return total / values.size * power


@jit
def _write_signs(data: Any, values: Any, sent: Any) -> None:
    data[:] = 0
    size = values.itemsize
    scale = values.dtype.type(_mean_magnitude(values))
    pattern = magnitude_bits(scale)
    for byte in range(size):
        data[byte] = (pattern >> np.uint64(8 * byte)) & np.uint64(255)
    for i in range(values.size):
        minus = math.copysign(1.0, np.float64(values[i])) < 0
        if minus:
            data[size + (i >> 3)] |= np.uint8(1 << (i & 7))
        sent[i] = -scale if minus else scale


@jit
def _read_signs(data: Any, first: int, values: Any) -> None:
    size = values.itemsize
    pattern = np.uint64(0)
    for byte in range(size):
        pattern |= np.uint64(data[byte]) << np.uint64(8 * byte)
    scale = from_bits(pattern, values)
    for i in range(values.size):
        entry = first + i
        minus = data[size + (entry >> 3)] >> (entry & 7) & 1
        values[i] = -scale if minus else scale


# ------------------------------------------------------------------------ all


@jit
def round_values(data: Any, kind: int, values: Any, sent: Any) -> None:
    """Overwrites data with (k,) values, and sent with what will be read.

    Args:
        data: (bytes,) uint8, as many as k values of this kind take.
        kind: any but FLOAT.
        values: (k,) float32 or float64, finite.
        sent: (k,) of their dtype; not the values themselves.
    """
    if kind == FLOAT16:
        _write_halves(data, values, sent)
    elif kind == BFLOAT16:
        _write_bfloat16(data, values, sent)
    elif kind == SIGN:
        _write_signs(data, values, sent)
    else:
        _write_integers(data, kind, values, sent)


@jit
def read_values(data: Any, kind: int, k: int, first: int, values: Any) -> None:
    """Overwrites (m,) values with those of entries [first, first + m) of k."""
    if kind == FLOAT16:
        _read_halves(data, first, values)
    elif kind == BFLOAT16:
        _read_bfloat16(data, first, values)
    elif kind == SIGN:
        _read_signs(data, first, values)
    else:
        _read_integers(data, kind, k, first, values)
