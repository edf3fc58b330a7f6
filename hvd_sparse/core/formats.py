"""Formats: which bytes the entries of a payload become, and how many for k of them.

An entry is an index and a value. `values=` of an integration chooses how values travel;
indices are int32, unless every rank knows them and they stay at home. What is before
the entries is the business of `hvd_sparse.core.frame`.

| layout | format | bytes of k entries, values of v bytes |
|---|---|---|
| 1 | `Float32` | k v of values, then 4 k of indices |
| 2 | `ValuesOnly` | k v of values |
| 3 | `Sign` | v of one scale, then k words of 4: bits 0-30 index, bit 31 sign |

v is 4, or 8 for a float64 gradient.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import Array, Format

Bytes = npt.NDArray[np.uint8]

_INDEX: Any = np.dtype("<i4")
_INDEX_BYTES = 4
_VALUES: dict[int, Any] = {4: np.dtype("<f4"), 8: np.dtype("<f8")}
_SIGN = np.uint32(1 << 31)


def value_bytes(dtype: str) -> int:
    """Bytes of one unrounded value of a gradient of this dtype."""
    return 8 if dtype == "float64" else 4


@dataclass(frozen=True)
class Float32:
    """Values as they are: float32, or float64 for a float64 gradient.

    Example:
        >>> Float32().bytes(10, "float32", n=1000)
        80
    """

    layout = 1

    def bytes(self, k: Any, dtype: str, n: int) -> Any:
        """Bytes of k values and k indices."""
        return k * (value_bytes(dtype) + _INDEX_BYTES)

    def most(self, size: Any, dtype: str, n: int) -> Any:
        """The most entries that so many bytes have room for."""
        return size // (value_bytes(dtype) + _INDEX_BYTES)

    def write(self, out: Bytes, indices: Array, values: Array, n: int) -> Array:
        """Overwrites out; returns the values a receiver will read, these."""
        out[: values.nbytes] = values.view(np.uint8)
        out[values.nbytes :] = indices.view(np.uint8)
        return values

    def read(self, data: Bytes, k: int, dtype: str, n: int) -> tuple[Array, Array]:
        """Views of the bytes: (k,) indices, (k,) values."""
        end = k * value_bytes(dtype)
        return data[end:].view(_INDEX), data[:end].view(_VALUES[value_bytes(dtype)])

    def without_indices(self) -> "ValuesOnly":
        """The same where every rank knows them."""
        return ValuesOnly()


@dataclass(frozen=True)
class ValuesOnly:
    """As Float32, of indices that every rank knows: see `SharedIndices`."""

    layout = 2

    def bytes(self, k: Any, dtype: str, n: int) -> Any:
        """Bytes of k values."""
        return k * value_bytes(dtype)

    def most(self, size: Any, dtype: str, n: int) -> Any:
        """The most entries that so many bytes have room for."""
        return size // value_bytes(dtype)

    def write(self, out: Bytes, indices: Array, values: Array, n: int) -> Array:
        """Overwrites out; returns the values a receiver will read, these."""
        del indices
        out[:] = values.view(np.uint8)
        return values

    def read(self, data: Bytes, k: int, dtype: str, n: int) -> tuple[Array, Array]:
        """No indices, and a view of the bytes: (k,) values."""
        del k
        return np.empty(0, _INDEX), data.view(_VALUES[value_bytes(dtype)])

    def without_indices(self) -> "ValuesOnly":
        """This."""
        return self


@dataclass(frozen=True)
class Sign:
    """Every value as plus or minus one scale, the mean magnitude: S+Q.

    4 bytes an entry and one scale, half of what `Float32` takes. Of all scales it
    leaves the smallest residual in the 2-norm; what rounding takes away stays there.
    The sign of a zero is that of its bit.

    Khirirat, Magnusson, Aytekin, Johansson, Communication Efficient Sparsification for
    Large Scale Machine Learning, 2020, arXiv:2003.06377; see `SignTopK`.

    Example:
        >>> Sign().bytes(10, "float32", n=1000)
        44
    """

    layout = 3

    def bytes(self, k: Any, dtype: str, n: int) -> Any:
        """Bytes of the scale and k words."""
        return value_bytes(dtype) + _INDEX_BYTES * k

    def most(self, size: Any, dtype: str, n: int) -> Any:
        """The most entries that so many bytes have room for; negative if not even 0."""
        return (size - value_bytes(dtype)) // _INDEX_BYTES

    def write(self, out: Bytes, indices: Array, values: Array, n: int) -> Array:
        """Overwrites out; returns the values a receiver will read, (k,)."""
        scale = mean_magnitude(values)
        out[: scale.nbytes] = scale.view(np.uint8)
        words = out[scale.nbytes :].view(np.uint32)
        words[:] = indices.view(np.uint32)
        words[np.signbit(values)] |= _SIGN
        return np.copysign(scale, values)

    def read(self, data: Bytes, k: int, dtype: str, n: int) -> tuple[Array, Array]:
        """Copies: (k,) indices, (k,) values."""
        start = value_bytes(dtype)
        words = data[start:].view("<u4")
        values = np.repeat(data[:start].view(_VALUES[start]), k)
        np.negative(values, out=values, where=words >= _SIGN)
        return (words & ~_SIGN).view(np.int32), values

    def without_indices(self) -> Format:
        """Refused: signs travel in the words of indices.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "values=Sign() needs indices that travel, and every rank knows those of "
            "this sparsifier: use values=Float32()"
        )


def is_ours(form: Format) -> bool:
    """Whether tests prove what it reads, so that it is not checked again."""
    return type(form) in (Float32, ValuesOnly, Sign)


def is_plain(form: Format) -> bool:
    """Whether kernels may write and read its entries, at their `offsets`."""
    return type(form) is Float32


def offsets(k: int, dtype: str) -> tuple[int, int]:
    """Where indices begin, and where values do, in the bytes of plain entries."""
    return k * value_bytes(dtype), 0


def mean_magnitude(values: Array) -> Array:
    """(1,) of the values' dtype: sum |v| / k, 0 of none; sums beyond range are fine."""
    magnitudes = np.abs(values).astype(np.float64)
    largest = float(magnitudes.max(initial=0.0))
    if largest == 0:
        return np.zeros(1, values.dtype)
    power = 2.0 ** np.frexp(largest)[1].clip(-1022, 1023)  # exact, but for subnormals
    return np.array([(magnitudes / power).mean() * power], values.dtype)
