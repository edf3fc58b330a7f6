"""Prints how far a broadcast raises the peak of each rank; see tests/test_broadcast.py.

    mpirun -np 2 python tests/programs/broadcast_memory.py parameters

One line a rank: bytes by which the peak exceeds what was resident before, in units of
the largest tensor. Resident are the model, and the state of an optimizer.
"""

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
WIDTH, LAYERS = 1448, 6  # a weight of 8 MiB


def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if which in line)


def peak_begins_here():
    Path("/proc/self/clear_refs").write_text("5")


def model_of(width):
    import torch

    torch.manual_seed(comm.rank)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(LAYERS)))
    if comm.rank:  # laid out otherwise than the root's: it must go through a buffer
        model[3].weight.data = model[3].weight.data.t()
    return model


def parameters(width):
    import hvd_sparse.torch as sparse

    model = model_of(width)
    return lambda: sparse.broadcast_parameters(model.state_dict(), comm=comm)


def optimizer_state(width):
    import torch

    import hvd_sparse.torch as sparse

    model = model_of(width)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return lambda: sparse.broadcast_optimizer_state(optimizer, comm=comm)


def variables(width):
    import tensorflow as tf

    import hvd_sparse.tensorflow as sparse

    numbers = np.random.default_rng(comm.rank)
    variables = [
        tf.Variable(numbers.standard_normal((width, width), np.float32))
        for _ in range(LAYERS)
    ]
    return lambda: sparse.broadcast_variables(variables, comm=comm)


# What is freed goes back at once: what malloc happens to keep would count as resident
# before, and hide what a broadcast takes.
M_MMAP_THRESHOLD = -3
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)

prepare = {f.__name__: f for f in (parameters, optimizer_state, variables)}[sys.argv[1]]
prepare(WIDTH)()  # everything is imported; MPI and TensorFlow have what they keep
run = prepare(WIDTH)
before = resident("VmRSS")
peak_begins_here()
run()
grown = resident("VmHWM") - before
os.write(1, f"{grown / (4 * WIDTH * WIDTH):.3f}\n".encode())
