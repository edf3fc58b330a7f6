"""Exchange: where payloads wait while the graph gathers them, which runs by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.core.contracts import PayloadError
from hvd_sparse.core.payload import padded_bytes, split

Array = npt.NDArray[Any]


class GraphExchange:
    """Keeps payloads until they leave, and what was gathered until it is received."""

    weight = 1
    uneven = False

    def __init__(self, group: Callable[[], Any], *, padded: bool) -> None:
        """Args: group: returns the process set. padded: ranks choose k themselves."""
        self._group = group
        self._padded = padded
        self._sent: dict[str, Array] = {}
        self._gathered: dict[str, Array] = {}

    @property
    def rank(self) -> int:
        """This process in the process set."""
        return int(self._group().rank())

    @property
    def size(self) -> int:
        """Processes in the process set."""
        return int(self._group().size())

    def start(self, name: str, payload: Array) -> str:
        """It leaves when the graph asks for it."""
        self._sent[name] = payload
        return name

    def outgoing(self, name: str) -> Array:
        """(bytes,) uint8: what the graph is to gather."""
        payload = self._sent[name]
        missing = padded_bytes(payload.size) - payload.size if self._padded else 0
        # a copy in any case: the path reuses the payload's memory
        outgoing: Array = np.concatenate([payload, np.zeros(missing, np.uint8)])
        return outgoing

    def deliver(self, name: str, gathered: Array) -> None:
        """What the graph has gathered of all ranks."""
        self._gathered[name] = gathered

    def finish(self, handle: str) -> list[Array]:
        """The payloads of all ranks."""
        gathered = _aligned(self._gathered.pop(handle))
        payloads = split(gathered, padded=self._padded)
        if len(payloads) != self.size:
            raise PayloadError(f"{len(payloads)} payloads, expected {self.size}")
        return payloads

    def locate(self, handles: Sequence[str], sizes: Array) -> None:
        """Each in a tensor of its own."""

    def start_dense(self, name: str, gradient: Array) -> Any:
        """Not called: Horovod reduces dense tensors itself."""
        raise NotImplementedError("Horovod reduces dense tensors itself")

    def finish_dense(self, handle: Any) -> tuple[Array, int]:
        """Not called either."""
        raise NotImplementedError("Horovod reduces dense tensors itself")


def _aligned(buffer: Array) -> Array:
    """At an address that is a multiple of 8."""
    return buffer if buffer.ctypes.data % 8 == 0 else buffer.copy()
