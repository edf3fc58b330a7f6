"""A convolutional network on scikit-learn's handwritten digits (1797 images of 8 x 8).

mpirun -np 2 python examples/torch_digits.py --density 0.01
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import dense
import torch
from mpi4py import MPI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

import hvd_sparse  # hvd_sparse: the sparsifiers
import hvd_sparse.torch as sparse  # hvd_sparse: the door for PyTorch

Split = tuple[torch.Tensor, torch.Tensor]  # (n, 1, 8, 8) images, (n,) digits


@dataclass(frozen=True)
class Settings:
    """How to train; tuned for dense (benchmarks/fidelity.py --tune)."""

    lr: float = 0.4  # falls linearly to zero
    momentum: float = 0.5
    batch: int = 32  # images per rank
    steps: int = 1000
    seed: int = 0


def network() -> nn.Module:
    """55 thousand parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def read_digits() -> tuple[Split, Split]:
    """Two thirds for training, one third for testing; the same split every time."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    targets = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(targets)), test_size=1 / 3, random_state=0, stratify=targets
    )
    return (images[train], targets[train]), (images[test], targets[test])


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    images, targets = split
    return (model(images).argmax(dim=1) == targets).float().mean().item()


def train(
    split: Split,
    sparsifier: hvd_sparse.Sparsifier | None,
    comm: MPI.Comm,
    settings: Settings,
    *,
    on_step: Callable[[float, object], None] = lambda loss, traffic: None,
) -> tuple[nn.Module, object, float]:
    """Train a new model; returns it, the traffic and the seconds per step."""
    images, targets = split
    torch.manual_seed(settings.seed)
    model = network()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum
    )
    if sparsifier is None:
        optimizer = dense.distribute(optimizer, comm)
    else:
        # hvd_sparse: every rank starts from rank 0's parameters
        sparse.broadcast_parameters(model.state_dict(), root=0, comm=comm)
        # hvd_sparse: wrap the optimizer
        optimizer = sparse.DistributedOptimizer(
            optimizer, sparsifier, named_parameters=model.named_parameters(), comm=comm
        )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.steps)
    draws = torch.Generator().manual_seed(settings.seed * comm.size + comm.rank)
    begin = time.perf_counter()
    for _ in range(settings.steps):
        picked = torch.randint(len(images), (settings.batch,), generator=draws)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[picked]), targets[picked])
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(loss.item(), optimizer.traffic)
    return model, optimizer.traffic, (time.perf_counter() - begin) / settings.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.01, help="in (0, 1]")
    parser.add_argument("--dense", action="store_true", help="stock dense allreduce")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    args = parser.parse_args()

    comm = MPI.COMM_WORLD
    train_split, test_split = read_digits()
    sparsifier = None if args.dense else hvd_sparse.TopK(density=args.density)
    settings = Settings(steps=args.steps)
    losses: list[float] = []
    model, traffic, seconds = train(
        train_split,
        sparsifier,
        comm,
        settings,
        on_step=lambda loss, traffic: losses.append(loss),
    )
    if comm.rank == 0:
        print(f"training loss      {losses[-1]:.4f} after {args.steps} steps")
        print(f"test accuracy      {accuracy(model, test_split):.2%}")
        print(f"compression ratio  {traffic.compression_ratio:.1f}")
        print(f"time per step      {1e3 * seconds:.1f} ms")


if __name__ == "__main__":
    main()
