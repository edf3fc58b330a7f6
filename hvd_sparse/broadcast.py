"""Bytes of one rank to all ranks, over MPI: to start alike."""

from typing import Any

import numpy as np

from hvd_sparse.core.contracts import ExchangeError
from hvd_sparse.mpi import Blob, SparseAllreduce


class Broadcast:
    """Bytes of one rank to all, once all have said that they expect the same."""

    def __init__(self, root: int, comm: Any, timeout_s: float) -> None:
        """Collective over comm, as is every call.

        Raises:
            ValueError: root is no rank of comm.
        """
        self._reduce = SparseAllreduce(_NoTensor(), comm=comm, timeout_s=timeout_s)
        self._root = root
        if not 0 <= root < self._reduce.size:
            raise ValueError(f"root must be in [0, {self._reduce.size}), got {root}")

    def __enter__(self) -> "Broadcast":
        """Close at the end of a with block, unless it ends by an exception."""
        return self

    def __exit__(self, *error: object) -> None:
        """See SparseAllreduce."""
        self._reduce.__exit__(*error)

    def __call__(self, data: bytes, described: str) -> bytes:
        """The root's data, once all have described theirs in the same words.

        Raises:
            ExchangeError: a peer described something else, or did not arrive in time.
        """
        text = f"root {self._root} and {described}".encode()
        told = self._gather("description", text)
        for rank, theirs in enumerate(told):
            if theirs != told[self._root]:
                raise ExchangeError(
                    f"broadcast: rank {rank} has {theirs.decode()}, expected "
                    f"{told[self._root].decode()}"
                )
        own = data if self._reduce.rank == self._root else b""
        return self._gather("broadcast", own)[self._root]

    def _gather(self, name: str, data: bytes) -> list[bytes]:
        size = np.array([len(data)], np.int64).view(np.uint8)
        body = np.frombuffer(data, np.uint8)
        padding = np.zeros(-len(data) % 8, np.uint8)
        blob = Blob(np.concatenate([size, body, padding]))
        self._reduce.start({}, blobs={name: blob})
        self._reduce.finish()
        blobs = self._reduce.gathered[name]
        return [b[8 : 8 + int(b[:8].view(np.int64)[0])].tobytes() for b in blobs]


class _NoTensor:
    """Stands where only bytes are gathered."""

    def select(self, residual: Any, gradient: Any, k: int, step: int) -> Any:
        raise NotImplementedError
