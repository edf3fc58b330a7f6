"""One rank of `benchmarks/cluster/run`: the steps of several methods, in turns.

Started once for every door, since Horovod over Gloo, plain MPI and torch.distributed do
not share a process. Each method trains a model of its own; before a step all ranks
wait for each other, and the slowest rank's time counts.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import torch_language_model as language

import hvd_sparse.torch as sparse
from hvd_sparse.core.indices import Indices

WIDTH, LAYERS, HEADS = 512, 8, 8  # 25.6 million parameters
WINDOWS = 2  # of text in a rank's batch
LENGTHS = 16, 48  # of windows, in bytes: what is tried to find the one for a step
WARM = 3  # rounds before any counts
EVERY = 10  # steps between two looks at the validation loss
LR, MOMENTUM = 0.1, 0.5
INT32 = sparse.RawIndices()  # with --int32: what compact indices are compared with


class Model(NamedTuple):
    """A model on its way, and what applies its gradients."""

    network: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass
class Group:
    """What a job's ranks share, whatever door they came by."""

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]  # one object of each rank to all of them
    barrier: Callable[[], None]


class Method(NamedTuple):
    """How gradients travel."""

    name: str
    density: float | None
    wrap: Callable[[nn.Module, int], Model]


# ---------------------------------------------------------------------- the doors


def sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)


def alone(network: nn.Module, number: int) -> Model:
    """The same work without an exchange."""
    return Model(network, sgd(network))


def horovod() -> tuple[Group, list[Method]]:
    import horovod.torch as hvd

    hvd.init()

    def wrap(
        compression: Callable[[Any, str], Any],
    ) -> Callable[[nn.Module, int], Model]:
        def wrapped(network: nn.Module, number: int) -> Model:
            named = [(f"{number}.{n}", p) for n, p in network.named_parameters()]
            optimizer = hvd.DistributedOptimizer(
                sgd(network), named_parameters=named, compression=compression(named)
            )
            return Model(network, optimizer)

        return wrapped

    def compressor(
        density: float, indices: Indices | None = None
    ) -> Callable[[nn.Module, int], Model]:
        top = sparse.TopK(density=density)
        return wrap(
            lambda named: sparse.SparseCompressor(
                top, named_parameters=named, indices=indices
            )
        )

    group = Group(hvd.rank(), hvd.size(), hvd.allgather_object, hvd.barrier)
    return group, [
        Method("no-communication", None, alone),
        Method("horovod-dense", None, wrap(lambda _: hvd.Compression.none)),
        Method("horovod-fp16", None, wrap(lambda _: hvd.Compression.fp16)),
        Method("horovod-sparse", 0.01, compressor(0.01)),
        Method("horovod-sparse", 0.001, compressor(0.001)),
        Method("horovod-int32", 0.01, compressor(0.01, INT32)),
        Method("horovod-int32", 0.001, compressor(0.001, INT32)),
    ]


def mpi() -> tuple[Group, list[Method]]:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD

    def wrap(
        density: float, indices: Indices | None = None
    ) -> Callable[[nn.Module, int], Model]:
        def wrapped(network: nn.Module, number: int) -> Model:
            optimizer = sparse.DistributedOptimizer(
                sgd(network),
                sparse.TopK(density=density),
                named_parameters=network.named_parameters(),
                indices=indices,
                comm=comm,
            )
            return Model(network, optimizer)

        return wrapped

    group = Group(comm.rank, comm.size, comm.allgather, comm.Barrier)
    return group, [
        Method("no-communication", None, alone),
        Method("mpi-sparse", 0.01, wrap(0.01)),
        Method("mpi-sparse", 0.001, wrap(0.001)),
        Method("mpi-int32", 0.01, wrap(0.01, INT32)),
        Method("mpi-int32", 0.001, wrap(0.001, INT32)),
    ]


def ddp() -> tuple[Group, list[Method]]:
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power
    from torch.nn.parallel import DistributedDataParallel

    rank, size = (int(os.environ[f"OMPI_COMM_WORLD_{n}"]) for n in ("RANK", "SIZE"))
    dist.init_process_group("gloo", rank=rank, world_size=size)

    def dense(network: nn.Module, number: int) -> Model:
        return Model(DistributedDataParallel(network), sgd(network))

    def hooked(density: float) -> Callable[[nn.Module, int], Model]:
        def wrapped(network: nn.Module, number: int) -> Model:
            parallel = DistributedDataParallel(network)
            sparse.register(parallel, sparse.TopK(density=density))
            return Model(parallel, sgd(network))

        return wrapped

    def low_rank(network: nn.Module, number: int) -> Model:
        # in one bucket: over Gloo the hook's steps of several mix up between ranks.
        # That is said for all models to come, so this one must be made last
        dist._DEFAULT_FIRST_BUCKET_BYTES = 1 << 30
        parallel = DistributedDataParallel(network, bucket_cap_mb=1 << 10)
        state = power.PowerSGDState(None, start_powerSGD_iter=2)
        parallel.register_comm_hook(state, power.powerSGD_hook)
        return Model(parallel, sgd(network))

    def gather(thing: Any) -> list[Any]:
        things = [None] * size
        dist.all_gather_object(things, thing)
        return things

    return Group(rank, size, gather, dist.barrier), [
        Method("no-communication", None, alone),
        Method("ddp-gloo", None, dense),
        Method("ddp-sparse", 0.01, hooked(0.01)),
        Method("ddp-sparse", 0.001, hooked(0.001)),
        Method("ddp-powersgd", None, low_rank),
    ]


