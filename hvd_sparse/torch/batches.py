"""Batches: tensors whose payloads share one of Horovod's allgathers."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy.typing as npt

from hvd_sparse.core.contracts import Located
from hvd_sparse.core.frame import Frame, padded_bytes
from hvd_sparse.core.payload import Payload, Raised
from hvd_sparse.core.received import Received, split

Array = npt.NDArray[Any]


class Batch:
    """Tensors whose payloads share an allgather, which costs more than its bytes.

    The members are fixed and the same on every rank, or ranks whose hooks fire in
    another order would gather different things under one name.
    """

    def __init__(self, name: str, members: Iterable[str]) -> None:
        """Empty; `name` is that of the allgather."""
        self.name = name
        self.members = frozenset(members)
        self.clear()

    def clear(self) -> None:
        """Empty again."""
        self.present: set[str] = set()  # some of them may have no payload yet
        self.payloads: dict[str, Payload | Raised] = {}
        self.frame: Frame | None = None  # once it leaves
        self.handle: int | None = None

    @property
    def complete(self) -> bool:
        """Whether all members have a payload."""
        return len(self.payloads) == len(self.members)

    @property
    def awaited(self) -> list[str]:
        """Once all members are present, those of them without a payload."""
        if len(self.present) < len(self.members):
            return []
        return sorted(self.present - self.payloads.keys())

    def joined(self, *, padded: bool) -> Array:
        """(bytes,) uint8: the payloads in the order of their names, and padding."""
        self.frame = Frame(sorted(self.payloads.items()))
        return self.frame.bytes(padded_bytes(self.frame.size) if padded else None)


class Arrival:
    """What all ranks sent in one batch."""

    def __init__(self, frame: Frame, buffer: Array, *, padded: bool) -> None:
        """Args: frame: this rank's; buffer: the frames of all of them, side by side."""
        self.names = frame.names
        self._places = {name: place for place, name in enumerate(frame.names)}
        self._frame = frame
        self._buffer = buffer
        self._padded = padded
        self._received: Received | None = None

    def received(self, ranks: int) -> Received:
        """Raises PayloadError unless all ranks agree."""
        if self._received is None:
            first, padded = self.names[0], self._padded
            parts = split(self._buffer, first, ranks=ranks, padded=padded)
            self._received = Received(self._frame, parts)
        return self._received

    def payloads(self, name: str, ranks: int) -> Sequence[Payload | None]:
        """Those of one tensor, rank 0 first."""
        return self.received(ranks).payloads(self._places[name])

    def locate(self, names: Sequence[str], ranks: int) -> Located | None:
        """As of `Exchange`."""
        received = self.received(ranks)
        if not self._places.keys() >= set(names):
            return None
        return received.locate([self._places[name] for name in names])
