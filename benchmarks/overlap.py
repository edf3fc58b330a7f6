"""One exchange after the backward pass, or buckets that overlap it: which is faster?

    mpirun -np 2 python benchmarks/overlap.py [--json FILE]

The alternative to one exchange a step starts a bucket of parameters as soon as their
gradients are ready, in an order that is the same on every rank, and lets it travel
while the backward pass goes on. Here both train the same model on the same batches in
turns, in one run; a step is timed from zero_grad to the end of the exchange.
"""

import argparse
import json
import os
import statistics
import time

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

import hvd_sparse
import hvd_sparse.torch as sparse
from hvd_sparse.mpi import SparseAllreduce

COMM = MPI.COMM_WORLD
WIDTH, DEPTH, BATCH = 1024, 10, 64


class Buckets:
    """Starts bucket after bucket from the hooks of the backward pass."""

    def __init__(self, model, sparsifier, count):
        named = list(model.named_parameters())[::-1]  # ready in about this order
        size = -(-len(named) // count)
        self.buckets = [dict(named[i : i + size]) for i in range(0, len(named), size)]
        self.reduces = [SparseAllreduce(sparsifier, comm=COMM) for _ in self.buckets]
        self.bucket_of = {
            parameter: number
            for number, bucket in enumerate(self.buckets)
            for parameter in bucket.values()
        }
        for parameter in self.bucket_of:
            parameter.register_post_accumulate_grad_hook(self.ready)
        self.begin()

    def begin(self):
        self.missing = [len(bucket) for bucket in self.buckets]
        self.started = 0

    def ready(self, parameter):
        self.missing[self.bucket_of[parameter]] -= 1
        for reduce in self.reduces[: self.started]:
            reduce.progress()
        # in order: a bucket that is ready early waits for those before it
        while self.started < len(self.buckets) and not self.missing[self.started]:
            bucket = self.buckets[self.started]
            gradients = {name: p.grad.numpy() for name, p in bucket.items()}
            self.reduces[self.started].start(gradients, gradients)
            self.started += 1

    def finish(self):
        for reduce in self.reduces:
            reduce.finish()
        self.begin()

    def close(self):
        for reduce in self.reduces:
            reduce.close()


def network():
    torch.manual_seed(0)
    layers = [[nn.Linear(WIDTH, WIDTH), nn.ReLU()] for _ in range(DEPTH)]
    return nn.Sequential(*(part for layer in layers for part in layer))


def backward(model, step):
    model.zero_grad(set_to_none=False)  # both write into gradients that exist
    generator = torch.Generator().manual_seed(step * COMM.size + COMM.rank)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    model(x).square().mean().backward()


def compare(density, buckets, steps):
    """Median seconds of a step, one exchange and buckets, in turns."""
    sparsifier = hvd_sparse.TopK(density)
    one, many = network(), network()
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD(one.parameters(), lr=0.0), sparsifier, comm=COMM
    )
    overlapped = Buckets(many, sparsifier, buckets)
    times = {"one exchange": [], "buckets": [], "no exchange": []}
    for step in range(steps):
        COMM.Barrier()
        start = time.perf_counter()
        backward(one, step)
        alone = time.perf_counter()
        optimizer.synchronize()
        times["one exchange"].append(time.perf_counter() - start)
        times["no exchange"].append(alone - start)
        COMM.Barrier()
        start = time.perf_counter()
        backward(many, step)
        overlapped.finish()
        times["buckets"].append(time.perf_counter() - start)
    agree = all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(one.parameters(), many.parameters(), strict=True)
    )
    optimizer.close()
    overlapped.close()
    assert agree, "both must hand back the same bits"
    worst = {
        name: COMM.allreduce(statistics.median(seconds[5:]), op=MPI.MAX)
        for name, seconds in times.items()
    }
    return {"density": density, "count": buckets, **worst}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    parameters = sum(int(np.prod(p.shape)) for p in network().parameters())
    rows = [
        compare(density, buckets, arguments.steps)
        for density in (0.001, 0.01, 1.0)
        for buckets in (2, 5)
    ]
    if COMM.rank == 0:
        print(f"{COMM.size} ranks, {parameters / 1e6:.1f} M parameters, s per step")
        for row in rows:
            ratio = row["buckets"] / row["one exchange"]
            print(
                f"density {row['density']:<6} {row['count']} buckets: backward alone "
                f"{row['no exchange']:.4f}  one exchange {row['one exchange']:.4f}  "
                f"buckets {row['buckets']:.4f}  buckets / one {ratio:.2f}"
            )
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(rows, file)


if __name__ == "__main__":
    main()
