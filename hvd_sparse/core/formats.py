"""Formats: which bytes the entries of a payload become, and how many for k of them.

An entry is an index and a value: `values=` of an integration chooses how values travel,
`indices=` how indices do. What is before the entries is the business of
`hvd_sparse.core.frame`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import Array, Format, PayloadError
from hvd_sparse.core.indices import (
    EliasFano,
    Indices,
    KnownIndices,
    RawIndices,
)
from hvd_sparse.core.roles import offers
from hvd_sparse.core.values import OURS, Float32, Sign, Values, float_bytes
from hvd_sparse.kernels import coding, host
from hvd_sparse.kernels.coding import Coded

Bytes = npt.NDArray[np.uint8]

_INDEX: Any = np.dtype("<i4")
_FLOATS: dict[int, Any] = {4: np.dtype("<f4"), 8: np.dtype("<f8")}
_MANY = 1 << 12  # entries: of all scales there are whole numbers
_SMALL = 1 << 14  # elements of a gradient for which all sizes are remembered
_ROUNDED = 80  # bits, at most, that are sent beside those of entries, rounding up
_BEYOND = 80  # entries
_INDICES = (EliasFano, RawIndices, KnownIndices)
_FIRST = {(1, 1): 1, (1, 0): 2}  # the numbers that the oldest formats have


class Places(NamedTuple):
    """Where all is in the bytes of entries.

    Attributes:
        values_end: where values end, that begin at 0.
        indices_at: where indices begin.
        index_kind: as `hvd_sparse.kernels.coding` has it; so is value_kind.
        size: bytes.
    """

    values_end: int
    indices_at: int
    index_kind: int
    value_kind: int
    size: int


@dataclass(frozen=True)
class Entries:
    """Values, then indices, each in a format of its own.

    Args:
        values: `Float32()`, `Float16()`, `BFloat16()`, `Int8()`, `Int4()`, `Int2()` or
            `Sign()`.
        indices: `EliasFano()` or `RawIndices()`.

    Raises:
        TypeError: they are others, whose bytes kernels do not know.

    Example:
        >>> Entries(Float32(), RawIndices()).bytes(10, "float32", n=1000)
        80
    """

    values: Values
    indices: Indices | KnownIndices = EliasFano()  # noqa: RUF009  # frozen: one instance serves all

    def __post_init__(self) -> None:
        if type(self.values) not in OURS or type(self.indices) not in _INDICES:
            raise TypeError(
                "values and indices must be formats of hvd_sparse itself, got "
                f"{self.values!r} and {self.indices!r}"
            )

    @property
    def layout(self) -> int:
        """Its number, which ranks agree on."""
        pair = self.values.layout, self.indices.layout
        return _FIRST.get(pair, 8 * pair[0] + pair[1])

    def bytes(self, k: Any, dtype: str, n: int) -> Any:
        """Bytes of k entries of a gradient of n elements; k a number or an array."""
        values = self.values.bytes(k, dtype)
        packed = values + self.indices.bytes(k, n)
        if self.indices.layout == 0:
            return packed
        raw = _up(values) + 4 * k
        if isinstance(self.indices, RawIndices):
            return raw
        return (
            np.minimum(packed, raw) if isinstance(k, np.ndarray) else min(packed, raw)
        )

    def most(self, size: Any, dtype: str, n: int) -> Any:
        """The most entries that size bytes have room for; -1 if not even 0."""
        if not isinstance(size, np.ndarray):
            return _most(self, int(size), dtype, n)
        sizes = size.astype(np.int64)
        if n <= _SMALL and sizes.size:
            table = _table(self, dtype, n)
            if sizes.max() < table[-1]:
                return np.searchsorted(table, sizes, side="right") - 1
        each = [_most(self, one, dtype, n) for one in sizes.ravel().tolist()]
        return np.array(each, np.int64).reshape(sizes.shape)

    def places(self, k: int, dtype: str, n: int) -> Places:
        """Where values and indices of k entries lie."""
        return _places(self, k, dtype, n)

    def coded(self, data: Bytes, k: int, dtype: str, n: int) -> Coded:
        """The same bytes, as kernels write and read them."""
        values_end, indices_at, index_kind, value_kind, size = _places(
            self, k, dtype, n
        )
        values = data[:values_end]
        if value_kind == coding.FLOAT:
            values = values.view(_FLOATS[float_bytes(dtype)])
        indices = data[indices_at:size]
        if index_kind == coding.RAW:
            indices = indices.view(_INDEX)
        return Coded(indices, values, k, index_kind, value_kind)

    def write(self, out: Bytes, indices: Array, values: Array, n: int) -> Array:
        """Overwrites out; returns the values a receiver will read, (k,)."""
        k, dtype = values.shape[0], f"float{8 * values.itemsize}"
        given = indices if self.indices.layout else indices[:0]
        coded = self.coded(out, k, dtype, n)
        out[coded.values.nbytes :][:4] = 0  # what may lie before indices
        if coded.index_kind == coding.RAW and coded.value_kind == coding.FLOAT:
            coded.indices[...], coded.values[...] = given, values
            return values
        return host.encode(coded, given, values, n)

    def read(self, data: Bytes, k: int, dtype: str, n: int) -> tuple[Array, Array]:
        """(k,) indices, none if every rank knows them, and (k,) values.

        Views of the bytes where they travel as they are.

        Raises:
            PayloadError: there are fewer indices below n.
        """
        coded = self.coded(data, k, dtype, n)
        like = np.empty(0, _FLOATS[float_bytes(dtype)])
        indices, values = host.decode(coded, n, like)
        if self.indices.layout and len(indices) < k:
            raise PayloadError(
                f"indices must ascend in [0, {n}), {k - len(indices)} of {k} do not"
            )
        return indices, values

    def without_indices(self) -> "Entries":
        """The same where every rank knows them."""
        return Entries(self.values, KnownIndices())


@lru_cache(maxsize=64)
def _table(form: Entries, dtype: str, n: int) -> Any:
    """Bytes of each number of entries up to n, and of a few more."""
    return np.asarray(form.bytes(np.arange(n + _BEYOND), dtype, n))


@lru_cache(maxsize=1 << 14)
def _most(form: Entries, size: int, dtype: str, n: int) -> int:
    """`Entries.most` of one size, by bisection."""
    low, high = -1, 8 * max(size, 0) + 1
    about, off = _about(form, size, dtype, n)
    tried = iter((about - off, about + off))  # it is most often between these
    while low < high:
        middle = min(max(next(tried, (low + high + 1) // 2), 0), max(high, 0))
        if form.bytes(middle, dtype, n) <= size:
            low = max(low, middle)
        else:
            high = min(high, middle - 1)
    return low


def _about(form: Entries, size: int, dtype: str, n: int) -> tuple[int, int]:
    """As many as so many bytes have room for, and by how many that may be wrong."""
    empty = 8 * form.values.bytes(0, dtype)
    each = (8 * form.values.bytes(_MANY, dtype) - empty) / _MANY
    off = math.ceil(_ROUNDED / each)
    room = 8 * size - empty
    if not isinstance(form.indices, EliasFano):
        return int(room / (each + 8 * form.indices.bytes(1, n))), off
    k = room
    for _ in range(4):  # low bits follow from k, and k from them
        low = coding.shift(n, max(k, 1))
        k = int((room - (n - 1 >> low)) / (each + 1 + low))
    return k, off


@lru_cache(maxsize=1 << 14)
def _places(form: Entries, k: int, dtype: str, n: int) -> Places:
    values = form.values.bytes(k, dtype)
    size = form.bytes(k, dtype, n)
    raw = size == _up(values) + 4 * k or not form.indices.layout
    kind = coding.RAW if raw else coding.ELIAS_FANO
    indices_at = _up(values) if raw and form.indices.layout else values
    return Places(values, indices_at, kind, form.values.layout, size)


def _up(size: Any) -> Any:
    """To where int32 may lie."""
    return (size + 3) // 4 * 4


def joined(values: Values | Format | None, indices: Indices | None) -> Format:
    """What `values=` and `indices=` of an integration say together.

    Raises:
        TypeError: they are no formats.
        ValueError: values is a `Format` of one's own, which has indices already.
    """
    if indices is not None and type(indices) not in (EliasFano, RawIndices):
        raise TypeError(f"indices must be EliasFano() or RawIndices(), got {indices!r}")
    if values is None or type(values) in OURS:
        assert values is None or isinstance(values, Values)
        return Entries(values or Float32(), indices or EliasFano())
    if isinstance(values, Values) and not offers(values, Format):
        raise TypeError(
            "values must be a format of hvd_sparse itself, or have all methods of a "
            f"Format, got {values!r}"
        )
    if indices is not None:
        raise ValueError(
            f"indices must be left out with values={values!r}: it has its own"
        )
    return values


def is_signs(form: Format) -> bool:
    """Whether its values are signs of one scale."""
    return is_ours(form) and form.values == Sign()


def is_ours(form: Format) -> TypeGuard[Entries]:
    """Whether tests prove what it reads, so that it is not checked again.

    Not what inherits from it: that may write and read as it likes.
    """
    return type(form) is Entries