DOORS = {"horovod": horovod, "mpi": mpi, "ddp": ddp}


def open_door(name: str, int32: bool) -> tuple[Group, list[Method]]:
    """The group and methods of a door, with int32 indices too if asked for."""
    group, methods = DOORS[name]()
    return group, [m for m in methods if int32 or not m.name.endswith("int32")]


# ------------------------------------------------------------------------ training


def new_network() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    return language.Transformer(WIDTH, LAYERS, HEADS)


class Task:
    """A transformer that predicts the next byte of Python's own source."""

    def __init__(self, group: Group, length: int) -> None:
        """Args: length: of the windows of text, in bytes."""
        self.text, self.validation = language.read_text()
        self.group = group
        self.length = length

    def loss(self, network: nn.Module, step: int) -> torch.Tensor:
        """Of this rank's batch of a step, the same for every method."""
        draws = torch.Generator().manual_seed(step * self.group.size + self.group.rank)
        starts = torch.randint(
            len(self.text) - self.length, (WINDOWS,), generator=draws
        )
        return self._loss(network, self.text, starts)

    @torch.no_grad()
    def validation_loss(self, network: nn.Module) -> float:
        """Of 32 windows spread evenly, shared out among the ranks."""
        last = len(self.validation) - self.length - 1
        starts = torch.linspace(0, last, 32).long()
        mine = starts[self.group.rank :: self.group.size]
        loss = self._loss(network, self.validation, mine).item()
        return statistics.fmean(self.group.gather(loss))

    def _loss(
        self, network: nn.Module, text: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        windows = text[starts[:, None] + torch.arange(self.length + 1)].long()
        logits = network(windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def train(self, model: Model, step: int) -> None:
        model.optimizer.zero_grad()
        self.loss(model.network, step).backward()
        model.optimizer.step()


# ----------------------------------------------------------------------- measuring


def sent_bytes() -> int:
    """What this host has put on its link so far."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def time_steps(task: Task, methods: Sequence[Method], rounds: int) -> list[dict]:
    """A row for each method: seconds and bytes of a step."""
    models = [m.wrap(new_network(), i) for i, m in enumerate(methods)]
    seconds, sent = [[] for _ in models], [[] for _ in models]
    for step in range(WARM + rounds):
        for i, model in enumerate(models):
            task.group.barrier()
            before, start = sent_bytes(), time.perf_counter()
            task.train(model, step)
            seconds[i].append(time.perf_counter() - start)
            task.group.barrier()  # what a host sent for others has left, too
            sent[i].append(sent_bytes() - before)
    everyone = task.group.gather((seconds, sent))
    return [
        {
            "method": method.name,
            "density": method.density,
            "step_s": statistics.median(
                max(steps)
                for steps in zip(*(s[i][WARM:] for s, _ in everyone), strict=True)
            ),
            "bytes": statistics.median(b for _, s in everyone for b in s[i][WARM:]),
        }
        for i, method in enumerate(methods)
    ]


def find_length(group: Group, seconds: float) -> int:
    """Of windows with which a step without an exchange takes so long.

    About, and between 8 and what the model can see.

    Raises:
        ValueError: more text did not take longer.
    """
    tasks = [Task(group, length) for length in LENGTHS]
    model, spent = alone(new_network(), 0), [[] for _ in tasks]
    for step in range(WARM + 10):
        for taken, task in zip(spent, tasks, strict=True):
            group.barrier()
            start = time.perf_counter()
            task.train(model, step)
            taken.append(time.perf_counter() - start)
    everyone = group.gather([statistics.median(taken[WARM:]) for taken in spent])
    short, long = (max(medians) for medians in zip(*everyone, strict=True))
    if long <= short:
        raise ValueError(f"{LENGTHS} bytes took {short:.3f} and {long:.3f} s")
    slope = (long - short) / (LENGTHS[1] - LENGTHS[0])
    length = round(LENGTHS[0] + (seconds - short) / slope)
    return min(max(8, length), language.CONTEXT)


def count_steps(
    task: Task, methods: Sequence[Method], target: float, limit: int
) -> list[dict]:
    """A row for each method: steps to a validation loss; None if limit is too few."""
    rows = []
    for number, method in enumerate(methods):
        if method.name == "no-communication":
            continue
        model, reached = method.wrap(new_network(), number), None
        for step in range(1, limit + 1):
            task.train(model, step)
            if step % EVERY:
                continue
            if task.validation_loss(model.network) <= target:
                reached = step
                break
        rows.append(
            {"method": method.name, "density": method.density, "steps": reached}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("door", choices=DOORS)
    parser.add_argument("file", help="where rank 0 writes its rows")
    parser.add_argument("--length", type=int, default=32, help="of text, in bytes")
    parser.add_argument(
        "--find-length", type=float, metavar="SECONDS", help="of a step"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--int32", action="store_true", help="also with int32 indices")
    parser.add_argument("--loss", type=float, help="count steps to it instead")
    parser.add_argument("--limit", type=int, default=400, help="of these steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    group, methods = open_door(arguments.door, arguments.int32)
    task = Task(group, arguments.length)
    if arguments.find_length is not None:
        rows = [{"length": find_length(group, arguments.find_length)}]
    elif arguments.loss is not None:
        rows = count_steps(task, methods, arguments.loss, arguments.limit)
    else:
        rows = time_steps(task, methods, arguments.rounds)
    if group.rank == 0:
        Path(arguments.file).write_text(json.dumps(rows))
    group.barrier()


if __name__ == "__main__":
    main()
