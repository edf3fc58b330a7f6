"""Rank 1 leaves a broadcast to rank 0; run by tests/test_broadcast.py.

mpirun -np 2 python tests/programs/broadcast_faults.py FAULT
"""

import os
import signal
import sys

import numpy as np
from mpi4py import MPI

from hvd_sparse.transport.mpi.broadcast import Broadcast, Described

comm = MPI.COMM_WORLD
fault = sys.argv[1]

if fault == "absent" and comm.rank == 1:
    sys.exit(0)
data = np.full(100_000_000, comm.rank, np.uint8)
with Broadcast(root=1, comm=comm, timeout_s=5) as broadcast:
    broadcast.agree([Described("layer", data.shape, "uint8")])
    broadcast.send("layer", data[:50_000_000])
    broadcast.wait("layer")
    assert (data[:50_000_000] == 1).all()
    if comm.rank == 1:
        if fault == "pause":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault == "raise":
            raise ZeroDivisionError("in the middle")
    broadcast.send("layer", data[50_000_000:])
    broadcast.wait("layer")
