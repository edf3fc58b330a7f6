"""What a step sends and receives, as it lies in memory.

The payloads of a rank travel as words of 8 bytes: their sizes, then their bytes. Dense
tensors travel side by side, one buffer a dtype. Nothing in this file communicates.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import ExchangeError

Array = npt.NDArray[Any]

WORD = 8


class Buffers:
    """Of one rank; filled from step to step, since fresh pages cost more than copying.

    Attributes:
        payloads: to be sent: uint8, multiples of 8 bytes.
        tensors: to be reduced: (n,) floating.
        dense: per dtype of a sum, the tensors side by side, then their sums.
    """

    def __init__(self, size: int) -> None:
        """Args: size: how many ranks send."""
        self._size = size
        self._words = np.empty(0, np.int64)
        self.dense: dict[Any, Array] = {
            t: np.empty(0, t) for t in (np.float32, np.float64)
        }
        self.clear()

    def clear(self) -> None:
        """Nothing is to be sent, nothing has arrived; the memory stays."""
        self.payloads: list[Array] = []
        self.tensors: list[Array] = []
        self._starts = self._sizes = np.empty((self._size, 0), np.int64)
        self._sums: list[Array] = []

    # ------------------------------------------------------------------- on the way out

    def close(self) -> int:
        """All is there: copies what is reduced. Returns bytes to gather from here."""
        self._own = np.array([payload.nbytes for payload in self.payloads], np.int64)
        for dtype in self.dense:
            self._side_by_side(dtype)
        return self._own.nbytes + int(self._own.sum())

    def _side_by_side(self, dtype: Any) -> None:
        """16-bit and float32 tensors as float32, or float64 ones."""
        alike = [tensor for tensor in self.tensors if _dtype_of_sum(tensor) is dtype]
        size = sum(tensor.size for tensor in alike)
        if self.dense[dtype].size != size:
            self.dense[dtype] = np.empty(size, dtype)
        if alike:
            np.concatenate(alike, out=self.dense[dtype], casting="unsafe")

    def frame(self, counts: list[int], rank: int) -> Array:
        """(sum of counts,) int64: this rank's part is filled, the others have room.

        Args:
            counts: words of each rank.
            rank: this one.
        """
        if self._words.size != sum(counts):
            self._words = np.empty(sum(counts), np.int64)
        start = sum(counts[:rank])
        part = self._words[start : start + counts[rank]]
        np.concatenate(
            [self._own, *(p.view(np.int64) for p in self.payloads)], out=part
        )
        return self._words

    # ---------------------------------------------------------------- when all is there

    def open(self, counts: list[int]) -> None:
        """Find payloads and sums in what has arrived.

        Raises:
            ExchangeError: the sizes that came are not those of these counts.
        """
        self._starts, self._sizes = _unframe(self._words, counts, len(self.payloads))
        self._sums = self._as_started()

    def _as_started(self) -> list[Array]:
        """Each tensor's part of the reduced buffers, as views."""
        taken = dict.fromkeys(self.dense, 0)
        sums = []
        for tensor in self.tensors:
            dtype = _dtype_of_sum(tensor)
            first = taken[dtype]
            taken[dtype] = first + tensor.size
            sums.append(self.dense[dtype][first : taken[dtype]])
        return sums

    def received(self, place: int) -> list[Array]:
        """The payloads of all ranks that were sent at this place, as views."""
        starts, sizes = self._starts[:, place], self._sizes[:, place]
        data = self._words.view(np.uint8)
        places = zip(starts.tolist(), sizes.tolist(), strict=True)
        return [data[start : start + size] for start, size in places]

    def locate(self, places: Sequence[int], sizes: Array) -> tuple[Array, Array] | None:
        """As `Exchange.locate`."""
        if not (self._sizes[:, places] == sizes).all():
            return None
        return self._words.view(np.uint8), self._starts[:, places]

    def sum(self, place: int) -> Array:
        """The sum over ranks of the tensor at this place, float32 or float64."""
        return self._sums[place]


def _dtype_of_sum(tensor: Array) -> Any:
    return np.float64 if tensor.dtype == np.float64 else np.float32


def _unframe(received: Array, counts: list[int], payloads: int) -> tuple[Array, Array]:
    """(ranks, payloads) int64 each: where payloads begin, and their sizes, in bytes."""
    starts = np.empty((len(counts), payloads), np.int64)
    sizes = np.empty_like(starts)
    start = 0
    for rank, count in enumerate(counts):
        own = received[start : start + payloads]
        if payloads > count or int(own.sum()) != (count - payloads) * WORD:
            raise ExchangeError(f"payload sizes do not add up to {count * WORD} bytes")
        first = (start + payloads) * WORD
        sizes[rank], starts[rank] = own, first + np.cumsum(own) - own
        start += count
    return starts, sizes
