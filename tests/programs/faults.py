"""Rank 1 does something wrong in the middle of a step; run by tests/test_faults.py.

mpirun -np 2 python tests/programs/faults.py FAULT
"""

import os
import signal
import sys
import warnings

import numpy as np
from mpi4py import MPI

import hvd_sparse
import hvd_sparse.mpi

comm = MPI.COMM_WORLD
fault = sys.argv[1]
reduce = hvd_sparse.mpi.SparseAllreduce(
    hvd_sparse.TopK(density=0.1), comm=comm, dense=hvd_sparse.Never(), timeout_s=5
)
gradient = np.ones(100, np.float32)


def say(text):
    """One write a line, so that lines of two ranks do not mix."""
    os.write(2, f"rank {comm.rank}: {text}\n".encode())


reduce.allreduce("layer", gradient)
if comm.rank == 1:
    if fault == "pause":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "raise":
        raise ZeroDivisionError("in the loss of this rank")
    elif fault == "absent":
        sys.exit(0)
try:
    reduce.allreduce("layer", gradient)
except hvd_sparse.ExchangeError as error:
    say(f"ExchangeError: {error}")
    if fault == "swallow":
        say("goes on")
    raise
say("did not notice")
warnings.resetwarnings()
