"""The language model under an unmodified Horovod, dense and sparse side by side.

horovodrun -np 2 python examples/horovod_torch.py --density 0.01
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import horovod.torch as hvd
import torch
from torch_language_model import (
    CONTEXT,
    Settings,
    Transformer,
    adam,
    evaluate,
    loss_of,
    read_text,
)

import hvd_sparse.torch as sparse  # hvd_sparse: the door for PyTorch


@dataclass
class Outcome:
    """A trained model, the compression ratio, and the seconds per step."""

    model: torch.nn.Module
    ratio: float
    seconds: float


def train(text: torch.Tensor, density: float | None, settings: Settings) -> Outcome:
    """Train a new model, dense where ``density`` is None."""
    torch.manual_seed(settings.seed)
    model = Transformer()
    compression = hvd.Compression.none
    if density is not None:
        # hvd_sparse: choose what is worth sending of each gradient
        compression = sparse.SparseCompressor(
            sparse.TopK(density=density), named_parameters=model.named_parameters()
        )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        adam(model.parameters(), settings),
        named_parameters=model.named_parameters(),
        compression=compression,  # hvd_sparse: hand it to Horovod
    )
    draws = torch.Generator().manual_seed(settings.seed * hvd.size() + hvd.rank())
    begin = time.perf_counter()
    for step in range(1, settings.steps + 1):
        starts = torch.randint(len(text) - CONTEXT, (settings.batch,), generator=draws)
        optimizer.zero_grad()
        loss = loss_of(model, text, starts)
        loss.backward()
        optimizer.step()
        if hvd.rank() == 0 and step % max(1, settings.steps // 8) == 0:
            name = "dense" if density is None else f"density {density:g}"
            print(f"{name}: step {step}, training loss {loss.item():.2f}", flush=True)
    ratio = 1.0 if density is None else compression.traffic.compression_ratio
    return Outcome(model, ratio, (time.perf_counter() - begin) / settings.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.01, help="in (0, 1]")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--data-dir", type=Path, help="your own text, any files")
    args = parser.parse_args()

    hvd.init()
    torch.set_num_threads(1)  # ranks share the cores of their host
    train_text, validation_text = read_text(args.data_dir)
    settings = replace(Settings(), steps=args.steps)
    dense, thin = (train(train_text, d, settings) for d in (None, args.density))

    def total(number: float) -> float:
        number = torch.tensor(number, dtype=torch.float64)
        return hvd.allreduce(number, op=hvd.Sum, name="total").item()

    ranks = SimpleNamespace(rank=hvd.rank(), size=hvd.size(), allreduce=total)
    losses = [evaluate(o.model, validation_text, ranks) for o in (dense, thin)]
    if hvd.rank() == 0:
        print(f"{'':18} {'dense':>8}  density {args.density:g}")
        print(f"validation loss    {losses[0]:8.4f}  {losses[1]:.4f} nats per byte")
        print(f"compression ratio  {dense.ratio:8.1f}  {thin.ratio:.1f}")
        milliseconds = f"{1e3 * dense.seconds:8.1f}  {1e3 * thin.seconds:.1f}"
        print(f"time per step      {milliseconds} ms")


if __name__ == "__main__":
    main()
