"""The last rank does something wrong in the middle of a step; run by test_horovod_*.

horovodrun -np 2 python tests/programs/horovod_faults.py FAULT [FOLDER]
"""

import os
import signal
import sys
import time
from hashlib import blake2b
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import nn

import hvd_sparse.torch as sparse
from hvd_sparse.torch.exchanges import GatheredExchange

fault = sys.argv[1]
hvd.init()
torch.manual_seed(0)
torch.set_num_threads(1)
rank = hvd.rank()  # asked now: after a shutdown Horovod does not know
last = rank == hvd.size() - 1
dense = sparse.WhenCheaper() if fault == "pause-dense" else sparse.Never()
density = 1.0 if fault == "pause-dense" else 0.05


def say(text):
    """One write a line, so that lines of two ranks do not mix."""
    os.write(2, f"rank {rank}: {text}\n".encode())


model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
compression = sparse.SparseCompressor(
    sparse.TopK(density=density),
    named_parameters=model.named_parameters(),
    dense=dense,
    timeout_s=600 if fault in ("before", "after") else 5,
)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    named_parameters=model.named_parameters(),
    compression=compression,
)


def train(steps):
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + rank)
        optimizer.zero_grad()
        x = torch.randn(16, 6, generator=generator)
        model(x).square().sum(1).mean().backward()
        optimizer.step()


def hold_back_numbers():
    """Of the last tensor: its batch has left by then, so payloads arrive everywhere."""
    to_reduce, calls = GatheredExchange.to_reduce, []

    def late(self, handle):
        calls.append(handle)
        if len(calls) == len(list(model.parameters())):
            time.sleep(60)  # this is the fault
        return to_reduce(self, handle)

    GatheredExchange.to_reduce = late


def checkpoint():
    return sparse.checkpoint_path(Path(sys.argv[2]) / "run", hvd.rank(), hvd.size())


def tell_weights():
    """In a file: what a rank prints before it is killed may be lost."""
    digest = blake2b(digest_size=8)
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    (Path(sys.argv[2]) / f"{fault}-{rank}.weights").write_text(digest.hexdigest())


if fault == "before":
    train(range(4))
    state = [model.state_dict(), optimizer.state_dict(), compression.state_dict()]
    torch.save(state, checkpoint())
    train(range(4, 8))
    tell_weights()
    hvd.barrier()
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
    train([8])
elif fault == "after":
    weights, momentum, residuals = torch.load(checkpoint())
    model.load_state_dict(weights)
    optimizer.load_state_dict(momentum)
    compression.load_state_dict(residuals)
    train(range(4, 8))
    tell_weights()
else:
    hvd.barrier()  # or a deadline is that of a rank that starts late
    train([0])
    hvd.barrier()  # or rank 0 may still wait for a part of that step
    if last:
        if fault.startswith("pause"):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault in ("absent", "frozen"):
            time.sleep(60)  # this is the fault: it does something else for too long
        elif fault == "half":
            hold_back_numbers()
    try:
        if fault == "frozen":  # nothing is sent, and Horovod waits all the same
            model.requires_grad_(requires_grad=False)
            optimizer.zero_grad()
            optimizer.step()
        else:
            train([1])
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
        raise
    say("did not notice")
