"""The hot loops in plain numpy: slow, obvious, and the oracle of the tests.

Every function has the contract of its namesake in `host`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.kernels.bins import BINS, SHIFTS
from hvd_sparse.kernels.coding import (
    BFLOAT16,
    CHUNK,
    FLOAT,
    FLOAT16,
    RAW,
    SIGN,
    Coded,
    integer_bits,
    shift,
    unary_bits,
)

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


def keep_largest(
    residual: Array, indices: Array, values: Array, k: int
) -> tuple[Array, Array]:
    """The k largest of what was selected; the others return to the residual."""
    kept = np.sort(_largest_first(values)[:k])
    back = np.setdiff1d(np.arange(values.size), kept)
    residual[indices[back]] = values[back]
    return indices[kept], values[kept]


def largest_first(values: Array) -> Array:
    """(k,) float64 magnitudes on the host, falling."""
    return np.sort(np.abs(values.astype(np.float64)))[::-1]


def norm(residual: Array) -> float:
    """The 2-norm, summed in float64."""
    with np.errstate(over="ignore"):
        return float(np.linalg.norm(residual.astype(np.float64)))


select_some = select_top  # all that reach some bound: k, and here no more


def select_again(residual: Array, k: int) -> tuple[Array, Array]:
    """As select_some, with nothing to add."""
    return _take(residual, _largest_first(residual)[:k])


def count_magnitudes(values: Array) -> Array:
    """(bins,) int64: how many magnitudes each logarithmic bin holds; see `bins`."""
    patterns = np.abs(values).view(f"u{values.itemsize}")
    places = (patterns >> patterns.dtype.type(SHIFTS[values.itemsize])).astype(np.int64)
    return np.bincount(places, minlength=BINS[values.itemsize])


def count_sums(residual: Array, gradient: Array) -> Array:
    """The same of residual + gradient; reads both, writes neither."""
    total = residual.copy()
    _accumulate(total, gradient, None)
    return count_magnitudes(total)


def draw(residual: Array, gradient: Array, rate: float, seed: int) -> Selected:
    """Overwrites residual with 0: each entry c is drawn with p, and sent as c / p."""
    nonfinite = _accumulate(residual, gradient, None)
    with np.errstate(over="ignore"):
        chances = np.abs(residual) * residual.dtype.type(rate)
    drawn = np.flatnonzero(_uniform(residual.size, seed) < chances)
    values = residual[drawn] / np.minimum(chances[drawn], residual.dtype.type(1))
    residual[:] = 0
    return drawn.astype(np.int32), values, nonfinite


def _uniform(n: int, seed: int) -> Array:
    """SplitMix64: (n,) float64 in [0, 1), of 52 bits, each from its index and seed."""
    word = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    word += np.uint64(seed)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    uniform: Array = (word >> np.uint64(12)).astype(np.float64) * 2.0**-52
    return uniform


def accumulate(residual: Array, gradient: Array) -> None:
    """Overwrites residual with residual + gradient where that is finite."""
    _accumulate(residual, gradient, None)


def add_at(residual: Array, indices: Array, values: Array) -> None:
    """Overwrites residual[indices] with residual[indices] + values.

    Raises:
        IndexError: an index is not in [0, n); nothing was written.
    """
    check_places(indices, residual.size)
    residual[indices] += values


def aggregate(
    out: Array,
    payloads: list[tuple[Array, Array]],
    scale: float,
    cleared: bool = False,
) -> None:
    """Overwrites out with scale * (payload_0 + payload_1 + ...), rank by rank."""
    del cleared
    for indices, values in payloads:
        check_indices(indices, out.size)
        check_finite(values)
    total = zeros_like(out)
    with np.errstate(over="ignore"):
        for indices, values in payloads:
            total[indices] += values
        out[...] = total * total.dtype.type(scale)


def check_places(indices: Array, n: int) -> None:
    """Raise IndexError unless all are in [0, n), in whatever order."""
    if indices.size and not 0 <= indices.min() <= indices.max() < n:
        raise IndexError(
            f"indices must be in [0, {n}), got {indices.min()} to {indices.max()}"
        )


def check_indices(indices: Array, n: int) -> None:
    """Raise ValueError unless they ascend in [0, n)."""
    inside = (indices >= 0) & (indices < n)
    inside[1:] &= np.diff(indices) > 0
    wrong = indices.size - np.count_nonzero(inside)
    if wrong:
        raise ValueError(
            f"indices must ascend in [0, {n}), {wrong} of {indices.size} do not"
        )


def check_finite(values: Array) -> None:
    """Raise ValueError unless all are."""
    wrong = values.size - np.count_nonzero(np.isfinite(values))
    if wrong:
        raise ValueError(f"values must be finite, {wrong} of {values.size} are not")


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


def aggregate_coded(
    out: Array, payloads: Sequence[Coded], scale: float, cleared: bool = False
) -> None:
    """The same of entries as they travel; see `hvd_sparse.kernels.coding`."""
    wide = np.float64 if out.dtype == np.float64 else np.float32
    arrays = [decode(coded, out.size, np.empty(0, wide)) for coded in payloads]
    aggregate(out, arrays, scale, cleared)


def decode(coded: Coded, n: int, like: Array) -> tuple[Array, Array]:
    """Indices and values, as arrays."""
    indices = coded.indices
    if coded.index_kind != RAW:
        indices = _read_elias_fano(coded.indices, coded.k, n)
    return indices, _read_values(coded, like.dtype)


def _read_elias_fano(data: Array, k: int, n: int) -> Any:
    if k == 0:
        return np.empty(0, np.int32)
    bits = np.unpackbits(data, bitorder="little").astype(np.int64)
    low = shift(n, k)
    start = unary_bits(n, k, low)
    ones = np.flatnonzero(bits[:start])[:k]
    high = np.append(ones, np.full(k - len(ones), n + k)) - np.arange(k)  # too few
    parts = bits[start : start + k * low].reshape(k, low)
    return (high << low | parts @ (1 << np.arange(low))).clip(0, n).astype(np.int32)


def _read_values(coded: Coded, dtype: Any) -> Any:
    data, k, kind = coded.values, coded.k, coded.value_kind
    if kind == FLOAT:
        return data
    if kind == FLOAT16:
        exponent = int(data[:2].view("<i2")[0])
        return np.ldexp(data[2:].view("<f2").astype(np.float64), exponent).astype(dtype)
    if kind == BFLOAT16:
        words = data.view("<u2").astype(np.uint32) << 16
        return words.view(np.float32).astype(dtype)
    if kind == SIGN:
        minus = np.unpackbits(data[dtype.itemsize :], bitorder="little")[:k]
        scale = data[: dtype.itemsize].view(dtype)
        return np.where(minus, -scale, scale)
    return _read_integers(data, k, integer_bits(kind), dtype)


def _read_integers(data: Array, k: int, width: int, dtype: Any) -> Any:
    half = dtype.itemsize // 2
    start = -(-k // CHUNK) * half
    scales = np.zeros((start // half, 2), f"<u{half}")
    scales[:, 1] = data[:start].view(f"<u{half}")
    bits = np.unpackbits(data[start:], bitorder="little")[: k * width]
    weights = 1 << np.arange(width)
    weights[-1] *= -1  # two's complement
    whole = bits.reshape(k, width) @ weights
    scale = scales.reshape(-1).view(dtype).astype(np.float64)
    return (whole * np.repeat(scale, CHUNK)[:k]).astype(dtype)
