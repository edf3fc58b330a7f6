"""One worker of an elastic job; started by tests/test_elastic.py.

horovodrun --gloo -np 3 --min-np 2 --host-discovery-script HOSTS \
    python tests/programs/elastic_torch.py FACTS FAULT SIZES [BATCHES]

FAULT in the middle of a backward pass: "kill", the worker that started as rank 0 kills
itself; "late", rank 1 comes late; or "none". With "forget" the state does not have the
compressor. Workers train until the job has had all SIZES, one after the other, and so
many BATCHES. Facts go to a file, a JSON object a line: lines of several workers do not
mix there.
"""

import hashlib
import json
import os
import signal
import sys
import time
from functools import partial

import horovod.torch as hvd
import torch

import hvd_sparse.torch as sparse

COMMIT_EVERY = 5
DEATH = 12  # the batch: two more since the last commit
LATE = 7
LONGER = 10  # batches that show that training goes on

facts_file, fault = sys.argv[1:3]
plan = tuple(int(size) for size in sys.argv[3].split(","))
batches = int(sys.argv[4]) if len(sys.argv) > 4 else 0

hvd.init()
# Gloo's time limit is short at first, since some survivors notice a death by it alone.
# From now on it also holds for the time that a newcomer takes to start.
os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = "60"
doomed = fault == "kill" and hvd.rank() == 0  # newcomers never start as rank 0
late = fault == "late" and hvd.rank() == 1
torch.manual_seed(hvd.rank())  # rank 0's weights must arrive at all others
model = torch.nn.Sequential(
    torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)
)
compression = sparse.SparseCompressor(
    sparse.TopK(density=0.1),
    dense=sparse.Never(),
    timeout_s=5 if fault == "late" else 600,
)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
    named_parameters=model.named_parameters(),
    compression=compression,
)
covered = {} if fault == "forget" else {"compression": compression}
state = hvd.elastic.TorchState(
    model=model, optimizer=optimizer, batch=0, sizes=(), **covered
)
teacher = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)) / 4
own_gradients = {}
for name, parameter in model.named_parameters():
    keep = partial(own_gradients.__setitem__, name)
    parameter.register_hook(lambda gradient, keep=keep: keep(gradient.clone()))
facts = {}  # of this process, for the next line


def digest(tensors):
    every = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        every.update(name.encode() + tensor.detach().numpy().tobytes())
    return every.hexdigest()


def residuals():
    """Of all parameters; zeros where there is none."""
    saved = compression.state_dict()["tensors"]
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    kept = {name: tensor["residual"] for name, tensor in saved.items()}
    return {**zeros, **{name: r for name, r in kept.items() if r is not None}}


def tell(event):
    saved = compression.state_dict()["tensors"]
    facts.update(
        event=event,
        pid=os.getpid(),
        rank=hvd.rank(),
        size=hvd.size(),
        batch=state.batch,
        steps={name: tensor["step"] for name, tensor in saved.items()},
        residuals=digest(residuals()),
        largest=max(residual.abs().max().item() for residual in residuals().values()),
        weights=digest(model.state_dict()),
        loss=loss_of(model, *examples(-1)).item(),
    )
    file = os.open(facts_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, json.dumps(facts).encode() + b"\n")
    os.close(file)


def examples(seed):
    inputs = torch.randn(32, 16, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs @ teacher


def loss_of(network, inputs, wanted):
    return torch.nn.functional.mse_loss(network(inputs), wanted)


def go_wrong(gradient):
    """The last layer's gradients are on their way by now, the first one's are not."""
    global late
    del gradient
    if doomed and state.batch == DEATH:
        tell("dies")
        os.kill(os.getpid(), signal.SIGKILL)
    if late and state.batch == LATE:
        late = False
        # nobody else takes part: over when its peers have shut Horovod down
        handle = hvd.allreduce_async(torch.zeros(1), name="late")
        while not hvd.poll(handle):
            time.sleep(0.05)


def step():
    optimizer.zero_grad()
    inputs, wanted = examples(1000 * state.batch + hvd.rank())
    hidden = model[:2](inputs)
    hidden.register_hook(go_wrong)
    loss_of(model[2], hidden, wanted).backward()
    optimizer.step()
    state.batch += 1


def lost_in(step):
    """By how much gradients and old residuals differ from what was sent and remains."""
    before = residuals()
    step()
    after, lost = residuals(), 0.0
    for name, parameter in model.named_parameters():
        left = before[name] + own_gradients[name] - after[name]
        sent = hvd.allreduce(left, op=hvd.Sum, name=f"sent.{name}")
        difference = sent - hvd.size() * parameter.grad
        lost = max(lost, difference.abs().max().item())
    return lost


@hvd.elastic.run
def train(state):
    tell("enters")
    if state.sizes[-1:] != (hvd.size(),):
        state.sizes = (*state.sizes, hvd.size())
    enough = max(state.batch + LONGER, batches)
    facts["lost"] = lost_in(step)
    while state.sizes != plan or state.batch < enough:
        if state.batch >= enough:
            time.sleep(0.01)  # leaves the cores to a newcomer that starts
        step()
        facts["latest"] = digest(residuals())
        if state.batch == enough:
            tell("trains on")
        if state.batch % COMMIT_EVERY == 0:
            facts["committed"] = facts["latest"]
            state.commit()


train(state)
tell("ends")
