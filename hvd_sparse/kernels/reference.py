"""The hot loops in plain numpy: slow, obvious, and the oracle of the tests.

Every function has the contract of its namesake in `host`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Selected = tuple[Array, Array, int]


def zeros_like(gradient: Array) -> Array:
    """A residual for this gradient: float32, or float64 for float64."""
    wide = gradient.dtype == np.float64
    return np.zeros(gradient.size, np.float64 if wide else np.float32)


def _accumulate(residual: Array, gradient: Array, out: Array | None) -> int:
    with np.errstate(over="ignore", invalid="ignore"):
        total = residual + gradient.astype(residual.dtype)
    finite = np.isfinite(total)
    residual[finite] = total[finite]
    if out is not None:
        out[...] = 0
    return int(residual.size - np.count_nonzero(finite))


def _take(residual: Array, indices: Array) -> tuple[Array, Array]:
    indices = np.sort(indices).astype(np.int32)
    values = residual[indices]
    residual[indices] = 0
    return indices, values


def _largest_first(residual: Array) -> Array:
    """Indices by falling magnitude; a stable sort leaves ties in index order."""
    return np.argsort(-np.abs(residual), kind="stable")


def select_top(
    residual: Array, gradient: Array, k: int, out: Array | None = None
) -> Selected:
    """Overwrites residual with residual + gradient less its k largest entries."""
    nonfinite = _accumulate(residual, gradient, out)
    return *_take(residual, _largest_first(residual)[:k]), nonfinite


def select_above(
    residual: Array,
    gradient: Array,
    bound: float,
    limit: int,
    out: Array | None = None,
) -> Selected:
    """As select_top, for entries of magnitude >= bound, at most the limit largest."""
    nonfinite = _accumulate(residual, gradient, out)
    chosen = _largest_first(residual)[:limit]
    with np.errstate(over="ignore"):
        reach = np.abs(residual[chosen]) >= residual.dtype.type(bound)
    return *_take(residual, chosen[reach]), nonfinite


def select_at(
    residual: Array, gradient: Array, indices: Array, out: Array | None = None
) -> Selected:
    """As select_top, for the entries at the given indices."""
    nonfinite = _accumulate(residual, gradient, out)
    return *_take(residual, indices), nonfinite


def add_at(residual: Array, indices: Array, values: Array) -> None:
    """Overwrites residual[indices] with residual[indices] + values."""
    residual[indices] += values


def aggregate(
    out: Array,
    payloads: list[tuple[Array, Array]],
    scale: float,
    cleared: bool = False,
) -> None:
    """Overwrites out with scale * (payload_0 + payload_1 + ...), rank by rank."""
    del cleared
    for indices, _ in payloads:
        check_indices(indices, out.size)
    total = zeros_like(out)
    for indices, values in payloads:
        total[indices] += values
    with np.errstate(over="ignore"):
        out[...] = total * total.dtype.type(scale)


def check_indices(indices: Array, n: int) -> None:
    """Raise ValueError unless they ascend in [0, n)."""
    inside = (indices >= 0) & (indices < n)
    inside[1:] &= np.diff(indices) > 0
    wrong = indices.size - np.count_nonzero(inside)
    if wrong:
        raise ValueError(
            f"indices must ascend in [0, {n}), {wrong} of {indices.size} do not"
        )


def random_indices(n: int, k: int, seed: int) -> Array:
    """k distinct indices of range(n) from a seed: the first k of a permutation."""
    half = 1
    while 1 << (2 * half) < n:
        half += 1
    place = np.arange(k, dtype=np.uint64)
    outside = np.ones(k, bool)
    while outside.any():
        place[outside] = _feistel(place[outside], np.uint64(half), seed)
        outside = place >= n
    return np.sort(place).astype(np.int32)


def _feistel(place: Array, half: Any, seed: int) -> Array:
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = place >> half, place & low
    for turn in range(6):
        key = np.uint64((seed + turn * 0xBF58476D1CE4E5B9) % 2**64)
        left, right = right, left ^ (_mix(right, key) & low)
    whole: Array = (left << half) | right
    return whole


def _mix(word: Array, key: Any) -> Array:
    word = (word ^ key) * np.uint64(0x9E3779B97F4A7C15)
    word ^= word >> np.uint64(32)
    word *= np.uint64(0xD6E8FEB86659FD93)
    mixed: Array = word ^ (word >> np.uint64(32))
    return mixed
