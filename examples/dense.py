"""What the examples compare against: stock data-parallel training, nothing sparse.

One MPI Allreduce of all gradients before every optimizer step, counted as hvd_sparse
counts its own bytes.
"""

import torch
from mpi4py import MPI

from hvd_sparse.core.traffic import Traffic


def distribute(
    optimizer: torch.optim.Optimizer, comm: MPI.Comm
) -> torch.optim.Optimizer:
    """Average all gradients over the ranks before each step of ``optimizer``.

    Overwrites the gradients, and gives the optimizer the attribute ``traffic``.

    Args:
        optimizer: over float32 CPU parameters, the same on every rank.
        comm: the ranks that train together.

    Returns:
        The same optimizer.
    """
    optimizer.traffic = Traffic()
    counters = optimizer.traffic.tensor("all gradients", "dense")

    def average(*_: object) -> None:
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        comm.Allreduce(MPI.IN_PLACE, flat.numpy())
        flat /= comm.size
        means = flat.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
        if comm.size > 1:
            counters.sent_bytes += flat.nbytes
            counters.received_bytes += flat.nbytes
        counters.dense_bytes += flat.nbytes
        optimizer.traffic.steps += 1

    optimizer.register_step_pre_hook(average)
    return optimizer
