"""Coding: what the bytes of entries mean, for all who write or read them.

An entry is an index and a value. k of them travel as two regions of bytes, one of
values and one of indices, little-endian, bit 0 of a byte first:

| values | bytes |
|---|---|
| `FLOAT` | k values as they are, v bytes each |
| `FLOAT16` | int16 e, then k IEEE halves; a value is half * 2^e |
| `BFLOAT16` | k upper halves of a float32 |
| `INT8`, `INT4`, `INT2` | of each `CHUNK` entries a scale, then k integers in two's
  complement; a value is integer * scale. A scale is the upper half of v bytes |
| `SIGN` | a scale, v bytes, then k bits: 1 for minus |

| indices | bytes |
|---|---|
| `RAW` | k int32, at a multiple of 4 |
| `ELIAS_FANO` | a bit string: see below |

v is 4, or 8 for a float64 gradient.

Elias-Fano: each index is cut into `shift` low bits and the high rest. First come the
high parts, in unary: bit (high_i + i) is set for entry i, and no other. Behind them, at
bit `unary_bits`, are the low bits of each. k (2 + log2(n / k)) bits at most, a number
that follows from n and k alone; the fewest that there can be are log2 of n over k, for
which k (1.44 + log2(n / k)) is close where k is small. Elias, Efficient storage and
retrieval by content and address of static files, 1974; Fano, On the number of bits
required to implement an associative memory, 1971.
"""

from typing import Any, NamedTuple

from numba.extending import register_jitable

Array = Any

FLOAT, FLOAT16, BFLOAT16, INT8, INT4, INT2, SIGN = range(1, 8)
RAW, ELIAS_FANO = 1, 2
CHUNK = 64  # entries that share a scale


class Coded(NamedTuple):
    """What a rank sent of one tensor, as it lies in memory.

    Attributes:
        indices: (bytes,) uint8; or (k,) int32, where these are `RAW`.
        values: (bytes,) uint8; or (k,) floats, where these are `FLOAT`.
        k: entries.
        index_kind: one of the table above; what all ranks know is `RAW`.
        value_kind: the same.
    """

    indices: Array
    values: Array
    k: int
    index_kind: int = RAW
    value_kind: int = FLOAT


def plain(indices: Array, values: Array) -> Coded:
    """Arrays, (k,) int32 and (k,) floats, as they are."""
    return Coded(indices, values, indices.shape[0])


@register_jitable
def shift(n: int, k: int) -> int:
    """Low bits of each of k indices below n: as many as make the fewest bits."""
    low = 0
    # one more for each entry, for half the buckets
    while k < ((n - 1) >> low) - ((n - 1) >> (low + 1)):
        low += 1
    return low


@register_jitable
def unary_bits(n: int, k: int, low: int) -> int:
    """Bits of the high parts: a one for each entry, a zero for each further bucket."""
    return k + ((n - 1) >> low)


def elias_fano_bytes(n: int, k: int) -> int:
    """Of k indices below n."""
    if k == 0:
        return 0
    low: int = shift(n, k)
    return int((unary_bits(n, k, low) + k * low + 7) // 8)


@register_jitable
def integer_bits(kind: int) -> int:
    """Of one integer."""
    return 8 if kind == INT8 else 4 if kind == INT4 else 2


@register_jitable
def value_bytes(kind: int, k: Any, size: int) -> Any:
    """Of k values, a number or an array, that are floats of size bytes."""
    if kind == FLOAT:
        return size * k
    if kind == FLOAT16:
        return 2 + 2 * k
    if kind == BFLOAT16:
        return 2 * k
    if kind == SIGN:
        return size + (k + 7) // 8
    scales = (k + CHUNK - 1) // CHUNK * (size // 2)
    return scales + (k * integer_bits(kind) + 7) // 8
