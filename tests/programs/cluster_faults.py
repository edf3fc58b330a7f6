"""One rank that trains until it is told to stop; tests/cluster does it harm meanwhile.

mpirun -np 2 python tests/programs/cluster_faults.py mpi FOLDER
horovodrun -np 2 python tests/programs/cluster_faults.py horovod FOLDER

FOLDER/rank-N gets this rank's process number, and a line after each step. When the
first rank finds FOLDER/stop, all end after the same step.
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn

import hvd_sparse.torch as sparse

TIMEOUT_S = 5

door, folder = sys.argv[1], Path(sys.argv[2])
torch.manual_seed(0)
torch.set_num_threads(1)


class Network(nn.Module):
    """With one element more, whose gradient tells all ranks that one wants to stop."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 8))
        self.stop = nn.Parameter(torch.zeros(1))

    def forward(self, x, stop):
        return self.layers(x).square().mean() + self.stop.sum() * stop


model = Network()
options = {
    "named_parameters": model.named_parameters(),
    "dense": sparse.Never(),
    "timeout_s": TIMEOUT_S,
}
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
if door == "mpi":
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    optimizer = sparse.DistributedOptimizer(optimizer, sparse.TopK(0.1), **options)
else:
    import horovod.torch as hvd

    hvd.init()
    rank = hvd.rank()
    compression = sparse.SparseCompressor(sparse.TopK(0.1), **options)
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compression
    )


# so that a deadline is not that of a rank that starts late
if door == "mpi":
    MPI.COMM_WORLD.Barrier()
else:
    hvd.barrier()


def say(text):
    """One write a line, so that lines of two ranks do not mix."""
    os.write(2, f"rank {rank}: {text}\n".encode())


with (folder / f"rank-{rank}").open("w", buffering=1) as progress:
    print(os.getpid(), file=progress)
    step, stopping = 0, False
    while not stopping:
        optimizer.zero_grad()
        stop = rank == 0 and (folder / "stop").exists()
        generator = torch.Generator().manual_seed(1000 * step + rank)
        x = torch.randn(16, 64, generator=generator)
        try:
            model(x, float(stop)).backward()
            optimizer.step()
        except Exception as error:
            say(f"{type(error).__name__}: {error}")
            raise
        stopping = bool(model.stop.grad)
        step += 1
        print(step, file=progress)
say("stopped as told")
