"""Counts what moves in exchanges of several sizes; run by tests/test_rings.py.

mpirun -np 4 python tests/programs/count_bytes.py
"""

import json
import os

import numpy as np
from mpi4py import MPI

import hvd_sparse
import hvd_sparse.mpi

SIZES, DENSITY, STEPS = (1000, 4321, 20_000), 0.02, 3
SCHEMES = (hvd_sparse.TopK(DENSITY), hvd_sparse.SignTopK(DENSITY))

comm = MPI.COMM_WORLD
rng = np.random.default_rng(comm.rank)


def exchange_of(scheme):
    return hvd_sparse.mpi.SparseAllreduce(scheme, comm=comm, dense=hvd_sparse.Never())


def counted(scheme):
    """Bytes sent and received of each size, alone, in all steps."""
    with exchange_of(scheme) as reduce:
        for _ in range(STEPS):
            for n in SIZES:
                reduce.allreduce(str(n), rng.standard_normal(n).astype(np.float32))
        return {
            name: (tensor.sent_bytes, tensor.received_bytes)
            for name, tensor in reduce.traffic.tensors.items()
        }


def union(n):
    """Elements that some rank sends, of random gradients in a first step."""
    with exchange_of(SCHEMES[0]) as reduce:
        mean = reduce.allreduce("g", rng.standard_normal(n).astype(np.float32))
    return int(np.count_nonzero(mean))


found = {
    "ranks": comm.size,
    "bytes": {type(scheme).__name__: counted(scheme) for scheme in SCHEMES},
    "unions": {str(n): union(n) for n in SIZES},
}
os.write(1, (json.dumps(found) + "\n").encode())
