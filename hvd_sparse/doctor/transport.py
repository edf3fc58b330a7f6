"""The collectives of this job, whoever started it: Horovod, MPI, or nobody."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.carriers import gather_through
from hvd_sparse.core.costs import Gather
from hvd_sparse.transport.mpi.communicator import LAUNCHER_VARIABLES

Array = npt.NDArray[Any]
DOORS = ("horovod", "mpi", "alone")


@dataclass(frozen=True)
class Transport:
    """What the doctor asks of a door.

    Attributes:
        door: "horovod", "mpi" or "alone".
        rank: this process, in [0, size).
        size: how many ranks there are.
        gather: a rank's bytes to those of all ranks; blocking.
        reduce: sums float32 or float16 over the ranks; blocking.
        carrier: what moves the bytes, for people.
    """

    door: str
    rank: int
    size: int
    gather: Gather
    reduce: Callable[[Array], object]
    carrier: str

    def hosts(self) -> list[str]:
        """Of each rank, the name of its host."""
        name = socket.gethostname().encode()[:64].ljust(64, b"\0")
        every = self.gather(np.frombuffer(bytearray(name), np.uint8))  # torch: writable
        return [part.tobytes().rstrip(b"\0").decode() for part in every]

    def share(self, numbers: list[int] | None) -> list[int] | None:
        """Rank 0's numbers, on every rank."""
        own = np.array([-1 if numbers is None else len(numbers)])
        count = int(self.gather(own.view(np.uint8))[0].view(np.int64)[0])
        if count < 0:
            return None
        own = np.array(numbers if self.rank == 0 else [0] * count, np.int64)
        shared: list[int] = self.gather(own.view(np.uint8))[0].view(np.int64).tolist()
        return shared


def found_door() -> str:
    """Who started this process; horovodrun --mpi looks like mpirun."""
    if "HOROVOD_RANK" in os.environ:
        return "horovod"
    return "mpi" if any(v in os.environ for v in LAUNCHER_VARIABLES) else "alone"


def open_door(door: str) -> Transport:
    """Start what the door needs.

    Raises:
        ImportError: that is not installed; the text says how to install it.
    """
    return {"horovod": _horovod, "mpi": _mpi, "alone": _alone}[door]()


def _alone() -> Transport:
    return Transport("alone", 0, 1, lambda own: [own], lambda own: own, "nobody else")


def _mpi() -> Transport:
    from hvd_sparse.transport.mpi.exchange import MpiExchange

    exchange = MpiExchange(None, timeout_s=60)  # says what is missing
    exchange.free()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD

    def gather(own: Array) -> list[Array]:
        every = np.empty((comm.size, own.size), np.uint8)
        comm.Allgather(np.ascontiguousarray(own), every)
        return list(every)

    def reduce(own: Array) -> None:
        if own.dtype == np.float16:  # MPI has no such type: as many bytes
            own = own.view(np.float32)
        comm.Allreduce(MPI.IN_PLACE, own)

    return Transport("mpi", comm.rank, comm.size, gather, reduce, "MPI")


def _horovod() -> Transport:
    if util.find_spec("torch") is not None:
        import horovod.torch as hvd
        import torch

        as_tensor: Callable[[Any], Any] = torch.from_numpy
    else:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        as_tensor = tf.constant
    hvd.init()

    def reduce(own: Array) -> None:
        name = f"hvd_sparse.doctor.{own.dtype}.{own.size}"
        hvd.allreduce(as_tensor(own), name=name, op=hvd.Sum)

    carrier = "Horovod over Gloo" if hvd.gloo_enabled() else "Horovod over MPI"
    gather = gather_through(hvd, as_tensor, None)
    return Transport("horovod", hvd.rank(), hvd.size(), gather, reduce, carrier)
