"""Zeros for a large result: written past the caches, and never read.

An ordinary store first reads the cache line that it changes, and drives another one out
of the cache. A non-temporal one does neither, which is worth it where the result is so
large that its zeros leave the caches anyhow before the optimizer reads them.
"""

from typing import Any

from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.simd import LANES, fence, stream_zeros16

_BEYOND_CACHE = 32 << 20  # bytes of a result that no cache keeps until it is used
_FEW = 64  # elements an entry, from which on its cache lines are few


def are_streamed(size: int, itemsize: int, entries: int) -> bool:
    """Whether zeros are better streamed: few of them will be in a cache when needed."""
    return size * itemsize > _BEYOND_CACHE and entries * _FEW <= size


@jit
def stream_zeros(out: Any, first: int, stop: int) -> None:
    """Overwrites out[first:stop] with 0 without reading it; for what is large."""
    at, place = first, out.ctypes.data
    # whole cache lines alone can be streamed: up to the first one ordinary stores
    while at < stop and (place + at * out.itemsize) % 64:
        out[at] = 0
        at += 1
    whole = stop - (stop - at) % LANES
    for block in range(at, whole, LANES):
        stream_zeros16(out, block)
    out[whole:stop] = 0
    # Streamed stores may be seen after later ones, also by a thread that was told that
    # this one is done. From here on they are not.
    fence()
