"""A language model in DistributedDataParallel: torchrun, neither MPI nor Horovod.

torchrun --nproc-per-node 2 examples/ddp.py --density 0.01
"""

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch_language_model import (
    CONTEXT,
    Settings,
    Transformer,
    adam,
    loss_of,
    read_text,
)

import hvd_sparse.torch as sparse  # hvd_sparse: added


def train(text: torch.Tensor, density: float | None, settings: Settings) -> tuple:
    """Returns the model, the traffic or None, and the seconds per step."""
    torch.manual_seed(settings.seed)
    model = DistributedDataParallel(Transformer())
    optimizer = adam(model.parameters(), settings)
    state = None
    if density is not None:
        state = sparse.register(model, sparse.TopK(density))  # hvd_sparse: added
    draws = torch.Generator().manual_seed(
        settings.seed * dist.get_world_size() + dist.get_rank()
    )
    begin = time.perf_counter()
    for _ in range(settings.steps):
        starts = torch.randint(len(text) - CONTEXT, (settings.batch,), generator=draws)
        optimizer.zero_grad()
        loss_of(model, text, starts).backward()
        optimizer.step()
    seconds = (time.perf_counter() - begin) / settings.steps
    return model, state and state.traffic, seconds


@torch.no_grad()
def evaluate(model: torch.nn.Module, text: torch.Tensor) -> float:
    """Loss on 512 windows spread evenly over the text."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, 512).long().split(64)
    return sum(loss_of(model, text, part).item() for part in starts) / len(starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.01, help="in (0, 1]")
    parser.add_argument("--dense", action="store_true", help="DDP's own allreduce")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--data-dir", type=Path, help="your own text, any files")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    train_text, validation_text = read_text(args.data_dir)
    density, settings = None if args.dense else args.density, Settings(steps=args.steps)
    model, traffic, seconds = train(train_text, density, settings)
    if dist.get_rank() == 0:  # the model is the same on all
        loss = evaluate(model.module, validation_text)
        print(f"validation loss    {loss:.4f} nats per byte after {args.steps} steps")
        if traffic is not None:
            print(f"compression ratio  {traffic.compression_ratio:.1f}")
        print(f"time per step      {1e3 * seconds:.1f} ms")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
