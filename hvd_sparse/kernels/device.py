"""The hot loops for torch tensors that live on an accelerator.

Gradients, residuals and results never visit the host; what does is the payload, k
elements, because plain MPI sends from host memory. Every function has the contract of
its namesake in `host`, and gives the same bits; the accumulation makes temporaries of
the gradient's size on the device.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hvd_sparse.kernels import host
from hvd_sparse.kernels.bins import BINS, SHIFTS
from hvd_sparse.kernels.coding import Coded
from hvd_sparse.kernels.contract import NothingAddedError
from hvd_sparse.kernels.reference import check_finite, check_indices, check_places

_STRETCH = 1 << 20  # elements

Tensor = torch.Tensor
Selected = tuple[Tensor, Tensor, int]


def zeros_like(gradient: Tensor) -> Tensor:
    """A residual for this gradient, on its device: float32, or float64 for float64."""
    wide = gradient.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    return torch.zeros(gradient.numel(), dtype=dtype, device=gradient.device)


def _accumulate(residual: Tensor, gradient: Tensor, out: Tensor | None) -> Tensor:
    """How many sums were finite; nothing waits for the device to count them.

    Raises:
        NothingAddedError: its temporaries have no room.
    """
    try:
        total = residual + gradient.to(residual.dtype)
        finite = total.isfinite()
        count = finite.sum()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise NothingAddedError from error
    torch.where(finite, total, residual, out=residual)
    if out is not None:
        out.zero_()
    return count


def _take(residual: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values, which leave the residual when there is room for both."""
    indices, values = places.to(torch.int32), residual[places]
    residual[places] = 0
    return indices, values


def _largest(values: Tensor, k: int, least: Tensor | None = None) -> Tensor:
    """Places of the k largest magnitudes, ascending; of those only that reach least.

    torch.topk breaks ties as it likes, this gives them to the lowest index.
    """
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    magnitude = values.abs()
    kth = torch.topk(magnitude, k, sorted=False).values.min()
    bound = kth if least is None else torch.maximum(kth, least)
    places = (magnitude >= bound).nonzero().flatten()
    if places.numel() > k:  # ties at the k-th, among few elements
        above = magnitude[places] > kth
        ties = k - above.sum()
        places = places[above | ((~above).cumsum(0) <= ties)]
    return places


def select_top(
    residual: Tensor, gradient: Tensor, k: int, out: Tensor | None = None
) -> Selected:
    """Overwrites residual with residual + gradient less its k largest entries."""
    finite = _accumulate(residual, gradient, out)
    taken = _take(residual, _largest(residual, k))
    return *taken, residual.numel() - int(finite)


def select_above(
    residual: Tensor,
    gradient: Tensor,
    bound: float,
    limit: int,
    out: Tensor | None = None,
) -> Selected:
    """As select_top, for entries of magnitude >= bound, at most the limit largest."""
    finite = _accumulate(residual, gradient, out)
    least = torch.tensor(bound, dtype=residual.dtype, device=residual.device)
    taken = _take(residual, _largest(residual, limit, least))
    return *taken, residual.numel() - int(finite)


def select_at(
    residual: Tensor, gradient: Tensor, indices: Any, out: Tensor | None = None
) -> Selected:
    """As select_top, for the entries at the given ascending int32 host indices."""
    finite = _accumulate(residual, gradient, out)
    taken = _take(residual, torch.as_tensor(indices, device=residual.device))
    return *taken, residual.numel() - int(finite)


