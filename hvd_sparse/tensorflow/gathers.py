"""Exchange: where payloads wait while the graph gathers them, which runs by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from hvd_sparse.core.frame import Frame, padded_bytes
from hvd_sparse.core.payload import Payload, Raised
from hvd_sparse.core.received import Received, split

Array = npt.NDArray[Any]


class GraphExchange:
    """Keeps payloads until they leave, and what was gathered until it is received."""

    weight = 1
    uneven = False

    def __init__(self, group: Callable[[], Any], *, padded: bool) -> None:
        """Args: group: returns the process set. padded: ranks choose k themselves."""
        self._group = group
        self._padded = padded
        self._sent: dict[str, Frame] = {}
        self._gathered: dict[str, Array] = {}

    @property
    def rank(self) -> int:
        """This process in the process set."""
        return int(self._group().rank())

    @property
    def size(self) -> int:
        """Processes in the process set."""
        return int(self._group().size())

    def start(self, name: str, payload: Payload | Raised) -> str:
        """It leaves when the graph asks for it."""
        self._sent[name] = Frame([(name, payload)])
        return name

    def outgoing(self, name: str) -> Array:
        """(bytes,) uint8: what the graph is to gather."""
        frame = self._sent[name]
        # a copy in any case: the path reuses the payload's memory
        return frame.bytes(padded_bytes(frame.size) if self._padded else None)

    def deliver(self, name: str, gathered: Array) -> None:
        """What the graph has gathered of all ranks."""
        self._gathered[name] = gathered

    def finish(self, handle: str) -> Sequence[Payload | None]:
        """The payloads of all ranks."""
        gathered, frame = _aligned(self._gathered.pop(handle)), self._sent[handle]
        parts = split(gathered, handle, ranks=self.size, padded=self._padded)
        return Received(frame, parts).payloads(0)

    def locate(self, handles: Sequence[str]) -> None:
        """Each in a tensor of its own."""


def _aligned(buffer: Array) -> Array:
    """At an address that is a multiple of 8."""
    return buffer if buffer.ctypes.data % 8 == 0 else buffer.copy()
