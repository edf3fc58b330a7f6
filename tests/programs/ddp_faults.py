"""A rank does something wrong in a step of DDP; run by tests/test_process_group.py.

RANK=0 WORLD_SIZE=2 python tests/programs/ddp_faults.py FAULT STORE    # and so on

The store is a file.
"""

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import hvd_sparse.torch as sparse

fault, store = sys.argv[1:]
rank = int(os.environ["RANK"])
dist.init_process_group(
    "gloo",
    f"file://{store}",
    timedelta(seconds=8 if fault == "group" else 30),
    rank=rank,
    world_size=int(os.environ["WORLD_SIZE"]),
)


class Raising(sparse.TopK):
    """In the middle bucket of the third step."""

    def select(self, residual, gradient, k, step):
        if rank == 1 and step == 2 and gradient.size == 300:
            raise MemoryError("in a sparsifier")
        return super().select(residual, gradient, k, step)


class Faulty(torch.autograd.Function):
    """Goes wrong in the backward pass, when a bucket is on its way already."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if rank == (fault != "leave") and step == 2:
            go_wrong()
        return gradient


def go_wrong():
    if fault in ("pause", "group"):
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault in ("raise", "leave"):
        raise ZeroDivisionError("in the backward pass")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(n, n) for n in (20, 300, 40))
        self.sizes = (20, 300, 40)

    def forward(self, x):
        for part, size in zip(self.parts, self.sizes, strict=True):
            x = part(x[:, :1].expand(-1, size))
            x = Faulty.apply(x) if size == 300 else x
        return x


def say(text):
    """One write a line, so that lines of two ranks do not mix."""
    os.write(2, f"rank {rank}: {text}\n".encode())


torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(Net(), bucket_cap_mb=0.0001)
chosen = Raising if fault == "select" else sparse.TopK
density = 0.2 if fault == "differ" and rank == 1 else 0.1
state = sparse.register(
    model,
    chosen(density=density),
    dense=sparse.Never(),
    timeout_s=60 if fault in ("group", "leave") else 5,
)
for step in range(3):  # DDP itself communicates before the second
    if fault == "absent" and rank == 1 and step == 2:
        sys.exit(0)
    if fault == "leave" and rank == 1 and step == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    loss = model(torch.ones(2, 1)).square().sum()
    try:
        loss.backward()
    except sparse.ExchangeError as error:
        say(f"ExchangeError: {error}")
        raise
say("did not notice")
