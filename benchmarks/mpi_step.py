"""A step over plain MPI: compact entries against int32 indices, and a dense allreduce.

    mpirun -np 2 python benchmarks/mpi_step.py              # about 2 minutes
    mpirun -np 2 python benchmarks/mpi_step.py --json FILE
    mpirun -np 2 python benchmarks/mpi_step.py --quick      # a check

The 161 parameters of ResNet-50 in hvd_sparse.torch.DistributedOptimizer. A step is its
`synchronize()` with all gradients ready at once, no backward pass; the dense row is one
allreduce of as many float32 in one buffer, and its average, the least that MPI can be
asked for. Optimizers take turns, on steady residuals; of each step the slower rank
counts. Bytes are the mean of all steps.

Fails, unless --quick, if compact entries take more than 1.1 times what int32 do.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import resnet50
import torch
from mpi4py import MPI
from torch import nn

import hvd_sparse.torch as sparse

COMM = MPI.COMM_WORLD
SPAN = 1 << 20
RAW = {"indices": sparse.RawIndices()}
# seconds; all tensors leave as one message, whose set-up they share
GIGABIT = sparse.Affine(per_byte=8e-9, per_message=2e-6)
SPARSIFIERS = {
    "TopK 1 %": (sparse.TopK(0.01), {}),
    "1 %, int32": (sparse.TopK(0.01), RAW),
    "TopK 0.1 %": (sparse.TopK(0.001), {}),
    "0.1 %, int32": (sparse.TopK(0.001), RAW),
    "0.1 %, halves": (sparse.TopK(0.001), {"values": sparse.Float16()}),
    "0.1 %, signs": (sparse.SignTopK(0.001), {}),
    "CAT": (sparse.CAT(sparse.TopK(), GIGABIT), {}),
    "CAT, int32": (sparse.CAT(sparse.TopK(), GIGABIT), RAW),
}
JUDGED = (("TopK 1 %", "1 %, int32"), ("TopK 0.1 %", "0.1 %, int32"))
MOST = 1.1  # a tenth for what is not alike from run to run on a shared machine


class Gradients:
    """Other gradients in every step, by reading the same noise from elsewhere."""

    def __init__(self) -> None:
        self.parameters = [nn.Parameter(torch.zeros(s)) for s in resnet50.shapes()]
        self.elements = sum(p.numel() for p in self.parameters)
        generator = torch.Generator().manual_seed(COMM.rank)
        self.noise = torch.randn(self.elements + SPAN, generator=generator)
        self.step = 0

    def renew(self) -> None:
        self.step += 1
        at = self.step * 7919 % SPAN
        for parameter in self.parameters:
            noise = self.noise[at : at + parameter.numel()]
            parameter.grad = noise.view_as(parameter).clone()
            at += parameter.numel()


class Dense:
    """One allreduce, in place, of all gradients in one buffer."""

    def __init__(self, gradients: Gradients) -> None:
        self.buffer = np.ones(gradients.elements, np.float32)

    def __call__(self) -> None:
        COMM.Allreduce(MPI.IN_PLACE, self.buffer)
        self.buffer *= np.float32(1 / COMM.size)

    def bytes(self) -> float:
        return self.buffer.nbytes


class Sparse:
    """An optimizer over the parameters, which all variants share."""

    def __init__(self, gradients: Gradients, name: str) -> None:
        sparsifier, formats = SPARSIFIERS[name]
        self.optimizer = sparse.DistributedOptimizer(
            torch.optim.SGD(gradients.parameters, lr=0.0),
            sparsifier,
            named_parameters=[
                (f"{number:03}", parameter)
                for number, parameter in enumerate(gradients.parameters)
            ],
            comm=COMM,
            **formats,
        )

    def __call__(self) -> None:
        self.optimizer.synchronize()

    def bytes(self) -> float:
        traffic = self.optimizer.traffic
        return traffic.sent_bytes / traffic.steps


def timed(variant: Dense | Sparse, gradients: Gradients) -> float:
    """Seconds of one step on this rank."""
    gradients.renew()
    COMM.Barrier()
    start = time.perf_counter()
    variant()
    seconds = time.perf_counter() - start
    if isinstance(variant, Sparse):
        with variant.optimizer.skip_synchronize():
            variant.optimizer.step()
    return seconds


def measure(rounds: int, steady: int) -> list[dict]:
    gradients = Gradients()
    variants = {"dense": Dense(gradients)}
    variants |= {name: Sparse(gradients, name) for name in SPARSIFIERS}
    for _ in range(steady):
        for variant in variants.values():
            timed(variant, gradients)
    mine = [[timed(v, gradients) for v in variants.values()] for _ in range(rounds)]
    slowest = np.max(COMM.allgather(mine), axis=0).T
    dense = statistics.median(slowest[0])
    return [
        {
            "variant": name,
            "ms": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(seconds) / dense,
            "bytes": variant.bytes(),
        }
        for (name, variant), seconds in zip(variants.items(), slowest, strict=True)
    ]


def report(rows: list[dict]) -> bool:
    """Prints, and returns whether all is well."""
    tell = sys.stdout.write
    tell(f"{COMM.size} ranks, {len(resnet50.shapes())} tensors of ResNet-50\n")
    for row in rows:
        tell(
            f"{row['variant']:13} {row['ms']:7.1f} ms, {row['ratio']:.2f} of dense, "
            f"{row['bytes']:11,.0f} bytes sent\n"
        )
    took, passed = {row["variant"]: row["ms"] for row in rows}, True
    for compact, raw in JUDGED:
        ratio = took[compact] / took[raw]
        passed &= ratio <= MOST
        tell(
            f"{'PASS' if ratio <= MOST else 'FAIL'}: {compact} takes {ratio:.2f} of "
            f"what int32 takes, at most {MOST}\n"
        )
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows too")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = measure(*((10, 20) if arguments.quick else (40, 150)))
    if COMM.rank == 0:
        if arguments.json:
            arguments.json.write_text(json.dumps(rows))
        sys.exit(not (report(rows) or arguments.quick))


if __name__ == "__main__":
    main()
