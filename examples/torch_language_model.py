"""A byte-level transformer on the source text of Python's own standard library.

mpirun -np 2 python examples/torch_language_model.py --density 0.01
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

import hvd_sparse  # hvd_sparse: the sparsifiers
import hvd_sparse.torch as sparse  # hvd_sparse: the door for PyTorch

if TYPE_CHECKING:  # importing it starts MPI, which a job over Gloo must not
    from mpi4py import MPI

CONTEXT = 128  # bytes that the model sees at once
CHUNK = 16384  # bytes; every tenth chunk of the text is for validation


@dataclass(frozen=True)
class Settings:
    """How to train; tuned for dense (benchmarks/fidelity.py --tune)."""

    lr: float = 0.004  # constant
    batch: int = 8  # windows per rank
    steps: int = 800
    seed: int = 0


class Block(nn.Module):
    """One transformer layer, normalised before attention and before the MLP."""

    def __init__(self, width: int, heads: int) -> None:
        """Args: width: of a token's vector. heads: divides the width."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: (batch, time, width)."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Next-byte prediction; 0.48 million parameters."""

    def __init__(self, width: int = 128, layers: int = 2, heads: int = 4) -> None:
        """Args: width: of a token's vector. layers: count. heads: per layer."""
        super().__init__()
        self.byte = nn.Embedding(256, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: (batch, time) int64 bytes."""
        x = self.byte(x) + self.position.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def read_text(folder: Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation text, (n,) uint8 each, from the files in ``folder``."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*" if folder else "*.py"))
    skipped = set() if folder else {"site-packages", "dist-packages", "test", "tests"}
    texts = [f.read_bytes() for f in files if f.is_file() and not skipped & {*f.parts}]
    text = b"\n".join(text for text in texts if b"\0" not in text)
    if len(text) < 20 * CHUNK:
        raise ValueError(
            f"text under {root} must have {20 * CHUNK} bytes, got {len(text)}"
        )
    chunks = torch.frombuffer(bytearray(text), dtype=torch.uint8).split(CHUNK)
    train = [chunk for i, chunk in enumerate(chunks) if i % 10 != 9]
    return torch.cat(train), torch.cat(chunks[9::10])


def loss_of(model: nn.Module, text: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats per byte, of the windows that begin at ``starts``."""
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)].long()
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, text: torch.Tensor, comm: MPI.Comm) -> float:
    """Loss on 1024 windows spread evenly over ``text``, shared out among the ranks."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, 1024).long()
    mine = starts[comm.rank :: comm.size].split(64)
    total = sum(loss_of(model, text, part).item() * len(part) for part in mine)
    return comm.allreduce(total) / len(starts)


def adam(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Adam:
    """Without momentum of its own: what is sent late is momentum already."""
    # hvd_sparse: beta1 = 0; sparse.advise says why
    return torch.optim.Adam(parameters, lr=settings.lr, betas=(0.0, 0.999))


def train(
    text: torch.Tensor,
    sparsifier: hvd_sparse.Sparsifier | None,
    comm: MPI.Comm,
    settings: Settings,
    *,
    build: Callable = adam,
    values: object = None,
    on_step: Callable[[float, object], None] = lambda loss, traffic: None,
) -> tuple[nn.Module, object, float]:
    """Train a new model; returns it, the traffic and the seconds per step.

    Args:
        text: from ``read_text``.
        sparsifier: None for the stock dense allreduce.
        comm: of the ranks that train together.
        settings: how to train.
        build: makes the optimizer.
        values: how values travel, such as hvd_sparse.Float16().
        on_step: is told each loss, and the traffic so far.
    """
    torch.manual_seed(settings.seed)
    model = Transformer()
    optimizer = build(model.parameters(), settings)
    if sparsifier is None:
        import dense

        optimizer = dense.distribute(optimizer, comm)
    else:
        # hvd_sparse: every rank starts from rank 0's parameters
        sparse.broadcast_parameters(model.state_dict(), root=0, comm=comm)
        # hvd_sparse: wrap the optimizer
        optimizer = sparse.DistributedOptimizer(
            optimizer,
            sparsifier,
            named_parameters=model.named_parameters(),
            comm=comm,
            values=values,
        )
    draws = torch.Generator().manual_seed(settings.seed * comm.size + comm.rank)
    begin = time.perf_counter()
    for _ in range(settings.steps):
        starts = torch.randint(len(text) - CONTEXT, (settings.batch,), generator=draws)
        optimizer.zero_grad()
        loss = loss_of(model, text, starts)
        loss.backward()
        optimizer.step()
        on_step(loss.item(), optimizer.traffic)
    return model, optimizer.traffic, (time.perf_counter() - begin) / settings.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.01, help="in (0, 1]")
    parser.add_argument("--dense", action="store_true", help="stock dense allreduce")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--data-dir", type=Path, help="your own text, any files")
    args = parser.parse_args()

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    train_text, validation_text = read_text(args.data_dir)
    sparsifier = None if args.dense else hvd_sparse.TopK(density=args.density)
    settings = Settings(steps=args.steps)
    model, traffic, seconds = train(train_text, sparsifier, comm, settings)
    loss = evaluate(model, validation_text, comm)
    if comm.rank == 0:
        print(f"validation loss    {loss:.4f} nats per byte after {args.steps} steps")
        print(f"compression ratio  {traffic.compression_ratio:.1f}")
        print(f"time per step      {1e3 * seconds:.1f} ms")


if __name__ == "__main__":
    main()
