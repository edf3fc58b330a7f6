"""How many threads a rank may use, and the small pool that runs them.

Kernels release the GIL and work on fixed parts of a tensor, so the number of threads
changes the time and never the bits. Numba's own `parallel=True` is not used: its
fallback threading layer aborts the process when two Python threads enter it.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")

# below this many elements a part is done before a second thread has woken up
SMALLEST_PART = 1 << 18

_LOCAL_SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "HOROVOD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "LOCAL_WORLD_SIZE",  # of torchrun
    "SLURM_NTASKS_PER_NODE",
)


def thread_count() -> int:
    """OMP_NUM_THREADS, or else this rank's share of the cores of its host."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    local_sizes = (os.environ.get(name, "") for name in _LOCAL_SIZE_VARIABLES)
    local_size = next((int(text) for text in local_sizes if text.isdigit()), 1)
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // max(1, local_size))


def parts(size: int, alignment: int) -> list[tuple[int, int]]:
    """Cut range(size) into one part a thread, at multiples of alignment."""
    if size < 2 * SMALLEST_PART:
        return [(0, size)]
    count = min(thread_count(), size // SMALLEST_PART)
    length = -(-size // (count * alignment)) * alignment
    return [(first, min(first + length, size)) for first in range(0, size, length)]


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="hvd_sparse")


# a forked child (a data loader's worker) inherits the pool but none of its threads
os.register_at_fork(after_in_child=_pool.cache_clear)


def run_parts(
    function: Callable[[int, int], T], cuts: Sequence[tuple[int, int]]
) -> list[T]:
    """function(first, stop) for every part, in the order of the parts."""
    if len(cuts) == 1:
        return [function(*cuts[0])]
    futures = [_pool(len(cuts)).submit(function, *cut) for cut in cuts[1:]]
    first = function(*cuts[0])
    return [first, *(future.result() for future in futures)]
