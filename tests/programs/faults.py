"""Rank 1 does something wrong in the middle of a step; run by tests/test_faults.py.

mpirun -np 2 python tests/programs/faults.py FAULT
RANK=0 WORLD_SIZE=2 python tests/programs/faults.py FAULT STORE    # and so on

With a store, a file, ranks are those of torch.distributed, over gloo.
"""

import logging
import os
import signal
import sys
import time
from datetime import timedelta

import numpy as np

import hvd_sparse
import hvd_sparse.mpi
from hvd_sparse.transport.mpi import failure

fault, *store = sys.argv[1:]
if store:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        f"file://{store[0]}",
        timedelta(seconds=10),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    comm, rank = dist.group.WORLD, dist.get_rank()
else:
    from mpi4py import MPI

    comm, rank = MPI.COMM_WORLD, MPI.COMM_WORLD.rank


def make():
    return hvd_sparse.mpi.SparseAllreduce(
        hvd_sparse.TopK(density=0.1), comm=comm, dense=hvd_sparse.Never(), timeout_s=5
    )


if fault == "construct" and rank == 1:
    sys.exit(0)
reduce = make()
gradient = np.ones(100, np.float32)


def say(text):
    """One write a line, so that lines of two ranks do not mix."""
    os.write(2, f"rank {rank}: {text}\n".encode())


def refuse(record):
    """A handler that raises, as one that makes errors of warnings would."""
    raise UserWarning(record.getMessage())


sent_once = reduce.allreduce("layer", gradient).sum()
if rank == 1:
    if fault in ("pause", "unread"):
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "raise":
        raise ZeroDivisionError("in the loss of this rank")
    elif fault == "interrupt":
        raise KeyboardInterrupt
    elif fault == "absent":
        sys.exit(0)
    elif fault == "between":
        reduce.start({"layer": gradient})
        raise ZeroDivisionError("between start and finish")
    elif fault == "several":
        others = [make() for _ in range(5)]
        raise ZeroDivisionError("while it holds six exchanges")
    elif fault == "recover":
        dist.barrier()  # its peer has given up by then
        reduce = make()
    elif fault == "warning":
        time.sleep(1)  # this is the fault: the peer warns, and its warning is an error
elif fault == "several":
    others = [make() for _ in range(5)]
    reduce = others[3]
elif fault == "unread":  # as where a launcher is gone that read what ranks print
    read, write = os.pipe()
    os.close(read)
    sys.stdout = os.fdopen(write, "w")
    sys.stdout.write("waits in a buffer")
elif fault == "warning":
    failure.WARNING_S = 0.2
    logging.getLogger("hvd_sparse").addFilter(refuse)
    try:
        reduce.allreduce("layer", gradient)
    except UserWarning:
        residual = reduce.state_dict()["tensors"]["layer"]["residual"]
        say(f"lost {2 * gradient.sum() - sent_once - residual.sum():g}")
try:
    if fault == "between":
        reduce.allreduce("layer", gradient)
    reduce.allreduce("layer", gradient)
except hvd_sparse.ExchangeError as error:
    say(f"ExchangeError: {error}")
    if fault == "swallow":
        say("goes on")
    if fault == "recover":
        dist.barrier()
        say(f"recovered: {make().allreduce('layer', gradient).sum():g}")
        sys.exit(0)
    raise
say("did not notice")