def keep_largest(
    residual: Tensor, indices: Tensor, values: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest of what was selected; the others return to the residual."""
    kept = _largest(values, k)
    others = torch.ones_like(values, dtype=torch.bool)
    others[kept] = False
    residual[indices[others]] = values[others]
    return indices[kept], values[kept]


def largest_first(values: Tensor) -> Any:
    """(k,) float64 magnitudes on the host, falling."""
    return values.abs().double().sort(descending=True).values.cpu().numpy()


def norm(residual: Tensor) -> float:
    """The 2-norm, summed in float64."""
    return float(torch.linalg.vector_norm(residual, dtype=torch.float64))


select_some = select_top  # all that reach some bound: k, and here no more


def select_again(residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As select_some, with nothing to add."""
    return _take(residual, _largest(residual, k))


def count_magnitudes(values: Tensor) -> Any:
    """(bins,) int64 on the host: how many magnitudes each logarithmic bin holds."""
    size = values.element_size()
    patterns = values.abs().view(torch.int32 if size == 4 else torch.int64)
    places = (patterns >> SHIFTS[size]).long()
    return torch.bincount(places, minlength=BINS[size]).cpu().numpy()


def count_sums(residual: Tensor, gradient: Tensor) -> Any:
    """The same of residual + gradient; reads both, writes neither."""
    total = residual.clone()
    _accumulate(total, gradient, None)
    return count_magnitudes(total)


def draw(residual: Tensor, gradient: Tensor, rate: float, seed: int) -> Selected:
    """Overwrites residual with 0: each entry c is drawn with p, and sent as c / p."""
    finite = _accumulate(residual, gradient, None)
    chances = residual.abs() * torch.tensor(rate, dtype=residual.dtype)
    uniform = _uniform(residual.numel(), seed, residual.device)
    drawn = (uniform < chances).nonzero().flatten()
    values = residual[drawn] / chances[drawn].clamp(max=1)
    residual.zero_()
    return drawn.to(torch.int32), values, residual.numel() - int(finite)


def _uniform(n: int, seed: int, device: torch.device) -> Tensor:
    """As the reference's; int64 wraps as uint64 does, and shifts in its sign."""

    def shifted(word: Tensor, by: int) -> Tensor:
        return (word >> by) & ((1 << (64 - by)) - 1)

    word = torch.arange(1, n + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    word += _signed(seed)
    word = (word ^ shifted(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ shifted(word, 27)) * _signed(0x94D049BB133111EB)
    word = word ^ shifted(word, 31)
    return shifted(word, 12).double() * 2.0**-52


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return (word & (2**64 - 1)) - ((word >> 63 & 1) << 64)


def accumulate(residual: Tensor, gradient: Tensor) -> None:
    """Overwrites residual with residual + gradient where that is finite.

    In stretches: it is called where there was no room for temporaries of its size.
    """
    for low in range(0, residual.numel(), _STRETCH):
        part = slice(low, low + _STRETCH)
        _accumulate(residual[part], gradient[part], None)


def add_at(residual: Tensor, indices: Tensor, values: Tensor) -> None:
    """Overwrites residual[indices] with residual[indices] + values.

    Raises:
        IndexError: an index from the host is not in [0, n); nothing was written.
    """
    if not isinstance(indices, Tensor):  # looking at one on a device would wait for it
        check_places(indices, residual.numel())
    _add_at(residual, indices, values)


def _add_at(residual: Tensor, indices: Any, values: Any) -> None:
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
        _add_at(total, indices, values)
    out.copy_(total.mul_(torch.tensor(scale, dtype=total.dtype)))


def aggregate_coded(
    out: Tensor, payloads: Sequence[Coded], scale: float, cleared: bool = False
) -> None:
    """As aggregate; bytes come over the host, which decodes them."""
    like = np.empty(0, np.float64 if out.dtype == torch.float64 else np.float32)
    arrays = [host.decode(coded, out.numel(), like) for coded in payloads]
    lost = sum(c.k - len(a[0]) for c, a in zip(payloads, arrays, strict=True))
    if lost:
        raise ValueError(f"indices must ascend in [0, {out.numel()}), {lost} do not")
    for _, values in arrays:
        check_finite(values)
    aggregate(out, arrays, scale, cleared)


def random_indices(n: int, k: int, seed: int) -> Any:
    """k distinct ascending indices of range(n): the host's, alike on every rank."""
    return host.random_indices(n, k, seed)
