"""A communicator that counts what is asked of MPI."""

from collections import Counter
from typing import Any, ClassVar

from mpi4py import MPI


def counted(comm: MPI.Intracomm) -> Any:
    """The same communicator; `calls` of it and of its duplicates, by name.

    An exchange begins with one Iallgather, of headers; payloads move by Iallgatherv,
    dense tensors by Iallreduce.
    """

    class Counted(MPI.Intracomm):
        calls: ClassVar = Counter[str]()

        def __getattribute__(self, name: str) -> Any:
            Counted.calls[name] += 1
            return super().__getattribute__(name)

    return Counted(comm)
