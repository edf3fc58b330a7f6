"""Counts what moves in exchanges of several sizes; run by tests/test_scale.py.

mpirun -np 4 python tests/programs/count_bytes.py
"""

import json
import os

import numpy as np
from mpi4py import MPI

import hvd_sparse
import hvd_sparse.mpi

SIZES, DENSITY, STEPS = (1000, 4321, 20_000), 0.02, 3

comm = MPI.COMM_WORLD
top = hvd_sparse.TopK(density=DENSITY)
reduce = hvd_sparse.mpi.SparseAllreduce(top, comm=comm, dense=hvd_sparse.Never())
rng = np.random.default_rng(comm.rank)
with reduce:
    for _ in range(STEPS):
        gradients = {str(n): rng.standard_normal(n).astype(np.float32) for n in SIZES}
        reduce.grouped_allreduce(gradients)
    touched = {}
    for n in SIZES:  # of random gradients, in a first step: the union of the ranks
        fresh = hvd_sparse.mpi.SparseAllreduce(top, comm=comm, dense=hvd_sparse.Never())
        with fresh:
            mean = fresh.allreduce("g", rng.standard_normal(n).astype(np.float32))
        touched[str(n)] = int(np.count_nonzero(mean))
    found = {
        name: (tensor.sent_bytes, tensor.received_bytes, touched[name])
        for name, tensor in reduce.traffic.tensors.items()
    }
os.write(1, (json.dumps([comm.size, found]) + "\n").encode())
