"""What a step sends and receives, as it lies in memory.

What a rank gathers are words of 8 bytes: the frame of its payloads, if there are any,
then the sizes of its blobs, then these. Dense tensors travel side by side, one buffer a
dtype. Nothing in this file communicates.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import ExchangeError, Located
from hvd_sparse.core.frame import Frame
from hvd_sparse.core.payload import Payload
from hvd_sparse.core.received import Received, read_head

Array = npt.NDArray[Any]

WORD = 8


class Buffers:
    """Of one rank; filled from step to step, since fresh pages cost more than copying.

    Attributes:
        payloads: to be sent, and their names.
        blobs: to be sent: uint8, multiples of 8 bytes.
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
        self.payloads: list[tuple[str, Payload]] = []
        self.blobs: list[Array] = []
        self.tensors: list[Array] = []
        self._frame: Frame | None = None
        self._received: Received | None = None
        self._blobs: list[list[Array]] = []
        self._sums: list[Array] = []

    # ------------------------------------------------------------------- on the way out

    def add_dense(self, gradient: Any) -> int:
        """To be reduced: (n,), on host or device. Returns its place."""
        if not isinstance(gradient, np.ndarray):  # MPI reduces in host memory
            narrow = gradient.dtype.itemsize < 4
            gradient = (gradient.float() if narrow else gradient).cpu().numpy()
        self.tensors.append(gradient)
        return len(self.tensors) - 1

    def close(self) -> int:
        """All is there: copies what is reduced. Returns bytes to gather from here."""
        self._frame = Frame(self.payloads) if self.payloads else None
        self._own = np.array([blob.nbytes for blob in self.blobs], np.int64)
        for dtype in self.dense:
            self._side_by_side(dtype)
        framed = self._frame.size if self._frame else 0
        return framed + self._own.nbytes + int(self._own.sum())

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
        if self._frame:
            self._frame.write(part.view(np.uint8)[: self._frame.size])
            part = part[self._frame.size // WORD :]
        if self.blobs:
            blobs = (blob.view(np.int64) for blob in self.blobs)
            np.concatenate([self._own, *blobs], out=part)
        return self._words

    # ---------------------------------------------------------------- when all is there

    def open(self, counts: list[int]) -> None:
        """Find payloads, blobs and sums in what has arrived.

        Raises:
            ExchangeError: a rank disagrees, or sizes are not those of these counts.
        """
        ends = np.cumsum(counts).tolist()
        parts = [
            self._words[end - count : end]
            for count, end in zip(counts, ends, strict=True)
        ]
        if self._frame:
            name, frames, rest = self.payloads[0][0], [], []
            for rank, part in enumerate(parts):
                data = part.view(np.uint8)
                words = read_head(data, f"{name}: rank {rank}").words
                frames.append(data[: words * WORD])
                rest.append(part[words:])
            self._received, parts = Received(self._frame, frames), rest
        self._blobs = [_unpack(part, len(self.blobs)) for part in parts]
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

    @property
    def received(self) -> Received:
        """The payloads of all ranks."""
        if self._received is None:
            raise IndexError("no payload has come")
        return self._received

    def locate(self, places: Sequence[int]) -> Located | None:
        """As `Exchange.locate`."""
        return self.received.locate(places)

    def gathered(self, place: int) -> list[Array]:
        """The blobs of all ranks that were sent at this place, as views."""
        return [blobs[place] for blobs in self._blobs]

    def sum(self, place: int) -> Array:
        """The sum over ranks of the tensor at this place, float32 or float64."""
        return self._sums[place]


def _dtype_of_sum(tensor: Array) -> Any:
    return np.float64 if tensor.dtype == np.float64 else np.float32


def _unpack(part: Array, count: int) -> list[Array]:
    """(bytes,) uint8 each: the blobs that follow their sizes in these words."""
    sizes = part[:count].tolist()
    whole = count <= part.size and sum(sizes) == (part.size - count) * WORD
    if not whole or min(sizes, default=0) < 0:
        raise ExchangeError(f"sizes do not add up to {part.nbytes} bytes")
    data, starts = part[count:].view(np.uint8), [0, *accumulate(sizes)]
    return [data[start:end] for start, end in pairwise(starts)]
