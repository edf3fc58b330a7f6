"""Tapes that are made anew in every step share what they keep.

A training loop may make its tape inside the step, as loops under Horovod do. Such tapes
mean one another by the same communicator and the same configuration. What they share is
attached to the communicator, as MPI has it (an attribute), and goes with it; residuals
in it belong to variables, so that tapes of different models do not meet.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

Store = TypeVar("Store")

_LOCK = threading.Lock()


class Configuration(NamedTuple):
    """What tapes must have in common to share.

    Attributes:
        kind: class of the communicator: a subclass may do more than MPI's.
        sparsifier: as ranks agree on it.
        op: Average or Sum.
        options: the others of a SparseAllreduce.
    """

    kind: type
    sparsifier: str
    op: int
    options: str


class _Shared:
    def __init__(self, configuration: Configuration, store: Any) -> None:
        self.configuration = configuration
        self.store = store
        self.users = 0


def join(comm: Any, configuration: Configuration, make: Callable[[], Store]) -> Store:
    """The store of this communicator and configuration, made if there is none.

    Args:
        comm: an mpi4py communicator.
        configuration: what makes two stores one.
        make: collective over comm.
    """
    with _LOCK:
        stores: list[_Shared] = comm.Get_attr(_keyval()) or []
        for shared in stores:
            if shared.configuration == configuration:
                break
        else:
            shared = _Shared(configuration, make())
            comm.Set_attr(_keyval(), [*stores, shared])
        shared.users += 1
        store: Store = shared.store
        return store


def leave(comm: Any, store: Any) -> bool:
    """One user fewer; returns whether it was the last, and the store is nobody's."""
    with _LOCK:
        stores: list[_Shared] = comm.Get_attr(_keyval()) or []
        for shared in stores:
            if shared.store is store:
                shared.users -= 1
                if not shared.users:
                    rest = [other for other in stores if other is not shared]
                    comm.Set_attr(_keyval(), rest)
                return not shared.users
    return False


@cache
def _keyval() -> int:
    from mpi4py import MPI

    return int(MPI.Comm.Create_keyval())
