"""Exchange: where payloads wait while the graph gathers them, which runs by itself."""

import os
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from hvd_sparse.core.frame import Frame, padded_bytes
from hvd_sparse.core.payload import Payload, Raised
from hvd_sparse.core.received import Received, split
from hvd_sparse.tensorflow.names import collective

Array = npt.NDArray[Any]
Tensor = Any  # tf.Tensor: TensorFlow has no types


def horovod() -> Any:
    """horovod.tensorflow, imported at first use."""
    try:
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise ImportError(
            "SparseCompressor needs Horovod with TensorFlow: launch/build-horovod "
            "builds it; without Horovod use hvd_sparse.tensorflow.DistributedOptimizer"
        ) from error
    return hvd


class GraphExchange:
    """Keeps payloads until they leave, and what was gathered until it is received."""

    weight = 1
    uneven = False

    def __init__(self, process_set: Any, prefix: str, *, padded: bool) -> None:
        """Nothing has left.

        Args:
            process_set: Horovod's; None for all ranks.
            prefix: of the names of collectives.
            padded: ranks choose k themselves.
        """
        self._process_set = process_set
        self._prefix = prefix
        self._padded = padded
        self._sent: dict[str, Frame] = {}
        self._gathered: dict[str, Array] = {}

    @property
    def group(self) -> Any:
        """The process set."""
        if self._process_set is None:
            return horovod().global_process_set
        return self._process_set

    @property
    def rank(self) -> int:
        """This process in the process set."""
        return int(self.group.rank())

    @property
    def size(self) -> int:
        """Processes in the process set."""
        return int(self.group.size())

    @property
    def certain(self) -> bool:
        """Whether a graph gathers whenever it runs: Horovod may decide when it does."""
        elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
        return not elastic and self.group.included() and self.size > 1

    def gather(self, name: str, payload: Tensor) -> Tensor:
        """Build, in a graph, the exchange of what is outgoing."""
        return horovod().allgather(
            payload,
            name=f"HorovodAllgather.{self._prefix}.{collective(name)}",
            ignore_name_scope=True,
            process_set=self.group,
        )

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
