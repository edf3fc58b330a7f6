"""Gradients on an accelerator: what selecting costs there, and a step over MPI.

    mpirun -np 1 python benchmarks/accelerator.py [--json FILE]    # or more ranks

Selection: of 25.6 million float32 elements on steady residuals, beside torch.add_ and
torch.topk of the magnitudes on the same device, in turns. A step: `synchronize()` of
`hvd_sparse.torch.DistributedOptimizer` with the 161 gradients of ResNet-50, which are
copied from elsewhere on the device first, in the same time. Dense gradients visit the
host, since plain MPI sends from there; sparse ones do not. All ranks share the one
accelerator. Medians; the slowest rank counts. Without an accelerator it says so and
ends.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import resnet50
import torch
from mpi4py import MPI

import hvd_sparse.torch as sparse
from hvd_sparse.core.sparsifiers import elements
from hvd_sparse.kernels import device

COMM = MPI.COMM_WORLD
POOL = 6  # gradients that take turns
SETTLING = 100  # steps until residuals are steady
WARM = 3
DENSITIES = (0.01, 0.001)


def in_turns(works: dict[str, Callable[[int], None]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, of the slowest rank; medians."""
    taken = {name: [] for name in works}
    for step in range(rounds):
        for name, work in works.items():
            COMM.Barrier()
            torch.accelerator.synchronize()
            start = time.perf_counter()
            work(step)
            torch.accelerator.synchronize()
            taken[name].append(time.perf_counter() - start)
    everyone = COMM.allgather(taken)
    return {
        name: 1e3
        * statistics.median(map(max, zip(*(t[name] for t in everyone), strict=True)))
        for name in works
    }


def selections(where: torch.device, rounds: int) -> list[dict]:
    n = resnet50.ELEMENTS
    gradients = [torch.randn(n, device=where) for _ in range(POOL)]
    total = torch.zeros(n, device=where)
    works = {"torch.add_": lambda step: total.add_(gradients[step % POOL])}
    for density in DENSITIES:
        k, residual = elements(density, n), torch.zeros(n, device=where)

        def select(step: int, k: int = k, residual: torch.Tensor = residual) -> None:
            device.select_top(residual, gradients[step % POOL], k)

        for step in range(SETTLING):
            select(step)
        works[f"torch.topk, {density:.1%}"] = lambda step, k=k, residual=residual: (
            torch.topk(residual.abs(), k)
        )
        works[f"TopK({density})"] = select
    found = in_turns(works, rounds)
    return [{"what": "selection", "method": m, "ms": ms} for m, ms in found.items()]


def new_step(where: torch.device, sparsifier: object, dense: object) -> tuple:
    """One exchange of ResNet-50's gradients, and the optimizer whose it is."""
    named = {
        f"{i:03}": torch.nn.Parameter(torch.zeros(shape, device=where))
        for i, shape in enumerate(resnet50.shapes())
    }
    optimizer = sparse.DistributedOptimizer(
        torch.optim.SGD(named.values(), lr=0.1),
        sparsifier,
        named_parameters=named.items(),
        comm=COMM,
        dense=dense,
    )
    draws = torch.Generator(where).manual_seed(COMM.rank)
    pool = [
        [torch.randn(p.shape, device=where, generator=draws) for p in named.values()]
        for _ in range(POOL)
    ]

    def step(number: int) -> None:
        for parameter, gradient in zip(
            named.values(), pool[number % POOL], strict=True
        ):
            parameter.grad = gradient.clone()
        optimizer.synchronize()

    return step, optimizer


def steps(where: torch.device, rounds: int) -> list[dict]:
    methods = {"dense": (sparse.TopK(1.0), sparse.WhenCheaper())} | {
        f"TopK({density})": (sparse.TopK(density), sparse.Never())
        for density in DENSITIES
    }
    made = {name: new_step(where, *options) for name, options in methods.items()}
    for step, _ in made.values():
        for number in range(WARM):
            step(number)
    found = in_turns({name: step for name, (step, _) in made.items()}, rounds)
    rows = []
    for name, ms in found.items():
        traffic = made[name][1].traffic
        sent = traffic.sent_bytes // traffic.steps
        rows.append({"what": "step", "method": name, "ms": ms, "sent_bytes": sent})
        made[name][1].close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    where = torch.accelerator.current_accelerator(check_available=True)
    if where is None:
        sys.stdout.write("skipped: torch finds no accelerator\n")
        return
    rows = selections(where, arguments.rounds) + steps(where, arguments.rounds)
    if COMM.rank:
        return
    name = torch.cuda.get_device_name() if where.type == "cuda" else str(where)
    host = f"ranks: {COMM.size}, Python {platform.python_version()}"
    lines = [f"{name}, torch {torch.__version__}, {host}; milliseconds"]
    for row in rows:
        bytes_sent = f"{row['sent_bytes']:>14,} bytes" if "sent_bytes" in row else ""
        lines.append(
            f"{row['what']:10} {row['method']:18} {row['ms']:9.3f}{bytes_sent}"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
