"""Compiles all hot loops ahead of time: `python -m hvd_sparse.warm_up`.

What is compiled stays on disk for this processor, until a source of the kernels
changes: in an image or on a shared file system no job waits for it again. One process a
dtype, since Numba compiles one function at a time in each.
"""

import importlib
import logging
import os
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import numpy as np

from hvd_sparse.core.formats import Entries
from hvd_sparse.core.values import Float16
from hvd_sparse.kernels import host
from hvd_sparse.kernels.coding import plain
from hvd_sparse.kernels.host.entries import row_of

# the longest first: the 16-bit ones share much of what float32 needs
DTYPES = ("float32", "float64", "float16", "bfloat16")
_SAMPLED = 3 * 4096  # elements: more than what is selected without an estimate

logger = logging.getLogger("hvd_sparse")


def warm_up() -> None:
    """Compile every hot loop for every dtype there is, or find it on disk."""
    # ml_dtypes comes with torch and TensorFlow; NumPy alone has no bfloat16
    found = [d for d in DTYPES if d != "bfloat16" or find_spec("ml_dtypes")]
    workers = min(len(found), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_say_nothing
    ) as pool:
        list(pool.map(compile_for, found))


def _say_nothing() -> None:
    """Kernels say that they are being compiled to who did not ask for it."""
    logger.setLevel(logging.ERROR)


def compile_for(dtype: str) -> None:
    """All that the core calls with gradients of this dtype, in this process."""
    if dtype == "bfloat16":
        importlib.import_module("ml_dtypes")  # makes numpy know it
    gradient = np.linspace(-1, 1, _SAMPLED).astype(np.dtype(dtype))
    residual = host.zeros_like(gradient)
    indices, values, _ = host.select_top(residual, gradient, 8)
    host.add_at(residual, indices, values)
    host.accumulate(residual, gradient)
    host.select_above(residual, gradient, 0.5, 8)
    host.select_at(residual, gradient, host.random_indices(_SAMPLED, 8, 0))
    host.select_some(residual, gradient, 8)
    host.select_again(residual, 8)
    host.keep_largest(residual, *host.select_top(residual, gradient, 8)[:2], 4)
    host.count_sums(residual, gradient)
    host.count_magnitudes(residual)
    host.norm(residual)
    host.draw(residual, gradient, 0.5, 0)
    host.aggregate(gradient, [(indices, values)], 0.5)
    form = Entries(Float16())
    room = np.empty(form.bytes(8, residual.dtype.name, _SAMPLED), np.uint8)
    form.write(room, indices, values, _SAMPLED)
    form.read(room, 8, residual.dtype.name, _SAMPLED)
    if gradient.dtype == residual.dtype:
        table = np.array([row_of(plain(indices, values))])
        host.select_group([residual], [gradient], table)
        host.aggregate_group([gradient], table[None], 0.5)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()
    warm_up()
    logger.info("kernels are compiled, %.0f s", time.monotonic() - started)
