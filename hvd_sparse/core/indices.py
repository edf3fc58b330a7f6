"""Indices: how the places of a payload's values travel, as `indices=` says.

The bytes are in `hvd_sparse.kernels.coding`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from hvd_sparse.kernels import coding


@dataclass(frozen=True)
class EliasFano:
    """About 2 + log2(n / k) bits an index; as many for any k of n.

    At 0.1 % that is 12 bits in place of 32. Where int32 takes no more, of a few of very
    many, indices travel as with `RawIndices`.

    Elias, 1974; Fano, 1971: see `hvd_sparse.kernels.coding`.

    Example:
        >>> EliasFano().bytes(10, n=10_000)
        15
    """

    layout: ClassVar = coding.ELIAS_FANO

    def bytes(self, k: Any, n: int) -> Any:
        """Bytes of k indices below n; k a number or an array."""
        if isinstance(k, np.ndarray):
            return _many(k, n)
        return _one(int(k), n)


@dataclass(frozen=True)
class RawIndices:
    """int32, 4 bytes an index: least work."""

    layout: ClassVar = coding.RAW

    def bytes(self, k: Any, n: int) -> Any:
        """Bytes of k indices."""
        return 4 * k


@dataclass(frozen=True)
class KnownIndices:
    """None: every rank can work them out, see `SharedIndices`."""

    layout: ClassVar = 0

    def bytes(self, k: Any, n: int) -> Any:
        """No bytes."""
        return 0 * k


Indices = EliasFano | RawIndices  # that a user chooses from

_one = lru_cache(maxsize=1 << 14)(lambda k, n: coding.elias_fano_bytes(n, k))


def _many(k: Any, n: int) -> Any:
    """`coding.elias_fano_bytes`, of an array."""
    low = low_bits(k, n)
    return np.where(k > 0, (k + (n - 1 >> low) + k * low + 7) // 8, 0)


def low_bits(k: Any, n: int) -> Any:
    """`coding.shift`, of an array."""
    return 32 - _halves(n).searchsorted(k, side="right")


@lru_cache(maxsize=1024)
def _halves(n: int) -> Any:
    """(32,) int64, ascending; there are as many low bits as of these above k."""
    whole = np.int64(n - 1) >> np.arange(33)
    return (whole[:-1] - whole[1:])[::-1].copy()
