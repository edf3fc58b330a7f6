"""Tapes that are made anew in every step share what they keep.

A training loop may make its tape inside the step, as loops under Horovod do. Such tapes
mean one another by the same communicator and the same configuration. What they share is
attached to the communicator, as MPI has it (an attribute), and goes with it; residuals
in it belong to variables, so that tapes of different models do not meet.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from hvd_sparse.transport.mpi.communicator import communicator_of

Store = TypeVar("Store")


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


class _Attached:
    """What is kept with a communicator."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # of each its own: ranks may be threads
        self.stores: list[_Shared] = []


def _attached(comm: Any) -> _Attached:
    attributes = communicator_of(comm).attributes
    found: _Attached = attributes.setdefault("tapes", _Attached())
    return found


def join(comm: Any, configuration: Configuration, make: Callable[[], Store]) -> Store:
    """The store of this communicator and configuration, made if there is none.

    Args:
        comm: as of SparseAllreduce.
        configuration: what makes two stores one.
        make: collective over comm.
    """
    attached = _attached(comm)
    with attached.lock:
        for shared in attached.stores:
            if shared.configuration == configuration:
                break
        else:
            shared = _Shared(configuration, make())
            attached.stores.append(shared)
        shared.users += 1
        store: Store = shared.store
        return store


def leave(comm: Any, store: Any) -> bool:
    """One user fewer; returns whether it was the last, and the store is nobody's."""
    attached = _attached(comm)
    with attached.lock:
        for shared in attached.stores:
            if shared.store is store:
                shared.users -= 1
                if not shared.users:
                    attached.stores.remove(shared)
                return not shared.users
    return False
