"""Random indices that every machine draws alike: the start of a permutation."""

from typing import Any

import numpy as np

from hvd_sparse.kernels.host.arrays import Array
from hvd_sparse.kernels.host.jit import jit


@jit
def _mix(word: Any, key: Any) -> Any:
    """A 64-bit finaliser (multiply, xor-shift): every input bit moves every other."""
    word = (word ^ key) * np.uint64(0x9E3779B97F4A7C15)
    word ^= word >> np.uint64(32)
    word *= np.uint64(0xD6E8FEB86659FD93)
    return word ^ (word >> np.uint64(32))


@jit
def _permute(n: int, seed: Any, indices: Any) -> None:
    half = np.uint64(1)
    while (1 << (2 * np.int64(half))) < n:
        half += np.uint64(1)
    low = (np.uint64(1) << half) - np.uint64(1)
    for i in range(indices.size):
        place = np.uint64(i)
        while True:
            left, right = place >> half, place & low
            for turn in range(6):
                key = seed + np.uint64(turn) * np.uint64(0xBF58476D1CE4E5B9)
                left, right = right, left ^ (_mix(right, key) & low)
            place = (left << half) | right
            if place < np.uint64(n):
                break
        indices[i] = place


def random_indices(n: int, k: int, seed: int) -> Array:
    """k distinct indices of range(n), ascending int32, from a 64-bit seed alone.

    The first k places of a pseudo-random permutation: a Feistel network of six rounds
    (Luby and Rackoff, 1988) over the next power of four, walked until the place lies
    below n. Integers only, so every machine draws the same; no table of n flags.
    """
    indices = np.empty(k, np.int32)
    _permute(n, np.uint64(seed), indices)
    indices.sort()
    return indices
