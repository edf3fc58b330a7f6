"""One call for the models of torch.distributed."""

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from hvd_sparse.core.contracts import Sparsifier
from hvd_sparse.torch.ddp import SparseState, sparse_hook


def register(model: Any, sparsifier: Sparsifier, **options: Any) -> SparseState:
    """Make a model average sparsified gradients; every rank of it must call this.

    Example:
        model = DistributedDataParallel(model)
        sparse.register(model, sparse.TopK(density=0.01))

    Args:
        model: in DistributedDataParallel.
        sparsifier: TopK, RandomK, Threshold or your own; the same on every rank.
        options: of SparseState.

    Returns:
        What it keeps: `traffic`, and residuals, by `state_dict`.

    Raises:
        TypeError: model is in no DistributedDataParallel, or as of SparseState.
        ValueError: it has a communication hook already; or as of SparseState.
        ExchangeError: a peer did not come.
    """
    if not isinstance(model, DistributedDataParallel):
        kind = type(model).__name__
        raise TypeError(
            f"model must be a DistributedDataParallel, got {kind}: wrap it, or give "
            "its optimizer to hvd_sparse.torch.DistributedOptimizer"
        )
    if getattr(model, "mixed_precision", None) is not None:
        raise ValueError(
            "model must be made without mixed_precision=, which is a communication "
            "hook of its own: use torch.autocast"
        )
    if getattr(model, "_comm_hooks", None):
        raise ValueError(
            "model has a communication hook already, and takes only one; of a copy, "
            "wrap its module anew"
        )
    state = SparseState(sparsifier, **options)
    state.attach(model)
    model.register_comm_hook(state, sparse_hook)
    return state
