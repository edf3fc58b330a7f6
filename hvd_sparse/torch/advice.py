"""Where PyTorch's optimizers have momentum."""

from typing import Any

import torch

from hvd_sparse.advice import ADAM, SGD, Momentum, advice
from hvd_sparse.core.contracts import Sparsifier

# Of each the argument of a parameter group; subclasses, distributed ones among them,
# are what they inherit from.
_BETAS = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.Adamax,
)
_MOMENTUM = (torch.optim.SGD, torch.optim.RMSprop)


def advise(optimizer: torch.optim.Optimizer, sparsifier: Sparsifier) -> str | None:
    """What of an optimizer spoils sparse training, and the line that cures it.

    Args:
        optimizer: SGD, RMSprop, Adam, AdamW, NAdam or Adamax; of others nothing was
            measured, and nothing is said.
        sparsifier: what is given to the integration; TopK, SignTopK or RandomK.

    Returns:
        One paragraph, the same that is warned of at the first step; None where nothing
        is known to spoil the quality.

    Example:
        >>> import hvd_sparse
        >>> weights = [torch.nn.Parameter(torch.zeros(2))]
        >>> adam = torch.optim.Adam(weights, betas=(0.0, 0.999))
        >>> advise(adam, hvd_sparse.TopK(density=0.01)) is None
        True
    """
    try:
        momentum = _momentum(optimizer)
    except (KeyError, IndexError, TypeError, ValueError):
        momentum = None  # somebody's subclass, which keeps other things there
    return advice(momentum, sparsifier)


def _momentum(optimizer: Any) -> Momentum | None:
    kind = type(optimizer).__name__
    groups = optimizer.param_groups
    if isinstance(optimizer, _BETAS):
        group = max(groups, key=lambda group: float(group["betas"][0]))
        beta1, beta2 = map(float, group["betas"])
        if beta1 > 0:
            found, better = f"betas=({beta1:g}, {beta2:g})", f"betas=(0.0, {beta2:g})"
            return Momentum(kind, found, better, ADAM)
    elif isinstance(optimizer, _MOMENTUM):
        group = max(groups, key=lambda group: float(group["momentum"]))
        momentum, nesterov = float(group["momentum"]), group.get("nesterov", False)
        if momentum > 0:
            also = ", nesterov=" if nesterov else ""
            found = f"momentum={momentum:g}" + (also and f"{also}True")
            return Momentum(kind, found, "momentum=0" + (also and f"{also}False"), SGD)
    return None
