"""Prints how far one warm step raises the peak of each rank; see test_memory_use.py.

    mpirun -np 4 python tests/programs/memory_use.py ELEMENTS "TopK(density=0.001)"

One line a rank: bytes by which the peak of the step exceeds what was resident before it
(gradient, residual and out among it), and bytes of all ranks' payloads.
"""

import os
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

import hvd_sparse
import hvd_sparse.mpi


def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if which in line)


def peak_begins_here():
    Path("/proc/self/clear_refs").write_text("5")


comm = MPI.COMM_WORLD
n, sparsifier = int(sys.argv[1]), eval(f"hvd_sparse.{sys.argv[2]}")
reduce = hvd_sparse.mpi.SparseAllreduce(
    sparsifier, comm=comm, dense=hvd_sparse.Never(), timeout_s=60
)
gradient = np.random.default_rng(comm.rank).standard_normal(n, np.float32)
out = np.full(n, 7, np.float32)
traffic = reduce.traffic


def step():
    """Bytes by which it raised the peak, and bytes that it moved."""
    moved = traffic.sent_bytes + traffic.received_bytes
    before = resident("VmRSS")
    peak_begins_here()
    reduce.allreduce("w", gradient, out=out)
    grown = resident("VmHWM") - before
    np.negative(gradient, out=gradient)  # another gradient, in place
    return grown, traffic.sent_bytes + traffic.received_bytes - moved


for _ in range(4):  # warm: everything is compiled, and all pages are there
    step()
# the median of many: a system short of memory takes cold pages, which then come back
grown, moved = sorted(step() for _ in range(21))[10]
assert traffic.tensors["w"].route == "sparse"
os.write(1, f"{grown} {moved}\n".encode())
reduce.close()
