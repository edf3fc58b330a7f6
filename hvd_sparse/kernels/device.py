"""The hot loops for torch tensors that live on an accelerator.

Gradients, residuals and results never visit the host; what does is the payload, k
elements, because plain MPI sends from host memory. Every function has the contract of
its namesake in `host`, and gives the same bits; the accumulation makes temporaries of
the gradient's size on the device.
"""

from typing import Any

import torch

from hvd_sparse.kernels import host
from hvd_sparse.kernels.reference import check_indices

Tensor = torch.Tensor
Selected = tuple[Tensor, Tensor, int]


def zeros_like(gradient: Tensor) -> Tensor:
    """A residual for this gradient, on its device: float32, or float64 for float64."""
    wide = gradient.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    return torch.zeros(gradient.numel(), dtype=dtype, device=gradient.device)


def _accumulate(residual: Tensor, gradient: Tensor, out: Tensor | None) -> Tensor:
    total = residual + gradient.to(residual.dtype)
    finite = total.isfinite()
    residual.copy_(torch.where(finite, total, residual))
    if out is not None:
        out.zero_()
    return finite.logical_not().sum()


def _take(residual: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    indices = chosen.nonzero().flatten()  # ascending
    values = residual[indices]
    residual[indices] = 0
    return indices.to(torch.int32), values


def _largest(magnitude: Tensor, k: int) -> Tensor:
    """A mask of the k largest; torch.topk breaks ties as it likes, this never does."""
    if k == 0:
        return torch.zeros_like(magnitude, dtype=torch.bool)
    kth = torch.topk(magnitude, k, sorted=True).values[-1]
    above, equal = magnitude > kth, magnitude == kth
    return above | (equal & (equal.cumsum(0) <= k - above.sum()))


def select_top(
    residual: Tensor, gradient: Tensor, k: int, out: Tensor | None = None
) -> Selected:
    """Overwrites residual with residual + gradient less its k largest entries."""
    nonfinite = _accumulate(residual, gradient, out)
    return *_take(residual, _largest(residual.abs(), k)), int(nonfinite)


def select_above(
    residual: Tensor,
    gradient: Tensor,
    bound: float,
    limit: int,
    out: Tensor | None = None,
) -> Selected:
    """As select_top, for entries of magnitude >= bound, at most the limit largest."""
    nonfinite = _accumulate(residual, gradient, out)
    magnitude = residual.abs()
    least = torch.tensor(bound, dtype=residual.dtype, device=residual.device)
    chosen = (magnitude >= least) & _largest(magnitude, limit)
    return *_take(residual, chosen), int(nonfinite)


def select_at(
    residual: Tensor, gradient: Tensor, indices: Any, out: Tensor | None = None
) -> Selected:
    """As select_top, for the entries at the given ascending int32 host indices."""
    nonfinite = _accumulate(residual, gradient, out)
    places = torch.as_tensor(indices, device=residual.device)
    values = residual[places]
    residual[places] = 0
    return places, values, int(nonfinite)


def add_at(residual: Tensor, indices: Tensor, values: Tensor) -> None:
    """Overwrites residual[indices] with residual[indices] + values."""
    places = torch.as_tensor(indices, device=residual.device)
    residual[places] += torch.as_tensor(values, device=residual.device)


def aggregate(
    out: Tensor,
    payloads: list[tuple[Any, Any]],
    scale: float,
    cleared: bool = False,
) -> None:
    """Overwrites out with scale * (payload_0 + payload_1 + ...), rank by rank.

    The indices of one payload are distinct, so no two additions meet and the order of
    the sum is the order of the ranks.
    """
    for indices, _ in payloads:
        if not isinstance(indices, Tensor):  # what this rank drew itself needs no check
            check_indices(indices, out.numel())
    if out.dtype.itemsize > 2:
        total = out if cleared else out.zero_()
    else:
        total = zeros_like(out)
    for indices, values in payloads:
        add_at(total, indices, values)
    out.copy_(total.mul_(torch.tensor(scale, dtype=total.dtype, device=total.device)))


def random_indices(n: int, k: int, seed: int) -> Any:
    """k distinct ascending indices of range(n): the host's, alike on every rank."""
    return host.random_indices(n, k, seed)
