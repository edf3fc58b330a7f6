"""What broadcast_parameters costs, as a multiple of MPI's Bcast of as many bytes.

    mpirun -np 2 python benchmarks/broadcast.py [--rounds N] [--json FILE]

All take turns in one run; the time of each is the median of its rounds, that of the
slowest rank. Bcast sends the same memory tensor by tensor; beside it, all bytes as one
tensor of torch. Peak memory is what a broadcast adds to the resident model, in units of
its largest tensor (Linux only). The rows: the tensors of ResNet-50; the same, channels
last; the same transposed on the root alone, so that each is copied into a buffer and
back; one large tensor; the state of Adam for ResNet-50.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import resnet50
import torch
from mpi4py import MPI

import hvd_sparse.torch as sparse

COMM = MPI.COMM_WORLD


def tensors(shapes, arranged=lambda tensor: tensor):
    torch.manual_seed(COMM.rank)
    return {f"{i:03}": arranged(torch.randn(s)) for i, s in enumerate(shapes)}


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def transposed_on_the_root(tensor):
    if COMM.rank > 0 or tensor.ndim < 2:
        return tensor
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def adam(shapes):
    parameters = [torch.nn.Parameter(t) for t in tensors(shapes).values()]
    optimizer = torch.optim.Adam(parameters, lr=0.1 * (COMM.rank + 1))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def rows():
    """Per name: what to run, and the tensors that it sends."""
    shapes = resnet50.shapes()
    models = {
        "ResNet-50, 161 tensors": tensors(shapes),
        "channels last": tensors(shapes, channels_last),
        "transposed on the root": tensors(shapes, transposed_on_the_root),
        "one tensor": tensors([(25_000_000,)]),
    }
    for name, model in models.items():
        yield (
            name,
            lambda model=model: sparse.broadcast_parameters(model, comm=COMM),
            list(model.values()),
        )
    optimizer = adam(shapes)
    state = [t for s in optimizer.state.values() for t in s.values()]
    yield (
        "Adam's state of ResNet-50",
        lambda: sparse.broadcast_optimizer_state(optimizer, comm=COMM),
        state,
    )


def seconds(call):
    COMM.Barrier()
    start = time.perf_counter()
    call()
    return COMM.allreduce(time.perf_counter() - start, op=MPI.MAX)


def memory(tensor):
    """As MPI takes it; transposed or not does not matter to Bcast."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


def bcast(arrays):
    for array in arrays:
        COMM.Bcast([array, MPI.BYTE], 0)


def compare(name, broadcast, sent, rounds):
    total = sum(t.nbytes for t in sent)
    each = [memory(t) for t in sent]
    whole = [torch.ones(total, dtype=torch.uint8).numpy()]
    calls = {
        "seconds": broadcast,
        "bcast_seconds": lambda: bcast(each),
        "one_bcast_seconds": lambda: bcast(whole),
    }
    times = {key: [] for key in calls}
    for _ in range(rounds + 1):  # the first one warms up
        for key, call in calls.items():
            times[key].append(seconds(call))
    whole.clear()
    return {
        "what": name,
        "bytes": total,
        **{key: statistics.median(found[1:]) for key, found in times.items()},
        "largest_tensors": added_memory(broadcast) / max(t.nbytes for t in sent),
    }


def added_memory(broadcast):
    """Bytes that it adds to the peak of a rank, the most of all ranks; or nan."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return float("nan")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    broadcast()
    return COMM.allreduce(resident("VmHWM") - before, op=MPI.MAX)


def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if which in line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found = [compare(*row, arguments.rounds) for row in rows()]
    if COMM.rank == 0:
        print(f"{COMM.size} ranks")
        for row in found:
            print(
                f"{row['what']:<26} {row['bytes'] / 1e6:6.1f} MB  "
                f"{row['seconds'] * 1e3:7.1f} ms  "
                f"{row['seconds'] / row['bcast_seconds']:.2f} times Bcast  "
                f"({row['seconds'] / row['one_bcast_seconds']:.2f} times one Bcast)  "
                f"peak + {row['largest_tensors']:.2f} largest tensors"
            )
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(found, file)


if __name__ == "__main__":
    main()
